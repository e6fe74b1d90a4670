/**
 * Generation in a loop on the host: `prefill` once, then `decode` token by token. The same tokens as `generate`.
 *
 * Unlike in a run of `generate`, the host sees every token: for a callback, an abort, a deadline, or a stop text of several
 * tokens.
 *
 * @module
 */

import { BonnxError } from "./errors.mjs";
import { aggregate, bestOf, isStepwise } from "./selection.mjs";
import { makeBreathe } from "./sessions.mjs";

/** Why a completion ended; the output `finish_reasons` of a graph is an index into this, and only the host has a deadline. */
export const FINISH_REASONS = ["length", "stop", "pruned", "deadline"];

/** Candidates of one prompt while they grow. */
class Growing {
  /**
   * @param {object} options checked
   * @param {number | null} stepToken ends a step, for the step aggregations
   * @param {((tokens: number[]) => boolean) | null} ends whether the last of a candidate's tokens completes a stop text
   */
  constructor(options, stepToken, ends) {
    this.options = options;
    this.stepToken = stepToken;
    this.ends = ends;
    this.candidates = Array.from({ length: options.n }, () => ({
      tokens: [],
      scores: [],
      logProbs: [],
      reason: null,
      kept: true,
    }));
    this.computed = 0;
  }

  /** One token of each running candidate. */
  add(numbers, tokens, scores, logProbs) {
    numbers.forEach((number, row) => {
      const candidate = this.candidates[number];
      candidate.tokens.push(tokens[row]);
      // As in the graph: a token drawn from no distribution makes a candidate that cannot win.
      candidate.scores.push(Number.isNaN(logProbs[row]) ? NaN : scores[row]);
      candidate.logProbs.push(logProbs[row]);
      if (this.options.stops.tokens.includes(tokens[row]) || this.ends?.(candidate.tokens)) candidate.reason = "stop";
    });
    this.computed += numbers.length;
  }

  /** Each candidate's score as it stands, NaN for a pruned one, and the best index, -1 if nothing can win. */
  select() {
    const scores = this.candidates.map((candidate) => (candidate.reason === "pruned" ? NaN : this.#score(candidate)));
    return { scores, best: bestOf(scores) };
  }

  #score({ tokens, scores }) {
    const { aggregation } = this.options;
    const stepwise = isStepwise(aggregation);
    return aggregate(
      scores,
      tokens.map((token) => !stepwise || token === this.stepToken),
      aggregation,
    );
  }

  /** Keep the best of those that are still kept, ended ones included, as `generate` does. */
  prune() {
    const kept = survivors(
      this.candidates.map((candidate) => this.#score(candidate)),
      this.candidates.map((candidate) => candidate.kept),
      this.options.pruneKeep,
    );
    this.candidates.forEach((candidate, i) => {
      candidate.kept = kept[i];
      if (candidate.reason === null && !kept[i]) candidate.reason = "pruned";
    });
  }
}

/** Which candidates survive a pruning: the best share of those in `kept`, rounded as in the graph. */
function survivors(scores, kept, keep) {
  const ranked = scores.map((score, i) => (kept[i] && !Number.isNaN(score) ? score : -Infinity));
  const order = [...scores.keys()].sort((i, j) => (ranked[i] === ranked[j] ? i - j : ranked[i] > ranked[j] ? -1 : 1));
  const count = kept.filter(Boolean).length;
  const share = Math.fround(Math.fround(count * Math.fround(keep)) - Math.fround(1e-4));
  const going = new Set(order.slice(0, Math.max(1, Math.ceil(share))));
  return kept.map((each, i) => each && going.has(i));
}

/**
 * Generate; the same object is yielded after every token.
 *
 * @param {import("./sessions.mjs").Sessions} sessions
 * @param {number[]} prompt
 * @param {object} options checked
 * @param {number | null} stepToken
 * @param {((tokens: number[]) => boolean) | null} ends
 * @param {number | null} until on the clock of `performance.now`
 * @param {AbortSignal} [signal]
 */
export async function* decodeAll(sessions, prompt, options, stepToken, ends, until, signal) {
  const growing = new Growing(options, stepToken, ends);
  const { n, maxNewTokens } = options;
  const breathe = makeBreathe();
  const drawing = drawingFeeds(sessions, options);
  const mask = sessions.int64(
    prompt.map(() => 1),
    [1, prompt.length],
  );
  const graphs = sessions.manifest.graphs;
  // Says what is wrong if there is none.
  await sessions.open("decode", signal);
  if (!graphs.decode.inputs.some(({ name }) => name === "sources")) {
    throw new BonnxError(
      "schema",
      "the graph decode was written by an earlier version of bonnx; export the model again",
    );
  }
  // Nothing of the prompt has been read.
  const zeros = (shape) => sessions.float32(new Float32Array(shape.reduce((a, b) => a * b)), shape);
  const past = graphs.prefill.inputs
    .filter(({ name }) => /^past_(?:key|value)\./.test(name))
    .map(({ name, shape }) => [name, zeros(shape.map((size) => (typeof size === "number" ? size : 1)))]);
  const promptNames = graphs.prefill.outputs
    .map((value) => value.name)
    .filter((name) => /^prompt_(?:key|value)\.|^stream$/.test(name));
  const certain = graphs.prefill.outputs.some((value) => value.name === "certainty");
  const first = await sessions.run(
    "prefill",
    {
      input_ids: sessions.int64(prompt, [1, prompt.length]),
      attention_mask: mask,
      num_candidates: sessions.int64(n),
      seed: sessions.int64(options.seed),
      ...drawing,
      past_hash: sessions.int64([0], [1]),
      ...Object.fromEntries(past),
    },
    ["tokens", "log_probs", ...(certain ? ["certainty"] : []), ...promptNames],
    signal,
  );
  const fixed = {
    attention_mask: mask,
    ...drawing,
    ...Object.fromEntries(promptNames.map((name) => [name, first[name]])),
  };
  const cached = graphs.decode.inputs.filter(({ name }) => /^(?:key|value)\./.test(name));
  let cache = Object.fromEntries(
    cached.map(({ name, shape }) => [name, sessions.float32(new Float32Array(0), [1, shape[1], 0, shape[3]])]),
  );
  // Which row of the last run each row continues; a row that has read nothing may continue any.
  let sources = Array(n).fill(0);
  let tokens = Array.from(first.tokens.data, Number);
  let logProbs = Array.from(first.log_probs.data);
  // Without a scorer, the score of a token is the certainty of the distribution that it was drawn from.
  let scores = certain ? Array(n).fill(first.certainty.data[0]) : null;
  let numbers = [...Array(n).keys()];
  const wanted = [
    certain ? "certainties" : "scores",
    "next_tokens",
    "log_probs",
    ...cached.map(({ name }) => `grown_${name}`),
  ];
  for (let length = 1; length <= maxNewTokens; length += 1) {
    const rows = numbers.length;
    const perRow = { tokens, numbers, sources, prompts: Array(rows).fill(0), lengths: Array(rows).fill(length - 1) };
    const named = Object.entries(perRow).map(([name, values]) => [name, sessions.int64(values, [rows])]);
    const feeds = { ...fixed, ...cache, ...Object.fromEntries(named) };
    const outputs = await sessions.run("decode", feeds, wanted, signal);
    growing.add(numbers, tokens, scores ?? Array.from(outputs.scores.data), logProbs);
    if (options.pruneEvery && length % options.pruneEvery === 0) growing.prune();
    const late = until !== null && performance.now() > until;
    if (length === maxNewTokens || late) {
      for (const candidate of growing.candidates) candidate.reason ??= length === maxNewTokens ? "length" : "deadline";
    }
    yield growing;
    await breathe();
    signal?.throwIfAborted();
    const going = numbers.map((_, row) => row).filter((row) => growing.candidates[numbers[row]].reason === null);
    if (!going.length) return;
    numbers = going.map((row) => numbers[row]);
    tokens = going.map((row) => Number(outputs.next_tokens.data[row]));
    logProbs = going.map((row) => outputs.log_probs.data[row]);
    scores = certain ? going.map((row) => outputs.certainties.data[row]) : null;
    sources = going;
    cache = Object.fromEntries(cached.map(({ name }) => [name, outputs[`grown_${name}`]]));
  }
}

/** The feeds of a draw. */
export function drawingFeeds(sessions, { temperature, topK, topP }) {
  return {
    // At lower temperatures rounding errors of the logits would decide which token is drawn: the most likely one is taken.
    temperature: sessions.float32(Math.fround(temperature) >= Math.fround(1e-5) ? temperature : 0),
    top_k: sessions.int64(topK),
    // A share that float32 rounds to 0 still holds the most likely token.
    top_p: sessions.float32(Math.max(topP, 1.1754943508222875e-38)),
  };
}

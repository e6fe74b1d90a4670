/**
 * Sample candidates, score every token, choose the best: one run of the graph `generate`, or token by token.
 *
 * @module
 */

import { checkFunction, checkNames, checkNumber, checkSignal, checkWhole, checkedSeed, given } from "./checks.mjs";
import { FINISH_REASONS, decodeAll, drawingFeeds } from "./decoding.mjs";
import { BonnxError } from "./errors.mjs";
import { checkSize } from "./limits.mjs";
import { aggregationCode, isStepwise } from "./selection.mjs";
import { checkVote, makeBallot } from "./vote.mjs";

// The graphs take float32, whose largest number is little larger.
const MAX_FLOAT32 = 3.4e38;
const DEFAULTS = {
  n: 1,
  maxNewTokens: null,
  temperature: 1,
  topK: 0,
  topP: 1,
  seed: 0,
  stop: null,
  aggregation: null,
  pruneEvery: 0,
  pruneKeep: 0.5,
  vote: "score",
  answers: null,
  deadline: null,
  onToken: null,
  signal: undefined,
};

/**
 * See `Model.generate` in bonnx.d.mts.
 *
 * @param {object} manifest
 * @param {import("./reader.mjs").Reader} reader
 * @param {import("./sessions.mjs").Sessions} sessions
 */
export async function generate(manifest, reader, sessions, prompt, options = {}) {
  checkNames(options, Object.keys(DEFAULTS), "generate");
  const { vote, answers, deadline, onToken, signal, ...rest } = given(options, DEFAULTS);
  const { scoring } = manifest;
  checkVote(vote, answers, scoring);
  if (onToken !== null) checkFunction("onToken", onToken);
  if (deadline !== null) checkNumber("deadline", deadline, { above: 0 });
  const until = deadline === null ? null : performance.now() + 1000 * deadline;
  checkSignal(signal);
  if (!sessions.has("generate")) {
    throw new BonnxError(
      "input",
      `'${manifest.name}' does not generate: it has the graphs ${Object.keys(manifest.graphs).sort().join(", ")}`,
    );
  }
  const ids = reader.prompt(prompt);
  const checked = checkedOptions(manifest, reader, ids, rest);
  const make = (rows, best, computed) => ({
    bestIndex: best,
    get best() {
      return this.candidates[this.bestIndex] ?? null;
    },
    candidates: rows.map((row) => candidate(reader.tokenizer, ids, checked.stops.texts, row)),
    promptTokens: ids.length,
    computedTokens: computed,
    aggregation: checked.aggregation,
    answers: null,
    groupScores: null,
  });
  let result = null;
  // A single file has no graph that could be stopped after a token.
  const stops = signal !== undefined && sessions.has("decode");
  if (onToken !== null || stops || until !== null || checked.stops.inText) {
    const ends = checked.stops.inText
      ? (tokens) => reader.tokenizer.endsInStop(tokens, ids, checked.stops.texts)
      : null;
    for await (const growing of decodeAll(sessions, ids, checked, scoring.step_token, ends, until, signal)) {
      const last = growing.candidates.every(({ reason }) => reason !== null);
      if (onToken === null && !last) continue;
      const { scores, best } = growing.select();
      result = make(
        growing.candidates.map((each, i) => ({ ...each, score: scores[i] })),
        best,
        growing.computed,
      );
      await onToken?.(result);
    }
  } else {
    const { rows, best } = await inOneRun(scoring, sessions, ids, checked);
    signal?.throwIfAborted();
    result = make(
      rows,
      best,
      rows.reduce((sum, row) => sum + row.tokens.length, 0),
    );
  }
  if (result.bestIndex < 0) {
    throw new BonnxError(
      "no-winner",
      "none of the candidates can win: every score is NaN; look for NaN or infinity in the model",
    );
  }
  return answers === null ? result : chosenByVote(result, vote, answers, scoring);
}

/** The options, complete and checked. */
function checkedOptions(manifest, reader, ids, options) {
  const { scoring, limits } = manifest;
  const checked = {
    ...options,
    aggregation: options.aggregation ?? scoring.aggregation,
    maxNewTokens: options.maxNewTokens ?? Math.max(1, limits.max_tokens - ids.length),
    seed: checkedSeed(options.seed),
    stops: reader.stops(options.stop),
  };
  aggregationCode(checked.aggregation);
  checkWhole("n", checked.n, 1);
  checkWhole("maxNewTokens", checked.maxNewTokens, 1);
  checkWhole("topK", checked.topK, 0);
  checkWhole("pruneEvery", checked.pruneEvery, 0);
  checkNumber("temperature", checked.temperature, { least: 0, most: MAX_FLOAT32 });
  checkNumber("topP", checked.topP, { above: 0, most: 1 });
  checkNumber("pruneKeep", checked.pruneKeep, { above: 0, most: 1 });
  if (isStepwise(checked.aggregation) && scoring.step_token === null) {
    throw new BonnxError("option", "a step aggregation needs a step token, and the artifact's scoring rule has none");
  }
  checkSize(manifest, checked.n, ids.length, checked.maxNewTokens);
  return checked;
}

async function inOneRun(scoring, sessions, ids, options) {
  const { aggregation, n } = options;
  const stepToken = isStepwise(aggregation) ? scoring.step_token : -1;
  const feeds = {
    input_ids: sessions.int64(ids, [1, ids.length]),
    attention_mask: sessions.int64(
      ids.map(() => 1),
      [1, ids.length],
    ),
    num_candidates: sessions.int64(n),
    max_new_tokens: sessions.int64(options.maxNewTokens),
    seed: sessions.int64(options.seed),
    stop_tokens: sessions.int64(options.stops.tokens, [options.stops.tokens.length]),
    aggregation: sessions.int64(aggregationCode(aggregation)),
    step_token: sessions.int64(stepToken),
    prune_every: sessions.int64(options.pruneEvery),
    prune_keep: sessions.float32(options.pruneKeep),
    ...drawingFeeds(sessions, options),
  };
  const wanted = ["sequences", "lengths", "scores", "log_probs", "finish_reasons", "candidate_scores", "best_index"];
  const outputs = await sessions.run("generate", feeds, wanted);
  const width = outputs.sequences.dims[2];
  const rows = Array.from({ length: n }, (_, i) => {
    const row = ({ data }) => Array.from(data.slice(i * width, i * width + Number(outputs.lengths.data[i])), Number);
    return {
      tokens: row(outputs.sequences),
      scores: row(outputs.scores),
      logProbs: row(outputs.log_probs),
      score: outputs.candidate_scores.data[i],
      reason: FINISH_REASONS[Number(outputs.finish_reasons.data[i])],
    };
  });
  return { rows, best: Number(outputs.best_index.data[0]) };
}

function candidate(tokenizer, ids, stopTexts, { tokens, scores, logProbs, score, reason }) {
  const text = tokenizer === null ? null : tokenizer.decode(tokens, ids, reason, stopTexts);
  return { text, tokens: [...tokens], scores: [...scores], logProbs: [...logProbs], score, finishReason: reason };
}

/** The same candidates, with their answers and the winner of the vote. */
function chosenByVote(result, vote, answers, scoring) {
  const items = result.candidates.map((each) => each.text ?? each.tokens);
  const ballot = makeBallot(vote, answers, items, new Set(), scoring);
  const [best, groups] = ballot.choose(result.candidates.map((each) => each.score));
  result.bestIndex = best;
  result.answers = ballot.answers;
  result.groupScores = vote === "score" ? null : groups;
  return result;
}

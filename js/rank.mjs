/**
 * Score candidates after a prompt and choose the best: one run of the graph `rank`, or of `score` where the candidates
 * share no token of the prompt.
 *
 * @module
 */

import { checkFlag, checkNames, checkSignal, given, shown } from "./checks.mjs";
import { BonnxError } from "./errors.mjs";
import { checkSize } from "./limits.mjs";
import { aggregate, aggregationCode, isStepwise, standing } from "./selection.mjs";
import { makeBallot } from "./vote.mjs";

const DEFAULTS = {
  aggregation: null,
  stepMasks: null,
  partial: false,
  truncate: false,
  instruction: null,
  vote: "score",
  answers: null,
  signal: undefined,
};

/**
 * See `Model.rank` in bonnx.d.mts.
 *
 * @param {object} manifest
 * @param {import("./reader.mjs").Reader} reader
 * @param {import("./sessions.mjs").Sessions} sessions
 */
export async function rank(manifest, reader, sessions, prompt, candidates, options = {}) {
  checkNames(options, Object.keys(DEFAULTS), "rank");
  const { stepMasks, partial, truncate, instruction, vote, answers, signal, ...rest } = given(options, DEFAULTS);
  const { scoring } = manifest;
  if (scoring.token_score !== "scorer") {
    throw new BonnxError(
      "input",
      `ranking needs a scorer, and '${manifest.name}' was exported with --no-scorer; train a scorer and export without that option`,
    );
  }
  const aggregation = rest.aggregation ?? scoring.aggregation;
  const code = aggregationCode(aggregation);
  checkFlag("partial", partial);
  checkFlag("truncate", truncate);
  checkSignal(signal);
  if (!Array.isArray(candidates) || !candidates.length) {
    throw new BonnxError("input", `candidates: expected a list of at least one candidate; got ${shown(candidates)}`);
  }
  const rows = withSharedGate(scoring, reader.pairs(prompt, candidates, { partial, truncate, instruction }));
  const ballot = makeBallot(vote, answers, candidates, rows.unreadable, scoring);
  const length = Math.max(...rows.items.map((item) => item.length));
  checkSize(manifest, candidates.length, rows.prompt.length, length);
  const reads = readable(scoring, aggregation, rows, stepMasks, reader.width);

  const feeds = { reads, code, ballot, length };
  const beyond = rowsBeyond(manifest, rows, length);
  let outputs;
  if (beyond === null)
    outputs = await run(
      manifest,
      sessions,
      reader.width,
      rows,
      feeds,
      rows.items.map(() => true),
      signal,
    );
  else {
    const near = await run(
      manifest,
      sessions,
      reader.width,
      rows,
      feeds,
      beyond.map((far) => !far),
      signal,
    );
    const far = await run(manifest, sessions, reader.width, rows, feeds, beyond, signal);
    const pick = (name) => near[name].map((value, i) => (beyond[i] ? far[name][i] : value));
    const candidateScores = pick("candidateScores");
    const [best, groupScores] = ballot.choose(candidateScores);
    outputs = {
      best,
      candidateScores,
      groupScores,
      scores: pick("scores"),
      objectives: near.objectives && pick("objectives"),
    };
  }
  signal?.throwIfAborted();
  return ranking(scoring, candidates, aggregation, rows, reads, ballot, outputs);
}

/** Run the graph; the candidates that are not `included` are padding. Its outputs by candidate. */
async function run(manifest, sessions, width, rows, { reads, code, ballot, length }, included, signal) {
  const { scoring } = manifest;
  const count = rows.items.length;
  const [suffix, fill] = width === null ? ["ids", scoring.pad_token] : ["embeds", new Float32Array(width)];
  const values = rows.items.map((item) => [...item, ...Array(length - item.length).fill(fill)]);
  const mask = rows.items.map((item, i) => Array.from({ length }, (_, t) => Number(included[i] && t < item.length)));
  const tensor = (table, dims) => {
    if (width === null) return sessions.int64(table, dims);
    const data = new Float32Array(dims.reduce((product, size) => product * size, width));
    table.flat().forEach((row, i) => data.set(row, i * width));
    return sessions.float32(data, [...dims, width]);
  };
  const shared = {
    step_mask: sessions.int64(
      reads.map((row) => row.map(Number)),
      [count, 1, length],
    ),
    aggregation: sessions.int64(code),
    answer_ids: sessions.int64(ballot.ids, [count, 1]),
    vote: sessions.int64(ballot.code),
  };
  const wanted = [
    "scores",
    "candidate_scores",
    "best_index",
    "group_scores",
    ...(scoring.gate_tokens.length ? ["objectives"] : []),
  ];
  let outputs;
  if (rows.prompt.length || !(sessions.has("score") || scoring.gate_tokens.length)) {
    // A prompt without tokens is one position of padding.
    const prompt = rows.prompt.length ? rows.prompt : [fill];
    const feeds = {
      [`prompt_${suffix}`]: tensor([prompt], [1, prompt.length]),
      prompt_mask: sessions.int64(
        prompt.map(() => Number(rows.prompt.length > 0)),
        [1, prompt.length],
      ),
      [`candidate_${suffix}`]: tensor(values, [count, 1, length]),
      candidate_mask: sessions.int64(mask, [count, 1, length]),
      ...shared,
    };
    outputs = await sessions.run("rank", feeds, wanted, signal);
  } else {
    // The prompt's last token is merged with each candidate's first one, so no tokens are shared.
    const feeds = {
      [width === null ? "input_ids" : "inputs_embeds"]: tensor(values, [count, length]),
      attention_mask: sessions.int64(mask, [count, length]),
      num_candidates: sessions.int64(count),
      ...shared,
    };
    outputs = await sessions.run("score", feeds, wanted, signal);
  }
  const by = (data, size) => rows.items.map((_, i) => Array.from(data.slice(i * size, (i + 1) * size)));
  const names = scoring.labels.length;
  return {
    best: Number(outputs.best_index.data[0]),
    candidateScores: Array.from(outputs.candidate_scores.data),
    groupScores: Array.from(outputs.group_scores.data),
    scores: by(outputs.scores.data, length),
    objectives: outputs.objectives && by(outputs.objectives.data, length * names),
  };
}

function ranking(scoring, candidates, aggregation, rows, reads, ballot, outputs) {
  const { best, candidateScores, groupScores, scores } = outputs;
  if (best < 0) {
    throw new BonnxError(
      "no-winner",
      "none of the candidates can win: every score is NaN; look for NaN or infinity in the inputs",
    );
  }
  const own = (row, i) => row.slice(0, rows.items[i].length);
  let objectives = null;
  if (outputs.objectives) {
    const value = (i, k) =>
      aggregate(
        own(reads[i], i).map((_, t) => outputs.objectives[i][t * scoring.labels.length + k]),
        own(reads[i], i),
        aggregation,
      );
    objectives = Object.fromEntries(scoring.labels.map((name, k) => [name, candidates.map((_, i) => value(i, k))]));
  }
  return {
    bestIndex: best,
    best: candidates[best],
    candidateScores,
    scores: scores.map((row, i) => own(row, i).slice(rows.skip[i])),
    aggregation,
    ...standing(candidateScores, groupScores, ballot.ids, ballot.vote),
    answers: ballot.answers,
    groupScores: ballot.vote === "score" ? null : groupScores,
    stepScores: isStepwise(aggregation) ? scores.map((row, i) => own(row, i).filter((_, t) => reads[i][t])) : null,
    cut: rows.cut,
    unreadable: Object.fromEntries(rows.unreadable),
    objectives,
  };
}

/** The positions that an aggregation may read: for each candidate one flag for each place of the longest. */
function readable(scoring, aggregation, rows, stepMasks, width) {
  const length = Math.max(...rows.items.map((item) => item.length));
  const table = (flag) => rows.items.map((item, i) => Array.from({ length }, (_, t) => flag(item, i, t)));
  let reads;
  if (!isStepwise(aggregation)) {
    if (stepMasks !== null) {
      throw new BonnxError(
        "option",
        `stepMasks: aggregation '${aggregation}' does not read them; pass 'step_${aggregation}', or no stepMasks`,
      );
    }
    const passes = aggregation === "last" && scoring.passes_pad && width === null;
    reads = table((item, i, t) => !passes || (item[t] ?? scoring.pad_token) !== scoring.pad_token);
  } else if (stepMasks !== null) {
    checkMasks(
      stepMasks,
      rows.skip.map((taken) => length - taken),
    );
    reads = table((item, i, t) => Boolean(stepMasks[i][t - rows.skip[i]]));
  } else if (rows.ends !== null) reads = table((item, i, t) => Boolean(rows.ends[i][t]));
  else if (scoring.step_token === null || width !== null) {
    throw new BonnxError(
      "option",
      "a step aggregation needs stepMasks here: the artifact's scoring rule has no step token",
    );
  } else reads = table((item, i, t) => (item[t] ?? scoring.pad_token) === scoring.step_token);
  return reads.map((row, i) => row.map((flag, t) => flag && t >= rows.skip[i]));
}

/** Refuse step masks that do not mark each of a row's tokens with 0 or 1. */
function checkMasks(stepMasks, lengths) {
  if (!Array.isArray(stepMasks) || stepMasks.length !== lengths.length) {
    throw new BonnxError(
      "option",
      `stepMasks: expected a list with one for each of ${lengths.length} candidates; got ${shown(stepMasks)}`,
    );
  }
  stepMasks.forEach((marks, i) => {
    if (
      !Array.isArray(marks) ||
      !marks.every((mark) => [0, 1, true, false].includes(mark)) ||
      marks.length > lengths[i]
    ) {
      throw new BonnxError(
        "option",
        `stepMasks[${i}]: expected 0 or 1 for each of at most ${lengths[i]} tokens; got ${shown(marks)}`,
      );
    }
  });
}

/** Which candidates must run apart from the others: those whose rotation changes with their length; null for none. */
function rowsBeyond(manifest, rows, length) {
  const scaling = (manifest.model.network ?? manifest.model).rope_scaling;
  if (
    scaling?.kind !== "longrope" ||
    !rows.prompt.length ||
    rows.prompt.length + length <= scaling.original_max_positions
  )
    return null;
  const beyond = rows.items.map((item) => rows.prompt.length + item.length > scaling.original_max_positions);
  return beyond.every(Boolean) || !beyond.some(Boolean) ? null : beyond;
}

/** Rows whose gates all read the prompt; if one reads its candidate, rows without a prompt. */
function withSharedGate(scoring, rows) {
  const header = scoring.gate_tokens;
  if (!header.length) return rows;
  rows.items.forEach((item, i) => {
    if (item.length && lastHeader([...rows.prompt, ...item], header) < 0) {
      throw new BonnxError(
        "input",
        `candidates[${i}]: the gate of this model reads the header of an assistant's turn (tokens ${header.join(", ")}) and finds none; ` +
          "pass messages, so that the chat template writes it, or a text that contains it",
      );
    }
  });
  // The end of the prompt and the beginning of a candidate may form a header together.
  const tail = rows.prompt.slice(Math.max(0, rows.prompt.length - header.length + 1));
  if (lastHeader(rows.prompt, header) >= 0 && rows.items.every((item) => lastHeader([...tail, ...item], header) < 0))
    return rows;
  const before = rows.prompt.length;
  return {
    ...rows,
    prompt: [],
    items: rows.items.map((item) => (item.length ? [...rows.prompt, ...item] : item)),
    ends: rows.ends && rows.ends.map((ends) => (ends.length ? [...Array(before).fill(false), ...ends] : ends)),
    skip: rows.skip.map((skip, i) => (rows.items[i].length ? before + skip : 0)),
  };
}

/** Where the last header begins, or -1. */
function lastHeader(tokens, header) {
  for (let place = tokens.length - header.length; place >= 0; place -= 1) {
    if (header.every((token, i) => tokens[place + i] === token)) return place;
  }
  return -1;
}

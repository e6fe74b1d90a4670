/**
 * Choosing among scores: aggregation and votes, by the same rules as in the graphs.
 *
 * @module
 */

import { shown } from "./checks.mjs";
import { BonnxError } from "./errors.mjs";

/** How the scores of a candidate's tokens become one. The input `aggregation` of a graph is an index into this. */
const AGGREGATIONS = ["last", "mean", "min", "max", "prod"];
/** And `vote` into this; `score` is no vote. */
export const VOTES = ["score", "weighted", "majority"];

const READ = {
  last: (values) => values.at(-1),
  mean: (values) => values.reduce((sum, value) => sum + value, 0) / values.length,
  min: (values) => values.reduce((least, value) => (Number.isNaN(value) ? value : Math.min(least, value))),
  max: (values) => values.reduce((most, value) => (Number.isNaN(value) ? value : Math.max(most, value))),
  prod: (values) => values.reduce((product, value) => product * value, 1),
};

/** Whether an aggregation reads only the positions where a step ends. */
export function isStepwise(name) {
  return name.startsWith("step_");
}

/** The graph's number for an aggregation. */
export function aggregationCode(name) {
  const code = typeof name === "string" ? AGGREGATIONS.indexOf(name.replace(/^step_/, "")) : -1;
  if (code < 0) {
    const choices = [...AGGREGATIONS, ...AGGREGATIONS.map((each) => `step_${each}`)].join(", ");
    throw new BonnxError("option", `aggregation: expected one of ${choices}; got ${shown(name)}`);
  }
  return code;
}

/**
 * The score of a candidate; NaN for one with no tokens. Without the end of a step only its last token is read.
 *
 * @param {number[]} scores of its tokens
 * @param {boolean[]} reads which of them the aggregation may read
 * @param {string} name
 */
export function aggregate(scores, reads, name) {
  if (!scores.length) return NaN;
  const read = scores.filter((_, i) => reads[i]);
  return Math.fround(READ[name.replace(/^step_/, "")](read.length ? read : scores.slice(-1)));
}

/** The index of the largest score: ties to the lowest index, NaN never, -1 when nothing can win. */
export function bestOf(scores) {
  let best = -1;
  scores.forEach((score, i) => {
    if (!Number.isNaN(score) && (best < 0 || score > scores[best])) best = i;
  });
  return best;
}

/**
 * The winner of a vote.
 *
 * @param {number[]} scores of the candidates
 * @param {number[]} ids equal for equal answers; below 0 where there is none
 * @param {string} vote one of `VOTES`
 * @param {string} weight `scoring.vote_weight` of the manifest
 * @returns {[number, number[]]} the index, -1 for none; and the group scores
 */
export function elect(scores, ids, vote, weight) {
  const voters = [...scores.keys()].filter((i) => ids[i] >= 0 && !Number.isNaN(scores[i]));
  if (vote === "score" || !voters.length) return [bestOf(scores), [...scores]];
  const weights = new Map(voters.map((i) => [i, vote === "majority" ? 1 : scores[i]]));
  if (vote === "weighted" && weight === "softmax") {
    const most = Math.max(...voters.map((i) => scores[i]));
    const shares = voters.map((i) => Math.exp(scores[i] === most ? 0 : Math.fround(scores[i] - most)));
    const sum = shares.reduce((total, share) => total + share, 0);
    voters.forEach((i, k) => weights.set(i, Math.fround(shares[k] / sum)));
  }
  const groups = scores.map(() => NaN);
  for (const i of voters) {
    const same = voters.filter((j) => ids[j] === ids[i]);
    groups[i] = Math.fround(same.reduce((sum, j) => sum + weights.get(j), 0));
  }
  const leader = bestOf(groups);
  const together = scores.map((score, i) => (ids[i] === ids[leader] && !Number.isNaN(groups[i]) ? score : NaN));
  return [bestOf(together), groups];
}

/**
 * The order of all candidates, best first, and the winner's lead.
 *
 * @returns {{order: number[], margin: number | null}}
 */
export function standing(scores, groups, ids, vote) {
  const excluded = groups.map(Number.isNaN);
  // The first of each group: the candidates of an answer, or each by itself.
  const leaders = groups.map((_, i) => (excluded[i] ? groups.length : i));
  if (vote !== "score" && !ids.every((id, i) => id < 0 || excluded[i])) {
    const first = new Map();
    groups.forEach((_, i) => {
      if (excluded[i]) return;
      if (!first.has(ids[i])) first.set(ids[i], i);
      leaders[i] = first.get(ids[i]);
    });
  }
  // NaN comes last.
  const descending = (a, b) =>
    Number.isNaN(a) || Number.isNaN(b)
      ? Number(Number.isNaN(a)) - Number(Number.isNaN(b))
      : a === b
        ? 0
        : a > b
          ? -1
          : 1;
  const order = [...scores.keys()].sort(
    (i, j) =>
      excluded[i] - excluded[j] ||
      descending(groups[i], groups[j]) ||
      leaders[i] - leaders[j] ||
      descending(scores[i], scores[j]) ||
      i - j,
  );
  const second = order.find((i) => leaders[i] !== leaders[order[0]] && !excluded[i]);
  const best = groups[order[0]];
  const margin = second === undefined ? null : best === groups[second] ? 0 : best - groups[second];
  return { order, margin };
}

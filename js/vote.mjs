/**
 * Votes: the answers of candidates become the numbers that a graph takes.
 *
 * @module
 */

import { extractor } from "./answers.mjs";
import { shown } from "./checks.mjs";
import { BonnxError } from "./errors.mjs";
import { VOTES, elect } from "./selection.mjs";
import { readsTools, toolExtractor } from "./tool_calls.mjs";

/** How candidates vote. */
class Ballot {
  /**
   * @param {string} vote one of `VOTES`
   * @param {unknown[] | null} answers one for each candidate, null for none; null if none were given
   * @param {number[]} ids equal for equal answers, -1 for none
   * @param {string} weight `scoring.vote_weight` of the manifest
   */
  constructor(vote, answers, ids, weight) {
    this.vote = vote;
    this.answers = answers;
    this.ids = ids;
    this.weight = weight;
  }

  /** The graph's number of the vote. */
  get code() {
    return VOTES.indexOf(this.vote);
  }

  /** The index of the winner among candidates with these scores, -1 for none; and the group scores. */
  choose(scores) {
    return elect(scores, this.ids, this.vote, this.weight);
  }
}

/**
 * Refuse a vote before anything is generated: no such vote, one without answers, or answers that are not a way to find
 * them in a candidate.
 */
export function checkVote(vote, answers, scoring) {
  if (
    answers !== null &&
    typeof answers !== "string" &&
    typeof answers !== "function" &&
    !(answers instanceof RegExp)
  ) {
    throw new BonnxError(
      "option",
      `answers: there are no candidates yet; expected 'boxed', 'number', 'regex:PATTERN', a RegExp or a function; got ${shown(answers)}`,
    );
  }
  makeBallot(vote, answers, [], new Set(), scoring);
}

/**
 * Read the answers of candidates.
 *
 * @param {string} vote
 * @param {unknown} answers a list, a function, a RegExp, or the name of an extractor; null for none
 * @param {unknown[]} candidates what an extractor reads
 * @param {{has(i: number): boolean}} unreadable those that an extractor does not see
 * @param {object} scoring of the manifest
 */
export function makeBallot(vote, answers, candidates, unreadable, scoring) {
  if (!VOTES.includes(vote))
    throw new BonnxError("option", `vote: expected one of ${VOTES.join(", ")}; got ${shown(vote)}`);
  if (answers === null) {
    if (vote !== "score") {
      throw new BonnxError(
        "option",
        `vote '${vote}' needs answers: pass a list with one for each candidate, 'boxed', 'number', 'regex:PATTERN', a RegExp, or a function of a candidate`,
      );
    }
    return new Ballot(
      vote,
      null,
      candidates.map(() => -1),
      scoring.vote_weight,
    );
  }
  if (vote === "weighted" && scoring.activation === "none" && scoring.vote_weight === "score") {
    throw new BonnxError(
      "option",
      "vote 'weighted': this artifact's graphs add up raw scores, and one below 0 counts against its own answer; export the model again, or vote by 'score' or 'majority'",
    );
  }
  const read = readAnswers(answers, candidates, unreadable);
  const numbers = new Map();
  const ids = read.map((answer, i) => {
    if (answer === null || answer === undefined) return -1;
    if (typeof answer === "object" || typeof answer === "function") {
      throw new BonnxError(
        "option",
        `answers[${i}]: expected a text, a number or null, which can be compared; got ${shown(answer)}`,
      );
    }
    if (!numbers.has(answer)) numbers.set(answer, numbers.size);
    return numbers.get(answer);
  });
  return new Ballot(
    vote,
    read.map((answer) => answer ?? null),
    ids,
    scoring.vote_weight,
  );
}

function readAnswers(answers, candidates, unreadable) {
  if (Array.isArray(answers)) {
    if (answers.length !== candidates.length) {
      throw new BonnxError(
        "option",
        `answers: expected one for each of ${candidates.length} candidates; got ${answers.length}`,
      );
    }
    return answers;
  }
  let find = typeof answers === "function" ? answers : null;
  if (typeof answers === "string" && readsTools(answers)) find = toolExtractor(answers);
  if (find !== null) return candidates.map((candidate, i) => (unreadable.has(i) ? null : find(candidate)));
  if (typeof answers !== "string" && !(answers instanceof RegExp)) {
    throw new BonnxError(
      "option",
      `answers: expected a list, a function, a RegExp or the name of an extractor; got ${shown(answers)}`,
    );
  }
  const extract = extractor(answers);
  return candidates.map((candidate, i) => {
    if (unreadable.has(i)) return null;
    if (typeof candidate !== "string") {
      throw new BonnxError(
        "option",
        `answers ${shown(answers)} reads text, and candidates[${i}] is none; pass the answers, or a function`,
      );
    }
    return extract(candidate);
  });
}

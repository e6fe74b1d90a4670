/**
 * Limits on sizes, checked before anything is computed.
 *
 * @module
 */

import { BonnxError } from "./errors.mjs";

/**
 * Refuse work beyond the artifact's limits.
 *
 * @param {object} manifest
 * @param {number} rows candidates
 * @param {number} prompt tokens of the prompt
 * @param {number} length tokens of the longest candidate
 */
export function checkSize(manifest, rows, prompt, length) {
  const { max_tokens: maxTokens, max_candidates: maxCandidates } = manifest.limits;
  if (rows > maxCandidates) {
    throw new BonnxError(
      "too-large",
      `${rows} candidates: this artifact takes at most ${maxCandidates} at once; split them`,
    );
  }
  if (prompt + length > maxTokens) {
    throw new BonnxError(
      "too-large",
      `a prompt of ${prompt} tokens and a candidate of ${length}: this artifact takes at most ${maxTokens} together; shorten them, or export again with --max-tokens`,
    );
  }
}

/**
 * Every error that the module raises on purpose.
 *
 * @module
 */

/**
 * Why something failed: `code` is for programs, the message for people. docs/javascript.md explains each.
 *
 * @type {readonly ["missing", "damaged", "schema", "tokenizer", "template", "runtime", "memory", "option", "input",
 *   "too-large", "no-winner"]}
 */
export const CODES = Object.freeze([
  "missing",
  "damaged",
  "schema",
  "tokenizer",
  "template",
  "runtime",
  "memory",
  "option",
  "input",
  "too-large",
  "no-winner",
]);

/** The root: the message says what failed, what was expected, what was found and what to do. */
export class BonnxError extends Error {
  /**
   * @param {typeof CODES[number]} code
   * @param {string} message
   * @param {ErrorOptions} [options]
   */
  constructor(code, message, options) {
    super(message, options);
    this.name = "BonnxError";
    this.code = code;
  }
}

/** The hint for an unknown name: the one that was probably meant, or all known names. */
export function nearMiss(name, known) {
  const near = known
    .map((each) => [distance(String(name).toLowerCase(), each.toLowerCase()), each])
    .sort((a, b) => a[0] - b[0])[0];
  return near && near[0] <= Math.max(2, near[1].length / 3)
    ? `did you mean '${near[1]}'?`
    : `known options: ${known.join(", ")}`;
}

/** Insertions, deletions and replacements that turn one text into the other. */
function distance(a, b) {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i += 1) {
    const next = [i];
    for (let j = 1; j <= b.length; j += 1) {
      next.push(Math.min(row[j] + 1, next[j - 1] + 1, row[j - 1] + (a[i - 1] === b[j - 1] ? 0 : 1)));
    }
    row = next;
  }
  return row[b.length];
}

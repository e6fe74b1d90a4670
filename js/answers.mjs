/**
 * The answer that a text ends in, in a form in which equal answers are equal: what candidates vote for.
 *
 * `boxed` reads the last \boxed{...}, `number` the last number, `regex:PATTERN` or a RegExp the last match.
 *
 * @module
 */

import { shown } from "./checks.mjs";
import { BonnxError } from "./errors.mjs";
import { lastNumber, readNumber } from "./numerals.mjs";
import { WHITE, pythonPattern } from "./pattern.mjs";

const BRACE = /\\[^]|[{}]/gu;
const WRAPPER = /\\(?:text|textbf|mathrm|mathbf|mbox|boxed)\{/y;
const BLANKS = new RegExp(`[${WHITE}]+`, "gu");

/**
 * The function that `boxed`, `number`, `regex:PATTERN` or a RegExp stands for.
 *
 * @param {string | RegExp} name
 * @returns {(text: string) => string | null}
 */
export function extractor(name) {
  if (name === "boxed") return boxed;
  if (name === "number") return lastNumber;
  if (name instanceof RegExp)
    return (text) => lastMatch(new RegExp(name.source, name.flags.replace(/[gy]/g, "") + "g"), text);
  if (!name.startsWith("regex:")) {
    throw new BonnxError(
      "option",
      `answers: expected 'boxed', 'number', 'regex:PATTERN', 'tool' or 'tool-except:FIELD'; got ${shown(name)}`,
    );
  }
  const pattern = pythonPattern(name.slice("regex:".length));
  return (text) => lastMatch(pattern, text);
}

/** The last \boxed{...} whose braces are balanced, in canonical form. */
function boxed(text) {
  const pairs = braces(text);
  const starts = [...pairs.keys()].filter(
    (start) => text.endsWith("\\boxed", start) || text.endsWith("\\boxed ", start),
  );
  if (!starts.length) return null;
  const start = starts.reduce((last, each) => Math.max(last, each));
  return canonical(text.slice(start + 1, pairs.get(start)));
}

/**
 * One form for texts that mean the same; null if nothing is left.
 *
 * A number becomes a decimal, or a fraction in lowest terms if its decimals never end. Other text loses white space
 * around it, a period at its end, outer $...$, \(...\), {...} and \text{...}; white space inside becomes one blank.
 */
function canonical(text) {
  const plain = unwrapped(text.replace(BLANKS, " ").replace(/^ | $/g, ""));
  return readNumber(plain) ?? (plain || null);
}

/** The last match that is not empty; of a pattern with groups the first group. */
function lastMatch(pattern, text) {
  let last = null;
  for (const match of text.matchAll(pattern)) {
    last = canonical(match.length > 1 ? (match[1] ?? "") : match[0]) ?? last;
  }
  return last;
}

/** Where each balanced brace opens and where it closes; one after a backslash is a character like any other. */
function braces(text) {
  const pairs = new Map();
  const opened = [];
  for (const { 0: brace, index } of text.matchAll(BRACE)) {
    if (brace === "{") opened.push(index);
    else if (brace === "}" && opened.length) pairs.set(opened.pop(), index);
  }
  return pairs;
}

/** Without periods at the end, outer dollars and text commands, however many. */
function unwrapped(text) {
  const pairs = braces(text);
  let start = 0;
  let end = text.length;
  while (start < end) {
    WRAPPER.lastIndex = start;
    const wrapper = WRAPPER.exec(text);
    const inner = wrapper === null ? 0 : start + wrapper[0].length;
    const ends = [text.slice(start, start + 2), text.slice(end - 2, end)].join("");
    if (text[start] === " ") start += 1;
    else if (" .".includes(text[end - 1])) end -= 1;
    else if ((text[start] === "$" && text[end - 1] === "$" && end - start > 1) || pairs.get(start) === end - 1) {
      start += 1;
      end -= 1;
    } else if (end - start > 3 && (ends === "\\(\\)" || ends === "\\[\\]")) {
      start += 2;
      end -= 2;
    } else if (wrapper !== null && inner <= end && pairs.get(inner - 1) === end - 1) {
      start = inner;
      end -= 1;
    } else break;
  }
  return text.slice(start, end);
}

/**
 * Python's regular expressions as JavaScript's: a pattern finds the same in both, or is refused.
 *
 * @module
 */

import { BonnxError } from "./errors.mjs";

/** Python's white space, inside a character class. */
export const WHITE = "\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
/** The characters of Python's `\w`, inside a character class. */
export const WORD = "\\p{L}\\p{N}_";
const ENDS = new RegExp(`^[${WHITE}]+|[${WHITE}]+$`, "gu");

/** A text without white space at its ends, as Python's `strip` gives it: JavaScript's `trim` takes other characters. */
export function strip(text) {
  return text.replace(ENDS, "");
}

const BORDER = `(?:(?<![${WORD}])(?=[${WORD}])|(?<=[${WORD}])(?![${WORD}]))`;
const NO_BORDER = `(?:(?<![${WORD}])(?![${WORD}])|(?<=[${WORD}])(?=[${WORD}]))`;
const CLASSES = { d: "\\p{Nd}", s: WHITE, w: WORD };
// Escapes that mean the same in both.
const SAME = "tnrfv";

/**
 * @param {string} source of Python's module `re`
 * @returns {RegExp}
 * @throws {BonnxError} `option`: it is no pattern, or JavaScript cannot say the same
 */
export function pythonPattern(source) {
  try {
    return new RegExp(translated(source), "gu");
  } catch (error) {
    if (error instanceof BonnxError) throw error;
    throw new BonnxError(
      "option",
      `answers: 'regex:${source.slice(0, 60)}' is not a regular expression: ${error.message}`,
      { cause: error },
    );
  }
}

function refuse(source, what) {
  throw new BonnxError(
    "option",
    `answers: 'regex:${source.slice(0, 60)}': ${what} has no counterpart in JavaScript; pass a RegExp or a function`,
  );
}

function translated(source) {
  const characters = [...source];
  let result = "";
  let inClass = false;
  for (let i = 0; i < characters.length; i += 1) {
    const character = characters[i];
    const rest = characters.slice(i + 1, i + 4).join("");
    if (character === "\\") {
      i += 1;
      result += escaped(source, characters, i, inClass);
      const hex = { x: 2, u: 4 }[characters[i]];
      if (hex) i += hex;
    } else if (inClass) {
      if (character === "[" && [":", ".", "="].includes(characters[i + 1])) refuse(source, "a class within a class");
      if (["--", "&&", "~~", "||"].includes(character + characters[i + 1])) refuse(source, "an operation of classes");
      inClass = character !== "]";
      result += character === "[" ? "\\[" : character;
    } else if (character === "[") {
      inClass = true;
      result += character;
      if (characters[i + 1] === "^") result += characters[(i += 1)];
      // A bracket that comes first is a character like any other.
      if (characters[i + 1] === "]") {
        result += "\\]";
        i += 1;
      }
    } else if (character === "(" && rest.startsWith("?")) {
      const known = ["?:", "?=", "?!", "?<=", "?<!"].find(
        (each) => characters.slice(i + 1, i + 1 + each.length).join("") === each,
      );
      if (rest === "?P<") {
        result += "(?<";
        i += 3;
      } else if (known !== undefined) {
        result += `(${known}`;
        i += known.length;
      } else refuse(source, `'(${rest.slice(0, 2)}'`);
    } else if (character === ".") result += "[^\\n]";
    else if (character === "$") result += "(?=\\n?(?![^]))";
    else if (character === "^") result += "(?<![^])";
    else if ("*+?}".includes(character) && characters[i + 1] === "+") refuse(source, "a possessive quantifier");
    else if (character === "{" && !/^\{\d+(,\d*)?\}/.test(characters.slice(i).join(""))) {
      if (/^\{,\d+\}/.test(characters.slice(i).join(""))) {
        result += "{0";
      } else result += "\\{";
    } else if (character === "}" && !/\{\d*(,\d*)?$/.test(characters.slice(0, i).join(""))) result += "\\}";
    else if (character === "]") result += "\\]";
    else result += character;
  }
  return result;
}

/** What an escape means, the character after the backslash being at `i`. */
function escaped(source, characters, i, inClass) {
  const letter = characters[i];
  if (letter === undefined) refuse(source, "a backslash at the end");
  const lower = letter.toLowerCase();
  if (lower in CLASSES) {
    if (letter === lower) return inClass ? CLASSES[lower] : `[${CLASSES[lower]}]`;
    if (inClass) refuse(source, `'\\${letter}' in a class`);
    return `[^${CLASSES[lower]}]`;
  }
  if (letter === "x" || letter === "u") {
    const digits = characters.slice(i + 1, i + (letter === "x" ? 3 : 5)).join("");
    if (!/^(?:[0-9a-fA-F]{2}|[0-9a-fA-F]{4})$/.test(digits)) refuse(source, `'\\${letter}${digits}'`);
    return `\\${letter}${digits}`;
  }
  if (SAME.includes(letter)) return `\\${letter}`;
  if (letter === "a") return "\\x07";
  if (letter === "b") return inClass ? "\\x08" : BORDER;
  if (!inClass && letter === "B") return NO_BORDER;
  if (!inClass && letter === "A") return "(?<![^])";
  if (!inClass && letter === "Z") return "(?![^])";
  if (!inClass && /[1-9]/.test(letter) && !/[0-9]/.test(characters[i + 1] ?? "")) return `\\${letter}`;
  if (/[0-9a-zA-Z]/.test(letter)) refuse(source, `'\\${letter}'`);
  // JavaScript lets only these be escaped.
  if ("^$\\.*+?()[]{}|/".includes(letter) || (inClass && letter === "-")) return `\\${letter}`;
  return letter;
}

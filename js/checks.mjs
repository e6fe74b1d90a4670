/**
 * Checks of arguments: a wrong type or value is refused by name, before anything is computed.
 *
 * @module
 */

import { BonnxError, nearMiss } from "./errors.mjs";

/** A value as errors show it. */
export function shown(value) {
  if (typeof value === "bigint") return `${value}n`;
  if (typeof value === "function") return "a function";
  if (typeof value === "string") return quoted(value);
  let text;
  try {
    text = value instanceof Float32Array ? `Float32Array of ${value.length}` : (JSON.stringify(value) ?? String(value));
  } catch {
    text = String(value);
  }
  return text.length > 60 ? `${text.slice(0, 60)}...` : text;
}

/** A text in quotes, as Python's errors show it. */
export function quoted(text) {
  const quote = text.includes("'") && !text.includes('"') ? '"' : "'";
  const escapes = { "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", [quote]: `\\${quote}` };
  const hex = (code) =>
    code < 256 ? `\\x${code.toString(16).padStart(2, "0")}` : `\\u${code.toString(16).padStart(4, "0")}`;
  const written = Array.from(text, (character) => {
    if (character in escapes) return escapes[character];
    return /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}\p{Zs}]/u.test(character) && character !== " "
      ? hex(character.codePointAt(0))
      : character;
  });
  const whole = quote + written.join("") + quote;
  return Array.from(whole).slice(0, 60).join("");
}

/** Refuse anything but an object with these keys. */
export function checkNames(options, known, what) {
  if (options === null || typeof options !== "object" || Array.isArray(options)) {
    throw new BonnxError("option", `the options of ${what}: expected an object; got ${shown(options)}`);
  }
  for (const name of Object.keys(options)) {
    if (!known.includes(name))
      throw new BonnxError("option", `unknown option '${name}' of ${what}; ${nearMiss(name, known)}`);
  }
}

/** Refuse anything but a number from `least` to `most`; `above` leaves out the lower bound itself. */
export function checkNumber(name, value, { least = -Infinity, above = -Infinity, most = Infinity }) {
  if (typeof value === "number" && value >= least && value > above && value <= most) return;
  const bounds = [];
  if (Number.isFinite(least)) bounds.push(`of at least ${least}`);
  if (Number.isFinite(above)) bounds.push(`above ${above}`);
  if (Number.isFinite(most)) bounds.push(`at most ${most}`);
  throw new BonnxError("option", `${name}: expected a number ${bounds.join(" and ")}; got ${shown(value)}`);
}

/** Refuse anything but a whole number of at least `least`. */
export function checkWhole(name, value, least) {
  if (Number.isSafeInteger(value) && value >= least) return;
  throw new BonnxError("option", `${name}: expected a whole number of at least ${least}; got ${shown(value)}`);
}

/**
 * A seed as a graph takes it.
 *
 * @param {unknown} value a whole number that a double holds exactly, or a BigInt of 64 bits
 * @returns {bigint}
 */
export function checkedSeed(value) {
  if (Number.isSafeInteger(value)) return BigInt(value);
  if (typeof value === "bigint" && BigInt.asIntN(64, value) === value) return value;
  const range = "from -(2^63) to 2^63 - 1, as a BigInt if it is beyond 2^53";
  throw new BonnxError("option", `seed: expected a whole number ${range}; got ${shown(value)}`);
}

/** Refuse anything but true and false. */
export function checkFlag(name, value) {
  if (typeof value !== "boolean")
    throw new BonnxError("option", `${name}: expected true or false; got ${shown(value)}`);
}

/** Refuse anything but a function. */
export function checkFunction(name, value) {
  if (typeof value !== "function") throw new BonnxError("option", `${name}: expected a function; got ${shown(value)}`);
}

/** Refuse anything but an AbortSignal; one that is aborted already throws its reason. */
export function checkSignal(signal) {
  if (signal === undefined) return;
  if (!(signal instanceof AbortSignal))
    throw new BonnxError("option", `signal: expected an AbortSignal; got ${shown(signal)}`);
  signal.throwIfAborted();
}

/** The options that were given: undefined and null stand for the default, as in Python. */
export function given(options, defaults) {
  const chosen = Object.entries(options).filter(([, value]) => value !== undefined && value !== null);
  return { ...defaults, ...Object.fromEntries(chosen) };
}

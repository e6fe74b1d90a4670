/**
 * The tools that a message calls, in a form in which equal calls are equal: what candidates vote for.
 *
 * @module
 */

import { shown } from "./checks.mjs";
import { BonnxError } from "./errors.mjs";
import { strip } from "./pattern.mjs";

const EXCEPT = "tool-except:";

/** Whether an extractor's name stands for one that reads messages, not texts. */
export function readsTools(name) {
  return name === "tool" || name.startsWith(EXCEPT);
}

/** The function that `tool` or `tool-except:FIELD,FIELD` stands for. */
export function toolExtractor(name) {
  if (name === "tool") return (candidate) => toolAnswer(candidate, []);
  const fields = name
    .slice(EXCEPT.length)
    .split(",")
    .map((field) => field.trim());
  if (fields.includes("")) {
    throw new BonnxError(
      "option",
      `answers: expected 'tool-except:FIELD,FIELD', names of arguments to ignore; got ${shown(name)}`,
    );
  }
  return (candidate) => toolAnswer(candidate, fields);
}

/** The calls of a candidate's last message: names and arguments, without ids; null if there are none to compare. */
function toolAnswer(candidate, ignored) {
  const message = Array.isArray(candidate) ? candidate.at(-1) : candidate;
  const calls = message !== null && typeof message === "object" ? message.tool_calls : undefined;
  if (!Array.isArray(calls) || !calls.length) return null;
  return written(calls.map((call) => plainCall(call, ignored)));
}

/** Name and arguments of one call. */
function plainCall(call, ignored) {
  const called = isObject(call) ? (call.function ?? call) : call;
  if (!isObject(called)) return called;
  let given = called.arguments ?? null;
  if (typeof given === "string") {
    try {
      given = JSON.parse(given);
    } catch {
      // As the model wrote it; not JSON, but perhaps equal to another's.
      given = strip(given);
    }
  }
  if (isObject(given)) given = Object.fromEntries(Object.entries(given).filter(([key]) => !ignored.includes(key)));
  return [called.name ?? null, given];
}

/** A value as Python's JSON writes it, keys in order. */
function written(value) {
  if (Array.isArray(value)) return `[${value.map(written).join(", ")}]`;
  if (!isObject(value)) return JSON.stringify(value ?? null);
  const keys = Object.keys(value).sort();
  return `{${keys.map((key) => `${JSON.stringify(key)}: ${written(value[key])}`).join(", ")}}`;
}

function isObject(value) {
  return value !== null && typeof value === "object" && !Array.isArray(value);
}

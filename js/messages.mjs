/**
 * Messages of a conversation, checked and copied.
 *
 * @module
 */

import { shown } from "./checks.mjs";
import { BonnxError } from "./errors.mjs";

/** Whether a prompt or candidate is meant as messages: a list whose first element is an object. */
export function isMessages(value) {
  const [first] = Array.isArray(value) ? value : [];
  return first !== null && typeof first === "object" && !Array.isArray(first) && !ArrayBuffer.isView(first);
}

/** Copies of messages. Keys without a value are dropped, and other names of `reasoning_content` are accepted. */
export function plainMessages(messages, name) {
  if (!Array.isArray(messages) || messages.length === 0) {
    throw new BonnxError(
      "input",
      `${name}: expected a list of {"role": ..., "content": ...}, not empty; got ${shown(messages)}`,
    );
  }
  return messages.map((message, i) => plainMessage(message, `${name}[${i}]`));
}

function plainMessage(message, name) {
  if (!isMessages([message]))
    throw new BonnxError("input", `${name}: expected {"role": ..., "content": ...}; got ${shown(message)}`);
  let copy;
  try {
    copy = JSON.parse(JSON.stringify(message));
  } catch (error) {
    throw new BonnxError("input", `${name}: expected plain JSON values: ${error.message}`, { cause: error });
  }
  const plain = Object.fromEntries(Object.entries(copy).filter(([, value]) => value !== null));
  const { role, content } = plain;
  if (typeof role !== "string")
    throw new BonnxError("input", `${name}: 'role' must be a text such as 'user'; got ${shown(role)}`);
  if (content === undefined && !("tool_calls" in plain)) {
    throw new BonnxError("input", `${name}: there is no 'content'; got the keys ${Object.keys(plain).join(", ")}`);
  }
  if (Array.isArray(content)) {
    const wrong = content.findIndex((part) => part?.type !== "text" || typeof part.text !== "string");
    if (wrong >= 0) {
      throw new BonnxError(
        "input",
        `${name}.content[${wrong}]: expected {type: "text", text: ...}: only text can be ranked; got ${shown(content[wrong])}`,
      );
    }
  } else if (content !== undefined && typeof content !== "string") {
    throw new BonnxError("input", `${name}: 'content' must be a text or a list of text parts; got ${shown(content)}`);
  }
  const reasoning = ["reasoning_content", "thinking", "reasoning"].find((key) => key in plain);
  return reasoning === undefined
    ? plain
    : { thinking: plain[reasoning], ...plain, reasoning_content: plain[reasoning] };
}

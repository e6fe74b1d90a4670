/**
 * Prompts and candidates as whole texts, from strings, messages (by a chat template) and candidates in steps.
 *
 * @module
 */

import { shown } from "./checks.mjs";
import { BonnxError } from "./errors.mjs";
import { isMessages } from "./messages.mjs";
import { strip } from "./pattern.mjs";
import { NO_TOKENS } from "./tokenizer.mjs";

/** Whether an item is to be tokenized: text, messages, or a candidate as a list of steps. */
export function isText(item) {
  return typeof item === "string" || (Array.isArray(item) && typeof item[0] === "string") || isMessages(item);
}

/** Composes texts by the rules of one artifact. */
export class Composer {
  /**
   * @param {object} rules `text` of the manifest
   * @param {import("./chat.mjs").ChatTemplate | null} chat
   * @param {import("./pair.mjs").PairTemplate | null} pair
   */
  constructor(rules, chat, pair) {
    this.rules = rules;
    this.chat = chat;
    this.pair = pair;
  }

  /** A prompt that the model is to continue, and whether the tokenizer puts its special tokens around it. */
  prompt(item) {
    if (isMessages(item)) return [this.#template("prompt").render(item, "prompt", true), false];
    return [plainText(item, "prompt"), this.rules.special_tokens];
  }

  /** Each candidate after the prompt, and whether the tokenizer puts its special tokens around them. */
  passages(prompt, candidates, names, partial, instruction) {
    if (this.pair !== null) {
      if (partial) throw new BonnxError("option", "partial: this model's template ends every document; leave it out");
      const query = pairText(prompt, "prompt");
      const documents = candidates.map((text, k) => pairText(text, names[k]));
      return [this.pair.passages(query, documents, instruction), false];
    }
    if (isMessages(prompt)) {
      const template = this.#template("prompt");
      const answers = candidates.map((text, k) => (isMessages(text) ? text : this.#steps(text, names[k])));
      if (!partial) return [template.split(prompt, answers, names), false];
      const opening = template.render(prompt, "prompt", true);
      return [answers.map((answer, k) => after(opening, plainText(answer, names[k]))), false];
    }
    const before = plainText(prompt, "prompt");
    return [candidates.map((text, k) => after(before, this.#steps(text, names[k]))), this.rules.special_tokens];
  }

  /** A candidate whose prompt is not text. */
  alone(candidate, name) {
    if (this.pair !== null) {
      throw new BonnxError(
        "input",
        `${name}: expected token ids, as its prompt; text is a document of a query that is text`,
      );
    }
    return after("", this.#steps(candidate, name));
  }

  /** Why a text, messages, or steps (or one of the steps) are empty; null if they are not. */
  blank(item) {
    if (typeof item === "string") {
      const split = this.rules.step_split;
      if (this.#divides(item) && !item.split(split).some((step) => strip(step))) {
        return `it has no steps; expected at least one, divided by ${shown(split)}`;
      }
      return item ? null : NO_TOKENS;
    }
    if (isMessages(item)) return item.every(saysNothing) ? NO_TOKENS : null;
    const empty = item.indexOf("");
    return empty < 0 ? null : `its step ${empty} is empty`;
  }

  /** A candidate's text, with each step ended as the model expects. */
  #steps(item, name) {
    const { step_text: ending, step_split: split } = this.rules;
    if (typeof item === "string") {
      if (!this.#divides(item)) return plainText(item, name);
      const steps = item.split(split).filter((step) => strip(step));
      return steps.map((step) => step + ending).join("");
    }
    if (isMessages(item) || !item.every((step) => typeof step === "string")) {
      throw new BonnxError("input", `${name}: expected text, or a list of steps that are texts; got ${shown(item)}`);
    }
    if (ending === null)
      throw new BonnxError("input", `${name}: this artifact's rule does not say how a step ends; pass one text`);
    return item.map((step) => (step.endsWith(ending) ? step : step + ending)).join("");
  }

  /** Whether a candidate's text has to be split into steps. */
  #divides(text) {
    const { step_text: ending, step_split: split } = this.rules;
    return ending !== null && split !== null && !text.includes(ending);
  }

  #template(name) {
    if (this.chat === null)
      throw new BonnxError("input", `${name}: messages need a chat template, and this artifact has none; pass text`);
    return this.chat;
  }
}

function after(before, text) {
  return { text: before + text, start: before.length, stop: before.length + text.length };
}

function plainText(item, name) {
  if (typeof item !== "string") throw new BonnxError("input", `${name}: expected text; got ${shown(item)}`);
  if (!item) throw new BonnxError("input", `${name}: ${NO_TOKENS}`);
  return item;
}

function pairText(item, name) {
  if (typeof item !== "string") {
    throw new BonnxError(
      "input",
      `${name}: this model's template makes one text of a query and a document; expected each as text; got ${shown(item)}`,
    );
  }
  return plainText(item, name);
}

/** Whether a message has a role, empty content and nothing else. */
function saysNothing(message) {
  if (
    !isMessages([message]) ||
    typeof message.role !== "string" ||
    message.content === undefined ||
    message.content === null
  )
    return false;
  return Object.entries(message).every(
    ([key, value]) => key === "role" || !value || (Array.isArray(value) && !value.length),
  );
}

/**
 * A query and a document to one text, by a reranker's template. What precedes the document is the shared prompt.
 *
 * @module
 */

import { BonnxError } from "./errors.mjs";
import { Renderer, commonLength } from "./templates.mjs";

/** A reranker's template. */
export class PairTemplate {
  #takesInstruction;

  /**
   * @param {string} source
   * @param {Record<string, string>} tokens
   * @param {object} rules `text.pair` of the manifest
   */
  constructor(source, tokens, rules) {
    this.source = source;
    this.rules = { content: "flat", options: {}, instruction: null, ...rules };
    this.renderer = new Renderer(source, tokens);
  }

  /**
   * The whole text of each document, in which the document's part begins where the text depends on it.
   *
   * @returns {import("./tokenizer.mjs").Passage[]}
   */
  passages(query, documents, instruction) {
    if (instruction !== null && !this.takesInstruction) {
      throw new BonnxError("option", "instruction: this model's template takes none; leave it out");
    }
    const now = new Date();
    const [border, mark] = this.#unused([query, instruction ?? "", ...documents]);
    const pattern = this.#render(query, mark, instruction, border, now);
    const place = pattern.indexOf(mark);
    const before = place < 0 ? pattern : pattern.slice(0, place);
    const after = place < 0 ? "" : pattern.slice(pattern.lastIndexOf(mark) + mark.length);
    return documents.map((document) => {
      const text = this.#render(query, document, instruction, border, now);
      const start = commonLength(before, text);
      const stop = text.endsWith(after) ? text.length - after.length : text.length;
      return without(border, { text, start, stop: Math.max(start, stop) });
    });
  }

  /** Whether an instruction reaches the text. */
  get takesInstruction() {
    const now = new Date();
    const render = (text) => this.#render("alpha", "bravo", text, "", now);
    return (this.#takesInstruction ??= render("charlie") !== render("foxtrot"));
  }

  /** Two characters that occur neither in the texts nor in the template. */
  #unused(texts) {
    const used = new Set(this.source);
    for (const text of texts) for (const character of text) used.add(character);
    const unused = [];
    for (let code = 0xe000; code < 0xe100 && unused.length < 2; code += 1) {
      if (!used.has(String.fromCharCode(code))) unused.push(String.fromCharCode(code));
    }
    if (unused.length < 2)
      throw new BonnxError(
        "input",
        "the texts use all of the private characters U+E000 to U+E0FF; leave some of them out",
      );
    return unused;
  }

  #render(query, document, instruction, border, now) {
    const system = instruction ?? this.rules.instruction;
    const message = (role, text) => ({
      role,
      content: this.rules.content === "flat" ? text : [{ type: "text", text }],
    });
    const messages = [
      ...(system ? [message("system", system)] : []),
      message("query", query),
      message("document", document),
    ];
    const variables = { messages, tools: null, documents: null, add_generation_prompt: false };
    return this.renderer.render({ ...variables, ...this.rules.options, border }, now);
  }
}

/** A passage whose text has no borders; where they were, its tokens are cut. */
function without(border, passage) {
  const pieces = passage.text.split(border);
  if (border === "" || pieces.length === 1) return passage;
  const count = (to) => passage.text.slice(0, to).split(border).length - 1;
  const cuts = [];
  let place = 0;
  for (const piece of pieces.slice(0, -1)) {
    place += piece.length;
    if (place) cuts.push(place);
  }
  return {
    text: pieces.join(""),
    start: passage.start - count(passage.start),
    stop: passage.stop - count(passage.stop),
    cuts,
  };
}

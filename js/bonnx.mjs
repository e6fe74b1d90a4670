/**
 * Best-of-N in JavaScript: opens an artifact that `bonnx export` wrote, ranks candidates, and generates.
 *
 * docs/javascript.md shows how to use it, bonnx.d.mts has the types.
 *
 * @module
 */

import { Files } from "./artifact.mjs";
import { ChatTemplate } from "./chat.mjs";
import { checkFunction, checkNames, checkSignal, checkWhole, given, shown } from "./checks.mjs";
import { Composer } from "./compose.mjs";
import { BonnxError, CODES } from "./errors.mjs";
import { generate } from "./generate.mjs";
import { readManifest } from "./manifest.mjs";
import { PairTemplate } from "./pair.mjs";
import { rank } from "./rank.mjs";
import { Reader } from "./reader.mjs";
import { Sessions, findRuntime } from "./sessions.mjs";
import { Tokenizer } from "./tokenizer.mjs";

export { BonnxError, CODES };

const DEFAULTS = {
  runtime: undefined,
  executionProviders: undefined,
  threads: undefined,
  graphs: null,
  onProgress: undefined,
  signal: undefined,
};

/**
 * Open an artifact: an address, or in Node also a folder. Size and SHA-256 of every file that is used are checked.
 *
 * @param {string | URL} source
 * @param {import("./bonnx.d.mts").LoadOptions} [options]
 * @returns {Promise<Model>}
 */
export async function load(source, options = {}) {
  checkNames(options, Object.keys(DEFAULTS), "load");
  const { runtime, executionProviders, threads, graphs, onProgress, signal } = given(options, DEFAULTS);
  if (threads !== undefined) checkWhole("threads", threads, 1);
  if (onProgress !== undefined) checkFunction("onProgress", onProgress);
  if (executionProviders !== undefined && (!Array.isArray(executionProviders) || !executionProviders.length)) {
    throw new BonnxError(
      "option",
      `executionProviders: expected a list such as ["wasm"]; got ${shown(executionProviders)}`,
    );
  }
  if (graphs !== null && !(Array.isArray(graphs) && graphs.every((name) => typeof name === "string"))) {
    throw new BonnxError("option", `graphs: expected a list of names such as ["rank"]; got ${shown(graphs)}`);
  }
  checkSignal(signal);
  const files = new Files(source, onProgress);
  const manifest = await readManifest(files, signal);
  const ort = await findRuntime(runtime);
  const sessions = new Sessions(files, manifest, ort, { executionProviders, threads });
  const { text: rules, scoring } = manifest;
  const bytesOf = (name) => (name === null ? null : files.verified(manifest, name, signal));
  // The graphs are opened now, so that a runtime that cannot run them is reported at once.
  const [vocabulary, template, pairTemplate] = await Promise.all([
    bytesOf(manifest.tokenizer),
    bytesOf(rules.chat_template),
    bytesOf(rules.pair?.template ?? null),
    ...(graphs ?? [sessions.has("rank") ? "rank" : "generate"]).map((name) => sessions.open(name, signal)),
  ]);
  const textOf = (bytes) => new TextDecoder().decode(bytes);
  const tokenizer = vocabulary && new Tokenizer(vocabulary, scoring, rules);
  const chat = template && new ChatTemplate(textOf(template), rules.template_tokens);
  const pair = pairTemplate && new PairTemplate(textOf(pairTemplate), rules.template_tokens, rules.pair);
  return new Model(manifest, new Reader(manifest, tokenizer, new Composer(rules, chat, pair)), sessions);
}

/** An open artifact. Each graph is opened on first use; calls wait for one another. */
export class Model {
  #reader;
  #sessions;

  /** Use `load`. */
  constructor(manifest, reader, sessions) {
    this.manifest = manifest;
    this.#reader = reader;
    this.#sessions = sessions;
  }

  /** Where the graphs run: the execution providers, in order. */
  get executionProviders() {
    return [...this.#sessions.executionProviders];
  }

  /** Score candidates after a prompt and choose the best; the prompt is computed once. */
  async rank(prompt, candidates, options) {
    return rank(this.manifest, this.#reader, this.#sessions, prompt, candidates, options);
  }

  /** Sample completions, score every token, choose the best. */
  async generate(prompt, options) {
    return generate(this.manifest, this.#reader, this.#sessions, prompt, options);
  }

  /** Open graphs before they are used, so that the first call need not wait. */
  async open(names, { signal } = {}) {
    for (const name of names) await this.#sessions.open(name, signal);
  }

  /** Release the memory of the graphs and weights; a graph is opened again when it is next used. */
  async close() {
    await this.#sessions.close();
  }
}

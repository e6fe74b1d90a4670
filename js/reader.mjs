/**
 * Prompts and candidates of every kind become rows for the graphs; invalid ones are refused by name.
 *
 * @module
 */

import { shown } from "./checks.mjs";
import { isText } from "./compose.mjs";
import { BonnxError } from "./errors.mjs";
import { NO_TOKENS } from "./tokenizer.mjs";

// What they have in common with each other, a query has in common with all documents.
const DOCUMENTS = ["a", "1"];
// A growing text is compared with each of them after every token.
const LONGEST_STOP = 1000;

/**
 * Rows for a graph.
 *
 * @typedef {object} Rows
 * @property {Row} prompt read once for all rows
 * @property {Row[]} items the rows after the prompt
 * @property {number[]} skip tokens at the beginning of each row that still belong to the prompt, whose end is tokenized
 *   differently in each
 * @property {boolean[][] | null} ends for each row, where a step ends; null if the rows do not tell
 * @property {Map<number, string>} unreadable the reason for each row that could not be read; it has no tokens here
 * @property {number} cut tokens dropped from the prompt
 *
 * A row is a list of token ids, or of embeddings.
 * @typedef {(number | ArrayLike<number>)[]} Row
 */

/** Reads for one artifact. */
export class Reader {
  /**
   * @param {object} manifest
   * @param {import("./tokenizer.mjs").Tokenizer | null} tokenizer
   * @param {import("./compose.mjs").Composer} composer
   */
  constructor(manifest, tokenizer, composer) {
    this.manifest = manifest;
    this.tokenizer = tokenizer;
    this.composer = composer;
    this.ranksPairs = composer.pair !== null;
    const size = (option) => manifest.model.network?.[option] ?? manifest.model[option];
    this.vocabulary = manifest.kind === "language_model" ? size("vocab_size") : null;
    this.width = manifest.kind === "language_model" ? null : size("embed_dim");
  }

  /**
   * The prompt that the model continues.
   *
   * @returns {Row}
   */
  prompt(item, instruction = null) {
    this.#checkInstruction(instruction, item);
    if (isText(item) && this.ranksPairs) return this.pairs(item, DOCUMENTS, { instruction }).prompt;
    if (!isText(item)) {
      const row = this.#row(item, "prompt");
      if (!row.length) throw new BonnxError("input", `prompt: ${NO_TOKENS}`);
      return row;
    }
    const tokenizer = this.#requireTokenizer("prompt");
    const [text, special] = this.composer.prompt(item);
    return tokenizer.encode(text, "prompt", special);
  }

  /**
   * A prompt and its candidates.
   *
   * @param {unknown} prompt text, messages, token ids or embeddings
   * @param {unknown[]} candidates
   * @param {{partial?: boolean, truncate?: boolean, instruction?: string | null}} options
   * @returns {Rows}
   */
  pairs(prompt, candidates, { partial = false, truncate = false, instruction = null }) {
    this.#checkInstruction(instruction, prompt);
    const unreadable = new Map();
    const texts = new Map();
    const rows = new Map();
    candidates.forEach((item, i) => {
      const name = `candidates[${i}]`;
      let reason = null;
      if (isText(item)) {
        this.#requireTokenizer(name);
        reason = this.composer.blank(item);
        texts.set(i, item);
      } else {
        const row = this.#row(item, name);
        rows.set(i, { ids: row, first: 0, ends: null });
        if (!row.length) reason = NO_TOKENS;
      }
      if (reason !== null) unreadable.set(i, reason);
    });
    for (const i of unreadable.keys()) texts.delete(i) || rows.delete(i);
    checkReadable(unreadable, candidates.length);
    // Whether there are rows that are no texts: they have no part of the prompt in them.
    const apart = rows.size > 0 || !isText(prompt);
    let head = apart ? this.prompt(prompt) : null;
    if (texts.size) {
      const names = [...texts.keys()].map((i) => `candidates[${i}]`);
      const [passages, special] = apart
        ? [[...texts.values()].map((text, k) => this.composer.alone(text, names[k])), false]
        : this.composer.passages(prompt, [...texts.values()], names, partial, instruction);
      const read = this.#requireTokenizer("prompt").rows(passages, { special, partial });
      [...texts.keys()].forEach((i, k) =>
        typeof read[k] === "string" ? unreadable.set(i, read[k]) : rows.set(i, read[k]),
      );
      checkReadable(unreadable, candidates.length);
    }
    let shared = 0;
    if (!apart) {
      const all = [...rows.values()];
      shared = Math.min(...all.map((row) => Math.min(row.first, row.ids.length - 1)));
      const different = (i) => all.some((row) => row.ids[i] !== all[0].ids[i]);
      for (let i = 0; i < shared; i += 1) if (different(i)) shared = i;
      head = all[0].ids.slice(0, shared);
    }
    const places = [...candidates.keys()];
    const tells = rows.size > 0 && [...rows.values()].every((row) => row.ends !== null);
    const encoded = {
      prompt: head,
      items: places.map((i) => rows.get(i)?.ids.slice(shared) ?? []),
      skip: places.map((i) => (texts.has(i) && rows.has(i) ? Math.max(0, rows.get(i).first - shared) : 0)),
      ends: tells
        ? places.map((i) => (rows.get(i)?.ids ?? []).map((_, k) => rows.get(i).ends.includes(k)).slice(shared))
        : null,
      unreadable: new Map([...unreadable].sort((a, b) => a[0] - b[0])),
      cut: 0,
    };
    // The beginning of a query's text is the template's own.
    return truncate && !this.ranksPairs ? this.#truncated(encoded) : encoded;
  }

  /**
   * What ends a completion: the tokens and texts in `stop`, or by default the artifact's own tokens.
   *
   * @param {(number | string)[] | null} stop
   * @returns {{tokens: number[], texts: string[], inText: boolean}} `inText`: a text is more than one token, so that all
   *   are looked for in the text
   */
  stops(stop) {
    if (stop === null) {
      const { end_token: end, stop_tokens: others } = this.manifest.scoring;
      return { tokens: [...new Set([...(end === null ? [] : [end]), ...others])], texts: [], inText: false };
    }
    if (!Array.isArray(stop) || !stop.every((entry) => typeof entry === "string" || Number.isInteger(entry))) {
      throw new BonnxError("option", `stop: expected a list of token ids or of texts; got ${shown(stop)}`);
    }
    const tokens = [];
    const texts = [];
    let inText = false;
    for (const entry of stop) {
      if (typeof entry === "number") {
        tokens.push(...this.#row([entry], "stop"));
        continue;
      }
      if (this.tokenizer === null)
        throw new BonnxError(
          "option",
          `stop: this artifact has no tokenizer; pass token ids instead of ${shown(entry)}`,
        );
      if ([...entry].length > LONGEST_STOP)
        throw new BonnxError("option", `stop: expected texts of at most ${LONGEST_STOP} characters`);
      const ids = this.tokenizer.stopTokens(entry);
      inText ||= ids.length === 0;
      tokens.push(...ids);
      texts.push(entry);
    }
    return { tokens: [...new Set(tokens)], texts, inText };
  }

  #checkInstruction(instruction, prompt) {
    if (instruction === null) return;
    if (typeof instruction !== "string")
      throw new BonnxError("option", `instruction: expected a text; got ${shown(instruction)}`);
    if (!this.ranksPairs || !isText(prompt)) {
      throw new BonnxError(
        "option",
        "instruction: it goes into the template of a reranker, with a query that is text; leave it out",
      );
    }
  }

  /** Drop the oldest tokens of a prompt that is too long; a special token at its beginning stays. */
  #truncated(rows) {
    const longest = Math.max(...rows.items.map((item) => item.length));
    const limit = this.manifest.limits.max_tokens;
    const excess = rows.prompt.length + longest - limit;
    if (excess <= 0) return rows;
    const keep = this.tokenizer?.isSpecial(rows.prompt[0]) ? 1 : 0;
    if (excess > rows.prompt.length - keep - 1) {
      throw new BonnxError(
        "too-large",
        `a candidate of ${longest} tokens: this artifact takes at most ${limit} together with the prompt, and a candidate is never cut; shorten it`,
      );
    }
    return { ...rows, prompt: [...rows.prompt.slice(0, keep), ...rows.prompt.slice(keep + excess)], cut: excess };
  }

  #requireTokenizer(name) {
    if (this.tokenizer === null)
      throw new BonnxError("input", `${name}: this artifact has no tokenizer; pass ${this.#takes} instead of text`);
    return this.tokenizer;
  }

  get #takes() {
    if (this.width !== null) return `embeddings, a list of lists of ${this.width} numbers`;
    return this.tokenizer === null ? "token ids" : "text or a list of token ids";
  }

  /** Token ids or embeddings, checked. */
  #row(item, name) {
    // Bytes would be taken for token ids.
    const isIds = [Int16Array, Uint16Array, Int32Array, Uint32Array, BigInt64Array].some(
      (kind) => item instanceof kind,
    );
    const list = isIds ? Array.from(item) : item;
    if (!Array.isArray(list)) throw new BonnxError("input", `${name}: expected ${this.#takes}; got ${shown(item)}`);
    if (this.width !== null) {
      const wrong = list.findIndex(
        (row) => row?.length !== this.width || !Array.from(row).every((value) => typeof value === "number"),
      );
      if (wrong >= 0)
        throw new BonnxError("input", `${name}[${wrong}]: expected ${this.width} numbers; got ${shown(list[wrong])}`);
      return list;
    }
    return list.map((value) => {
      const id = typeof value === "bigint" ? Number(value) : value;
      if (!Number.isInteger(id)) throw new BonnxError("input", `${name}: expected ${this.#takes}; got ${shown(item)}`);
      if (id < 0 || id >= this.vocabulary) {
        throw new BonnxError(
          "input",
          `${name}: token id ${id} is outside the vocabulary (0 to ${this.vocabulary - 1})`,
        );
      }
      return id;
    });
  }
}

function checkReadable(unreadable, count) {
  if (unreadable.size < count) return;
  const reasons = [...unreadable].sort((a, b) => a[0] - b[0]).map(([i, reason]) => `candidates[${i}]: ${reason}`);
  const rest = count > 3 ? `; and ${count - 3} more` : "";
  throw new BonnxError(
    "input",
    count === 1 ? reasons[0] : `candidates: none can be read: ${reasons.slice(0, 3).join("; ")}${rest}`,
  );
}

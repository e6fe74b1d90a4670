/**
 * Text to token ids and back, with the artifact's own tokenizer.
 *
 * A prompt and a candidate are tokenized as one text, as the model saw them in training: a token may begin in the prompt
 * and end in the candidate. The characters that a token covers tell which of the two it belongs to.
 *
 * @module
 */

import { Tokenizer as Package } from "@huggingface/tokenizers";

import { quoted, shown } from "./checks.mjs";
import { Detokenizer } from "./detokenizer.mjs";
import { BonnxError } from "./errors.mjs";
import { SpanFinder } from "./spans.mjs";
import { exactly, flat } from "./tokenizer_rules.mjs";

export const NO_TOKENS = "it has no tokens; expected at least one";

/**
 * A whole text to score.
 *
 * @typedef {object} Passage
 * @property {string} text prompt and candidate
 * @property {number} start character (UTF-16 unit, as all places here) at which the candidate's own part begins
 * @property {number} stop character at which it ends; a template may write something after it
 * @property {number[]} [cuts] characters at which a token begins: what is before them is tokenized by itself
 */

/**
 * The tokens of a passage.
 *
 * @typedef {object} TokenizedRow
 * @property {number[]} ids
 * @property {number} first index of the first that reaches into the candidate's own part
 * @property {number[] | null} ends indices of those at which a step ends, if the artifact's steps end with a text
 */

/** The tokenizer of an artifact. */
export class Tokenizer {
  /**
   * @param {Uint8Array} bytes of tokenizer.json
   * @param {object} scoring of the manifest
   * @param {object} rules `text` of the manifest
   */
  constructor(bytes, scoring, rules) {
    this.scoring = scoring;
    this.rules = rules;
    try {
      const json = exactly(JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes)));
      this.package = new Package(json, { unk_token: json.model.unk_token });
      this.finder = new SpanFinder(json);
      this.special = new Set(json.added_tokens.filter((token) => token.special).map((token) => token.id));
      this.unknownToken = json.model.unk_token ?? null;
      this.unknown = this.unknownToken === null ? undefined : this.package.token_to_id(this.unknownToken);
      this.before = [];
      this.after = [];
      for (const rule of flat(json.post_processor, "processors")) this.#wrap(rule);
      this.detokenizer = new Detokenizer(this.package, this.special);
    } catch (error) {
      if (error instanceof BonnxError) throw error;
      throw new BonnxError("tokenizer", `tokenizer.json cannot be read: ${error.message}`, { cause: error });
    }
  }

  /** The special tokens that a post-processor puts around a text. */
  #wrap(rule) {
    if (rule.type !== "TemplateProcessing") return;
    const place = rule.single.findIndex((item) => "Sequence" in item);
    const ids = rule.single.map((item) =>
      "Sequence" in item ? null : rule.special_tokens[item.SpecialToken.id].ids[0],
    );
    this.before.unshift(...ids.slice(0, place));
    this.after.push(...ids.slice(place + 1));
  }

  /** Whether a token is one of the tokenizer's special ones. */
  isSpecial(id) {
    return this.special.has(id);
  }

  /**
   * Token ids of a text, with the tokenizer's own special tokens if `special`.
   *
   * @throws {BonnxError} `input`: a piece of the text has no token; `name` is the text's name
   */
  encode(text, name, special) {
    const { ids, fault } = this.#encoded([[0, text]], special);
    if (fault !== null) throw new BonnxError("input", `${name}: ${described(fault, text, 0)}`);
    return ids;
  }

  /**
   * Token ids of whole texts, each finished with the end token as the scoring rule says, unless partial.
   *
   * @param {Passage[]} passages
   * @param {{special: boolean, partial: boolean}} how
   * @returns {(TokenizedRow | string)[]} for each text its row, or why its candidate cannot be read
   * @throws {BonnxError} `input`: a piece of the prompt has no token
   */
  rows(passages, { special, partial }) {
    return passages.map((passage) => this.#row(passage, special, partial));
  }

  #row(passage, special, partial) {
    const { text, start, stop, cuts = [] } = passage;
    const pieces = [0, ...cuts].map((from, i) => [from, text.slice(from, cuts[i] ?? text.length)]);
    const { ids, spans, joined, fault } = this.#encoded(pieces, special);
    if (fault !== null) {
      if (fault.end <= start) throw new BonnxError("input", `prompt: ${described(fault, text, 0)}`);
      return described(fault, text, start);
    }
    const certain = (from, to) => {
      if (!joined.some(([start, end]) => start < to && from < end && !(start >= from && end <= to))) return;
      const near = quoted(text.slice(Math.max(0, from - 5), to + 5));
      throw new BonnxError(
        "tokenizer",
        `a character and its accents are read as one near ${near}: this module cannot tell which of them a token covers; write them as one character`,
      );
    };
    // Nothing that was changed as one may lie on both sides of the border.
    certain(0, start);
    let first = spans.findIndex(([, end]) => end > start);
    if (first < 0 || stop <= start) return NO_TOKENS;
    // An independent text keeps the special tokens at its beginning.
    first = start ? first : 0;
    const { end_token: endToken, reward_token: rewardToken } = this.scoring;
    if (!partial && endToken !== null && ids.at(-1) !== endToken) ids.push(endToken);
    if (rewardToken !== null && ids.at(-1) !== rewardToken) ids.push(rewardToken);
    const stepText = this.rules.step_text;
    if (stepText === null) return { ids, first, ends: null };
    // Tokens that a tokenizer adds cover no character.
    const order = spans.map((_, i) => i).filter((i) => spans[i][1] > spans[i][0]);
    const ends = new Set();
    for (
      let place = text.indexOf(stepText, start);
      place >= 0 && place + stepText.length <= stop;
      place = text.indexOf(stepText, place + stepText.length)
    ) {
      const last = place + stepText.length - 1;
      certain(last, last + 1);
      const owner = order.findLast((i) => spans[i][0] <= last);
      if (owner !== undefined && spans[owner][1] > last) ends.add(owner);
    }
    return { ids, first, ends: [...ends].sort((a, b) => a - b) };
  }

  /** Tokens of a text in pieces, the characters that each covers, and the first thing that has no token. */
  #encoded(pieces, special) {
    const ids = [];
    const spans = [];
    const joined = [];
    for (const [offset, text] of pieces) {
      const broken = /\p{Surrogate}/u.exec(text);
      if (broken !== null) {
        const reason = `expected Unicode text; '\\u${text.charCodeAt(broken.index).toString(16)}' is half of a surrogate pair`;
        return { ids, spans, joined, fault: { start: offset + broken.index, end: offset + broken.index + 1, reason } };
      }
    }
    for (const [offset, text] of pieces) {
      const around = special ? [this.before, this.after] : [[], []];
      const encoded = this.package.encode(text, { add_special_tokens: false });
      const found = this.finder.find(text, encoded.tokens);
      const unknown = encoded.ids.findIndex(
        (id, i) => id === undefined || (id === this.unknown && encoded.tokens[i] !== undefined),
      );
      if (unknown >= 0 && (this.rules.unknown === "refuse" || this.unknown === undefined)) {
        const [start, end] = found.spans[unknown];
        const reason = `the vocabulary has no token for ${shown(text.slice(start, end))}`;
        return { ids, spans, joined, fault: { start: offset + start, end: offset + end, reason } };
      }
      if (found.unknown.length && this.finder.fusesWords) {
        throw new BonnxError(
          "tokenizer",
          `this module does not join pieces without a token as the model's tokenizer does: ${shown(text)}; pass token ids`,
        );
      }
      for (const id of around[0]) ids.push(id) && spans.push([0, 0]);
      encoded.ids.forEach((id, i) => {
        ids.push(id);
        spans.push([found.spans[i][0] + offset, found.spans[i][1] + offset]);
      });
      for (const id of around[1]) ids.push(id) && spans.push([0, 0]);
      joined.push(...found.joined.map(([from, to]) => [from + offset, to + offset]));
    }
    return { ids, spans, joined, fault: null };
  }

  /**
   * The token that a stop text is, and all longer tokens that hold it; none if it is several tokens.
   *
   * @throws {BonnxError} it is empty, or the vocabulary has no token for a piece of it
   */
  stopTokens(text) {
    const ids = this.encode(text, "stop", false);
    if (!ids.length) throw new BonnxError("option", "stop: expected texts of at least one character; got an empty one");
    // Some tokenizers write a space before a text that stands alone.
    if (ids.length !== 1 || this.detokenizer.piece(ids[0]) !== text) return [];
    return [...ids, ...this.detokenizer.tokensWith(ids[0], text)];
  }

  /**
   * The text that a completion adds to its prompt: prompt plus text is what the model wrote.
   *
   * Special tokens are left out, as are the artifact's end or stop token that ended it, a stop text that did, and, while
   * it grows (`reason` is null), the bytes of an incomplete character and what may be the beginning of a stop text.
   *
   * @param {number[]} ids
   * @param {number[]} before the prompt's
   * @param {string | null} reason why it ended
   * @param {string[]} stopTexts
   */
  decode(ids, before, reason, stopTexts) {
    const ends = [this.scoring.end_token, ...this.scoring.stop_tokens];
    if (reason === "stop" && ends.includes(ids.at(-1))) return this.detokenizer.text(ids.slice(0, -1), before);
    const text = this.detokenizer.text(ids, before, reason === null);
    if (reason === null) return text.slice(0, text.length - heldBack(text, stopTexts));
    if (reason === "stop" && stopTexts.length) {
      return beforeStop(text, stopTexts, this.detokenizer.text(ids.slice(0, -1), before, true).length) ?? text;
    }
    return text;
  }

  /** Whether the last token of a completion completes a stop text. */
  endsInStop(ids, before, stopTexts) {
    if (this.isSpecial(ids.at(-1))) return false;
    // A token that is not special writes a byte at least.
    const longest = Math.max(...stopTexts.map((stop) => new TextEncoder().encode(stop).length));
    const tail = [];
    let place = ids.length;
    while (place > 0 && tail.length <= longest) {
      place -= 1;
      if (!this.isSpecial(ids[place])) tail.unshift(ids[place]);
    }
    const context = [...before, ...ids.slice(0, place)];
    const border = this.detokenizer.text(tail.slice(0, -1), context, true).length;
    return beforeStop(this.detokenizer.text(tail, context, true), stopTexts, border) !== null;
  }
}

/** A fault's reason and its place, counted from `border`. */
function described(fault, text, border) {
  if (fault.start < border) return `${fault.reason} (it begins in the prompt)`;
  return `${fault.reason} (at character ${[...text.slice(border, fault.start)].length})`;
}

/** What stands before the first stop text that ends behind `border`; null if there is none. */
function beforeStop(text, stopTexts, border) {
  const places = stopTexts
    .map((stop) => text.indexOf(stop, Math.max(0, border - stop.length + 1)))
    .filter((place) => place >= 0);
  return places.length ? text.slice(0, Math.min(...places)) : null;
}

/** How many characters at the end of a growing text may be the beginning of a stop text. */
function heldBack(text, stopTexts) {
  let longest = 0;
  for (const stop of stopTexts) {
    for (let size = Math.min(stop.length - 1, text.length); size > longest; size -= 1) {
      if (text.endsWith(stop.slice(0, size))) longest = size;
    }
  }
  return longest;
}

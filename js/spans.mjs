/**
 * Which characters of a text each of its tokens covers. The tokenizer's package does not say so.
 *
 * The tokens are laid along the text, as the rules of the tokenizer change it. Where they do not fit, the text is
 * refused: then the package has read it otherwise than the library `tokenizers` would, or has dropped a part of it.
 *
 * @module
 */

import { BonnxError } from "./errors.mjs";
import { flat } from "./tokenizer_rules.mjs";

const SPACE = "\u2581";
const BYTE = /^<0x([0-9A-F]{2})>$/;
const WHITE = /^\p{White_Space}+/u;
const WHITE_END = /\p{White_Space}+$/u;
// What a normal form of Unicode may join: a character with its marks, and the letters of Hangul.
const CLUSTER = /[\u1100-\u11ff\ua960-\ua97f\uac00-\ud7ff]+|\P{M}?\p{M}+|\P{M}/gu;
const ENCODER = new TextEncoder();

/** The byte that each character of a byte-level vocabulary stands for. */
const BYTES = new Map();
{
  let next = 256;
  for (let byte = 0; byte < 256; byte += 1) {
    const itself = (byte > 32 && byte < 127) || (byte > 160 && byte < 256 && byte !== 173);
    BYTES.set(String.fromCharCode(itself ? byte : next++), byte);
  }
}

/**
 * @typedef {object} Spans
 * @property {[number, number][]} spans of each token: the characters (UTF-16 units) that it covers
 * @property {number[]} unknown indices of the tokens that stand for a piece without a token
 * @property {[number, number][]} joined characters that were changed together: which of them a token covers is uncertain
 */

/** Finds spans for one tokenizer. */
export class SpanFinder {
  /** @param {object} json the contents of tokenizer.json */
  constructor(json) {
    this.normalizers = flat(json.normalizer, "normalizers");
    const splits = flat(json.pre_tokenizer, "pretokenizers");
    this.inBytes = splits.some((rule) => rule.type === "ByteLevel");
    this.metaspace = splits.find((rule) => rule.type === "Metaspace");
    this.trims = flat(json.post_processor, "processors").filter(
      (rule) => rule.type === "ByteLevel" && rule.trim_offsets !== false,
    );
    const added = (json.added_tokens ?? []).filter((token) => token.content);
    // Those that are found in the text as it is, the longest first; the others are found in what became of it.
    const raw = added.filter((token) => !token.normalized || !this.normalizers.length);
    raw.sort((x, y) => y.content.length - x.content.length);
    this.added = new Map(raw.map((token) => [token.content, token]));
    this.places = new RegExp(
      raw.map(({ content }) => content.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&")).join("|") || "(?!)",
      "gu",
    );
    this.changed = new Map(
      added
        .filter((token) => !raw.includes(token))
        .map(({ content }) => [content, ENCODER.encode(this.#normalized(content))]),
    );
    this.fallsBack = json.model.byte_fallback === true;
    this.fuses = json.model.fuse_unk === true;
    // Pieces without a token are joined within a word, and the package joins them across words.
    this.fusesWords = this.fuses && splits.some((rule) => rule.type !== "Metaspace");
    this.unknown = json.model.type === "BPE" ? json.model.unk_token : null;
  }

  /**
   * @param {string} text
   * @param {string[]} tokens of the text, without those that are put around it
   * @returns {Spans}
   */
  find(text, tokens) {
    const spans = [];
    const joined = [];
    const unknown = [];
    const sections = this.#sections(text);
    for (const { start, end, added } of sections) {
      if (!added) this.#section(text.slice(start, end), start, tokens, spans, joined, unknown);
      else if (tokens[spans.length] === added.content) spans.push([start, end]);
      else refuse(text, start);
    }
    if (spans.length < tokens.length) refuse(text, text.length);
    this.trims.forEach((rule) => trim(spans, tokens, rule.add_prefix_space));
    return { spans, joined, unknown };
  }

  /** The added tokens of a text, with the white space that they take with them, and what is between them. */
  #sections(text) {
    const sections = [];
    let place = 0;
    const between = (start, end) => end > start && sections.push({ start, end, added: null });
    for (const { 0: content, index } of text.matchAll(this.places)) {
      const added = this.added.get(content);
      const taken = added.lstrip ? (WHITE_END.exec(text.slice(place, index))?.[0].length ?? 0) : 0;
      between(place, index - taken);
      const after = index + content.length;
      const next = added.rstrip ? (WHITE.exec(text.slice(after))?.[0].length ?? 0) : 0;
      sections.push({ start: Math.max(place, index - taken), end: after + next, added });
      place = after + next;
    }
    between(place, text.length);
    return sections;
  }

  /** Lay tokens along a section without added tokens, from the first that has no span on. */
  #section(section, offset, tokens, spans, joined, unknown) {
    const { bytes, starts, ends } = this.#changed(section, offset, joined);
    for (let place = 0; place < bytes.length;) {
      const length = spans.length < tokens.length ? this.#length(bytes, place, tokens, spans.length) : 0;
      if (length === 0) refuse(section, starts[place] - offset);
      if (tokens[spans.length] === this.unknown) unknown.push(spans.length);
      spans.push([starts[place], ends[place + length - 1]]);
      place += length;
    }
  }

  /** How many of the bytes from a place on a token covers; 0 if it does not fit. */
  #length(bytes, place, tokens, i) {
    if (tokens[i] === this.unknown) {
      const character = (from) => {
        let to = from + 1;
        while (to < bytes.length && (bytes[to] & 0xc0) === 0x80) to += 1;
        return to;
      };
      let to = character(place);
      const next = tokens[i + 1];
      while (this.fuses && to < bytes.length && (next === undefined || !fits(bytes, to, this.#surface(next))))
        to = character(to);
      return to - place;
    }
    const byte = this.fallsBack ? BYTE.exec(tokens[i]) : null;
    if (byte !== null && bytes[place] === Number.parseInt(byte[1], 16)) return 1;
    const surface = this.#surface(tokens[i]);
    return fits(bytes, place, surface) ? surface.length : 0;
  }

  #surface(token) {
    if (this.changed.has(token)) return this.changed.get(token);
    if (!this.inBytes) return ENCODER.encode(token);
    return Array.from(token, (character) => BYTES.get(character));
  }

  /** The bytes of a section as the tokenizer changes it, and the characters that each comes from. */
  #changed(section, offset, joined) {
    const bytes = [];
    const starts = [];
    const ends = [];
    const add = (piece, start, end) => {
      for (const byte of ENCODER.encode(piece)) {
        bytes.push(byte);
        starts.push(start);
        ends.push(end);
      }
    };
    if (section === "") return { bytes, starts, ends };
    const whole = this.#normalized(section);
    let built = "";
    let place = offset;
    const clusters = whole === section ? section : (section.match(CLUSTER) ?? []);
    for (const cluster of clusters) {
      const piece = this.#normalized(cluster);
      const end = place + cluster.length;
      const characters = Array.from(cluster);
      const apart = characters.map((character) => this.#normalized(character));
      if (apart.join("") === piece) {
        characters.forEach((character, i) => {
          add(apart[i], place, place + character.length);
          place += character.length;
        });
      } else {
        joined.push([place, end]);
        add(piece, place, end);
      }
      place = end;
      built += piece;
    }
    if (built !== whole) refuse(section, 0);
    // The space that is put before a text covers its first character.
    const first = String.fromCodePoint(section.codePointAt(0)).length;
    for (const rule of this.normalizers) {
      if (rule.type === "Prepend") {
        const prefix = ENCODER.encode(rule.prepend);
        bytes.unshift(...prefix);
        starts.unshift(...Array(prefix.length).fill(offset));
        ends.unshift(...Array(prefix.length).fill(offset + first));
      }
    }
    const scheme = this.metaspace?.prepend_scheme ?? (this.metaspace ? "always" : "never");
    if ((scheme === "always" || (scheme === "first" && offset === 0)) && !whole.startsWith(SPACE)) {
      const prefix = ENCODER.encode(SPACE);
      bytes.unshift(...prefix);
      starts.unshift(...Array(prefix.length).fill(offset));
      ends.unshift(...Array(prefix.length).fill(offset + first));
    }
    return { bytes, starts, ends };
  }

  #normalized(text) {
    let changed = text;
    for (const rule of this.normalizers) {
      if (rule.type === "Replace") changed = changed.replaceAll(rule.pattern.String, rule.content);
      else if (rule.type !== "Prepend") changed = changed.normalize(rule.type);
    }
    return this.metaspace ? changed.replaceAll(" ", SPACE) : changed;
  }
}

function fits(bytes, place, surface) {
  for (let k = 0; k < surface.length; k += 1) if (bytes[place + k] !== surface[k]) return false;
  return true;
}

/** Take the spaces around each token out of its span, as byte-level post-processors may do. */
function trim(spans, tokens, addsSpace) {
  const space = (character) => character === "\u0120" || /\p{White_Space}/u.test(character);
  tokens.forEach((token, i) => {
    const characters = [...token];
    let leading = characters.findIndex((character) => !space(character));
    leading = leading < 0 ? characters.length : leading;
    const trailing = characters.length - 1 - characters.findLastIndex((character) => !space(character));
    if (leading === 1 && addsSpace && (i === 0 || spans[i][0] === 0)) leading = 0;
    spans[i][0] = Math.min(spans[i][0] + leading, spans[i][1]);
    if (trailing && spans[i][1] >= trailing) spans[i][1] = Math.max(spans[i][1] - trailing, spans[i][0]);
  });
}

function refuse(text, place) {
  const near = text.slice(Math.max(0, place - 10), place + 20);
  throw new BonnxError(
    "tokenizer",
    `the tokens of a text do not fit it near ${JSON.stringify(near)}: this module does not read it as the model's tokenizer does; pass token ids`,
  );
}

/**
 * Token ids to the text that they add after a prompt: prompt plus text is what the model wrote.
 *
 * Decoders treat the beginning of a text specially: Llama's and Mistral's remove the space that their encoders add
 * there. So ids are decoded after the last tokens of their context, and the text of the context is removed.
 *
 * @module
 */

// Replaces bytes that are not a character.
const BROKEN = "\ufffd";
// Tokens before a completion that decide how it is decoded: a character has at most 4 bytes, a token at least one.
const CONTEXT = 8;

/** Decodes for one tokenizer. */
export class Detokenizer {
  #letter = 0;

  /**
   * @param {object} tokenizer of the package
   * @param {Set<number>} special ids of its special tokens
   */
  constructor(tokenizer, special) {
    this.tokenizer = tokenizer;
    this.special = special;
    this.opening = tokenizer.encode("", { add_special_tokens: true }).ids;
    // The package would drop a byte order mark.
    for (const decoder of tokenizer.decoder?.decoders ?? [tokenizer.decoder]) {
      if (decoder?.text_decoder) decoder.text_decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    }
    this.bytes = this.#byteTokens();
  }

  /**
   * The text that `ids` add after `before`, without special tokens.
   *
   * @param {number[]} ids a completion
   * @param {number[]} before its prompt, which decides whether the text begins with a space
   * @param {boolean} [growing] more tokens will come, so bytes of an incomplete character are left out
   */
  text(ids, before, growing = false) {
    const text = this.#behind(
      this.#context(before),
      ids.filter((id) => !this.special.has(id)),
    );
    return growing ? text.replace(/\ufffd+$/, "") : text;
  }

  /** The text of a token after any text; special tokens included. */
  piece(id) {
    return this.#behind(this.#someText(), [id]);
  }

  /** The other tokens whose text holds the text of a token; none for a special token. */
  tokensWith(token, text) {
    if (this.special.has(token)) return [];
    const own = this.bytes.has(token) ? text : (this.tokenizer.id_to_token(token) ?? text);
    const found = new Set();
    for (const [name, id] of this.tokenizer.get_vocab()) {
      if (name?.includes(own) && !this.special.has(id) && !this.bytes.has(id) && id !== token) found.add(id);
    }
    const utf8 = new TextEncoder().encode(text);
    for (const [id, byte] of this.bytes) if (utf8.length === 1 && utf8[0] === byte && id !== token) found.add(id);
    return [...found].sort((a, b) => a - b);
  }

  /** The tokens before a completion that decide how it is decoded; none where it begins a text. */
  #context(before) {
    const words = [];
    for (let i = before.length - 1; i >= 0 && words.length < CONTEXT; i -= 1) {
      if (!this.special.has(before[i])) words.unshift(before[i]);
    }
    if (words.length) return words;
    const begins =
      before.length === 0 || (before.length === this.opening.length && before.every((id, i) => id === this.opening[i]));
    return begins ? [] : [before.at(-1)];
  }

  /** Any token that is text. */
  #someText() {
    for (const id of this.tokenizer.get_vocab().values()) {
      if (!this.special.has(id) && !this.bytes.has(id) && this.#decode([id]).replaceAll(/[\ufffd ]/g, "")) return [id];
    }
    return [];
  }

  #behind(context, ids) {
    const before = this.#decode(context);
    const whole = this.#decode([...context, ...ids]);
    if (whole.startsWith(before)) return whole.slice(before.length);
    // The context ends within a character that the ids complete.
    let same = 0;
    while (same < before.length && before[same] === whole[same]) same += 1;
    return whole.slice(same);
  }

  /** The tokenizer's text, except that invalid bytes never spoil the characters beside them. */
  #decode(ids) {
    const parts = [];
    let start = 0;
    for (const end of [...this.#broken(ids), ids.length]) {
      const part = ids.slice(start, end);
      // After a letter, so that the decoder does not treat it as the beginning of a text.
      parts.push(start ? this.#plain([this.#letter, ...part]).slice(1) : this.#plain(part));
      start = end + 1;
    }
    return parts.join(BROKEN);
  }

  #plain(ids) {
    const known = ids.filter((id) => this.tokenizer.id_to_token(id) !== undefined);
    return known.length
      ? this.tokenizer.decode(known, { skip_special_tokens: false, clean_up_tokenization_spaces: false })
      : "";
  }

  /** The byte of each token that stands for one, where the decoder puts these together; else empty. */
  #byteTokens() {
    const ids = [];
    for (let byte = 0; byte < 256; byte += 1) {
      const id = this.tokenizer.token_to_id(`<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`);
      if (id === undefined) return new Map();
      ids.push(id);
    }
    if (this.#plain([ids[97], ids[0xc3], ids[0xa9]]).slice(-2) !== "a\u00e9") return new Map();
    this.#letter = ids[97];
    return new Map(ids.map((id, byte) => [id, byte]));
  }

  /** Indices of byte tokens that are not part of a character. */
  #broken(ids) {
    const result = [];
    if (this.bytes.size === 0) return result;
    for (let i = 0; i < ids.length;) {
      const length = characterLength((k) => this.bytes.get(ids[i + k]));
      if (length === 0) result.push(i);
      i += Math.max(1, length ?? 1);
    }
    return result;
  }
}

/** Bytes of the character that begins here: 0 if they are none, and null where no byte is. */
function characterLength(byte) {
  const first = byte(0);
  if (first === undefined) return null;
  if (first < 0x80) return 1;
  const length = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
  const bytes = Array.from({ length }, (_, k) => byte(k));
  if (bytes.includes(undefined)) return 0;
  try {
    new TextDecoder("utf-8", { fatal: true }).decode(Uint8Array.from(bytes));
    return length;
  } catch {
    return 0;
  }
}

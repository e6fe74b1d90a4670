/**
 * Messages, or a query and a document, to text: the model's own template.
 *
 * @module
 */

import { shown } from "./checks.mjs";
import { BonnxError } from "./errors.mjs";
import { JinjaTemplate } from "./jinja.mjs";

// Stands for any words: a character that no template uses.
const MARK = "\ue000";
const MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"];
const DAYS = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

class Refusal extends Error {}

/** A template used content in parts as a text. */
class TakesText extends Error {
  constructor(role) {
    super("a text was expected, and the content is in parts");
    this.role = role;
  }
}

/** A compiled template and the special tokens' texts by the names that it uses. */
class Renderer {
  constructor(source, tokens) {
    this.tokens = tokens;
    try {
      this.template = new JinjaTemplate(source);
    } catch (error) {
      throw new BonnxError("template", `the chat template cannot be read: ${error.message}`, { cause: error });
    }
  }

  /** @param {(values: object) => void} [adapt] gets the messages as the interpreter's values */
  render(variables, now, adapt) {
    const functions = {
      range: (...bounds) => range(bounds),
      strftime_now: (format) => formatted(now, format),
      raise_exception: (message) => {
        throw new Refusal(String(message).slice(0, 2000));
      },
    };
    try {
      return this.template.render({ ...functions, ...this.tokens, ...variables }, (name, value) => name === "messages" && adapt?.(value));
    } catch (error) {
      if (error instanceof TakesText) throw error;
      const verb = error instanceof Refusal ? "refuses" : "cannot render";
      throw new BonnxError("input", `the model's chat template ${verb} these messages: ${error.message}`, { cause: error });
    }
  }
}

/** A model's chat template. */
export class ChatTemplate {
  #readsParts;
  #takesNoText;

  /**
   * @param {string} source
   * @param {Record<string, string>} tokens
   */
  constructor(source, tokens) {
    this.renderer = new Renderer(source, tokens);
  }

  /** The text of a conversation, special tokens of the template included; `prompted` ends it before an answer. */
  render(messages, name, prompted) {
    return this.#render(plainMessages(messages, name), prompted, new Date());
  }

  /**
   * Whole conversations, and where in each text the candidate begins and its last words end.
   *
   * @param {object[]} prompt the messages that all candidates follow
   * @param {(string | object[])[]} candidates the assistant's words, or the messages that follow the prompt's
   * @param {string[]} names of the candidates, in errors
   * @returns {import("./tokenizer.mjs").Passage[]}
   */
  split(prompt, candidates, names) {
    // The same time of day in all renderings.
    const now = new Date();
    const first = plainMessages(prompt, "prompt");
    const head = this.#render(first, true, now);
    let closing = null;
    return candidates.map((candidate, i) => {
      const answer = typeof candidate === "string" ? [{ role: "assistant", content: candidate }] : candidate;
      const conversation = [...first, ...plainMessages(answer, names[i])];
      const text = this.#render(conversation, false, now);
      const start = commonLength(head, text);
      if (closing === null || typeof candidate !== "string") closing = this.#closing(conversation, now);
      const stop = text.endsWith(closing) ? text.length - closing.length : text.length;
      return { text, start, stop: Math.max(start, stop) };
    });
  }

  /** What the template writes behind the last message's words. */
  #closing(messages, now) {
    const last = messages.at(-1);
    if (last.content === undefined) return "";
    const text = this.#render([...messages.slice(0, -1), { ...last, content: MARK }], false, now);
    return text.includes(MARK) ? text.slice(text.lastIndexOf(MARK) + MARK.length) : "";
  }

  /**
   * The text. Parts are joined where the template expects a text; a text becomes one part where it expects parts. Where
   * the template reads only some of the parts, such as the first, it gets all words in one part.
   */
  #render(messages, prompted, now) {
    const one = new Set();
    const whole = new Set([...messages.keys()].filter((i) => typeof messages[i].content === "string"));
    if (whole.size && this.takesNoText) whole.clear();
    for (;;) {
      const { adapted, parts } = this.#adapted(messages, whole, one);
      try {
        const text = this.#renderOnce(adapted, parts, prompted, now);
        const unread = [...parts].filter(([, content]) => !content.read).map(([i]) => i);
        const some = [...parts].filter(([, content]) => content.read && content.unread.size).map(([i]) => i);
        if (!unread.length && !some.length) return text;
        unread.forEach((i) => whole.add(i));
        some.forEach((i) => one.add(i));
      } catch (error) {
        const mistaken =
          error instanceof TakesText
            ? [...parts.keys()].filter((i) => messages[i].role === error.role)
            : // It may have mistaken parts for a text; a user's parts are not the reason if the template reads parts.
              [...parts.keys()].filter((i) => messages[i].role !== "user" || !this.readsParts);
        if (!mistaken.length) throw error;
        mistaken.forEach((i) => whole.add(i));
      }
    }
  }

  /** Messages for the template, the content of those in `whole` as texts, of the others as parts; and these parts. */
  #adapted(messages, whole, one) {
    const parts = new Map();
    const adapted = messages.map((message, i) => {
      const { content } = message;
      if (whole.has(i)) return Array.isArray(content) ? { ...message, content: joined(content) } : message;
      if (content === undefined) return message;
      const words = one.has(i) && Array.isArray(content) ? joined(content) : content;
      const listed = Array.isArray(words) ? words : [{ type: "text", text: words }];
      parts.set(i, { read: listed.length === 0, unread: new Set(listed.keys()) });
      return { ...message, content: listed };
    });
    return { adapted, parts };
  }

  #renderOnce(messages, parts, prompted, now) {
    const variables = { messages, tools: null, documents: null, add_generation_prompt: prompted };
    return this.renderer.render(variables, now, (values) => {
      for (const [i, reading] of parts) watch(values.value[i].value.get("content"), reading, messages[i].role);
    });
  }

  /** Whether the template writes content in parts. */
  get readsParts() {
    return (this.#readsParts ??= this.#writes(new Set()));
  }

  /** Whether the template drops content that is a text, but writes it as a part. */
  get takesNoText() {
    return (this.#takesNoText ??= !this.#writes(new Set([0])) && this.readsParts);
  }

  #writes(whole) {
    const { adapted, parts } = this.#adapted([{ role: "user", content: MARK }], whole, new Set());
    try {
      return this.#renderOnce(adapted, parts, false, new Date()).includes(MARK);
    } catch (error) {
      if (error instanceof BonnxError || error instanceof TakesText) return false;
      throw error;
    }
  }
}

/**
 * Record which parts of a content the template reads, and refuse to become a text.
 *
 * A template that expects a text would write a list as JSON, or nothing at all.
 *
 * @param {object} content the interpreter's value
 */
function watch(content, reading, role) {
  const refuse = () => {
    throw new TakesText(role);
  };
  const parts = content.value;
  for (const part of parts) {
    part.toString = refuse;
  }
  content.toString = refuse;
  content.value = new Proxy(parts, {
    get(target, key) {
      // A text is looked for among the parts.
      if (key === "find") return refuse;
      if (typeof key === "string" && /^\d+$/.test(key)) {
        reading.read = true;
        reading.unread.delete(Number(key));
      }
      return Reflect.get(target, key);
    },
  });
}

/** A reranker's template: what precedes the document is the shared prompt. */
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
    if (unused.length < 2) throw new BonnxError("input", "the texts use all of the private characters U+E000 to U+E0FF; leave some of them out");
    return unused;
  }

  #render(query, document, instruction, border, now) {
    const system = instruction ?? this.rules.instruction;
    const message = (role, text) => ({ role, content: this.rules.content === "flat" ? text : [{ type: "text", text }] });
    const messages = [...(system ? [message("system", system)] : []), message("query", query), message("document", document)];
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
  return { text: pieces.join(""), start: passage.start - count(passage.start), stop: passage.stop - count(passage.stop), cuts };
}

/** Length of the common beginning of two texts, in whole characters. */
function commonLength(a, b) {
  let length = 0;
  while (length < a.length && length < b.length && a[length] === b[length]) length += 1;
  const half = length > 0 && length < Math.max(a.length, b.length) && /[\ud800-\udbff]/.test(a[length - 1]);
  return half ? length - 1 : length;
}

/** Whether a prompt or candidate is meant as messages: a list whose first element is an object. */
export function isMessages(value) {
  const [first] = Array.isArray(value) ? value : [];
  return first !== null && typeof first === "object" && !Array.isArray(first) && !ArrayBuffer.isView(first);
}

function joined(parts) {
  return parts.map((part) => part.text).join("");
}

/** Copies of messages. Keys without a value are dropped, and other names of `reasoning_content` are accepted. */
function plainMessages(messages, name) {
  if (!Array.isArray(messages) || messages.length === 0) {
    throw new BonnxError("input", `${name}: expected a list of {"role": ..., "content": ...}, not empty; got ${shown(messages)}`);
  }
  return messages.map((message, i) => plainMessage(message, `${name}[${i}]`));
}

function plainMessage(message, name) {
  if (!isMessages([message])) throw new BonnxError("input", `${name}: expected {"role": ..., "content": ...}; got ${shown(message)}`);
  let copy;
  try {
    copy = JSON.parse(JSON.stringify(message));
  } catch (error) {
    throw new BonnxError("input", `${name}: expected plain JSON values: ${error.message}`, { cause: error });
  }
  const plain = Object.fromEntries(Object.entries(copy).filter(([, value]) => value !== null));
  const { role, content } = plain;
  if (typeof role !== "string") throw new BonnxError("input", `${name}: 'role' must be a text such as 'user'; got ${shown(role)}`);
  if (content === undefined && !("tool_calls" in plain)) {
    throw new BonnxError("input", `${name}: there is no 'content'; got the keys ${Object.keys(plain).join(", ")}`);
  }
  if (Array.isArray(content)) {
    const wrong = content.findIndex((part) => part?.type !== "text" || typeof part.text !== "string");
    if (wrong >= 0) {
      throw new BonnxError("input", `${name}.content[${wrong}]: expected {type: "text", text: ...}: only text can be ranked; got ${shown(content[wrong])}`);
    }
  } else if (content !== undefined && typeof content !== "string") {
    throw new BonnxError("input", `${name}: 'content' must be a text or a list of text parts; got ${shown(content)}`);
  }
  const reasoning = ["reasoning_content", "thinking", "reasoning"].find((key) => key in plain);
  return reasoning === undefined ? plain : { thinking: plain[reasoning], ...plain, reasoning_content: plain[reasoning] };
}

function range(bounds) {
  const [start, stop, step] = bounds.length === 1 ? [0, bounds[0], 1] : [bounds[0], bounds[1], bounds[2] ?? 1];
  const count = Math.ceil((stop - start) / step);
  if (!Number.isFinite(count) || count > 200_000) throw new Error("range: expected at most 200000 numbers");
  return Array.from({ length: Math.max(0, count) }, (_, i) => start + i * step);
}

/** A time as Python's strftime writes it in English. */
function formatted(now, format) {
  const two = (number) => String(number).padStart(2, "0");
  const fields = {
    Y: () => String(now.getFullYear()),
    m: () => two(now.getMonth() + 1),
    d: () => two(now.getDate()),
    B: () => MONTHS[now.getMonth()],
    b: () => MONTHS[now.getMonth()].slice(0, 3),
    A: () => DAYS[now.getDay()],
    a: () => DAYS[now.getDay()].slice(0, 3),
    H: () => two(now.getHours()),
    I: () => two(now.getHours() % 12 || 12),
    p: () => (now.getHours() < 12 ? "AM" : "PM"),
    M: () => two(now.getMinutes()),
    S: () => two(now.getSeconds()),
    y: () => two(now.getFullYear() % 100),
    "%": () => "%",
  };
  return String(format).replaceAll(/%(.)/gs, (code, letter) => {
    if (!(letter in fields)) throw new Error(`strftime_now: the field ${code} is not supported`);
    return fields[letter]();
  });
}

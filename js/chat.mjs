/**
 * Messages to text: a model's chat template.
 *
 * @module
 */

import { BonnxError } from "./errors.mjs";
import { plainMessages } from "./messages.mjs";
import { Renderer, TakesText, commonLength } from "./templates.mjs";

// Stands for any words: a character that no template uses.
const MARK = "\ue000";
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

function joined(parts) {
  return parts.map((part) => part.text).join("");
}

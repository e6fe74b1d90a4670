/**
 * The templates that come with a model, rendered with what they expect to find.
 *
 * @module
 */

import { BonnxError } from "./errors.mjs";
import { JinjaTemplate } from "./jinja.mjs";

const MONTHS = [
  "January",
  "February",
  "March",
  "April",
  "May",
  "June",
  "July",
  "August",
  "September",
  "October",
  "November",
  "December",
];
const DAYS = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

class Refusal extends Error {}

/** A template used content in parts as a text. */
export class TakesText extends Error {
  constructor(role) {
    super("a text was expected, and the content is in parts");
    this.role = role;
  }
}

/** A compiled template and the special tokens' texts by the names that it uses. */
export class Renderer {
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
      return this.template.render(
        { ...functions, ...this.tokens, ...variables },
        (name, value) => name === "messages" && adapt?.(value),
      );
    } catch (error) {
      if (error instanceof TakesText) throw error;
      const verb = error instanceof Refusal ? "refuses" : "cannot render";
      throw new BonnxError("input", `the model's chat template ${verb} these messages: ${error.message}`, {
        cause: error,
      });
    }
  }
}

/** Length of the common beginning of two texts, in whole characters. */
export function commonLength(a, b) {
  let length = 0;
  while (length < a.length && length < b.length && a[length] === b[length]) length += 1;
  const half = length > 0 && length < Math.max(a.length, b.length) && /[\ud800-\udbff]/.test(a[length - 1]);
  return half ? length - 1 : length;
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

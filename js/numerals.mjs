/**
 * Numbers as people and LaTeX write them, in one form: a decimal, or else a fraction in lowest terms.
 *
 * docs/text.md says what is read. The patterns are those of runtime/selection/numerals.py.
 *
 * @module
 */

import { WHITE, WORD } from "./pattern.mjs";

const W = `[${WORD}]`;
const DECIMAL = `(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\\.[0-9]+)?|(?<!${W}|\\.)\\.[0-9]+)`;
const CURRENCY = "(?:(?:US)?\\\\?\\$[ ]?|[\u20ac\u00a3\u00a5][ ]?)";
// A minus after a word, a digit or a bracket subtracts; one with a space behind it is a sign behind `=` and the like.
const SIGN = `(?:(?<![${WORD})\\]}])[-+]|(?<=[=(:,\\{])[-+][ ]|(?<=[=(:,\\{][ ])[-+][ ])`;
const NUMBER = [
  "(?<![\\^_0-9])(?<![\\^_]\\{)(?<!\\^[-+])(?<!\\^\\{[-+])(?<![0-9]\\.)",
  `${CURRENCY}?(?<sign>${SIGN})?${CURRENCY}?`,
  `(?:(?<compound>(?!${DECIMAL}(?![.,]?[0-9]))[0-9]+(?:[.,][0-9]+)+|[0-9]+(?::[0-9]+)+`,
  "|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}|[0-9]{1,4}(?:/[0-9]{1,4}){2,})(?![0-9])",
  `|(?:(?<mixed>${DECIMAL})[ ]?)?\\\\[dtc]?frac[ ]?`,
  `(?:\\{[ ]?(?<top>-?${DECIMAL})[ ]?\\}|(?<upper>[0-9]))[ ]?`,
  `(?:\\{[ ]?(?<bottom>${DECIMAL})[ ]?\\}|(?<lower>[0-9]))`,
  `|(?<whole>${DECIMAL})`,
  "(?:[eE](?<exponent>[-+]?[0-9]+)",
  "|[ ](?<part>[0-9]+)/(?<of>[0-9]+)(?![0-9/])",
  `|[ ]?/[ ]?(?<divisor>${DECIMAL})`,
  "|(?:\\^|\\*\\*)(?:\\{(?<power>[-+]?[0-9]+)\\}|(?<bare>[-+]?[0-9]+))",
  "|[ ]?(?:\\\\times|\\\\cdot|[x*\u00d7\u00b7])[ ]?10\\^(?:\\{(?<ten>[-+]?[0-9]+)\\}|(?<tens>[-+]?[0-9]+))",
  ")?)",
  `(?:[ ](?<scale>thousand|million|billion|trillion)(?!${W}))?`,
  "(?:[ ]?(?:\\\\?%|[\u20ac\u00a3\u00a5]))?",
].join("");
const NUMBERS = new RegExp(NUMBER, "gu");
// Words that go on with what a number began, so that it is not a quantity.
const LETTER = `(?!(?:pi|or|and|to|mod|sqrt|sin|cos|tan|log|ln|exp|times|plus|minus|over)(?!${W}))[\\p{L}\\p{Nl}\\p{No}]`;
const POWER = "(?:\\^(?:\\{-?[0-9]\\}|-?[0-9]))?";
const UNIT = [
  "[ ]?(?:\\^(?:\\{\\\\circ\\}|\\\\circ)|\u00b0|\\\\degree)[ ]?[CFK]?",
  `|(?:[ ]?\\\\(?:text|textrm|textbf|mathrm|mbox|operatorname)\\{[^\\{\\}0-9\\\\]*\\}${POWER})+`,
  `|[ ]${LETTER}{2,}${POWER}(?:[ /\u00b7]${LETTER}+${POWER})*`,
].join("");
const QUANTITY = new RegExp(`^(?:${NUMBER}(?:${UNIT})?)$`, "u");
const NAME = new RegExp(`^[${WHITE}]*(?!\\\\)[\\p{L}\\p{Nl}\\p{No}][^=]*=[${WHITE}]*`, "u");
const SCALES = { thousand: 3, million: 6, billion: 9, trillion: 12 };

const CHARACTERS = new Map([
  ...["\u2212", "\ufe63", "\uff0d", "\u2012", "\u2013"].map((minus) => [minus, "-"]),
  ["\u2044", "/"],
  ["\uff04", "$"],
  ["\uff05", "%"],
  ...Array.from({ length: 10 }, (_, digit) => [String.fromCharCode(0xff10 + digit), String(digit)]),
  ...[..."\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"].map((space) => [space, " "]),
]);
const RAISED = [..."\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b\u207a"];
const SUPERSCRIPTS = new RegExp(`[${RAISED.join("")}]+`, "g");
const VULGAR = new Map(
  "\u00bd1/2 \u21531/3 \u21542/3 \u00bc1/4 \u00be3/4 \u21551/5 \u21562/5 \u21573/5 \u21584/5 \u21591/6 \u215a5/6 \u21501/7 \u215b1/8 \u215c3/8 \u215d5/8 \u215e7/8 \u21511/9 \u21521/10"
    .split(" ")
    .map((entry) => [entry[0], entry.slice(1)]),
);
const VULGARS = new RegExp(`([0-9]?)([${[...VULGAR.keys()].join("")}])`, "g");
const THOUSANDS = /(?<=[0-9])(?:\{,\}|,?\\[,;:! ]|[ '\u2019_~])(?=[0-9]{3}(?![0-9]|[ ]?\/))/g;
const POINTS = /^[1-9][0-9]{0,2}(?:\.[0-9]{3}){2,}$/;
// Blanks and brackets that may stand around an exponent. Two asterisks beside a number may be bold text in Markdown.
const RAISING = / ?\^ ?(?:\{ ?([-+]?[0-9]+) ?\}|\( ?([-+]?[0-9]+) ?\)|([-+]?[0-9]+))/g;
const ASTERISKS = /(?<=[0-9]) \*\* (?=[-+]?[0-9])/g;
// Longer ones are compared as text.
const LONGEST = 300;

/** The last number of a text, in its form; null if there is none. */
export function lastNumber(text) {
  let last = null;
  for (const match of plain(text).matchAll(NUMBERS)) last = match;
  return last === null ? null : form(last, false);
}

/** The number that a text is, perhaps with a unit behind it or `x =` before it, in its form; null if it is none. */
export function readNumber(text) {
  const value = plain(text)
    .replace(NAME, "")
    .replace(new RegExp(`^([-+]) (?=[^${WHITE}])`, "u"), "$1");
  const match = QUANTITY.exec(value);
  return match === null ? null : form(match, true);
}

/** With one character or command for what may be written in many ways. */
function plain(text) {
  return Array.from(text, (character) => CHARACTERS.get(character) ?? character)
    .join("")
    .replace(
      SUPERSCRIPTS,
      (raised) => `^{${Array.from(raised, (character) => "0123456789-+"[RAISED.indexOf(character)]).join("")}}`,
    )
    .replace(RAISING, (_, braced, bracketed, bare) => `^${bare ?? `{${braced ?? bracketed}}`}`)
    .replace(ASTERISKS, "**")
    .replace(VULGARS, (_, digit, vulgar) => `${digit}${digit ? " " : ""}${VULGAR.get(vulgar)}`)
    .replace(THOUSANDS, ",");
}

function form(match, alone) {
  const { compound, sign, scale } = match.groups;
  const negative = sign?.startsWith("-") ? "-" : "";
  if (compound !== undefined && !POINTS.test(compound)) return negative + compound;
  const whole = match[0].replaceAll(",", "").replace(new RegExp(`^[${WHITE}]+|[${WHITE}]+$`, "gu"), "");
  if ([...whole].length > LONGEST) return whole;
  let value = compound === undefined ? valueOf(match.groups, alone) : fraction(compound.replaceAll(".", ""));
  if (value === null) return alone ? null : whole;
  value = lowest(value[0] * 10n ** BigInt(SCALES[scale] ?? 0), value[1]);
  return written(negative ? -value[0] : value[0], value[1]);
}

/** Without its sign; null if it divides by zero or is too large, or is no number of its own. */
function valueOf(groups, alone) {
  const number = (...names) => fraction(groups[names.find((name) => groups[name])].replaceAll(",", ""));
  if (groups.whole === undefined) {
    const top = number("top", "upper");
    const bottom = number("bottom", "lower");
    if (!bottom[0]) return null;
    const mixed = groups.mixed ? number("mixed") : [0n, 1n];
    return plus(over(top, bottom), mixed);
  }
  const value = number("whole");
  if (groups.part) {
    const part = number("part");
    const of = number("of");
    if (!of[0] || (alone && part[0] >= of[0])) return null;
    return part[0] < of[0] ? plus(value, over(part, of)) : over(part, of);
  }
  if (groups.divisor) return number("divisor")[0] ? over(value, number("divisor")) : null;
  const raised = groups.power || groups.bare;
  if (raised) {
    const power = BigInt(raised);
    const size = power < 0n ? -power : power;
    if (size * BigInt(groups.whole.length) > 1000n || (!value[0] && power < 0n)) return null;
    const [top, bottom] = [value[0] ** size, value[1] ** size];
    return power < 0n ? [bottom, top] : [top, bottom];
  }
  const power = BigInt(groups.exponent || groups.ten || groups.tens || 0);
  const size = power < 0n ? -power : power;
  if (size >= 1000n) return null;
  return power < 0n ? [value[0], value[1] * 10n ** size] : [value[0] * 10n ** size, value[1]];
}

/** Numerator and denominator of a decimal. */
function fraction(text) {
  const [whole, decimals = ""] = text.split(".");
  return [BigInt((whole || "0") + decimals), 10n ** BigInt(decimals.length)];
}

function plus(a, b) {
  return [a[0] * b[1] + b[0] * a[1], a[1] * b[1]];
}

function over(a, b) {
  return [a[0] * b[1], a[1] * b[0]];
}

function lowest(top, bottom) {
  let [a, b] = [top < 0n ? -top : top, bottom];
  while (b) [a, b] = [b, a % b];
  return a ? [top / a, bottom / a] : [top, bottom];
}

/** A decimal if its digits end, or else the fraction. */
function written(top, bottom) {
  let rest = bottom;
  let digits = 0n;
  for (const prime of [2n, 5n]) {
    let count = 0n;
    while (rest % prime === 0n) {
      rest /= prime;
      count += 1n;
    }
    digits = count > digits ? count : digits;
  }
  if (rest !== 1n) return `${top}/${bottom}`;
  const whole = String((top < 0n ? -top : top) * (10n ** digits / bottom)).padStart(Number(digits) + 1, "0");
  const place = whole.length - Number(digits);
  const decimals = digits ? `.${whole.slice(place)}`.replace(/\.?0+$/, "") : "";
  return `${top < 0n ? "-" : ""}${whole.slice(0, place)}${decimals}`;
}

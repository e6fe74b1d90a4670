/**
 * The rules of Countdown: combine all the numbers with + - * / to reach the target; every result is from 1 to 999.
 *
 * @module
 */

const PROMPT = /^(\d+(?:,\d+)+)>(\d+):$/;
const STEP = /^(\d+)([-+*/])(\d+)=(\d+)$/;

/** A random puzzle that has a solution, as a prompt. */
export function drawPuzzle(random = Math.random) {
  for (;;) {
    const numbers = Array.from({ length: 4 }, () => 1 + Math.floor(25 * random())).sort((a, b) => a - b);
    const left = [...numbers];
    while (left.length > 1) {
      const take = () => left.splice(Math.floor(left.length * random()), 1)[0];
      const [b, a] = [take(), take()].sort((x, y) => x - y);
      const result = applied(a, "+-*/"[Math.floor(4 * random())], b);
      if (result === null) break;
      left.push(result);
      if (left.length === 1 && result <= 100) return `${numbers.join(",")}>${result}:`;
    }
  }
}

/** Whether a prompt is a puzzle. */
export function isPuzzle(prompt) {
  return PROMPT.test(prompt);
}

/** What the checker says of a completion: null if it is right, otherwise what is wrong with it. */
export function mistake(prompt, completion) {
  const [, numbers, target] = PROMPT.exec(prompt);
  const left = numbers.split(",").map(Number);
  if (!completion.endsWith(";")) return "not finished";
  for (const step of completion.slice(0, -1).split(";")) {
    const match = STEP.exec(step);
    if (match === null) return `not a step: ${step}`;
    const [a, b, result] = [match[1], match[3], match[4]].map(Number);
    for (const number of [a, b]) {
      const place = left.indexOf(number);
      if (place < 0) return `${number} is not left in ${step}`;
      left.splice(place, 1);
    }
    if (applied(a, match[2], b) !== result) return `${step} is wrong`;
    left.push(result);
  }
  if (left.length > 1) return `${left.slice(0, -1).join(", ")} not used`;
  return left[0] === Number(target) ? null : `ends at ${left[0]}`;
}

function applied(a, operator, b) {
  if (operator === "/") return b !== 0 && a % b === 0 ? a / b : null;
  const result = operator === "+" ? a + b : operator === "-" ? a - b : a * b;
  return result >= 1 && result <= 999 ? result : null;
}

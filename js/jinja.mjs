/**
 * Chat templates as Jinja2 renders them.
 *
 * `@huggingface/jinja` parses them and has most of the language, but in some things it silently does something else than
 * Jinja2: it ignores the argument of `rstrip`, keeps what a turn of a loop sets for the next one, prints `true`, and so
 * on. What templates use is put right here; what is still different fails, so that no text is silently another.
 *
 * @module
 */

import { Environment, Interpreter, Template } from "@huggingface/jinja";

import { WHITE } from "./pattern.mjs";

// The package does not export its classes of values.
const scope = new Environment();
const classOf = (name, value) => scope.set(name, value).constructor;
const StringValue = classOf("text", "");
const IntegerValue = classOf("whole", 1);
const FloatValue = classOf("number", 0.5);
const BooleanValue = classOf("flag", true);
const NullValue = classOf("null", null);
const UndefinedValue = classOf("undefined", undefined);
const ArrayValue = classOf("list", []);
const ObjectValue = classOf("object", {});
const FunctionValue = classOf("function", () => null);

const STATEMENTS = new Set([
  "Set",
  "If",
  "For",
  "Macro",
  "CallStatement",
  "FilterStatement",
  "Comment",
  "Break",
  "Continue",
]);
const SPACES = new RegExp(`[${WHITE}]+`, "u");
// Filters of lists that the package has as Jinja2 has them; others are refused.
const LIST_FILTERS = [
  "list",
  "first",
  "last",
  "length",
  "count",
  "reverse",
  "join",
  "map",
  "selectattr",
  "rejectattr",
  "tojson",
  "default",
  "safe",
];
const OF_LISTS = new Set(["list", "first", "last", "reverse", "join", "map", "selectattr", "rejectattr"]);
const TEXT_FILTERS = [
  "length",
  "count",
  "upper",
  "lower",
  "trim",
  "capitalize",
  "replace",
  "indent",
  "string",
  "int",
  "tojson",
  "default",
  "safe",
];
const OTHER_FILTERS = ["items", "length", "count", "int", "abs", "string", "tojson", "default", "safe", "dictsort"];

/** The end or the next turn of a loop, and what was written in this one. */
class Leave extends Error {
  constructor(ends) {
    super("outside of a loop");
    this.ends = ends;
    this.written = "";
  }
}

/** A template, ready to be rendered. */
export class JinjaTemplate {
  /** @param {string} source */
  constructor(source) {
    this.program = new Template(source).parsed;
  }

  /**
   * @param {Record<string, unknown>} variables
   * @param {(name: string, value: object) => void} [adapt] gets each variable as a value of the interpreter
   * @returns {string}
   */
  render(variables, adapt) {
    const environment = new Environment();
    const constants = { true: true, false: false, none: null, True: true, False: false, None: null };
    for (const [name, value] of Object.entries({ ...constants, ...variables })) {
      environment.variables.delete(name);
      adapt?.(name, environment.set(name, value));
    }
    return new Renderer(environment).run(this.program).value;
  }
}

class Renderer extends Interpreter {
  evaluate(node, environment) {
    if (node?.type === "Break" || node?.type === "Continue") throw new Leave(node.type === "Break");
    if (node?.type === "Known") return node.value;
    return super.evaluate(node, environment);
  }

  /** What statements write and expressions print. */
  evaluateBlock(statements, environment) {
    let written = "";
    for (const statement of statements) {
      try {
        const value = this.evaluate(statement, environment);
        if (STATEMENTS.has(statement.type)) written += value instanceof StringValue ? value.value : "";
        else written += printed(value);
      } catch (error) {
        if (error instanceof Leave) error.written = written + error.written;
        throw error;
      }
    }
    return new StringValue(written);
  }

  evaluateFor(node, environment) {
    const select = node.iterable.type === "SelectExpression" ? node.iterable : null;
    const bound = (item) => {
      const turn = new Environment(environment);
      bind(node.loopvar, item, turn);
      return turn;
    };
    let items = listed(this.evaluate(select ? select.lhs : node.iterable, environment));
    if (select) items = items.filter((item) => this.evaluate(select.test, bound(item)).__bool__().value);
    let written = "";
    for (const [i, item] of items.entries()) {
      // Each turn has variables of its own.
      const turn = bound(item);
      turn.set("loop", {
        index: i + 1,
        index0: i,
        revindex: items.length - i,
        revindex0: items.length - i - 1,
        first: i === 0,
        last: i === items.length - 1,
        length: items.length,
      });
      const { value: loop } = turn.variables.get("loop");
      loop.set("previtem", items[i - 1] ?? new UndefinedValue());
      loop.set("nextitem", items[i + 1] ?? new UndefinedValue());
      try {
        written += this.evaluateBlock(node.body, turn).value;
      } catch (error) {
        if (!(error instanceof Leave)) throw error;
        written += error.written;
        if (error.ends) break;
      }
    }
    if (!items.length) written += this.evaluateBlock(node.defaultBlock, environment).value;
    return new StringValue(written);
  }

  evaluateBinaryExpression(node, environment) {
    const operator = node.operator.value;
    if (operator === "and" || operator === "or") return super.evaluateBinaryExpression(node, environment);
    const [left, right] = [this.evaluate(node.left, environment), this.evaluate(node.right, environment)];
    if (operator === "==" || operator === "!=") return new BooleanValue(same(left, right) === (operator === "=="));
    if (operator === "~") return new StringValue(printed(left) + printed(right));
    if (operator === "+" && left instanceof StringValue !== right instanceof StringValue) {
      // A list of parts says here that it is no text.
      throw new Error(`a text and ${named(left instanceof StringValue ? right : left)} cannot be added`);
    }
    if (operator === "+" && left instanceof StringValue) return new StringValue(left.value + right.value);
    if (operator === "in" || operator === "not in")
      return new BooleanValue(contains(right, left) === (operator === "in"));
    if (operator === "%" && (left.value < 0 || right.value < 0)) throw new Error("a remainder of negative numbers");
    return super.evaluateBinaryExpression(
      { ...node, left: { type: "Known", value: left }, right: { type: "Known", value: right } },
      environment,
    );
  }

  evaluateMemberExpression(node, environment) {
    const object = this.evaluate(node.object, environment);
    if (object instanceof UndefinedValue) throw new Error("something that is not defined has no attributes");
    const known = { ...node, object: { type: "Known", value: object } };
    if (!(object instanceof StringValue)) return super.evaluateMemberExpression(known, environment);
    if (!node.computed && node.property.type === "Identifier") {
      const method = METHODS[node.property.value];
      if (method !== undefined) return new FunctionValue((values) => method(object.value, values));
      if (!["startswith", "endswith", "upper", "lower", "replace"].includes(node.property.value))
        return new UndefinedValue();
    } else if (node.computed && node.property.type !== "SliceExpression") {
      const place = this.evaluate(node.property, environment);
      if (place instanceof IntegerValue) {
        const character = Array.from(object.value).at(place.value);
        return character === undefined ? new UndefinedValue() : new StringValue(character);
      }
    }
    return super.evaluateMemberExpression(known, environment);
  }

  evaluateTestExpression(node, environment) {
    const name = node.test.value;
    if (name !== "iterable" && name !== "sequence" && name !== "number")
      return super.evaluateTestExpression(node, environment);
    const value = this.evaluate(node.operand, environment);
    const holds =
      name === "number"
        ? [IntegerValue, FloatValue, BooleanValue]
        : [StringValue, ArrayValue, ObjectValue, UndefinedValue];
    return new BooleanValue(holds.some((kind) => value instanceof kind) !== Boolean(node.negate));
  }

  applyFilter(given, node, environment) {
    const name = node.type === "Identifier" ? node.value : node.callee.value;
    let operand = given;
    if (given instanceof UndefinedValue && name !== "default") {
      // Something that is not defined is an empty list or text.
      operand = OF_LISTS.has(name) ? new ArrayValue([]) : new StringValue("");
      if (name === "tojson") throw new Error("something that is not defined is not JSON");
    }
    const filters =
      operand instanceof ArrayValue ? LIST_FILTERS : operand instanceof StringValue ? TEXT_FILTERS : OTHER_FILTERS;
    if (!filters.includes(name)) throw new Error(`the filter '${name}' of ${named(operand)} is not supported`);
    const [values] = node.type === "Identifier" ? [[]] : this.evaluateArguments(node.args, environment);
    const calls = node.type !== "Identifier" && node.args.length > 0;
    if (name === "length" || name === "count") {
      if (operand instanceof StringValue) return new IntegerValue(Array.from(operand.value).length);
      if (operand instanceof ObjectValue) return new IntegerValue(operand.value.size);
      return new IntegerValue(listed(operand).length);
    }
    if (operand instanceof StringValue && (name === "trim" || name === "capitalize")) {
      return METHODS[name === "trim" ? "strip" : name](operand.value, values);
    }
    if (operand instanceof StringValue && name === "int" && !/^[ ]*-?\d+[ ]*$/.test(operand.value))
      throw new Error("a text that is no whole number");
    if (name === "indent" && /[\r\v\f\x1c-\x1e\x85\u2028\u2029]/.test(operand.value))
      throw new Error("a text with uncommon ends of lines is indented");
    if (operand instanceof FloatValue && name === "int") return new IntegerValue(Math.trunc(operand.value));
    if (name === "string") return new StringValue(printed(operand));
    if (name === "join" && !listed(operand).every((item) => item instanceof StringValue)) {
      return new StringValue(
        listed(operand)
          .map(printed)
          .join(values[0]?.value ?? ""),
      );
    }
    if (name === "default" && !calls) return operand instanceof UndefinedValue ? new StringValue("") : operand;
    return super.applyFilter(operand, node, environment) ?? new UndefinedValue();
  }
}

/** Methods of texts, as Python has them. */
const METHODS = {
  strip: (text, values) => new StringValue(stripped(text, values, true, true)),
  lstrip: (text, values) => new StringValue(stripped(text, values, true, false)),
  rstrip: (text, values) => new StringValue(stripped(text, values, false, true)),
  capitalize: (text) => {
    const [first = "", ...rest] = text;
    return new StringValue(first.toUpperCase() + rest.join("").toLowerCase());
  },
  split: (text, [separator, most]) => {
    const limit = most === undefined ? -1 : most.value;
    if (typeof limit !== "number") throw new Error("split: expected a number");
    const pieces = [];
    if (separator === undefined || separator instanceof NullValue) {
      let rest = stripped(text, [], true, false);
      while (rest !== "" && (limit < 0 || pieces.length < limit)) {
        const space = SPACES.exec(rest);
        pieces.push(space === null ? rest : rest.slice(0, space.index));
        rest = space === null ? "" : rest.slice(space.index + space[0].length);
      }
      if (rest !== "") pieces.push(rest);
    } else {
      if (!(separator instanceof StringValue) || separator.value === "") throw new Error("split: expected a text");
      const all = text.split(separator.value);
      pieces.push(
        ...(limit < 0 || all.length <= limit + 1
          ? all
          : [...all.slice(0, limit), all.slice(limit).join(separator.value)]),
      );
    }
    return new ArrayValue(pieces.map((piece) => new StringValue(piece)));
  },
};

/** A text without some characters at its ends: white space, or those of the first value. */
function stripped(text, [characters], before, behind) {
  if (characters !== undefined && !(characters instanceof NullValue || characters instanceof StringValue))
    throw new Error("strip: expected a text");
  const goes =
    characters instanceof StringValue ? new Set(characters.value) : { has: (character) => SPACES.test(character) };
  const all = Array.from(text);
  let [start, end] = [0, all.length];
  while (before && start < end && goes.has(all[start])) start += 1;
  while (behind && start < end && goes.has(all[end - 1])) end -= 1;
  return all.slice(start, end).join("");
}

/** A value as Python prints it. */
function printed(value) {
  if (value instanceof StringValue) return value.value;
  if (value instanceof UndefinedValue) return "";
  if (value instanceof NullValue) return "None";
  if (value instanceof BooleanValue) return value.value ? "True" : "False";
  if (value instanceof IntegerValue) return String(value.value);
  if (
    value instanceof FloatValue &&
    value.value > -1e15 &&
    value.value < 1e15 &&
    (value.value === 0 || Math.abs(value.value) >= 1e-4)
  )
    return value.toString();
  // A list of parts says here that it is no text.
  value.toString();
  throw new Error(`${named(value)} is printed, which Python would write in its own way`);
}

function named(value) {
  // A list of parts says here that it is no text.
  if (value instanceof ArrayValue) value.toString();
  return (
    {
      StringValue: "a text",
      NullValue: "none",
      UndefinedValue: "something undefined",
      ArrayValue: "a list",
      ObjectValue: "an object",
    }[value.type] ?? "a number"
  );
}

/** The items of something that can be iterated over. */
function listed(value) {
  if (value instanceof UndefinedValue) return [];
  if (value instanceof ObjectValue) return value.keys().value;
  if (value instanceof StringValue) return Array.from(value.value, (character) => new StringValue(character));
  if (!(value instanceof ArrayValue)) throw new Error(`${named(value)} is no list`);
  return Array.from(value.value);
}

function bind(variable, item, environment) {
  if (variable.type === "Identifier") {
    environment.setVariable(variable.value, item);
    return;
  }
  const items = listed(item);
  if (items.length !== variable.value.length) throw new Error("too few or too many items to unpack");
  variable.value.forEach((each, i) => bind(each, items[i], environment));
}

/** Whether two values are equal in Python. */
function same(left, right) {
  const number = (value) =>
    value instanceof IntegerValue || value instanceof FloatValue || value instanceof BooleanValue;
  if (number(left) && number(right)) return Number(left.value) === Number(right.value);
  if (left.type !== right.type) return false;
  if (left instanceof NullValue || left instanceof UndefinedValue) return true;
  if (left instanceof StringValue) return left.value === right.value;
  if (left instanceof ArrayValue)
    return left.value.length === right.value.length && left.value.every((item, i) => same(item, right.value[i]));
  if (left instanceof ObjectValue) {
    return (
      left.value.size === right.value.size &&
      [...left.value].every(([key, item]) => right.value.has(key) && same(item, right.value.get(key)))
    );
  }
  return left === right;
}

/** Whether a text, list or object contains a value. */
function contains(whole, part) {
  if (whole instanceof StringValue && part instanceof StringValue) return whole.value.includes(part.value);
  // A list of parts says here that it is no text.
  if (whole instanceof ArrayValue)
    return part instanceof StringValue
      ? whole.value.find((item) => same(item, part)) !== undefined
      : whole.value.some((item) => same(item, part));
  if (whole instanceof ObjectValue && part instanceof StringValue) return whole.value.has(part.value);
  if (whole instanceof UndefinedValue) return false;
  throw new Error(`${named(whole)} cannot contain ${named(part)}`);
}

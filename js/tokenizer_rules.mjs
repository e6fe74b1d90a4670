/**
 * The tokenizers that `@huggingface/tokenizers` reads exactly as the library `tokenizers` does.
 *
 * The package reads more kinds, but not all of them in the same way: an artifact with one of those is refused.
 *
 * @module
 */

import { BonnxError } from "./errors.mjs";

// As in GPT-2. The package would match white space as JavaScript does, and other characters are white space there.
const WORDS = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
const SPACE = "\u2581";
// Atomic groups and possessive quantifiers, which JavaScript does not have.
const NO_BACKTRACKING = /\(\?>|[*+?]\+/;

/**
 * The description of a tokenizer in a form that the package reads exactly.
 *
 * @param {object} json the contents of tokenizer.json
 * @returns {object}
 * @throws {BonnxError} `tokenizer`: there is something that it reads otherwise, or not at all
 */
export function exactly(json) {
  const model = checkedModel(json.model);
  const normalizers = flat(json.normalizer, "normalizers");
  normalizers.forEach(checkNormalizer);
  const spaced = normalizers.some(
    (rule) => rule.type === "Replace" && rule.pattern.String === " " && rule.content === SPACE,
  );
  const splits = flat(json.pre_tokenizer, "pretokenizers").flatMap((rule) => checkedSplit(rule, spaced, json));
  flat(json.post_processor, "processors").forEach((rule) => checkPostProcessor(rule, json));
  flat(json.decoder, "decoders").forEach(checkDecoder);
  for (const token of json.added_tokens ?? []) {
    if (token.single_word) refuse(`the added token '${token.content}' is a word of its own only`);
  }
  return {
    ...json,
    model,
    added_tokens: json.added_tokens ?? [],
    pre_tokenizer: splits.length ? { type: "Sequence", pretokenizers: splits } : null,
  };
}

/** The rules of a part that may be a sequence of rules. */
export function flat(rule, members) {
  if (rule === null || rule === undefined) return [];
  return rule.type === "Sequence" ? rule[members].flatMap((each) => flat(each, members)) : [rule];
}

function refuse(what) {
  throw new BonnxError(
    "tokenizer",
    `tokenizer.json: ${what}, which this module does not read; pass token ids, or use bonnx in Python`,
  );
}

function checkedModel(model) {
  if (model?.type === "WordLevel") return model;
  if (model?.type !== "BPE") refuse(`a model of the type '${model?.type}'`);
  if (model.dropout) refuse("a model with dropout");
  if (model.continuing_subword_prefix || model.end_of_word_suffix) refuse("a model with prefixes or suffixes of words");
  return model;
}

function checkNormalizer(rule) {
  if (["NFC", "NFD", "NFKC", "NFKD", "Prepend"].includes(rule.type)) return;
  if (rule.type === "Replace" && typeof rule.pattern?.String === "string") return;
  refuse(`a normalizer of the type '${rule.type}'`);
}

function checkedSplit(rule, spaced, json) {
  const isolated = (pattern) => ({ type: "Split", pattern, behavior: "Isolated", invert: false });
  if (rule.type === "ByteLevel") {
    if (rule.add_prefix_space) refuse("words that get a space before them");
    const bytes = { ...rule, use_regex: false };
    return rule.use_regex === false ? [bytes] : [isolated({ Regex: WORDS }), bytes];
  }
  if (rule.type === "Digits") return [isolated({ Regex: rule.individual_digits ? "\\p{N}" : "\\p{N}+" })];
  if (rule.type === "Split") {
    // Spaces that were replaced before are nowhere to be split at.
    if (spaced && rule.pattern.String === " ") return [];
    if (rule.behavior !== "Isolated" || rule.invert) refuse(`text that is split in the way '${rule.behavior}'`);
    if (NO_BACKTRACKING.test(rule.pattern.Regex ?? ""))
      refuse("a pattern with atomic groups or possessive quantifiers");
    return [rule];
  }
  if (rule.type === "Metaspace") {
    const crossing = () => Object.keys(json.model.vocab).some((token) => token.lastIndexOf(SPACE) > 0);
    if (rule.replacement !== SPACE || (rule.split !== false && crossing())) refuse("words that are split at spaces");
    return [rule];
  }
  return refuse(`a pre-tokenizer of the type '${rule.type}'`);
}

function checkPostProcessor(rule, json) {
  if (rule.type === "ByteLevel") return;
  if (rule.type !== "TemplateProcessing") refuse(`a post-processor of the type '${rule.type}'`);
  for (const item of rule.single) {
    if (!("SpecialToken" in item)) continue;
    const { ids } = rule.special_tokens[item.SpecialToken.id];
    const own =
      (json.added_tokens ?? []).find((token) => token.content === item.SpecialToken.id)?.id ??
      json.model.vocab[item.SpecialToken.id];
    if (ids.length !== 1 || ids[0] !== own) refuse(`the special token '${item.SpecialToken.id}' with the ids ${ids}`);
  }
}

function checkDecoder(rule) {
  if (["ByteLevel", "ByteFallback", "Fuse", "Strip"].includes(rule.type)) return;
  if (rule.type === "Replace" && typeof rule.pattern?.String === "string") return;
  refuse(`a decoder of the type '${rule.type}'`);
}

// What single parts of the npm package answer: node parts.mjs QUESTIONS ANSWERS
//
// QUESTIONS holds answers to be found in texts, templates and conversations, or tokenizers and passages.
import { readFile, writeFile } from "node:fs/promises";

import { extractor } from "./js/answers.mjs";
import { ChatTemplate } from "./js/chat.mjs";
import { Tokenizer } from "./js/tokenizer.mjs";

const [questions, answers] = process.argv.slice(2);
const { cases, templates = [], tokens, tokenizers = [] } = JSON.parse(await readFile(questions, "utf8"));
const chats = templates.map((source) => new ChatTemplate(source, tokens));
const readers = await Promise.all(
  tokenizers.map(async ({ path, scoring, rules }) => new Tokenizer(await readFile(path), scoring, rules)),
);
const kinds = {
  answer: (name, text) => extractor(name)(text),
  render: (template, messages, prompted) => chats[template].render(messages, "messages", prompted),
  rows: (tokenizer, passages, special, partial) => readers[tokenizer].rows(passages, { special, partial }),
};

const found = cases.map(([kind, ...given]) => {
  try {
    return { result: kinds[kind](...given) };
  } catch (error) {
    return { code: error.code ?? error.stack };
  }
});
await writeFile(answers, JSON.stringify(found));

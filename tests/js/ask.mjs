// Asks the npm package what Python was asked: node ask.mjs QUESTIONS ANSWERS
//
// QUESTIONS is a JSON list of {artifact, calls: [{method, arguments, options}]}. A BigInt travels as {"bigint": "1"}, and a
// number that is not finite as a text. With the option `onToken` a call also tells what every state of the candidates was.
import { readFile, writeFile } from "node:fs/promises";

import { load } from "bonnx";
import * as ort from "onnxruntime-web";

const revive = (_, value) =>
  value !== null && typeof value === "object" && "bigint" in value ? BigInt(value.bigint) : value;
const plain = (_, value) => (typeof value === "number" && !Number.isFinite(value) ? String(value) : value);

async function answered(model, { method, arguments: given, options = {} }) {
  const states = [];
  const onToken = (state) => {
    states.push(structuredClone({ bestIndex: state.bestIndex, candidates: state.candidates }));
  };
  try {
    const result = await model[method](...given, options.onToken ? { ...options, onToken } : options);
    return { result: { ...result, best: result.best }, ...(options.onToken ? { states } : {}) };
  } catch (error) {
    return { error: error.message, code: error.code ?? error.stack };
  }
}

const [questions, answers] = process.argv.slice(2);
const results = [];
for (const { artifact, calls } of JSON.parse(await readFile(questions, "utf8"), revive)) {
  const model = await load(artifact, { runtime: ort, threads: 1 });
  const found = [];
  for (const call of calls) found.push(await answered(model, call));
  results.push(found);
  await model.close();
}
await writeFile(answers, JSON.stringify(results, plain));

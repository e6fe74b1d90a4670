// The types of the npm package fit the way in which it is used: checked by TypeScript, not run.
import { BonnxError, CODES, load, type Code, type FinishedGeneration, type Ranking } from "bonnx";

const model = await load("artifacts/countdown", {
  threads: 2,
  graphs: ["prefill", "decode"],
  onProgress: ({ file, loaded, total }) => `${file} ${loaded / total}`,
});
const ranking: Ranking<string> = await model.rank("1+1=", ["2", "3"], {
  aggregation: "step_min",
  vote: "majority",
  answers: "number",
});
const best: string = ranking.best;
const margin: number | null = ranking.margin;
await model.rank([{ role: "user", content: "1+1?" }], [["one step", "another"]], { answers: /(\d+)/ });
await model.rank([1, 2], [[3], [4, 5]], { answers: ["a", null] });
const result: FinishedGeneration = await model.generate("1+1=", {
  n: 4,
  seed: 2n ** 60n,
  stop: ["\n", 3],
  onToken: ({ best: leader, candidates }) => leader?.score ?? candidates[0]?.tokens.length,
  answers: (text: string) => text.at(-1),
});
const text: string | null = result.best.text;
const codes: readonly Code[] = CODES;
const error = new BonnxError("input", "no");
const code: Code = error.code;
// @ts-expect-error: no such option
await model.generate("1", { max_new_tokens: 3 });
// @ts-expect-error: no such aggregation
await model.rank("1", ["2"], { aggregation: "median" });
// @ts-expect-error: `load` makes it
new Model();
export { best, code, codes, margin, text };
await model.close();

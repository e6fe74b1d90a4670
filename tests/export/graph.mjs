// Runs a graph in onnxruntime-web: node graph.mjs ARTIFACT GRAPH CASES RESULTS
//
// A tensor in the two JSON files is {type, dims, data}. int64 travels as decimal strings, for a JavaScript number is
// exact only to 2^53; a float that is not finite as null.
import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import * as ort from "onnxruntime-web";

// Node itself would also print the line that threw, and the package is minified: it has 27,000 characters.
process.on("uncaughtException", (error) => {
  console.error(error.message);
  process.exit(1);
});

const [artifact, graph, casesFile, resultsFile] = process.argv.slice(2);

// What a web page has unless its server sends the headers for more.
ort.env.wasm.numThreads = 1;
const read = async (name) => new Uint8Array(await readFile(join(artifact, "onnx", name)));
const session = await ort.InferenceSession.create(await read(`${graph}.onnx`), {
  executionProviders: ["wasm"],
  externalData: [{ path: "weights.bin", data: await read("weights.bin") }],
});

const toTensor = ({ type, dims, data }) =>
  new ort.Tensor(type, type === "int64" ? BigInt64Array.from(data, BigInt) : Float32Array.from(data), dims);
const toPlain = ({ type, dims, data }) => ({ type, dims, data: Array.from(data, type === "int64" ? String : Number) });
const mapValues = (object, change) =>
  Object.fromEntries(Object.entries(object).map(([name, value]) => [name, change(value)]));

const results = [];
for (const feeds of JSON.parse(await readFile(casesFile, "utf8"))) {
  results.push(mapValues(await session.run(mapValues(feeds, toTensor)), toPlain));
}
await writeFile(resultsFile, JSON.stringify({ version: ort.env.versions.web, results }));

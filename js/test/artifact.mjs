// A small artifact on disk, and a runtime that computes nothing: what the tests that need no Python take.
import { createHash } from "node:crypto";
import { mkdir, mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";

const hash = (bytes) => createHash("sha256").update(bytes).digest("hex");

export const TOKENIZER = {
  version: "1.0",
  added_tokens: [
    { id: 12, content: "<end>", single_word: false, lstrip: false, rstrip: false, normalized: false, special: true },
  ],
  normalizer: null,
  pre_tokenizer: { type: "Split", pattern: { Regex: "[0-9]|[^0-9]" }, behavior: "Isolated", invert: false },
  post_processor: null,
  decoder: { type: "Fuse" },
  model: {
    type: "WordLevel",
    vocab: Object.fromEntries([..."0123456789+"].map((word, id) => [word, id]).concat([["<unk>", 11]])),
    unk_token: "<unk>",
  },
};

/** The bytes of a manifest as bonnx seals it. */
export function sealed(manifest) {
  const blank =
    JSON.stringify({ ...manifest, seal: "0".repeat(64) }, null, 2).replace(/"seal":\s*"/, '"seal": "') + "\n";
  return blank.replace("0".repeat(64), hash(blank));
}

/**
 * Write an artifact; it is deleted when the test ends.
 *
 * @param change gets the manifest before it is sealed, and the files by their names
 */
export async function artifact(t, change = () => {}) {
  const folder = await mkdtemp(join(tmpdir(), "bonnx-"));
  t.after(() => rm(folder, { recursive: true }));
  await mkdir(join(folder, "onnx"));
  const values = (names) => names.map((name) => ({ name, dtype: "int64", shape: [] }));
  const graph = (name, inputs, outputs) => ({
    file: `onnx/${name}.onnx`,
    opset: 23,
    inputs: values(inputs),
    outputs: values(outputs),
    per_prompt: [],
  });
  const manifest = {
    schema_version: 2,
    seal: "",
    name: "small",
    source: null,
    kind: "language_model",
    model: { vocab_size: 13, network: {} },
    precision: "fp32",
    scoring: { aggregation: "last", end_token: 12, pad_token: 12 },
    limits: { max_tokens: 20, max_candidates: 5 },
    graphs: { rank: graph("rank", [], []), generate: graph("generate", [], []) },
    tokenizer: "tokenizer.json",
    text: {},
    files: {},
    parity: [],
    tools: {},
  };
  const files = {
    "tokenizer.json": JSON.stringify(TOKENIZER),
    "onnx/rank.onnx": "the graph rank",
    "onnx/generate.onnx": "the graph generate",
    "onnx/weights.bin": "weights",
  };
  change(manifest, files);
  for (const [name, content] of Object.entries(files)) {
    await writeFile(join(folder, name), content);
    manifest.files[name] ??= { sha256: hash(content), size: Buffer.byteLength(content) };
  }
  await writeFile(join(folder, "manifest.json"), sealed(manifest));
  return folder;
}

/**
 * A runtime whose graph `rank` scores each candidate by the sum of its tokens.
 *
 * `opened` lists what sessions were opened with, `released` counts those that were released.
 */
export function runtime() {
  class Tensor {
    constructor(type, data, dims) {
      Object.assign(this, { type, data, dims });
    }
  }
  const ort = { Tensor, opened: [], released: 0, env: { versions: {} } };
  ort.InferenceSession = {
    async create(bytes, options) {
      ort.opened.push({ graph: new TextDecoder().decode(bytes), options });
      return {
        async run(feeds) {
          ort.feeds = feeds;
          const [count, , length] = feeds.candidate_ids.dims;
          const rows = Array.from({ length: count }, (_, i) =>
            Array.from(feeds.candidate_ids.data.slice(i * length, (i + 1) * length), Number),
          );
          const scores = rows.map((row, i) =>
            row.reduce((sum, id, t) => sum + id * Number(feeds.candidate_mask.data[i * length + t]), 0),
          );
          return {
            scores: new Tensor("float32", Float32Array.from(rows.flat()), [count, 1, length]),
            candidate_scores: new Tensor("float32", Float32Array.from(scores), [count, 1]),
            group_scores: new Tensor("float32", Float32Array.from(scores), [count, 1]),
            best_index: new Tensor("int64", BigInt64Array.of(BigInt(scores.indexOf(Math.max(...scores)))), [1]),
          };
        },
        async release() {
          ort.released += 1;
        },
      };
    },
  };
  return ort;
}

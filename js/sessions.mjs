/**
 * ONNX Runtime: which package runs the graphs, the sessions of the graphs, and one run at a time.
 *
 * @module
 */

import { BonnxError } from "./errors.mjs";
import { startWebAssembly } from "./start.mjs";

// Variables, so that a bundler for browsers does not look for them.
const NODE_PACKAGE = "onnxruntime-node";
const FILE_SYSTEM = "node:fs/promises";
// How runtimes say that they have no memory left.
const NO_MEMORY =
  /bad_alloc|out of memory|OOM|allocation failed|failed to allocate|array buffer allocation|memory access out of bounds/i;
// The smallest WebAssembly module with a vector instruction.
const VECTORS = [
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11,
];

/**
 * The runtime: the caller's, or that of the packages that is installed.
 *
 * @param {object} [runtime] a module of onnxruntime-web or onnxruntime-node
 */
export async function findRuntime(runtime) {
  const found = runtime ?? (await installed());
  const ort = found.InferenceSession === undefined && found.default !== undefined ? found.default : found;
  if (typeof ort.InferenceSession?.create !== "function" || typeof ort.Tensor !== "function") {
    throw new BonnxError(
      "runtime",
      "runtime: expected the module of onnxruntime-web or onnxruntime-node, as `import * as ort` gives it",
    );
  }
  if (isWeb(ort) && !(globalThis.WebAssembly && WebAssembly.validate(Uint8Array.from(VECTORS)))) {
    throw new BonnxError(
      "runtime",
      "onnxruntime-web needs WebAssembly with SIMD, which this browser does not have; use a newer one",
    );
  }
  return ort;
}

async function installed() {
  const inNode = typeof process !== "undefined" && Boolean(process.versions?.node);
  const loaders = [() => import("onnxruntime-web")];
  if (inNode) loaders.unshift(() => import(/* webpackIgnore: true */ /* @vite-ignore */ NODE_PACKAGE));
  const reasons = [];
  for (const load of loaders) {
    try {
      return await load();
    } catch (error) {
      reasons.push(error);
    }
  }
  throw new BonnxError(
    "runtime",
    `ONNX Runtime is missing: run \`npm install ${inNode ? NODE_PACKAGE : "onnxruntime-web"}\`, or pass its module as the option 'runtime' ` +
      `(${reasons.map((error) => error.message).join("; ")})`,
    { cause: reasons.at(-1) },
  );
}

function isWeb(ort) {
  return ort.env?.versions?.web !== undefined;
}

/**
 * The sessions of an artifact's graphs: each is opened on first use, and the weights are read once for all.
 */
export class Sessions {
  #opened = new Map();
  #weights = new Map();
  #last = Promise.resolve();

  /**
   * @param {import("./artifact.mjs").Files} files
   * @param {object} manifest
   * @param {object} ort
   * @param {{executionProviders?: unknown[], threads?: number}} options
   */
  constructor(files, manifest, ort, { executionProviders, threads }) {
    this.files = files;
    this.manifest = manifest;
    this.ort = ort;
    this.executionProviders = executionProviders ?? [isWeb(ort) ? "wasm" : "cpu"];
    this.options = { executionProviders: this.executionProviders };
    // While the files of the artifact are still on their way.
    if (isWeb(ort)) this.#last = startWebAssembly(ort, threads);
    else if (threads !== undefined) this.options.intraOpNumThreads = threads;
  }

  /** Whether the artifact has a graph. */
  has(name) {
    return Object.hasOwn(this.manifest.graphs, name);
  }

  /**
   * Open the session of a graph; one that is open already is returned.
   *
   * @param {string} name
   * @param {AbortSignal} [signal] of the files that are read
   */
  async open(name, signal) {
    if (!this.has(name)) {
      const names = Object.keys(this.manifest.graphs).sort().join(", ");
      throw new BonnxError(
        "input",
        `'${this.manifest.name}' has no graph '${name}', only ${names}; export the model again without --single-file, or with a bonnx that writes it`,
      );
    }
    if (!this.#opened.has(name)) this.#opened.set(name, kept(this.#opened, name, this.#open(name, signal)));
    return this.#opened.get(name);
  }

  async #open(name, signal) {
    const { file } = this.manifest.graphs[name];
    const options = { ...this.options };
    const [graph, weights] = await Promise.all([
      this.files.verified(this.manifest, file, signal),
      this.#readWeights(file.replace(/[^/]*$/, "weights.bin"), signal),
    ]);
    if (weights !== null) options.externalData = [{ path: "weights.bin", data: weights }];
    if (["int8", "int4"].includes(this.manifest.precision) && !isWeb(this.ort) && (await mayOverflow())) {
      // Prevents overflow of 8-bit products; on processors with VNNI it would halve their speed.
      options.extra = { session: { x64quantprecision: "1" } };
    }
    try {
      // One at a time: WebAssembly's runtime does not open sessions side by side.
      return await this.#inTurn(() => this.ort.InferenceSession.create(graph, options));
    } catch (error) {
      throw explained(error, `the graph '${name}' could not be opened`);
    }
  }

  /** The weights of all graphs; null of an artifact that has them in its one graph. */
  async #readWeights(file, signal) {
    if (!Object.hasOwn(this.manifest.files, file)) return null;
    if (!this.#weights.has(file)) {
      this.#weights.set(file, kept(this.#weights, file, this.files.verified(this.manifest, file, signal)));
    }
    return this.#weights.get(file);
  }

  /**
   * Run a graph.
   *
   * @param {string} name
   * @param {Record<string, object>} feeds tensors
   * @param {string[]} outputs
   * @param {AbortSignal} [signal]
   * @returns {Promise<Record<string, object>>}
   */
  async run(name, feeds, outputs, signal) {
    const session = await this.open(name, signal);
    signal?.throwIfAborted();
    try {
      return await this.#inTurn(() => session.run(feeds, outputs));
    } catch (error) {
      throw explained(error, `the graph '${name}' could not be run`);
    }
  }

  #inTurn(task) {
    const done = this.#last.then(task);
    this.#last = done.catch(() => {});
    return done;
  }

  /** A tensor of whole numbers. */
  int64(values, dims = []) {
    return new this.ort.Tensor("int64", BigInt64Array.from([values].flat(Infinity), BigInt), dims);
  }

  /** A tensor of numbers. */
  float32(values, dims = []) {
    return new this.ort.Tensor(
      "float32",
      values instanceof Float32Array ? values : Float32Array.from([values].flat(Infinity)),
      dims,
    );
  }

  /** Release the sessions and the weights. A graph is opened again when it is next used. */
  async close() {
    const sessions = [...this.#opened.values()];
    this.#opened.clear();
    this.#weights.clear();
    await this.#last;
    for (const opening of sessions) {
      const session = await opening.catch(() => null);
      await session?.release();
    }
  }
}

/** Whether 8-bit products may overflow: on x64, unless the processor is known to add them in 32 bits. Only Linux says so. */
async function mayOverflow() {
  if (globalThis.process?.arch !== "x64") return false;
  const { readFile } = await import(FILE_SYSTEM);
  return !(await readFile("/proc/cpuinfo", "utf8").catch(() => "")).includes("vnni");
}

/** A promise that is forgotten if it fails, so that the next use tries again. */
function kept(map, name, promise) {
  promise.catch(() => {
    if (map.get(name) === promise) map.delete(name);
  });
  return promise;
}

function explained(error, what) {
  if (error instanceof BonnxError) return error;
  const message = error?.message ?? String(error);
  if (error instanceof RangeError || NO_MEMORY.test(message)) {
    return new BonnxError(
      "memory",
      `${what}: there is too little memory (${message.slice(0, 200)}); close other pages, ask for less, or export with fewer bits`,
      { cause: error },
    );
  }
  return new BonnxError("runtime", `${what}: ${message.slice(0, 500)}`, { cause: error });
}

// In milliseconds; a small model makes several tokens in this time, and each pause takes a tenth of a token's.
const BREATH = 8;

/**
 * A function to call after every token. Now and then it lets the page do what waits: show what is new, and notice that its user
 * pressed a button.
 */
export function makeBreathe() {
  let last = performance.now();
  return async () => {
    if (performance.now() - last < BREATH) return;
    await turn();
    last = performance.now();
  };
}

function turn() {
  // Not `scheduler.yield`: what it continues comes before timers.
  if (globalThis.setImmediate) return new Promise((resolve) => setImmediate(resolve));
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}

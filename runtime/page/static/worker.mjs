/**
 * Runs the model away from the page, which stays responsive. Messages in: `load`, `generate`, `stop`; out: `progress`,
 * `ready`, `state`, `done`, `error`.
 *
 * @module
 */

import { startWebAssembly } from "./bonnx/start.mjs";

// WebAssembly starts while the module and the model are still on their way.
const [importing, module] = [import("./runtime/ort.wasm.bundle.min.mjs"), import("./bonnx/bonnx.mjs")];
const settings = fetch("page.json").then((response) => response.json());
// What is wrong is said when the model is opened.
Promise.all([importing, settings])
  .then(([runtime, { threads }]) => startWebAssembly(runtime, usable(threads)))
  .catch(() => {});
module.catch(() => {});
const CACHE = "bonnx-model";
let model = null;
// Whether candidates can be watched while they grow.
let grows = true;
let controller = null;

self.onmessage = async ({ data: { kind, ...rest } }) => {
  try {
    if (kind === "load") await open(rest);
    if (kind === "generate") await generate(rest);
    if (kind === "stop") controller?.abort();
  } catch (error) {
    const code = error?.name === "AbortError" ? "stopped" : (error?.code ?? "unexpected");
    self.postMessage({ kind: "error", code, message: String(error?.message ?? error) });
  }
};

/** As many threads as the model gains from, where the page may have threads. */
function usable(threads) {
  return self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency || 1, threads) : 1;
}

async function open({ seal, graphs, threads, trial }) {
  grows = graphs.includes("decode");
  const plain = self.fetch.bind(self);
  self.fetch = (input, options) => cached(plain, input, options);
  const { load } = await module;
  const options = { threads: usable(threads), graphs };
  const address = new URL(`model/?v=${seal}`, self.location.href);
  model = await load(address, {
    ...options,
    runtime: await importing,
    onProgress: ({ loaded, total }) => self.postMessage({ kind: "progress", loaded, total }),
  });
  forgetOthers(seal);
  const unused = trial === null ? null : await tryWebGpu(load, address, options, trial);
  self.postMessage({ kind: "ready", runsOn: trial !== null && unused === null ? "WebGPU" : "WebAssembly", unused });
}

/**
 * Let the graphics processor run the model, if it chooses the same winner as WebAssembly, in less time.
 *
 * @param {Function} load of the module
 * @param {URL} address of the model
 * @param {object} options of `load`
 * @param {{prompt: unknown, options: object, always: boolean}} trial what both are asked; `always`: also if it takes longer
 * @returns {Promise<string | null>} why it is not used
 */
async function tryWebGpu(load, address, options, trial) {
  if (!(await self.navigator.gpu?.requestAdapter())) return "this browser offers none";
  self.postMessage({ kind: "trying" });
  let other = null;
  const ask = async (asked) => {
    const start = performance.now();
    const { best } = await asked.generate(trial.prompt, { ...trial.options, onToken: grows ? () => {} : null });
    return { tokens: String(best.tokens), time: performance.now() - start };
  };
  try {
    const runtime = await import("./runtime/ort.webgpu.bundle.min.mjs");
    other = await load(address, { ...options, runtime, executionProviders: ["webgpu", "wasm"] });
    // The first run of each compiles.
    const [first] = [await ask(other), await ask(model)];
    const [there, here] = [await ask(other), await ask(model)];
    if (first.tokens !== here.tokens || there.tokens !== here.tokens) throw new Error("it chose another answer");
    if (there.time > here.time && !trial.always) {
      throw new Error(`it took ${there.time.toFixed(0)} ms where WebAssembly took ${here.time.toFixed(0)}`);
    }
    await model.close();
    model = other;
    return null;
  } catch (error) {
    await other?.close();
    return String(error?.message ?? error);
  }
}

/** The files of this model from the browser's cache, once they have been fetched. */
async function cached(plain, input, options) {
  const address = new URL(input instanceof Request ? input.url : input);
  if (!address.searchParams.has("v") || self.caches === undefined) return plain(input, options);
  const store = await self.caches.open(CACHE);
  const found = await store.match(address);
  if (found) return found;
  const response = await plain(input, options);
  if (response.ok) store.put(address, response.clone()).catch(() => {});
  return response;
}

/** Drop other versions of the model from the cache. */
async function forgetOthers(seal) {
  if (self.caches === undefined) return;
  const store = await self.caches.open(CACHE);
  for (const request of await store.keys()) {
    if (new URL(request.url).searchParams.get("v") !== seal) await store.delete(request);
  }
}

async function generate({ prompt, options, byText }) {
  controller = new AbortController();
  const shown = Array.from({ length: options.n }, () => ({ count: 0, text: "" }));
  const start = performance.now();
  let first = null;
  const send = (state, kind) => {
    const rows = state.candidates.map((candidate, i) => {
      const before = shown[i];
      const added = candidate.tokens.length > before.count;
      // A token may complete a character, or be none of the text.
      const keeps = candidate.text.startsWith(before.text);
      const piece = keeps ? candidate.text.slice(before.text.length) : candidate.text;
      Object.assign(before, { count: candidate.tokens.length, text: candidate.text });
      return { piece, again: !keeps, added, score: candidate.scores.at(-1), total: candidate.score, reason: candidate.finishReason };
    });
    const seconds = (performance.now() - start) / 1000;
    first ??= seconds;
    self.postMessage({ kind, rows, tokens: state.computedTokens, seconds, best: state.bestIndex });
  };
  const answers = options.vote === "score" ? null : byText ? (text) => text || null : "number";
  const onToken = grows ? (state) => send(state, "state") : null;
  const result = await model.generate(prompt, { ...options, answers, onToken, signal: controller.signal });
  send(result, "done");
}

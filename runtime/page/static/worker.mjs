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
// Milliseconds between two messages about growing candidates: the page draws no faster.
const FRAME = 100;
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

/**
 * As many threads as the model gains from, where the page may have threads. Half of the processor's: two often share a core, and
 * beside other programs WebAssembly with all of them has been half as fast as with one.
 */
function usable(threads) {
  return self.crossOriginIsolated ? Math.min(Math.ceil((navigator.hardwareConcurrency || 1) / 2), threads) : 1;
}

async function open({ seal, graphs, threads, trial }) {
  grows = graphs.includes("decode");
  const plain = self.fetch.bind(self);
  self.fetch = (input, options) => cached(plain, input, options);
  const { load } = await module;
  const options = { threads: usable(threads), graphs };
  const address = new URL(`model/?v=${seal}`, self.location.href);
  try {
    model = await load(address, {
      ...options,
      runtime: await importing,
      onProgress: ({ loaded, total }) => self.postMessage({ kind: "progress", loaded, total }),
    });
  } catch (error) {
    // Or the next visit would find the same damaged file.
    if (error?.code === "damaged") await self.caches?.delete(CACHE);
    throw error;
  }
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
  const store = address.searchParams.has("v") ? await openCache() : null;
  const found = await store?.match(address);
  if (found) return found;
  const response = await plain(input, options);
  if (response.ok) store?.put(address, response.clone()).catch(() => {});
  return response;
}

/** Null where the browser has none, or refuses it. */
async function openCache() {
  return self.caches?.open(CACHE).catch(() => null) ?? null;
}

/** Drop other versions of the model from the cache. */
async function forgetOthers(seal) {
  const store = await openCache();
  for (const request of (await store?.keys()) ?? []) {
    if (new URL(request.url).searchParams.get("v") !== seal) await store.delete(request);
  }
}

async function generate({ prompt, options, byText }) {
  controller = new AbortController();
  const texts = Array(options.n).fill("");
  // For each candidate what has come since the last message.
  let news = texts.map(() => ({ again: false, pieces: [] }));
  const start = performance.now();
  let sent = start;
  const add = ({ candidates }) => {
    candidates.forEach(({ text, scores }, i) => {
      // A token may complete a character, or be none of the text.
      const keeps = text.startsWith(texts[i]);
      if (!keeps) news[i] = { again: true, pieces: [] };
      const piece = keeps ? text.slice(texts[i].length) : text;
      if (piece) news[i].pieces.push([piece, scores.at(-1)]);
      texts[i] = text;
    });
  };
  const send = (kind, { candidates, computedTokens, bestIndex }) => {
    const rows = candidates.map(({ score, finishReason }, i) => ({ ...news[i], total: score, reason: finishReason }));
    const seconds = (performance.now() - start) / 1000;
    self.postMessage({ kind, rows, tokens: computedTokens, seconds, best: bestIndex });
    news = texts.map(() => ({ again: false, pieces: [] }));
    sent = performance.now();
  };
  const onToken = (state) => {
    add(state);
    if (performance.now() - sent > FRAME) send("state", state);
  };
  const answers = options.vote === "score" ? null : byText ? (text) => text || null : "number";
  const result = await model.generate(prompt, { ...options, answers, onToken: grows ? onToken : null, signal: controller.signal });
  // In one run a candidate comes whole, in the colour of its own score.
  if (!grows) add({ candidates: result.candidates.map((each) => ({ ...each, scores: [each.score] })) });
  send("done", result);
}

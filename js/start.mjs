/**
 * Let WebAssembly start before there is a graph: that takes as long as loading a small model.
 *
 * @module
 */

// A graph of one operator, Not.
const SMALLEST = [
  8, 10, 58, 42, 10, 11, 10, 1, 120, 18, 1, 121, 34, 3, 78, 111, 116, 18, 1, 103, 90, 11, 10, 1, 120, 18, 6, 10, 4, 8,
  9, 18, 0, 98, 11, 10, 1, 121, 18, 6, 10, 4, 8, 9, 18, 0, 66, 4, 10, 0, 16, 23,
];
const started = new WeakMap();

/**
 * Start the runtime of `onnxruntime-web`, once; what is wrong with it is reported when the first graph is opened.
 *
 * @param {object} ort
 * @param {number} [threads] of the whole page; they count from the first start on
 * @returns {Promise<void>} until then no other session may be created
 */
export function startWebAssembly(ort, threads) {
  if (!started.has(ort)) {
    if (threads !== undefined) ort.env.wasm.numThreads = threads;
    const created = ort.InferenceSession.create(Uint8Array.from(SMALLEST), { executionProviders: ["wasm"] });
    started.set(
      ort,
      created.then((session) => session.release()).catch(() => {}),
    );
  }
  return started.get(ort);
}

/**
 * Visits a page with Chromium: `node page.mjs CHROMIUM URL REPEATS RUNS THREADS...`. Prints as JSON, for each repeat in a fresh browser, the
 * milliseconds until the first paint and until the model is ready, at the first and the second visit, then of each
 * generation the tokens and the seconds from the click to the choice, and then for each number of threads the same without the
 * page: of the graph `generate`, and of `products.onnx`, of which `page.py` knows what it computes.
 */

import puppeteer from "puppeteer-core";

const [chromium, url, repeats, runs, ...threads] = process.argv.slice(2);

const isReady = () =>
  document.getElementById("status").textContent === "Ready." || !document.getElementById("problem").hidden;

async function visit(page) {
  await page.goto(url, { waitUntil: "domcontentloaded" });
  await page.waitForFunction(isReady);
  return page.evaluate(() => ({
    paint: performance.getEntriesByName("first-contentful-paint")[0]?.startTime ?? null,
    ready: performance.getEntriesByName("ready")[0].startTime,
  }));
}

/** Generate with the page's own button, as a visitor does. */
function generate(page, seed) {
  return page.evaluate(async (given) => {
    performance.clearMarks("done");
    document.getElementById("seed").value = given;
    const start = performance.now();
    document.getElementById("run").click();
    while (!performance.getEntriesByName("done").length) await new Promise((resolve) => setTimeout(resolve, 5));
    const seconds = (performance.getEntriesByName("done")[0].startTime - start) / 1000;
    return [Number(/([0-9]+) tokens/.exec(document.getElementById("status").textContent)[1]), seconds];
  }, seed);
}

/** What WebAssembly does without a page that draws, without messages, and without copies of keys and values. */
async function bare(page, threads) {
  // A document without the page's own worker, but with its headers; a new one for each number of threads.
  await page.goto(new URL(`page.json?threads=${threads}`, url).href);
  return page.evaluate(async (threads, count) => {
    const settings = await (await fetch("page.json")).json();
    const runtime = await import("./runtime/ort.wasm.bundle.min.mjs");
    const { load } = await import("./bonnx/bonnx.mjs");
    const model = await load("model", { runtime, threads, graphs: ["generate"] });
    const [example] = settings.examples;
    const prompt = settings.chat ? [{ role: "user", content: example }] : example;
    const options = { n: settings.candidates, temperature: settings.temperature };
    if (settings.kind !== "countdown") options.maxNewTokens = settings.longest;
    const seconds = async (task) => {
      const start = performance.now();
      const done = await task();
      return [done, (performance.now() - start) / 1000];
    };
    const runs = [];
    for (let seed = 0; seed < count; seed += 1) {
      const [{ computedTokens }, time] = await seconds(() => model.generate(prompt, { ...options, seed }));
      runs.push([computedTokens, time]);
    }
    await model.close();
    const session = await runtime.InferenceSession.create("products.onnx");
    const feeds = {};
    for (const { name, type, shape } of session.inputMetadata) {
      const array = type === "uint8" ? Uint8Array : Float32Array;
      feeds[name] = new runtime.Tensor(type, new array(shape[0] * shape[1]).fill(1), shape);
    }
    const products = [];
    for (let run = 0; run < count; run += 1) {
      products.push((await seconds(() => session.run(feeds)))[1]);
    }
    return { runs, products };
  }, threads, Number(runs));
}

const found = [];
for (let repeat = 0; repeat < Number(repeats); repeat += 1) {
  const browser = await puppeteer.launch({ executablePath: chromium, args: ["--no-sandbox"] });
  try {
    const page = await browser.newPage();
    page.setDefaultTimeout(600000);
    const [first, second] = [await visit(page), await visit(page)];
    const rates = [];
    for (let seed = 0; seed < Number(runs); seed += 1) rates.push(await generate(page, seed));
    const alone = {};
    for (const number of threads) alone[number] = await bare(page, Number(number));
    found.push({ first, second, runs: rates, bare: alone });
  } finally {
    await browser.close();
  }
}
console.log(JSON.stringify(found));

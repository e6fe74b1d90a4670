/**
 * Visits a page with Chromium: `node page.mjs CHROMIUM URL REPEATS RUNS`. Prints as JSON, for each repeat in a fresh browser, the
 * milliseconds until the first paint and until the model is ready, at the first and the second visit, and then of each
 * generation the tokens and the seconds from the click to the choice.
 */

import puppeteer from "puppeteer-core";

const [chromium, url, repeats, runs] = process.argv.slice(2);

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

const found = [];
for (let repeat = 0; repeat < Number(repeats); repeat += 1) {
  const browser = await puppeteer.launch({ executablePath: chromium, args: ["--no-sandbox"] });
  try {
    const page = await browser.newPage();
    page.setDefaultTimeout(600000);
    const [first, second] = [await visit(page), await visit(page)];
    const rates = [];
    for (let seed = 0; seed < Number(runs); seed += 1) rates.push(await generate(page, seed));
    found.push({ first, second, runs: rates });
  } finally {
    await browser.close();
  }
}
console.log(JSON.stringify(found));

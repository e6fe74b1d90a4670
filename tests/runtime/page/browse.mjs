/**
 * Drive a page in Chromium: `node browse.mjs CHROMIUM URL STEPS.json RESULTS.json SWITCH...`. It runs the steps and writes what each
 * saw, and every request that left the page's own host.
 */

import { readFile, writeFile } from "node:fs/promises";
import puppeteer from "puppeteer-core";

const [chromium, url, stepsFile, resultsFile, ...switches] = process.argv.slice(2);
const steps = JSON.parse(await readFile(stepsFile, "utf8"));
const browser = await puppeteer.launch({ executablePath: chromium, args: ["--no-sandbox", ...switches] });
const results = { outside: [], errors: [], steps: [] };

const ended = () => performance.getEntriesByName("done").length > 0 || !document.getElementById("problem").hidden;
// Or, where a page is to be loaded once more, when it has been.
const ready = (isolated) =>
  (crossOriginIsolated || !isolated) &&
  (document.getElementById("status").textContent === "Ready." || !document.getElementById("problem").hidden);

const seen = (page) =>
  page.evaluate(() => ({
    title: document.title,
    about: document.getElementById("about").textContent,
    facts: document.getElementById("facts").textContent,
    status: document.getElementById("status").textContent,
    problem: document.getElementById("problem").hidden ? null : document.getElementById("problem").textContent,
    isolated: crossOriginIsolated,
    usable: !document.getElementById("run").disabled,
    wide: document.documentElement.scrollWidth > innerWidth,
    cards: [...document.querySelectorAll(".candidate")].map((card) => ({
      text: card.querySelector(".text").textContent,
      score: card.querySelector(".score").textContent,
      note: card.querySelector(".note").textContent,
      winner: card.classList.contains("winner"),
      dropped: card.classList.contains("dropped"),
      colours: [...card.querySelectorAll(".token")].map((token) => getComputedStyle(token).backgroundColor),
    })),
  }));

async function fillIn(page, values) {
  for (const [id, value] of Object.entries(values)) {
    await page.$eval(
      `#${id}`,
      (element, given) => {
        element.value = given;
        element.dispatchEvent(new Event("input", { bubbles: true }));
      },
      value,
    );
  }
}

try {
  const page = await browser.newPage();
  page.setDefaultTimeout(240000);
  page.on("pageerror", (error) => results.errors.push(error.message));
  page.on("request", (request) => {
    if (new URL(request.url()).host !== new URL(url).host && !request.url().startsWith("data:")) results.outside.push(request.url());
  });
  for (const { width = 1000, height = 800, dark = false, path = "", fill = {}, key = null, then = null, module = null, axe = false, isolated = false } of steps) {
    await page.setViewport({ width, height });
    await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: dark ? "dark" : "light" }]);
    await page.goto(url + path, { waitUntil: "domcontentloaded" });
    await page.waitForFunction(ready, {}, isolated);
    await fillIn(page, fill);
    const result = { before: await seen(page) };
    if (result.before.problem === null && module === null) {
      if (key === null) await page.click("#run");
      else {
        await page.focus("#prompt");
        await page.keyboard.press(key);
      }
      await page.waitForFunction(ended);
      result.after = await seen(page);
      if (then !== null) {
        await fillIn(page, then);
        await page.click("#run");
        await page.waitForFunction(ended);
        result.then = await seen(page);
      }
    }
    if (module !== null) {
      // The same module by itself, for many prompts.
      result.found = await page.evaluate(async (asked) => {
        const { load } = await import("./bonnx/bonnx.mjs");
        const runtime = await import("./runtime/ort.wasm.bundle.min.mjs");
        const model = await load("model", { runtime, graphs: ["prefill", "decode"] });
        const found = [];
        for (const [prompt, options] of asked) {
          const { bestIndex, candidates } = await model.generate(prompt, { ...options, onToken: () => {} });
          found.push({ bestIndex, tokens: candidates.map((each) => each.tokens), scores: candidates.map((each) => each.score) });
        }
        await model.close();
        return found;
      }, module);
    }
    if (axe) {
      await page.evaluate(await readFile("node_modules/axe-core/axe.min.js", "utf8"));
      result.violations = await page.evaluate(async () =>
        (await globalThis.axe.run()).violations.map(({ id, nodes }) => [id, nodes.map((node) => node.html)]),
      );
    }
    results.steps.push(result);
  }
} finally {
  await browser.close();
}
await writeFile(resultsFile, JSON.stringify(results));

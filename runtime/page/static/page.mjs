/**
 * The page: its form, the candidates while they grow, and the choice. `worker.mjs` runs the model.
 *
 * @module
 */

import { drawPuzzle, isPuzzle, mistake } from "./countdown.mjs";

const $ = (id) => document.getElementById(id);
const worker = new Worker("worker.mjs", { type: "module" });
let config = null;
let ready = false;
let cards = [];
let prompt = "";
let [low, high] = [Infinity, -Infinity];

const MEGABYTE = 1e6;
const MESSAGES = {
  missing: "A file of the model could not be loaded.",
  damaged: "A file of the model is not as it was written. Reload the page; if that does not help, it must be copied to the server again.",
  schema: "The model was made by another version of bonnx than this page.",
  runtime: "This browser cannot run the model.",
  memory: "There is too little memory for the model. Close other pages, or ask for fewer candidates.",
  tokenizer: "The model's vocabulary cannot be read, or has no token for this text.",
  "too-large": "That is more than the model can take. Shorten the prompt, or ask for fewer or shorter candidates.",
};

function fail(code, message) {
  $("status").textContent = "";
  $("problem").hidden = false;
  $("problem").textContent = MESSAGES[code] ? `${MESSAGES[code]} (${message})` : message;
  $("loading").hidden = true;
}

async function start() {
  if (location.protocol === "file:") {
    fail("", "Open this page through a web server: browsers do not let a file read its model. `bonnx page --serve` starts one.");
    return;
  }
  try {
    const response = await fetch("page.json");
    if (!response.ok) throw new Error(`HTTP status ${response.status}`);
    config = await response.json();
  } catch (error) {
    fail("missing", `page.json: ${error.message}`);
    return;
  }
  dress();
  const { seal, graphs, threads, webgpu } = config;
  worker.postMessage({ kind: "load", seal, graphs, threads, trial: webgpu ? trial() : null });
}

/** What WebAssembly and WebGPU are both asked before one of them is chosen. */
function trial() {
  const example = config.examples[0];
  const asked = config.chat ? [{ role: "user", content: example }] : example;
  const always = new URLSearchParams(location.search).get("webgpu") === "always";
  return { prompt: asked, options: { n: config.candidates, maxNewTokens: 12, seed: 0 }, always };
}

/** What depends on the model. */
function dress() {
  document.title = `Best of N: ${config.name}`;
  document.body.dataset.kind = config.kind;
  facts("WebAssembly");
  const countdown = config.kind === "countdown";
  if (countdown) {
    $("about").textContent =
      "The puzzle: combine all the numbers with + - * / to reach the target. A model of 3.2 million parameters writes several " +
      "answers here, in your browser, and a second head scores every token. The answer with the best score is chosen. " +
      "Nothing is sent anywhere.";
    $("prompt-label").textContent = "Puzzle";
    $("hint").textContent = "Numbers, then > and the target, then a colon, such as 3,7,20,24>1:";
    $("longest-label").hidden = true;
  } else if (!config.scorer) {
    $("about").textContent =
      "A language model writes several answers here, in your browser. The one of which it is most certain is chosen. " +
      "Nothing is sent anywhere.";
  }
  if (config.chat) {
    $("prompt-label").textContent = "Message";
    $("hint").textContent = "What the assistant should answer. Ctrl+Enter generates.";
  } else if (!countdown) {
    $("hint").textContent = "The text to continue. Ctrl+Enter generates.";
  }
  $("prompt").value = config.examples[0] ?? "";
  $("longest").value = config.longest;
  $("n").value = config.candidates;
  $("temperature").value = config.temperature;
  show();
  for (const example of config.examples) $("examples").append(button(example, () => example));
  if (countdown) $("examples").append(button("Another puzzle", () => drawPuzzle()));
  if (config.curve) draw(config.curve);
}

/** Say what the page waits for; how much of it is done is not always known. */
function wait(what, done = null) {
  $("progress-text").textContent = what;
  if (done === null) $("progress").removeAttribute("value");
  else $("progress").value = done;
}

function facts(runsOn, unused = null) {
  const why = unused === null ? "" : ` WebGPU is not used: ${unused}.`;
  $("facts").textContent = `${config.name}, ${(config.bytes / MEGABYTE).toFixed(0)} MB, runs in ${runsOn}.${why}`;
}

function button(text, value) {
  const made = Object.assign(document.createElement("button"), { type: "button", textContent: text });
  made.addEventListener("click", () => {
    $("prompt").value = value();
  });
  return made;
}

function show() {
  $("n-value").textContent = $("count").textContent = $("n").value;
  $("temperature-value").textContent = Number($("temperature").value).toFixed(1);
}

worker.onmessage = ({ data }) => {
  if (data.kind === "progress") {
    const [loaded, total] = [data.loaded, data.total].map((bytes) => (bytes / MEGABYTE).toFixed(0));
    if (data.loaded === data.total) wait("Opening the model");
    else wait(`Loading ${loaded} of ${total} MB`, data.loaded / data.total);
  } else if (data.kind === "trying") {
    wait("Comparing WebGPU with WebAssembly");
  } else if (data.kind === "ready") {
    facts(data.runsOn, data.unused);
    $("loading").hidden = true;
    ready = true;
    finish();
    $("status").textContent = "Ready.";
    performance.mark("ready");
  } else if (data.kind === "error") {
    finish();
    if (data.code === "stopped") $("status").textContent = "Stopped.";
    else fail(data.code, data.message);
  } else {
    grow(data);
  }
};
worker.onerror = (event) => fail("runtime", event.message || "the worker did not start");

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey || config?.kind === "countdown")) {
    event.preventDefault();
    if (!$("run").disabled) $("form").requestSubmit();
  }
});
for (const id of ["n", "temperature"]) $(id).addEventListener("input", show);
$("stop").addEventListener("click", () => worker.postMessage({ kind: "stop" }));

function run() {
  prompt = $("prompt").value.trim();
  $("problem").hidden = true;
  if (config.kind === "countdown" && !isPuzzle(prompt)) {
    fail("", `Expected a puzzle such as 3,7,20,24>1: but got ${prompt}`);
    return;
  }
  const method = $("method").value;
  const options = {
    n: Number($("n").value),
    temperature: Number($("temperature").value),
    seed: Number($("seed").value),
    vote: method === "weighted" || method === "majority" ? method : "score",
    pruneEvery: method === "pruned" ? 8 : 0,
  };
  if (config.kind !== "countdown") options.maxNewTokens = Number($("longest").value);
  $("run").disabled = true;
  // A single run does not end before all candidates have.
  const grows = config.graphs.includes("decode");
  $("stop").hidden = !grows;
  $("status").textContent = grows ? "Reading the prompt." : "Generating.";
  cards = Array.from({ length: options.n }, (_, i) => new Card(i));
  $("candidates").replaceChildren(...cards.map((card) => card.element));
  [low, high] = [Infinity, -Infinity];
  const asked = config.chat ? [{ role: "user", content: prompt }] : prompt;
  worker.postMessage({ kind: "generate", prompt: asked, options, byText: config.kind === "countdown" });
}

function finish() {
  $("run").disabled = !ready;
  $("stop").hidden = true;
}

/** One candidate. */
class Card {
  constructor(number) {
    this.number = number;
    this.written = "";
    this.element = document.createElement("li");
    this.element.className = "candidate";
    [this.text, this.note, this.score] = ["text", "note", "score"].map((name) => {
      const part = Object.assign(document.createElement("div"), { className: name });
      this.element.append(part);
      return part;
    });
    this.text.setAttribute("role", "group");
    this.text.setAttribute("aria-label", `Candidate ${number + 1}`);
  }

  grow({ pieces, again, total, reason }) {
    if (again) {
      this.text.replaceChildren();
      this.written = "";
    }
    for (const [piece, score] of pieces) {
      this.written += piece;
      const token = Object.assign(document.createElement("span"), { className: "token", textContent: piece });
      if (Number.isFinite(score)) token.style.setProperty("--score", String(score));
      token.title = Number.isFinite(score) ? score.toFixed(3) : "no score";
      this.text.append(token);
    }
    this.score.textContent = Number.isFinite(total) ? total.toFixed(3) : "";
    if (reason === "pruned") {
      this.element.classList.add("dropped");
      this.note.textContent = "dropped early";
    }
  }

  judge() {
    if (config.kind !== "countdown") return;
    const wrong = mistake(prompt, this.written);
    const verdict = Object.assign(document.createElement("span"), { className: wrong === null ? "right" : "wrong" });
    verdict.textContent = wrong === null ? "right" : `wrong: ${wrong}`;
    this.note.replaceChildren(verdict);
  }
}

/** Which scores the ends of the colours stand for: probabilities 0 and 1, others the least and the largest so far. */
function spread(scores) {
  if (config.probability || !scores.length) return;
  low = Math.min(low, ...scores);
  high = Math.max(high, ...scores);
  $("candidates").style.setProperty("--low", String(low));
  $("candidates").style.setProperty("--high", String(high));
}

function grow({ kind, rows, tokens, seconds, best }) {
  rows.forEach((row, i) => cards[i].grow(row));
  spread(rows.flatMap(({ pieces }) => pieces.map(([, score]) => score)).filter(Number.isFinite));
  const rate = `${tokens} tokens in ${seconds.toFixed(1)} s, ${(tokens / seconds).toFixed(0)} a second`;
  if (kind !== "done") {
    // Not announced: a screen reader would read every token.
    $("status").setAttribute("aria-live", "off");
    $("status").textContent = `${rate}.`;
    return;
  }
  finish();
  rows.forEach((row, i) => row.reason !== "pruned" && cards[i].judge());
  const order = rows.map((_, i) => i).sort((a, b) => (b === best) - (a === best) || rank(rows[b]) - rank(rows[a]) || a - b);
  $("candidates").replaceChildren(...order.map((i) => cards[i].element));
  const winner = cards[best];
  winner.element.classList.add("winner");
  winner.element.setAttribute("aria-current", "true");
  $("status").setAttribute("aria-live", "polite");
  $("status").textContent = `Chosen: candidate ${best + 1} of ${rows.length}. ${rate}.`;
  performance.mark("done");
}

function rank({ total }) {
  return Number.isFinite(total) ? total : -Infinity;
}

/** The curve of accuracy against N. */
function draw(curve) {
  const [width, height, left, bottom] = [560, 240, 44, 34];
  const counts = curve.points.map(({ n }) => n);
  const x = (n) => left + (Math.log2(n) / Math.log2(Math.max(...counts))) * (width - left - 120);
  const y = (accuracy) => 12 + (1 - accuracy) * (height - bottom - 12);
  const parts = [];
  for (const tick of [0, 0.25, 0.5, 0.75, 1]) {
    parts.push(`<line x1="${left}" x2="${width - 120}" y1="${y(tick)}" y2="${y(tick)}" stroke="var(--line)"/>`);
    parts.push(`<text x="${left - 6}" y="${y(tick) + 4}" text-anchor="end">${100 * tick}%</text>`);
  }
  for (const n of counts) parts.push(`<text x="${x(n)}" y="${height - 14}" text-anchor="middle">${n}</text>`);
  const dashes = ["", "6 4", "2 3"];
  const colours = ["var(--accent)", "var(--quiet)", "var(--quiet)"];
  curve.lines.forEach((name, i) => {
    const points = curve.points.map((point) => `${x(point.n)},${y(point[name])}`).join(" ");
    parts.push(`<polyline points="${points}" fill="none" stroke="${colours[i]}" stroke-width="2" stroke-dasharray="${dashes[i]}"/>`);
    parts.push(`<text x="${width - 114}" y="${y(curve.points.at(-1)[name]) + 4}">${name}</text>`);
  });
  const last = curve.points.at(-1);
  const spoken = curve.lines.map((name) => `${name} ${(100 * last[name]).toFixed(0)}%`).join(", ");
  const svg = `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="Accuracy with ${last.n} candidates: ${spoken}">${parts.join("")}</svg>`;
  $("curve").insertAdjacentHTML("beforeend", svg);
  $("curve").hidden = false;
}

start();

// What cannot be loaded is an error with a code, and nothing else: bad files, bad addresses, bad options.
import assert from "node:assert/strict";
import { readFile, symlink, truncate, writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import { join } from "node:path";
import { test } from "node:test";
import { pathToFileURL } from "node:url";

import { BonnxError, CODES, load } from "../bonnx.mjs";
import { TOKENIZER, artifact, runtime } from "./artifact.mjs";

async function fails(promise, code, message) {
  await assert.rejects(promise, (error) => {
    assert.ok(error instanceof BonnxError, error.stack);
    assert.ok(CODES.includes(error.code));
    assert.equal(error.code, code);
    assert.match(error.message, message);
    return true;
  });
}

/** Serve a folder; `answer` may take a request first. */
async function served(t, folder, answer = () => false) {
  const server = createServer(async (request, response) => {
    if (answer(request, response)) return;
    try {
      response.end(await readFile(join(folder, new URL(request.url, "http://localhost").pathname)));
    } catch {
      response.writeHead(404).end();
    }
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  t.after(() => {
    server.closeAllConnections();
    server.close();
  });
  return `http://127.0.0.1:${server.address().port}`;
}

test("a folder, its address as a file, and an address over HTTP give the same", async (t) => {
  const folder = await artifact(t);
  const address = await served(t, folder);
  for (const source of [folder, `${folder}/`, pathToFileURL(folder), address, new URL(`${address}/?version=1`)]) {
    const ort = runtime();
    const model = await load(source, { runtime: ort });
    const ranking = await model.rank("1+1", ["2", "9", "31"]);
    assert.deepEqual([ranking.best, ranking.bestIndex, ranking.order], ["9", 1, [1, 2, 0]]);
    await model.close();
  }
});

test("each graph is opened once, with the weights that were read once, and again after it was closed", async (t) => {
  const ort = runtime();
  const events = [];
  const model = await load(await artifact(t), { runtime: ort, threads: 2, onProgress: (event) => events.push(event) });
  await Promise.all([model.rank("1", ["2"]), model.rank("1", ["3"]), model.open(["generate", "rank"])]);
  assert.deepEqual(
    ort.opened.map(({ graph }) => graph),
    ["the graph rank", "the graph generate"],
  );
  const data = ort.opened.map(({ options }) => options.externalData[0].data);
  assert.equal(data[0], data[1]);
  assert.equal(ort.opened[0].options.intraOpNumThreads, 2);
  for (const [i, { loaded, total }] of events.entries())
    assert.ok(loaded <= total && loaded > (events[i - 1]?.loaded ?? 0));
  assert.equal(events.at(-1).loaded, events.at(-1).total);
  await model.close();
  assert.equal(ort.released, 2);
  await model.rank("1", ["2"]);
  assert.equal(ort.opened.length, 3);
});

test("a truncated file", async (t) => {
  const folder = await artifact(t);
  await truncate(join(folder, "onnx/weights.bin"), 3);
  await fails(load(folder, { runtime: runtime() }), "damaged", /weights\.bin: expected 7 bytes, got 3/);
});

test("a changed byte, in a file or in the manifest", async (t) => {
  const folder = await artifact(t);
  await writeFile(join(folder, "onnx/rank.onnx"), "the graph Rank");
  await fails(load(folder, { runtime: runtime() }), "damaged", /rank\.onnx: its sha256 is not the one/);
  const text = await readFile(join(folder, "manifest.json"), "utf8");
  await writeFile(join(folder, "manifest.json"), text.replace('"max_tokens": 20', '"max_tokens": 21'));
  await fails(load(folder, { runtime: runtime() }), "damaged", /its seal does not match/);
  await writeFile(join(folder, "manifest.json"), text.slice(0, 100));
  await fails(load(folder, { runtime: runtime() }), "damaged", /is not JSON/);
});

test("a newer schema, and a rule that this module does not know", async (t) => {
  await fails(
    load(await artifact(t, (manifest) => (manifest.schema_version = 3)), { runtime: runtime() }),
    "schema",
    /is 3, this module reads 2; install a newer version/,
  );
  await fails(
    load(await artifact(t, (manifest) => (manifest.schema_version = 1)), { runtime: runtime() }),
    "schema",
    /is 1, this module reads 2; export the model again/,
  );
  await fails(
    load(await artifact(t, (manifest) => (manifest.scoring.moon = 1)), { runtime: runtime() }),
    "schema",
    /the key 'moon' of scoring is unknown/,
  );
});

test("a tokenizer that the module cannot read", async (t) => {
  const cases = [
    [{ model: { type: "Unigram", vocab: [["a", 0]] } }, /a model of the type 'Unigram'/],
    [{ pre_tokenizer: { type: "Whitespace" } }, /a pre-tokenizer of the type 'Whitespace'/],
    [{ normalizer: { type: "BertNormalizer" } }, /a normalizer of the type 'BertNormalizer'/],
    [{ decoder: { type: "WordPiece" } }, /a decoder of the type 'WordPiece'/],
    [{ post_processor: { type: "BertProcessing" } }, /a post-processor of the type 'BertProcessing'/],
    [{ added_tokens: [{ ...TOKENIZER.added_tokens[0], single_word: true }] }, /is a word of its own only/],
    [
      { pre_tokenizer: { type: "Split", pattern: { Regex: "a++" }, behavior: "Isolated", invert: false } },
      /possessive/,
    ],
    [
      { pre_tokenizer: { type: "Split", pattern: { Regex: "(" }, behavior: "Isolated", invert: false } },
      /cannot be read/,
    ],
  ];
  for (const [change, message] of cases) {
    const folder = await artifact(
      t,
      (_, files) => (files["tokenizer.json"] = JSON.stringify({ ...TOKENIZER, ...change })),
    );
    await fails(load(folder, { runtime: runtime() }), "tokenizer", message);
  }
  const folder = await artifact(t, (_, files) => (files["tokenizer.json"] = "{"));
  await fails(load(folder, { runtime: runtime() }), "tokenizer", /cannot be read/);
});

test("a chat template that is none", async (t) => {
  const folder = await artifact(t, (manifest, files) => {
    manifest.text.chat_template = "chat.jinja";
    files["chat.jinja"] = "{% for %}";
  });
  await fails(load(folder, { runtime: runtime() }), "template", /cannot be read/);
});

test("a folder or an address without an artifact, and a file that leaves the folder", async (t) => {
  const folder = await artifact(t);
  const address = await served(t, folder);
  await fails(load(join(folder, "onnx"), { runtime: runtime() }), "missing", /is not an artifact: .*\(ENOENT\)/);
  await fails(load(`${address}/onnx`, { runtime: runtime() }), "missing", /HTTP status 404/);
  await fails(load("http://127.0.0.1:1", { runtime: runtime() }), "missing", /is not an artifact/);
  for (const name of ["../x", "/etc/x", "a\\b", "c:x"]) {
    const leaves = await artifact(t, (manifest) => {
      manifest.tokenizer = name;
      manifest.files[name] = { sha256: "", size: 1 };
    });
    await fails(load(leaves, { runtime: runtime() }), "damaged", /leaves the artifact's folder/);
    await fails(load(await served(t, leaves), { runtime: runtime() }), "damaged", /leaves the artifact's folder/);
  }
  const linked = await artifact(t, (manifest, files) => {
    manifest.files["onnx/rank.onnx"] = { sha256: "", size: 1 };
    delete files["onnx/rank.onnx"];
  });
  await symlink(join(folder, "onnx/rank.onnx"), join(linked, "onnx/rank.onnx"));
  await fails(load(linked, { runtime: runtime() }), "damaged", /rank\.onnx is a link to .*, outside the artifact/);
});

test("a transfer that breaks off", async (t) => {
  const folder = await artifact(t);
  const address = await served(t, folder, (request, response) => {
    if (!request.url.endsWith("weights.bin")) return false;
    response.writeHead(200, { "Content-Length": 7 });
    response.write("wei");
    setTimeout(() => response.destroy(), 50);
    return true;
  });
  await fails(load(address, { runtime: runtime() }), "damaged", /the transfer broke off after 3 bytes/);
});

test("an abort, before and while a file comes", async (t) => {
  const folder = await artifact(t);
  await assert.rejects(load(folder, { runtime: runtime(), signal: AbortSignal.abort() }), { name: "AbortError" });
  const controller = new AbortController();
  const address = await served(t, folder, (request, response) => {
    if (!request.url.endsWith("weights.bin")) return false;
    response.writeHead(200, { "Content-Length": 7 });
    response.write("wei", () => setTimeout(() => controller.abort(), 20));
    return true;
  });
  await assert.rejects(load(address, { runtime: runtime(), signal: controller.signal }), { name: "AbortError" });
});

test("a runtime that is none, fails or has no memory", async (t) => {
  const folder = await artifact(t);
  await fails(load(folder, { runtime: {} }), "runtime", /expected the module of onnxruntime-web/);
  const failing = (error) => ({ ...runtime(), InferenceSession: { create: async () => Promise.reject(error) } });
  await fails(
    load(folder, { runtime: failing(new Error("no kernel")) }),
    "runtime",
    /the graph 'rank' could not be opened: no kernel/,
  );
  await fails(load(folder, { runtime: failing(new Error("std::bad_alloc")) }), "memory", /too little memory/);
  await fails(
    load(folder, { runtime: failing(new RangeError("Array buffer allocation failed")) }),
    "memory",
    /too little memory/,
  );
});

test("options that are unknown or out of range", async (t) => {
  const folder = await artifact(t);
  const cases = [
    [{ thread: 2 }, /unknown option 'thread' of load; did you mean 'threads'\?/],
    [{ threads: 0 }, /threads: expected a whole number of at least 1; got 0/],
    [{ onProgress: 1 }, /onProgress: expected a function/],
    [{ executionProviders: "wasm" }, /executionProviders: expected a list/],
    [{ graphs: [1] }, /graphs: expected a list of names/],
    [{ signal: 1 }, /signal: expected an AbortSignal/],
  ];
  for (const [options, message] of cases)
    await fails(load(folder, { runtime: runtime(), ...options }), "option", message);
  await fails(load(""), "option", /the artifact: expected an address or a folder/);
  await fails(load(7), "option", /the artifact: expected an address or a folder/);
  await fails(
    load(folder, { runtime: runtime(), graphs: ["moon"] }),
    "input",
    /has no graph 'moon', only generate, rank/,
  );
});

// What a call refuses, and what goes into the graph.
import assert from "node:assert/strict";
import { test } from "node:test";

import { BonnxError, load } from "../bonnx.mjs";
import { artifact, runtime } from "./artifact.mjs";

async function fails(promise, code, message) {
  await assert.rejects(promise, (error) => {
    assert.ok(error instanceof BonnxError, error.stack);
    assert.equal(error.code, code, error.message);
    assert.match(error.message, message);
    return true;
  });
}

async function opened(t, change) {
  const ort = runtime();
  return [await load(await artifact(t, change), { runtime: ort }), ort];
}

test("rank refuses unknown options and bad values by name", async (t) => {
  const [model] = await opened(t);
  const cases = [
    [{ agregation: "min" }, "option", /unknown option 'agregation' of rank; did you mean 'aggregation'\?/],
    [{ aggregation: "median" }, "option", /aggregation: expected one of last, mean/],
    [{ vote: "all" }, "option", /vote: expected one of score, weighted, majority/],
    [{ vote: "majority" }, "option", /vote 'majority' needs answers/],
    [{ vote: "weighted", answers: "number" }, "option", /graphs add up raw scores/],
    [{ vote: "majority", answers: "moon" }, "option", /answers: expected 'boxed', 'number'/],
    [{ vote: "majority", answers: "regex:(?i)a" }, "option", /has no counterpart in JavaScript/],
    [{ vote: "majority", answers: "regex:(" }, "option", /is not a regular expression/],
    [{ vote: "majority", answers: ["1", "2"] }, "option", /answers: expected one for each of 1 candidates; got 2/],
    [{ vote: "majority", answers: [{}] }, "option", /answers\[0\]: expected a text, a number or null/],
    [{ partial: 1 }, "option", /partial: expected true or false; got 1/],
    [{ stepMasks: [[1]] }, "option", /stepMasks: aggregation 'last' does not read them/],
    [{ aggregation: "step_min" }, "option", /a step aggregation needs stepMasks/],
    [{ aggregation: "step_min", stepMasks: [[2]] }, "option", /stepMasks\[0\]: expected 0 or 1/],
    [{ instruction: "x" }, "option", /instruction: it goes into the template of a reranker/],
    [[], "option", /the options of rank: expected an object/],
  ];
  for (const [options, code, message] of cases) await fails(model.rank("1", ["2"], options), code, message);
});

test("rank refuses what it cannot read", async (t) => {
  const [model] = await opened(t);
  const cases = [
    ["", ["1"], "input", /prompt: it has no tokens/],
    ["1", [], "input", /candidates: expected a list of at least one candidate/],
    ["1", "2", "input", /candidates: expected a list/],
    ["1", [""], "input", /candidates\[0\]: it has no tokens/],
    [
      "1",
      ["", "a", "b", "c"],
      "input",
      /candidates: none can be read: candidates\[0\]: it has no tokens.*; and 1 more/,
    ],
    ["1", [null], "input", /candidates\[0\]: expected text or a list of token ids; got null/],
    ["1", [new Uint8Array(2)], "input", /expected text or a list of token ids/],
    ["1", [[1.5]], "input", /candidates\[0\]: expected text or a list of token ids/],
    ["1", [[13]], "input", /token id 13 is outside the vocabulary \(0 to 12\)/],
    ["a", ["1"], "input", /prompt: the vocabulary has no token for 'a' \(at character 0\)/],
    [[{ role: "user", content: "1" }], ["1"], "input", /messages need a chat template, and this artifact has none/],
    ["1", ["1", "1", "1", "1", "1", "1"], "too-large", /6 candidates: this artifact takes at most 5/],
    ["1", ["1".repeat(20)], "too-large", /takes at most 20 together/],
  ];
  for (const [prompt, candidates, code, message] of cases) await fails(model.rank(prompt, candidates), code, message);
});

test("a candidate that cannot be read does not end the call", async (t) => {
  const [model, ort] = await opened(t);
  const ranking = await model.rank("1", ["", "2a", "\ud800", "3"], { vote: "majority", answers: "number" });
  assert.deepEqual(ranking.unreadable, {
    0: "it has no tokens; expected at least one",
    1: "the vocabulary has no token for 'a' (at character 1)",
    2: "expected Unicode text; '\\ud800' is half of a surrogate pair (at character 0)",
  });
  assert.deepEqual(ranking.answers, [null, null, null, "3"]);
  assert.deepEqual(Array.from(ort.feeds.candidate_mask.data, Number), [0, 0, 0, 0, 0, 0, 1, 1]);
});

test("a prompt that is too long is cut at its beginning if that is asked for", async (t) => {
  const [model, ort] = await opened(t);
  await fails(model.rank("1".repeat(30), ["2"]), "too-large", /takes at most 20/);
  const ranking = await model.rank("<end>" + "1".repeat(30), ["2"], { truncate: true });
  assert.equal(ranking.cut, 13);
  assert.deepEqual(Array.from(ort.feeds.prompt_ids.data, Number), [12, ...Array(17).fill(1)]);
  await fails(model.rank("1", ["2".repeat(20)], { truncate: true }), "too-large", /a candidate is never cut/);
});

test("generate refuses unknown options and bad values by name", async (t) => {
  const [model] = await opened(t);
  const cases = [
    [{ max_new_tokens: 3 }, /unknown option 'max_new_tokens' of generate; did you mean 'maxNewTokens'\?/],
    [{ n: 0 }, /n: expected a whole number of at least 1; got 0/],
    [{ n: 1.5 }, /n: expected a whole number/],
    [{ maxNewTokens: 0 }, /maxNewTokens: expected a whole number of at least 1/],
    [{ temperature: -1 }, /temperature: expected a number of at least 0/],
    [{ temperature: NaN }, /temperature: expected a number/],
    [{ topK: -1 }, /topK: expected a whole number of at least 0/],
    [{ topP: 0 }, /topP: expected a number above 0 and at most 1; got 0/],
    [{ deadline: 0 }, /deadline: expected a number above 0; got 0/],
    [{ pruneKeep: 2 }, /pruneKeep: expected a number above 0 and at most 1; got 2/],
    [{ pruneEvery: -1 }, /pruneEvery: expected a whole number/],
    [{ seed: 2 ** 60 }, /seed: expected a whole number from -\(2\^63\) to 2\^63 - 1, as a BigInt/],
    [{ seed: 2n ** 63n }, /seed: expected a whole number .*got 9223372036854775808n/],
    [{ seed: "1" }, /seed: expected a whole number/],
    [{ stop: "1" }, /stop: expected a list of token ids or of texts/],
    [{ stop: [""] }, /stop: expected texts of at least one character/],
    [{ aggregation: "step_min" }, /a step aggregation needs a step token/],
    [{ onToken: true }, /onToken: expected a function/],
    [{ vote: "majority" }, /vote 'majority' needs answers/],
    [{ vote: "majority", answers: ["1"] }, /answers: there are no candidates yet/],
  ];
  for (const [options, message] of cases) await fails(model.generate("1", options), "option", message);
  await fails(model.generate("1", { stop: [13] }), "input", /stop: token id 13 is outside the vocabulary/);
  await fails(model.generate("1", { n: 9 }), "too-large", /at most 5 at once/);
  await fails(model.generate("1", { maxNewTokens: 20 }), "too-large", /at most 20 together/);
  await assert.rejects(model.generate("1", { signal: AbortSignal.abort() }), { name: "AbortError" });
});

test("an artifact that only scores does not generate, and one without a scorer does not rank", async (t) => {
  const [scorer] = await opened(t, (manifest) => delete manifest.graphs.generate);
  await fails(scorer.generate("1"), "input", /does not generate: it has the graphs rank/);
  const [generator] = await opened(t, (manifest) => (manifest.scoring.token_score = "self_certainty"));
  await fails(generator.rank("1", ["2"]), "input", /ranking needs a scorer/);
});

/**
 * `manifest.json`: everything that a program needs to know about an artifact.
 *
 * @module
 */

import { MANIFEST, sha256 } from "./artifact.mjs";
import { shown } from "./checks.mjs";
import { BonnxError } from "./errors.mjs";

const SCHEMA_VERSION = 2;
const words = (text) => text.split(" ");
// The rules that this module applies. An artifact with others is of a newer bonnx, and would be read wrongly.
const KNOWN = {
  "manifest.json": words(
    "schema_version seal name source kind model precision scoring limits graphs tokenizer text files parity verification agreement tools",
  ),
  scoring: words(
    "aggregation token_score activation vote_weight label labels step_token steps_from end_token reward_token gate_tokens stop_tokens pad_token passes_pad",
  ),
  text: words("special_tokens unknown chat_template template_tokens pair checked_against step_text step_split"),
  "text.pair": words("template content options instruction"),
  limits: words("max_tokens max_candidates"),
};
// What the keys stand for where an artifact does not have them.
const DEFAULTS = {
  scoring: {
    aggregation: "last",
    token_score: "scorer",
    activation: "none",
    vote_weight: "score",
    labels: [],
    step_token: null,
    end_token: null,
    reward_token: null,
    gate_tokens: [],
    stop_tokens: [],
    pad_token: 0,
    passes_pad: false,
  },
  text: {
    special_tokens: false,
    unknown: "refuse",
    chat_template: null,
    template_tokens: {},
    pair: null,
    step_text: null,
    step_split: null,
  },
};

/**
 * The manifest: its seal, its schema version and its keys checked.
 *
 * @param {Files} files
 * @param {AbortSignal} [signal]
 */
export async function readManifest(files, signal) {
  const bytes = await files.read(MANIFEST, signal);
  files.total = files.loaded;
  let text, manifest;
  try {
    text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
    manifest = JSON.parse(text);
  } catch (error) {
    throw new BonnxError(
      "damaged",
      `${files.source}/${MANIFEST} is not JSON: ${error.message}; export the artifact again`,
      { cause: error },
    );
  }
  const version = manifest?.schema_version;
  if (version !== SCHEMA_VERSION) {
    const newer = typeof version === "number" && version > SCHEMA_VERSION;
    throw new BonnxError(
      "schema",
      `${files.source}/${MANIFEST}: schema_version is ${shown(version)}, this module reads ${SCHEMA_VERSION}; ` +
        (newer ? "install a newer version of the npm package 'bonnx'" : "export the model again"),
    );
  }
  const seal = /"seal": "([0-9a-f]{64})"/.exec(text);
  const blank =
    seal &&
    text.slice(0, seal.index) + seal[0].replace(seal[1], "0".repeat(64)) + text.slice(seal.index + seal[0].length);
  if (!seal || (await sha256(new TextEncoder().encode(blank))) !== seal[1]) {
    throw new BonnxError(
      "damaged",
      `${files.source}/${MANIFEST}: its seal does not match its content; it was edited or cut: export or load it again`,
    );
  }
  const parts = { [MANIFEST]: manifest, scoring: manifest.scoring, text: manifest.text, limits: manifest.limits };
  if (manifest.text?.pair) parts["text.pair"] = manifest.text.pair;
  for (const [part, value] of Object.entries(parts)) {
    const unknown = Object.keys(value ?? {}).find((key) => !KNOWN[part].includes(key));
    if (unknown !== undefined) {
      throw new BonnxError(
        "schema",
        `${files.source}/${MANIFEST}: the key '${unknown}' of ${part} is unknown to this module; install a newer version of the npm package 'bonnx'`,
      );
    }
  }
  manifest.scoring = { ...DEFAULTS.scoring, ...manifest.scoring };
  manifest.text = { ...DEFAULTS.text, ...manifest.text };
  return manifest;
}

/**
 * Read an artifact's files and refuse those that are not as they were written. ONNX Runtime sees nothing before this.
 *
 * @module
 */

import { BonnxError } from "./errors.mjs";
import { shown } from "./checks.mjs";

const MANIFEST = "manifest.json";
const SCHEMA_VERSION = 2;
// Variables, so that a bundler for browsers does not look for them.
const FILE_SYSTEM = "node:fs/promises";
const PATHS = "node:path";
const URLS = "node:url";
// How the small text begins that Git LFS leaves where a file was not downloaded.
const LFS_POINTER = "version https://git-lfs.github.com/spec/";
// The rules that this module applies. An artifact with others is of a newer bonnx, and would be read wrongly.
const KNOWN = {
  "manifest.json": [
    "schema_version", "seal", "name", "source", "kind", "model", "precision", "scoring", "limits", "graphs", "tokenizer",
    "text", "files", "parity", "verification", "agreement", "tools",
  ],
  scoring: [
    "aggregation", "token_score", "activation", "vote_weight", "label", "labels", "step_token", "steps_from", "end_token",
    "reward_token", "gate_tokens", "stop_tokens", "pad_token", "passes_pad",
  ],
  text: [
    "special_tokens", "unknown", "chat_template", "template_tokens", "pair", "checked_against", "step_text", "step_split",
  ],
  "text.pair": ["template", "content", "options", "instruction"],
  limits: ["max_tokens", "max_candidates"],
};
// What the keys stand for where an artifact does not have them.
const DEFAULTS = {
  scoring: {
    aggregation: "last", token_score: "scorer", activation: "none", vote_weight: "score", labels: [], step_token: null,
    end_token: null, reward_token: null, gate_tokens: [], stop_tokens: [], pad_token: 0, passes_pad: false,
  },
  text: {
    special_tokens: false, unknown: "refuse", chat_template: null, template_tokens: {}, pair: null, step_text: null,
    step_split: null,
  },
};

/**
 * The files of an artifact: a folder in Node, or an address.
 *
 * Progress counts the bytes of all files that were asked for so far.
 */
export class Files {
  /**
   * @param {string | URL} source
   * @param {(progress: {file: string, loaded: number, total: number}) => void} [onProgress]
   */
  constructor(source, onProgress) {
    this.source = source;
    this.onProgress = onProgress ?? (() => {});
    this.loaded = 0;
    this.total = 0;
    const text = String(source);
    const inNode = typeof process !== "undefined" && Boolean(process.versions?.node);
    if (!(source instanceof URL) && (typeof source !== "string" || source === "")) {
      throw new BonnxError("option", `the artifact: expected an address or a folder; got ${shown(source)}`);
    }
    if (/^https?:/i.test(text) || !inNode) {
      const base = new URL(text, globalThis.document?.baseURI ?? globalThis.location?.href);
      if (!base.pathname.endsWith("/")) base.pathname += "/";
      this.read = (name, signal, size) => fetched(new URL(encodeURI(name) + base.search, base), signal, size, (count) => this.#count(name, count));
    } else {
      this.read = async (name, signal) => {
        const bytes = await readFromFolder(source, name, signal);
        this.#count(name, bytes.length);
        return bytes;
      };
    }
  }

  /**
   * A file of the manifest, its size and SHA-256 checked.
   *
   * @param {object} manifest
   * @param {string} name
   * @param {AbortSignal} [signal]
   * @returns {Promise<Uint8Array>}
   */
  async verified(manifest, name, signal) {
    const expected = manifest.files[name];
    if (expected === undefined) {
      throw new BonnxError("damaged", `${MANIFEST}: it uses '${name}', which is not in its list of files; export again`);
    }
    this.total += expected.size;
    const before = this.loaded;
    try {
      const bytes = await this.read(name, signal, expected.size);
      signal?.throwIfAborted();
      const where = `${this.source}/${name}`;
      if (bytes.length !== expected.size) {
        if (new TextDecoder().decode(bytes.subarray(0, LFS_POINTER.length)) === LFS_POINTER) {
          throw new BonnxError("damaged", `${where} is a pointer of Git LFS, and not the file itself; run \`git lfs pull\``);
        }
        throw new BonnxError(
          "damaged",
          `${where}: expected ${expected.size} bytes, got ${bytes.length}; the file was cut or edited: load or copy it again`,
        );
      }
      if ((await sha256(bytes)) !== expected.sha256) {
        throw new BonnxError("damaged", `${where}: its sha256 is not the one in ${MANIFEST}; load or copy it again`);
      }
      return bytes;
    } catch (error) {
      // The next attempt counts from the beginning.
      this.total -= expected.size;
      this.loaded = before;
      throw error;
    }
  }

  #count(file, bytes) {
    this.loaded += bytes;
    this.onProgress({ file, loaded: this.loaded, total: Math.max(this.total, this.loaded) });
  }
}

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
    throw new BonnxError("damaged", `${files.source}/${MANIFEST} is not JSON: ${error.message}; export the artifact again`, { cause: error });
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
  const blank = seal && text.slice(0, seal.index) + seal[0].replace(seal[1], "0".repeat(64)) + text.slice(seal.index + seal[0].length);
  if (!seal || (await sha256(new TextEncoder().encode(blank))) !== seal[1]) {
    throw new BonnxError("damaged", `${files.source}/${MANIFEST}: its seal does not match its content; it was edited or cut: export or load it again`);
  }
  const parts = { [MANIFEST]: manifest, scoring: manifest.scoring, text: manifest.text, limits: manifest.limits };
  if (manifest.text?.pair) parts["text.pair"] = manifest.text.pair;
  for (const [part, value] of Object.entries(parts)) {
    const unknown = Object.keys(value ?? {}).find((key) => !KNOWN[part].includes(key));
    if (unknown !== undefined) {
      throw new BonnxError("schema", `${files.source}/${MANIFEST}: the key '${unknown}' of ${part} is unknown to this module; install a newer version of the npm package 'bonnx'`);
    }
  }
  manifest.scoring = { ...DEFAULTS.scoring, ...manifest.scoring };
  manifest.text = { ...DEFAULTS.text, ...manifest.text };
  return manifest;
}

/** Hex SHA-256 of bytes. */
async function sha256(bytes) {
  if (globalThis.crypto?.subtle === undefined) {
    throw new BonnxError("runtime", "files cannot be checked: crypto.subtle is missing. Browsers have it on pages that come over https, or from localhost");
  }
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Refuse a name that leaves the folder. */
function checkInside(name) {
  const parts = name.split("/");
  if (name === "" || name.startsWith("/") || /[\\:?#]/.test(name) || parts.includes("..")) {
    throw new BonnxError("damaged", `${MANIFEST}: the path '${name}' leaves the artifact's folder; refused`);
  }
}

async function readFromFolder(source, name, signal) {
  checkInside(name);
  const [{ readFile, realpath }, { join, sep }, { fileURLToPath }] = await Promise.all([import(FILE_SYSTEM), import(PATHS), import(URLS)]);
  const text = String(source);
  const folder = text.startsWith("file:") ? fileURLToPath(text) : text;
  const path = join(folder, name);
  try {
    const real = await realpath(path);
    if (!real.startsWith((await realpath(folder)) + sep)) {
      throw new BonnxError("damaged", `${path} is a link to ${real}, outside the artifact's folder; copy the folder with its links followed`);
    }
    return new Uint8Array(await readFile(real, { signal }));
  } catch (error) {
    signal?.throwIfAborted();
    if (error instanceof BonnxError) throw error;
    throw failedToRead(path, name, error.code ?? error.message, error);
  }
}

/** The bytes at an address; `count` gets the size of each piece as it comes. */
async function fetched(address, signal, size, count) {
  checkInside(decodeURI(address.pathname.split("/").at(-1)));
  let response;
  try {
    response = await fetch(address, { signal });
  } catch (error) {
    signal?.throwIfAborted();
    throw failedToRead(address, address.pathname, error.cause?.code ?? error.message, error);
  }
  if (!response.ok) throw failedToRead(address, address.pathname, `HTTP status ${response.status}`);
  let bytes;
  let length = 0;
  try {
    // Of a manifest the size is not known.
    bytes = new Uint8Array(size ?? 2 ** 16);
    for (const reader = response.body.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) break;
      if (length + value.length > bytes.length) {
        const more = new Uint8Array(2 * (length + value.length));
        more.set(bytes.subarray(0, length));
        bytes = more;
      }
      bytes.set(value, length);
      length += value.length;
      count(value.length);
      if (size !== undefined && length > size) {
        await reader.cancel();
        break;
      }
    }
    return bytes.length === length ? bytes : bytes.slice(0, length);
  } catch (error) {
    signal?.throwIfAborted();
    if (error instanceof RangeError) throw new BonnxError("memory", `${address}: there is no memory for its ${size ?? length} bytes`, { cause: error });
    throw new BonnxError("damaged", `${address}: the transfer broke off after ${length} bytes: ${error.message}; load it again`, { cause: error });
  }
}

function failedToRead(path, name, reason, cause) {
  const what = String(name).endsWith(MANIFEST) ? "is not an artifact: expected a folder that `bonnx export` wrote" : "cannot be read";
  return new BonnxError("missing", `${path} ${what} (${reason})`, { cause });
}

/**
 * Read an artifact's files and refuse those that are not as they were written. ONNX Runtime sees nothing before this.
 *
 * @module
 */

import { BonnxError } from "./errors.mjs";
import { shown } from "./checks.mjs";

export const MANIFEST = "manifest.json";
// Variables, so that a bundler for browsers does not look for them.
const FILE_SYSTEM = "node:fs/promises";
const PATHS = "node:path";
const URLS = "node:url";
// How the small text begins that Git LFS leaves where a file was not downloaded.
const LFS_POINTER = "version https://git-lfs.github.com/spec/";
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
      this.read = (name, signal, size, count = () => {}) => {
        checkInside(name);
        const address = new URL(encodeURI(name) + base.search, base);
        return fetched(address, signal, size, count);
      };
    } else {
      this.read = async (name, signal, size, count = () => {}) => {
        const bytes = await readFromFolder(source, name, signal);
        count(bytes.length);
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
      throw new BonnxError(
        "damaged",
        `${MANIFEST}: it uses '${name}', which is not in its list of files; export again`,
      );
    }
    this.total += expected.size;
    let counted = 0;
    const count = (bytes) => {
      counted += bytes;
      this.#count(name, bytes);
    };
    try {
      const bytes = await this.read(name, signal, expected.size, count);
      signal?.throwIfAborted();
      const where = `${this.source}/${name}`;
      if (bytes.length !== expected.size) {
        if (new TextDecoder().decode(bytes.subarray(0, LFS_POINTER.length)) === LFS_POINTER) {
          throw new BonnxError(
            "damaged",
            `${where} is a pointer of Git LFS, and not the file itself; run \`git lfs pull\``,
          );
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
      this.loaded -= counted;
      throw error;
    }
  }

  #count(file, bytes) {
    this.loaded += bytes;
    this.onProgress({ file, loaded: this.loaded, total: Math.max(this.total, this.loaded) });
  }
}

/** Hex SHA-256 of bytes. */
export async function sha256(bytes) {
  if (globalThis.crypto?.subtle === undefined) {
    throw new BonnxError(
      "runtime",
      "files cannot be checked: crypto.subtle is missing. Browsers have it on pages that come over https, or from localhost",
    );
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
  const [{ readFile, realpath }, { join, sep }, { fileURLToPath }] = await Promise.all([
    import(FILE_SYSTEM),
    import(PATHS),
    import(URLS),
  ]);
  const text = String(source);
  const folder = text.startsWith("file:") ? fileURLToPath(text) : text;
  const path = join(folder, name);
  try {
    const real = await realpath(path);
    if (!real.startsWith((await realpath(folder)) + sep)) {
      throw new BonnxError(
        "damaged",
        `${path} is a link to ${real}, outside the artifact's folder; copy the folder with its links followed`,
      );
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
    for (const reader = response.body.getReader(); ;) {
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
    if (error instanceof RangeError)
      throw new BonnxError("memory", `${address}: there is no memory for its ${size ?? length} bytes`, {
        cause: error,
      });
    throw new BonnxError(
      "damaged",
      `${address}: the transfer broke off after ${length} bytes: ${error.message}; load it again`,
      { cause: error },
    );
  }
}

function failedToRead(path, name, reason, cause) {
  const what = String(name).endsWith(MANIFEST)
    ? "is not an artifact: expected a folder that `bonnx export` wrote"
    : "cannot be read";
  return new BonnxError("missing", `${path} ${what} (${reason})`, { cause });
}

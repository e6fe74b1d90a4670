"""Write the page: a folder of files that any host of static files serves."""

from __future__ import annotations

import importlib.resources
import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bonnx.errors import InputError

from ..artifact.folder import MANIFEST, WEIGHTS, locate, read_verified
from ..artifact.manifest import Manifest

__all__ = ["RUNTIME", "Page", "write_page"]

# The version that docs/graphs.md names and the tests run.
RUNTIME = "onnxruntime-web@1.30.0"
# Token by token, so that a visitor sees the candidates grow; or, in a single file, all in one run.
_GRAPHS = (("prefill", "decode"), ("generate",))
# Where each file of the npm packages lies in them, and on the page.
_PACKAGE_FILES = {
    "onnxruntime-web/dist/ort.wasm.bundle.min.mjs": "runtime/ort.wasm.bundle.min.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm": "runtime/ort-wasm-simd-threaded.wasm",
    "@huggingface/tokenizers/dist/tokenizers.min.mjs": "bonnx/tokenizers.mjs",
    "@huggingface/jinja/dist/index.js": "bonnx/jinja-package.mjs",
}
# A second thread gains nothing with fewer bytes of model, and then more lose time where the processor is shared.
_MANY_THREADS_FROM, _MANY_THREADS = 32_000_000, 4
# As large again as the others together, so only where they are asked for.
_WEBGPU_FILES = {
    f"onnxruntime-web/dist/{name}": f"runtime/{name}"
    for name in ("ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm")
}
# A worker has no import map, so the module names its packages by their files.
_IMPORTS = {"@huggingface/tokenizers": "./tokenizers.mjs", "@huggingface/jinja": "./jinja-package.mjs"}
# For hosts that read such a file; others get the headers from isolate.js.
_HEADERS = """/*
  Cross-Origin-Opener-Policy: same-origin
  Cross-Origin-Embedder-Policy: require-corp
"""
_COUNTDOWN_EXAMPLES = ["3,7,20,24>1:", "2,6,13,14>26:", "4,9,13>43:"]
_CHAT_EXAMPLES = ["Give me a name for a small bakery.", "Explain in one sentence why the sky is blue."]


@dataclass(frozen=True)
class Page:
    """What was written.

    Attributes:
        folder: where.
        bytes: of all files together.
        model_bytes: of the model's files among them.
    """

    folder: Path
    bytes: int
    model_bytes: int


def write_page(
    artifact: Path,
    output: Path,
    *,
    curve: Path | None = None,
    packages: Path | None = None,
    webgpu: bool = False,
    overwrite: bool = False,
) -> Page:
    """Write a page that runs a language model in the visitor's browser.

    Args:
        artifact: folder of the model.
        output: folder to write, whole or not at all.
        curve: a report of accuracy against N to show, as `bonnx.models.countdown.evaluate` writes it.
        packages: a folder `node_modules` with ONNX Runtime's and Hugging Face's packages; by default npm fetches them.
        webgpu: let the page use WebGPU where a browser has it, and it chooses the same winner in less time.
        overwrite: replace an earlier page.

    Raises:
        ArtifactError: the artifact is not as it was written.
        InputError: it does not generate, the output cannot be written, or the packages cannot be had.
    """
    manifest = read_verified(artifact)
    graphs = next((names for names in _GRAPHS if all(name in manifest.graphs for name in names)), None)
    if graphs is None:
        raise InputError(
            f"'{manifest.name}' has the graphs {', '.join(manifest.graphs)}: expected a language model that generates"
        )
    _check_output(output, overwrite=overwrite)
    settings = _settings(manifest, graphs, curve) | {"webgpu": webgpu}
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, so that moving it there is a matter of names.
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.absolute().parent) as place:
        folder = Path(place) / "page"
        model_bytes = _copy_model(artifact, manifest, graphs, folder / "model")
        settings |= {"bytes": model_bytes, "threads": 1 if model_bytes < _MANY_THREADS_FROM else _MANY_THREADS}
        (folder / "page.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
        _copy_site(folder)
        files = _PACKAGE_FILES | (_WEBGPU_FILES if webgpu else {})
        _copy_packages(packages or _fetch(Path(place) / "npm"), files, folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if output.exists():
            output.rename(Path(place) / "old")
        folder.rename(output)
    return Page(output, size, model_bytes)


def _check_output(output: Path, *, overwrite: bool) -> None:
    if not output.exists():
        return
    if not overwrite:
        raise InputError(f"{output} exists; choose another folder, or pass --overwrite")
    if not (output / "page.json").is_file():
        raise InputError(f"{output} exists and is not a page that bonnx wrote; choose another folder")


def _settings(manifest: Manifest, graphs: Sequence[str], curve: Path | None) -> dict[str, object]:
    """What the page has to know of the model before it is loaded."""
    countdown = manifest.name.startswith("countdown") and manifest.tokenizer is not None
    chat = manifest.text.chat_template is not None
    scored = manifest.has_scorer
    examples = _COUNTDOWN_EXAMPLES if countdown else _CHAT_EXAMPLES if chat else ["Once upon a time"]
    return {
        "name": manifest.name,
        "seal": manifest.seal,
        "graphs": [*graphs],
        "kind": "countdown" if countdown else "text",
        "chat": chat and not countdown,
        "scorer": scored,
        "probability": scored and manifest.scoring.activation in ("sigmoid", "softmax"),
        "examples": examples,
        "candidates": 16 if countdown else 4,
        "temperature": 0.7 if chat and not countdown else 1.0,
        "longest": 48,
        "curve": None if curve is None else _read_curve(curve),
    }


def _read_curve(path: Path) -> dict[str, object]:
    """Accuracy against N by method, as the page draws it."""
    names = {"best-of-N by the scorer": "best by score", "majority vote": "majority", "one sample": "one sample"}
    points: dict[int, dict[str, float]] = {}
    try:
        for entry in json.loads(path.read_text(encoding="utf-8"))["accuracy"]:
            if entry["method"] in names:
                points.setdefault(int(entry["n"]), {})[names[entry["method"]]] = float(entry["accuracy"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path}: expected a report of accuracy against N, as the Countdown model has; got {e}") from e
    whole = [{"n": n, **lines} for n, lines in sorted(points.items()) if len(lines) == len(names)]
    return {"lines": list(names.values()), "points": whole}


def _copy_model(artifact: Path, manifest: Manifest, graphs: Sequence[str], folder: Path) -> int:
    """Copy what the page loads: the manifest, the graphs with the weights, and the text's files; return their bytes."""
    rules = manifest.text
    names = {manifest.graphs[name].file for name in graphs} | {manifest.tokenizer, rules.chat_template}
    names |= {name for name in manifest.files if name.endswith(WEIGHTS)}
    size = 0
    for name in [MANIFEST, *sorted(name for name in names if name)]:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        source = artifact / name if name == MANIFEST else locate(artifact, name)
        size += shutil.copyfile(source, target).stat().st_size
    return size


def _copy_site(folder: Path) -> None:
    """Copy the page itself, and the npm package `bonnx`."""
    site, module = importlib.resources.files("bonnx.runtime.page") / "static", importlib.resources.files("bonnx.js")
    (folder / "bonnx").mkdir()
    for source in site.iterdir():
        (folder / source.name).write_bytes(source.read_bytes())
    for source in module.iterdir():
        if source.name.endswith(".mjs"):
            text = source.read_text(encoding="utf-8")
            for package, file in _IMPORTS.items():
                text = text.replace(f'from "{package}"', f'from "{file}"')
            (folder / "bonnx" / source.name).write_text(text, encoding="utf-8")
    (folder / "_headers").write_text(_HEADERS, encoding="utf-8")


def _fetch(folder: Path) -> Path:
    """Let npm fetch the packages, in the versions that the module is tested with."""
    npm = shutil.which("npm")
    if npm is None:
        raise InputError(
            f"npm was not found: it fetches {RUNTIME} and the tokenizers; install Node.js, or pass --packages with a "
            "folder node_modules that has them"
        )
    package = json.loads((importlib.resources.files("bonnx.js") / "package.json").read_text(encoding="utf-8"))
    wanted = [RUNTIME, *(f"{name}@{version}" for name, version in package["dependencies"].items())]
    folder.mkdir()
    # Without a package.json npm would look for one in the folders above.
    (folder / "package.json").write_text("{}")
    command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline", *wanted]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if line.strip()), "no reason given")
        raise InputError(f"npm could not fetch {', '.join(wanted)}: {reason}; or pass --packages")
    return folder / "node_modules"


def _copy_packages(packages: Path, files: Mapping[str, str], folder: Path) -> None:
    for name, target in files.items():
        source, place = packages / name, folder / target
        if not source.is_file():
            raise InputError(f"{source} is missing: expected a folder node_modules with {RUNTIME} and the tokenizers")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)

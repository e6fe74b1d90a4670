"""Check a checkpoint's folder for incomplete and unsupported files before reading it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .config import ConfigError

__all__ = ["check_folder", "check_present", "read_json", "unpickling"]

# The start of a Git LFS pointer, the small text in place of a file that was not downloaded.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_READ = ("*.json", "*.jinja", "*.safetensors", "additional_chat_templates/*.jinja")
# Weights that are read elsewhere or ignored: other formats of the model's own, and what inference does not need.
_UNREAD = (
    "model.safetensors",
    "model.*.safetensors",
    "model-*-of-*.safetensors",
    "value_head.safetensors",  # read with the weights, see weights.py
    "consolidated*",
    "adapter_model*",
    "optimizer*",
)


def check_folder(folder: Path) -> None:
    """Refuse a folder with files that would be misread or ignored.

    Raises:
        ConfigError: if the folder contains a head in a separate file, a Git LFS pointer or a broken link,
            or is not a checkpoint but has some inside.
    """
    if not folder.is_dir():
        return
    check_present(folder)
    _check_further_weights(folder)
    if not (folder / "config.json").is_file():
        _check_place(folder)


def check_present(folder: Path) -> None:
    """Refuse broken links and Git LFS pointers.

    Raises:
        ConfigError: with the file, and how to get it.
    """
    for path in _files(folder):
        _check_present(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        OSError: if the file cannot be read.
        ConfigError: if it is not JSON, or not an object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{path} is not JSON: {e}") from e
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected a JSON object; found {type(config).__name__}")
    return config


def unpickling(names: list[str], target: str = "model.safetensors") -> str:
    """Return how to convert pickled weights to safetensors, including a head that transformers' class would drop."""
    shards = [name for name in names if name.startswith("pytorch_model") and name.endswith(".bin")]
    files = "glob.glob('pytorch_model*.bin')" if shards else f"[{names[0]!r}]"
    return (
        "Convert it in its folder, if you trust it: "
        'python -c "import glob, torch; from safetensors.torch import save_file; w = {}; '
        f"[w.update(torch.load(f, map_location='cpu', weights_only=True)) for f in {files}]; "
        f"save_file({{n: t.clone().contiguous() for n, t in w.items()}}, '{target}', {{'format': 'pt'}})\""
    )


def _files(folder: Path) -> Iterator[Path]:
    for pattern in _READ:
        yield from sorted(folder.glob(pattern))


def _check_present(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise ConfigError(
            f"{path} is a link to {path.readlink()}, which does not exist: a folder of a hub's cache contains links to "
            "'blobs' next to it; copy the folder with `cp -rL`, which follows links, or download the checkpoint again"
        )
    if not path.is_file():
        return
    try:
        with path.open("rb") as file:
            pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return  # reading it later reports the reason
    if pointer:
        raise ConfigError(
            f"{path} is a Git LFS pointer instead of the file itself; run `git lfs pull` in the clone, or pass the "
            "repository's id on the hub instead of a folder"
        )


def _check_further_weights(folder: Path) -> None:
    """Refuse further safetensors, because a head in a separate file would be ignored."""
    further = [path.name for path in sorted(folder.glob("*.safetensors")) if not any(map(path.match, _UNREAD))]
    if further and (folder / "model.safetensors.index.json").is_file():
        # Shards may have any name.
        named = read_json(folder / "model.safetensors.index.json").get("weight_map")
        further = [name for name in further if not isinstance(named, dict) or name not in named.values()]
    if further:
        raise ConfigError(
            f"{folder}: {', '.join(further[:4])} would not be read; expected all weights in model.safetensors, or in "
            "the shards of model.safetensors.index.json. Add the tensors there, under the names listed in "
            "docs/reward_models.md, or move the file out of the folder"
        )


def _check_place(folder: Path) -> None:
    """Suggest a checkpoint inside a folder that is not one itself."""
    inner = sorted(path.parent.relative_to(folder) for path in folder.glob("*/config.json"))
    inner += sorted(path.parent.relative_to(folder) for path in folder.glob("snapshots/*/config.json"))
    if inner:
        kind = "the hub's cache of a repository" if (folder / "snapshots").is_dir() else "not a checkpoint itself"
        raise ConfigError(
            f"{folder} is {kind}: it has no config.json, but its subfolder {inner[0]} does; pass {folder / inner[0]}"
        )
    if files := sorted(folder.glob("*.gguf")):
        raise ConfigError(f"{folder} has no config.json, but contains GGUF files; pass one of them, such as {files[0]}")

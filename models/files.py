"""A checkpoint's folder before anything of it is read: what is whole, and what only stands in for a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .adapters import check_adapter_files
from .config import ConfigError

__all__ = ["check_folder", "check_present", "read_json", "unpickling"]

# How the small text begins that Git LFS leaves where a file was not downloaded.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_READ = ("*.json", "*.jinja", "*.safetensors", "additional_chat_templates/*.jinja")
# Weights that lie beside the model's own: other formats of the same, and what no model is computed with.
_UNREAD = (
    "model.safetensors",
    "model.*.safetensors",
    "model-*-of-*.safetensors",
    "consolidated*",
    "adapter_model*",
    "optimizer*",
)


def check_folder(folder: Path) -> None:
    """Refuse a folder whose files would be read as something else than they are, or passed over.

    Raises:
        ConfigError: it holds an adapter, a head in a file of its own, a pointer of Git LFS or a link to nothing, or it
            is no checkpoint but has some inside.
    """
    if not folder.is_dir():
        return
    check_present(folder)
    check_adapter_files(folder)
    _check_further_weights(folder)
    if not (folder / "config.json").is_file():
        _check_place(folder)


def check_present(folder: Path) -> None:
    """Refuse a link to nothing, and the small text that Git LFS leaves where a file was not downloaded.

    Raises:
        ConfigError: names the file, and how to get it.
    """
    for path in _files(folder):
        _check_present(path)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: it cannot be read.
        ConfigError: it is not JSON, or no object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{path} is not JSON: {e}") from e
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected a JSON object; found {type(config).__name__}")
    return config


def unpickling(names: list[str]) -> str:
    """How the weights in these pickles become safetensors, the head too, which a class that lacks it would drop."""
    shards = [name for name in names if name.startswith("pytorch_model") and name.endswith(".bin")]
    files = "glob.glob('pytorch_model*.bin')" if shards else f"[{names[0]!r}]"
    return (
        "Convert it in its folder, if you trust it: "
        'python -c "import glob, torch; from safetensors.torch import save_file; w = {}; '
        f"[w.update(torch.load(f, map_location='cpu', weights_only=True)) for f in {files}]; "
        "save_file({n: t.clone().contiguous() for n, t in w.items()}, 'model.safetensors', {'format': 'pt'})\""
    )


def _files(folder: Path) -> Iterator[Path]:
    for pattern in _READ:
        yield from sorted(folder.glob(pattern))


def _check_present(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise ConfigError(
            f"{path} is a link to {path.readlink()}, which is not there: a folder of a hub's cache holds links into "
            "'blobs' beside it; copy it with its links followed (`cp -rL`), or download the checkpoint again"
        )
    if not path.is_file():
        return
    try:
        with path.open("rb") as file:
            pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return  # who reads it says why it cannot be read
    if pointer:
        raise ConfigError(
            f"{path} is a pointer of Git LFS, and not the file itself; run `git lfs pull` in the clone, or pass the "
            "id of the repository on the hub instead of a folder"
        )


def _check_further_weights(folder: Path) -> None:
    """Refuse safetensors that are not the model's own: a head in a file of its own would be passed over."""
    further = [path.name for path in sorted(folder.glob("*.safetensors")) if not any(map(path.match, _UNREAD))]
    if further and (folder / "model.safetensors.index.json").is_file():
        # Shards may have any name.
        named = read_json(folder / "model.safetensors.index.json").get("weight_map")
        further = [name for name in further if not isinstance(named, dict) or name not in named.values()]
    if further:
        raise ConfigError(
            f"{folder}: {', '.join(further[:4])} would not be read; expected all weights in model.safetensors, or in "
            "the shards of model.safetensors.index.json. Put the tensors in there, under the names that "
            "docs/reward_models.md lists, or take the file out of the folder"
        )


def _check_place(folder: Path) -> None:
    """Say which folder was meant, where this one only holds checkpoints."""
    inner = sorted(path.parent.relative_to(folder) for path in folder.glob("*/config.json"))
    inner += sorted(path.parent.relative_to(folder) for path in folder.glob("snapshots/*/config.json"))
    if inner:
        kind = "the hub's cache of a repository" if (folder / "snapshots").is_dir() else "not a checkpoint itself"
        raise ConfigError(
            f"{folder} is {kind}: it has no config.json, but {inner[0]} in it has one; pass {folder / inner[0]}"
        )

"""Tensors of a checkpoint's safetensors files, one or many, read when they are asked for. Nothing is ever unpickled."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import safetensors
import torch
from safetensors import safe_open
from torch import Tensor

from .config import ConfigError

__all__ = ["WEIGHTS_FILE", "Weights"]

WEIGHTS_FILE = "model.safetensors"
_INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
_FLOATS = {"F64", "F32", "F16", "BF16"}
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class Weights:
    """The tensors of a folder.

    Attributes:
        shapes: of each tensor, by its name.

    Raises:
        ConfigError: no safetensors file, one that the index names is missing, or one cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path, promised in _shards(folder).items():
            with _reading(path), safe_open(path, framework="pt") as file:
                found = set(file.keys())
                for name in file.keys():  # noqa: SIM118 - a file is no dictionary
                    part = file.get_slice(name)
                    if part.get_dtype() not in _FLOATS:
                        raise ConfigError(
                            f"{path}: tensor '{name}' is {part.get_dtype()}; expected float32, float16 or bfloat16: "
                            "pass the checkpoint as it was before it was quantized"
                        )
                    self._files[name], self.shapes[name] = path, tuple(part.get_shape())
            if missing := sorted(promised - found):
                raise ConfigError(
                    f"{path}: the index names tensor '{missing[0]}', which is not in it; get the file again"
                )

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._files[name]

    def read(self, names: dict[str, str]) -> dict[str, Tensor]:
        """Tensors as float32, file by file: {ours: theirs} -> {ours: tensor}.

        Raises:
            ConfigError: a tensor holds NaN or infinity.
        """
        found: dict[str, Tensor] = {}
        for path in dict.fromkeys(self._files[theirs] for theirs in names.values()):
            with _reading(path), safe_open(path, framework="pt") as file:
                for ours, theirs in names.items():
                    if self._files[theirs] != path:
                        continue
                    tensor = file.get_tensor(theirs).to(torch.float32)
                    if not torch.isfinite(tensor).all():
                        raise ConfigError(f"{path}: tensor '{theirs}' holds NaN or infinity; the training went wrong")
                    found[ours] = tensor
        return found


def _shards(folder: Path) -> dict[Path, set[str]]:
    """The files, and the tensors that the index promises of each."""
    single, index = folder / WEIGHTS_FILE, folder / _INDEX_FILE
    if single.is_file() or not index.is_file():
        pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
        if not single.is_file() and pickled:
            raise ConfigError(
                f"{folder}: {pickled[0]} is a pickle, which can run any code when it is opened, and is never read; "
                f"expected {WEIGHTS_FILE}: save the model again with safetensors "
                "(`save_pretrained` of transformers does)"
            )
        return {single: set()}
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[Path, set[str]] = {}
        for name, file in names.items():
            if Path(file).name != file:
                raise ConfigError(f"{index}: '{file}' leaves the checkpoint's folder; refused")
            shards.setdefault(folder / file, set()).add(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ConfigError(f"{index} is not an index of shards ({e!r}); expected a JSON object with 'weight_map'") from e
    if missing := sorted(path.name for path in shards if not path.is_file()):
        raise ConfigError(
            f"{folder}: {len(missing)} of {len(shards)} shards are missing, {missing[0]} first ({_INDEX_FILE} names "
            "them); download the checkpoint again"
        )
    return shards


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, safetensors.SafetensorError) as e:
        raise ConfigError(f"cannot read the weights {path}: {e}") from e

"""Read the tensors of a checkpoint's safetensors files on demand. Nothing is ever unpickled."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import safetensors
import torch
from safetensors import safe_open
from torch import Tensor

from .config import ConfigError
from .files import unpickling

__all__ = ["INDEX_FILE", "WEIGHTS_FILE", "TensorReader", "Weights"]

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
# The head of a model that LLaMA-Factory trained, beside the weights of the others.
_VALUE_HEAD_FILE, _PICKLED_VALUE_HEAD = "value_head.safetensors", "value_head.bin"
# Counters of batch norms and of running means, which inference does not read.
_COUNTERS = (".num_batches_tracked", "normalizer.count")
_FLOATS = {"F64", "F32", "F16", "BF16"}
# Values that are read at a time, so that no tensor is in memory twice.
_PART = 2**22
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class TensorReader(Protocol):
    """The tensors of a checkpoint, in whatever files they are.

    Attributes:
        shapes: the shape of each tensor, by name.
    """

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """Read tensors of one or more axes as float32: {our name: name in the file} -> {our name: tensor}.

        Raises:
            ConfigError: if a file cannot be read, or a tensor contains NaN or infinity.
        """

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Read some rows of a tensor as float32.

        Raises:
            ConfigError: as `read`.
        """


class Weights:
    """The tensors of a folder's safetensors files, a `TensorReader`.

    Args:
        folder: the checkpoint.
        file: the file to read; by default model.safetensors, or its shards.

    Attributes:
        shapes: the shape of each tensor, by name.

    Raises:
        ConfigError: if there is no safetensors file, one that the index lists is missing, or one cannot be read.
    """

    def __init__(self, folder: Path, file: str | None = None) -> None:
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        files = {folder / file: set[str]()} if file else _shards(folder)
        for path, promised in (files | _value_head(folder)).items():
            with _reading(path), safe_open(path, framework="pt") as opened:
                present = set(opened.keys())
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    if name.endswith(_COUNTERS):
                        continue
                    if name in self._files:
                        raise ConfigError(f"{path}: tensor '{name}' is in {self._files[name].name} too")
                    part = opened.get_slice(name)
                    if part.get_dtype() not in _FLOATS:
                        raise ConfigError(
                            f"{path}: tensor '{name}' is {part.get_dtype()}; expected float32, float16 or bfloat16: "
                            "pass the checkpoint as it was before quantization"
                        )
                    self._files[name], self.shapes[name] = path, tuple(part.get_shape())
            if missing := sorted(promised - present):
                raise ConfigError(
                    f"{path}: the index lists tensor '{missing[0]}', which the file lacks; download the file again"
                )

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def file(self, name: str) -> Path:
        """Return the path of the file that contains a tensor."""
        return self._files[name]

    def read(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """Read tensors of one or more axes as float32: {our name: name in the file} -> {our name: tensor}.

        Raises:
            ConfigError: if a tensor contains NaN or infinity.
        """
        tensors: dict[str, Tensor] = {}
        for ours, theirs in names.items():
            tensors[ours] = tensor = torch.empty(self.shapes[theirs])
            step = max(1, _PART * len(tensor) // max(1, tensor.numel()))
            for start in range(0, len(tensor), step):
                place = slice(start, start + step)
                tensor[place] = self._part(theirs, place)
        return tensors

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Read some rows of a tensor as float32, without reading the others.

        Raises:
            ConfigError: if they contain NaN or infinity.
        """
        return torch.cat([self._part(name, slice(row, row + 1)) for row in rows])

    def _part(self, name: str, place: slice) -> Tensor:
        """Read rows that follow each other as float32, and refuse NaN and infinity."""
        path = self._files[name]
        # Opened for each part, because the pages of an open file stay in memory.
        with _reading(path), safe_open(path, framework="pt") as file:
            part: Tensor = file.get_slice(name)[place].to(torch.float32)
        if not part.isfinite().all():
            raise ConfigError(
                f"{path}: tensor '{name}' contains NaN or infinity, probably because the training diverged; pass "
                "another checkpoint"
            )
        return part


def _value_head(folder: Path) -> dict[Path, set[str]]:
    """Return the file of a value head beside the weights, if there is one."""
    path, pickled = folder / _VALUE_HEAD_FILE, folder / _PICKLED_VALUE_HEAD
    if not path.is_file() and pickled.is_file():
        raise ConfigError(
            f"{pickled} is a pickle, which can run any code when it is opened, so it is never read; expected "
            f"{_VALUE_HEAD_FILE}. {unpickling([_PICKLED_VALUE_HEAD], _VALUE_HEAD_FILE)}"
        )
    return {path: set()} if path.is_file() else {}


def _shards(folder: Path) -> dict[Path, set[str]]:
    """Return the files, and the tensors that the index lists for each."""
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if single.is_file() or not index.is_file():
        pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
        if not single.is_file() and pickled:
            raise ConfigError(
                f"{folder}: {pickled[0]} is a pickle, which can run any code when it is opened, so it is never read; "
                f"expected {WEIGHTS_FILE}. {unpickling(pickled)}"
            )
        return {single: set()}
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[Path, set[str]] = {}
        for name, file in names.items():
            if Path(file).name != file:
                raise ConfigError(f"{index}: expected the names of files in the checkpoint's folder; got '{file}'")
            shards.setdefault(folder / file, set()).add(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ConfigError(f"{index} is not a shard index ({e!r}); expected a JSON object with 'weight_map'") from e
    if missing := sorted(path.name for path in shards if not path.is_file()):
        raise ConfigError(
            f"{folder}: {len(missing)} of the {len(shards)} shards listed in {INDEX_FILE} are missing, such as "
            f"{missing[0]}; download the checkpoint again"
        )
    return shards


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, safetensors.SafetensorError) as e:
        raise ConfigError(f"cannot read the weights {path}: {e}") from e

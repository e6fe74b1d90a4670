"""Read the tensors and metadata of GGUF files, the format of llama.cpp, by the names of transformers.

The tensors stay in the file, quantized, until they are read. `gguf_config.py` says what metadata and names mean.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import ConfigError

__all__ = ["GGUFFile", "GGUFWeights", "Stored", "read_gguf"]

# Values that are dequantized at a time, so that no tensor is in memory twice.
_PART = 2**22
_VOCABULARY = {f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type", "merges")}
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class Stored:
    """Where a tensor is.

    Attributes:
        path: the file.
        offset: of its first byte.
        shape: its shape, in the order of PyTorch.
        kind: its quantization, a member of `gguf.GGMLQuantizationType`.
        row_bytes: bytes of each row, the values along the last axis.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    kind: Any
    row_bytes: int


@dataclass(frozen=True)
class GGUFFile:
    """What a GGUF file contains.

    Attributes:
        path: the file, the first if there are several.
        metadata: the values by their keys.
        tensors: where each tensor is, by its name in the file.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]


def read_gguf(path: Path) -> GGUFFile:
    """Read the metadata of a GGUF file, and of the others if the model was split.

    Raises:
        ConfigError: if the package `gguf` is not installed, a file is missing, damaged or of another byte order, or a
            tensor has a quantization that the package cannot undo.
    """
    try:
        import gguf
    except ModuleNotFoundError as e:
        raise ConfigError(f"{path}: {e.name} is not installed; run `pip install bonnx[gguf]`") from e
    metadata: dict[str, Any] = {}
    tensors: dict[str, Stored] = {}
    for file in _files(path):
        try:
            reader = gguf.GGUFReader(file)
            # Of the vocabulary nothing is needed here, and it takes long to decode.
            fields = {key: value.contents() for key, value in reader.fields.items() if key not in _VOCABULARY}
            for tensor in reader.tensors:
                block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
                shape = tuple(int(size) for size in reversed(tensor.shape))
                row = shape[-1] // block * block_bytes
                tensors[tensor.name] = Stored(file, int(tensor.data_offset), shape, tensor.tensor_type, row)
        except Exception as e:  # the library raises what numpy and its enums happen to raise
            raise ConfigError(
                f"{file} cannot be read as GGUF: {e}; download it again, or update the package `gguf`, which may not "
                "know its quantization yet"
            ) from e
        if reader.byte_order != "I":
            raise ConfigError(f"{file} is of the other byte order; convert it with gguf_convert_endian.py of llama.cpp")
        metadata = fields | metadata
    _check_quantizations(tensors)
    return GGUFFile(path, metadata, tensors)


class GGUFWeights:
    """The tensors of a GGUF file, a `TensorReader`.

    Args:
        tensors: where each tensor is, by the name that transformers gives it.
        changes: name -> what undoes llama.cpp's change of this tensor.

    Attributes:
        shapes: the shape of each tensor, by name.
    """

    def __init__(self, tensors: Mapping[str, Stored], changes: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        self._tensors, self._changes = tensors, changes
        self.shapes = {name: stored.shape for name, stored in tensors.items()}

    def read(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """Dequantize tensors to float32: {our name: name} -> {our name: tensor}.

        Raises:
            ConfigError: if a file is too short, or a tensor contains NaN or infinity.
        """
        tensors = {}
        for ours, theirs in names.items():
            shape = self.shapes[theirs]
            tensor = torch.empty(shape)
            rows = tensor.view(-1, shape[-1])
            step = max(1, _PART // max(1, shape[-1]))
            for start in range(0, len(rows), step):
                stop = min(start + step, len(rows))
                rows[start:stop] = self._rows(theirs, start, stop)
            change = self._changes.get(theirs)
            tensors[ours] = tensor if change is None else change(tensor).contiguous()
        return tensors

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Dequantize some rows of a matrix, without the others.

        Raises:
            ConfigError: as `read`.
        """
        if name in self._changes:
            return self.read({name: name})[name][list(rows)].clone()
        return torch.cat([self._rows(name, row, row + 1) for row in rows])

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        from gguf import dequantize

        stored = self._tensors[name]
        count = (stop - start) * stored.row_bytes
        try:
            data = np.fromfile(stored.path, np.uint8, count, offset=stored.offset + start * stored.row_bytes)
        except OSError as e:
            raise ConfigError(f"cannot read the weights {stored.path}: {e}") from e
        if len(data) != count:
            raise ConfigError(f"{stored.path} ends within tensor '{name}'; download the file again")
        with np.errstate(all="ignore"):
            values = dequantize(data.reshape(stop - start, -1), stored.kind).astype(np.float32, copy=False)
        if not np.isfinite(values).all():
            raise ConfigError(
                f"{stored.path}: tensor '{name}' contains NaN or infinity, probably because the training diverged; "
                "pass another checkpoint"
            )
        return torch.from_numpy(values)


def _files(path: Path) -> list[Path]:
    """Return the files of a model; a split model has several, numbered from 1."""
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match[3])
    files = [path.with_name(f"{match[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ConfigError(
            f"{path}: {len(missing)} of the {count} files of this model are missing, such as {missing[0]}; download "
            f"them to {path.parent}"
        )
    return files


def _check_quantizations(tensors: Mapping[str, Stored]) -> None:
    """Refuse quantizations that the package knows but cannot undo."""
    from gguf import GGML_QUANT_SIZES, dequantize

    for kind in sorted({stored.kind for stored in tensors.values()}):
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except Exception as e:
            name = next(name for name, stored in tensors.items() if stored.kind == kind)
            raise ConfigError(
                f"{tensors[name].path}: tensor '{name}' is quantized as {kind.name}, which the package `gguf` cannot "
                "dequantize; update it, or pass the model in another quantization"
            ) from e

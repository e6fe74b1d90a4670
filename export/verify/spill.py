"""Move a model's weights from memory into a temporary file, from which they are read where they are needed."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ..graphs.write import raw_bytes

__all__ = ["free", "spill", "trim"]

# Bytes: smaller tensors stay in memory. Alignment as in the artifact's weights.
_LEAST, _ALIGNMENT = 2**16, 64


def spill(model: nn.Module, folder: Path) -> Callable[[], None]:
    """Let a model read its weights from a file without a name in `folder`, which vanishes with the weights.

    Other tensors that share their memory, as the tracer's do, lose their values. If there is no room in the folder, the
    model stays as it is.

    Returns:
        a function that drops what was read of the file from memory, until it is read again.
    """
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in _tensors(model)}
    places = dict[int, int]()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for address, storage in storages.items():
                file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                places[address] = file.tell()
                file.write(raw_bytes(storage))
            if not places:
                return lambda: None
            file.flush()
            # Of the pages of a private mapping, only those that are written to would be copied, and none is.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError:
        return lambda: None
    for tensor in _tensors(model):
        storage = tensor.untyped_storage()
        whole = torch.frombuffer(
            mapped, dtype=tensor.dtype, count=storage.nbytes() // tensor.itemsize, offset=places[storage.data_ptr()]
        )
        tensor.data = whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    for storage in storages.values():
        if storage.resizable():
            storage.resize_(0)
    # The last references to storages that cannot be resized.
    del storage
    storages.clear()
    trim()

    def forget() -> None:
        trim()
        if hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)

    return forget


def free(model: nn.Module) -> None:
    """Free a module's memory, even if the tracer still holds references to its tensors."""
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        tensor.data = torch.empty(0)
        if storage.resizable():
            storage.resize_(0)
    trim()


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.untyped_storage().nbytes() >= _LEAST:
            yield tensor


def trim() -> None:
    """Return freed memory to the system."""
    gc.collect()
    # The C library keeps freed memory in its own pools; glibc can be asked to return it to the system.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)

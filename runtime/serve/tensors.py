"""Tensors that a client fills itself: their sizes and values are checked before a graph sees them."""

from __future__ import annotations

import numpy as np

from ..errors import InputError
from ..jobs import Shape
from ..limits import check_size
from ..manifest import AGGREGATIONS, VOTES
from ..model import Model
from ..session import Array

__all__ = ["check_feeds"]

# Names of scalars, the least and the greatest value of each.
_RANGES: dict[str, tuple[float, float]] = {
    "aggregation": (0, len(AGGREGATIONS) - 1),
    "vote": (0, len(VOTES) - 1),
    "temperature": (0, 1e30),
    "top_k": (0, 2**31),
    "top_p": (1e-30, 1),
    "prune_every": (0, 2**31),
    "prune_keep": (1e-30, 1),
    "num_candidates": (1, 2**31),
    "max_new_tokens": (1, 2**31),
}


def check_feeds(graph: str, feeds: dict[str, Array], model: Model) -> Shape:
    """How much a graph is to compute; work beyond the model's limits is refused.

    Args:
        graph: its name.
        feeds: all of its inputs, of the ranks and types that the manifest says.
        model: whose graph it is.

    Raises:
        InputError: a size or a value is out of bounds.
    """
    for name, array in feeds.items():
        if name in _RANGES and not _RANGES[name][0] <= array.item() <= _RANGES[name][1]:
            raise InputError(f"{name}: expected {_RANGES[name][0]:g} to {_RANGES[name][1]:g}; got {array.item()!r}")
        if not array.size and name != "stop_tokens":
            raise InputError(f"{name}: it has no elements; its shape is {list(array.shape)}")
        if name.endswith("ids") and name != "answer_ids":
            _check_ids(name, array, model.reader.vocabulary)
    columns, shape = _shape(graph, feeds)
    limit = model.options.memory_limit
    check_size(
        model.manifest, shape.candidates, shape.prompt, shape.length, None if limit is None else limit // columns
    )
    return Shape(columns * shape.candidates, columns * shape.prompt, shape.length)


def _check_ids(name: str, array: Array, vocabulary: int | None) -> None:
    if vocabulary is not None and array.dtype == np.int64 and array.size:
        worst = array.min() if array.min() < 0 else array.max()
        if not 0 <= worst < vocabulary:
            raise InputError(f"{name}: token id {worst} is outside the vocabulary (0 to {vocabulary - 1})")


def _shape(graph: str, feeds: dict[str, Array]) -> tuple[int, Shape]:
    """Columns, and the shape of each."""
    if graph == "rank":
        candidates = next(array for name, array in feeds.items() if name.startswith("candidate_"))
        prompt = next(array for name, array in feeds.items() if name.startswith("prompt_"))
        return candidates.shape[1], Shape(candidates.shape[0], prompt.shape[1], candidates.shape[2])
    if graph == "score":
        rows, length = feeds["attention_mask"].shape
        count = int(feeds["num_candidates"])
        if rows % count:
            raise InputError(f"num_candidates: {count} do not divide {rows} rows")
        return rows // count, Shape(count, 0, length)
    mask = feeds["attention_mask"]
    return len(mask), Shape(int(feeds["num_candidates"]), mask.shape[1], int(feeds["max_new_tokens"]))

"""Tensors from clients: their sizes and values are checked before a graph reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from bonnx.errors import InputError

from ..arrays import Array
from ..artifact.limits import check_size
from ..artifact.manifest import AGGREGATIONS, VOTES, Graph, Limits
from ..batching import Shape
from ..engine.engine import Engine
from ..engine.session import Stop

__all__ = ["MOST_STOPS", "GraphRequest", "check_feeds", "check_shapes"]

# The minimum and maximum of each value, by the input's name.
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
# Every token of every candidate is compared with each of them.
MOST_STOPS = 1024


class GraphRequest:
    """A run of one graph on tensors that the client filled.

    Attributes:
        run: runs the graph; takes the handle that stops the run.
        shape: the size of the work.
    """

    key = None
    prompt_slot = 0

    def __init__(self, run: Callable[[Stop], Sequence[Array]], shape: Shape) -> None:
        self.run, self.shape, self.tokens = run, shape, shape.candidates * shape.length


# Axes that hold one value for all of another axis, or as many values as that has.
_BROADCAST = {
    "rank": {
        "step_candidates": "num_candidates",
        "step_batch": "batch",
        "step_length": "length",
        "answer_candidates": "num_candidates",
        "answer_batch": "batch",
    },
    "score": {"step_length": "sequence"},
}


def check_shapes(name: str, graph: Graph, shapes: Mapping[str, list[int]], limits: Limits) -> None:
    """Refuse shapes that do not fit each other or the model's limits, before a tensor is created.

    Args:
        name: name of the graph.
        graph: its inputs name the axes.
        shapes: the shape of every input, of the rank that the graph declares, or (batch) for one value for each prompt.
        limits: the model's limits.

    Raises:
        InputError: names the input and the axis.
    """
    axes: dict[str, tuple[int, str]] = {}
    for value in graph.inputs:
        declared = ["batch"] if value.name in graph.per_prompt and shapes[value.name] else value.shape
        for axis, size in zip(declared, shapes[value.name], strict=True):
            if size == 0 and axis != "stops":
                raise InputError(f"{value.name}: expected at least one element; got the shape {shapes[value.name]}")
            if not isinstance(axis, str):
                continue
            first, where = axes.setdefault(axis, (size, value.name))
            if size != first:
                raise InputError(f"{value.name}: its axis '{axis}' is {size}, that of {where} {first}; expected equal")
    sizes = {axis: size for axis, (size, _) in axes.items()}
    for axis, other in _BROADCAST.get(name, {}).items():
        if axis in axes and sizes[axis] not in (1, sizes[other]):
            raise InputError(f"{axes[axis][1]}: its axis '{axis}' is {sizes[axis]}; expected 1 or {sizes[other]}")
    if sizes.get("stops", 0) > MOST_STOPS:
        raise InputError(f"stop_tokens: {sizes['stops']} are too many; this server takes at most {MOST_STOPS}")
    tokens = sizes.get("sequence", sizes.get("prompt_length", 0) + sizes.get("length", 0))
    if tokens > limits.max_tokens:
        raise InputError(f"{tokens} tokens in a row: this model takes at most {limits.max_tokens}; shorten them")
    candidates = sizes.get("num_candidates", 0)
    if candidates > limits.max_candidates:
        raise InputError(f"{candidates} candidates: this model takes at most {limits.max_candidates}; split them")


def check_feeds(graph: str, feeds: dict[str, Array], engine: Engine) -> Shape:
    """The shape of a graph's work; work beyond the model's limits is refused.

    Args:
        graph: its name.
        feeds: all of its inputs, of the dtypes in the manifest, with checked shapes.
        engine: the engine of the graph.

    Raises:
        InputError: a size or a value is out of bounds.
    """
    for name, array in feeds.items():
        if name in _RANGES:
            least, most = _RANGES[name]
            # Not `array < least`, so that NaN is refused too.
            wrong = array[~((array >= least) & (array <= most))].ravel()
            if wrong.size:
                raise InputError(f"{name}: expected {least:g} to {most:g}; got {wrong[0].item()!r}")
        if name.endswith("_mask") and ((array != 0) & (array != 1)).any():
            raise InputError(f"{name}: expected 0 or 1 everywhere; got {array[(array != 0) & (array != 1)][0]}")
        if name.endswith("ids") and name != "answer_ids":
            _check_ids(name, array, engine.reader.vocabulary)
    prompts, shape = _shape(graph, feeds)
    last = int((feeds["stop_tokens"] >> 32).max(initial=0)) if "stop_tokens" in feeds else 0
    if last > prompts:
        raise InputError(f"stop_tokens: the upper 32 bits name prompt {last}, counted from 1; there are {prompts}")
    limit = engine.memory_limit
    check_size(
        engine.manifest, shape.candidates, shape.prompt, shape.length, None if limit is None else limit // prompts
    )
    return Shape(prompts * shape.candidates, prompts * shape.prompt, shape.length)


def _check_ids(name: str, array: Array, vocabulary: int | None) -> None:
    if vocabulary is not None and array.size:
        worst = array.min() if array.min() < 0 else array.max()
        if not 0 <= worst < vocabulary:
            raise InputError(f"{name}: token id {worst} is outside the vocabulary (0 to {vocabulary - 1})")


def _shape(graph: str, feeds: dict[str, Array]) -> tuple[int, Shape]:
    """The number of prompts, and the shape of the work for each."""
    if graph == "rank":
        candidates, prompts, length = feeds["candidate_mask"].shape
        return prompts, Shape(candidates, feeds["prompt_mask"].shape[1], length)
    if graph == "score":
        rows, length = feeds["attention_mask"].shape
        count = int(feeds["num_candidates"])
        if rows % count:
            raise InputError(f"num_candidates: {count} do not divide {rows} rows")
        prompts = rows // count
        for name in ("step_mask", "answer_ids"):
            sizes, wanted = feeds[name].shape[:2], (count, prompts)
            if any(size not in (1, whole) for size, whole in zip(sizes, wanted, strict=True)):
                raise InputError(
                    f"{name}: expected {count} candidates and {prompts} prompts, or 1, as its first axes; "
                    f"got {[*sizes]}"
                )
        return prompts, Shape(count, 0, length)
    mask = feeds["attention_mask"]
    candidates, length = (int(feeds[name].max()) for name in ("num_candidates", "max_new_tokens"))
    return len(mask), Shape(candidates, mask.shape[1], length)

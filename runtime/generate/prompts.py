"""Prompts that are read before their candidates grow, and the slots in which those of a batch lie side by side.

Shapes: B prompts, P the width of a slot; the others as in the graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..arrays import Array
from ..artifact.manifest import Graph
from ..engine.device import HeldArray, on_host
from ..engine.prompt_cache import as_past, nothing_read
from ..engine.session import Session, Stop
from .options import CheckedOptions

__all__ = ["Joining", "PromptSlots", "ReadPrompt", "read_prompts"]

# What `shared_keys` of the export writes where there is no token.
MASKED = np.float32(-1e30)


@dataclass(eq=False)
class Joining:
    """A generation that is about to join, while its prompt is read.

    Attributes:
        prompt: (P,) int64.
        options: how to generate.
        ends: as in `Growing`.
        deadline: on the clock of `time.monotonic`, or None.
        read: how many tokens of the prompt have been read.
        past: keys and values of these, by the names of `prefill`'s inputs, and their hash.
    """

    prompt: Array
    options: CheckedOptions
    ends: Callable[[Array], bool] | None = None
    deadline: float | None = None
    read: int = 0
    past: dict[str, HeldArray] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ReadPrompt:
    """A prompt that has been read, and the first tokens that were drawn after it.

    Attributes:
        cache: keys and values by the names of `decode`'s inputs, (1, G, K + 2, P + 1) or (1, G, P + 1, K).
        mask: (P,) int64.
        stream: the key of its random numbers.
        tokens: (n,) int64.
        log_probs: (n,) float32.
        certainty: of the distribution of the first token, without a scorer; otherwise NaN.
        logits: of that distribution, (V,) float32, if they were asked for.
    """

    cache: dict[str, Array]
    mask: Array
    stream: int
    tokens: Array
    log_probs: Array
    certainty: float
    logits: Array | None


def read_prompts(
    session: Session,
    joining: Sequence[Joining],
    count: int | None = None,
    *,
    logits: bool = False,
    stop: Stop | None = None,
) -> list[ReadPrompt]:
    """Read the next `count` tokens of a prompt that has more, or all that are left of several prompts, in one run.

    Args:
        session: of `prefill`.
        joining: several only if none of their tokens have been read.
        count: None for all that are left.
        logits: return those of the first tokens.
        stop: ends the run.

    Returns:
        nothing for a piece of a prompt; otherwise the prompts.
    """
    first = joining[0]
    begin = first.read
    end = max(len(each.prompt) for each in joining) if count is None else begin + count
    if not begin:
        first.past = session.hold(nothing_read(session.graph, len(joining)))
    ids, mask = np.zeros((len(joining), end - begin), np.int64), np.zeros((len(joining), end), np.int64)
    for row, each in enumerate(joining):
        piece = each.prompt[begin:end]
        ids[row, : len(piece)] = piece
        mask[row, : begin + len(piece)] = 1
    feeds: dict[str, Array | HeldArray] = {"input_ids": ids, "attention_mask": mask, **first.past}
    feeds["num_candidates"] = np.array([1 if count is not None else each.options.n for each in joining])
    feeds["seed"] = np.array([each.options.seed for each in joining])
    drawing = [each.options.drawing() for each in joining]
    feeds |= {name: np.stack([options[name] for options in drawing]) for name in drawing[0]}
    outputs = session.values(feeds, logits=logits, stop=stop)
    cache = {name: value for name, value in outputs.items() if name.startswith(("prompt_key", "prompt_value"))}
    if count is not None:
        first.past = {**as_past(cache), "past_hash": outputs["prompt_hash"]}
        first.read = end
        return []
    first.past = {}
    arrays = {name: on_host(value) for name, value in cache.items()}
    tokens, log_probs, streams = (on_host(outputs[name]) for name in ("tokens", "log_probs", "stream"))
    sure = on_host(outputs["certainty"]) if "certainty" in outputs else np.full(len(joining), np.nan)
    of_first = on_host(outputs["logits"]) if logits else None
    return [
        ReadPrompt(
            {name: array[b : b + 1] for name, array in arrays.items()},
            mask[b],
            int(streams[b]),
            tokens[: each.options.n, b],
            log_probs[: each.options.n, b],
            float(sure[b]),
            None if of_first is None else of_first[b],
        )
        for b, each in enumerate(joining)
    ]


class PromptSlots:
    """The prompts of a batch, side by side.

    Attributes:
        count: how many there are.
        width: tokens for which each slot has room.
        changes: how often a prompt was added or removed.
        arrays: (capacity, ...), of which the first `count` are in use: keys and values by the names of `decode`'s
            inputs, `attention_mask`, `stream`, and how to draw.

    Args:
        graph: that reads them.
        step: widths are multiples of it, so that a slightly longer prompt needs no other slots.
        exact: the first slot is as wide as its prompt: a single generation pays for no padding.
    """

    def __init__(self, graph: Graph, step: int = 32, *, exact: bool = True) -> None:
        self._shapes = {
            value.name: value.shape for value in graph.inputs if value.name.startswith(("prompt_key", "prompt_value"))
        }
        self._step, self._exact = step, exact
        self.count = self.width = self.changes = 0
        self.arrays: dict[str, Array] = {}

    def add(self, read: ReadPrompt, options: CheckedOptions) -> int:
        """Write a prompt into a slot, and return its number."""
        length = len(read.mask)
        self._make_room(self.count + 1, length)
        slot, self.count = self.count, self.count + 1
        self.changes += 1
        for name, array in read.cache.items():
            place = self.arrays[name][slot]
            if name.startswith("prompt_key"):
                place[..., : length + 1] = array[0]
                place[..., length + 1 :] = 0
                # The row behind the features holds the mask.
                place[:, -2, length + 1 :] = MASKED
            else:
                place[:, : length + 1] = array[0]
                place[:, length + 1 :] = 0
        mask = self.arrays["attention_mask"][slot]
        mask[:length], mask[length:] = read.mask, 0
        self.arrays["stream"][slot] = read.stream
        for name, value in options.drawing().items():
            self.arrays[name][slot] = value
        return slot

    def length(self, slot: int) -> int:
        """The tokens of a slot's prompt."""
        return int(self.arrays["attention_mask"][slot].sum())

    def remove(self, slot: int) -> int:
        """Free a slot; the prompt of the last slot, whose number is returned, moves there."""
        self.count -= 1
        self.changes += 1
        for array in self.arrays.values():
            array[slot] = array[self.count]
        if not self.count:
            self.arrays, self.width = {}, 0
        return self.count

    def _make_room(self, count: int, length: int) -> None:
        capacity = len(self.arrays["stream"]) if self.arrays else 0
        if count <= capacity and length <= self.width:
            return
        exact = self._exact and not capacity
        width = max(self.width, length if exact else -(-length // self._step) * self._step)
        capacity = max(capacity, count if count <= 1 else 2 * count)
        new: dict[str, Array] = {"attention_mask": np.zeros((capacity, width), np.int64)}
        new["stream"] = np.zeros(capacity, np.int64)
        new |= {"temperature": np.zeros(capacity, np.float32), "top_p": np.zeros(capacity, np.float32)}
        new["top_k"] = np.zeros(capacity, np.int64)
        for name, (_, heads, *_) in self._shapes.items():
            sizes = [size if isinstance(size, int) else width + 1 for size in self._shapes[name][2:]]
            new[name] = np.zeros((capacity, int(heads), *sizes), np.float32)
            if name.startswith("prompt_key"):
                new[name][:, :, -2] = MASKED
        for name, array in self.arrays.items():
            place = new[name][: self.count]
            place[tuple(slice(size) for size in array[: self.count].shape)] = array[: self.count]
        self.arrays, self.width = new, width

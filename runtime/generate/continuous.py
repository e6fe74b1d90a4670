"""Generations that grow together, a token at a time: one may join or leave at any token.

The keys and values of the prompts lie side by side in slots of one width, and are written once. Those of the rows are
grown by the graph, which also drops and adds rows, because each row names the one that it continues. A token of a
generation is the same whatever grows beside it, to rounding.

Shapes: B prompts, P the width of a slot, M rows of all prompts; the others as in the graphs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from bonnx.errors import ArtifactError

from ..arrays import Array
from ..engine.prompt_cache import as_past, nothing_read
from ..engine.session import HeldArray, Session, Stop
from .growing import DEADLINE, LENGTH, Growing
from .options import CheckedOptions

__all__ = [
    "ContinuousBatch",
    "Joining",
    "ReadPrompt",
    "can_join",
    "check_decode",
    "most_likely",
    "read_prompts",
]

# What `shared_keys` of the export writes where there is no token.
MASKED = np.float32(-1e30)
# Widths of slots are multiples of this, so that a slightly longer prompt needs no other slots.
_ROUND = 32


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
    arrays = {name: value.numpy() for name, value in cache.items()}
    tokens, log_probs, streams = (outputs[name].numpy() for name in ("tokens", "log_probs", "stream"))
    sure = outputs["certainty"].numpy() if "certainty" in outputs else np.full(len(joining), np.nan)
    of_first = outputs["logits"].numpy() if logits else None
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


class _Slots:
    """The prompts of a batch, side by side: arrays (capacity, ...) of which the first `count` are in use."""

    def __init__(self, session: Session) -> None:
        self._shapes = {
            value.name: value.shape
            for value in session.graph.inputs
            if value.name.startswith(("prompt_key", "prompt_value"))
        }
        self.count = self.width = 0
        self._arrays: dict[str, Array] = {}

    def add(self, read: ReadPrompt, options: CheckedOptions) -> int:
        """Write a prompt into a slot, and return its number."""
        length = len(read.mask)
        self._make_room(self.count + 1, length)
        slot, self.count = self.count, self.count + 1
        for name, array in read.cache.items():
            place = self._arrays[name][slot]
            if name.startswith("prompt_key"):
                place[..., : length + 1] = array[0]
                place[..., length + 1 :] = 0
                # The row behind the features holds the mask.
                place[:, -2, length + 1 :] = MASKED
            else:
                place[:, : length + 1] = array[0]
                place[:, length + 1 :] = 0
        mask = self._arrays["attention_mask"][slot]
        mask[:length], mask[length:] = read.mask, 0
        self._arrays["stream"][slot] = read.stream
        for name, value in options.drawing().items():
            self._arrays[name][slot] = value
        return slot

    def length(self, slot: int) -> int:
        """The tokens of a slot's prompt."""
        return int(self._arrays["attention_mask"][slot].sum())

    def remove(self, slot: int) -> int:
        """Free a slot; the prompt of the last slot, whose number is returned, moves there."""
        self.count -= 1
        for array in self._arrays.values():
            array[slot] = array[self.count]
        if not self.count:
            self._arrays, self.width = {}, 0
        return self.count

    def feeds(self) -> dict[str, Array]:
        """The inputs of `decode` about the prompts."""
        return {name: array[: self.count] for name, array in self._arrays.items()}

    def _make_room(self, count: int, length: int) -> None:
        capacity = len(self._arrays["stream"]) if self._arrays else 0
        if count <= capacity and length <= self.width:
            return
        # The first slot is exact: a single generation pays for no padding.
        width = max(self.width, length if not capacity else -(-length // _ROUND) * _ROUND)
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
        for name, array in self._arrays.items():
            place = new[name][: self.count]
            place[tuple(slice(size) for size in array[: self.count].shape)] = array[: self.count]
        self._arrays, self.width = new, width


@dataclass(eq=False)
class _Entry:
    """A generation in a batch."""

    growing: Growing
    slot: int
    deadline: float | None
    top: tuple[Array, Array] | None


class ContinuousBatch:
    """Generations that grow together.

    Args:
        session: of `decode`.
        step_token: ends a step, for the step aggregations.

    Raises:
        ArtifactError: the graph was written by an earlier version.
    """

    def __init__(self, session: Session, step_token: int | None) -> None:
        check_decode(session)
        self._session, self._step_token = session, step_token
        shapes = {value.name: value.shape for value in session.graph.inputs}
        self._names = [name for name in shapes if name.startswith(("key.", "value."))]
        self._heads, self._size = (int(shapes[self._names[0]][axis]) for axis in (1, 3))
        self._slots = _Slots(session)
        self._entries: list[_Entry] = []
        self._fixed: dict[str, HeldArray] | None = None
        self._clear()

    def _clear(self) -> None:
        # No row has read a token yet: what a new row continues has no places.
        blank = {name: np.zeros((1, self._heads, 0, self._size), np.float32) for name in self._names}
        self._cache = self._session.hold(blank)
        self._owner = np.zeros(0, np.int64)
        self._numbers, self._lengths, self._sources, self._tokens = (np.zeros(0, np.int64) for _ in range(4))
        self._log_probs, self._certainties = np.zeros((2, 0), np.float32)

    @property
    def rows(self) -> int:
        """How many candidates are growing."""
        return len(self._tokens)

    @property
    def generations(self) -> list[Growing]:
        """Those that are growing."""
        return [entry.growing for entry in self._entries]

    def padding(self, prompt: int, count: int) -> tuple[int, int]:
        """What joining would make the batch compute for nothing at a token.

        Args:
            prompt: tokens of the prompt.
            count: candidates.

        Returns:
            pairs of a candidate and a prompt's token, and tokens of candidates whose keys and values are copied.
        """
        counts = np.bincount(self._owner, minlength=len(self._entries)).tolist()
        used = [(self._slots.length(entry.slot), n) for entry, n in zip(self._entries, counts, strict=True)]
        used.append((prompt, count))
        pairs = len(used) * max(p for p, _ in used) * max(n for _, n in used) - sum(p * n for p, n in used)
        longest = int(self._lengths.max(initial=0))
        tokens = longest * (self.rows + count) - int(self._lengths.sum())
        return pairs, tokens

    def join(self, read: ReadPrompt, joining: Joining) -> Growing:
        """Let a generation grow with the others from the next token on."""
        options = joining.options
        growing = Growing(options, self._step_token, joining.ends)
        slot = self._slots.add(read, options)
        self._fixed = None
        top = None
        if options.top_log_probs:
            assert read.logits is not None
            top = most_likely(read.logits[None], options.top_log_probs)
        self._entries.append(_Entry(growing, slot, joining.deadline, top))
        n = options.n
        # A row that has read nothing may continue any.
        zeros = np.zeros(n, np.int64)
        self._owner = np.append(self._owner, np.full(n, len(self._entries) - 1))
        self._numbers = np.append(self._numbers, np.arange(n))
        self._lengths = np.append(self._lengths, zeros)
        self._sources = np.append(self._sources, zeros)
        self._tokens = np.append(self._tokens, read.tokens)
        self._log_probs = np.append(self._log_probs, read.log_probs)
        self._certainties = np.append(self._certainties, np.full(n, read.certainty, np.float32))
        return growing

    def step(self, stop: Stop | None = None) -> list[Growing]:
        """Let every candidate read a token and draw the next; the generations, of which some have ended and left."""
        slots = np.array([entry.slot for entry in self._entries])
        feeds = {
            "tokens": self._tokens,
            "prompts": slots[self._owner],
            "numbers": self._numbers,
            "lengths": self._lengths,
            "sources": self._sources,
        }
        if self._fixed is None:
            self._fixed = self._session.hold(self._slots.feeds())
        with_top = any(entry.growing.options.top_log_probs for entry in self._entries)
        outputs = self._session.values({**self._fixed, **self._cache, **feeds}, logits=with_top, stop=stop)
        self._cache = {name: outputs[f"grown_{name}"] for name in self._names}
        # Without a scorer, the score of a token is the certainty of the distribution that it was drawn from.
        scores = outputs["scores"].numpy() if "scores" in outputs else self._certainties
        logits = outputs["logits"].numpy() if with_top else None
        now, stays = time.monotonic(), np.ones(self.rows, bool)
        starts = np.searchsorted(self._owner, np.arange(len(self._entries) + 1))
        generations = self.generations
        for entry, begin, end in zip(self._entries, starts[:-1], starts[1:], strict=True):
            part = slice(begin, end)
            _add(entry, self._numbers[part], self._tokens[part], scores[part], self._log_probs[part], now)
            stays[part] = entry.growing.reasons[self._numbers[part]] < 0
            if logits is not None and entry.growing.options.top_log_probs:
                entry.top = most_likely(logits[part][stays[part]], entry.growing.options.top_log_probs)
        self._lengths = self._lengths + 1
        self._sources = np.arange(self.rows)
        self._tokens, self._log_probs = outputs["next_tokens"].numpy(), outputs["log_probs"].numpy()
        self._certainties = outputs["certainties"].numpy() if "certainties" in outputs else self._certainties
        if not stays.all():
            self._keep(stays)
        return generations

    def leave(self, growing: Growing) -> None:
        """Drop a generation before it has ended."""
        (i,) = (i for i, entry in enumerate(self._entries) if entry.growing is growing)
        self._keep(self._owner != i)

    def _keep(self, stays: Array) -> None:
        """Continue with some of the rows, (M,) bool; generations without any leave."""
        left = np.bincount(self._owner[stays], minlength=len(self._entries))
        for i in np.flatnonzero(left == 0)[::-1]:
            freed = self._entries[i].slot
            moved = self._slots.remove(freed)
            for entry in self._entries:
                if entry.slot == moved:
                    entry.slot = freed
            self._fixed = None
        self._entries = [entry for i, entry in enumerate(self._entries) if left[i]]
        renumbered = np.cumsum(left > 0) - 1
        self._owner = renumbered[self._owner[stays]]
        for name in ("_numbers", "_lengths", "_sources", "_tokens", "_log_probs", "_certainties"):
            setattr(self, name, getattr(self, name)[stays])
        if not self._entries:
            self._clear()


def _add(entry: _Entry, numbers: Array, tokens: Array, scores: Array, log_probs: Array, now: float) -> None:
    """Add a token of each of a generation's running candidates, and end those that it ends: all (rows,)."""
    growing, options = entry.growing, entry.growing.options
    growing.add(numbers, tokens, scores, log_probs)
    if entry.top is not None:
        growing.add_top(numbers, *entry.top)
    if options.prune_every and growing.length % options.prune_every == 0:
        growing.prune()
    running = growing.reasons < 0
    if growing.length == options.max_new_tokens:
        growing.reasons[running] = LENGTH
    elif entry.deadline is not None and now > entry.deadline:
        growing.reasons[running] = DEADLINE


def can_join(session: Session) -> bool:
    """Whether rows can join and leave in a `decode` graph, as since this version."""
    return "sources" in {value.name for value in session.graph.inputs}


def check_decode(session: Session) -> None:
    """Refuse a `decode` graph whose rows cannot join and leave.

    Raises:
        ArtifactError: it was written by an earlier version.
    """
    if not can_join(session):
        raise ArtifactError(
            "the graph decode was written by an earlier version of bonnx: its rows cannot join and leave; export the "
            "model again"
        )


def most_likely(logits: Array, count: int) -> tuple[Array, Array]:
    """The tokens of the largest logits (rows, V), most likely first, (rows, k) int64, and their log-probabilities."""
    wide = logits.astype(np.float64)
    count = min(count, wide.shape[-1])
    order = np.argpartition(-wide, count - 1, -1)[:, :count]
    order = np.take_along_axis(order, np.argsort(-np.take_along_axis(wide, order, -1), -1, kind="stable"), -1)
    peak = wide.max(-1, keepdims=True)
    # Infinite logits are no distribution: the log-probabilities are NaN.
    with np.errstate(invalid="ignore"):
        log_sum = peak + np.log(np.exp(wide - peak).sum(-1, keepdims=True))
        return order.astype(np.int64), (np.take_along_axis(wide, order, -1) - log_sum).astype(np.float32)

"""Rows of `decode_static`: keys and values in slots of caches whose addresses and sizes stay, for CUDA graphs.

A row stays at its place until it ends. Rows move to other caches, on the device, if others join, if there are half as
many as places, or if they need more slots. Sizes are powers of two, so that few different ones are captured. Shapes as
in `rows.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..arrays import Array
from ..engine.device import on_host
from ..engine.fixed_run import FixedRun
from ..engine.session import Session, Stop
from .options import GREEDY_BELOW, CheckedOptions
from .prompts import PromptSlots
from .rows import NextTokens, RowStates, zero_caches

__all__ = ["StaticRows", "draws_plainly", "room_for"]

# Slots for tokens, at least, and the step in which the slots of prompts widen.
_SLOTS, _PROMPT = 64, 128
_LARGEST = np.finfo(np.float32).max


class StaticRows:
    """Rows that `decode_static` reads together.

    Args:
        session: gives the session of a graph.
    """

    def __init__(self, session: Callable[[str], Session]) -> None:
        self._decode, self._uniforms, self._resize = map(session, ("decode_static", "uniforms", "resize_cache"))
        self.prompts = PromptSlots(self._decode.graph, _PROMPT, exact=False)
        self._types = {value.name: np.dtype(value.dtype) for value in self._decode.graph.inputs}
        self._outputs = {value.name for value in self._decode.graph.outputs}
        self._blank = self._decode.hold(zero_caches(self._decode.graph, 1, 1))
        self._run: FixedRun | None = None
        # Where the rows of the last run are.
        self._places = np.zeros(0, np.int64)

    def clear(self) -> None:
        """Forget all rows."""
        if self._run is not None:
            self._decode.fixed_runs.give_back(self._run)
        self._run = None

    def __call__(self, states: RowStates, *, logits: bool = False, stop: Stop | None = None) -> NextTokens:
        """Let each row read a token and draw the next; a step is brief, so `stop` does not end it."""
        run, places = self._place(states)
        try:
            self._write(run, states, places)
            run()
        except BaseException:
            if run is not self._run:
                self._decode.fixed_runs.give_back(run)
            # What was written of the prompts is unknown.
            run.marker = None
            raise
        if run is not self._run:
            self.clear()
        self._run, self._places = run, places

        def read(name: str) -> Array | None:
            return on_host(run.values[name])[places] if name in self._outputs else None

        tokens, log_probs, scores, certainties = map(read, ("next_tokens", "log_probs", "scores", "certainties"))
        assert tokens is not None
        assert log_probs is not None
        return NextTokens(tokens, log_probs, scores, certainties, read("logits") if logits else None)

    def _place(self, states: RowStates) -> tuple[FixedRun, Array]:
        """The run with room for the rows, in whose caches they are, and the place of each row (M,)."""
        count, old = len(states.tokens), states.lengths > 0
        widest = np.bincount(states.prompts).max()
        sizes = {"rows": _room(count), "slots": _room(int(states.lengths.max()) + 1, _SLOTS)}
        sizes |= {"batch": len(self.prompts.arrays["stream"]), "width": _room(int(widest))}
        sizes |= {"prompt_length": self.prompts.width, "prompt_length + 1": self.prompts.width + 1}
        run = self._run
        before = self._places[states.sources[old]] if run is not None else np.zeros(0, np.int64)
        if run is not None and run.sizes == sizes and len(np.unique(before)) == count:
            return run, before
        new = self._decode.fixed_runs.take(sizes)
        feeds = {"rows": np.zeros(sizes["rows"], np.int64), "kept": np.zeros(sizes["rows"], bool)}
        feeds["rows"][:count][old], feeds["kept"][:count] = before, old
        # Where there were fewer slots, any of the row's own does: it is overwritten before it is read.
        had = 1 if run is None else run.sizes["slots"]
        feeds["slots"] = np.minimum(np.arange(sizes["slots"]), had - 1)
        caches = self._blank if run is None else {name: run.values[name] for name in self._blank}
        try:
            self._resize.into({**feeds, **caches}, {f"resized_{name}": new.values[name] for name in caches})
        except BaseException:
            self._decode.fixed_runs.give_back(new)
            raise
        return new, np.arange(count)

    def _write(self, run: FixedRun, states: RowStates, places: Array) -> None:
        """Write the inputs of a run."""
        prompts, sizes = self.prompts.arrays, run.sizes
        marker = (self.prompts, self.prompts.changes)
        if run.marker != marker:
            for name, array in prompts.items():
                if name in run.values and name != "temperature":
                    run.write(name, array)
            run.write("slots", np.arange(sizes["slots"]))
            run.marker = marker
        stream, temperature = (prompts[name][states.prompts] for name in ("stream", "temperature"))
        sampled = temperature >= GREEDY_BELOW
        drawn = {"stream": stream, "positions": states.lengths + 1, "numbers": states.numbers}
        (uniform,) = self._uniforms.run(drawn, ["uniform"])
        inputs = {"tokens": states.tokens, "prompts": states.prompts, "lengths": states.lengths, "uniform": uniform}
        inputs |= {"sampled": sampled, "temperature": np.where(sampled, np.minimum(temperature, _LARGEST), 1)}
        order = np.argsort(states.prompts, kind="stable")
        owners = states.prompts[order]
        columns = np.arange(len(order)) - np.searchsorted(owners, owners)
        of_prompts = np.zeros((sizes["batch"], sizes["width"]), np.int64)
        of_prompts[owners, columns] = places[order]
        inputs["back"] = np.empty_like(order)
        inputs["back"][order] = owners * sizes["width"] + columns
        run.update("places", of_prompts)
        for name, values in inputs.items():
            wide = np.zeros(sizes["rows"], self._types[name])
            wide[places] = values
            run.update(name, wide)


def draws_plainly(options: CheckedOptions) -> bool:
    """Whether tokens are drawn as `decode_static` can: from all tokens, or the most likely one."""
    return bool(options.drawing()["temperature"] == 0) or (options.top_k == 0 and options.top_p == 1)


def room_for(rows: int, tokens: int) -> int:
    """Tokens for which the cache has room, with so many rows of up to so many tokens."""
    return _room(rows) * _room(tokens, _SLOTS)


def _room(count: int, least: int = 1) -> int:
    """The smallest power of two that is at least as large as both."""
    return max(least, 1 << (count - 1).bit_length())

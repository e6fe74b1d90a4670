"""The random inputs with which graphs are verified: rows of tokens, and how they are padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bonnx.models.network import LanguageModel, TwoHeadedNetwork
from bonnx.runtime.artifact.manifest import Limits, Scoring

from ..graphs.selection import plain_selection

__all__ = ["Drawn", "Inputs", "Padding", "padding_mask", "put_header"]

Array = NDArray[Any]
Padding: TypeAlias = Literal["left", "right", "none"]

# (prompt length, candidate length, candidates, batch): every axis is 1 at least once; some sizes are odd, some long.
_SHAPES = [(1, 1, 1, 1), (1, 7, 5, 1), (9, 1, 3, 2), (33, 5, 1, 3), (5, 3, 17, 2), (13, 11, 4, 1), (101, 29, 2, 1)]
_RANDOM_SHAPES, _LONG, _QUICK_LONG = 12, 257, 65


@dataclass
class Drawn:
    """Prompts and their candidates without padding: B prompts with N candidates each.

    Attributes:
        prompts: of each prompt (P[, E]).
        candidates: of each candidate and prompt (T[, E]), candidates first.
        widths: the lengths to which prompts and candidates are padded.
        scores: by candidate and prompt, the exact scores (P + T,) of the row, once they are computed.
        backbones: of rows of equal length also the exact outputs of the backbone (P + T, D).
    """

    prompts: list[Array]
    candidates: list[list[Array]]
    widths: tuple[int, int]
    scores: dict[tuple[int, int], Array] = field(default_factory=dict)
    backbones: dict[tuple[int, int], Array] = field(default_factory=dict)

    @property
    def places(self) -> list[tuple[int, int]]:
        """The numbers of each candidate and its prompt."""
        return [(n, b) for n, row in enumerate(self.candidates) for b in range(len(row))]

    def row(self, n: int, b: int) -> Array:
        """A prompt and a candidate as one row."""
        return np.concatenate([self.prompts[b], self.candidates[n][b]])

    def expected(self, mask: Array) -> Array:
        """The exact scores (N, B, length) float64 of candidates with this mask; 0 for padding."""
        scores = np.zeros(mask.shape)
        scores[mask > 0] = np.concatenate([self.scores[n, b][len(self.prompts[b]) :] for n, b in self.places])
        return scores


class Inputs:
    """Draws inputs for one model."""

    def __init__(
        self, model: LanguageModel | TwoHeadedNetwork, scoring: Scoring, limits: Limits, rng: np.random.Generator
    ) -> None:
        self.rng, self._header, self._limits = rng, scoring.gate_tokens, limits
        self.ids = isinstance(model, LanguageModel)
        self._vocabulary = model.config.vocab_size if isinstance(model, LanguageModel) else 0
        self._network = model.network.config if isinstance(model, LanguageModel) else model.config
        self.suffix = "ids" if self.ids else "embeds"

    def shapes(self, *, large: bool, quick: bool) -> Iterator[tuple[int, int, int, int]]:
        """Yield sizes for `draw`: fixed ones, a long one and random ones."""
        longest = max(2, min(_QUICK_LONG if quick else _LONG, self._limits.max_tokens // 2))
        for prompt, length, count, batch in _SHAPES[1:4] if quick else _SHAPES[:4] if large else _SHAPES:
            yield min(prompt, longest), min(length, longest), count, batch
        yield longest, longest, 2, 1
        for _ in range(1 if quick else 3 if large else _RANDOM_SHAPES):
            prompt, length = self.rng.integers(1, min(24, longest) + 1, 2)
            count, batch = self.rng.integers(1, [9, 4])
            yield int(prompt), int(length), int(count), int(batch)

    def draw(self, prompt: int, length: int, count: int, batch: int, *, ragged: bool) -> Drawn:
        """Draw prompts and candidates of at most these lengths, or of exactly these; a gate finds its header."""
        least, rng = max(1, len(self._header)), self.rng
        prompt = max(prompt, least)
        prompt_sizes = rng.integers(least, prompt + 1, batch) if ragged else np.full(batch, prompt)
        sizes = rng.integers(1, length + 1, (count, batch)) if ragged else np.full((count, batch), length)
        if self.stretches(prompt + length):
            # `rank` uses the frequencies of the longest candidate for all.
            sizes = np.broadcast_to(sizes[:1], sizes.shape)
        prompts = [self.tokens(int(size)) for size in prompt_sizes]
        for tokens in prompts:
            put_header(rng, self._header, tokens, np.arange(len(tokens)))
        candidates = [[self.tokens(int(size)) for size in row] for row in sizes]
        return Drawn(prompts, candidates, (prompt, length))

    def feeds(self, drawn: Drawn, padding: Padding) -> dict[str, Array]:
        """The feeds of `rank`; what is padded holds random tokens."""
        (prompt, length), batch, count = drawn.widths, len(drawn.prompts), len(drawn.candidates)
        feeds = {f"prompt_{self.suffix}": self.tokens(batch, prompt)}
        feeds["prompt_mask"] = padding_mask(np.array([len(row) for row in drawn.prompts]), prompt, padding)
        feeds[f"candidate_{self.suffix}"] = self.tokens(count, batch, length)
        sizes = np.array([[len(own) for own in row] for row in drawn.candidates])
        feeds["candidate_mask"] = padding_mask(sizes, length, padding)
        feeds[f"prompt_{self.suffix}"][feeds["prompt_mask"] > 0] = np.concatenate(drawn.prompts)
        own = np.concatenate([own for row in drawn.candidates for own in row])
        feeds[f"candidate_{self.suffix}"][feeds["candidate_mask"] > 0] = own
        return feeds | plain_selection()

    def random_feeds(self, prompt: int, length: int, count: int, batch: int) -> dict[str, Array]:
        """Feeds of `rank` for which no exact scores are needed."""
        return self.feeds(self.draw(prompt, length, count, batch, ragged=True), "right")

    def tokens(self, *shape: int) -> Array:
        """Draw tokens of this shape, or embeddings with one more axis."""
        if self.ids:
            return self.rng.integers(0, self._vocabulary, shape)
        return self.rng.standard_normal((*shape, self._network.embed_dim), np.float32)

    def stretches(self, length: int) -> bool:
        """Whether rotary frequencies depend on a row's length."""
        scaling = self._network.rope_scaling
        return scaling is not None and scaling.depends_on_length and length > scaling.original_max_positions


def padding_mask(sizes: Array, length: int, padding: str) -> Array:
    """Return the mask (..., length) int64 of rows of the given sizes (...), padded on the `left` or the `right`."""
    index = np.arange(length)
    real = index >= length - sizes[..., None] if padding == "left" else index < sizes[..., None]
    return real.astype(np.int64)


def put_header(rng: np.random.Generator, header: Sequence[int], row: Array, places: Array) -> None:
    """Write the header that a gate looks for somewhere into consecutive places of a row of tokens."""
    if header:
        first = places[0] + rng.integers(0, len(places) - len(header) + 1)
        row[first : first + len(header)] = header

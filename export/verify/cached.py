"""Verify `rank_prefill` and `rank_cached`: prompts in pieces of any size, cut and continued, then their candidates."""

from __future__ import annotations

import numpy as np

from bonnx.runtime.artifact.manifest import Parity
from bonnx.runtime.engine.prompt_cache import PREFILL, RANK_CACHED, as_past, nothing_read
from bonnx.runtime.selection.gate import last_header

from .inputs import Drawn, Padding
from .parity import Array, Checker

__all__ = ["CachedRankings"]

# (prompt length, candidate length, candidates, batch, padding): every axis is 1 at least once.
_SHAPES: list[tuple[int, int, int, int, Padding]] = [
    (1, 1, 1, 1, "none"),
    (9, 1, 3, 2, "right"),
    (33, 5, 1, 3, "left"),
    (5, 3, 7, 2, "left"),
    (13, 11, 4, 1, "none"),
    (24, 7, 2, 2, "right"),
]


class CachedRankings:
    """Random prompts and candidates, with the exact scores once the checker has computed them."""

    def __init__(self, checker: Checker) -> None:
        self._checker, scaling, most = checker, checker.network.config.rope_scaling, checker.limits.max_tokens
        if scaling is not None and scaling.depends_on_length:
            # The runtime does not cache longer rows, whose frequencies depend on their length.
            most = min(most, scaling.original_max_positions)
        longest = max(1, most // 2)
        self._cases = list[tuple[dict[str, Array], Drawn]]()
        for prompt, length, count, batch, padding in _SHAPES[1:3] if checker.quick else _SHAPES:
            sizes = min(prompt, longest), min(length, longest), count, batch
            rows = checker.draw(*sizes, ragged=padding != "none")
            self._cases.append((checker.inputs.feeds(rows, padding), rows))

    def check(self) -> Parity:
        """Run the cases.

        Raises:
            ExportError: a score differs by more than the tolerance.
        """
        differences = []
        # One graph after the other: their weights are never in memory together.
        read = [self._read_prompts(feeds) for feeds, _ in self._cases]
        self._checker.close(PREFILL)
        for number, (feeds, (_, rows)) in enumerate(zip(read, self._cases, strict=True)):
            expected = rows.expected(feeds["candidate_mask"])
            outputs = self._checker.run_graph(RANK_CACHED, feeds)
            differences.append(self._checker.near("scores", "rank after a cached prompt", outputs["scores"], expected))
            if number == 1:
                self._checker.record(f"{RANK_CACHED}/1", feeds, outputs, scores=expected)
        self._checker.close(RANK_CACHED)
        return self._checker.parity("rank, after a cached prompt", differences, "scores")

    def _read_prompts(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """The feeds of `rank_cached`, from those of `rank`."""
        rng, name = self._checker.rng, f"prompt_{self._checker.inputs.suffix}"
        prompt, mask = feeds[name], feeds["prompt_mask"]
        length, done, cache = prompt.shape[1], 0, nothing_read(self._checker.graphs[PREFILL], len(prompt))
        header, gate = self._checker.scoring.gate_tokens, {}
        if header:
            gate = {"gate_position": np.array([last_header(row, header) for row in np.where(mask > 0, prompt, -1)])}
        while done < length:
            # The last tokens that were read are forgotten now and then, and read again.
            done -= int(rng.integers(0, done + 1)) if rng.random() < 0.5 else 0
            end = int(rng.integers(done + 1, length + 1))
            piece = {name: prompt[:, done:end], "prompt_mask": mask[:, :end], **as_past(cache), **gate}
            cache, done = self._checker.run_graph(PREFILL, piece), end
        return {key: value for key, value in feeds.items() if key != name} | cache

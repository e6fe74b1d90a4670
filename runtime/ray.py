"""For `map_batches` of Ray Data over datasets of your own."""

from __future__ import annotations

from typing import Any

import numpy as np

from .batch.work import ADDED, added
from .errors import InputError
from .model import load

__all__ = ["Ranker"]


class Ranker:
    """Ranks the candidates of each row; the model is loaded once for each actor.

    Args:
        artifact: its folder, which every node must reach by this path.
        prompt: name of the column with the prompt.
        candidates: of the column with the candidates.
        provider: see `bonnx.load`.
        threads: of one run; give the actor as many cores.
        **options: of `Model.rank`: `aggregation`, `partial`, `truncate`.

    Example:
        >>> dataset.map_batches(Ranker, fn_constructor_args=("artifacts/countdown",), concurrency=4)  # doctest: +SKIP
    """

    def __init__(
        self,
        artifact: str,
        prompt: str = "prompt",
        candidates: str = "candidates",
        *,
        provider: str = "auto",
        threads: int | None = 1,
        **options: Any,
    ) -> None:
        self._prompt, self._candidates, self._options = prompt, candidates, options
        self._model = load(artifact, provider=provider, threads=threads)  # type: ignore[arg-type]

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with `best_index`, `best`, `candidate_scores` and `margin`.

        Raises:
            InputError: a row cannot be ranked.
        """
        jobs = []
        for prompt, candidates in zip(batch[self._prompt], batch[self._candidates], strict=True):
            jobs.append(self._model.job(_plain(prompt), [_plain(c) for c in candidates], **self._options))
        rows = []
        for found in self._model.rank_all(jobs):
            if isinstance(found, Exception):
                raise InputError(str(found)) from found
            rows.append(added(found, ADDED))
        columns: dict[str, Any] = {name: [row[name] for row in rows] for name in ADDED}
        return batch | columns


def _plain(value: Any) -> Any:
    """Arrow gives lists as arrays, and lists of lists as arrays of arrays."""
    if isinstance(value, np.ndarray) and value.dtype == object:
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, np.str_) else value

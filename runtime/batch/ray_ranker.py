"""For `map_batches` of Ray Data over datasets of your own."""

from __future__ import annotations

from typing import Any

import numpy as np

from bonnx.errors import BonnxError

from ..engine.engine import open_engine
from ..rank.request import RankRequest, read_request
from ..rank.result import Ranking
from ..rank.run import rank_all
from ..results import to_json
from .worker import ADDED, added

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

    Examples:
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
        self._engine = open_engine(artifact, provider=provider, threads=threads)  # type: ignore[arg-type]

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with `best_index`, `best`, `candidate_scores`, `margin` and `reason`.

        A row that cannot be ranked gets a `reason`, and null for the others: it does not end the dataset.
        """
        candidates = [[] if own is None else [_plain(item) for item in own] for own in batch[self._candidates]]
        jobs: list[RankRequest | Exception] = []
        for prompt, own in zip(batch[self._prompt], candidates, strict=True):
            try:
                jobs.append(read_request(self._engine, _plain(prompt), own, **self._options))
            except (BonnxError, TypeError, ValueError, OverflowError) as e:
                jobs.append(e)
        rankings = iter(rank_all(self._engine, [job for job in jobs if isinstance(job, RankRequest)]))
        columns: dict[str, Any] = {name: [] for name in (*ADDED, "reason")}
        for own, job in zip(candidates, jobs, strict=True):
            found = next(rankings) if isinstance(job, RankRequest) else job
            row: dict[str, Any] = {"reason": str(found)}
            if isinstance(found, Ranking):
                best = own[found.best_index]
                row = added(found, to_json(best), ADDED)
            for name, column in columns.items():
                column.append(row.get(name))
        return batch | columns


def _plain(value: Any) -> Any:
    """Arrow gives lists as arrays, and lists of lists as arrays of arrays."""
    if isinstance(value, np.ndarray) and value.dtype == object:
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, np.str_) else value

"""For `map_batches` of Ray Data over datasets of your own."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from bonnx.errors import BonnxError

from ..engine.engine import open_engine
from ..engine.session import Provider
from ..rank.request import RankOptions, RankRequest, read_request
from ..rank.result import Ranking
from ..rank.run import rank_all
from ..results import to_json
from ..text.reader import Item
from .worker import ADDED, added

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Unpack

__all__ = ["Ranker"]


class Ranker:
    """Ranks the candidates of each row; the model is loaded once for each actor.

    Args:
        artifact: its folder, which every node must reach by this path.
        prompt: name of the column with the prompt.
        candidates: of the column with the candidates.
        provider: see `bonnx.load`.
        threads: of one run; give the actor as many cores.
        cache_dir: see `bonnx.load`; actors of one node share the memory of its weights.
        **options: of `Model.rank`: `aggregation`, `partial`, `truncate`, `instruction`.

    Examples:
        >>> dataset.map_batches(Ranker, fn_constructor_args=("artifacts/countdown",), concurrency=4)  # doctest: +SKIP
    """

    def __init__(
        self,
        artifact: str,
        prompt: str = "prompt",
        candidates: str = "candidates",
        *,
        provider: Provider = "auto",
        threads: int | None = 1,
        cache_dir: str | None = None,
        **options: Unpack[RankOptions],
    ) -> None:
        self._prompt, self._candidates, self._options = prompt, candidates, options
        self._engine = open_engine(artifact, provider=provider, threads=threads, cache_dir=cache_dir)

    def __call__(self, batch: dict[str, NDArray[np.object_]]) -> dict[str, object]:
        """The batch with `best_index`, `best`, `candidate_scores`, `margin` and `reason`.

        A row that cannot be ranked gets a `reason`, and null for the others: it does not end the dataset.
        """
        lists = [[] if items is None else [_plain(item) for item in items] for items in batch[self._candidates]]
        requests: list[RankRequest | Exception] = []
        for prompt, candidates in zip(batch[self._prompt], lists, strict=True):
            try:
                requests.append(read_request(self._engine, _plain(prompt), candidates, **self._options))
            except (BonnxError, TypeError, ValueError, OverflowError) as e:
                requests.append(e)
        outcomes = iter(rank_all(self._engine, [each for each in requests if isinstance(each, RankRequest)]))
        columns: dict[str, list[object]] = {name: [] for name in (*ADDED, "reason")}
        for candidates, request in zip(lists, requests, strict=True):
            outcome = next(outcomes) if isinstance(request, RankRequest) else request
            row: dict[str, object] = {"reason": str(outcome)}
            if isinstance(outcome, Ranking):
                row = added(outcome, to_json(candidates[outcome.best_index]), ADDED)
            for name, column in columns.items():
                column.append(row.get(name))
        return {**batch, **columns}


def _plain(value: object) -> Item:
    """An item of a column: Arrow gives lists as arrays, and lists of lists as arrays of arrays."""
    if isinstance(value, np.ndarray) and value.dtype == object:
        return cast(Item, [_plain(item) for item in value])
    return cast(Item, str(value) if isinstance(value, np.str_) else value)

"""Whole rows, each scored by itself: what other servers' clients call classification, pooling and prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from starlette.requests import Request

from ..arrays import Array
from ..batching import Shape
from ..checks import ArgumentNames
from ..rank.gate import check_gate
from ..rank.request import pad_rows
from ..rank.score import score_feeds
from ..selection.vote import make_ballot
from ..text.reader import EncodedRows, Item
from .limits import check_texts
from .ranking import ClientRequest, TokenUsage
from .request_state import note, size
from .service import Service

__all__ = ["ScoredRows", "label_name", "score_rows"]


@dataclass(frozen=True)
class ScoredRows:
    """Scores of rows.

    Attributes:
        scores: one for each row, NaN for one that cannot be scored.
        token_scores: (length,) float32 for each row; empty for one that cannot be read.
        warnings: why a row has no score, under its name in the client's request.
        usage: the tokens of the request.
    """

    scores: list[float]
    token_scores: list[Array]
    warnings: list[str]
    usage: TokenUsage


async def score_rows(service: Service, request: Request, rows: Sequence[Item], names: ArgumentNames) -> ScoredRows:
    """Score texts, conversations or token ids by the artifact's own rule, in one run of the graph `score`.

    Raises:
        InputError: a row is invalid, or none can be read.
    """
    engine, scoring = service.engine, service.engine.manifest.scoring
    engine.check_scorer("scoring")
    sent = ClientRequest("", rows, names)
    check_texts([sent], engine, service.settings, truncate=False)

    def read() -> tuple[EncodedRows, Array, Array]:
        encoded = engine.reader.rows(rows, names, partial=False)
        check_gate(scoring, encoded, names)
        return encoded, *pad_rows(engine, encoded, names)

    encoded, values, mask = await service.aside(read, request, size(request) + sent.characters)
    ballot = make_ballot("score", None, rows, names.candidates, encoded.unreadable, scoring)
    feeds = score_feeds(engine, encoded, values, mask, scoring.aggregation, ballot)
    note(request, rows=len(rows))
    token_scores, row_scores = await service.call(
        request,
        "score",
        lambda stop: engine.session("score").run(feeds, ["scores", "candidate_scores"], stop),
        Shape(len(values), 0, values.shape[1]),
    )
    scores = row_scores[:, 0].tolist()
    reasons = dict.fromkeys(np.flatnonzero(np.isnan(row_scores[:, 0])).tolist(), "its score is NaN")
    reasons |= encoded.unreadable
    return ScoredRows(
        scores,
        [token_scores[i, : len(item), 0] for i, item in enumerate(encoded.items)],
        [f"{names.candidate(i)}: {reason}" for i, reason in sorted(reasons.items())],
        TokenUsage(sum(map(len, encoded.items))),
    )


def label_name(service: Service) -> str:
    """The name of the label whose score is returned."""
    scoring = service.engine.manifest.scoring
    return scoring.labels[scoring.label] if scoring.labels else f"LABEL_{scoring.label}"

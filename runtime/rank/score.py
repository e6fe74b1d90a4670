"""Scores of whole rows, each by itself, at every position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..checks import ArgumentNames, check_flag, check_some
from ..engine.engine import Engine
from ..selection.aggregate import aggregation_code
from ..selection.vote import Answers, make_ballot
from ..text.reader import Item
from .request import pad_rows, readable_positions
from .result import Scored, winner

__all__ = ["score_rows"]

_NAMES = ArgumentNames(candidates="rows", nouns=("prompt", "row", "rows"))


def score_rows(
    engine: Engine,
    rows: Sequence[Item],
    *,
    aggregation: str | None,
    step_masks: Sequence[Sequence[int]] | None,
    partial: bool,
    backbone: bool,
    vote: str,
    answers: Answers | None,
) -> Scored:
    """See `Model.score`."""
    engine.check_scorer("scoring")
    scoring = engine.manifest.scoring
    name = scoring.aggregation if aggregation is None else aggregation
    check_flag("partial", partial)
    check_flag("backbone", backbone)
    code = np.array(aggregation_code(name), np.int64)
    check_some(rows, "rows")
    read = engine.reader.rows(rows, _NAMES, partial=partial)
    ballot = make_ballot(vote, answers, rows, "rows", read.unreadable, scoring)
    values, mask = pad_rows(engine, read, _NAMES)
    feeds = {
        "aggregation": code,
        **ballot.feeds(),
        "input_ids" if engine.input_suffix == "ids" else "inputs_embeds": values,
        "attention_mask": mask,
        "num_candidates": np.array(len(rows), np.int64),
        "step_mask": readable_positions(engine, name, read, values, step_masks)[:, None],
    }
    outputs = ["scores", "candidate_scores", "best_index", "group_scores", *(["backbone"] if backbone else [])]
    scores, row_scores, best, groups, *rest = engine.session("score").run(feeds, outputs)
    return Scored(
        winner(int(best[0]), "rows"),
        row_scores[:, 0],
        [scores[i, : len(item), 0] for i, item in enumerate(read.items)],
        [rest[0][i, : len(item)] for i, item in enumerate(read.items)] if backbone else None,
        name,
        *ballot.count(row_scores[:, 0], groups[:, 0]),
        unreadable=read.unreadable,
    )

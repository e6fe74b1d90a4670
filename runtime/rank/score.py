"""Scores of whole rows, each by itself, at every position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..arrays import Array
from ..checks import ArgumentNames, check_flag, check_some
from ..engine.engine import Engine
from ..selection.aggregate import aggregation_code
from ..selection.gate import objectives_by_name
from ..selection.vote import Answers, Ballot, make_ballot
from ..text.reader import EncodedRows, Item
from .gate import check_gate
from .request import pad_rows, readable_positions
from .result import Scored, winner

__all__ = ["score_feeds", "score_rows"]

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
    aggregation_code(name)
    check_some(rows, "rows")
    read = engine.reader.rows(rows, _NAMES, partial=partial)
    check_gate(scoring, read, _NAMES)
    ballot = make_ballot(vote, answers, rows, "rows", read.unreadable, scoring)
    values, mask = pad_rows(engine, read, _NAMES)
    feeds = score_feeds(engine, read, values, mask, name, ballot, step_masks)
    outputs = ["scores", "candidate_scores", "best_index", "group_scores"]
    outputs += ["backbone"] * backbone + ["objectives"] * bool(scoring.gate_tokens)
    scores, row_scores, best, groups, *rest = engine.session("score").run(feeds, outputs)
    objectives = None
    if scoring.gate_tokens:
        objectives = objectives_by_name(scoring, rest[-1], mask, feeds["step_mask"][:, 0], name)
    return Scored(
        winner(int(best[0]), "rows"),
        row_scores[:, 0],
        [scores[i, : len(item), 0] for i, item in enumerate(read.items)],
        [rest[0][i, : len(item)] for i, item in enumerate(read.items)] if backbone else None,
        name,
        *ballot.count(row_scores[:, 0], groups[:, 0]),
        unreadable=read.unreadable,
        objectives=objectives,
    )


def score_feeds(
    engine: Engine,
    rows: EncodedRows,
    values: Array,
    mask: Array,
    aggregation: str,
    ballot: Ballot,
    step_masks: Sequence[Sequence[int]] | None = None,
) -> dict[str, Array]:
    """The inputs of `score`: rows with their padded values and mask.

    Raises:
        InputError: the step masks do not fit.
    """
    return {
        "aggregation": np.array(aggregation_code(aggregation), np.int64),
        **ballot.feeds(),
        "input_ids" if engine.input_suffix == "ids" else "inputs_embeds": values,
        "attention_mask": mask,
        "num_candidates": np.array(len(values), np.int64),
        "step_mask": readable_positions(engine, aggregation, rows, values, step_masks)[:, None],
    }

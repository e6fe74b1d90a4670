"""Rankings that run together: which go into one run of `rank`, and what each gets of what that run found.

Prompts lie side by side on the graph's batch axis. Rankings of the same prompt share its column, one behind the other
on the candidates' axis, so that the prompt is computed once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ...errors import NoWinnerError
from ..arrays import Array
from ..selection.aggregate import aggregation_code, elect, is_stepwise
from ..selection.vote import Ballot
from ..text.reader import Item, Rows
from .result import Ranking, winner

__all__ = ["Job", "Shape", "Work", "measure", "padded_tokens", "plan", "run_jobs"]


@dataclass(frozen=True)
class Shape:
    """What a piece of work computes: `candidates` of at most `length` tokens after a prompt of `prompt` tokens."""

    candidates: int
    prompt: int
    length: int


# How many of the last groups a work is offered to.
_OPEN = 8


class Work(Protocol):
    """What can run together with others of its kind.

    Attributes:
        key: only works with equal keys run together; None for one that runs alone.
        shape: its size, padded by itself.
        tokens: how many of these tokens are real, without the prompt's.
        column: equal for works whose prompts are the same.
    """

    @property
    def key(self) -> Hashable: ...

    @property
    def shape(self) -> Shape: ...

    @property
    def tokens(self) -> int: ...

    @property
    def column(self) -> Hashable: ...


@dataclass(frozen=True, eq=False)
class Job:
    """One ranking, read and checked.

    Attributes:
        candidates: as they were passed.
        aggregation: how a candidate's scores become one.
        ballot: how they vote.
        rows: as they were read.
        values: the candidates, padded, (N, T) int64 or (N, T, embed_dim) float32.
        mask: (N, T) int64.
        steps: (N, T) int64, where the aggregation may read, or (1, 1) for everywhere.
    """

    candidates: Sequence[Item]
    aggregation: str
    ballot: Ballot
    rows: Rows
    values: Array
    mask: Array
    steps: Array
    joins: bool = True
    """Whether it may run beside others."""
    column: Hashable = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "column", self.prompt.tobytes())

    @property
    def prompt(self) -> Array:
        """(P,) int64 or (P, embed_dim) float32."""
        assert self.rows.prompt is not None
        return self.rows.prompt

    @property
    def key(self) -> Hashable:
        # Without a prompt to share, another graph runs.
        return (self.aggregation, self.ballot.vote) if self.joins and len(self.prompt) else None

    @property
    def shape(self) -> Shape:
        return Shape(len(self.values), len(self.prompt), self.values.shape[1])

    @property
    def tokens(self) -> int:
        return int(self.mask.sum())


def padded_tokens(columns: int, shape: Shape) -> int:
    """Tokens that a run computes, padding included."""
    return columns * (shape.prompt + shape.candidates * shape.length)


class _Group:
    """Works that run together while it is made."""

    def __init__(self, work: Work, place: int) -> None:
        self.key, self.places = work.key, [place]
        self.columns = {work.column: work.shape.candidates}
        self.shape, self.real = work.shape, work.shape.prompt + work.tokens

    def take(self, work: Work, place: int, fits: Callable[[int, Shape], bool], waste: float) -> bool:
        """Add a work if the run stays within its bounds; whether it was added."""
        if work.key is None or work.key != self.key:
            return False
        own = work.shape
        rows = self.columns.get(work.column, 0) + own.candidates
        columns = len(self.columns) + (work.column not in self.columns)
        whole = Shape(
            max(rows, self.shape.candidates), max(own.prompt, self.shape.prompt), max(own.length, self.shape.length)
        )
        real = self.real + work.tokens + (0 if work.column in self.columns else own.prompt)
        if not fits(columns, whole) or real < (1 - waste) * padded_tokens(columns, whole):
            return False
        self.columns[work.column] = rows
        self.shape, self.real = whole, real
        self.places.append(place)
        return True


def plan(works: Sequence[Work], fits: Callable[[int, Shape], bool], waste: float) -> list[list[int]]:
    """Which works run together: each group as indices in the order of the works, and the groups likewise.

    Works of like shape are put together, the rankings of one prompt first. The same works give the same plan.

    Args:
        works: at least one.
        fits: whether a run of so many columns, each of this shape, is allowed; a work alone always is.
        waste: greatest share of a joint run's tokens that may be padding, in [0, 1).
    """
    keys: dict[Hashable, int] = {}
    columns: dict[Hashable, int] = {}
    # Where works stand by their size: the largest first, those of one prompt together.
    sizes: dict[Hashable, int] = {}
    for work in works:
        keys.setdefault(work.key, len(keys))
        columns.setdefault(work.column, len(columns))
        sizes[work.column] = max(sizes.get(work.column, 0), work.shape.candidates * work.shape.length)
    order = sorted(
        range(len(works)), key=lambda i: (keys[works[i].key], -sizes[works[i].column], columns[works[i].column])
    )
    groups: list[_Group] = []
    for i in order:
        if not any(group.take(works[i], i, fits, waste) for group in groups[: -_OPEN - 1 : -1]):
            groups.append(_Group(works[i], i))
    return sorted(sorted(group.places) for group in groups)


def measure(works: Sequence[Work]) -> tuple[int, int]:
    """Tokens of a joint run: the real ones, and those that it computes."""
    group = _Group(works[0], 0)
    for i, work in enumerate(works[1:], 1):
        group.take(work, i, lambda columns, shape: True, 1.0)
    return group.real, padded_tokens(len(group.columns), group.shape)


def run_jobs(
    run: Callable[[str, dict[str, Array], list[str]], list[Array]], jobs: Sequence[Job], suffix: str, pad_token: int
) -> list[Ranking | NoWinnerError]:
    """Run a group of jobs as one.

    Args:
        run: runs a graph by its name: feeds and the wanted outputs to arrays.
        jobs: of equal keys.
        suffix: of the graph's inputs, `ids` or `embeds`.
        pad_token: fills what is no token.

    Returns:
        for each job its ranking, or the error that it has no winner.
    """
    first = jobs[0]
    columns: dict[Hashable, int] = {}
    filled: list[int] = []
    places = []
    for job in jobs:
        column = columns.setdefault(job.column, len(columns))
        filled += [0] * (column == len(filled))
        places.append((column, slice(filled[column], filled[column] + len(job.values))))
        filled[column] += len(job.values)
    feeds = _feeds(jobs, places, len(columns), max(filled), suffix, pad_token)
    graph = "rank"
    if not len(first.prompt):
        # The first token of each candidate reaches into the prompt, so nothing is shared.
        graph, feeds = "score", _as_rows(feeds, suffix)
    scores, found, best, groups = run(graph, feeds, ["scores", "candidate_scores", "best_index", "group_scores"])
    scores = scores.reshape(*found.shape, -1)
    results: list[Ranking | NoWinnerError] = []
    for job, (column, rows) in zip(jobs, places, strict=True):
        index, group_scores = best[column], groups[rows, column]
        if len(job.values) < filled[column]:
            # The graph chose among the candidates of all jobs in this column.
            ballot = job.ballot
            chosen, counted = elect(found[rows, column, None], ballot.ids, ballot.vote, ballot.vote_weight)
            index, group_scores = chosen[0], counted[:, 0]
        try:
            results.append(_ranking(job, int(index), scores[rows, column], found[rows, column], group_scores))
        except NoWinnerError as e:
            results.append(e)
    return results


def _feeds(
    jobs: Sequence[Job], places: Sequence[tuple[int, slice]], columns: int, rows: int, suffix: str, pad_token: int
) -> dict[str, Array]:
    """The inputs of `rank`: each job's arrays at its place, padding elsewhere."""
    first = jobs[0]
    longest, length = max(len(job.prompt) for job in jobs), max(job.values.shape[1] for job in jobs)
    fill, more = (pad_token, ()) if first.values.ndim == 2 else (0, first.values.shape[2:])
    prompts = np.full((columns, longest, *more), fill, first.values.dtype)
    prompt_mask = np.zeros((columns, longest), np.int64)
    values = np.full((rows, columns, length, *more), fill, first.values.dtype)
    mask = np.zeros((rows, columns, length), np.int64)
    steps = np.ones((1, 1, 1), np.int64)
    if any(job.steps.shape != (1, 1) for job in jobs):
        steps = np.zeros_like(mask)
    answers = np.full((rows, columns), -1, np.int64)
    for job, (column, own) in zip(jobs, places, strict=True):
        tokens = job.values.shape[1]
        prompts[column, : len(job.prompt)] = job.prompt
        prompt_mask[column, : len(job.prompt)] = 1
        values[own, column, :tokens] = job.values
        mask[own, column, :tokens] = job.mask
        if steps.ndim == mask.ndim and steps.shape == mask.shape:
            steps[own, column, :tokens] = job.steps
        answers[own, column] = job.ballot.ids[:, 0]
    return {
        "aggregation": np.array(aggregation_code(first.aggregation), np.int64),
        f"prompt_{suffix}": prompts,
        "prompt_mask": prompt_mask,
        f"candidate_{suffix}": values,
        "candidate_mask": mask,
        "step_mask": steps,
        **first.ballot.feeds(),
        "answer_ids": answers,
    }


def _as_rows(feeds: dict[str, Array], suffix: str) -> dict[str, Array]:
    """Inputs of `rank` without a prompt, for `score`."""
    values, mask = feeds[f"candidate_{suffix}"][:, 0], feeds["candidate_mask"][:, 0]
    rows = {"input_ids" if suffix == "ids" else "inputs_embeds": values, "attention_mask": mask}
    rows["num_candidates"] = np.array(len(values), np.int64)
    kept = ("step_mask", "aggregation", "answer_ids", "vote")
    return rows | {name: feeds[name] for name in kept}


def _ranking(job: Job, index: int, scores: Array, found: Array, groups: Array) -> Ranking:
    """What a job gets of its own scores (N, T), candidate scores (N,) and group scores (N,)."""
    best = winner(index, "candidates")
    rows = job.rows
    own = [scores[i, skip : len(item)] for i, (skip, item) in enumerate(zip(rows.skip, rows.items, strict=True))]
    ends = None
    if is_stepwise(job.aggregation):
        ends = [scores[i, : len(item)][job.steps[i, : len(item)] > 0] for i, item in enumerate(rows.items)]
    standing = job.ballot.count(found, groups)
    return Ranking(best, job.candidates[best], found, own, job.aggregation, *standing, ends, rows.cut, rows.unreadable)

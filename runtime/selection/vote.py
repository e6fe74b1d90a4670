"""Votes: answers become the numbers that a graph takes, and its choice becomes an order of all candidates."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bonnx.errors import InputError

from ..arrays import Array
from ..artifact.manifest import VOTES, Scoring
from ..checks import is_list, shown
from .aggregate import elect
from .answers import extractor
from .tool_calls import reads_tools, tool_extractor

__all__ = ["Answers", "Ballot", "Standing", "check_answers", "check_weight", "make_ballot"]

# One for each candidate, None for none; the name of an extractor; or a function of a candidate, whose type is what the
# caller passed as one.
Answers: TypeAlias = Sequence[Hashable | None] | str | Callable[[Any], Hashable | None]


class Standing(NamedTuple):
    """The order of the candidates: see `Ranking`."""

    order: tuple[int, ...]
    margin: float | None
    answers: tuple[Hashable | None, ...] | None
    group_scores: NDArray[np.float32] | None


@dataclass(frozen=True)
class Ballot:
    """How candidates vote.

    Attributes:
        vote: one of `VOTES`.
        answers: one for each candidate, None for none; None if none were given.
        ids: (N, 1) int64, equal for equal answers, -1 for none.
        vote_weight: of `Scoring`.
    """

    vote: str
    answers: tuple[Hashable | None, ...] | None
    ids: Array
    vote_weight: str = "score"

    def feeds(self) -> dict[str, Array]:
        """The graph's inputs."""
        return {"answer_ids": self.ids, "vote": np.array(VOTES.index(self.vote), np.int64)}

    def choose(self, candidate_scores: Array) -> tuple[int, Array]:
        """The index of the winner among candidates with these scores (N,), -1 for none; group scores (N,) float32."""
        best, groups = elect(candidate_scores[:, None], self.ids, self.vote, self.vote_weight)
        return int(best[0]), groups[:, 0]

    def count(self, candidate_scores: Array, group_scores: Array) -> Standing:
        """The order of all candidates, which the graph's choice leads.

        Args:
            candidate_scores: (N,) float32.
            group_scores: (N,) float32.
        """
        voted = self.vote != "score"
        excluded = np.isnan(group_scores)
        # The first of each group: the candidates of an answer, or each by itself.
        leaders = np.where(excluded, len(excluded), np.arange(len(excluded)))
        if voted and not excluded[self.ids[:, 0] >= 0].all():
            first: dict[int, int] = {}
            for i in np.flatnonzero(~excluded):
                leaders[i] = first.setdefault(int(self.ids[i, 0]), int(i))
        # The last key is the first to be compared.
        keys = [-candidate_scores, np.isnan(candidate_scores), leaders, -group_scores, excluded]
        order = np.lexsort(keys)
        others = [i for i in order if leaders[i] != leaders[order[0]] and not excluded[i]]
        margin = None
        if others:
            best, second = float(group_scores[order[0]]), float(group_scores[others[0]])
            margin = 0.0 if best == second else best - second
        return Standing(tuple(order.tolist()), margin, self.answers, group_scores if voted else None)


def check_weight(score: float, name: str) -> float:
    """Check a score of the caller's own that is a weight of a vote; NaN is allowed, since it does not count.

    Raises:
        InputError: it is below 0, and would count against its own answer.
    """
    if score < 0:
        raise InputError(
            f"{name}: in a weighted vote a score is its candidate's weight; expected 0 or more, got {score:g}; give a "
            "probability, such as 1 / (1 + exp(-score)), or exp(score), or vote by 'score' or 'majority'"
        )
    return score


def check_answers(answers: Answers | None, kind: str) -> None:
    """Refuse a list of answers where candidates, which errors call by their `kind`, are yet to be made.

    Raises:
        InputError: neither the name of an extractor nor a function.
    """
    if answers is not None and not (isinstance(answers, str) or callable(answers)):
        raise InputError(
            f"answers: there are no {kind} yet; expected 'boxed', 'number', 'regex:PATTERN', 'tool' or a function; got "
            f"{type(answers).__name__}"
        )


def make_ballot(
    vote: str,
    answers: Answers | None,
    candidates: Sequence[object],
    kind: str,
    unreadable: Collection[int] = (),
    scoring: Scoring | None = None,
) -> Ballot:
    """Read the answers of candidates.

    Args:
        vote: one of `VOTES`.
        answers: see `Model.rank`.
        candidates: what an extractor reads.
        kind: what they are called in messages.
        unreadable: indices of those that cannot be read; an extractor does not see them.
        scoring: of the artifact that scores; None for scores that are weights as they are.

    Raises:
        InputError: no such vote or extractor, a vote without answers, answers that do not fit the candidates, or a
            weighted vote of an older artifact's raw scores.
    """
    if not isinstance(vote, str) or vote not in VOTES:
        raise InputError(f"vote: expected one of {', '.join(VOTES)}; got {shown(vote)}")
    if answers is None:
        if vote != "score":
            raise InputError(
                f"vote='{vote}' needs answers: pass a list with one for each of the {kind}, 'boxed', 'number', "
                "'regex:PATTERN', or a function that takes one of them"
            )
        return Ballot(vote, None, np.full((len(candidates), 1), -1, np.int64))
    if vote == "weighted" and scoring is not None and scoring.activation == "none" and scoring.vote_weight == "score":
        raise InputError(
            "vote='weighted': this artifact's graphs add up raw scores, and one below 0 counts against its own answer; "
            "export the model again, or vote by 'score' or 'majority'"
        )
    answers_read = _read(answers, candidates, kind, unreadable)
    ids = np.full((len(candidates), 1), -1, np.int64)
    numbers: dict[Hashable, int] = {}
    for i, answer in enumerate(answers_read):
        try:
            ids[i] = -1 if answer is None else numbers.setdefault(answer, len(numbers))
        except TypeError as e:
            raise InputError(f"answers[{i}]: expected something hashable or None; got {type(answer).__name__}") from e
    return Ballot(vote, answers_read, ids, "score" if scoring is None else scoring.vote_weight)


def _read(
    answers: Answers, candidates: Sequence[object], kind: str, unreadable: Collection[int]
) -> tuple[Hashable | None, ...]:
    if isinstance(answers, str) and reads_tools(answers):
        answers = tool_extractor(answers)
    if isinstance(answers, str):
        extract, texts = extractor(answers), dict[int, str]()
        for i, candidate in enumerate(candidates):
            if isinstance(candidate, str):
                texts[i] = candidate
            elif i not in unreadable:
                raise InputError(
                    f"answers='{answers:.60}' reads text, and {kind}[{i}] is none; pass the answers, or a function"
                )
        return tuple(extract(texts[i]) if i not in unreadable else None for i in range(len(candidates)))
    if callable(answers):
        return tuple(answers(candidate) if i not in unreadable else None for i, candidate in enumerate(candidates))
    if not is_list(answers):
        raise InputError(f"answers: expected a list, a function or the name of an extractor; got {shown(answers)}")
    if len(answers) != len(candidates):
        raise InputError(f"answers: expected one for each of {len(candidates)} {kind}; got {len(answers)}")
    return tuple(answers)

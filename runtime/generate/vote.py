"""The choice among generated candidates by a vote of their answers."""

from __future__ import annotations

import dataclasses

import numpy as np

from ..artifact.manifest import Scoring
from ..selection.vote import Answers, check_answers, make_ballot
from .result import Generation

__all__ = ["check_vote", "choose_by_vote"]


def check_vote(vote: str, answers: Answers | None, scoring: Scoring | None) -> None:
    """Refuse a vote before anything is generated.

    Raises:
        InputError: no such vote, a vote without answers, or answers that are not a way to find them in a candidate.
    """
    check_answers(answers, "candidates")
    make_ballot(vote, answers, [], "candidates", (), scoring)


def choose_by_vote(generation: Generation, vote: str, answers: Answers | None, scoring: Scoring | None) -> Generation:
    """The same candidates, with their answers and the winner of the vote.

    Args:
        generation: chosen by score.
        vote: as in `Model.rank`.
        answers: how to find a candidate's answer in its text, or in its token ids where there is no tokenizer; None
            leaves the generation as it is.
        scoring: of the artifact; None for scores that are weights as they are.

    Raises:
        InputError: the answers cannot be read, or are not hashable.
    """
    if answers is None:
        return generation
    candidates = generation.candidates
    items = [candidate.tokens.tolist() if candidate.text is None else candidate.text for candidate in candidates]
    ballot = make_ballot(vote, answers, items, "candidates", (), scoring)
    best, groups = ballot.choose(np.array([candidate.score for candidate in candidates], np.float32))
    voted = None if vote == "score" else groups
    return dataclasses.replace(generation, best_index=best, answers=ballot.answers, group_scores=voted)

"""A stand-in for a model, to test programs that use bonnx without an artifact or ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bonnx.errors import InputError

from .arrays import Array
from .checks import ARGUMENTS, check_flag, check_function, check_some, is_list, shown
from .generate.decoding import clock
from .generate.options import GenerateOptions, check_options, shows_options
from .generate.result import Candidate, Generation
from .generate.vote import check_vote
from .protocol import ModelLike
from .rank.result import Ranking, winner
from .selection.aggregate import aggregate, aggregation_code, is_stepwise
from .selection.vote import Answers, check_weight, make_ballot
from .text.padding import pad, step_mask
from .text.reader import Item, check_stop, none_readable
from .text.stops import Stops
from .text.tokenizer import NO_TOKENS

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["FakeModel"]

_LONGEST = 8192


class FakeModel:
    """Ranks and generates with your own functions, by the same rules as a real model.

    Args:
        score: takes a prompt and a candidate and returns one score for each token, or a single number.
        complete: takes a prompt and a candidate's number (0, 1, ...) and returns its text; needed to generate.
        aggregation: the default of its calls.

    Examples:
        >>> model = FakeModel(lambda prompt, candidate: len(candidate))
        >>> model.rank("2+2=", ["4", "four"]).best
        'four'
    """

    provider = "fake"

    def __init__(
        self,
        score: Callable[[Item, Item], float | Sequence[float]],
        complete: Callable[[Item, int], str] | None = None,
        *,
        aggregation: str = "last",
    ) -> None:
        check_function("score", score)
        if complete is not None:
            check_function("complete", complete)
        aggregation_code(aggregation)
        self._score, self._complete, self._aggregation = score, complete, aggregation

    def prepare(self, prompt: Item, *, instruction: str | None = None) -> bool:
        """As `Model.prepare`; there is nothing to compute.

        Raises:
            InputError: the prompt is invalid.
        """
        _check_item(prompt, "prompt")
        return True

    def rank(
        self,
        prompt: Item,
        candidates: Sequence[Item],
        *,
        aggregation: str | None = None,
        step_masks: Sequence[Sequence[int]] | None = None,
        partial: bool = False,
        truncate: bool = False,
        instruction: str | None = None,
        vote: str = "score",
        answers: Answers | None = None,
    ) -> Ranking:
        """As `Model.rank`; `partial`, `truncate` and `instruction` do nothing.

        Only empty candidates are unreadable.

        Raises:
            InputError: nothing to rank, an unknown aggregation or vote, a step aggregation without step_masks, a vote
                without answers, or a weighted vote of scores below 0.
            NoWinnerError: every score is NaN.
        """
        check_flag("partial", partial)
        check_flag("truncate", truncate)
        _check_item(prompt, "prompt")
        check_some(candidates, "candidates")
        for i, candidate in enumerate(candidates):
            _check_item(candidate, f"candidates[{i}]")
        unreadable = {i: NO_TOKENS for i, candidate in enumerate(candidates) if not len(candidate)}
        if len(unreadable) == len(candidates):
            raise InputError(none_readable(ARGUMENTS, unreadable))
        return self._select(prompt, candidates, aggregation, step_masks, vote, answers, unreadable)

    def _select(
        self,
        prompt: Item,
        candidates: Sequence[Item],
        aggregation: str | None,
        step_masks: Sequence[Sequence[int]] | None,
        vote: str,
        answers: Answers | None,
        unreadable: Mapping[int, str],
    ) -> Ranking:
        name = self._aggregation if aggregation is None else aggregation
        aggregation_code(name)
        ballot = make_ballot(vote, answers, candidates, "candidates", unreadable)
        if is_stepwise(name) and step_masks is None:
            raise InputError("a step aggregation needs step_masks here: a fake model has no step token")
        if not is_stepwise(name) and step_masks is not None:
            raise InputError(f"step_masks: aggregation '{name}' does not read them; pass aggregation='step_{name}'")
        empty = np.zeros(0, np.float32)
        scores = [
            empty if i in unreadable else _scores(self._score(prompt, c), f"the score of candidates[{i}]")
            for i, c in enumerate(candidates)
        ]
        padded, mask = pad(scores, 0)
        steps = mask if step_masks is None else step_mask(padded, step_masks, [0] * len(scores), None)
        rated, _ = aggregate(padded[:, None], mask[:, None], steps[:, None], name.removeprefix("step_"))
        if vote == "weighted":
            for i in np.flatnonzero(ballot.ids[:, 0] >= 0).tolist():
                check_weight(float(rated[i, 0]), f"the score of candidates[{i}]")
        best, groups = ballot.choose(rated[:, 0])
        index = winner(best, "candidates")
        standing = ballot.count(rated[:, 0], groups)
        return Ranking(index, candidates[index], rated[:, 0], scores, name, *standing, unreadable=unreadable)

    @shows_options()
    def generate(
        self,
        prompt: Item,
        *,
        vote: str = "score",
        answers: Answers | None = None,
        deadline: float | None = None,
        on_progress: Callable[[Generation], object] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """As `Model.generate`, with the bytes of each text as its tokens; nothing is cut or pruned.

        Args:
            prompt: text, messages or token ids.
            vote: as in `rank`.
            answers: how to find what a candidate votes for, as in `Model.generate`.
            deadline: in seconds; it has no effect.
            on_progress: called once, with the result.
            **options: how to generate.

        Raises:
            InputError: an option is invalid, the model was made without `complete`, or that returned something other
                than a text.
            NoWinnerError: every score is NaN.
        """
        if self._complete is None:
            raise InputError("this fake model was made to rank only; pass complete=... to FakeModel to generate")
        _check_item(prompt, "prompt")
        check_vote(vote, answers, None)
        clock(deadline)
        if on_progress is not None:
            check_function("on_progress", on_progress)
        if options.get("stop") is not None:
            check_stop(options["stop"])
        request = check_options(options, Stops(), self._aggregation, _LONGEST)
        texts = [self._complete(prompt, i) for i in range(request.n)]
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"complete: expected a text for candidate {i}; it gave {shown(text)}")
        ranking = self._select(prompt, texts, request.aggregation, None, vote, answers, {})
        candidates = []
        for text, scores, score in zip(texts, ranking.scores, ranking.candidate_scores, strict=True):
            tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
            each = np.broadcast_to(scores, tokens.shape) if len(scores) == 1 else scores
            blank = np.zeros(len(tokens), np.float32)
            candidates.append(Candidate(text, tokens, each, blank, float(score), "stop"))
        computed = sum(len(candidate.tokens) for candidate in candidates)
        voted = (ranking.answers, ranking.group_scores)
        result = Generation(ranking.best_index, candidates, len(prompt), computed, request.aggregation, *voted)
        if on_progress is not None:
            on_progress(result)
        return result

    @shows_options()
    def stream(
        self, prompt: Item, *, deadline: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Iterator[Generation]:
        """As `Model.stream`: yields the finished candidates, once.

        Args:
            prompt: text, messages or token ids.
            deadline: in seconds; it has no effect.
            **options: how to generate.
        """
        return iter([self.generate(prompt, deadline=deadline, **options)])

    def close(self) -> None:
        """As `Model.close`: there is nothing to free."""


if TYPE_CHECKING:
    _fits: type[ModelLike] = FakeModel


def _scores(value: object, name: str) -> Array:
    """The scores that the caller's function returned for one candidate, (n,) float32.

    Raises:
        InputError: it is not a number, or a list of them with at least one.
    """
    try:
        array = np.atleast_1d(np.asarray(value))
    except ValueError:  # lists of unequal length
        array = np.zeros(0)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "fiub":
        raise InputError(f"{name}: expected a number, or a list with one for each token; got {shown(value)}")
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _check_item(item: Item, name: str) -> None:
    if not isinstance(item, str) and not is_list(item):
        raise InputError(f"{name}: expected text or a list; got {shown(item)}")

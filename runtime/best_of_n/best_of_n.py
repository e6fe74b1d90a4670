"""`BestOfN`: a scorer of bonnx and any generator."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from bonnx.errors import InputError

from ..checks import check_whole, shown
from ..generate.decoding import clock
from ..protocol import ModelLike
from ..rank.result import Ranking
from ..search.method import Method, check_settings, method_named
from ..search.sampling import Adaptive, Sampling
from ..selection.vote import Answers, check_answers, make_ballot
from ..text.reader import Item
from ..upstream.background import wait_for
from ..upstream.cost import SamplingCost
from .generators import as_generator
from .result import BestOfNResult
from .run import Run

__all__ = ["BestOfN"]

METHODS: Mapping[str, type[Method]] = {"best_of_n": Sampling, "adaptive": Adaptive}


class BestOfN:
    """Samples completions from any generator and chooses the best by a model of bonnx.

    Args:
        scorer: a model that ranks.
        generate: where completions come from: an `Upstream`, an `openai.OpenAI` or `openai.AsyncOpenAI`, a model of
            bonnx that generates (it may have another tokenizer than the scorer), or a function, plain or async, that
            takes a prompt and a number and returns so many texts or messages.
        model: the name of the generator's model, for an OpenAI client, or in place of the upstream's own.

    Examples:
        >>> scorer = FakeModel(lambda prompt, candidate: len(candidate))
        >>> BestOfN(scorer, lambda prompt, n: ["4", "four"]).run("2+2=", n=2).best.text
        'four'
    """

    def __init__(self, scorer: ModelLike, generate: object, *, model: str | None = None) -> None:
        if not callable(getattr(scorer, "rank", None)):
            raise InputError(f"scorer: expected a model that `bonnx.load` returns; got {shown(scorer)}")
        self._scorer, self._generate = scorer, as_generator(generate, model)

    def run(
        self,
        prompt: Item,
        n: int = 16,
        *,
        method: str = "best_of_n",
        vote: str = "score",
        answers: Answers | None = None,
        aggregation: str | None = None,
        truncate: bool = False,
        deadline: float | None = None,
        sampling: Mapping[str, object] | None = None,
        **settings: Any,
    ) -> BestOfNResult:
        """Sample completions of a prompt and choose the best. Completions are scored while others are under way.

        Completions that fail are reported, and the choice is made from the others. The method needs no event loop and
        may be called inside one; `arun` is the same for async code.

        Args:
            prompt: messages (`{"role": ..., "content": ...}` each), which the generator and the scorer render with
                templates of their own; or text, which both read as it is.
            n: number of completions; with `adaptive` the maximum.
            method: `best_of_n`, or `adaptive`: completions in batches until more are not worth their price.
            vote: as in `Model.rank`.
            answers: how to find the answer that a completion votes for: `boxed`, `number` or `regex:PATTERN` in its
                text; `tool`, the tools that it calls with which arguments, or `tool-except:FIELD,FIELD`, where these
                arguments do not count; or a function of its text, or of its messages if it calls tools.
            aggregation: as in `Model.rank`.
            truncate: as in `Model.rank`.
            deadline: seconds after which the choice is made from the completions that have ended.
            sampling: further fields of the generator's requests, or arguments of the function: `temperature`,
                `max_tokens` and so on. None by default.
            **settings: settings of `adaptive`: `batch`, `price`, `ceiling`, `confidence`, `rule` (see
                `bonnx.runtime.search.sampling.Adaptive`).

        Raises:
            InputError: an argument is invalid, or the scorer cannot read the prompt or a completion.
            UpstreamError: no completion came.
            NoWinnerError: no completion can win.
        """
        return wait_for(
            self.arun(
                prompt,
                n,
                method=method,
                vote=vote,
                answers=answers,
                aggregation=aggregation,
                truncate=truncate,
                deadline=deadline,
                sampling=sampling,
                **settings,
            )
        )

    async def arun(
        self,
        prompt: Item,
        n: int = 16,
        *,
        method: str = "best_of_n",
        vote: str = "score",
        answers: Answers | None = None,
        aggregation: str | None = None,
        truncate: bool = False,
        deadline: float | None = None,
        sampling: Mapping[str, object] | None = None,
        **settings: Any,
    ) -> BestOfNResult:
        """`run` for async code: cancelling it cancels the requests that are open."""
        check_whole("n", n, 1)
        kind = method_named(method, METHODS)
        check_settings(method, kind, settings)
        rule = kind(**settings)
        check_answers(answers, "completions")
        scoring = getattr(getattr(self._scorer, "manifest", None), "scoring", None)
        make_ballot(vote, answers, [], "completions", (), scoring)
        until = clock(deadline)
        cost = SamplingCost()

        async def score(candidates: Sequence[Item]) -> Ranking:
            return await asyncio.to_thread(
                self._scorer.rank, prompt, candidates, aggregation=aggregation, truncate=truncate
            )

        run = Run(
            lambda count, first: self._generate(prompt, count, first, sampling or {}, until, cost),
            score,
            vote,
            answers,
            scoring,
            cost,
        )
        return await (run.adaptively(n, rule) if isinstance(rule, Adaptive) else run.all_at_once(n))

"""`BestOfN`: a scorer of bonnx and any generator."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from bonnx.errors import InputError

from ..checks import check_whole, shown
from ..generate.decoding import clock
from ..protocol import ModelLike
from ..rank.result import Ranking
from ..search.beam import Beam
from ..search.method import Method
from ..search.methods import make_method, vote_of
from ..search.sampling import Adaptive
from ..selection.vote import Answers, check_answers, make_ballot
from ..text.reader import Item
from ..upstream.background import wait_for
from ..upstream.continuation import continued
from ..upstream.cost import SamplingCost
from .generators import as_generator, is_server
from .result import BestOfNResult
from .run import Arrivals, Run
from .steps import UpstreamTree, check_for_completions, check_step, search_by_steps, step_of

__all__ = ["BestOfN"]


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
        manifest = getattr(scorer, "manifest", None)
        if manifest is not None and not manifest.has_scorer:
            raise InputError(
                f"scorer: '{manifest.name}' was exported with --no-scorer; pass it as generate, or call its own "
                "`generate`, which chooses by its certainty"
            )
        self._scorer, self._generate = scorer, as_generator(generate, model)
        self._is_server = is_server(generate)

    def run(
        self,
        prompt: Item,
        n: int = 16,
        *,
        method: str = "best_of_n",
        vote: str | None = None,
        answers: Answers | None = None,
        aggregation: str | None = None,
        truncate: bool = False,
        deadline: float | None = None,
        step: str | None = None,
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
            method: a method of `Model.search`: `best_of_n`, `weighted`, `majority`, `adaptive`, and by steps, with a
                server that continues what it has begun, `beam`, `lookahead` and `dvts`.
            vote: as in `Model.rank`; by default the method's own.
            answers: how to find the answer that a completion votes for: `boxed`, `number` or `regex:PATTERN` in its
                text; `tool`, the tools that it calls with which arguments, or `tool-except:FIELD,FIELD`, where these
                arguments do not count; or a function of its text, or of its messages if it calls tools.
            aggregation: as in `Model.rank`.
            truncate: as in `Model.rank`.
            deadline: seconds after which the choice is made from the completions that have ended.
            step: the text that ends a step, for the methods that search by steps; by default the scorer's.
            sampling: further fields of the generator's requests, or arguments of the function: `temperature`,
                `max_tokens` and so on. None by default.
            **settings: settings of the method, as in `Model.search`.

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
                step=step,
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
        vote: str | None = None,
        answers: Answers | None = None,
        aggregation: str | None = None,
        truncate: bool = False,
        deadline: float | None = None,
        step: str | None = None,
        sampling: Mapping[str, object] | None = None,
        **settings: Any,
    ) -> BestOfNResult:
        """`run` for async code: cancelling it cancels the requests that are open."""
        check_whole("n", n, 1)
        rule = make_method(method, settings)
        check_answers(answers, "completions")
        scoring = getattr(getattr(self._scorer, "manifest", None), "scoring", None)
        vote = vote_of(method, vote, has_answers=answers is not None)
        self._check_method(method, rule)
        make_ballot(vote, answers, [], "completions", (), scoring)
        until, cost, fields = clock(deadline), SamplingCost(), sampling or {}

        async def score(candidates: Sequence[Item], *, partial: bool = False) -> Ranking:
            return await asyncio.to_thread(
                self._scorer.rank, prompt, candidates, aggregation=aggregation, partial=partial, truncate=truncate
            )

        def sample(count: int, first: int) -> Arrivals:
            return self._generate(prompt, count, first, fields, until, cost)

        def sample_steps(text: str, n: int, first: int, step: str | None, cost: SamplingCost, **how: Any) -> Arrivals:
            begun, more = continued(prompt, fields, text, step, **how)
            return self._generate(begun, n, first, more, until, cost)

        run = Run(
            sample,
            score,
            vote,
            answers,
            scoring,
            cost,
            prepare=lambda: asyncio.to_thread(self._scorer.prepare, prompt),
        )
        if isinstance(rule, Beam):
            partially = functools.partial(score, partial=True)
            tree = UpstreamTree(run, sample_steps, partially, self._step(method, step), until)
            return await search_by_steps(tree, rule, method, n)
        return await (run.adaptively(n, rule) if isinstance(rule, Adaptive) else run.all_at_once(n, method))

    def _check_method(self, name: str, method: Method) -> None:
        """Refuse a method that the generator cannot be used with."""
        check_for_completions(name, method)
        if isinstance(method, Beam) and not self._is_server:
            raise InputError(
                f"method: '{name}' continues completions step by step; expected an Upstream or an OpenAI client that "
                "generates; with an artifact call its `search`"
            )

    def _step(self, method: str, step: str | None) -> str:
        """The text that ends a step."""
        engine = getattr(self._scorer, "_engine", None)
        return check_step(method, step_of(engine) if step is None and engine is not None else step)

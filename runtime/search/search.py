"""Search: spend a budget of completions on a prompt by one of `METHODS`, or by the one that a policy chooses."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from bonnx.errors import InputError

from ..arrays import Array
from ..artifact.manifest import VOTES
from ..checks import check_function, check_whole, shown
from ..engine.engine import Engine
from ..engine.session import Stop
from ..generate.decoding import clock
from ..generate.growing import PRUNED
from ..generate.options import SEARCH_OPTIONS, GenerateOptions
from ..generate.request import options_within
from ..generate.result import FINISH_REASONS, Candidate
from ..rank.result import winner
from ..selection.vote import Answers, Ballot, check_answers, make_ballot
from ..text.reader import Item
from .artifact_tree import ArtifactBranch, ArtifactTree, ScoreFunction
from .method import Finalists, Method
from .methods import make_method, vote_of
from .policy import Policy, read_policy
from .result import SearchResult
from .sampling import Adaptive, Sampling

__all__ = ["search"]


@dataclass(frozen=True)
class SearchRequest:
    """The arguments that every method shares; see `Model.search`."""

    engine: Engine
    prompt: Array
    answers: Answers | None
    vote: str | None
    scorer: ScoreFunction | None
    until: float | None
    sampling: GenerateOptions
    start: float
    stop: Stop | None = None

    def run(self, method: str, budget: int, settings: Mapping[str, object]) -> SearchResult:
        """Spend a budget by one method."""
        runner = _make(method, settings)
        tree = self._tree(runner, method, budget)
        return self._result(tree, runner.run(tree, budget), runner, method)

    def run_policy(self, policy: Policy, budget: int) -> SearchResult:
        """Spend a budget by the method that a policy has for prompts as hard as this one.

        A few completions tell how hard it is. A method that samples takes them as its first ones; with other methods
        they are candidates beside theirs, which draw other random numbers.
        """
        stored = policy.budget(budget)
        choices = policy.choices[str(stored)]
        runners = [_make(choice.method, choice.options) for choice in choices]
        votes = [self._answer_of(choice.method) for choice in choices]
        tree = self._tree(Sampling(), "best_of_n", max(policy.probe, stored))
        tree.with_certainty = any(runner.needs_certainty for runner in runners)
        tree.weighs = any(self._vote(choice.method) == "weighted" for choice in choices)
        tree.reserve(policy.probe + stored)
        probed = tree.roots(policy.probe)
        tree.grow(probed, whole=True)
        scores = tree.judge(probed)
        mean = math.nan if np.isnan(scores).all() else float(np.nanmean(scores))
        bin_ = policy.bin(mean)
        runner, method = runners[bin_], choices[bin_].method
        if runner.needs_own_tree:
            following = self._tree(runner, method, stored)
            following.cost, following.nodes = tree.cost, tree.nodes
            following.draws[tuple(self.prompt.tolist())] += 1
            for i, branch in enumerate(probed):
                # Each is its own chain.
                branch.group = -1 - i
            tree = following
        tree.answer_of, tree.options = votes[bin_], dataclasses.replace(tree.options, n=stored)
        beside = [] if runner.continues_probe else probed
        branches = [*beside, *runner.run(tree, stored, probed if runner.continues_probe else ())]
        result = self._result(tree, branches, runner, method)
        judged: dict[str, object] = {
            "mean_score": mean,
            "bin": bin_ + 1,
            "bins": len(policy.thresholds) + 1,
            "budget": stored,
        }
        return dataclasses.replace(result, policy=judged)

    def _tree(self, runner: Method, method: str, budget: int) -> ArtifactTree:
        """Check the options, and make a tree without branches."""
        check_whole("budget", budget, 1)
        self.engine.session("prefill")
        by_score = isinstance(runner, Adaptive) and self._vote(method) == "score"
        if self.scorer is None and (runner.needs_scorer or by_score):
            self.engine.check_scorer(f"method '{method}'", "pass scorer or a vote" if by_score else "pass scorer")
        limit, length = self.engine.manifest.limits.max_tokens, len(self.prompt)
        options: GenerateOptions = {**self.sampling, "n": int(budget)}
        checked = options_within(self.engine, self.prompt, options, runner.room(limit, length))
        runner.check_length(checked.max_new_tokens, limit, length)
        tree = ArtifactTree(self.engine, self.prompt, checked, self.scorer, self.until, stop=self.stop)
        tree.with_certainty = runner.needs_certainty
        tree.answer_of, tree.weighs = self._answer_of(method), self._vote(method) == "weighted"
        return tree

    def _vote(self, method: str) -> str:
        return vote_of(method, self.vote, has_answers=self.answers is not None)

    def _answer_of(self, method: str) -> Callable[[ArtifactBranch], Hashable | None] | None:
        """What one branch votes for, if the method votes."""
        vote = self._vote(method)
        # Refused before anything is computed.
        self._ballot(vote, [])
        if vote == "score":
            return None

        def answer_of(branch: ArtifactBranch) -> Hashable | None:
            text = self._text(branch)
            items = [branch.tokens if text is None else text]
            answers = make_ballot("score", self.answers, items, "candidates").answers
            return None if answers is None else answers[0]

        return answer_of

    def _ballot(self, vote: str, items: Sequence[str | list[int]]) -> Ballot:
        # The caller's own scores are weights as they are; the tree refuses those below 0.
        scoring = self.engine.manifest.scoring if self.scorer is None else None
        return make_ballot("score" if vote == "borda" else vote, self.answers, items, "candidates", (), scoring)

    def _text(self, branch: ArtifactBranch) -> str | None:
        """The text of a branch; None where there is no tokenizer."""
        tokenizer = self.engine.reader.tokenizer
        if tokenizer is None:
            return None
        stop_texts = [stop for stop in self.sampling.get("stop") or () if isinstance(stop, str)]
        return tokenizer.decode(branch.tokens, self.prompt.tolist(), FINISH_REASONS[branch.reason], stop_texts)

    def _result(self, tree: ArtifactTree, branches: list[ArtifactBranch], runner: Method, method: str) -> SearchResult:
        vote = self._vote(method)
        scores = np.where([b.reason == PRUNED for b in branches], np.float32(np.nan), tree.judge(branches))
        candidates = [self._candidate(b, score) for b, score in zip(branches, scores.tolist(), strict=True)]
        items = [b.tokens if c.text is None else c.text for b, c in zip(branches, candidates, strict=True)]
        ballot = self._ballot(vote, items)
        index, groups = runner.choose(Finalists(branches, scores, ballot.ids[:, 0], vote, ballot.vote_weight))
        winner(index, "candidates")
        tree.cost.seconds = time.monotonic() - self.start
        return SearchResult(
            method=method,
            options=dataclasses.asdict(runner) | {"budget": tree.options.n},
            best_index=index,
            candidates=candidates,
            vote=vote,
            answers=ballot.answers,
            group_scores=groups,
            cost=tree.cost,
            nodes=tree.nodes,
            leaves=[-1 if branch.node is None else branch.node for branch in branches],
        )

    def _candidate(self, branch: ArtifactBranch, score: float) -> Candidate:
        return Candidate(
            self._text(branch),
            np.array(branch.tokens, np.int64),
            np.array(branch.scores, np.float32),
            np.array(branch.log_probs, np.float32),
            score,
            FINISH_REASONS[branch.reason],
        )


def search(
    engine: Engine,
    prompt: Item,
    method: str,
    budget: int,
    answers: Answers | None,
    vote: str | None,
    scorer: ScoreFunction | None,
    deadline: float | None,
    policy: Policy | str | os.PathLike[str] | None,
    options: Mapping[str, object],
    stop: Stop | None = None,
) -> SearchResult:
    """See `Model.search`; `stop` ends the search from another thread.

    Raises:
        InterruptedError: `stop` was set.
    """
    check_answers(answers, "candidates")
    if vote is not None and not isinstance(vote, str):
        raise InputError(f"vote: expected one of {', '.join(VOTES)}; got {shown(vote)}")
    if scorer is not None:
        check_function("scorer", scorer)
    start, until = time.monotonic(), clock(deadline)
    sampling = cast(GenerateOptions, {name: options[name] for name in SEARCH_OPTIONS if name in options})
    settings = {name: value for name, value in options.items() if name not in sampling}
    request = SearchRequest(engine, engine.reader.prompt(prompt), answers, vote, scorer, until, sampling, start, stop)
    if policy is None:
        return request.run(method, budget, settings)
    if settings:
        raise InputError(f"{next(iter(settings))}: a policy sets the method; leave one of them out")
    return request.run_policy(read_policy(policy, engine.manifest), budget)


def _make(method: str, settings: Mapping[str, object]) -> Method:
    """A method with its settings."""
    for name in settings:
        if name in SEARCH_OPTIONS:
            raise InputError(f"option '{name}' of method '{method}': a policy does not say how to sample; leave it out")
    return make_method(method, settings, SEARCH_OPTIONS)

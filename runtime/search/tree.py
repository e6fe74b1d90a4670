"""A prompt's completions as branches that grow, fork and end: every search method is written in these terms.

`prefill` reads the prompt once; `decode` reads one token of many branches at a time. A branch keeps its own keys and
values, so it can stop at the end of a step and go on later, or be forked there. Only the last token of a fork is
computed again, to draw another next token.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from bonnx.errors import InputError

from ..arrays import Array
from ..engine.engine import Engine
from ..engine.session import HeldArray
from ..generate.decoding import DEADLINE, LENGTH, PRUNED, STOP, CachedRows, prefill
from ..generate.options import CheckedOptions
from ..selection.aggregate import aggregate_tokens
from ..selection.vote import check_weight
from ..text.padding import pad
from .result import Cost, Node

__all__ = ["Branch", "ScoreFunction", "Tree", "certainty"]

# Prompt and completion ids -> a score.
ScoreFunction = Callable[[list[int]], float]
# The fate of a branch that ended, by its reason; with any other reason it was cut.
_FATES = {STOP: "finished", PRUNED: "pruned"}


@dataclass(eq=False)
class Branch:
    """A completion under way.

    Attributes:
        number: of the branch's stream of random numbers.
        tokens: that the network has read.
        scores: the scorer's value at each of them.
        log_probs: of each under the model.
        certainties: self-certainty of the distribution that each was drawn from, if it is computed.
        pending: the next token, drawn and not yet read, its log-probability and certainty.
        cache: for each layer keys and values (1, G, len(tokens), K).
        reason: an index into `FINISH_REASONS`, or -1 while it grows.
        again: the pending token was read before the fork and will be read again.
        node: index of the last piece that was judged, None before the first.
        begun: number of tokens in the pieces that were judged.
        group: free for the method, to sort its branches.
    """

    number: int
    pending: tuple[int, float, float]
    tokens: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    certainties: list[float] = field(default_factory=list)
    cache: list[Array] = field(default_factory=list)
    reason: int = -1
    again: bool = False
    node: int | None = None
    begun: int = 0
    group: int = 0


class Tree:
    """The branches of one prompt.

    Args:
        engine: runs it. Its step token ends a step; without one only the end of a completion does.
        prompt: (P,) int64.
        options: how to sample; its `n` is the maximum number of branches that grow at once.
        scorer: rates branches in place of the model's own scorer.
        deadline: on the clock of `time.monotonic`.
        with_certainty: compute the self-certainty of every token.
        answer_of: gives what a finished branch votes for, if it votes.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Array,
        options: CheckedOptions,
        scorer: ScoreFunction | None = None,
        deadline: float | None = None,
        *,
        with_certainty: bool = False,
        answer_of: Callable[[Branch], Hashable | None] | None = None,
    ) -> None:
        self.engine, self.prompt, self.options = engine, prompt, options
        self.step_token = engine.manifest.scoring.step_token
        self.scorer, self.deadline = scorer, deadline
        self.with_certainty, self.answer_of = with_certainty, answer_of
        # Whether the scores will be weights of a vote.
        self.weighs = False
        self.cost, self.nodes = Cost(), list[Node]()
        # How often each context was drawn from; see `Revisions`.
        self.draws = Counter[tuple[int, ...]]()
        self._fixed: dict[str, HeldArray] = {}
        self._numbers, self._reserved = 0, list[Branch]()

    def reserve(self, count: int) -> None:
        """Draw the first tokens of `count` more branches, which `roots` then returns: the prompt is computed once."""
        first = self._numbers
        outputs, self._fixed = prefill(
            self.engine.session, self.prompt, self.options, first + count, logits=self.with_certainty
        )
        self.cost.prompt_tokens += len(self.prompt)
        self._numbers = first + count
        sure = float(certainty(outputs["logits"].numpy())[0]) if self.with_certainty else math.nan
        tokens, log_probs = outputs["tokens"].numpy()[:, 0], outputs["log_probs"].numpy()[:, 0]
        self._reserved += [Branch(i, (int(tokens[i]), float(log_probs[i]), sure)) for i in range(first, first + count)]

    def roots(self, count: int) -> list[Branch]:
        """Branches that have read nothing; numbers and first tokens are those of `generate`. None is returned twice."""
        if len(self._reserved) < count:
            self.reserve(count - len(self._reserved))
        reserved, self._reserved = self._reserved[:count], self._reserved[count:]
        return reserved

    def fork(self, branch: Branch, count: int) -> list[Branch]:
        """The branch itself and `count - 1` others that continue from the same place, each with its own draw."""
        first = [branch] if count else []
        return [*first, *(self._copy(branch) for _ in range(count - 1))]

    def _copy(self, branch: Branch) -> Branch:
        """A copy that reads the last token again, to draw another token after it."""
        self._numbers += 1
        last = len(branch.tokens) - 1
        return replace(
            branch,
            number=self._numbers - 1,
            pending=(branch.tokens[last], branch.log_probs[last], (branch.certainties or [math.nan])[-1]),
            tokens=branch.tokens[:last],
            scores=branch.scores[:last],
            log_probs=branch.log_probs[:last],
            certainties=branch.certainties[:last],
            cache=[array[:, :, :last] for array in branch.cache],
            again=True,
        )

    def look_ahead(self, branches: Sequence[Branch], steps: int) -> list[Branch]:
        """Copies of the branches, grown by `steps` steps of the most likely tokens; the branches stay as they are."""
        grown = [self._copy(branch) for branch in branches]
        for _ in range(steps):
            going = [branch for branch in grown if branch.reason < 0]
            if going:
                self.grow(going, greedy=True)
        return grown

    def grow(
        self, branches: Sequence[Branch], *, whole: bool = False, up_to: int | None = None, greedy: bool = False
    ) -> None:
        """Let branches grow, each to the end of its next step, or with `whole` to its own end.

        Branches of the same length are read together; the shorter ones are read first, until the others join them.

        Args:
            branches: that have not ended.
            whole: continue beyond the ends of steps.
            up_to: stop at this many tokens.
            greedy: take the most likely token.
        """
        decode, fixed = self.engine.session("decode"), self._fixed
        if greedy:
            fixed = fixed | decode.hold({"temperature": np.array(0, np.float32)})
        cached = CachedRows(decode, fixed)
        waiting = sorted(branches, key=lambda branch: -len(branch.tokens))
        rows: list[Branch] = []
        while rows or waiting:
            length = len(rows[0].tokens) if rows else len(waiting[-1].tokens)
            joining = []
            while waiting and len(waiting[-1].tokens) == length:
                joining.append(waiting.pop())
            if joining:
                cached.join([branch.cache if length else cached.blank() for branch in joining])
                rows = [*rows, *joining]
            tokens = np.array([[branch.pending[0]] for branch in rows])
            numbers = np.array([[branch.number] for branch in rows])
            outputs = cached.read(tokens, numbers, logits=self.with_certainty)
            fresh = self._read(rows, outputs)
            late = self.deadline is not None and time.monotonic() > self.deadline
            going = [
                i
                for i, branch in enumerate(rows)
                if not (self._ends(branch, late=late) or len(branch.tokens) == up_to)
                and not (fresh[i] and not whole and self._ends_step(branch))
            ]
            if len(going) < len(rows):
                arrays = cached.keep(going)
                for i in sorted(set(range(len(rows))) - set(going)):
                    # Nothing follows an end.
                    rows[i].cache = [array[i] for array in arrays] if rows[i].reason < 0 else []
                rows = [rows[i] for i in going]

    def _read(self, rows: Sequence[Branch], outputs: dict[str, HeldArray]) -> list[bool]:
        """Each branch reads its pending token, and the next one takes its place; whether it was new to the branch."""
        fresh = [not branch.again for branch in rows]
        parts = [outputs[name].numpy()[:, 0].tolist() for name in ("scores", "next_tokens", "log_probs")]
        sure = certainty(outputs["logits"].numpy()[:, 0]).tolist() if self.with_certainty else [math.nan] * len(rows)
        for branch, score, *drawn in zip(rows, *parts, sure, strict=True):
            token, log_prob, certain = branch.pending
            branch.tokens.append(token)
            # As in `generate`: a token drawn from no distribution makes a candidate that cannot win.
            branch.scores.append(math.nan if math.isnan(log_prob) else score)
            branch.log_probs.append(log_prob)
            branch.certainties.append(certain)
            branch.pending = (drawn[0], drawn[1], drawn[2])
            branch.again = False
        self.cost.sampled_tokens += sum(fresh)
        self.cost.computed_tokens += len(rows)
        if self.scorer is None:
            self.cost.scored_tokens += len(rows)
        return fresh

    def _ends(self, branch: Branch, *, late: bool) -> bool:
        """Whether a branch has ended; sets its reason."""
        if branch.tokens[-1] in self.options.stop_tokens:
            branch.reason = STOP
        elif len(branch.tokens) >= self.options.max_new_tokens:
            branch.reason = LENGTH
        elif late:
            branch.reason = DEADLINE
        return branch.reason >= 0

    def _ends_step(self, branch: Branch) -> bool:
        # A stop token after a step belongs to it; otherwise every fork would only end again.
        return branch.tokens[-1] == self.step_token and branch.pending[0] not in self.options.stop_tokens

    def rate(self, branches: Sequence[Branch]) -> Array:
        """Scores (n,) float32 of branches as they stand; NaN for one without.

        Raises:
            InputError: the caller's scorer raised, or returned something that is not a number or not a weight of a
                vote.
        """
        if self.scorer is not None:
            return np.array([self._ask(self.scorer, branch) for branch in branches], np.float32)
        if not branches:
            return np.zeros(0, np.float32)
        scores, mask = pad([np.array(branch.scores, np.float32) for branch in branches], 0)
        tokens, _ = pad([np.array(branch.tokens, np.int64) for branch in branches], -1)
        return aggregate_tokens(scores, mask, tokens, self.step_token, self.options.aggregation)[0]

    def _ask(self, scorer: ScoreFunction, branch: Branch) -> float:
        ids = [*self.prompt.tolist(), *branch.tokens]
        self.cost.scored_tokens += len(ids)
        try:
            score = float(scorer(ids))
        except Exception as e:
            raise InputError(f"scorer: expected a number for {ids}; it raised {type(e).__name__}: {e}") from e
        return check_weight(score, f"scorer, for {ids}") if self.weighs else score

    def judge(self, branches: Sequence[Branch]) -> Array:
        """Scores (n,) float32 of branches that have ended; each is rated once, and its last piece then noted."""
        new = [branch for branch in branches if branch.begun < len(branch.tokens)]
        for branch, score in zip(new, self.rate(new).tolist(), strict=True):
            fate = _FATES.get(branch.reason, "cut")
            self.note(branch, score, len(branch.tokens) if fate == "pruned" else 0, fate)
        return np.array([self.nodes[branch.node].score for branch in branches if branch.node is not None], np.float32)

    def note(self, branch: Branch, score: float, round_: int, fate: str, lookahead: Branch | None = None) -> None:
        """Record the piece that a branch has grown since it was last judged, and its fate."""
        begun, size = branch.begun, len(branch.tokens)
        beyond = None if lookahead is None else lookahead.tokens[size:]
        node = Node(branch.node, branch.tokens[begun:], branch.scores[begun:], score, round_, fate, beyond)
        branch.node, branch.begun = len(self.nodes), size
        self.nodes.append(node)


def certainty(logits: Array) -> Array:
    """Self-certainty (Kang et al., 2025) of distributions (rows, V): the mean over tokens of -log(V p), in nats."""
    wide = logits.astype(np.float64)
    top = wide.max(-1, keepdims=True)
    log_sum = top[..., 0] + np.log(np.exp(wide - top).sum(-1))
    values: Array = log_sum - wide.mean(-1) - math.log(wide.shape[-1])
    return values

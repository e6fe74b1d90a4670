"""Generations that run together: prompts side by side on the batch axis of `generate`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from ..arrays import Array
from ..rank.run import Shape
from ..text.padding import pad
from .decoding import generate_feeds
from .options import Request
from .result import FINISH_REASONS, Candidate, Generation

__all__ = ["Draft", "make_candidate", "run_drafts"]

_OUTPUTS = ["sequences", "lengths", "scores", "log_probs", "finish_reasons", "candidate_scores", "best_index"]


@dataclass(frozen=True, eq=False)
class Draft:
    """One generation, read and checked.

    Attributes:
        prompt: (P,) int64.
        request: what to generate.
        joins: whether it may run beside others.
    """

    prompt: Array
    request: Request
    joins: bool = True

    @property
    def key(self) -> Hashable:
        # The options are scalars of the graph. The seed is one too, and still each prompt draws numbers of its own.
        return self.request if self.joins else None

    @property
    def shape(self) -> Shape:
        return Shape(self.request.n, len(self.prompt), self.request.max_new_tokens)

    @property
    def tokens(self) -> int:
        return self.request.n * self.request.max_new_tokens

    @property
    def column(self) -> Hashable:
        return id(self)


def run_drafts(
    run: Callable[[dict[str, Array], list[str]], list[Array]],
    drafts: Sequence[Draft],
    step_token: int | None,
    pad_token: int,
    decode: Callable[[list[int], list[int], str | None], str] | None,
) -> list[Generation]:
    """Run drafts of equal keys as one.

    Args:
        run: runs `generate`: feeds and the wanted outputs to arrays.
        drafts: at least one.
        step_token: ends a step, for the step aggregations.
        pad_token: fills what is no token.
        decode: gives the text of token ids behind a prompt's, as `Text.decode`; None where there is no tokenizer.
    """
    request = drafts[0].request
    prompts, mask = pad([draft.prompt for draft in drafts], pad_token)
    outputs = run(generate_feeds(prompts, mask, request, step_token), _OUTPUTS)
    tokens, lengths, scores, log_probs, reasons, found, best = outputs
    results = []
    for b, draft in enumerate(drafts):
        rows = zip(*(array[:, b] for array in (tokens, scores, log_probs, lengths, found, reasons)), strict=True)
        candidates = [make_candidate(decode, draft.prompt, *row) for row in rows]
        # Each token of a candidate is read once, for its score.
        computed = int(lengths[:, b].sum())
        results.append(Generation(int(best[b]), candidates, len(draft.prompt), computed, request.aggregation))
    return results


def make_candidate(
    decode: Callable[[list[int], list[int], str | None], str] | None,
    prompt: Array,
    tokens: Array,
    scores: Array,
    log_probs: Array,
    length: int,
    score: float,
    reason: int,
) -> Candidate:
    """One completion from its row; `reason` is an index into `FINISH_REASONS`, below 0 while it grows."""
    own = tokens[:length]
    ended = FINISH_REASONS[reason] if reason >= 0 else None
    text = None if decode is None else decode(own.tolist(), prompt.tolist(), ended)
    return Candidate(text, own, scores[:length], log_probs[:length], float(score), ended)

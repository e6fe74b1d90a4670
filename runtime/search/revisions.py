"""Sequential revisions: each attempt sees the earlier ones."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, cast

import numpy as np
from msgspec import Meta

from bonnx.errors import InputError

from ..arrays import Array
from ..generate.decoding import generate_feeds
from ..generate.growing import LENGTH
from .artifact_tree import ArtifactBranch, ArtifactTree
from .choice import choose_in_chains
from .count import Count, as_count
from .method import Finalists, Method
from .tree import B, Tree

__all__ = ["Revisions"]


@dataclass(frozen=True)
class Revisions(Method):
    """Chains of attempts, for a model that was trained to revise (Snell et al., 2024, section 6).

    Each attempt continues the prompt and the last attempts of its chain, whole and one after the other, each with its
    stop token. The budget is the number of attempts; every chain has the same number, and the remainder is not used.
    """

    needs_artifact: ClassVar[str] = "its prompts hold the tokens of earlier attempts, with the stop token of each"
    needs_own_tree: ClassVar[bool] = True

    chains: Annotated[
        Count,
        Meta(
            ge=1,
            description="independent chains; 'sqrt' is the square root of the budget, 1 is all in sequence, and the "
            "budget all in parallel",
        ),
    ] = "sqrt"
    memory: Annotated[int, Meta(ge=1, description="earlier attempts that the next one sees")] = 4

    def run(self, tree: Tree[B], budget: int, begun: Sequence[B] = ()) -> list[B]:
        """Every attempt; `group` is its chain."""
        count = as_count(self.chains, budget)
        if budget < count:
            raise InputError(f"{budget} attempts are fewer than {count} chains; expected at least as many")
        own = cast(ArtifactTree, tree)
        done: list[list[ArtifactBranch]] = [[] for _ in range(count)]
        for _ in range(budget // count):
            own.check_stop()
            if own.is_late and done[0]:
                break
            for chain, attempt in zip(done, self._attempt(own, done), strict=True):
                chain.append(attempt)
        return cast(list[B], [attempt for chain in done for attempt in chain])

    def _attempt(self, tree: ArtifactTree, done: list[list[ArtifactBranch]]) -> list[ArtifactBranch]:
        """The next attempt of every chain; chains with the same context get different candidates.

        A context that recurs, because the memory holds the same attempts again, gets another seed: with the same one
        it would get the same attempt as before.
        """
        contexts = [tuple(self._context(tree, chain)) for chain in done]
        repeats, attempts_of = Counter(contexts), dict[tuple[int, ...], list[ArtifactBranch]]()
        kinds = {context: (count, tree.draws[context]) for context, count in repeats.items()}
        for kind in sorted(set(kinds.values())):
            batch = [context for context in repeats if kinds[context] == kind]
            attempts_of |= dict(zip(batch, _generate(tree, batch, *kind), strict=True))
        tree.draws.update(repeats.keys())
        attempts = []
        for group, context in enumerate(contexts):
            attempt = attempts_of[context].pop(0)
            attempt.group = group
            attempts.append(attempt)
        return attempts

    def _context(self, tree: ArtifactTree, chain: list[ArtifactBranch]) -> list[int]:
        ids: list[int] = tree.prompt.tolist()
        for attempt in chain[-self.memory :]:
            ids += attempt.tokens
            if attempt.reason == LENGTH and tree.options.stop_tokens:
                ids.append(tree.options.stop_tokens[0])
        return ids

    def room(self, limit: int, prompt: int) -> int:
        """Tokens of one attempt, with the earlier ones in view.

        Raises:
            InputError: there is no room.
        """
        room = (limit - prompt - self.memory) // (self.memory + 1)
        if room < 1:
            raise InputError(
                f"memory: {self.memory} earlier attempts after a prompt of {prompt} tokens leave no room in the "
                f"artifact's {limit}; expected fewer"
            )
        return room

    def check_length(self, length: int, limit: int, prompt: int) -> None:
        room = self.room(limit, prompt)
        if length > room:
            raise InputError(
                f"max_new_tokens: {length} for each of {self.memory + 1} attempts in view, after a "
                f"prompt of {prompt}, are more than the artifact's {limit} tokens; expected at most {room}"
            )

    def choose(self, finalists: Finalists) -> tuple[int, Array]:
        """By a vote within each chain, then one among the chains' winners."""
        chains = [branch.group for branch in finalists.branches]
        return choose_in_chains(finalists.scores, finalists.answer_ids, finalists.vote, finalists.vote_weight, chains)


def _seed(seed: int, again: int) -> int:
    """The seed itself, or the one that takes its place when a context comes again; as a signed number of 64 bits."""
    return (seed + again * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63


def _generate(
    tree: ArtifactTree, contexts: list[tuple[int, ...]], count: int, again: int
) -> list[list[ArtifactBranch]]:
    """`count` completions of each context, which was drawn from `again` times before: one run of one graph."""
    width = max(map(len, contexts))
    ids, mask = np.zeros((2, len(contexts), width), np.int64)
    for row, real, context in zip(ids, mask, contexts, strict=True):
        row[width - len(context) :], real[width - len(context) :] = context, 1
    options = dataclasses.replace(tree.options, n=count, seed=_seed(int(tree.options.seed), again))
    feeds = generate_feeds(ids, mask, [options] * len(contexts), tree.step_token)
    names = ["sequences", "lengths", "scores", "log_probs", "finish_reasons", "computed_tokens"]
    tokens, lengths, scores, log_probs, reasons, computed = tree.engine.session("generate").run(feeds, names, tree.stop)
    tree.cost.prompt_tokens += sum(map(len, contexts))
    tree.cost.sampled_tokens += int(lengths.sum())
    tree.cost.computed_tokens += int(computed)
    tree.cost.scored_tokens += int(computed) if tree.scorer is None else 0
    return [
        [
            ArtifactBranch(
                tokens=tokens[n, b, : lengths[n, b]].tolist(),
                reason=int(reasons[n, b]),
                number=n,
                scores=scores[n, b, : lengths[n, b]].tolist(),
                log_probs=log_probs[n, b, : lengths[n, b]].tolist(),
            )
            for n in range(count)
        ]
        for b in range(len(contexts))
    ]

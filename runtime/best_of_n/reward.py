"""A model of bonnx as a reward function of a trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bonnx.errors import InputError, NoWinnerError

from ..checks import is_list, shown
from ..protocol import ModelLike
from ..text.reader import Item, NoneReadableError

__all__ = ["reward_function"]


def reward_function(
    model: ModelLike, *, aggregation: str | None = None, truncate: bool = False, name: str = "bonnx"
) -> Callable[..., list[float | None]]:
    """A reward function as TRL's `GRPOTrainer` takes it in `reward_funcs`.

    Completions of equal prompts are ranked together, so that each prompt is computed once.

    Args:
        model: what scores.
        aggregation: as in `Model.rank`.
        truncate: as in `Model.rank`.
        name: under which the trainer logs the reward.

    Returns:
        a function of `prompts` and `completions`, equally long lists of texts or of messages, and of whatever else the
        trainer passes, which it ignores. It returns one reward for each completion, or None for one that has no score
        (it is empty, the scorer's vocabulary lacks its text, or its score is NaN), which the trainer leaves out.
    """

    def reward(prompts: Sequence[Item], completions: Sequence[Item], **_: Any) -> list[float | None]:
        if not is_list(prompts) or not is_list(completions) or len(prompts) != len(completions):
            raise InputError(
                "expected equally long lists of prompts and completions; got "
                f"{shown(prompts):.40} and {shown(completions):.40}"
            )
        groups: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            groups.setdefault(repr(prompt), []).append(i)
        rewards: list[float | None] = [None] * len(completions)
        for members in groups.values():
            present = [i for i in members if _text(completions[i])]
            if not present:
                continue
            items = [completions[i] for i in present]
            try:
                ranking = model.rank(prompts[members[0]], items, aggregation=aggregation, truncate=truncate)
            except (NoneReadableError, NoWinnerError):
                # Of this group none has a score.
                continue
            for i, score in zip(present, ranking.candidate_scores.tolist(), strict=True):
                rewards[i] = None if math.isnan(score) else score
        return rewards

    reward.__name__ = name
    return reward


def _text(completion: Item) -> object:
    """What a completion says: its text, or its messages if any says or calls something."""
    if is_list(completion) and all(isinstance(message, Mapping) for message in completion):
        return any(message.get("content") or message.get("tool_calls") for message in completion)  # type: ignore[union-attr]
    return completion

"""PyTorch's float32 scores of many candidates: a prompt is computed once, in one row with its candidates.

Every candidate continues the prompt's positions, and attends to the prompt and to itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from bonnx.models.network import LanguageModel, TwoHeadedNetwork
from bonnx.runtime.artifact.manifest import Scoring
from bonnx.runtime.text.padding import pad

from .exact import Array, certainty, score_rows, scored

__all__ = ["score_candidates"]

# A row is no longer, unless it has only one candidate: its attention takes the square of that.
_TOKENS = 2048


@torch.no_grad()
def score_candidates(
    model: LanguageModel | TwoHeadedNetwork, prompt: Array, candidates: Sequence[Array], scoring: Scoring
) -> Array:
    """Score the tokens of candidates as whole rows would be.

    Args:
        model: in inference mode, float32.
        prompt: (P,) int64 or (P, E) float32.
        candidates: N times (T,) int64 or (T, E) float32.
        scoring: the scoring rule.

    Returns:
        (N, T) float32, padded on the right. Without a scorer, a token's score is the self-certainty of the distribution
        that it is drawn from.
    """
    network = model.network if isinstance(model, LanguageModel) else model
    has_scorer, begin = network.config.has_scorer, len(prompt)
    rows, mask = pad([np.concatenate([prompt, own]) for own in candidates], scoring.pad_token)
    scaling = network.config.rope_scaling
    if scaling is not None and scaling.depends_on_length and rows.shape[1] > scaling.original_max_positions:
        # The prompt's keys depend on the length of the candidate.
        whole = score_rows(model, rows, scoring, mask)[1]
        return whole[:, begin:] if has_scorer else whole[:, begin - 1 : -1]
    parts = []
    for first, last in _groups(begin, [len(own) for own in candidates]):
        backbone = _backbone(model, network, prompt, candidates[first:last], rows.shape[1])
        if has_scorer:
            parts.append(scored(network.scorer, backbone, rows[first:last], scoring)[:, begin:])
        else:
            assert isinstance(model, LanguageModel)
            # One candidate after the other: logits are large.
            parts += [certainty(model.logits(row[None, begin - 1 : -1])) for row in backbone]
    found: Array = torch.cat(parts).numpy()
    return found


def _groups(prompt: int, lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield first and last candidate of rows that hold the prompt and as many candidates as fit."""
    first, total = 0, prompt
    for number, length in enumerate(lengths):
        if number > first and total + length > _TOKENS:
            yield first, number
            first, total = number, prompt
        total += length
    yield first, len(lengths)


def _backbone(
    model: LanguageModel | TwoHeadedNetwork,
    network: TwoHeadedNetwork,
    prompt: Array,
    candidates: Sequence[Array],
    width: int,
) -> Tensor:
    """The backbone's outputs (N, P + T, D) of rows of prompt and candidate; those of padding are the first token's."""
    begin, lengths = len(prompt), [len(own) for own in candidates]
    row = torch.from_numpy(np.concatenate([prompt, *candidates]))[None]
    embedded = model.embedding(row) if isinstance(model, LanguageModel) else row
    owner = torch.from_numpy(np.repeat(np.arange(len(lengths) + 1), [begin, *lengths]))
    positions = torch.cat([torch.arange(begin), *(torch.arange(begin, begin + length) for length in lengths)])
    back = positions[:, None] - positions[None]
    visible = (back >= 0) & ((owner[None] == 0) | (owner[None] == owner[:, None]))
    x = network.enter(embedded)
    rotations = network.rotations(positions[None])
    for block, rotation, window in zip(network.layers(), rotations, network.config.windows, strict=True):
        x = block(x, rotation, (visible if window is None else visible & (back < window))[None, None])
    places = torch.zeros(len(lengths), width, dtype=torch.int64)
    places[:, :begin] = torch.arange(begin)
    for number, length in enumerate(lengths):
        places[number, begin : begin + length] = begin + sum(lengths[:number]) + torch.arange(length)
    backbone: Tensor = network.final_norm(x)[0, places]
    return backbone

"""The gate of a gated scorer, which reads one position of the prompt, in the form from which the graphs are traced.

Shapes: B rows, T positions, O objectives; the others as in `layers.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bonnx.models.rotary import Rotation

from .layers import Layer, Trunk

__all__ = ["candidate_outputs", "gate_after_layer", "gate_of_rows", "last_header", "row_at", "with_row"]


def last_header(ids: Tensor, real: Tensor, header: Sequence[int]) -> Tensor:
    """Where the last header begins in ids (B, T) int64 with a mask (B, T) bool: (B,) int64, -1 for nowhere."""
    length = ids.shape[1]
    padded = F.pad(torch.where(real, ids, -1), (0, len(header) - 1), value=-1)
    begins = real
    for i, token in enumerate(header):
        begins = begins & (padded.narrow(1, i, length) == token)
    return torch.where(begins, torch.arange(length)[None], -1).amax(1)


def row_at(x: Tensor, index: Tensor) -> Tensor:
    """x (B, T, W) and index (B,) int64 -> (B, 1, W)."""
    return x.gather(1, index[:, None, None].expand(x.shape[0], 1, x.shape[2]))


def with_row(x: Tensor, index: Tensor, start: int) -> Tensor:
    """x (B, T, W) and index (B,) int64 -> (B, 1 + T - start, W): the row at the index, then those from `start` on."""
    return torch.cat([row_at(x, index), x[:, start:]], 1)


def gate_of_rows(trunk: Trunk, normed: Tensor, at: Tensor) -> Tensor:
    """Normed backbone (B, T, D), and where the header is (B,) -> coefficients (B, O), NaN without a header."""
    state = row_at(normed, at.clamp(min=0)).reshape(at.shape[0], normed.shape[2])
    return torch.where(at[:, None] >= 0, trunk.coefficients(state), torch.nan)


def gate_after_layer(
    trunk: Trunk,
    layer: Layer,
    x: Tensor,
    y: Tensor,
    rotation: Rotation | None,
    at: Tensor,
    attend: Callable[[Tensor], Tensor],
) -> Tensor:
    """Compute the last layer at one position of each row, and what the gate makes of it.

    Args:
        trunk: has the gate.
        layer: the last one.
        x: the residual stream that enters it, (B, T, D).
        y: the same, normed.
        rotation: of these positions.
        at: the position, (B,) int64.
        attend: queries (B, 1, H, K) -> the attention's output (B, 1, H * K).

    Returns:
        coefficients (B, O).
    """
    rows = at.shape[0]
    turned = None if rotation is None else (row_at(rotation[0], at), row_at(rotation[1], at))
    out = attend(layer.queries(row_at(y, at).reshape(rows, y.shape[2]), rows, turned))
    state = layer.finish(row_at(x, at).reshape(rows, x.shape[2]), out.reshape(rows, layer.heads * layer.size))
    return trunk.coefficients(trunk.final_norm(state))


def candidate_outputs(trunk: Trunk, normed: Tensor, gate: Tensor | None, real: Tensor) -> tuple[Tensor, ...]:
    """The outputs of `rank`.

    Args:
        trunk: has the scorer.
        normed: the candidates' backbone, (B * N * C, D).
        gate: coefficients (B, O), or None without a gate.
        real: the candidates' mask, (B, N, C) bool.

    Returns:
        scores (N, B, C); with a gate also objectives (N, B, C, O). Those of padding are 0.
    """
    labels = trunk.labels(normed)
    scores = torch.where(real, trunk.score(labels, gate).reshape(real.shape), 0.0).transpose(0, 1)
    if gate is None:
        return (scores,)
    objectives = labels.reshape(*real.shape, labels.shape[1])
    return scores, torch.where(real[..., None], objectives, 0.0).transpose(0, 1)

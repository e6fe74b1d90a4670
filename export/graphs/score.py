"""The `score` graph: a score for every position of whole rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import RowAttention, shared_keys, shared_values
from .gate import gate_of_rows, last_header
from .layers import Layer, Trunk

__all__ = ["ScoreGraph"]


class ScoreGraph(nn.Module):
    """Rows of tokens with a padding mask -> the network's backbone and scores."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, inputs: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Inputs (B, T) int64 or (B, T, E) float32, mask (B, T) int64 -> backbone (B, T, D), scores (B, T, 1).

        Scores of padding are 0. With a gate there are also the objectives (B, T, O).
        """
        trunk = self.trunk
        rows, length = attention_mask.shape
        real = attention_mask > 0
        positions = (real.to(torch.int64).cumsum(1) - 1).clamp(min=0)
        rotations = trunk.rotations(positions)
        attention = trunk.for_each_window(lambda window: RowAttention(window, positions, positions, trunk.config))
        x = trunk.embed(inputs)
        x = trunk.project(x.reshape(rows * length, x.shape[-1]))
        for layer, rotation, attend in zip(trunk.layers, rotations, attention, strict=True):
            assert isinstance(layer, Layer)
            x = trunk.enter(x)
            y = layer.attention_norm(x)
            q, k, v = layer.queries(y, rows, rotation), layer.keys(y, rows, rotation), layer.values(y, rows)
            out = attend(q, shared_keys(k, real), shared_values(v))
            x = layer.finish(x, out.reshape(rows * length, layer.heads * layer.size))
        normed = trunk.final_norm(x)
        backbone, labels = normed.reshape(rows, length, trunk.config.hidden_size), trunk.labels(normed)
        gate = gate_of_rows(trunk, backbone, last_header(inputs, real, trunk.header)) if trunk.header else None
        scores = torch.where(real, trunk.score(labels, gate).reshape(rows, length), 0.0)
        if gate is None:
            return backbone, scores[:, :, None]
        return backbone, scores[:, :, None], labels.reshape(rows, length, labels.shape[1])

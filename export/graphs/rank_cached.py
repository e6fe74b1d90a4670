"""`rank` in two graphs: `rank_prefill` reads a prompt, and `rank_cached` reads candidates after it.

A host that keeps the prompt's keys and values computes a prompt before its candidates are there, and computes only what
is new when the next prompt begins like an earlier one. It also reads a long prompt piece by piece, which takes the
memory of one piece.

Shapes: N candidates, B prompts, P new tokens of a prompt, T all of its tokens, C candidate length; the others as in
`layers.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import CandidateAttention, attend_prefix, readable, shared_keys, shared_values
from .layers import Layer, Trunk, additive

__all__ = ["RankCachedGraph", "RankPrefillGraph"]


class RankPrefillGraph(nn.Module):
    """New tokens of prompts, and the keys and values of the tokens before them -> the keys and values of all."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, inputs: Tensor, prompt_mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Read the last P tokens of prompts.

        Args:
            inputs: (B, P[, E]).
            prompt_mask: of all tokens, (B, T) int64. T - P tokens of the past are read; any after them are ignored.
            past: for each layer the keys (B, G, K + 2, S + 1) and values (B, G, S + 1, K) of S tokens before, with S
                from T - P on: an earlier output, or for S = 0 anything of that shape.

        Returns:
            for each layer the keys (B, G, K + 2, T + 1) and values (B, G, T + 1, K); see `attention.py`.
        """
        trunk = self.trunk
        batch, length = inputs.shape[:2]
        before = prompt_mask.shape[1] - length
        real = prompt_mask > 0
        positions = (real.to(torch.int64).cumsum(1) - 1).clamp(min=0)
        rotations = trunk.rotations(positions.narrow(1, before, length))
        # The last key is no token; `attend_prefix` masks it.
        masks = trunk.for_each_window(
            lambda window: F.pad(additive(readable(positions, before, length, window)), (0, 1))
        )
        x = trunk.embed(inputs)
        x = trunk.project(x.reshape(batch * length, x.shape[-1]))
        cache: list[Tensor] = []
        for i, (layer, rotation, mask) in enumerate(zip(trunk.layers, rotations, masks, strict=True)):
            assert isinstance(layer, Layer)
            x = trunk.enter(x)
            y = layer.attention_norm(x)
            k, v = layer.keys(y, batch, rotation), layer.values(y, batch)
            keys = torch.cat([past[2 * i].narrow(3, 0, before), shared_keys(k, real.narrow(1, before, length))], 3)
            values = torch.cat([past[2 * i + 1].narrow(2, 0, before), shared_values(v)], 2)
            cache += [keys, values]
            # Nothing reads the last layer's output.
            if i < len(masks) - 1:
                out = attend_prefix(layer.queries(y, batch, rotation), keys, values, mask, layer.cap)
                x = layer.finish(x, out.reshape(batch * length, layer.heads * layer.size))
        return tuple(cache)


class RankCachedGraph(nn.Module):
    """Candidates, and the keys and values of their prompts -> a score for every candidate token."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, prompt_mask: Tensor, candidate: Tensor, candidate_mask: Tensor, *cache: Tensor) -> Tensor:
        """Read candidates after their prompts.

        Args:
            prompt_mask: (B, T) int64.
            candidate: (N, B, C[, E]).
            candidate_mask: (N, B, C) int64.
            cache: for each layer the prompts' keys and values, from `RankPrefillGraph`.

        Returns:
            scores (N, B, C); those of padding are 0.
        """
        trunk = self.trunk
        count, batch, length = candidate_mask.shape
        rows = batch * count * length
        real, candidate_real = prompt_mask > 0, candidate_mask.transpose(0, 1) > 0
        steps = candidate_real.to(torch.int64).cumsum(2) - 1 + real.to(torch.int64).sum(1)[:, None, None]
        positions = steps.clamp(min=0).reshape(batch, count * length)
        prompt_positions = (real.to(torch.int64).cumsum(1) - 1).clamp(min=0)
        rotations = trunk.rotations(positions)
        attention = trunk.for_each_window(
            lambda window: CandidateAttention(
                window, prompt_positions, candidate_real, positions, trunk.config.attention_cap
            )
        )
        x = trunk.embed(candidate).transpose(0, 1)
        x = trunk.project(x.reshape(rows, x.shape[-1]))
        for i, (layer, rotation, attend) in enumerate(zip(trunk.layers, rotations, attention, strict=True)):
            assert isinstance(layer, Layer)
            x = trunk.enter(x)
            y = layer.attention_norm(x)
            q, k, v = layer.queries(y, batch, rotation), layer.keys(y, batch, rotation), layer.values(y, batch)
            out = attend(q, k, v, cache[2 * i], cache[2 * i + 1])
            x = layer.finish(x, out.reshape(rows, layer.heads * layer.size))
        scores = trunk.score(trunk.final_norm(x)).reshape(batch, count, length)
        return torch.where(candidate_real, scores, 0.0).transpose(0, 1)

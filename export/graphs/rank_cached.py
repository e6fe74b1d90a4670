"""`rank` in two graphs: `rank_prefill` reads a prompt, and `rank_cached` reads candidates after it.

A host that keeps the prompt's keys and values computes a prompt before its candidates are there, and computes only what
is new when the next prompt begins like an earlier one. It also reads a long prompt piece by piece, which takes the
memory of one piece.

Shapes: N candidates, B prompts, P new tokens of a prompt, T all of its tokens, C candidate length; the others as in
`layers.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bonnx.models.rotary import Rotation

from .attention import CandidateAttention, RowAttention, attend_one, seen_by_one, shared_keys, shared_values
from .gate import candidate_outputs, gate_after_layer
from .layers import Layer, Trunk

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
                from T - P on: an earlier output, or for S = 0 anything of that shape. With a gate, also its
                coefficients (B, O), and where it reads, (B,) int64; if that lies before the new tokens, the
                coefficients of the past are kept.

        Returns:
            for each layer the keys (B, G, K + 2, T + 1) and values (B, G, T + 1, K); see `attention.py`. With a gate,
            also its coefficients (B, O).
        """
        trunk = self.trunk
        batch, length = inputs.shape[:2]
        before = prompt_mask.shape[1] - length
        real = prompt_mask > 0
        positions = (real.to(torch.int64).cumsum(1) - 1).clamp(min=0)
        new = positions.narrow(1, before, length)
        rotations = trunk.rotations(new)
        attention = trunk.for_each_window(lambda window: RowAttention(window, positions, new, trunk.config))
        x = trunk.embed(inputs)
        x = trunk.project(x.reshape(batch * length, x.shape[-1]))
        cache: list[Tensor] = []
        for i, (layer, rotation, attend) in enumerate(zip(trunk.layers, rotations, attention, strict=True)):
            assert isinstance(layer, Layer)
            x = trunk.enter(x)
            y = layer.attention_norm(x)
            k, v = layer.keys(y, batch, rotation), layer.values(y, batch)
            keys = shared_keys(k, real.narrow(1, before, length), past[2 * i], before)
            values = shared_values(v, past[2 * i + 1], before)
            cache += [keys, values]
            # Nothing reads the last layer's output.
            if i < len(attention) - 1:
                out = attend(layer.queries(y, batch, rotation), keys, values)
                x = layer.finish(x, out.reshape(batch * length, layer.heads * layer.size))
            elif trunk.header:
                cache.append(_gate(trunk, layer, x, y, rotation, attend, before, cache[-2:], past[-2:]))
        return tuple(cache)


def _gate(
    trunk: Trunk,
    layer: Layer,
    x: Tensor,
    y: Tensor,
    rotation: Rotation | None,
    attention: RowAttention,
    before: int,
    cache: Sequence[Tensor],
    past: Sequence[Tensor],
) -> Tensor:
    """The gate's coefficients (B, O): of the new tokens if it reads one of them, else of the past.

    Args:
        trunk: has the gate.
        layer: the last one.
        x: the residual stream that enters it, (B * P, D).
        y: the same, normed.
        rotation: of the new tokens.
        attention: of the layer.
        before: number of tokens in the past.
        cache: keys and values of the layer.
        past: coefficients (B, O), and where the gate reads, (B,) int64.
    """
    gate, position = past
    batch, (keys, values) = position.shape[0], cache
    x, y = (t.reshape(batch, -1, t.shape[1]) for t in (x, y))
    place = (position - before).clamp(min=0, max=x.shape[1] - 1)
    seen = seen_by_one(attention.positions, before + place, attention.kind.window)
    new = gate_after_layer(trunk, layer, x, y, rotation, place, lambda q: attend_one(q, keys, values, seen, layer.cap))
    return torch.where((position >= before)[:, None], new, gate)


class RankCachedGraph(nn.Module):
    """Candidates, and the keys and values of their prompts -> a score for every candidate token."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(
        self, prompt_mask: Tensor, candidate: Tensor, candidate_mask: Tensor, *cache: Tensor
    ) -> tuple[Tensor, ...]:
        """Read candidates after their prompts.

        Args:
            prompt_mask: (B, T) int64.
            candidate: (N, B, C[, E]).
            candidate_mask: (N, B, C) int64.
            cache: for each layer the prompts' keys and values, and with a gate its coefficients, from
                `RankPrefillGraph`.

        Returns:
            as `candidate_outputs`.
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
            lambda window: CandidateAttention(window, prompt_positions, candidate_real, positions, trunk.config)
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
        return candidate_outputs(trunk, trunk.final_norm(x), cache[-1] if trunk.header else None, candidate_real)

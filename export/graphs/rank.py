"""The `rank` graph: one prompt and many candidates, with the prompt computed only once.

Prompt and candidate tokens are concatenated for every matrix product; attention treats them separately, as described in
`attention.py`.

Shapes: N candidates, B prompts, P prompt length, C candidate length; the others as in `layers.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import CandidateAttention, allowed, attend, shared_keys, shared_values
from .gate import candidate_outputs, gate_after_layer, last_header, row_at
from .layers import Layer, Trunk, additive, part

__all__ = ["RankGraph"]


class RankGraph(nn.Module):
    """Prompts and their candidates -> a score for every candidate token."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(
        self, prompt: Tensor, prompt_mask: Tensor, candidate: Tensor, candidate_mask: Tensor
    ) -> tuple[Tensor, ...]:
        """Prompt (B, P[, E]), its mask (B, P), candidates (N, B, C[, E]), their mask (N, B, C) -> scores (N, B, C).

        Masks are int64. Scores of padding are 0. With a gate there are also the objectives (N, B, C, O).
        """
        trunk = self.trunk
        batch, prompt_length = prompt_mask.shape
        count, _, length = candidate_mask.shape
        total = prompt_length + count * length
        real, candidate_real = prompt_mask > 0, candidate_mask.transpose(0, 1) > 0
        steps = candidate_real.to(torch.int64).cumsum(2) - 1 + real.to(torch.int64).sum(1)[:, None, None]
        candidate_positions = steps.clamp(min=0).reshape(batch, count * length)
        prompt_positions = (real.to(torch.int64).cumsum(1) - 1).clamp(min=0)
        rotations = trunk.rotations(torch.cat([prompt_positions, candidate_positions], 1))
        masks = trunk.for_each_window(lambda window: additive(allowed(real, prompt_positions, window)))
        attention = trunk.for_each_window(
            lambda window: CandidateAttention(
                window, prompt_positions, candidate_real, candidate_positions, trunk.config.attention_cap
            )
        )

        embedded = trunk.embed(candidate).transpose(0, 1)
        x = torch.cat([trunk.embed(prompt), embedded.reshape(batch, count * length, embedded.shape[-1])], 1)
        x = trunk.project(x.reshape(batch * total, x.shape[-1]))
        *before_last, last = zip(trunk.layers, rotations, masks, attention, strict=True)
        for layer, rotation, mask, attend_candidates in before_last:
            assert isinstance(layer, Layer)
            x = trunk.enter(x)
            y = layer.attention_norm(x)
            q, k, v = layer.queries(y, batch, rotation), layer.keys(y, batch, rotation), layer.values(y, batch)
            first_k, first_v, k, v = (
                k[:, :prompt_length],
                v[:, :prompt_length],
                k[:, prompt_length:],
                v[:, prompt_length:],
            )
            first = attend(q[:, :prompt_length], first_k, first_v, mask, layer.cap)
            keys, values = shared_keys(first_k, real), shared_values(first_v)
            rest = attend_candidates(q[:, prompt_length:], k, v, keys, values)
            x = layer.finish(x, torch.cat([first, rest], 1).reshape(batch * total, layer.heads * layer.size))
        # Nothing but a gate reads the prompt's output of the last layer, so only its keys and values are computed.
        layer, rotation, mask, attend_candidates = last
        assert isinstance(layer, Layer)
        x = trunk.enter(x)
        y = layer.attention_norm(x)
        k, v = layer.keys(y, batch, rotation), layer.values(y, batch)
        x, y = x.reshape(batch, total, -1), y.reshape(batch, total, -1)
        gate = None
        if trunk.header:
            at = last_header(prompt, real, trunk.header)
            place = at.clamp(min=0)
            first_k, first_v, row = k[:, :prompt_length], v[:, :prompt_length], row_at(mask, place)
            gate = gate_after_layer(
                trunk, layer, x, y, rotation, place, lambda q: attend(q, first_k, first_v, row, layer.cap)
            )
            gate = torch.where(at[:, None] >= 0, gate, torch.nan)
        x, y = (t[:, prompt_length:].reshape(batch * count * length, -1) for t in (x, y))
        q = layer.queries(y, batch, part(rotation, prompt_length, count * length))
        keys, values = shared_keys(k[:, :prompt_length], real), shared_values(v[:, :prompt_length])
        out = attend_candidates(q, k[:, prompt_length:], v[:, prompt_length:], keys, values)
        x = layer.finish(x, out.reshape(batch * count * length, layer.heads * layer.size))
        return candidate_outputs(trunk, trunk.final_norm(x), gate, candidate_real)

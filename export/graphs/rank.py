"""The `rank` graph: one prompt and many candidates, with the prompt computed only once.

Prompt and candidate tokens are concatenated for every matrix product; attention treats them separately, as described in
`attention.py`.

Shapes: N candidates, B prompts, P prompt length, C candidate length; the others as in `layers.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bonnx.models.rotary import Rotation

from .attention import CandidateAttention, RowAttention, attend_one, seen_by_one, shared_keys, shared_values
from .gate import candidate_outputs, last_header, with_row
from .layers import Layer, Trunk, part

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
        of_prompt = trunk.for_each_window(
            lambda window: RowAttention(window, prompt_positions, prompt_positions, trunk.config)
        )
        of_candidates = trunk.for_each_window(
            lambda window: CandidateAttention(
                window, prompt_positions, candidate_real, candidate_positions, trunk.config
            )
        )

        embedded = trunk.embed(candidate).transpose(0, 1)
        x = torch.cat([trunk.embed(prompt), embedded.reshape(batch, count * length, embedded.shape[-1])], 1)
        x = trunk.project(x.reshape(batch * total, x.shape[-1]))
        *before_last, last = zip(trunk.layers, rotations, of_prompt, of_candidates, strict=True)
        for layer, rotation, attend_prompt, attend_candidates in before_last:
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
            keys, values = shared_keys(first_k, real), shared_values(first_v)
            first = attend_prompt(q[:, :prompt_length], keys, values)
            rest = attend_candidates(q[:, prompt_length:], k, v, keys, values)
            x = layer.finish(x, torch.cat([first, rest], 1).reshape(batch * total, layer.heads * layer.size))
        return self._last_layer(prompt, real, candidate_real, x, *last)

    def _last_layer(
        self,
        prompt: Tensor,
        real: Tensor,
        candidate_real: Tensor,
        x: Tensor,
        layer: nn.Module,
        rotation: Rotation | None,
        attend_prompt: RowAttention,
        attend_candidates: CandidateAttention,
    ) -> tuple[Tensor, ...]:
        """Compute the last layer, of the prompt only its keys and values and the row that a gate reads; then score."""
        assert isinstance(layer, Layer)
        trunk = self.trunk
        batch, length = real.shape
        rows = candidate_real.shape[1] * candidate_real.shape[2]
        x = trunk.enter(x)
        y = layer.attention_norm(x)
        k, v = layer.keys(y, batch, rotation), layer.values(y, batch)
        first_k, first_v = k[:, :length], v[:, :length]
        x, y = (t.reshape(batch, length + rows, -1) for t in (x, y))
        at = last_header(prompt, real, trunk.header) if trunk.header else torch.zeros(batch, dtype=torch.int64)
        read, place = int(bool(trunk.header)), at.clamp(min=0)
        if read:
            # The row runs beside those of the candidates, so that every weight is used once.
            x, y = (with_row(t, place, length) for t in (x, y))
            rotation = rotation and (with_row(rotation[0], place, length), with_row(rotation[1], place, length))
        else:
            x, y, rotation = x[:, length:], y[:, length:], part(rotation, length, rows)
        q = layer.queries(y.reshape(batch * (read + rows), -1), batch, rotation)
        keys, values = shared_keys(first_k, real), shared_values(first_v)
        out = attend_candidates(q[:, read:], k[:, length:], v[:, length:], keys, values)
        if read:
            seen = seen_by_one(attend_prompt.positions, place, attend_prompt.kind.window)
            first = attend_one(q[:, :1], keys, values, seen, layer.cap)
            out = torch.cat([first, out.reshape(batch, rows, -1)], 1)
        x = layer.finish(
            x.reshape(batch * (read + rows), -1), out.reshape(batch * (read + rows), layer.heads * layer.size)
        )
        normed, gate = trunk.final_norm(x), None
        if read:
            normed = normed.reshape(batch, 1 + rows, -1)
            gate = torch.where(at[:, None] >= 0, trunk.coefficients(normed[:, 0]), torch.nan)
            normed = normed[:, 1:].reshape(batch * rows, -1)
        return candidate_outputs(trunk, normed, gate, candidate_real)

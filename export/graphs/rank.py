"""The `rank` graph: one prompt and many candidates, with the prompt computed only once.

Prompt and candidate tokens are concatenated for every matrix product; attention treats them separately, as described in
`attention.py`.

Shapes: N candidates, B prompts, P prompt length, C candidate length; the others as in `layers.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import allowed, attend, attend_prompt, attend_self, shared_keys, shared_values
from .layers import Layer, Trunk, additive

__all__ = ["RankGraph"]


class RankGraph(nn.Module):
    """Prompts and their candidates -> a score for every candidate token."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, prompt: Tensor, prompt_mask: Tensor, candidate: Tensor, candidate_mask: Tensor) -> Tensor:
        """Prompt (B, P[, E]), its mask (B, P), candidates (N, B, C[, E]), their mask (N, B, C) -> scores (N, B, C).

        Masks are int64. Scores of padding are 0.
        """
        trunk = self.trunk
        batch, prompt_length = prompt_mask.shape
        count, _, length = candidate_mask.shape
        total = prompt_length + count * length
        real, candidate_real = prompt_mask > 0, candidate_mask.transpose(0, 1) > 0
        steps = candidate_real.to(torch.int64).cumsum(2) - 1 + real.to(torch.int64).sum(1)[:, None, None]
        candidate_positions = steps.clamp(min=0).reshape(batch, count * length)
        prompt_positions = (real.to(torch.int64).cumsum(1) - 1).clamp(min=0)
        cos, sin = trunk.rotation(torch.cat([prompt_positions, candidate_positions], 1))
        masks = trunk.for_each_window(
            lambda window: _Masks(window, real, prompt_positions, candidate_real, candidate_positions)
        )

        embedded = trunk.embed(candidate).transpose(0, 1)
        x = torch.cat([trunk.embed(prompt), embedded.reshape(batch, count * length, embedded.shape[-1])], 1)
        x = trunk.project(x.reshape(batch * total, x.shape[-1]))
        for layer, mask in zip(trunk.layers[:-1], masks[:-1], strict=True):
            assert isinstance(layer, Layer)
            x = trunk.enter(x)
            y = layer.attention_norm(x)
            q, k, v = layer.queries(y, cos, sin), layer.keys(y, cos, sin), layer.values(y, batch)
            first = attend(q[:, :prompt_length], k[:, :prompt_length], v[:, :prompt_length], mask.prompt)
            rest = mask.attend(q[:, prompt_length:], k, v)
            x = layer.finish(x, torch.cat([first, rest], 1).reshape(batch * total, layer.heads * layer.size))
        # Nothing reads the prompt's output of the last layer, so only its keys and values are computed.
        layer = trunk.layers[-1]
        assert isinstance(layer, Layer)
        x = trunk.enter(x)
        y = layer.attention_norm(x)
        k, v = layer.keys(y, cos, sin), layer.values(y, batch)
        x, y = (t.reshape(batch, total, -1)[:, prompt_length:].reshape(batch * count * length, -1) for t in (x, y))
        q = layer.queries(y, cos[:, prompt_length:], sin[:, prompt_length:])
        x = layer.finish(x, masks[-1].attend(q, k, v).reshape(batch * count * length, layer.heads * layer.size))
        scores = trunk.score(trunk.final_norm(x)).reshape(batch, count, length)
        return torch.where(candidate_real, scores, 0.0).transpose(0, 1)


class _Masks:
    """The attention masks for one sliding window, and the candidates' attention that uses them."""

    def __init__(
        self, window: int | None, real: Tensor, positions: Tensor, candidate_real: Tensor, candidate_positions: Tensor
    ) -> None:
        self.real, self.prompt_length = real, real.shape[1]
        self.batch, self.count, self.length = candidate_real.shape
        rows = self.batch * self.count
        self.prompt = additive(allowed(real, positions, window))
        readable = allowed(candidate_real.reshape(rows, -1), candidate_positions.reshape(rows, -1), window)
        self.candidates = additive(readable).reshape(self.batch, 1, self.count, self.length, 1, self.length)
        self.reach = None
        if window is not None:
            near = candidate_positions[:, :, None] - positions[:, None] < window
            self.reach = additive(near)[:, None, :, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Candidates' queries (B, N * C, H, K), all keys and values (B, P + N * C, G, K) -> (B, N * C, H * K)."""
        batch, count, length, (kv_heads, size) = self.batch, self.count, self.length, k.shape[2:]
        group = q.shape[2] // kv_heads
        flat = (batch, kv_heads, count * length * group, size)
        q = q.reshape(batch, count * length, kv_heads, group * size).transpose(1, 2)
        candidate_k = k[:, self.prompt_length :].reshape(batch, count, length, kv_heads, size).permute(0, 3, 1, 4, 2)
        candidate_v = v[:, self.prompt_length :].reshape(batch, count, length, kv_heads, size).permute(0, 3, 1, 2, 4)
        candidate_q = q.reshape(batch, kv_heads, count, length * group, size)
        self_out, self_logit = attend_self(candidate_q, candidate_k, candidate_v, self.candidates)
        keys, values = shared_keys(k[:, : self.prompt_length], self.real), shared_values(v[:, : self.prompt_length])
        out = attend_prompt(
            q.reshape(flat), self_out.reshape(flat), self_logit.reshape(*flat[:3], 1), keys, values, self.reach
        )
        out = out.reshape(batch, kv_heads, count * length, group * size)
        return out.transpose(1, 2).reshape(batch, count * length, kv_heads * group * size)

"""`rank`: one prompt, many candidates, the prompt computed once whatever their number.

Prompt and candidate tokens are joined for every matrix product. Attention splits at the prompt's end: a candidate's
queries read the prompt's keys and values, which are stored once, and the candidate's own. The two softmaxes are merged
without joining their weights, the largest tensors of the graph: the candidate's own part enters the attention to the
prompt as one more key, whose logit is the own part's log-sum-exp and whose value is the own part's result. The prompt's
padding enters as one more column of the queries (1) and of the keys (0 or MASKED), inside the matrix product.

Shapes: N candidates, B prompts, P prompt length, C candidate length; the others as in `layers.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layers import Layer, Trunk, additive
from .score_graph import allowed, attend

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
        real, own_real = prompt_mask > 0, candidate_mask.transpose(0, 1) > 0
        steps = own_real.to(torch.int64).cumsum(2) - 1 + real.to(torch.int64).sum(1)[:, None, None]
        own_positions = steps.clamp(min=0).reshape(batch, count * length)
        prompt_positions = (real.to(torch.int64).cumsum(1) - 1).clamp(min=0)
        cos, sin = trunk.rotation(torch.cat([prompt_positions, own_positions], 1))
        masks = _Masks(trunk, real, prompt_positions, own_real, own_positions)

        own = trunk.embed(candidate).transpose(0, 1)
        x = torch.cat([trunk.embed(prompt), own.reshape(batch, count * length, own.shape[-1])], 1)
        x = trunk.project(x.reshape(batch * total, x.shape[-1]))
        for layer in trunk.layers[:-1]:
            assert isinstance(layer, Layer)
            y = layer.attention_norm(x)
            q, k, v = layer.queries(y, cos, sin), layer.keys(y, cos, sin), layer.values(y, batch)
            first = attend(q[:, :prompt_length], k[:, :prompt_length], v[:, :prompt_length], masks.prompt)
            rest = masks.attend(q[:, prompt_length:], k, v)
            x = layer.finish(x, torch.cat([first, rest], 1).reshape(batch * total, layer.heads * layer.size))
        # In the last layer nothing reads the prompt's own output: only its keys and values are computed.
        layer = trunk.layers[-1]
        assert isinstance(layer, Layer)
        y = layer.attention_norm(x)
        k, v = layer.keys(y, cos, sin), layer.values(y, batch)
        x, y = (t.reshape(batch, total, -1)[:, prompt_length:].reshape(batch * count * length, -1) for t in (x, y))
        q = layer.queries(y, cos[:, prompt_length:], sin[:, prompt_length:])
        x = layer.finish(x, masks.attend(q, k, v).reshape(batch * count * length, layer.heads * layer.size))
        scores = trunk.score(trunk.final_norm(x)).reshape(batch, count, length)
        return torch.where(own_real, scores, 0.0).transpose(0, 1)


class _Masks:
    """Who may read whom, made once for all layers, and the candidates' attention that uses it."""

    def __init__(self, trunk: Trunk, real: Tensor, positions: Tensor, own_real: Tensor, own_positions: Tensor) -> None:
        window, kv_heads, size = trunk.config.sliding_window, trunk.config.num_kv_heads, trunk.config.size_of_head
        self.group = trunk.config.num_heads // kv_heads
        self.batch, self.prompt_length = real.shape
        self.count, self.length = own_real.shape[1], own_real.shape[2]
        self.kv_heads, self.size = kv_heads, size
        rows = self.batch * self.count
        self.prompt = additive(allowed(real, positions, window))
        own = allowed(own_real.reshape(rows, -1), own_positions.reshape(rows, -1), window)
        self.own = additive(own).reshape(self.batch, 1, self.count, self.length, 1, self.length)
        self.padding = additive(real)[:, None, None].expand(self.batch, kv_heads, 1, self.prompt_length)
        self.reach = None
        if window is not None:
            near = own_positions[:, :, None] - positions[:, None] < window
            self.reach = additive(near)[:, None, :, None]
        self.ones = torch.ones(self.batch, kv_heads, self.count * self.length * self.group, 1)
        self.blank = torch.zeros(self.batch, kv_heads, 1, self.prompt_length)
        last = torch.tensor([0.0] * (size + 1) + [1.0])
        self.extra_key = last[:, None].expand(self.batch, kv_heads, size + 2, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Candidates' queries (B, N * C, H, K), joined keys and values (B, P + N * C, G, K) -> (B, N * C, H * K)."""
        batch, count, length, group, size = self.batch, self.count, self.length, self.group, self.size
        grouped = (batch, self.kv_heads, count * length, group * size)
        flat = (batch, self.kv_heads, count * length * group, size)
        q = q.reshape(batch, count * length, self.kv_heads, group * size).transpose(1, 2)
        own_k = k[:, self.prompt_length :].reshape(batch, count, length, self.kv_heads, size).permute(0, 3, 1, 4, 2)
        own_v = v[:, self.prompt_length :].reshape(batch, count, length, self.kv_heads, size).permute(0, 3, 1, 2, 4)
        own_shape = (batch, self.kv_heads, count, length * group)
        logits = (q.reshape(*own_shape, size) @ own_k).reshape(batch, self.kv_heads, count, length, group, length)
        logits = logits + self.own
        # The first two steps of a softmax, so that its sum is at hand for the log-sum-exp.
        top = logits.amax(-1, keepdim=True)
        # Below exp(-80) lie denormal numbers, on which processors are many times slower.
        raised = (logits - top).clamp(min=-80.0).exp()
        mass = raised.sum(-1, keepdim=True)
        own = ((raised / mass).reshape(*own_shape, length) @ own_v).reshape(flat)
        own_logit = (top + mass.log()).reshape(*flat[:3], 1)

        keys = k[:, : self.prompt_length].permute(0, 2, 3, 1)
        keys = torch.cat([torch.cat([keys, self.padding, self.blank], 2), self.extra_key], 3)
        values = v[:, : self.prompt_length].transpose(1, 2)
        # The own part's value differs from query to query, so it is added after the product.
        values = torch.cat([values, torch.zeros_like(values[:, :, :1])], 2)
        logits = torch.cat([q.reshape(flat), self.ones, own_logit], 3) @ keys
        if self.reach is not None:
            logits = self._limit(logits)
        weights = logits.softmax(-1)
        out = weights @ values + weights[..., -1:] * own
        return out.reshape(grouped).transpose(1, 2).reshape(batch, count * length, self.kv_heads * group * size)

    def _limit(self, logits: Tensor) -> Tensor:
        """A sliding window also ends within the prompt: (B, G, N * C * R, P + 1) -> the same."""
        assert self.reach is not None
        shape = (self.batch, self.kv_heads, self.count * self.length, self.group, self.prompt_length)
        near = (logits[..., :-1].reshape(shape) + self.reach).reshape(*logits.shape[:3], self.prompt_length)
        return torch.cat([near, logits[..., -1:]], 3)

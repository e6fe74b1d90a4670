"""The two passes of generation: one over the prompt, then one for each new token of the candidates.

Without a scorer, both passes give the self-certainty of the distribution of the next token instead of scores.

Shapes: N candidates, B prompts, P prompt length, T tokens of a candidate so far, V vocab_size; the others as in
`layers.py`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..precision.products import VocabularyHead
from .attention import (
    RowAttention,
    attend_one,
    attend_prompt,
    attend_self,
    seen_by_one,
    shared_keys,
    shared_values,
)
from .layers import Layer, Trunk, additive

__all__ = ["PromptPass", "TokenPass"]


class PromptPass(nn.Module):
    """Prompts -> logits of the first token, and the key-value cache that all candidates share.

    Without a scorer, the self-certainty of these logits (B,) follows them.
    """

    def __init__(self, trunk: Trunk, head: VocabularyHead) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Ids and mask (B, P) int64, padded on either side -> logits (B, V), then keys and values, layer by layer.

        Keys are (B, G, K + 2, 1 + P) and values (B, G, 1 + P, K); see `attention.py`.
        """
        trunk = self.trunk
        batch, length = attention_mask.shape
        real = attention_mask > 0
        positions = (real.to(torch.int64).cumsum(1) - 1).clamp(min=0)
        rotations = trunk.rotations(positions)
        attention = trunk.for_each_window(lambda window: RowAttention(window, positions, positions, trunk.config))
        x = trunk.embed(input_ids)
        x = trunk.project(x.reshape(batch * length, x.shape[-1]))
        cache: list[Tensor] = []
        *before_last, last_layer = zip(trunk.layers, rotations, attention, strict=True)
        for layer, rotation, attend in before_last:
            assert isinstance(layer, Layer)
            x = trunk.enter(x)
            y = layer.attention_norm(x)
            q, k, v = layer.queries(y, batch, rotation), layer.keys(y, batch, rotation), layer.values(y, batch)
            cache += [shared_keys(k, real), shared_values(v)]
            out = attend(q, *cache[-2:])
            x = layer.finish(x, out.reshape(batch * length, layer.heads * layer.size))
        # Only each prompt's last token is needed from the last layer.
        layer, rotation, attend = last_layer
        assert isinstance(layer, Layer)
        x = trunk.enter(x)
        y = layer.attention_norm(x)
        k, v = layer.keys(y, batch, rotation), layer.values(y, batch)
        keys, values = shared_keys(k, real), shared_values(v)
        cache += [keys, values]
        last = (real.to(torch.int64) * (torch.arange(length) + 1)).amax(1).clamp(min=1) - 1
        rows = torch.arange(batch) * length + last
        x, y = x.index_select(0, rows), y.index_select(0, rows)

        def at_last(of_positions: Tensor) -> Tensor:
            return of_positions.flatten(0, 1).index_select(0, rows)[:, None]

        q = layer.queries(y, batch, rotation and (at_last(rotation[0]), at_last(rotation[1])))
        seen = seen_by_one(positions, last, attend.kind.window)
        x = layer.finish(x, attend_one(q, keys, values, seen, layer.cap).reshape(batch, layer.heads * layer.size))
        logits = self.head(trunk.final_norm(x))
        return (logits, *cache) if trunk.config.has_scorer else (logits, _certainty(logits), *cache)


class TokenPass(nn.Module):
    """The newest token of every candidate -> its score, the logits of the next token, and the extended cache."""

    def __init__(self, trunk: Trunk, head: VocabularyHead) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, tokens: Tensor, attention_mask: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        """Process one token of every candidate.

        Args:
            tokens: (N, B) int64.
            attention_mask: the prompts' mask, (B, P) int64.
            cache: for each layer the prompts' keys and values from `PromptPass`, then the candidates', (N, B, G, T, K)
                each; T may be 0.

        Returns:
            scores (N, B), or without a scorer the self-certainties of the logits; logits (N, B, V); then for each
            layer the candidates' keys and values (N, B, G, T + 1, K).
        """
        trunk, (count, batch) = self.trunk, tokens.shape
        rows = count * batch
        done = cache[2].shape[3]
        lengths = (attention_mask > 0).to(torch.int64).sum(1)
        positions = (lengths + done)[None].expand(count, batch)
        rotations = trunk.rotations(positions.reshape(rows, 1))
        windows = trunk.for_each_window(lambda window: _window(window, attention_mask, lengths + done, done))
        x = trunk.project(trunk.embed(tokens.reshape(rows)))
        heads, kv_heads = trunk.config.num_heads, trunk.config.num_kv_heads
        ones = torch.ones(batch, kv_heads, count * (heads // kv_heads), 1)
        grown: list[Tensor] = []
        for i, (layer, rotation) in enumerate(zip(trunk.layers, rotations, strict=True)):
            assert isinstance(layer, Layer)
            kv_heads, size, group = layer.kv_heads, layer.size, layer.heads // layer.kv_heads
            keys, values, candidate_k, candidate_v = cache[4 * i : 4 * i + 4]
            near, reach = windows[i]
            x = trunk.enter(x)
            y = layer.attention_norm(x)
            q, k, v = layer.of_few(y, rows, rotation)
            candidate_k = torch.cat([candidate_k, k.reshape(count, batch, kv_heads, 1, size)], 3)
            candidate_v = torch.cat([candidate_v, v.reshape(count, batch, kv_heads, 1, size)], 3)
            grown += [candidate_k, candidate_v]
            q = q.reshape(count, batch, kv_heads, group, size)
            self_out, self_logit = attend_self(q, candidate_k.transpose(3, 4), candidate_v, near, layer.cap)
            q, self_out, self_logit = (
                t.permute(1, 2, 0, 3, 4).reshape(batch, kv_heads, count * group, -1) for t in (q, self_out, self_logit)
            )
            out = attend_prompt(q, self_out, self_logit, ones, keys, values, reach, layer.cap)
            out = out.reshape(batch, kv_heads, count, group, size).permute(2, 0, 1, 3, 4)
            x = layer.finish(x, out.reshape(rows, layer.heads * size), few=True)
        normed = trunk.final_norm(x)
        logits = self.head(normed)
        scores = trunk.score(trunk.labels(normed)) if trunk.config.has_scorer else _certainty(logits)
        return scores.reshape(count, batch), logits.reshape(count, batch, -1), *grown


def _certainty(logits: Tensor) -> Tensor:
    """Self-certainty (Kang et al., 2025): the divergence of the distribution from uniform, (M, V) -> (M,) in nats."""
    return logits.logsumexp(-1) - logits.mean(-1) - math.log(logits.shape[-1])


def _window(
    window: int | None, attention_mask: Tensor, position: Tensor, done: int
) -> tuple[Tensor | None, Tensor | None]:
    """Additive window masks of the newest token: over its candidate (1, 1, T + 1) and the prompts (B, 1, 1, 1 + P)."""
    if window is None:
        return None, None
    near = additive(torch.arange(done, -1, -1) < window)
    prompt_positions = (attention_mask > 0).to(torch.int64).cumsum(1) - 1
    # The first key is not the prompt's.
    reach = F.pad(additive(position[:, None] - prompt_positions < window), (1, 0))
    return near[None, None], reach[:, None, None]

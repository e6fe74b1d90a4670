"""The passes of generation: one over the prompt, then one for each new token of the candidates.

Without a scorer, the passes give the self-certainty of the distribution of the next token instead of scores.

Shapes: N candidates, B prompts, P prompt length, T tokens of a candidate so far, V vocab_size; M rows of any prompts,
at most W of each; the others as in `layers.py`.
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

__all__ = ["PromptPass", "RowsPass", "TokenPass"]


class PromptPass(nn.Module):
    """Prompts -> logits of the first token, and the key-value cache that all candidates share.

    The tokens may be the last of longer prompts, of which the cache has the others. Without a scorer, the
    self-certainty of the logits (B,) follows them.
    """

    def __init__(self, trunk: Trunk, head: VocabularyHead) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Read prompts, or their last tokens.

        Args:
            input_ids: (B, P) int64, padded on either side.
            attention_mask: of all tokens, (B, T) int64; each prompt's last token must be among the last P.
            past: for each layer the keys and values of at least T - P tokens, as they are returned.

        Returns:
            logits (B, V), then for each layer the keys (B, G, K + 2, 1 + T) and values (B, G, 1 + T, K); see
            `attention.py`.
        """
        trunk = self.trunk
        batch, length = input_ids.shape
        before = attention_mask.shape[1] - length
        real = attention_mask > 0
        positions = (real.to(torch.int64).cumsum(1) - 1).clamp(min=0)
        new, new_real = (t.narrow(1, before, length) for t in (positions, real))
        rotations = trunk.rotations(new)
        attention = trunk.for_each_window(lambda window: RowAttention(window, positions, new, trunk.config))
        x = trunk.embed(input_ids)
        x = trunk.project(x.reshape(batch * length, x.shape[-1]))
        cache: list[Tensor] = []

        def remember(k: Tensor, v: Tensor) -> None:
            keys, values = past[len(cache) : len(cache) + 2]
            cache.extend([shared_keys(k, new_real, keys, before), shared_values(v, values, before)])

        *before_last, last_layer = zip(trunk.layers, rotations, attention, strict=True)
        for layer, rotation, attend in before_last:
            assert isinstance(layer, Layer)
            x = trunk.enter(x)
            y = layer.attention_norm(x)
            q, k, v = layer.queries(y, batch, rotation), layer.keys(y, batch, rotation), layer.values(y, batch)
            remember(k, v)
            out = attend(q, *cache[-2:])
            x = layer.finish(x, out.reshape(batch * length, layer.heads * layer.size))
        # Only each prompt's last token is needed from the last layer.
        layer, rotation, attend = last_layer
        assert isinstance(layer, Layer)
        x = trunk.enter(x)
        y = layer.attention_norm(x)
        remember(layer.keys(y, batch, rotation), layer.values(y, batch))
        keys, values = cache[-2:]
        last = (new_real.to(torch.int64) * (torch.arange(length) + 1)).amax(1).clamp(min=1) - 1
        # Without arithmetic on sizes: on CUDA, ONNX Runtime would copy each size to the device.
        rows = torch.arange(batch * length).reshape(batch, length).gather(1, last[:, None]).squeeze(1)
        x, y = x.index_select(0, rows), y.index_select(0, rows)

        def at_last(of_positions: Tensor) -> Tensor:
            return of_positions.flatten(0, 1).index_select(0, rows)[:, None]

        q = layer.queries(y, batch, rotation and (at_last(rotation[0]), at_last(rotation[1])))
        seen = seen_by_one(positions, torch.arange(before, before + length)[last], attend.kind.window)
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
        # A range of one, because ONNX Runtime would copy a number that is added from the host to a GPU.
        position = lengths + torch.arange(done, done + 1)
        rotations = trunk.rotations(position[None].expand(count, batch).reshape(rows, 1))
        windows = trunk.for_each_window(lambda window: _window(window, attention_mask, position, done))
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
            x = layer.finish(x, out.reshape(rows, layer.heads * size))
        normed = trunk.final_norm(x)
        logits = self.head(normed)
        scores = trunk.score(trunk.labels(normed)) if trunk.config.has_scorer else _certainty(logits)
        return scores.reshape(count, batch), logits.reshape(count, batch, -1), *grown


class RowsPass(nn.Module):
    """As `TokenPass`, but rows may differ in their lengths, and prompts in how many rows they have.

    Attention to the prompts needs a rectangle: W places for each prompt, which may be more than it has rows.
    """

    def __init__(self, trunk: Trunk, head: VocabularyHead) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(
        self,
        tokens: Tensor,
        prompts: Tensor,
        lengths: Tensor,
        ages: Tensor,
        places: Tensor,
        back: Tensor,
        attention_mask: Tensor,
        *cache: Tensor,
    ) -> tuple[Tensor, ...]:
        """Process one token of every row.

        Args:
            tokens: (M,) int64.
            prompts: each row's prompt, (M,) int64 in [0, B).
            lengths: tokens that each row has read, (M,) int64, at most T.
            ages: T, T - 1, ..., 0, int64: by how many tokens each place of the grown cache is older than the newest.
            places: the rows of each prompt, (B, W) int64; any row where a prompt has fewer.
            back: where each row is in the flattened `places`, (M,) int64.
            attention_mask: the prompts' mask, (B, P) int64.
            cache: for each layer the prompts' keys and values from `PromptPass`, then the rows' own, (M, G, T, K)
                each. A row's last `lengths` places count; what is before them is ignored.

        Returns:
            scores (M,), or without a scorer the self-certainties of the logits; logits (M, V); then for each layer the
            rows' keys and values (M, G, T + 1, K).
        """
        trunk, (rows,) = self.trunk, tokens.shape
        batch, width = places.shape
        positions = (attention_mask > 0).to(torch.int64).sum(1).index_select(0, prompts) + lengths
        prompt_positions = (attention_mask > 0).to(torch.int64).cumsum(1) - 1
        rotations = trunk.rotations(positions[:, None])

        heads, kv_heads = trunk.config.num_heads, trunk.config.num_kv_heads
        group = heads // kv_heads

        def masks(window: int | None) -> tuple[Tensor, Tensor | None]:
            """Additive masks over the rows' own tokens (M, 1, 1, T + 1) and the prompts' (B, 1, W * H / G, 1 + P)."""
            own = additive(self.seen(ages, lengths, window))[:, None, None]
            if window is None:
                return own, None
            position = positions.index_select(0, places.reshape(-1)).reshape(batch, width, 1)
            # The first key is not the prompt's.
            reach = F.pad(additive(position - prompt_positions[:, None] < window), (1, 0))[:, :, None]
            reach = reach.expand(batch, width, group, -1).reshape(batch, 1, width * group, -1)
            return own, reach

        windows = trunk.for_each_window(masks)
        x = trunk.project(trunk.embed(tokens))
        ones = torch.ones(batch, kv_heads, width * group, 1)
        grown: list[Tensor] = []
        for i, (layer, rotation) in enumerate(zip(trunk.layers, rotations, strict=True)):
            assert isinstance(layer, Layer)
            size = layer.size
            keys, values, own_k, own_v = cache[4 * i : 4 * i + 4]
            near, reach = windows[i]
            x = trunk.enter(x)
            y = layer.attention_norm(x)
            q, k, v = layer.of_few(y, rows, rotation)
            own_k = self.append(own_k, k.reshape(rows, kv_heads, 1, size), lengths)
            own_v = self.append(own_v, v.reshape(rows, kv_heads, 1, size), lengths)
            grown += [own_k, own_v]
            q = q.reshape(rows, kv_heads, group, size)
            self_out, self_logit = attend_self(q, own_k.transpose(2, 3), own_v, near, layer.cap)
            # One gather for all three.
            both = torch.cat([q, self_out, self_logit], 3).index_select(0, places.reshape(-1))
            both = both.reshape(batch, width, kv_heads, group, 2 * size + 1).transpose(1, 2)
            both = both.reshape(batch, kv_heads, width * group, 2 * size + 1)
            q, self_out, self_logit = torch.split(both, [size, size, 1], 3)
            out = attend_prompt(q, self_out, self_logit, ones, keys, values, reach, layer.cap)
            out = out.reshape(batch, kv_heads, width, group, size).transpose(1, 2)
            out = out.reshape(batch * width, layer.heads * size).index_select(0, back)
            x = layer.finish(x, out)
        normed = trunk.final_norm(x)
        logits = self.head(normed)
        scores = trunk.score(trunk.labels(normed)) if trunk.config.has_scorer else _certainty(logits)
        return scores, logits, *grown

    def append(self, cache: Tensor, new: Tensor, lengths: Tensor) -> Tensor:
        """Append to a cache (M, G, T, K) the keys or values of the new tokens (M, G, 1, K)."""
        return torch.cat([cache, new], 2)

    def seen(self, places: Tensor, lengths: Tensor, window: int | None) -> Tensor:
        """Which places of the caches each row reads, (M, T + 1) bool; `places` are their ages."""
        own = places <= lengths[:, None]
        return own if window is None else own & (places < window)


def _certainty(logits: Tensor) -> Tensor:
    """Self-certainty (Kang et al., 2025): the divergence of the distribution from uniform, (M, V) -> (M,) in nats."""
    # Not by `logsumexp`, which ONNX Runtime sums in one thread and with five times the error.
    return -logits.log_softmax(-1).mean(-1) - math.log(logits.shape[-1])


def _window(
    window: int | None, attention_mask: Tensor, position: Tensor, done: int
) -> tuple[Tensor | None, Tensor | None]:
    """Additive window masks of the newest token: over its candidate (T + 1,) and the prompts (B, 1, 1, 1 + P)."""
    if window is None:
        return None, None
    near = additive(torch.arange(done, -1, -1) < window)
    prompt_positions = (attention_mask > 0).to(torch.int64).cumsum(1) - 1
    # The first key is not the prompt's.
    reach = F.pad(additive(position[:, None] - prompt_positions < window), (1, 0))
    return near, reach[:, None, None]

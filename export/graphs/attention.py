"""Attention as the graphs compute it: self-attention of rows, and of candidates that share one prompt's cache.

A candidate's queries attend to the prompt's keys and values, which all candidates share, and to the candidate's own.
The two softmaxes are merged without concatenating their weights, the largest tensors of the graph: the attention to
the prompt gets one extra key, whose logit is the log-sum-exp of the candidate's own logits and whose value is the
output of the candidate's self-attention. The prompt's padding mask is one extra feature of the queries (1) and of the
keys (0 or MASKED), so that the matrix product applies it.

Shapes: N candidates, S queries per candidate and kv head; the others as in `layers.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bonnx.models.block import capped

from .layers import MASKED, additive

__all__ = [
    "CandidateAttention",
    "allowed",
    "attend",
    "attend_prefix",
    "attend_prompt",
    "attend_self",
    "readable",
    "shared_keys",
    "shared_values",
]


def allowed(real: Tensor, positions: Tensor, window: int | None) -> Tensor:
    """Mask (B, T) -> (B, T, T), True where query i may attend to key j; every query may attend to itself."""
    index = torch.arange(real.shape[1])
    causal = index[:, None] >= index[None]
    readable = causal & real[:, None]
    if window is not None:
        readable = readable & (positions[:, :, None] - positions[:, None] < window)
    return readable | (index[:, None] == index[None])


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, cap: float | None) -> Tensor:
    """Attention of rows: q (B, Q, H, K), k and v (B, T, G, K), additive mask (B, Q, T) -> (B, Q, H * K).

    `cap` limits the logits, as in `NetworkConfig.attention_cap`, here and below.

    The query heads that share a kv head are rows of one matrix, so keys are never repeated.
    """
    rows, length, heads, size = q.shape
    kv_heads, total = k.shape[2], k.shape[1]
    group = heads // kv_heads
    q = q.reshape(rows, length, kv_heads, group * size).transpose(1, 2).reshape(rows, kv_heads, length * group, size)
    logits = _limited(q @ k.permute(0, 2, 3, 1), cap).reshape(rows, kv_heads, length, group, total)
    weights = (logits + mask[:, None, :, None]).softmax(-1).reshape(rows, kv_heads, length * group, total)
    out = (weights @ v.transpose(1, 2)).reshape(rows, kv_heads, length, group * size)
    return out.transpose(1, 2).reshape(rows, length, heads * size)


def readable(positions: Tensor, before: int, length: int, window: int | None) -> Tensor:
    """Which keys the last `length` queries may read, padding aside, for `attend_prefix`.

    Positions (B, before + length) -> bool (1, length, before + length) without a window, else (B, ...).
    """
    index = torch.arange(before + length)
    causal = (index.narrow(0, before, length)[:, None] >= index[None])[None]
    if window is None:
        return causal
    return causal & (positions.narrow(1, before, length)[:, :, None] - positions[:, None] < window)


def attend_prefix(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, cap: float | None) -> Tensor:
    """Attention of the last P tokens of rows to all T tokens.

    Args:
        q: (B, P, H, K).
        keys: from `shared_keys`, which holds the padding mask.
        values: from `shared_values`.
        mask: additive, (1 or B, P, T + 1).
        cap: as in `attend`.

    Returns:
        (B, P, H * K).
    """
    rows, length, heads, size = q.shape
    kv_heads, total = keys.shape[1], keys.shape[3]
    group = heads // kv_heads
    q = q.reshape(rows, length, kv_heads, group * size).transpose(1, 2).reshape(rows, kv_heads, length * group, size)
    # The last key is for a candidate's own attention: nothing of it is read here.
    padding_and_own = torch.tensor([1.0, MASKED]).expand(rows, kv_heads, length * group, 2)
    logits = _with_extra(q, padding_and_own, keys, cap).reshape(rows, kv_heads, length, group, total)
    weights = (logits + mask[:, None, :, None]).softmax(-1).reshape(rows, kv_heads, length * group, total)
    out = (weights @ values).reshape(rows, kv_heads, length, group * size)
    return out.transpose(1, 2).reshape(rows, length, heads * size)


def shared_keys(k: Tensor, real: Tensor) -> Tensor:
    """A prompt's rotated keys (B, P, G, K) and its mask (B, P) bool -> (B, G, K + 2, P + 1) for `attend_prompt`.

    Row K holds the padding mask; the last row and column are for the candidate's own attention.
    """
    batch, length, kv_heads, size = k.shape
    padding = additive(real)[:, None, None].expand(batch, kv_heads, 1, length)
    blank = torch.zeros(batch, kv_heads, 1, length)
    extra = torch.tensor([0.0] * (size + 1) + [1.0])[:, None].expand(batch, kv_heads, size + 2, 1)
    return torch.cat([torch.cat([k.permute(0, 2, 3, 1), padding, blank], 2), extra], 3)


def shared_values(v: Tensor) -> Tensor:
    """A prompt's values (B, P, G, K) -> (B, G, P + 1, K); the last row is 0, since `attend_prompt` adds that value."""
    v = v.transpose(1, 2)
    return torch.cat([v, torch.zeros_like(v[:, :, :1])], 2)


def attend_self(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cap: float | None) -> tuple[Tensor, Tensor]:
    """Self-attention of candidates.

    Args:
        q: (..., S, K).
        k: (..., K, T).
        v: (..., T, K).
        mask: additive, (..., C, 1, T) where the S queries are C positions of R heads; None if nothing is masked.
        cap: as in `attend`.

    Returns:
        The output (..., S, K) and the log-sum-exp of the logits (..., S, 1).
    """
    logits = _limited(q @ k, cap)
    if mask is not None:
        shape = logits.shape
        logits = (logits.reshape(*shape[:-2], mask.shape[-3], -1, shape[-1]) + mask).reshape(shape)
    # A softmax written out, because the log-sum-exp needs its intermediate values.
    top = logits.amax(-1, keepdim=True)
    # Below about exp(-80) numbers are denormal, and processors are many times slower on those.
    raised = (logits - top).clamp(min=-80.0).exp()
    mass = raised.sum(-1, keepdim=True)
    return (raised / mass) @ v, top + mass.log()


def attend_prompt(
    q: Tensor,
    self_out: Tensor,
    self_logit: Tensor,
    keys: Tensor,
    values: Tensor,
    reach: Tensor | None,
    cap: float | None,
) -> Tensor:
    """Merge the attention to the prompt with the results of `attend_self`.

    Args:
        q: (B, G, M, K), the queries of all candidates.
        self_out: (B, G, M, K), the output of `attend_self`.
        self_logit: (B, G, M, 1), its log-sum-exp.
        keys: from `shared_keys`.
        values: from `shared_values`.
        reach: additive sliding-window mask, (B, 1, L, 1, P) where the M queries are L positions of R heads.
        cap: as in `attend`.

    Returns:
        (B, G, M, K).
    """
    logits = _with_extra(q, torch.cat([torch.ones_like(self_logit), self_logit], 3), keys, cap)
    if reach is not None:
        near = logits[..., :-1].reshape(*logits.shape[:2], reach.shape[2], -1, reach.shape[-1]) + reach
        logits = torch.cat([near.reshape(logits[..., :-1].shape), logits[..., -1:]], 3)
    weights = logits.softmax(-1)
    out: Tensor = weights @ values + weights[..., -1:] * self_out
    return out


def _limited(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else capped(logits, cap)


def _with_extra(q: Tensor, extra: Tensor, keys: Tensor, cap: float | None) -> Tensor:
    """Logits of queries (..., M, K) and their extra features (..., M, 2) with keys from `shared_keys`.

    Without a cap, one product computes all. The mask and the candidate's own logit must not be limited, so with a cap
    they are added behind it.
    """
    if cap is None:
        return torch.cat([q, extra], 3) @ keys
    size = q.shape[-1]
    return capped(q @ keys.narrow(2, 0, size), cap) + extra @ keys.narrow(2, size, 2)


class CandidateAttention:
    """The attention of candidates for one sliding window, with its masks.

    Args:
        window: of the layers that use it, or None.
        prompt_positions: (B, P).
        real: the candidates' mask, (B, N, C) bool.
        positions: the candidates' positions, (B, N * C).
        cap: as in `attend`.
    """

    def __init__(
        self, window: int | None, prompt_positions: Tensor, real: Tensor, positions: Tensor, cap: float | None
    ) -> None:
        self.cap = cap
        self.batch, self.count, self.length = real.shape
        rows = self.batch * self.count
        own = additive(allowed(real.reshape(rows, -1), positions.reshape(rows, -1), window))
        self.own = own.reshape(self.batch, 1, self.count, self.length, 1, self.length)
        self.reach = None
        if window is not None:
            near = positions[:, :, None] - prompt_positions[:, None] < window
            self.reach = additive(near)[:, None, :, None]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend to the candidates' own tokens and to the prompt's.

        Args:
            q: (B, N * C, H, K).
            k: the candidates' keys, (B, N * C, G, K).
            v: the candidates' values, (B, N * C, G, K).
            keys: the prompts', from `shared_keys`.
            values: the prompts', from `shared_values`.

        Returns:
            (B, N * C, H * K).
        """
        batch, count, length, (kv_heads, size) = self.batch, self.count, self.length, k.shape[2:]
        group = q.shape[2] // kv_heads
        flat = (batch, kv_heads, count * length * group, size)
        q = q.reshape(batch, count * length, kv_heads, group * size).transpose(1, 2)
        k = k.reshape(batch, count, length, kv_heads, size).permute(0, 3, 1, 4, 2)
        v = v.reshape(batch, count, length, kv_heads, size).permute(0, 3, 1, 2, 4)
        own_q = q.reshape(batch, kv_heads, count, length * group, size)
        self_out, self_logit = attend_self(own_q, k, v, self.own, self.cap)
        out = attend_prompt(
            q.reshape(flat),
            self_out.reshape(flat),
            self_logit.reshape(*flat[:3], 1),
            keys,
            values,
            self.reach,
            self.cap,
        )
        out = out.reshape(batch, kv_heads, count * length, group * size)
        return out.transpose(1, 2).reshape(batch, count * length, kv_heads * group * size)

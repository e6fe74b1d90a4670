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
import torch.nn.functional as F
from torch import Tensor

from bonnx.models.block import capped
from bonnx.models.config import NetworkConfig

from .blocks import attention_kind
from .builder import DOMAIN
from .layers import MASKED, additive

__all__ = [
    "CandidateAttention",
    "RowAttention",
    "attend_one",
    "attend_prompt",
    "attend_self",
    "seen_by_one",
    "shared_keys",
    "shared_values",
]


class RowAttention:
    """The attention of the last P positions of rows to all T, for one sliding window.

    Args:
        window: of the layers that use it, or None.
        positions: (B, T).
        new: those of the queries, (B, P).
        config: of the network.
    """

    def __init__(self, window: int | None, positions: Tensor, new: Tensor, config: NetworkConfig) -> None:
        self.positions, self.new, self.kind = positions, new, attention_kind(config, window)

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend to all positions up to one's own.

        Args:
            q: (B, P, H, K).
            keys: from `shared_keys`, which holds the padding mask.
            values: from `shared_values`.

        Returns:
            (B, P, H * K).
        """
        rows, length, heads, size = q.shape
        kv_heads, group = keys.shape[1], heads // keys.shape[1]
        # The query heads that share a kv head are rows of one matrix, so keys are never repeated.
        q = q.reshape(rows, length, kv_heads, group * size).transpose(1, 2)
        q = q.reshape(rows, kv_heads, length * group, size)
        out = _call(self.kind.name("attend_rows"), (q, keys, values, self.positions, self.new), q)
        out = out.reshape(rows, kv_heads, length, group * size)
        return out.transpose(1, 2).reshape(rows, length, heads * size)


def _call(function: str, inputs: tuple[Tensor, ...], like: Tensor) -> Tensor:
    """Call a function of `blocks.py`, whose output has the shape and type of `like`."""
    out: Tensor = torch.onnx.ops.symbolic(f"{DOMAIN}::{function}", inputs, {}, dtype=like.dtype, shape=like.shape)
    return out


def seen_by_one(positions: Tensor, place: Tensor, window: int | None) -> Tensor:
    """Which of T positions (B, T) the query at index `place` (B,) sees: a mask (B, 1, 1 + T) for `attend_one`."""
    index = torch.arange(positions.shape[1])[None]
    seen = index <= place[:, None]
    if window is not None:
        seen = seen & (positions.gather(1, place[:, None]) - positions < window)
    return F.pad(additive(seen | (index == place[:, None])), (1, 0))[:, None]


def attend_one(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, cap: float | None) -> Tensor:
    """Attention of one query of each row, without blocks.

    Args:
        q: (B, 1, H, K).
        keys: from `shared_keys`.
        values: from `shared_values`.
        mask: from `seen_by_one`.
        cap: limits the logits, as in `NetworkConfig.attention_cap`, here and below.

    Returns:
        (B, 1, H * K).
    """
    rows, _, heads, size = q.shape
    kv_heads, group = keys.shape[1], heads // keys.shape[1]
    q = q.reshape(rows, kv_heads, group, size)
    # The first key is for a candidate's own attention: nothing of it is read here, not even if all others are padding.
    padding_and_own = torch.tensor([1.0, 2 * MASKED]).expand(rows, kv_heads, group, 2)
    weights = (_with_extra(q, padding_and_own, keys, cap) + mask[:, None]).softmax(-1)
    return (weights @ values).reshape(rows, 1, heads * size)


def shared_keys(k: Tensor, real: Tensor, past: Tensor | None = None, before: int = 0) -> Tensor:
    """A prompt's rotated keys (B, P, G, K) and its mask (B, P) bool -> (B, G, K + 2, 1 + P) for `attend_prompt`.

    Row K holds the padding mask; the last row and the first column are for the candidate's own attention. With `past`,
    keys (B, G, K + 2, 1 + S) of the tokens before, of which the first `before` count, these come first.
    """
    batch, length, kv_heads, size = k.shape
    padding = additive(real)[:, None, None].expand(batch, kv_heads, 1, length)
    blank = torch.zeros(batch, kv_heads, 1, length)
    extra = torch.tensor([0.0] * (size + 1) + [1.0])[:, None].expand(batch, kv_heads, size + 2, 1)
    earlier = [] if past is None else [past.narrow(3, 1, before)]
    return torch.cat([extra, *earlier, torch.cat([k.permute(0, 2, 3, 1), padding, blank], 2)], 3)


def shared_values(v: Tensor, past: Tensor | None = None, before: int = 0) -> Tensor:
    """A prompt's values (B, P, G, K) -> (B, G, 1 + P, K); `past` and `before` are as in `shared_keys`.

    The first row is 0, since `attend_prompt` adds that value.
    """
    batch, _, kv_heads, size = v.shape
    earlier = [] if past is None else [past.narrow(2, 1, before)]
    return torch.cat([torch.zeros(batch, kv_heads, 1, size), *earlier, v.transpose(1, 2)], 2)


def attend_self(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cap: float | None) -> tuple[Tensor, Tensor]:
    """Self-attention of candidates.

    Args:
        q: (..., S, K).
        k: (..., K, T).
        v: (..., T, K).
        mask: additive, broadcast to (..., S, T); None if nothing is masked.
        cap: as in `attend`.

    Returns:
        The output (..., S, K) and the log-sum-exp of the logits (..., S, 1).
    """
    logits = _limited(q @ k, cap)
    logits = logits if mask is None else logits + mask
    weights = logits.softmax(-1)
    # The largest weight is 1 / sum(exp(logits - largest)).
    return weights @ v, logits.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()


def attend_prompt(
    q: Tensor,
    self_out: Tensor,
    self_logit: Tensor,
    ones: Tensor,
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
        ones: (B, G, M, 1), which all layers share.
        keys: from `shared_keys`.
        values: from `shared_values`.
        reach: additive sliding-window mask, (B, 1, 1, 1 + P), or None.
        cap: as in `attend`.

    Returns:
        (B, G, M, K).
    """
    logits = _with_extra(q, torch.cat([ones, self_logit], 3), keys, cap)
    if reach is not None:
        logits = logits + reach
    weights = logits.softmax(-1)
    out: Tensor = weights @ values + weights[..., :1] * self_out
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
    """The attention of candidates for one sliding window.

    Args:
        window: of the layers that use it, or None.
        prompt_positions: (B, P).
        real: the candidates' mask, (B, N, C) bool.
        positions: the candidates' positions, (B, N * C).
        config: of the network.
    """

    def __init__(
        self, window: int | None, prompt_positions: Tensor, real: Tensor, positions: Tensor, config: NetworkConfig
    ) -> None:
        self.kind = attention_kind(config, window)
        self.batch, self.count, self.length = real.shape
        self.padding = additive(real)[:, None, :, None, None]
        self.positions, self.prompt_positions = positions.reshape(real.shape), prompt_positions

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
        q = q.reshape(batch, count * length, kv_heads, group * size).transpose(1, 2)
        q = q.reshape(batch, kv_heads, count, length * group, size)
        k = k.reshape(batch, count, length, kv_heads, size).permute(0, 3, 1, 4, 2)
        v = v.reshape(batch, count, length, kv_heads, size).permute(0, 3, 1, 2, 4)
        inputs = (q, k, v, self.padding, keys, values, self.positions, self.prompt_positions)
        out = _call(self.kind.name("attend_candidates"), inputs, q)
        out = out.reshape(batch, kv_heads, count * length, group * size)
        return out.transpose(1, 2).reshape(batch, count * length, kv_heads * group * size)

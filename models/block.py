"""The blocks of the network in PyTorch: attention and a feed-forward network, with norms and residuals.

Shapes: B rows, T positions, D hidden_size, H heads, G kv heads, K head size, R rotated features of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import NetworkConfig
from .rotary import Rotation, rotate

__all__ = ["ACTIVATIONS", "Attention", "Block", "FeedForward", "attend", "capped"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cap: float | None) -> Tensor:
    """Grouped-query attention; query head h uses kv head h div (H / G).

    Args:
        q: (B, H, S, K).
        k: (B, G, T, K).
        v: (B, G, T, K).
        mask: (B or 1, 1, S, T) bool, True where a key may be attended to, or None for plain causal.
        cap: limits the logits before the mask, as `attention_cap`.

    Returns:
        (B, H, S, K).
    """
    if cap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    logits = capped(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, cap)
    if mask is None:
        mask = torch.ones(logits.shape[2:], dtype=torch.bool, device=q.device).tril()
    return logits.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def capped(logits: Tensor, cap: float) -> Tensor:
    """Limit logits smoothly to between -cap and cap."""
    return cap * torch.tanh(logits / cap)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        size = config.size_of_head
        self.config = config
        self.q_proj = nn.Linear(config.hidden_size, config.num_heads * size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.num_kv_heads * size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.num_kv_heads * size, bias=config.attention_bias)
        self.out_proj = nn.Linear(config.num_heads * size, config.hidden_size, bias=config.attention_output_bias)
        if config.qk_norm:
            heads = (1, 1) if config.qk_norm_over == "head" else (config.num_heads, config.num_kv_heads)
            self.q_norm, self.k_norm = (nn.RMSNorm(size * count, eps=config.norm_epsilon) for count in heads)

    def project(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Make queries, keys and values.

        Args:
            x: (B, T, D).
            rotation: cos and sin (B or 1, 1, T, R/2); None for a layer without rotation.

        Returns:
            q (B, H, T, K), k and v (B, G, T, K), q and k rotated.
        """
        config, size = self.config, self.config.size_of_head
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if config.qk_norm and config.qk_norm_over == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, size)) for t in (q, k, v))
        if config.qk_norm and config.qk_norm_over == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return (q, k, v) if rotation is None else (rotate(q, *rotation), rotate(k, *rotation), v)

    def forward(self, x: Tensor, rotation: Rotation | None, mask: Tensor | None) -> Tensor:
        """x (B, T, D), rotation as in `project`, mask (B or 1, 1, T, T) as in `attend` -> (B, T, D)."""
        out = attend(*self.project(x, rotation), mask, self.config.attention_cap)
        projected: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return projected


class FeedForward(nn.Module):
    """Gated feed-forward network (Shazeer, 2020): `down(activation(gate(x)) * up(x))`."""

    def __init__(self, config: NetworkConfig, inner_size: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.ffn_activation]
        self.gate = nn.Linear(config.hidden_size, inner_size, bias=config.ffn_bias)
        self.up = nn.Linear(config.hidden_size, inner_size, bias=config.ffn_bias)
        self.down = nn.Linear(inner_size, config.hidden_size, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        out: Tensor = self.down(self.activation(self.gate(x)) * self.up(x))
        return out


class Block(nn.Module):
    """Residual block: `x + attention(norm(x))`, then `x + ffn(norm(x))`; or with norms behind the two, or both."""

    def __init__(self, config: NetworkConfig, ffn: nn.Module | None = None) -> None:
        super().__init__()
        before, after = config.norm_place != "after", config.norm_place != "before"
        self.attention_norm = _norm(config) if before else nn.Identity()
        self.attention = Attention(config)
        self.attention_out_norm = _norm(config) if after else nn.Identity()
        self.ffn_norm = _norm(config) if before else nn.Identity()
        self.ffn = FeedForward(config, config.inner_size) if ffn is None else ffn
        self.ffn_out_norm = _norm(config) if after else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotation: Rotation | None, mask: Tensor | None) -> Tensor:
        """x (B, T, D), rotation and mask as in `Attention` -> (B, T, D)."""
        return self.finish(x, self.attention(self.attention_norm(x), rotation, mask))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residual stream and projected attention (B, T, D) -> (B, T, D) after the feed-forward network."""
        x = x + self.dropout(self.attention_out_norm(attended))
        out: Tensor = x + self.dropout(self.ffn_out_norm(self.ffn(self.ffn_norm(x))))
        return out


def _norm(config: NetworkConfig) -> nn.Module:
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.norm_epsilon)

"""Token-by-token sampling in PyTorch with a key-value cache, for training recipes and as a reference in tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .block import attend
from .network import LanguageModel

__all__ = ["Cache", "forward_cached", "sample"]


class Cache:
    """Rotated keys and values of every layer, (B, G, capacity, K) each; the first `length` positions are filled."""

    def __init__(self, model: LanguageModel, rows: int, capacity: int, dtype: torch.dtype) -> None:
        config = model.config.network
        shape = (config.num_layers, rows, config.num_kv_heads, capacity, config.size_of_head)
        self.keys, self.values = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
        self.length = 0


def forward_cached(model: LanguageModel, ids: Tensor, cache: Cache) -> Tensor:
    """Run ids (B, T), without padding, after the cached ones -> backbone (B, T, D); the cache grows by T."""
    network, start, end = model.network, cache.length, cache.length + ids.shape[1]
    rotations = network.rotations(torch.arange(start, end)[None])
    back = torch.arange(start, end)[:, None] - torch.arange(end)[None]
    x = network.enter(model.embedding(ids))
    for i, block in enumerate(network.layers()):
        window = network.config.windows[i]
        mask = (back >= 0) if window is None else (back >= 0) & (back < window)
        q, k, v = block.attention.project(block.attention_norm(x), rotations[i])
        cache.keys[i, :, :, start:end], cache.values[i, :, :, start:end] = k, v
        keys, values = cache.keys[i, :, :, :end].to(q.dtype), cache.values[i, :, :, :end].to(q.dtype)
        out = attend(q, keys, values, mask, network.config.attention_cap)
        x = block.finish(x, block.attention.out_proj(out.transpose(1, 2).flatten(2)))
    cache.length = end
    normed: Tensor = network.final_norm(x)
    return normed


@torch.no_grad()
def sample(
    model: LanguageModel,
    prompts: Tensor,
    max_new_tokens: int,
    end_token: int | Sequence[int],
    pad_token: int,
    generator: torch.Generator,
    temperature: float = 1.0,
) -> Tensor:
    """Sample one completion for each row.

    Args:
        model: the model, in inference mode.
        prompts: (B, P) int64, without padding.
        max_new_tokens: maximum length of a completion.
        end_token: the token or tokens that end a completion.
        pad_token: fills rows that have ended.
        generator: source of all random numbers.
        temperature: divides the logits.

    Returns:
        (B, L) int64 with L <= max_new_tokens.
    """
    rows = prompts.shape[0]
    cache = Cache(model, rows, prompts.shape[1] + max_new_tokens, torch.float32)
    ends = torch.tensor(end_token, dtype=torch.int64)
    ended, ids, picked = torch.zeros(rows, dtype=torch.bool), prompts, []
    for _ in range(max_new_tokens):
        logits = model.logits(forward_cached(model, ids, cache)[:, -1:])[:, 0].float()
        draw = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
        draw = torch.where(ended, pad_token, draw)
        picked.append(draw)
        ended = ended | torch.isin(draw, ends)
        if bool(ended.all()):
            break
        ids = draw[:, None]
    return torch.stack(picked, 1)

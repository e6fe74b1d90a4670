"""The token that the seed gives for known logits, in NumPy, and how close rounding comes to another one."""

from __future__ import annotations

import numpy as np

from bonnx.runtime.generate.options import CheckedOptions

from .parity import Array

__all__ = ["edge_width", "expected_token", "log_softmax", "uniform"]

# What rounding to float32 may move the border between two tokens by, where the logits are known to the last bit.
_ROUNDING = 2e-5
_WORD = 2**32


def edge_width(error: float, request: CheckedOptions) -> float:
    """How near to the border between two tokens a draw is undecided, if logits may be off by an error.

    Greedy, a difference of two logits. Else a share of probability, which moves by less than the error divided by the
    temperature.
    """
    return 2 * error if request.temperature == 0 else error / request.temperature + _ROUNDING


def log_softmax(logits: Array) -> Array:
    """Logits (length, V) -> log-probabilities (length, V) float64."""
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result


def uniform(seed: int, prompt: Array, position: int, candidate: int) -> float:
    """The number in [0, 1) that decides a token: what `sampling.py` does, in Python's own integers."""
    start = _mix(_mix((seed // _WORD + 0x9E3779B9) % _WORD) ^ (seed % _WORD))
    total = sum(_mix((int(token) + _mix(i + 1)) % _WORD) for i, token in enumerate(prompt)) % _WORD
    row = _mix((_mix(total ^ start) + position * 0x9E3779B1) % _WORD)
    return (_mix((row + candidate * 0x85EBCA77) % _WORD) >> 9) / 2**23


def _mix(x: int) -> int:
    """MurmurHash3's finalizer (Appleby, 2011)."""
    x ^= x >> 16
    x = x * 0x85EBCA6B % _WORD
    x ^= x >> 13
    x = x * 0xC2B2AE35 % _WORD
    return x ^ x >> 16


def expected_token(logits: Array, point: float, request: CheckedOptions) -> tuple[int, float]:
    """The token of one row of logits (V,) float64, and how far the draw is from another one's share."""
    order = np.argsort(-logits, kind="stable")
    if request.temperature == 0:
        gap = logits[order[0]] - logits[order[1]] if len(order) > 1 else 1.0
        return int(order[0]), float(gap)
    scaled = logits / np.float64(np.float32(request.temperature))
    likely = np.exp(scaled - scaled.max())
    likely /= likely.sum()
    edge = 1.0
    if request.top_k or request.top_p < 1:
        if request.top_k and request.top_k < len(order):
            # Which token is the k-th may itself be a close thing.
            edge = float(np.min(likely[order[request.top_k - 1]] - likely[order[request.top_k]]))
            order = order[: request.top_k]
        likely = likely[order] / (likely[order].sum() if request.top_k else 1.0)
        before = np.cumsum(likely) - likely
        kept = before < np.float32(request.top_p)
        if request.top_p < 1:
            edge = min(edge, float(np.abs(before[1:] - np.float32(request.top_p)).min(initial=1.0)))
        order, likely = order[kept], likely[kept]
    else:
        order = np.arange(len(logits))
    sums = np.cumsum(likely)
    target = point * sums[-1]
    place = min(int((sums <= target).sum()), len(order) - 1)
    if request.top_k or request.top_p < 1:
        # The shares lie in order: two that are nearly equal may change places, wherever the draw falls within them.
        # A logit's error moves each of the two, hence the half.
        gaps = np.abs(np.diff(scaled[order[max(0, place - 1) : place + 2]]))
        edge = min(edge, float(gaps.min(initial=2.0)) / 2)
    return int(order[place]), min(edge, float(np.abs(sums - target).min()))

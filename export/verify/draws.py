"""NumPy reference for sampling: the token that a seed selects from known logits, and its margin against rounding."""

from __future__ import annotations

import numpy as np

from bonnx.runtime.arrays import Array
from bonnx.runtime.generate.options import CheckedOptions

__all__ = ["edge_width", "expected_token", "log_softmax", "uniform"]

# How far rounding to float32 may move the boundary between two tokens when the logits are known exactly.
_ROUNDING = 2e-5
_WORD = 2**32


def edge_width(error: float, request: CheckedOptions) -> float:
    """Return the margin below which a draw is undecided if the logits may be off by `error`.

    For greedy decoding this is a difference of two logits; otherwise a probability, which moves by less than the error
    divided by the temperature.
    """
    return 2 * error if request.temperature == 0 else error / request.temperature + _ROUNDING


def log_softmax(logits: Array) -> Array:
    """Logits (length, V) -> log-probabilities (length, V) float64."""
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result


def uniform(seed: int, prompt: Array, position: int, candidate: int) -> float:
    """Return the number in [0, 1) that decides a token, computed as in `sampling.py` but with Python integers."""
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
    """Return the token drawn from one row of logits (V,) float64, and the draw's margin to the next token.

    NaN or infinite logits are no distribution, so that any token may be drawn: the margin is 0.
    """
    if not logits.max() < np.inf:
        return 0, 0.0
    if request.temperature == 0:
        gap = float(-np.diff(np.partition(logits, -2)[:-3:-1])[0]) if len(logits) > 1 else 1.0
        return int(logits.argmax()), gap
    scaled = logits / np.float64(np.float32(request.temperature))
    likely = np.exp(scaled - scaled.max())
    likely /= likely.sum()
    if not request.top_k and request.top_p == 1:
        sums = np.cumsum(likely)
        target = point * sums[-1]
        place = min(int((sums <= target).sum()), len(sums) - 1)
        return place, float(np.abs(sums - target).min(initial=1.0))
    # The tokens themselves need not be sorted: only the one that is drawn is looked up.
    falling = -np.sort(-scaled)
    kept, edge = _kept(-np.sort(-likely), request)
    sums = np.cumsum(kept)
    target = point * sums[-1]
    place = min(int((sums <= target).sum()), len(kept) - 1)
    # Two tokens that are nearly equal may swap places, wherever the draw falls within them. The error moves both
    # logits, hence the half.
    gaps = np.abs(np.diff(falling[: len(kept)][max(0, place - 1) : place + 2]))
    edge = min(edge, float(gaps.min(initial=2.0)) / 2)
    equal = np.flatnonzero(scaled == falling[place])
    token = equal[place - int((scaled > falling[place]).sum())]
    return int(token), min(edge, float(np.abs(sums - target).min()))


def _kept(likely: Array, request: CheckedOptions) -> tuple[Array, float]:
    """Keep what top_k and top_p keep of probabilities in falling order, and return the margin of that choice."""
    edge = 1.0
    if request.top_k:
        if request.top_k < len(likely):
            # The choice of the k-th token may itself be close.
            edge = float(likely[request.top_k - 1] - likely[request.top_k])
            likely = likely[: request.top_k]
        likely = likely / likely.sum()
    before = np.cumsum(likely) - likely
    if request.top_p < 1:
        edge = min(edge, float(np.abs(before[1:] - np.float32(request.top_p)).min(initial=1.0)))
    return likely[before < np.float32(request.top_p)], edge

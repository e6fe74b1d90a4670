"""Sampling as ONNX subgraphs: a counter-based random generator in integer operators, and one draw from the logits.

A random number depends on the seed, the prompt's tokens, the step and the candidate's number, and on nothing else: the
same tokens come out in every runtime, for any batch that a prompt sits in, and N = 8 gives the first 8 candidates of
N = 16. Counters are mixed with the finalizer of MurmurHash3 (Appleby, 2011), a bijection of 32 bits.
"""

from __future__ import annotations

from typing import Any

from onnxscript import opset18, script
from onnxscript.values import Opset

__all__ = ["FUNCTIONS", "draw_token", "prompt_stream", "random_uniform"]

# The operators' type variables are too narrow for values that onnxscript infers.
op: Any = opset18
this: Any = Opset("bonnx", 1)



@script(this, default_opset=opset18)
def mix(x):  # type: ignore[no-untyped-def]
    """MurmurHash3's finalizer on uint32 of any shape."""
    x = op.BitwiseXor(x, op.BitShift(x, op.Cast(op.Constant(value_int=16), to=12), direction="RIGHT"))
    x = op.Mul(x, op.Cast(op.Constant(value_int=0x85EBCA6B), to=12))
    x = op.BitwiseXor(x, op.BitShift(x, op.Cast(op.Constant(value_int=13), to=12), direction="RIGHT"))
    x = op.Mul(x, op.Cast(op.Constant(value_int=0xC2B2AE35), to=12))
    return op.BitwiseXor(x, op.BitShift(x, op.Cast(op.Constant(value_int=16), to=12), direction="RIGHT"))


@script(this, default_opset=opset18)
def prompt_stream(input_ids, attention_mask, seed):  # type: ignore[no-untyped-def]
    """A stream of random numbers for each prompt: ids and mask (B, P) int64, seed int64 scalar -> (B) int64, 32 bits of it."""
    zero = op.Constant(value_int=0)
    word = op.Constant(value_int=4294967296)
    axis = op.Constant(value_ints=[1])
    # `Mod` takes the sign of the divisor, so a negative seed has its own two words.
    low = op.Mod(seed, word)
    high = op.Mod(op.Div(op.Sub(seed, low), word), word)
    start = mix(op.Add(op.Cast(high, to=12), op.Cast(op.Constant(value_int=0x9E3779B9), to=12)))
    start = mix(op.BitwiseXor(op.Cast(low, to=12), start))
    real = op.Cast(op.Greater(attention_mask, zero), to=7)
    places = op.CumSum(real, op.Constant(value_int=1))
    tokens = op.Add(op.Cast(input_ids, to=12), mix(op.Cast(places, to=12)))
    # A sum over the prompt's tokens: padding adds nothing, wherever it stands.
    hashed = op.Mul(op.Cast(mix(tokens), to=7), real)
    total = op.Cast(op.Mod(op.ReduceSum(hashed, axis, keepdims=0), word), to=12)
    return op.Cast(mix(op.BitwiseXor(total, start)), to=7)


@script(this, default_opset=opset18)
def random_uniform(stream, step, candidates):  # type: ignore[no-untyped-def]
    """Uniform in [0, 1): stream (B) int64, step int64 scalar, candidates (N, B) int64 -> (N, B) float32."""
    moved = op.Mul(op.Cast(step, to=12), op.Cast(op.Constant(value_int=0x9E3779B1), to=12))
    row = mix(op.Add(op.Cast(stream, to=12), moved))
    number = op.Mul(op.Cast(candidates, to=12), op.Cast(op.Constant(value_int=0x85EBCA77), to=12))
    bits = op.BitShift(mix(op.Add(row, number)), op.Cast(op.Constant(value_int=9), to=12), direction="RIGHT")
    # 23 bits: the product with a sum of probabilities stays below that sum after rounding.
    return op.Mul(op.Cast(bits, to=1), op.Constant(value_float=1.1920928955078125e-07))


@script(this, default_opset=opset18)
def draw_token(logits, uniform, temperature, top_k, top_p):  # type: ignore[no-untyped-def]
    """One token of each row by inverting the cumulative distribution.

    Args:
        logits: (N, B, V) float32.
        uniform: (N, B) float32 in [0, 1).
        temperature: float32 scalar; 0 takes the most likely token.
        top_k: int64 scalar; 0 keeps all.
        top_p: float32 scalar in (0, 1]; the smallest set of most likely tokens with that probability is kept.

    Returns:
        tokens (N, B) int64 and their log-probabilities (N, B) float32 by the model itself, at temperature 1 and
        unfiltered.
    """
    zero = op.Constant(value_int=0)
    zero_real = op.Constant(value_float=0.0)
    last = op.Constant(value_ints=[-1])
    final = op.Constant(value_ints=[-1])
    last_axis = op.Constant(value_int=2)
    log_all = op.LogSoftmax(logits, axis=-1)
    scaled = op.Div(log_all, temperature)
    probabilities = op.Softmax(scaled, axis=-1)
    point = op.Unsqueeze(uniform, last)
    filtered = op.Or(op.Greater(top_k, zero), op.Less(top_p, op.Constant(value_float=1.0)))
    if filtered:
        size = op.Shape(logits, start=2)
        by_rank = op.Greater(top_k, zero)
        # Tokens less likely than (1 - top_p) / V hold less than 1 - top_p together, so none of them is kept; half of it
        # leaves room for rounding.
        floor = op.Div(
            op.Mul(op.Sub(op.Constant(value_float=1.0), top_p), op.Constant(value_float=0.5)), op.Cast(size, to=1)
        )
        likely = op.ReduceSum(op.Cast(op.GreaterOrEqual(probabilities, floor), to=1), last, keepdims=0)
        most = op.Max(op.Cast(op.ReduceMax(likely, keepdims=0), to=7), op.Constant(value_int=1))
        kept_count = op.Min(op.Where(by_rank, top_k, most), size)
        values, order = op.TopK(scaled, kept_count, axis=-1)
        sorted_p = op.GatherElements(probabilities, order, axis=-1)
        mass = op.Where(
            by_rank, op.ReduceSum(sorted_p, last, keepdims=1), op.Constant(value_floats=[1.0])
        )
        sorted_p = op.Div(sorted_p, mass)
        before = op.CumSum(sorted_p, last_axis, exclusive=1)
        kept = op.Or(op.Less(before, top_p), op.GreaterOrEqual(top_p, op.Constant(value_float=1.0)))
        inside = op.Where(kept, sorted_p, zero_real)
        sums = op.CumSum(inside, last_axis)
        target = op.Mul(point, op.Gather(sums, final, axis=2))
        place = op.ReduceSum(op.Cast(op.LessOrEqual(sums, target), to=1), last, keepdims=1)
        sampled = op.Cast(op.GatherElements(order, op.Cast(place, to=7), axis=-1), to=7)
    else:
        all_sums = op.CumSum(probabilities, last_axis)
        all_target = op.Mul(point, op.Gather(all_sums, final, axis=2))
        all_place = op.ReduceSum(op.Cast(op.LessOrEqual(all_sums, all_target), to=1), last, keepdims=1)
        sampled = op.Cast(all_place, to=7)
    greedy = op.ArgMax(logits, axis=-1, keepdims=1)
    token = op.Where(op.Equal(temperature, zero_real), greedy, sampled)
    # NaN compares as above nothing and below nothing: the place stays inside.
    log_probability = op.GatherElements(log_all, token, axis=-1)
    return op.Squeeze(token, last), op.Squeeze(log_probability, last)


FUNCTIONS = (mix, prompt_stream, random_uniform, draw_token)

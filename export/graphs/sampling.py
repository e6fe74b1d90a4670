"""Sampling as ONNX subgraphs: a counter-based random number generator in integer operators, and a draw from logits.

A random number depends only on the seed, the prompt's tokens, the token's position in its candidate and the candidate's
number. So every runtime draws the same tokens, whatever batch the prompt is in, and N = 8 draws the first 8 candidates
of N = 16. Counters are mixed with the finalizer of MurmurHash3 (Appleby, 2011), a bijection on 32 bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import onnx_ir as ir
from onnxscript import opset18, script
from onnxscript.values import Opset

from .builder import Builder

__all__ = [
    "FUNCTIONS",
    "DrawRules",
    "draw_rules",
    "draw_token",
    "prompt_hash",
    "prompt_stream",
    "random_uniform",
    "vocabulary_size",
]

# Any, because the operators' type variables are too narrow for the values that onnxscript infers.
op: Any = opset18
this: Any = Opset("bonnx", 1)


class DrawRules(NamedTuple):
    """How each prompt's tokens are drawn, from `draw_rules`, and which ways of drawing any prompt of the run needs."""

    heat: ir.Value
    """(B) float32: the finite temperature, 1 where the most likely token is selected."""
    top_k: ir.Value
    """(B) int64: 0 where only top-p limits the tokens, -1 where nothing does, -2 where the most likely is selected."""
    share: ir.Value
    """(B) float32 in (0, 1]: the probability of `top_p`."""
    any_greedy: ir.Value
    """bool scalar, as are the next three."""
    any_sampled: ir.Value
    any_filtered: ir.Value
    any_whole: ir.Value
    """Whether any prompt's tokens are drawn by chance from all."""


def vocabulary_size(b: Builder, logits: ir.Value) -> ir.Value:
    """[V] as a constant: ONNX Runtime would copy a size that a graph computes to the device."""
    assert logits.shape is not None
    size = logits.shape[-1]
    assert isinstance(size, int)
    return b.ints(size)


@script(this, default_opset=opset18)
def mix(x):  # type: ignore[no-untyped-def]
    """MurmurHash3's finalizer on uint32 of any shape."""
    x = op.BitwiseXor(x, op.BitShift(x, op.Cast(op.Constant(value_int=16), to=12), direction="RIGHT"))
    x = op.Mul(x, op.Cast(op.Constant(value_int=0x85EBCA6B), to=12))
    x = op.BitwiseXor(x, op.BitShift(x, op.Cast(op.Constant(value_int=13), to=12), direction="RIGHT"))
    x = op.Mul(x, op.Cast(op.Constant(value_int=0xC2B2AE35), to=12))
    return op.BitwiseXor(x, op.BitShift(x, op.Cast(op.Constant(value_int=16), to=12), direction="RIGHT"))


@script(this, default_opset=opset18)
def prompt_hash(input_ids, attention_mask, past):  # type: ignore[no-untyped-def]
    """Hash prompts: ids (B, P), their mask (B, T >= P), the hash of the T - P tokens before (B), int64 -> (B) int64.

    A sum over the prompt's tokens, to which padding adds nothing on either side; below 2**32.
    """
    zero = op.Constant(value_int=0)
    word = op.Constant(value_int=4294967296)
    axis = op.Constant(value_ints=[1])
    one = op.Constant(value_int=1)
    real = op.Cast(op.Greater(attention_mask, zero), to=7)
    places = op.CumSum(real, one)
    # The last P places. Not by `Slice`, which ONNX Runtime would run on CUDA: see `host.py`.
    number = op.CumSum(op.Add(op.Mul(input_ids, zero), one), one, exclusive=1)
    index = op.Add(number, op.Sub(op.Shape(attention_mask, start=1), op.Shape(input_ids, start=1)))
    new_places = op.GatherElements(places, index, axis=1)
    new_real = op.GatherElements(real, index, axis=1)
    tokens = op.Add(op.Cast(input_ids, to=12), mix(op.Cast(new_places, to=12)))
    hashed = op.Mul(op.Cast(mix(tokens), to=7), new_real)
    return op.Mod(op.Add(op.ReduceSum(hashed, axis, keepdims=0), past), word)


@script(this, default_opset=opset18)
def prompt_stream(hashed, seed):  # type: ignore[no-untyped-def]
    """The key of each prompt's random stream: `prompt_hash` (B) and seed (B), int64 -> (B) int64 below 2**32."""
    word = op.Constant(value_int=4294967296)
    # The result of `Mod` has the divisor's sign, so negative seeds map to distinct words.
    low = op.Mod(seed, word)
    high = op.Mod(op.Div(op.Sub(seed, low), word), word)
    start = mix(op.Add(op.Cast(high, to=12), op.Cast(op.Constant(value_int=0x9E3779B9), to=12)))
    start = mix(op.BitwiseXor(op.Cast(low, to=12), start))
    return op.Cast(mix(op.BitwiseXor(op.Cast(hashed, to=12), start)), to=7)


@script(this, default_opset=opset18)
def random_uniform(stream, position, candidates):  # type: ignore[no-untyped-def]
    """Uniform in [0, 1): stream (B), position scalar or (B), candidates (N, B) or (B), int64 -> as these, float32."""
    moved = op.Mul(op.Cast(position, to=12), op.Cast(op.Constant(value_int=0x9E3779B1), to=12))
    row = mix(op.Add(op.Cast(stream, to=12), moved))
    number = op.Mul(op.Cast(candidates, to=12), op.Cast(op.Constant(value_int=0x85EBCA77), to=12))
    bits = op.BitShift(mix(op.Add(row, number)), op.Cast(op.Constant(value_int=9), to=12), direction="RIGHT")
    # Only 23 bits, so that the product with a sum of probabilities stays below that sum after rounding.
    return op.Mul(op.Cast(bits, to=1), op.Constant(value_float=1.1920928955078125e-07))


@script(this, default_opset=opset18)
def any_of(values):  # type: ignore[no-untyped-def]
    """Whether any of the bools is true: a bool scalar."""
    return op.Greater(op.ReduceMax(op.Cast(values, to=1), keepdims=0), op.Constant(value_float=0.0))


@script(this, default_opset=opset18)
def draw_rules(temperature, top_k, top_p):  # type: ignore[no-untyped-def]
    """Prepare the options of a draw, once for all tokens.

    Args:
        temperature: (B) float32; below 1e-5, or NaN, the most likely token is selected.
        top_k: (B) int64; 0 or less keeps all.
        top_p: (B) float32 in (0, 1]; keeps the smallest set of most likely tokens that has at least this probability,
            and always at least one token.

    Returns:
        the fields of `DrawRules`.
    """
    one = op.Constant(value_float=1.0)
    zero = op.Constant(value_int=0)
    tiny = op.Constant(value_float=1.1754943508222875e-38)
    # Not `Less`, so that NaN is greedy too.
    sampled = op.GreaterOrEqual(temperature, op.Constant(value_float=1e-5))
    # Divided by infinity, the log-probability -inf would become NaN.
    finite = op.Min(temperature, op.Constant(value_float=3.4028234663852886e38))
    heat = op.Where(sampled, finite, one)
    share = op.Where(op.Greater(top_p, tiny), top_p, tiny)
    whole = op.Constant(value_int=-1)
    greedy = op.Constant(value_int=-2)
    narrow = op.Or(op.Greater(top_k, zero), op.Less(share, one))
    # No vocabulary is as large.
    rank = op.Min(op.Max(top_k, zero), op.Constant(value_int=16777216))
    kept = op.Where(sampled, op.Where(narrow, rank, whole), greedy)
    most = op.ReduceMax(kept, keepdims=0)
    any_greedy = op.Equal(op.ReduceMin(kept, keepdims=0), greedy)
    return (
        heat,
        kept,
        share,
        any_greedy,
        op.Greater(most, greedy),
        op.Greater(most, whole),
        any_of(op.Equal(kept, whole)),
    )


@script(this, default_opset=opset18)
def draw_from_likely(probabilities, log_all, point, top_k, share, size):  # type: ignore[no-untyped-def]
    """Draw one token of each row among those that top-k and top-p keep.

    Every sum is a running one, which adds in order: so a row's result does not depend on how many tokens the other
    rows keep.

    Args:
        probabilities: (N, B, V) float32, at the temperature.
        log_all: (N, B, V) float32, the log-probabilities by which tokens are ordered.
        point: (N, B, 1) float32 in [0, 1), where the cumulative distribution is inverted.
        top_k: (B, 1) int64; 0 keeps all.
        share: (B, 1) float32 in (0, 1], the probability of `top_p`.
        size: [V] int64.

    Returns:
        (N, B, 1) int64.
    """
    one = op.Constant(value_float=1.0)
    zero_real = op.Constant(value_float=0.0)
    last = op.Constant(value_ints=[-1])
    by_rank = op.Greater(top_k, op.Constant(value_int=0))
    # Tokens less likely than (1 - share) / V sum to less than 1 - share, so none of them is kept; half of that bound
    # leaves a margin for rounding.
    floor = op.Div(op.Mul(op.Sub(one, share), op.Constant(value_float=0.5)), op.Cast(size, to=1))
    likely = op.ReduceSum(op.Cast(op.GreaterOrEqual(probabilities, floor), to=1), last, keepdims=1)
    count = op.Where(by_rank, op.Cast(op.Min(top_k, size), to=1), op.Max(likely, one))
    most = op.ReduceMax(count, keepdims=0)
    kept_count = op.Reshape(op.Cast(most, to=7), op.Constant(value_ints=[1]))
    # Finding a few tokens is many times as fast as finding thousands, and a few nearly always suffice.
    few = op.Min(kept_count, op.Constant(value_ints=[256]))
    _, first = op.TopK(log_all, few, axis=-1)
    covered = op.CumSum(op.GatherElements(probabilities, first, axis=2), op.Constant(value_int=2))
    reaches = op.GreaterOrEqual(op.Gather(covered, last, axis=2), share)
    within_few = op.Or(op.And(by_rank, op.LessOrEqual(top_k, few)), op.And(op.Not(by_rank), reaches))
    if any_of(op.Not(op.Or(within_few, op.Equal(few, kept_count)))):
        _, all_likely = op.TopK(log_all, kept_count, axis=-1)
        order = op.Cast(all_likely, to=7)
    else:
        order = op.Cast(first, to=7)
    by_size = op.GatherElements(probabilities, order, axis=2)
    # With top-k, probabilities are renormalized over the k tokens; otherwise they stay as they are.
    width = op.Squeeze(op.Shape(order, start=2), op.Constant(value_ints=[0]))
    places = op.Range(op.Constant(value_int=0), width, op.Constant(value_int=1))
    within_rank = op.Or(op.Not(by_rank), op.Less(places, top_k))
    by_size = op.Where(within_rank, by_size, zero_real)
    kept_sum = op.Gather(op.CumSum(by_size, op.Constant(value_int=2)), last, axis=2)
    by_size = op.Div(by_size, op.Where(by_rank, kept_sum, one))
    before = op.CumSum(by_size, op.Constant(value_int=2), exclusive=1)
    inside = op.Where(op.Or(op.Less(before, share), op.GreaterOrEqual(share, one)), by_size, zero_real)
    sums = op.CumSum(inside, op.Constant(value_int=2))
    target = op.Mul(point, op.Gather(sums, last, axis=2))
    place = op.ReduceSum(op.Cast(op.LessOrEqual(sums, target), to=1), last, keepdims=1)
    return op.Cast(op.GatherElements(order, op.Cast(place, to=7), axis=2), to=7)


@script(this, default_opset=opset18)
def draw_from_all(probabilities, point):  # type: ignore[no-untyped-def]
    """Draw one token of each row: probabilities (N, B, V) and point (N, B, 1) float32 -> (N, B, 1) int64.

    It finds the block of 128 tokens first and then the token in it, because a cumulative sum over the whole vocabulary
    is slow.
    """
    zero_real = op.Constant(value_float=0.0)
    last = op.Constant(value_ints=[-1])
    width = op.Constant(value_ints=[128])
    missing = op.Mod(op.Neg(op.Shape(probabilities, start=2)), width)
    padded = op.Pad(probabilities, op.Concat(op.Constant(value_ints=[0, 0, 0, 0, 0]), missing, axis=0))
    blocks = op.Reshape(padded, op.Constant(value_ints=[0, 0, -1, 128]))
    block_sums = op.ReduceSum(blocks, last, keepdims=0)
    up_to = op.CumSum(block_sums, op.Constant(value_int=2))
    goal = op.Mul(point, op.Gather(up_to, last, axis=2))
    number = op.Cast(op.ReduceSum(op.Cast(op.LessOrEqual(up_to, goal), to=1), last, keepdims=1), to=7)
    own_sum = op.GatherElements(block_sums, number, axis=2)
    # Rounding may make this negative, which would select a first token of probability 0.
    rest = op.Max(op.Sub(goal, op.Sub(op.GatherElements(up_to, number, axis=2), own_sum)), zero_real)
    within = op.CumSum(op.GatherND(blocks, number, batch_dims=2), op.Constant(value_int=2))
    # The sum of the block may round below the remainder; then the last token of nonzero probability is selected.
    end = op.ReduceSum(op.Cast(op.Less(within, op.Gather(within, last, axis=2)), to=1), last, keepdims=1)
    offset = op.ReduceSum(op.Cast(op.LessOrEqual(within, rest), to=1), last, keepdims=1)
    return op.Add(op.Mul(number, width), op.Cast(op.Min(offset, end), to=7))


@script(this, default_opset=opset18)
def draw_token(  # type: ignore[no-untyped-def]
    logits, uniform, size, heat, top_k, share, any_greedy, any_sampled, any_filtered, any_whole
):
    """Draw one token of each row by inverting the cumulative distribution, each prompt's by its own options.

    Logits (N, B, V), uniform numbers (N, B) in [0, 1), float32, the size of the vocabulary [V], and `DrawRules`, of
    which the first three are (B, 1) here -> tokens (N, B) int64 and their log-probabilities (N, B) float32 at
    temperature 1, before top-k and top-p. Where NaN or infinite logits define no distribution, the log-probability is
    NaN and the token arbitrary. Only what some prompt needs is computed.
    """
    last = op.Constant(value_ints=[-1])
    log_all = op.LogSoftmax(logits, axis=-1)
    if any_sampled:
        probabilities = op.Softmax(op.Div(log_all, heat), axis=-1)
        point = op.Unsqueeze(uniform, last)
        if any_filtered:
            # Only for the prompts that need it; in the others' place there is any token.
            filtered = op.GreaterOrEqual(top_k, op.Constant(value_int=0))
            needs = op.Squeeze(filtered, last)
            likely = draw_from_likely(
                op.Compress(probabilities, needs, axis=1),
                op.Compress(log_all, needs, axis=1),
                op.Compress(point, needs, axis=1),
                op.Compress(top_k, needs, axis=0),
                op.Compress(share, needs, axis=0),
                size,
            )
            place = op.Sub(op.CumSum(op.Cast(needs, to=7), op.Constant(value_int=0)), op.Constant(value_int=1))
            kept = op.Gather(likely, op.Max(place, op.Constant(value_int=0)), axis=1)
            if any_whole:
                chosen = op.Cast(op.Where(filtered, kept, draw_from_all(probabilities, point)), to=7)
            else:
                chosen = op.Cast(kept, to=7)
            drawn = op.Cast(chosen, to=7)
        else:
            drawn = op.Cast(draw_from_all(probabilities, point), to=7)
        if any_greedy:
            sampled = op.GreaterOrEqual(top_k, op.Constant(value_int=-1))
            mixed = op.Cast(op.Where(sampled, drawn, op.ArgMax(logits, axis=-1, keepdims=1)), to=7)
        else:
            mixed = op.Cast(drawn, to=7)
        token = op.Cast(mixed, to=7)
    else:
        token = op.Cast(op.ArgMax(logits, axis=-1, keepdims=1), to=7)
    log_probability = op.GatherElements(log_all, token, axis=2)
    return op.Squeeze(token, last), op.Squeeze(log_probability, last)


FUNCTIONS = (
    mix,
    prompt_hash,
    prompt_stream,
    random_uniform,
    any_of,
    draw_rules,
    draw_from_likely,
    draw_from_all,
    draw_token,
)

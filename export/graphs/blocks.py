"""Attention in blocks of queries, as ONNX functions: each block reads only the keys that it may see.

A full square of logits takes memory that grows with the square of the length, and half of it is masked. Here a `Loop`
computes one block of queries at a time, so the memory is that of one block, half of the products are spared, and the
graph does not grow with the length. A sliding window reads the keys of its window only.

The logits of a block of a prompt are not masked: its attention to itself is computed first and then merged with the
attention to all keys before it, as `attention.py` describes.

A block computes its numbers from shapes that it reads itself, and not from the same numbers outside of the loop: only
so does ONNX Runtime compute them on the host when the tensors are on a GPU. Otherwise every block would copy them to
the GPU and back.

Shapes: B rows, G kv heads, R query heads of each, K head size, T keys, P queries of rows; N candidates, C tokens of
each; S positions of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bonnx.models.config import NetworkConfig
from bonnx.runtime.artifact.limits import CANDIDATE_BLOCK, CANDIDATES_BLOCK, ROWS_BLOCK

from .builder import Builder
from .layers import MASKED

__all__ = ["AttentionKind", "attention_functions", "attention_kind"]

_FLOAT, _INT = ir.DataType.FLOAT, ir.DataType.INT64
_END = 2**62


@dataclass(frozen=True)
class AttentionKind:
    """What distinguishes the attention of two layers.

    Attributes:
        group: query heads of a kv head.
        size: features of a head.
        window: the sliding window in tokens, or None.
        cap: as in `NetworkConfig.attention_cap`.
    """

    group: int
    size: int
    window: int | None
    cap: float | None

    def name(self, operator: str) -> str:
        """The name of a function for attention of this kind."""
        return operator if self.window is None else f"{operator}_window{self.window}"


def attention_kind(config: NetworkConfig, window: int | None) -> AttentionKind:
    """Return the kind of a network's layers with a window."""
    return AttentionKind(config.num_heads // config.num_kv_heads, config.size_of_head, window, config.attention_cap)


def attention_functions(config: NetworkConfig) -> list[ir.Function]:
    """Return the functions that a network's graphs call, by the names of `AttentionKind.name`."""
    kinds = [attention_kind(config, window) for window in dict.fromkeys(config.windows)]
    return [function for kind in kinds for function in (_attend_rows(kind), _attend_candidates(kind))]


class _Part(Builder):
    """A part of a function, with what attention does in it.

    Args:
        name: of the part.
        kind: of attention.
        leading: axes before the positions.
        outer: the part around it, which holds the constants of both.
    """

    def __init__(self, name: str, kind: AttentionKind, leading: int, outer: _Part | None = None) -> None:
        super().__init__(name)
        self.kind, self.leading = kind, leading
        self.known: dict[bytes, ir.Value] = {}
        if outer is not None:
            self.name, self.initializers, self.known = outer.name, outer.initializers, outer.known

    def constant(self, value: NDArray[Any] | np.generic) -> ir.Value:
        """A constant, once for all its readers."""
        array = np.asarray(value)
        key = repr((array.dtype, array.shape)).encode() + array.tobytes()
        if key not in self.known:
            self.known[key] = super().constant(array)
        return self.known[key]

    def cut(self, x: Any, begin: Any, end: Any, axis: int) -> Any:
        """Entries `begin` to `end`, 1-D tensors of one number, along an axis."""
        return self.Slice(x, begin, end, self.ints(axis))

    def always(self, x: Any) -> Any:
        """True, computed from the shape of x: a loop's condition that is on the host, whose loop reads it."""
        axis = self.Shape(x, start=0, end=1)
        return self.Squeeze(self.Equal(axis, axis))

    def limited(self, logits: Any) -> Any:
        """Limit logits, if there is a cap."""
        if self.kind.cap is None:
            return logits
        cap = self.float(self.kind.cap)
        return self.Mul(self.Tanh(self.Div(logits, cap)), cap)

    def where_not(self, allowed: Any) -> Any:
        """0 where allowed, MASKED elsewhere."""
        return self.Where(allowed, self.float(0.0), self.float(MASKED))

    def masked(self, logits: Any, mask: Any, axes: Sequence[Any]) -> Any:
        """Add a mask to logits (..., S * R, T) that becomes (..., S, R, T) by the sizes `axes`, and back."""
        shape = self.Concat(*axes, axis=0)
        return self.Reshape(self.Add(self.Reshape(logits, shape), mask), self.Shape(logits))

    def itself(self, logits: Any, values: Any) -> tuple[Any, Any]:
        """Masked logits (..., M, T), values (..., T, K) -> the output, and the logits' log-sum-exp (..., M, 1)."""
        last, weights = self.ints(-1), self.Softmax(logits, axis=-1)
        # The largest weight is 1 / sum(exp(logits - largest)).
        top, largest = (self.ReduceMax(x, last, keepdims=1) for x in (logits, weights))
        return self.MatMul(weights, values), self.Sub(top, self.Log(largest))

    def merged(self, q: Any, out: Any, logit: Any, keys: Any, values: Any, near: Any, axes: Sequence[Any]) -> Any:
        """Merge the attention of queries (..., M, K) to shared keys with their own, an output and its log-sum-exp.

        Keys (..., K + 2, T + 1) and values (..., T + 1, K) are from `shared_keys` and `shared_values`; `near` is a mask
        (B, 1, S, 1, T + 1) or None, and `axes` are those of `masked`.
        """
        zero, one, size = self.ints(0), self.ints(1), self.ints(self.kind.size)
        ones = self.Expand(self.float(1.0), self.Shape(logit))
        if self.kind.cap is None:
            logits = self.MatMul(self.Concat(q, ones, logit, axis=-1), keys)
        else:
            # The mask and the block's own logit must not be limited.
            extra = self.MatMul(self.Concat(ones, logit, axis=-1), self.cut(keys, size, self.ints(_END), -2))
            logits = self.Add(self.limited(self.MatMul(q, self.cut(keys, zero, size, -2))), extra)
        if near is not None:
            logits = self.masked(logits, near, axes)
        weights = self.Softmax(logits, axis=-1)
        return self.Add(self.MatMul(weights, values), self.Mul(self.cut(weights, zero, one, -1), out))

    def of_keys(self, positions: Any) -> Any:
        """The positions (B, T) of tokens -> those of their shared keys (B, T + 1), whose first is before all windows.

        So what `first_near` counts is the place of a key, and no other number depends on it that a GPU would compute.
        """
        shape = self.Concat(self.Shape(positions, start=0, end=1), self.ints(1), axis=0)
        return self.Concat(self.Expand(self.int(-_END), shape), positions, axis=1)

    def first_near(self, positions: Any, lowest: Any) -> Any:
        """How many positions (B, T) at the beginning lie before the window of all queries, the lowest at (B, 1)."""
        before = self.LessOrEqual(positions, self.Sub(lowest, self.int(self._window)))
        counts = self.ReduceSum(self.Cast(before, to=_INT), self.ints(1), keepdims=0)
        return self.ReduceMin(counts, self.ints(0), keepdims=1)

    def near(self, queries: Any, keys: Any) -> Any:
        """Whether keys at positions (..., T) lie in the window of queries at (..., S): (..., S, T)."""
        distance = self.Sub(self.Unsqueeze(queries, self.ints(-1)), self.Unsqueeze(keys, self.ints(-2)))
        return self.Less(distance, self.int(self._window))

    def reached(self, queries: Any, keys: Any) -> Any:
        """The same as a mask (B, 1, S, 1, T + 1) for `merged`."""
        mask = self.Pad(self.where_not(self.near(queries, keys)), self.ints(0, 0, 1, 0, 0, 0))
        return self.Unsqueeze(mask, self.ints(1, 3))

    def from_shared(self, keys: Any, values: Any, begin: Any, end: Any) -> tuple[Any, Any]:
        """Shared keys and values from the place `begin`, or the first, up to `end`, the extra one included."""
        if begin is None:
            return self.cut(keys, self.ints(0), end, 3), self.cut(values, self.ints(0), end, 2)
        parts = [(self.ints(0), self.ints(1)), (begin, end)]
        return (
            self.Concat(*(self.cut(keys, *part, 3) for part in parts), axis=3),
            self.Concat(*(self.cut(values, *part, 2) for part in parts), axis=2),
        )

    @property
    def _window(self) -> int:
        assert self.kind.window is not None
        return self.kind.window

    def in_blocks(
        self,
        body: _Part,
        number: ir.Value,
        block: ir.Value,
        q: ir.Value,
        count: ir.Value,
        size: ir.Value,
        length: ir.Value,
    ) -> ir.Value:
        """Compute blocks (..., S * R, K) in a loop and join them: (..., P * R, K), the shape of all queries.

        The last block ends with the last position, so its first positions may also be in the block before.

        Args:
            body: the nodes of one block.
            number: the loop's counter, which `body` reads.
            block: the block's output.
            q: all queries.
            count: number of blocks.
            size: positions of a block.
            length: all positions.
        """
        condition, lead = ir.val("condition", ir.DataType.BOOL, []), self.leading
        # The axis of blocks is there twice until the next reshape: ONNX's reference evaluator does not add it.
        goes_on, stacked = body.always(q), body.Unsqueeze(block, self.ints(0))
        goes_on.type, stacked.type = condition.type, ir.TensorType(_FLOAT)
        graph = ir.Graph([number, condition], [goes_on, stacked], nodes=body.nodes, name=body.name)
        blocks = self.Loop(self.Squeeze(count), self.constant(np.array(True)), body=graph)
        group, size_of_head = self.ints(self.kind.group), self.ints(self.kind.size)
        rows = self.Mul(size, group)
        shape = self.Concat(count, self.Shape(q, start=0, end=lead), rows, size_of_head, axis=0)
        moved = self.Transpose(self.Reshape(blocks, shape), perm=[*range(1, lead + 1), 0, lead + 1, lead + 2])
        joined = self.Reshape(moved, self.ints(*[0] * lead, -1, self.kind.size))
        whole = self.Mul(self.Sub(count, self.ints(1)), rows)
        rest = self.Sub(whole, self.Mul(length, group))
        parts = self.cut(joined, self.ints(0), whole, lead), self.cut(joined, rest, self.ints(_END), lead)
        out: ir.Value = self.Concat(*parts, axis=lead)
        return out


def _divided(b: Builder, length: ir.Value, most: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The number of blocks of at most `most` positions, and the positions of each: 1-D tensors of one number."""
    one = b.ints(1)
    count = b.Div(b.Sub(b.Add(length, most), one), most)
    return count, b.Div(b.Sub(b.Add(length, count), one), b.Max(count, one))


def _attend_rows(kind: AttentionKind) -> ir.Function:
    """The last P tokens of rows attend to all T tokens.

    Inputs: queries (B, G, P * R, K); keys (B, G, K + 2, T + 1) and values (B, G, T + 1, K) from `shared_keys` and
    `shared_values`; positions (B, T), and those of the queries (B, P). Output: (B, G, P * R, K).
    """
    b = _Part("rows", kind, 2)
    body = _Part("block", kind, 2, b)
    inputs = [ir.Value(name=name) for name in ("q", "keys", "values", "positions", "new_positions")]
    q, keys, values, positions, new_positions = inputs
    group, one, size_of_head = b.ints(kind.group), b.ints(1), b.ints(kind.size)
    # What all layers share is computed from inputs that they share, so that the graph has it once.
    length = b.Shape(new_positions, start=1, end=2)
    count, size = _divided(b, length, b.ints(ROWS_BLOCK))
    row = b.Range(b.int(0), b.Squeeze(size), b.int(1))
    column = b.Unsqueeze(row, one)
    same, causal = b.Equal(row, column), b.where_not(b.LessOrEqual(row, column))

    number, of_block = ir.val("number", _INT, []), body.Shape(row)
    new = body.Shape(new_positions, start=1, end=2)
    first = body.Min(body.Mul(number, of_block), body.Sub(new, of_block))
    begin = body.Add(body.Sub(body.Shape(positions, start=1, end=2), new), first)
    end = body.Add(begin, of_block)
    rows = body.Mul(first, group)
    queries = body.cut(q, rows, body.Add(rows, body.Mul(of_block, group)), 2)
    # Behind the first key, which is no token's.
    place = body.Add(begin, one), body.Add(end, one)
    own = body.cut(keys, *place, 3)
    own_keys, padding = body.cut(own, body.ints(0), size_of_head, 2), body.cut(own, size_of_head, body.ints(-1), 2)
    mask, near, start = body.Add(causal, padding), None, None
    if kind.window is not None:
        of_queries = body.cut(new_positions, first, body.Add(first, of_block), 1)
        of_keys = b.of_keys(positions)
        start = body.first_near(of_keys, body.cut(of_queries, body.ints(0), one, 1))
        mask = body.Add(mask, body.Unsqueeze(body.where_not(body.near(of_queries, of_queries)), one))
        near = body.reached(of_queries, body.cut(of_keys, start, place[0], 1))
    # Every query may attend to itself, even if it is padding.
    mask = body.Unsqueeze(body.Where(same, body.float(0.0), mask), body.ints(3))
    axes = body.Shape(queries, start=0, end=2), of_block, group, body.ints(-1)
    logits = body.masked(body.limited(body.MatMul(queries, own_keys)), mask, axes)
    out, logit = body.itself(logits, body.cut(values, *place, 2))
    block = body.merged(queries, out, logit, *body.from_shared(keys, values, start, place[0]), near, axes)
    joined = b.in_blocks(body, number, block, q, count, size, length)
    return b.as_function(kind.name("attend_rows"), inputs, [joined])


def _attend_candidates(kind: AttentionKind) -> ir.Function:
    """Candidates attend to their own tokens and to those of the prompt, which all of them share.

    Inputs: queries (B, G, N, C * R, K); their own keys (B, G, N, K, C) and values (B, G, N, C, K), and their padding as
    a mask (B, 1, N, 1, 1, C); keys (B, G, K + 2, P + 1) and values (B, G, P + 1, K) of the prompt, from `shared_keys`
    and `shared_values`; positions (B, N, C) of the candidates and (B, P) of the prompt. Output: (B, G, N, C * R, K).
    """
    b = _Part("candidates", kind, 3)
    body = _Part("block", kind, 3, b)
    names = ["q", "own_keys", "own_values", "padding", "keys", "values", "positions", "prompt_positions"]
    inputs = [ir.Value(name=name) for name in names]
    q, own_keys, own_values, padding, keys, values, positions, prompt_positions = inputs
    group, one = b.ints(kind.group), b.ints(1)
    length = b.Shape(positions, start=2, end=3)
    most = b.Max(b.Div(b.ints(CANDIDATES_BLOCK), b.Shape(positions, start=1, end=2)), b.ints(CANDIDATE_BLOCK))
    count, size = _divided(b, length, most)
    index, row = (b.Range(b.int(0), b.Squeeze(end), b.int(1)) for end in (length, size))

    number, of_block = ir.val("number", _INT, []), body.Shape(row)
    begin = body.Min(body.Mul(number, of_block), body.Sub(body.Shape(index), of_block))
    end, zero = body.Add(begin, of_block), body.ints(0)
    rows = body.Mul(begin, group)
    queries = body.cut(q, rows, body.Add(rows, body.Mul(of_block, group)), 3)
    lead, candidates = body.Shape(queries, start=0, end=2), body.Shape(queries, start=2, end=3)
    before, of_queries = body.cut(index, zero, end, 0), body.cut(index, begin, end, 0)
    causal = body.LessOrEqual(before, body.Unsqueeze(of_queries, one))
    mask = body.Add(body.Unsqueeze(body.where_not(causal), one), body.cut(padding, zero, end, 5))
    near = None
    if kind.window is not None:
        placed = body.cut(positions, begin, end, 2)
        inside = body.where_not(body.near(placed, body.cut(positions, zero, end, 2)))
        mask = body.Add(mask, body.Unsqueeze(inside, b.ints(1, 4)))
        lowest = body.Unsqueeze(body.ReduceMin(placed, b.ints(1, 2), keepdims=0), one)
        of_keys = b.of_keys(prompt_positions)
        start = body.first_near(of_keys, lowest)
        near = body.reached(body.Reshape(placed, b.ints(0, -1)), body.cut(of_keys, start, b.ints(_END), 1))
        keys, values = body.from_shared(keys, values, start, b.ints(_END))
    rest = b.ints(-1)
    logits = body.limited(body.MatMul(queries, body.cut(own_keys, zero, end, 4)))
    logits = body.masked(logits, mask, (lead, candidates, of_block, group, rest))
    out, logit = body.itself(logits, body.cut(own_values, zero, end, 3))
    flat = b.ints(0, 0, -1, kind.size)
    joint = body.merged(
        body.Reshape(queries, flat),
        body.Reshape(out, flat),
        body.Reshape(logit, b.ints(0, 0, -1, 1)),
        keys,
        values,
        near,
        (lead, body.Mul(candidates, of_block), group, rest),
    )
    block = body.Reshape(joint, body.Shape(queries))
    joined = b.in_blocks(body, number, block, q, count, size, length)
    return b.as_function(kind.name("attend_candidates"), inputs, [joined])

"""`decode_static`: `decode` with a static cache, as a CUDA graph needs it, and the two graphs that stand beside it.

A CUDA graph runs what was captured again at once, without the host's work for each operator, if nothing in it depends
on the host: shapes and addresses stay the same, there is no branch and no copy. So the caches of the rows have slots
for all tokens that they may get, written in place; the random numbers, and what the host knows of the rows, are
inputs. Tokens are drawn from all tokens, or the most likely one is selected: top-k and top-p would need sizes that
depend on values.

`uniforms`, for the CPU, makes the random numbers. `resize_cache` moves rows to caches of other sizes on the device.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import opset18, script
from onnxscript.values import Opset
from torch import Tensor

from bonnx.models.config import NetworkConfig

from .builder import Builder, name_value
from .generate_passes import RowsPass
from .prefill_decode import append_draw
from .sampling import draw_from_all, random_uniform

__all__ = ["StaticPass", "draw_plain", "resize_graph", "static_graph", "uniforms_graph"]

INT, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT
# Any, because the operators' type variables are too narrow for the values that onnxscript infers.
op: Any = opset18
this: Any = Opset("bonnx", 1)


class StaticPass(RowsPass):
    """`RowsPass` for caches with a slot for every token.

    In the place of `ages` it takes the numbers of the slots, 0, 1, ..., T - 1; the caches have T tokens, before and
    after.
    """

    def append(self, cache: Tensor, new: Tensor, lengths: Tensor) -> Tensor:
        """Write into each row's first free slot."""
        return cache.scatter(2, lengths[:, None, None, None].expand_as(new), new)

    def seen(self, places: Tensor, lengths: Tensor, window: int | None) -> Tensor:
        """Which slots each row reads, (M, T) bool."""
        ages = lengths[:, None] - places
        return ages >= 0 if window is None else (ages >= 0) & (ages < window)


@script(this, default_opset=opset18)
def draw_plain(logits, uniform, heat, sampled):  # type: ignore[no-untyped-def]
    """`draw_token` without branches, and without top-k and top-p.

    Logits (1, M, V), uniform (1, M), heat (M, 1) float32, sampled (M, 1) bool -> tokens and log-probabilities (1, M).
    """
    last = op.Constant(value_ints=[-1])
    log_all = op.LogSoftmax(logits, axis=-1)
    drawn = draw_from_all(op.Softmax(op.Div(log_all, heat), axis=-1), op.Unsqueeze(uniform, last))
    token = op.Where(sampled, drawn, op.ArgMax(logits, axis=-1, keepdims=1))
    return op.Squeeze(token, last), op.Squeeze(op.GatherElements(log_all, token, axis=2), last)


def static_graph(static_pass: ir.Graph) -> ir.Graph:
    """Put after the traced `StaticPass` the draw of each next token."""
    logits = static_pass.outputs[1]
    uniform, temperature = (ir.val(name, FLOAT, ["rows"]) for name in ("uniform", "temperature"))
    sampled = ir.val("sampled", ir.DataType.BOOL, ["rows"])
    b = Builder("draw")
    first, column = b.ints(0), b.ints(1)
    of_rows = (b.Unsqueeze(value, first) for value in (logits, uniform))
    rules = (b.Unsqueeze(value, column) for value in (temperature, sampled))
    tokens, log_probs = b.call(draw_plain, *of_rows, *rules)
    static_pass.inputs.extend([uniform, temperature, sampled])
    append_draw(static_pass, b, tokens, log_probs)
    # A branch or a loop cannot be captured.
    assert not [*static_pass.subgraphs()]
    return static_pass


def uniforms_graph() -> ir.Graph:
    """The random numbers of rows; for the CPU, because CUDA has no kernels for their integers."""
    b = Builder("uniforms")
    inputs = [ir.val(name, INT, ["rows"]) for name in ("stream", "positions", "numbers")]
    drawn = b.call(random_uniform, *inputs)
    graph = ir.Graph(inputs, [], nodes=[], name="uniforms")
    b.extend(graph)
    graph.outputs.append(name_value(drawn, "uniform", FLOAT, ["rows"]))
    return graph


def resize_graph(config: NetworkConfig) -> ir.Graph:
    """Caches -> those of some of their rows, and of some of their slots, both given by their numbers.

    Rows that are not `kept` become zeros: what is masked counts, too, if it is NaN.
    """
    b = Builder("resize")
    rows, slots = (ir.val(name, INT, [name]) for name in ("rows", "slots"))
    kept = ir.val("kept", ir.DataType.BOOL, ["rows"])
    graph = ir.Graph([rows, slots, kept], [], nodes=[], name="resize_cache")
    column, zero = b.Unsqueeze(kept, b.ints(1, 2, 3)), b.float(0.0)
    heads, size = config.num_kv_heads, config.size_of_head
    for i in range(config.num_layers):
        for kind in ("key", "value"):
            cache = ir.val(f"{kind}.{i}", FLOAT, ["past_rows", heads, "past_slots", size])
            graph.inputs.append(cache)
            moved = b.Where(column, b.Gather(b.Gather(cache, rows, axis=0), slots, axis=2), zero)
            graph.outputs.append(name_value(moved, f"resized_{kind}.{i}", FLOAT, ["rows", heads, "slots", size]))
    b.extend(graph)
    return graph

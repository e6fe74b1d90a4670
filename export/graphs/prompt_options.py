"""The options of a run as its prompts read them: one value of each for all prompts, or one for each prompt.

ONNX declares a rank for every input of a graph, and ONNX Runtime holds callers to it, except for a scalar, for which it
takes any shape. So these inputs are declared as scalars, and expanded before anything else reads them.

Stop tokens are one list, which cannot get a second axis for the same reason. So an entry for one prompt only has that
prompt's number, counted from 1, in its upper 32 bits.

Shapes: B prompts, S stop tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from .builder import Builder
from .host import host_range, on_host
from .sampling import DrawRules, draw_rules

__all__ = ["PER_PROMPT", "draw_options", "host_options", "host_per_prompt", "option", "per_prompt", "stop_tokens"]

INT, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT
# Marks such an input, for the manifest; it is not written to the graph.
PER_PROMPT = "per_prompt"


def option(name: str) -> ir.Value:
    """Return a graph's input that is one value for all prompts, or one for each."""
    value = ir.val(name, FLOAT if name in ("temperature", "top_p", "prune_keep") else INT, [])
    value.meta[PER_PROMPT] = True
    return value


def per_prompt(b: Builder, value: ir.Value, batch: ir.Value) -> ir.Value:
    """Expand a scalar, (1) or (B) to (B); `batch` is [B]."""
    # The `Reshape` fails if there are more values than prompts, to which `Expand` would expand a single prompt.
    expanded: ir.Value = b.Reshape(b.Expand(value, batch), batch)
    return expanded


def host_per_prompt(b: Builder, value: ir.Value, zeros: ir.Value) -> ir.Value:
    """Expand a scalar, (1) or (B) to (B) on the host; `zeros` are (B) int64 there, from `host_zeros`.

    With a single prompt, more values pass. `to_device` refuses them, because its sizes are those of the prompts.
    """
    like = zeros if value.dtype == INT else b.Cast(zeros, to=FLOAT)
    expanded: ir.Value = b.Add(value, like)
    return expanded


def host_options(b: Builder, values: Sequence[ir.Value], zeros: ir.Value) -> list[ir.Value]:
    """As `host_per_prompt` for several int64 values, of which other shapes are refused here."""
    column = b.ints(1)
    # Only values of one shape can be put together, and it must be that of the zeros.
    columns = [b.Unsqueeze(value, column) for value in (zeros, *(b.Add(value, zeros) for value in values))]
    sizes = b.ints(*[1] * len(columns))
    _, *checked = b.Split(b.Concat(*columns, axis=1), sizes, axis=1, _outputs=len(columns))
    return [b.Squeeze(value, column) for value in checked]


def draw_options(b: Builder, drawing: Sequence[ir.Value], zeros: ir.Value) -> DrawRules:
    """Read `temperature`, `top_k` and `top_p` on the host; `zeros` as in `host_per_prompt`."""
    return DrawRules(*b.call(draw_rules, *(host_per_prompt(b, value, zeros) for value in drawing)))


def stop_tokens(b: Builder, listed: ir.Value, batch: ir.Value, zero: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Read the stop tokens on the host; `batch` is [B], and `zero` is from `host_zero`.

    Returns:
        (B, S) int64, the tokens for all prompts and for each, -1 elsewhere; [s], the most of any prompt, at least 1.
    """
    word = b.int(2**32)
    # -1 is not a token; it keeps the list from being empty.
    listed = b.Concat(on_host(b, listed, zero), b.ints(-1), axis=0)
    prompt, token = b.Div(listed, word), b.Mod(listed, word)
    token = b.Where(b.Less(listed, b.int(0)), b.int(-1), token)
    numbers = b.Add(host_range(b, batch), b.int(1))
    own = b.Equal(prompt, b.Unsqueeze(numbers, b.ints(1)))
    mine = b.Where(b.Or(own, b.Equal(prompt, b.int(0))), token, b.int(-1))
    counts = b.ReduceSum(b.Cast(b.GreaterOrEqual(mine, b.int(0)), to=INT), b.ints(1), keepdims=0)
    most = b.Max(b.ReduceMax(counts, keepdims=0), b.ints(1))
    return mine, most

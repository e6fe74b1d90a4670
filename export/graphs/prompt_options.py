"""The options of a run as its prompts read them: one value of each for all prompts, or one for each prompt.

ONNX declares a rank for every input of a graph, and ONNX Runtime holds callers to it, except for a scalar, for which it
takes any shape. So these inputs are declared as scalars, and expanded before anything else reads them.

Stop tokens are one list, which cannot get a second axis for the same reason. So an entry for one prompt only has that
prompt's number, counted from 1, in its upper 32 bits.

Shapes: B prompts, S stop tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from .builder import Builder
from .loop_state import LoopInputs, Options
from .sampling import DrawRules, draw_rules

__all__ = ["PER_PROMPT", "draw_options", "option", "per_prompt", "read_options"]

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


def draw_options(b: Builder, drawing: Sequence[ir.Value], batch: ir.Value) -> DrawRules:
    """Read `temperature`, `top_k` and `top_p`."""
    return DrawRules(*b.call(draw_rules, *(per_prompt(b, value, batch) for value in drawing)))


def read_options(b: Builder, inputs: LoopInputs, batch: ir.Value) -> Options:
    """Read the options that are not about drawing."""
    every = per_prompt(b, inputs.prune_every, batch)
    return Options(
        num_candidates=per_prompt(b, inputs.num_candidates, batch),
        max_new_tokens=per_prompt(b, inputs.max_new_tokens, batch),
        stop_tokens=_stop_tokens(b, inputs.stop_tokens, batch),
        aggregation=b.Unsqueeze(per_prompt(b, inputs.aggregation, batch), b.ints(1)),
        step_token=b.Unsqueeze(per_prompt(b, inputs.step_token, batch), b.ints(1)),
        prune_every=b.Where(b.Greater(every, b.int(0)), every, b.int(np.iinfo(np.int64).max)),
        prune_keep=per_prompt(b, inputs.prune_keep, batch),
    )


def _stop_tokens(b: Builder, stop_tokens: ir.Value, batch: ir.Value) -> ir.Value:
    """(B, S) int64: the tokens for all prompts and for each, negative where one has fewer; S is at least 1."""
    word = b.int(2**32)
    # -1 is not a token; it keeps the list from being empty.
    listed = b.Concat(stop_tokens, b.ints(-1), axis=0)
    prompt, token = b.Div(listed, word), b.Mod(listed, word)
    token = b.Where(b.Less(listed, b.int(0)), b.int(-1), token)
    numbers = b.Range(b.int(1), b.Add(b.Squeeze(batch, b.ints(0)), b.int(1)), b.int(1))
    own = b.Equal(prompt, b.Unsqueeze(numbers, b.ints(1)))
    mine = b.Where(b.Or(own, b.Equal(prompt, b.int(0))), token, b.int(-1))
    counts = b.ReduceSum(b.Cast(b.GreaterOrEqual(mine, b.int(0)), to=INT), b.ints(1), keepdims=0)
    most = b.Max(b.ReduceMax(counts, keepdims=0), b.int(1))
    # Sorted, the tokens come before the rest.
    stops, _ = b.TopK(mine, b.Unsqueeze(most, b.ints(0)), axis=1, _outputs=2)
    first: ir.Value = stops
    return first

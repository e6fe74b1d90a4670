"""The `prefill` and `decode` graphs: the passes of generation as separate graphs, for a loop that the host controls.

Tokens are drawn by the same functions, so the same seed draws the same tokens as `generate`. Options are one value for
all prompts or one for each. Without a scorer, `prefill` gives the self-certainty of the distribution of the first
token, and `decode`, instead of scores, those of the distributions of the next tokens. Axis 0 of every tensor is the
candidate, so a host drops, reorders or repeats candidates by gathering rows of `tokens`, `numbers` and the cache.
"""

from __future__ import annotations

import onnx_ir as ir

from .builder import Builder, name_value
from .prompt_options import draw_options, option, per_prompt
from .sampling import draw_token, prompt_stream, random_uniform

__all__ = ["decode_graph", "prefill_graph"]

INT, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT
ROWS = ["num_candidates", "batch"]


def _draw_inputs() -> list[ir.Value]:
    return [option(name) for name in ("temperature", "top_k", "top_p")]


def prefill_graph(prompt_pass: ir.Graph) -> ir.Graph:
    """Append to the traced prompt pass the draw of each candidate's first token."""
    b = Builder("prefill")
    (ids, mask), (logits, *_) = prompt_pass.inputs, prompt_pass.outputs
    count, seed, drawing = option("num_candidates"), option("seed"), _draw_inputs()
    batch = b.Shape(ids, start=0, end=1)
    most = b.ReduceMax(per_prompt(b, count, batch), keepdims=0)
    rows = b.Unsqueeze(most, b.ints(0))
    numbers = b.Unsqueeze(b.Range(b.int(0), most, b.int(1)), b.ints(1))
    numbers = b.Expand(numbers, b.Concat(rows, batch, axis=0))
    stream = b.call(prompt_stream, ids, mask, per_prompt(b, seed, batch))
    uniform = b.call(random_uniform, stream, b.int(0), numbers)
    wide = b.Expand(logits, b.Concat(rows, b.Shape(logits), axis=0))
    tokens, log_probs = b.call(draw_token, wide, uniform, *draw_options(b, drawing, batch))
    prompt_pass.inputs.extend([count, seed, *drawing])
    added = [
        name_value(tokens, "tokens", INT, ROWS),
        name_value(log_probs, "log_probs", FLOAT, ROWS),
        name_value(stream, "stream", INT, ["batch"]),
    ]
    b.extend(prompt_pass)
    prompt_pass.outputs[:0] = added
    return prompt_pass


def decode_graph(token_pass: ir.Graph) -> ir.Graph:
    """Append to the traced token pass the draw of each candidate's next token."""
    b = Builder("decode")
    key, logits = token_pass.inputs[4], token_pass.outputs[1]
    stream, numbers = ir.val("stream", INT, ["batch"]), ir.val("numbers", INT, ROWS)
    drawing = _draw_inputs()
    # Token 0 was drawn after the prompt pass, so with T tokens in a candidate's cache, token T + 1 is drawn here.
    drawn = b.Add(b.Squeeze(b.Shape(key, start=3, end=4), b.ints(0)), b.int(1))
    uniform = b.call(random_uniform, stream, drawn, numbers)
    rules = draw_options(b, drawing, b.Shape(numbers, start=1, end=2))
    following, log_probs = b.call(draw_token, logits, uniform, *rules)
    token_pass.inputs[2:2] = [stream, numbers, *drawing]
    added = [name_value(following, "next_tokens", INT, ROWS), name_value(log_probs, "log_probs", FLOAT, ROWS)]
    b.extend(token_pass)
    token_pass.outputs[1:1] = added
    return token_pass

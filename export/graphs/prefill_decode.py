"""The `prefill` and `decode` graphs: the passes of generation as separate graphs, for a loop that the host controls.

Tokens are drawn by the same functions, so the same seed draws the same tokens as `generate`. Options are one value for
all prompts or one for each. Without a scorer, `prefill` gives the self-certainty of the distribution of the first
token, and `decode`, instead of scores, those of the distributions of the next tokens.

`prefill` may get the last tokens of prompts only, with the keys and values of the others. `decode` reads one token of
each row. Rows continue any of the prompts, at any length, and each says which row of the last run it continues: a host
drops, reorders, repeats and adds rows by naming them, and copies nothing.
"""

from __future__ import annotations

import onnx_ir as ir

from .builder import Builder, name_value
from .prompt_options import draw_options, option, per_prompt
from .sampling import draw_token, prompt_hash, prompt_stream, random_uniform

__all__ = ["decode_graph", "prefill_graph"]

INT, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT
DRAWN = ["num_candidates", "batch"]


def _draw_inputs() -> list[ir.Value]:
    return [option(name) for name in ("temperature", "top_k", "top_p")]


def prefill_graph(prompt_pass: ir.Graph) -> ir.Graph:
    """Append to the traced prompt pass the draw of each candidate's first token."""
    b = Builder("prefill")
    (ids, mask, *past), (logits, *_) = prompt_pass.inputs, prompt_pass.outputs
    count, seed, drawing = option("num_candidates"), option("seed"), _draw_inputs()
    past_hash = ir.val("past_hash", INT, ["batch"])
    batch = b.Shape(ids, start=0, end=1)
    most = b.ReduceMax(per_prompt(b, count, batch), keepdims=0)
    rows = b.Unsqueeze(most, b.ints(0))
    numbers = b.Unsqueeze(b.Range(b.int(0), most, b.int(1)), b.ints(1))
    numbers = b.Expand(numbers, b.Concat(rows, batch, axis=0))
    hashed = b.call(prompt_hash, ids, mask, past_hash)
    stream = b.call(prompt_stream, hashed, per_prompt(b, seed, batch))
    uniform = b.call(random_uniform, stream, b.int(0), numbers)
    wide = b.Expand(logits, b.Concat(rows, b.Shape(logits), axis=0))
    tokens, log_probs = b.call(draw_token, wide, uniform, *draw_options(b, drawing, batch))
    prompt_pass.inputs[2:] = [count, seed, *drawing, past_hash, *past]
    added = [
        name_value(tokens, "tokens", INT, DRAWN),
        name_value(log_probs, "log_probs", FLOAT, DRAWN),
        name_value(stream, "stream", INT, ["batch"]),
        name_value(hashed, "prompt_hash", INT, ["batch"]),
    ]
    b.extend(prompt_pass)
    prompt_pass.outputs[:0] = added
    return prompt_pass


def decode_graph(rows_pass: ir.Graph) -> ir.Graph:
    """Put before the traced pass of rows what it needs to know of them, and after it the draw of each next token."""
    tokens, prompts, lengths, *derived, mask = rows_pass.inputs[:7]
    cache = list(rows_pass.inputs[7:])
    stream, numbers = ir.val("stream", INT, ["batch"]), ir.val("numbers", INT, ["rows"])
    sources, drawing = ir.val("sources", INT, ["rows"]), _draw_inputs()
    before = Builder("rows")
    batch = before.Shape(mask, start=0, end=1)
    own = [value for value in cache if not str(value.name).startswith("prompt")]
    longest = before.ReduceMax(lengths, keepdims=0)
    ages = before.Range(longest, before.int(-1), before.int(-1))
    for value, computed in zip(derived, (ages, *_places(before, prompts, batch)), strict=True):
        value.replace_all_uses_with(computed)
    _continue(before, rows_pass, own, sources, longest)
    scores, logits, *grown = rows_pass.outputs
    for value in own:
        # The rows of the last run, which need not be as many.
        assert value.shape is not None
        name_value(value, str(value.name), FLOAT, ["past_rows", value.shape[1], "past_length", value.shape[3]])
    after = Builder("decode")
    # Token 0 was drawn after the prompt pass, so with T tokens in a row's cache, token T + 1 is drawn here.
    drawn = after.Add(lengths, after.int(1))
    row = after.Unsqueeze(numbers, after.ints(0))
    uniform = after.call(random_uniform, after.Gather(stream, prompts, axis=0), drawn, row)
    rules = draw_options(after, drawing, batch)
    own_rules = (after.Gather(rule, prompts, axis=0) if i < 5 else rule for i, rule in enumerate(rules))
    following, log_probs = after.call(draw_token, after.Unsqueeze(logits, after.ints(0)), uniform, *own_rules)
    rows_pass.inputs[:] = [tokens, prompts, numbers, lengths, sources, mask, stream, *drawing, *cache]
    first = after.ints(0)
    added = [
        name_value(after.Squeeze(following, first), "next_tokens", INT, ["rows"]),
        name_value(after.Squeeze(log_probs, first), "log_probs", FLOAT, ["rows"]),
    ]
    after.extend(rows_pass)
    rows_pass.outputs[:] = [scores, *added, logits, *grown]
    return rows_pass


def _places(b: Builder, prompts: ir.Value, batch: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The rows of each prompt (B, W), and where each row is in that (M): see `RowsPass`."""
    count = b.Squeeze(batch, b.ints(0))
    slots = b.Unsqueeze(b.Range(b.int(0), count, b.int(1)), b.ints(1))
    owned = b.Cast(b.Equal(slots, prompts), to=FLOAT)
    width = b.Cast(b.ReduceMax(b.ReduceSum(owned, b.ints(1), keepdims=1), b.ints(0, 1), keepdims=0), to=INT)
    # `TopK` takes the first of equal values, so the rows of a prompt keep their order.
    _, places = b.TopK(owned, b.Unsqueeze(width, b.ints(0)), axis=1, _outputs=2)
    place = b.GatherElements(b.CumSum(owned, b.int(1)), b.Unsqueeze(prompts, b.ints(0)), axis=0)
    place = b.Sub(b.Cast(b.Squeeze(place, b.ints(0)), to=INT), b.int(1))
    return places, b.Add(b.Mul(prompts, width), place)


def _continue(b: Builder, rows_pass: ir.Graph, own: list[ir.Value], sources: ir.Value, longest: ir.Value) -> None:
    """Let each row of the pass continue the row `sources` of its inputs, from its last tokens.

    The nodes collected in `b`, which must not depend on the pass, are put in front. Each of two branches copies a cache
    once, and only one of them gathers rows; there is one `If` for the keys and the values of a layer, because a runtime
    starts each `If` anew.
    """
    kept, size = b.Shape(own[0], start=0, end=1), b.Shape(own[0], start=2, end=3)
    start = b.Sub(size, b.Unsqueeze(longest, b.ints(0)))
    count = b.Shape(sources)
    places = b.Range(b.int(0), b.Squeeze(count, b.ints(0)), b.int(1))
    moved = b.ReduceMax(b.Cast(b.Not(b.Equal(sources, places)), to=INT), b.ints(0), keepdims=0)
    other = b.Add(b.Abs(b.Sub(kept, count)), start)
    changes = b.Greater(b.Add(moved, b.Squeeze(other, b.ints(0))), b.int(0))
    appends, nodes = list[ir.Node](), [*b.nodes]
    for node in list(rows_pass):
        rows_pass.remove(node)
        if node.op_type == "Concat" and node.inputs[0] in own:
            appends.append(node)
            # Keys, then values: nothing reads the one before the other is there.
            if len(appends) == 2:
                nodes.append(_joined(appends, changes, sources, start))
                appends = []
            continue
        # The sizes of the caches that come in are not those that the pass works with.
        assert not any(value in own for value in node.inputs), node
        nodes.append(node)
    for value in b.initializers:
        rows_pass.register_initializer(value)
    rows_pass.extend(nodes)


def _joined(nodes: list[ir.Node], changes: ir.Value, sources: ir.Value, start: ir.Value) -> ir.Node:
    """Turn `Concat(cache, new)`s into an `If`, which gathers rows and cuts off what no row needs if that changes."""
    branches = {}
    for name in ("then_branch", "else_branch"):
        b, outputs = Builder(f"{nodes[0].name}/{name}"), []
        for node in nodes:
            cache, new = node.inputs
            if name == "then_branch":
                cache = b.Slice(b.Gather(cache, sources, axis=0), start, b.ints(2**62), b.ints(2))
            outputs.append(b.Concat(cache, new, axis=2))
            outputs[-1].dtype = FLOAT
        branches[name] = ir.Graph([], outputs, nodes=b.nodes, initializers=b.initializers, name=b.name)
    chosen = ir.node("If", [changes], branches, num_outputs=len(nodes))
    for node, output in zip(nodes, chosen.outputs, strict=True):
        old = node.outputs[0]
        name, shape = str(old.name), old.shape
        assert shape is not None
        old.replace_all_uses_with(output, replace_graph_outputs=True)
        old.name = f"{name}/appended"
        name_value(output, name, FLOAT, [*shape])
    return chosen

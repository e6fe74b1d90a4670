"""The `prefill` and `decode` graphs: the passes of generation as separate graphs, for a loop that the host controls.

Tokens are drawn by the same functions, so the same seed draws the same tokens as `generate`. Options are one value for
all prompts or one for each. Without a scorer, `prefill` gives the self-certainty of the distribution of the first
token, and `decode`, instead of scores, those of the distributions of the next tokens.

`prefill` may get the last tokens of prompts only, with the keys and values of the others. `decode` reads one token of
each row. Rows continue any of the prompts, at any length, and each says which row of the last run it continues: a host
drops, reorders, repeats and adds rows by naming them, and copies nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from .builder import Builder, name_value
from .host import host_range, host_zero, host_zeros, on_host, replaceable, to_device, to_device_as_floats
from .prompt_options import draw_options, host_options, option
from .sampling import DrawRules, draw_token, prompt_hash, prompt_stream, random_uniform, vocabulary_size

__all__ = ["append_draw", "decode_graph", "prefill_graph"]

INT, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT
DRAWN = ["num_candidates", "batch"]


def _draw_inputs() -> list[ir.Value]:
    return [option(name) for name in ("temperature", "top_k", "top_p")]


class _PromptRead(NamedTuple):
    """What the host computes before the prompt pass; on the device where nothing else is said."""

    ids: ir.Value
    """(B, P) int64."""
    mask: ir.Value
    """(B, T) int64."""
    candidates: ir.Value
    """[N] on the host: the most of any prompt."""
    uniform: ir.Value
    """(N, B) float32."""
    rules: DrawRules
    """The first three (B, 1), the others on the host."""
    stream: ir.Value
    """(B) int64 on the host."""
    hashed: ir.Value
    """(B) int64 on the host."""


def prefill_graph(prompt_pass: ir.Graph) -> ir.Graph:
    """Put before the traced prompt pass the random numbers, and after it the draw of each candidate's first token."""
    b = Builder("prefill")
    (ids, mask, *past), (logits, *others) = prompt_pass.inputs, prompt_pass.outputs
    count, seed, drawing = option("num_candidates"), option("seed"), _draw_inputs()
    past_hash = ir.val("past_hash", INT, ["batch"])
    parameters = replaceable(ids, mask)
    read = _read_prompts(b, (ids, mask), past_hash, (count, seed), drawing, host_zero(b, past[0]))
    for parameter, value in zip(parameters, read[:2], strict=True):
        parameter.replace_all_uses_with(value)
    b.adopt(prompt_pass)
    wide = b.Expand(logits, b.Concat(read.candidates, b.Shape(logits), axis=0))
    tokens, log_probs = b.call(draw_token, wide, read.uniform, vocabulary_size(b, logits), *read.rules)
    prompt_pass.inputs.extend([ids, mask, count, seed, *drawing, past_hash, *past])
    added = [
        name_value(tokens, "tokens", INT, DRAWN),
        name_value(log_probs, "log_probs", FLOAT, DRAWN),
        name_value(read.stream, "stream", INT, ["batch"]),
        name_value(read.hashed, "prompt_hash", INT, ["batch"]),
    ]
    b.extend(prompt_pass)
    prompt_pass.outputs.extend([*added, logits, *others])
    return prompt_pass


def _read_prompts(
    b: Builder,
    tokens: tuple[ir.Value, ir.Value],
    past_hash: ir.Value,
    options: tuple[ir.Value, ir.Value],
    drawing: list[ir.Value],
    zero: ir.Value,
) -> _PromptRead:
    """Read the inputs of `prefill`: ids and mask, numbers of candidates and seeds; `zero` is from `host_zero`."""
    host_ids, host_mask = (on_host(b, value, zero) for value in tokens)
    batch = b.Shape(host_ids, start=0, end=1)
    zeros = host_zeros(b, batch)
    counts, seeds = host_options(b, options, zeros)
    candidates = b.ReduceMax(counts, b.ints(0), keepdims=1)
    hashed = b.call(prompt_hash, host_ids, host_mask, past_hash)
    stream = b.call(prompt_stream, hashed, seeds)
    uniform = b.call(random_uniform, stream, b.int(0), b.Unsqueeze(host_range(b, candidates), b.ints(1)))
    rules, one = draw_options(b, drawing, zeros), b.ints(1)
    heat, top_k, share = (b.Unsqueeze(value, one) for value in rules[:3])
    ints = [*((value, b.Shape(value, start=1, end=2)) for value in (host_ids, host_mask)), (top_k, one)]
    floats = [(b.Transpose(uniform, perm=[1, 0]), candidates), (heat, one), (share, one)]
    ids, mask, top_k, uniform, heat, share = to_device_as_floats(b, 1, ints, floats)
    uniform, rules = b.Transpose(uniform, perm=[1, 0]), rules._replace(heat=heat, top_k=top_k, share=share)
    return _PromptRead(ids, mask, candidates, uniform, rules, stream, hashed)


class _RowsRead(NamedTuple):
    """What the host computes before the pass of rows; on the device where nothing else is said."""

    prompts: ir.Value
    """(M) int64, as are the next four in `RowsPass`."""
    lengths: ir.Value
    ages: ir.Value
    places: ir.Value
    back: ir.Value
    sources: ir.Value
    """(M) int64."""
    changes: ir.Value
    """bool scalar on the host: whether the caches need more than one token appended."""
    start: ir.Value
    """[n] on the host: from where on the rows need the tokens of their caches."""
    uniform: ir.Value
    """(M) float32."""
    rules: DrawRules
    """The first three (B), the others on the host."""


def decode_graph(rows_pass: ir.Graph) -> ir.Graph:
    """Put before the traced pass of rows what it needs to know of them, and after it the draw of each next token."""
    tokens, prompts, lengths, *derived, mask = rows_pass.inputs[:7]
    cache = list(rows_pass.inputs[7:])
    stream, numbers = ir.val("stream", INT, ["batch"]), ir.val("numbers", INT, ["rows"])
    sources, drawing = ir.val("sources", INT, ["rows"]), _draw_inputs()
    own = [value for value in cache if not str(value.name).startswith("prompt")]
    parameters = [*replaceable(prompts, lengths), *derived]
    before = Builder("rows")
    read = _read_rows(before, tokens, (prompts, lengths, numbers), sources, mask, stream, drawing, own[0])
    for parameter, value in zip(parameters, read[:5], strict=True):
        parameter.replace_all_uses_with(value)
    _continue(before, rows_pass, own, read)
    logits = rows_pass.outputs[1]
    for value in own:
        # The rows of the last run, which need not be as many.
        assert value.shape is not None
        name_value(value, str(value.name), FLOAT, ["past_rows", value.shape[1], "past_length", value.shape[3]])
    after = Builder("decode")
    row, first = after.Unsqueeze(read.prompts, after.ints(1)), after.ints(0)
    own_rules = (after.Gather(rule, row, axis=0) for rule in read.rules[:3])
    rows_of = (after.Unsqueeze(value, first) for value in (logits, read.uniform))
    size = vocabulary_size(after, logits)
    following, log_probs = after.call(draw_token, *rows_of, size, *own_rules, *read.rules[3:])
    rows_pass.inputs[:] = [tokens, prompts, numbers, lengths, sources, mask, stream, *drawing, *cache]
    append_draw(rows_pass, after, following, log_probs)
    return rows_pass


def append_draw(rows_pass: ir.Graph, b: Builder, tokens: ir.Value, log_probs: ir.Value) -> None:
    """Append a draw, collected in `b`, to a pass of rows, and return its tokens and log-probabilities (1, M) there."""
    first = b.ints(0)
    drawn = [
        name_value(b.Squeeze(tokens, first), "next_tokens", INT, ["rows"]),
        name_value(b.Squeeze(log_probs, first), "log_probs", FLOAT, ["rows"]),
    ]
    b.extend(rows_pass)
    scores, *others = rows_pass.outputs
    rows_pass.outputs[:] = [scores, *drawn, *others]


def _read_rows(
    b: Builder,
    tokens: ir.Value,
    rows: tuple[ir.Value, ir.Value, ir.Value],
    sources: ir.Value,
    mask: ir.Value,
    stream: ir.Value,
    drawing: list[ir.Value],
    cache: ir.Value,
) -> _RowsRead:
    """Read the inputs of `decode`: `rows` are prompts, lengths and numbers, and `cache` is any of theirs."""
    # Sizes are those of inputs that the device needs anyway.
    batch, count = b.Shape(mask, start=0, end=1), b.Shape(tokens)
    prompts, lengths, numbers = (on_host(b, value, b.Sub(batch, batch)) for value in rows)
    slots = host_range(b, batch)
    longest = b.ReduceMax(lengths, keepdims=0)
    owned, width, back = _places(b, prompts, slots)
    # Token 0 was drawn after the prompt pass, so with T tokens in a row's cache, token T + 1 is drawn here.
    drawn = b.Add(lengths, b.int(1))
    uniform = b.call(random_uniform, b.Gather(stream, prompts, axis=0), drawn, numbers)
    rules = draw_options(b, drawing, b.Mul(slots, b.int(0)))
    changes, start = _changes(b, cache, sources, count, longest)
    ints = [*((value, count) for value in (prompts, lengths, back, sources)), (rules.top_k, batch)]
    flat = b.Reshape(owned, b.ints(-1)), b.Mul(batch, count)
    floats = [(uniform, count), (rules.heat, batch), (rules.share, batch), flat]
    prompts, lengths, back, sources, top_k = to_device(b, 0, ints)
    uniform, heat, share, owned = to_device(b, 0, floats)
    # `TopK` takes the first of equal values, so the rows of a prompt keep their order.
    _, places = b.TopK(b.Reshape(owned, b.Concat(batch, count, axis=0)), width, axis=1, _outputs=2)
    ages = b.Range(longest, b.int(-1), b.int(-1))
    rules = rules._replace(heat=heat, top_k=top_k, share=share)
    return _RowsRead(prompts, lengths, ages, places, back, sources, changes, start, uniform, rules)


def _places(b: Builder, prompts: ir.Value, slots: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Which rows each prompt has (B, M) float32, the most that one has [W], and where each is in (B, W): (M)."""
    owned = b.Cast(b.Equal(b.Unsqueeze(slots, b.ints(1)), prompts), to=FLOAT)
    width = b.Cast(b.ReduceMax(b.ReduceSum(owned, b.ints(1), keepdims=0), b.ints(0), keepdims=1), to=INT)
    place = b.ReduceSum(b.Mul(owned, b.CumSum(owned, b.int(1), exclusive=1)), b.ints(0), keepdims=0)
    return owned, width, b.Add(b.Mul(prompts, width), b.Cast(place, to=INT))


def _changes(
    b: Builder, cache: ir.Value, sources: ir.Value, count: ir.Value, longest: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """`changes` and `start` of `_RowsRead`."""
    kept, size = b.Shape(cache, start=0, end=1), b.Shape(cache, start=2, end=3)
    start = b.Sub(size, b.Unsqueeze(longest, b.ints(0)))
    moved = b.ReduceMax(b.Cast(b.Not(b.Equal(sources, host_range(b, count))), to=INT), b.ints(0), keepdims=0)
    other = b.Add(b.Abs(b.Sub(kept, count)), start)
    return b.Greater(b.Add(moved, b.Squeeze(other, b.ints(0))), b.int(0)), start


def _continue(b: Builder, rows_pass: ir.Graph, own: list[ir.Value], read: _RowsRead) -> None:
    """Let each row of the pass continue the row `sources` of its inputs, from its last tokens.

    The nodes collected in `b`, which must not depend on the pass, are put in front. Each of two branches copies a cache
    once, and only one of them gathers rows; there is one `If` for the keys and the values of a layer, because a runtime
    starts each `If` anew.
    """
    appends, nodes = list[ir.Node](), [*b.nodes]
    for node in list(rows_pass):
        rows_pass.remove(node)
        if node.op_type == "Concat" and node.inputs[0] in own:
            appends.append(node)
            # Keys, then values: nothing reads the one before the other is there.
            if len(appends) == 2:
                nodes.append(_joined(appends, read))
                appends = []
            continue
        # The sizes of the caches that come in are not those that the pass works with.
        assert not any(value in own for value in node.inputs), node
        nodes.append(node)
    for value in b.initializers:
        rows_pass.register_initializer(value)
    rows_pass.extend(nodes)


def _joined(nodes: list[ir.Node], read: _RowsRead) -> ir.Node:
    """Turn `Concat(cache, new)`s into an `If`, which gathers rows and cuts off what no row needs if that changes."""
    branches = {}
    for name in ("then_branch", "else_branch"):
        b, outputs = Builder(f"{nodes[0].name}/{name}"), []
        for node in nodes:
            cache, new = node.inputs
            if name == "then_branch":
                cache = b.Slice(b.Gather(cache, read.sources, axis=0), read.start, b.ints(2**62), b.ints(2))
                # Of rows that have read nothing, zeros: what is masked counts, too, if it is NaN.
                begun = b.Unsqueeze(b.Greater(read.lengths, b.int(0)), b.ints(1, 2, 3))
                cache = b.Where(begun, cache, b.float(0.0))
            outputs.append(b.Concat(cache, new, axis=2))
            outputs[-1].dtype = FLOAT
        branches[name] = ir.Graph([], outputs, nodes=b.nodes, initializers=b.initializers, name=b.name)
    chosen = ir.node("If", [read.changes], branches, num_outputs=len(nodes))
    for node, output in zip(nodes, chosen.outputs, strict=True):
        old = node.outputs[0]
        name, shape = str(old.name), old.shape
        assert shape is not None
        old.replace_all_uses_with(output, replace_graph_outputs=True)
        old.name = f"{name}/appended"
        name_value(output, name, FLOAT, [*shape])
    return chosen

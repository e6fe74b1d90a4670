"""The `generate` graph: prompt pass, a loop that samples and scores a token of every candidate, and selection.

The loop reads the prompts' keys and values from the outer scope, so they are never copied or repeated. A candidate that
has ended or been pruned leaves the loop's rows at the next token and costs nothing more. There is a single loop because
ONNX Runtime packs weights for a loop's body, but not for a loop nested in another, which makes that half as fast.

Every option is one value for all prompts or one for each. All prompts have rows for as many candidates as any of them
has; those that a prompt does not have never run.

Shapes: N candidates, n of them running, B prompts, T tokens so far; the others as in `layers.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from bonnx.models.config import NetworkConfig

from .builder import Builder, name_value
from .host import (
    host_range,
    host_zero,
    host_zeros,
    on_host,
    on_host_inside,
    replaceable,
    to_device_as_floats,
)
from .loop_state import (
    BOOL,
    FLOAT,
    INT,
    ROWS,
    TABLE,
    LoopInputs,
    Options,
    RunningRows,
    Tables,
    cache_values,
    row_values,
    table_values,
)
from .loop_weights import localize_integer_weights
from .prompt_options import draw_options, host_options, option, per_prompt, stop_tokens
from .sampling import DrawRules, draw_token, prompt_hash, prompt_stream, random_uniform, vocabulary_size
from .selection import aggregate
from .vote import best_of_n

__all__ = ["generate_graph"]

RESULTS: dict[str, list[str]] = {
    "sequences": TABLE,
    "lengths": TABLE[:2],
    "scores": TABLE,
    "log_probs": TABLE,
    "finish_reasons": TABLE[:2],
    "candidate_scores": TABLE[:2],
    "best_index": ["batch"],
    "best_sequence": ["batch", "length"],
    "computed_tokens": [],
}


def generate_graph(prompt_pass: ir.Graph, token_pass: ir.Graph, config: NetworkConfig, pad_token: int) -> ir.Graph:
    """Combine the traced passes of `generate_passes.py`, which are consumed, into one graph, ready for `finish`."""
    stops = ir.val("stop_tokens", INT, ["stops"])
    inputs = LoopInputs(*(stops if name == "stop_tokens" else option(name) for name in LoopInputs._fields))
    ids, mask, *past = prompt_pass.inputs
    # Here the tokens are all of each prompt.
    name_value(ids, "input_ids", INT, ["batch", "prompt_length"])
    logits, *cache = prompt_pass.outputs
    certainty = None if config.has_scorer else cache.pop(0)
    b = Builder("generate")
    for part in (prompt_pass, token_pass):
        b.hoist(part)
    (parameter,) = replaceable(ids)
    host = _host_part(b, inputs, ids, mask)
    parameter.replace_all_uses_with(host.input_ids)
    batch, rules = host.batch, host.rules
    # Nothing of the prompts has been read before.
    nothing = {
        size: b.Expand(b.float(0), b.Concat(batch, b.ints(config.num_kv_heads, *size), axis=0))
        for size in ((config.size_of_head + 2, 1), (1, config.size_of_head))
    }
    for value in past:
        key = str(value.name).startswith("past_key")
        value.replace_all_uses_with(nothing[(config.size_of_head + 2, 1) if key else (1, config.size_of_head)])
    b.adopt(prompt_pass)
    options, count = host.options, host.candidates
    grid = b.Concat(count, batch, axis=0)
    places = b.Range(b.int(0), b.Squeeze(count, b.ints(0)), b.int(1))
    numbers = b.Expand(b.Unsqueeze(places, b.ints(1)), grid)
    exists = b.Less(numbers, options.num_candidates)
    wide = b.Expand(logits, b.Concat(count, b.Shape(logits), axis=0))
    vocabulary = vocabulary_size(b, logits)
    tokens, log_probs = b.call(draw_token, wide, host.uniform, vocabulary, *rules)
    no = b.Expand(b.constant(np.array(False)), grid)
    no_tokens = b.Concat(grid, b.ints(0), axis=0)
    no_ids, no_values = (b.Expand(zero, no_tokens) for zero in (b.int(0), b.float(0)))
    head = b.ints(config.num_kv_heads, 0, config.size_of_head)
    empty_cache = b.Expand(b.float(0), b.Concat(grid, head, axis=0))
    running = b.And(exists, b.Greater(options.max_new_tokens, b.int(0)))
    rows = RunningRows(tokens, log_probs, running, numbers)
    tables = Tables(no_ids, no_values, no_values, b.Expand(b.int(0), grid), exists, no, b.int(0))
    carried = [*rows, *tables, *[empty_cache] * (2 * config.num_layers)]
    body = _body(host, vocabulary, token_pass, mask, cache, config, pad_token, certainty)
    localize_integer_weights(body)
    outputs = b.loop(host.most_tokens, host.any_tokens, carried, body)
    tables = _own_scores(b, Tables(*outputs[len(rows) :][: len(tables)]), certainty)
    results = _results(b, options, tables, exists)
    for name, value in results.items():
        name_value(value, name, FLOAT if name in ("scores", "log_probs", "candidate_scores") else INT, RESULTS[name])
    return ir.Graph(
        [ids, mask, *inputs], list(results.values()), nodes=b.nodes, initializers=b.initializers, name="generate"
    )


class _HostPart(NamedTuple):
    """What the host computes before the prompt pass, and what it has copied to the device: see `host.py`."""

    input_ids: ir.Value
    """(B, P) int64 on the device."""
    batch: ir.Value
    """[B]."""
    candidates: ir.Value
    """[N]."""
    options: Options
    rules: DrawRules
    """The first three (B, 1) on the device, the others on the host."""
    uniform: ir.Value
    """(N, B) float32 on the device: for the first token."""
    stream: ir.Value
    """(B) int64 on the host."""
    numbers: ir.Value
    """(N, 1) int64 on the host."""
    most_tokens: ir.Value
    """int64 scalar on the host: the most new tokens of any prompt."""
    any_tokens: ir.Value
    """bool scalar on the host: whether there is any candidate that may have a token."""


def _host_part(b: Builder, inputs: LoopInputs, ids: ir.Value, mask: ir.Value) -> _HostPart:
    """Read the options and make the random numbers of the first token."""
    zero = host_zero(b, mask)
    host_ids, host_mask = on_host(b, ids, zero), on_host(b, mask, zero)
    batch = b.Shape(host_ids, start=0, end=1)
    zeros = host_zeros(b, batch)
    values = (inputs.num_candidates, inputs.max_new_tokens, inputs.prune_every, inputs.seed)
    counts, limits, every, seed = host_options(b, values, zeros)
    # No sequence is as long.
    limits = b.Min(limits, b.int(2**24))
    count = b.ReduceMax(counts, b.ints(0), keepdims=1)
    numbers = b.Unsqueeze(host_range(b, count), b.ints(1))
    hashed = b.call(prompt_hash, host_ids, host_mask, b.int(0))
    stream = b.call(prompt_stream, hashed, seed)
    uniform = b.call(random_uniform, stream, b.int(0), numbers)
    rules = draw_options(b, (inputs.temperature, inputs.top_k, inputs.top_p), zeros)
    stops, most_stops = stop_tokens(b, inputs.stop_tokens, batch, zero)
    one = b.ints(1)
    heat, top_k, share, *columns = (b.Unsqueeze(value, one) for value in (*rules[:3], counts, limits))
    wide = [(value, b.Shape(value, start=1, end=2)) for value in (host_ids, stops)]
    ints = [*wide, *((value, one) for value in (top_k, *columns))]
    floats = [(b.Transpose(uniform, perm=[1, 0]), count), (heat, one), (share, one)]
    ids_read, stops, top_k, *columns, uniform, heat, share = to_device_as_floats(b, 1, ints, floats)
    # Sorted, the tokens come before the rest.
    stops, _ = b.TopK(stops, most_stops, axis=1, _outputs=2)
    num_candidates, max_new_tokens = (b.Squeeze(value, one) for value in columns)
    options = Options(
        num_candidates=num_candidates,
        max_new_tokens=max_new_tokens,
        stop_tokens=stops,
        aggregation=b.Unsqueeze(per_prompt(b, inputs.aggregation, batch), one),
        step_token=b.Unsqueeze(per_prompt(b, inputs.step_token, batch), one),
        prune_every=b.Where(b.Greater(every, b.int(0)), every, b.int(np.iinfo(np.int64).max)),
        prune_keep=per_prompt(b, inputs.prune_keep, batch),
    )
    any_tokens = b.Greater(b.ReduceMax(b.Min(counts, limits), keepdims=0), b.int(0))
    return _HostPart(
        input_ids=ids_read,
        batch=batch,
        candidates=count,
        options=options,
        rules=DrawRules(heat, top_k, share, *rules[3:]),
        uniform=b.Transpose(uniform, perm=[1, 0]),
        stream=stream,
        numbers=numbers,
        most_tokens=b.ReduceMax(limits, keepdims=0),
        any_tokens=any_tokens,
    )


def _body(
    host: _HostPart,
    vocabulary: ir.Value,
    token_pass: ir.Graph,
    mask: ir.Value,
    prompt_cache: list[ir.Value],
    config: NetworkConfig,
    pad_token: int,
    certainty: ir.Value | None,
) -> ir.Graph:
    """Build the loop's body: process and score each running candidate's token, draw the next one, and prune."""
    b = Builder("token")
    iteration, go = ir.val("iteration", INT, []), ir.val("iteration/go", BOOL, [])
    rows, tables, candidate_cache = row_values(), table_values(), cache_values(config)
    carried = [iteration, go, *rows, *tables, *candidate_cache]

    options = host.options
    compacted, fewer, index = _compact(b, rows)
    caches = prompt_cache, candidate_cache
    scores, logits, *grown = _network(b, token_pass, compacted.tokens, mask, *caches, (fewer, index))
    tokens, log_probs, running, numbers = compacted
    size = b.Size(tokens)
    zero = b.Sub(size, size)
    done = b.Add(iteration, b.Add(zero, b.int(1)))
    # For all candidates, because the host does not know which are running.
    stream, all_numbers = (on_host_inside(b, value, zero) for value in (host.stream, host.numbers))
    uniform = b.GatherElements(b.call(random_uniform, stream, done, all_numbers), numbers, axis=0)
    drawn, drawn_log_probs = b.call(draw_token, logits, uniform, vocabulary, *host.rules)
    if certainty is None:
        # A token whose logits defined no distribution makes its score NaN, so that the candidate cannot win.
        scores = b.Where(b.IsNaN(log_probs), b.float(np.nan), scores)
    pad = b.int(pad_token)
    lengths = b.ScatterElements(tables.lengths, numbers, b.Cast(running, to=INT), axis=0, reduction="add")
    written = (b.Where(running, tokens, pad), *(b.Where(running, x, b.float(0)) for x in (scores, log_probs)))
    fills = (pad, b.float(0), b.float(0))
    grown_tables = [
        _append(b, table, new, numbers, fill) for table, new, fill in zip(tables[:3], written, fills, strict=True)
    ]
    computed = b.Add(tables.computed, b.Squeeze(_device_scalar(b, size), b.ints(0)))
    sequences, all_scores, all_log_probs = grown_tables
    tables = Tables(sequences, all_scores, all_log_probs, lengths, tables.kept, tables.pruned, computed)
    running = b.And(running, b.Not(_stops(b, options.stop_tokens, tokens)))
    due = b.Equal(b.Mod(done, on_host_inside(b, options.prune_every, zero)), b.int(0))
    kept = _prune(b, options, due, _own_scores(b, tables, certainty))
    stays = b.Greater(b.GatherElements(b.Cast(kept, to=INT), numbers, axis=0), b.int(0))
    nobody = b.Expand(b.int(0), b.Shape(kept))
    dropped = b.ScatterElements(nobody, numbers, b.Cast(b.And(running, b.Not(stays)), to=INT), axis=0)
    pruned = b.Or(tables.pruned, b.Greater(dropped, b.int(0)))
    running = b.And(b.And(running, stays), b.Less(_device_scalar(b, done), options.max_new_tokens))
    tables = tables._replace(kept=kept, pruned=pruned)
    rows = RunningRows(b.Where(running, drawn, pad), drawn_log_probs, running, b.Identity(numbers))
    return b.body(carried, [_any(b, running), *rows, *tables, *grown])


def _compact(b: Builder, rows: RunningRows) -> tuple[RunningRows, ir.Value, ir.Value]:
    """Keep only as many rows as the prompt with the most running candidates needs, in their order.

    Also returns whether there are fewer rows than before, and their indices into the flattened (n, B).
    """
    running, batch = b.Cast(rows.running, to=FLOAT), b.Shape(rows.tokens, start=1)
    count = b.Shape(rows.tokens, start=0, end=1)
    most = b.ReduceMax(b.ReduceSum(running, b.ints(0), keepdims=1), b.ints(0, 1), keepdims=0)
    fewer = b.Less(b.Cast(most, to=INT), _device_scalar(b, b.Squeeze(count, b.ints(0))))
    # `TopK` takes the first of equal values, so without a change every row keeps its place.
    _, index = b.TopK(
        b.Where(fewer, running, b.float(1)), b.Reshape(b.Cast(most, to=INT), b.ints(1)), axis=0, _outputs=2
    )
    tokens, log_probs, numbers = (
        b.GatherElements(value, index, axis=0) for value in (rows.tokens, rows.log_probs, rows.numbers)
    )
    runs = b.Greater(b.GatherElements(running, index, axis=0), b.float(0))
    # Not by arithmetic on sizes: on CUDA, ONNX Runtime would copy each size to the device.
    places = b.Range(b.int(0), b.Squeeze(b.Mul(count, batch), b.ints(0)), b.int(1))
    flat = b.GatherElements(b.Reshape(places, b.Concat(count, batch, axis=0)), index, axis=0)
    return RunningRows(tokens, log_probs, runs, numbers), fewer, flat


def _network(
    b: Builder,
    token_pass: ir.Graph,
    tokens: ir.Value,
    mask: ir.Value,
    prompt_cache: list[ir.Value],
    candidate_cache: list[ir.Value],
    kept_rows: tuple[ir.Value, ir.Value],
) -> list[ir.Value]:
    """Insert the traced pass, made to gather the remaining rows of the candidates' cache where it appends to it."""
    pairs = range(0, len(candidate_cache), 2)
    cache = [x for i in pairs for x in (*prompt_cache[i : i + 2], *candidate_cache[i : i + 2])]
    for parameter, value in zip(list(token_pass.inputs), (tokens, mask, *cache), strict=True):
        parameter.replace_all_uses_with(value)
    outputs = list(token_pass.outputs)
    b.adopt(token_pass)
    appends, nodes = list[ir.Node](), list[ir.Node]()
    for node in b.nodes:
        reads_cache = node.op_type in ("Concat", "Shape") and node.inputs[0] in candidate_cache
        if reads_cache and node.op_type == "Concat":
            appends.append(node)
            # Keys, then values: nothing reads the one before the other is there.
            if len(appends) == 2:
                nodes.append(_joined(appends, kept_rows))
                for append, value in zip(appends, nodes[-1].outputs, strict=True):
                    outputs[outputs.index(append.outputs[0])] = value
                appends = []
            continue
        if reads_cache and node.attributes["end"].as_int() <= len(ROWS):
            # The traced graph may read the number of rows from the cache, which still holds the dropped ones.
            node.replace_input_with(0, tokens)
        nodes.append(node)
    b.nodes = nodes
    return outputs


def _joined(nodes: list[ir.Node], kept_rows: tuple[ir.Value, ir.Value]) -> ir.Node:
    """Turn `Concat(cache, new)`s into an `If`: each branch copies a cache once, and only one of them gathers rows.

    One for the keys and the values of a layer, because a runtime starts each `If` anew.
    """
    fewer, index = kept_rows
    branches = {}
    for name in ("then_branch", "else_branch"):
        b, outputs = Builder(f"{nodes[0].name}/{name}"), []
        for node in nodes:
            source, new = node.inputs
            assert source is not None
            assert new is not None
            if name == "then_branch":
                count = b.Mul(b.Shape(source, start=0, end=1), b.Shape(source, start=1, end=2))
                # Before the first token the caches are empty, so that -1 would not stand for this number.
                rows = b.Reshape(source, b.Concat(count, b.Shape(source, start=2), axis=0), allowzero=1)
                source = b.Gather(rows, index, axis=0)
            outputs.append(b.Concat(source, new, axis=node.attributes["axis"].as_int()))
            outputs[-1].dtype = FLOAT
        branches[name] = ir.Graph([], outputs, nodes=b.nodes, initializers=b.initializers, name=b.name)
    chosen = ir.node("If", [fewer], branches, num_outputs=len(nodes))
    for node, output in zip(nodes, chosen.outputs, strict=True):
        node.outputs[0].replace_all_uses_with(output)
    return chosen


def _append(b: Builder, table: ir.Value, new: ir.Value, numbers: ir.Value, fill: ir.Value) -> ir.Value:
    """Append one iteration's entries (n, B) to a table (N, B, T)."""
    blank = b.Expand(fill, b.Shape(table, start=0, end=2))
    entries = b.ScatterElements(blank, numbers, new, axis=0)
    joined: ir.Value = b.Concat(table, b.Unsqueeze(entries, b.ints(2)), axis=2)
    return joined


def _device_scalar(b: Builder, number: ir.Value) -> ir.Value:
    """Return [n] on the device, of an int64 scalar on the host, without a copy."""
    only: ir.Value = b.Range(number, b.Add(number, b.int(1)), b.int(1))
    return only


def _prune(b: Builder, options: Options, due: ir.Value, tables: Tables) -> ir.Value:
    """Speculative rejection (Sun et al., 2024) by the running score: which (N, B) survive, ended ones included.

    `due` (B) are the prompts whose candidates are dropped now.
    """
    then, otherwise = Builder("prune"), Builder("keep")
    branches = {}
    for builder, kept in ((then, _keep_best(then, options, due, tables)), (otherwise, otherwise.Identity(tables.kept))):
        kept.dtype = BOOL
        branches[builder] = ir.Graph(
            [], [kept], nodes=builder.nodes, initializers=builder.initializers, name=builder.name
        )
    chosen: ir.Value = b.If(_any(b, due), then_branch=branches[then], else_branch=branches[otherwise])
    return chosen


def _keep_best(b: Builder, options: Options, due: ir.Value, tables: Tables) -> ir.Value:
    """(N, B) bool: the best fraction `prune_keep` of the surviving candidates, rounded up, of the prompts `due` (B)."""
    scores = _aggregate(b, options, tables, _mask(b, tables))
    low = b.float(-np.inf)
    scores = b.Where(b.And(tables.kept, b.Not(b.IsNaN(scores))), scores, low)
    _, order = b.TopK(scores, b.Shape(scores, start=0, end=1), axis=0, _outputs=2)
    count = b.Squeeze(b.Shape(scores, start=0, end=1), b.ints(0))
    ranks = b.Unsqueeze(b.Range(b.int(0), count, b.int(1)), b.ints(1))
    place = b.ScatterElements(order, order, b.Expand(ranks, b.Shape(scores)), axis=0)
    surviving = b.ReduceSum(b.Cast(tables.kept, to=FLOAT), b.ints(0), keepdims=1)
    # Rounding may put a product that should be whole slightly above it.
    limit = b.Ceil(b.Sub(b.Mul(surviving, options.prune_keep), b.float(1e-4)))
    best = b.Less(place, b.Max(b.Cast(limit, to=INT), b.int(1)))
    kept: ir.Value = b.And(tables.kept, b.Or(b.Not(due), best))
    return kept


def _own_scores(b: Builder, tables: Tables, certainty: ir.Value | None) -> Tables:
    """Without a scorer, the pass that reads a token gives the certainty of the next one: move each to its own token."""
    if certainty is None:
        return tables
    column = b.Concat(b.Shape(tables.lengths), b.ints(1), axis=0)
    first = b.Expand(b.Unsqueeze(certainty, b.ints(0, 2)), column)
    moved = b.Slice(b.Concat(first, tables.scores, axis=2), b.ints(0), b.Shape(tables.scores, start=2), b.ints(2))
    return tables._replace(scores=moved)


def _mask(b: Builder, tables: Tables) -> ir.Value:
    """(N, B, T) int64, 1 where a token was written."""
    places = b.Range(b.int(0), b.Squeeze(b.Shape(tables.sequences, start=2), b.ints(0)), b.int(1))
    mask: ir.Value = b.Cast(b.Less(places, b.Unsqueeze(tables.lengths, b.ints(2))), to=INT)
    return mask


def _aggregate(b: Builder, options: Options, tables: Tables, mask: ir.Value) -> ir.Value:
    """Aggregate the tables' scores to candidate scores (N, B)."""
    at_step = b.Or(b.Equal(tables.sequences, options.step_token), b.Less(options.step_token, b.int(0)))
    scores: ir.Value = b.call(aggregate, tables.scores, mask, b.Cast(at_step, to=INT), options.aggregation)
    return scores


def _stops(b: Builder, stop_tokens: ir.Value, tokens: ir.Value) -> ir.Value:
    """Whether each token (...) ends its candidate; its last axes and those of `stop_tokens`, but for S, broadcast."""
    equal = b.Cast(b.Equal(b.Unsqueeze(tokens, b.ints(-1)), stop_tokens), to=FLOAT)
    is_stop: ir.Value = b.Greater(b.ReduceMax(equal, b.ints(-1), keepdims=0), b.float(0))
    return is_stop


def _results(b: Builder, options: Options, tables: Tables, exists: ir.Value) -> dict[str, ir.Value]:
    """Compute the graph's outputs; `exists` (N, B) bool says which candidates the prompts have."""
    mask = _mask(b, tables)
    stops = b.Unsqueeze(options.stop_tokens, b.ints(1))
    ended = b.Mul(b.Cast(_stops(b, stops, tables.sequences), to=INT), mask)
    # Indices into `FINISH_REASONS`.
    reasons = b.Where(tables.pruned, b.int(2), b.Max(b.ReduceMax(ended, b.ints(2), keepdims=0), b.int(0)))
    reasons = b.Where(exists, reasons, b.int(-1))
    selectable = b.Mul(mask, b.Cast(b.Not(b.Unsqueeze(tables.pruned, b.ints(2))), to=INT))
    candidate_scores = _aggregate(b, options, tables, selectable)
    best = b.call(best_of_n, candidate_scores)
    index = b.Unsqueeze(b.Max(best, b.int(0)), b.ints(0, 2))
    shape = b.Concat(b.ints(1), b.Shape(tables.sequences, start=1), axis=0)
    best_sequence = b.GatherElements(tables.sequences, b.Expand(index, shape), axis=0)
    return {
        "sequences": tables.sequences,
        "lengths": tables.lengths,
        "scores": tables.scores,
        "log_probs": tables.log_probs,
        "finish_reasons": reasons,
        "candidate_scores": candidate_scores,
        "best_index": best,
        "best_sequence": b.Squeeze(best_sequence, b.ints(0)),
        "computed_tokens": tables.computed,
    }


def _any(b: Builder, values: ir.Value) -> ir.Value:
    """Whether any value is true: a bool scalar."""
    any_true: ir.Value = b.Greater(b.ReduceMax(b.Cast(values, to=FLOAT), keepdims=0), b.float(0))
    return any_true

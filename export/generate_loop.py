"""`generate`: prompt pass, a loop that samples and scores one token of every candidate, and the selection, in one graph.

Two loops are nested. The inner one takes steps; the prompts' keys and values are read from the outer scope, so they are
never copied and never repeated. The outer one ends a round: it writes the round's tokens to tables of all candidates,
drops the weakest if pruning was asked for, and goes on with the candidates that still run, so that one which has ended
costs nothing from the next round on.

Shapes: N candidates, n of them running, B prompts, T tokens so far, S steps of a round; the others as in `layers.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ..models.config import NetworkConfig
from .builder import Builder
from .sampling import draw_token, prompt_key, random_uniform
from .selection import select

__all__ = ["generate_graph"]

# Steps of a round without pruning: often enough to leave ended candidates behind, seldom enough to cost nothing.
ROUND = 32
INT, FLOAT, BOOL = ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.BOOL
RESULTS: dict[str, list[str]] = {
    "sequences": ["num_candidates", "batch", "length"],
    "lengths": ["num_candidates", "batch"],
    "scores": ["num_candidates", "batch", "length"],
    "log_probs": ["num_candidates", "batch", "length"],
    "finish_reasons": ["num_candidates", "batch"],
    "candidate_scores": ["num_candidates", "batch"],
    "best_index": ["batch"],
    "best_sequence": ["batch", "length"],
    "computed_tokens": [],
}
ROWS, TABLE = ["running", "batch"], ["num_candidates", "batch", "length"]


class Options(NamedTuple):
    """What steers generation, all graph inputs: scalars, and the list of stop tokens."""

    num_candidates: ir.Value
    max_new_tokens: ir.Value
    temperature: ir.Value
    top_k: ir.Value
    top_p: ir.Value
    seed: ir.Value
    stop_tokens: ir.Value
    aggregation: ir.Value
    step_token: ir.Value
    prune_every: ir.Value
    prune_keep: ir.Value


class Fixed(NamedTuple):
    """What both loops read from the outer scope."""

    options: Options
    step: ir.Graph
    mask: ir.Value
    """(B, P) int64."""
    key: ir.Value
    """(B) uint32."""
    prompt_cache: list[ir.Value]
    config: NetworkConfig
    pad_token: int


class Rows(NamedTuple):
    """Of the candidates that still run, each (n, B)."""

    tokens: ir.Value
    """int64: drawn, not yet read by the network."""
    log_probs: ir.Value
    running: ir.Value
    """bool: False for a row that only fills up the rectangle."""
    numbers: ir.Value
    """int64: which candidate this is, 0..N-1."""


class Tables(NamedTuple):
    """Of all candidates."""

    sequences: ir.Value
    """(N, B, T) int64."""
    scores: ir.Value
    """(N, B, T) float32."""
    log_probs: ir.Value
    """(N, B, T) float32."""
    mask: ir.Value
    """(N, B, T) int64."""
    kept: ir.Value
    """(N, B) bool: not fallen behind at any pruning."""
    pruned: ir.Value
    """(N, B) bool: stopped for that before its end."""
    computed: ir.Value
    """int64 scalar: tokens that the network has read, without the prompts'."""


def generate_graph(prompt: ir.Graph, step: ir.Graph, config: NetworkConfig, pad_token: int) -> ir.Graph:
    """Join the traced passes of `generate_graph.py`, which are used up, into one graph that is yet to be finished."""
    kinds: dict[str, tuple[ir.DataType, list[str]]] = {name: (INT, []) for name in Options._fields}
    kinds |= {name: (FLOAT, []) for name in ("temperature", "top_p", "prune_keep")}
    kinds["stop_tokens"] = (INT, ["stops"])
    given = Options(*(ir.val(name, dtype, shape) for name, (dtype, shape) in kinds.items()))
    ids, mask = prompt.inputs
    logits, *cache = prompt.outputs
    b = Builder("generate")
    for part in (prompt, step):
        b.hoist(part)
    b.adopt(prompt)
    count = b.Unsqueeze(given.num_candidates, b.ints(0))
    grid = b.Concat(count, b.Shape(ids, start=0, end=1), axis=0)
    numbers = b.Expand(b.Unsqueeze(b.Range(b.int(0), given.num_candidates, b.int(1)), b.ints(1)), grid)
    key = b.call(prompt_key, ids, mask, given.seed)
    uniform = b.call(random_uniform, key, b.int(0), numbers)
    wide = b.Expand(logits, b.Concat(count, b.Shape(logits), axis=0))
    tokens, log_probs = b.call(draw_token, wide, uniform, given.temperature, given.top_k, given.top_p)
    no, yes = (b.Expand(b.constant(np.array(value)), grid) for value in (False, True))
    nothing = b.Concat(grid, b.ints(0), axis=0)
    blank_int, blank = (b.Expand(zero, nothing) for zero in (b.int(0), b.float(0)))
    head = b.ints(config.num_kv_heads, 0, config.size_of_head)
    own = b.Expand(b.float(0), b.Concat(grid, head, axis=0))
    fixed = Fixed(given, step, mask, key, cache, config, pad_token)
    rows = Rows(tokens, log_probs, yes, numbers)
    tables = Tables(blank_int, blank, blank, blank_int, yes, no, b.int(0))
    carried = [*rows, *tables, b.int(0), *[own] * (2 * config.num_layers)]
    some = b.Greater(given.max_new_tokens, b.int(0))
    outputs = b.loop(given.max_new_tokens, some, carried, _round(fixed))
    results = _results(b, given, Tables(*outputs[len(rows) :][: len(tables)]))
    for name, value in results.items():
        value.name = name
        value.dtype = FLOAT if name in ("scores", "log_probs", "candidate_scores") else INT
        value.shape = ir.Shape(RESULTS[name])
    return ir.Graph(
        [ids, mask, *given], list(results.values()), nodes=b.nodes, initializers=b.initializers, name="generate"
    )


def _round(fixed: Fixed) -> ir.Graph:
    """The outer loop's body: some steps, then the tables, pruning, and only the running candidates go on."""
    b, given = Builder("round"), fixed.options
    rows, tables, done = _rows("round"), _tables(), ir.val("round/done", INT, [])
    own = _own("round", fixed.config)
    inputs = [ir.val("round", INT, []), ir.val("round/go", BOOL, []), *rows, *tables, done, *own]

    pruning = b.Greater(given.prune_every, b.int(0))
    span = b.Min(b.Where(pruning, given.prune_every, b.int(ROUND)), b.Sub(given.max_new_tokens, done))
    carried = [rows.tokens, rows.log_probs, rows.running, done, *own]
    outputs = b.loop(span, _any(b, rows.running), carried, _step(fixed, rows.numbers))
    tokens, log_probs, running, now = outputs[:4]
    own, written = outputs[4:-4], outputs[-4:]

    fills = (b.int(fixed.pad_token), b.float(0), b.float(0), b.int(0))
    grown = [
        _append(b, table, new, rows.numbers, fill) for table, new, fill in zip(tables[:4], written, fills, strict=True)
    ]
    size = b.ReduceProd(b.Shape(rows.tokens), keepdims=0)
    computed = b.Add(tables.computed, b.Mul(b.Sub(now, done), size))
    kept = _keep_best(b, given, pruning, Tables(*grown, tables.kept, tables.pruned, computed))
    kept_here = b.Greater(b.GatherElements(b.Cast(kept, to=INT), rows.numbers, axis=0), b.int(0))
    nobody = b.Expand(b.int(0), b.Shape(kept))
    dropped = b.ScatterElements(nobody, rows.numbers, b.Cast(b.And(running, b.Not(kept_here)), to=INT), axis=0)
    pruned = b.Or(tables.pruned, b.Greater(dropped, b.int(0)))
    rows, own = _compact(b, Rows(tokens, log_probs, b.And(running, kept_here), rows.numbers), own)
    go = b.And(_any(b, rows.running), b.Less(now, given.max_new_tokens))
    return b.body(inputs, [go, *rows, *grown, kept, pruned, computed, now, *own])


def _step(fixed: Fixed, numbers: ir.Value) -> ir.Graph:
    """The inner loop's body: the network reads each candidate's token, rates it, and the next one is drawn."""
    b, given = Builder("step"), fixed.options
    tokens, log_probs, running, _ = _rows("step")
    done, own = ir.val("step/done", INT, []), _own("step", fixed.config)
    inputs = [ir.val("step", INT, []), ir.val("step/go", BOOL, []), tokens, log_probs, running, done, *own]
    cache = [
        value
        for i in range(fixed.config.num_layers)
        for value in (*fixed.prompt_cache[2 * i : 2 * i + 2], *own[2 * i : 2 * i + 2])
    ]
    for parameter, value in zip(list(fixed.step.inputs), (tokens, fixed.mask, *cache), strict=True):
        parameter.replace_all_uses_with(value)
    scores, logits, *grown = fixed.step.outputs
    b.adopt(fixed.step)
    now = b.Add(done, b.int(1))
    uniform = b.call(random_uniform, fixed.key, now, numbers)
    drawn, drawn_log_probs = b.call(draw_token, logits, uniform, given.temperature, given.top_k, given.top_p)
    pad = b.int(fixed.pad_token)
    go_on = b.And(running, b.Not(_stops(b, given, tokens)))
    written = [
        b.Where(running, tokens, pad),
        b.Where(running, scores, b.float(0)),
        b.Where(running, log_probs, b.float(0)),
        b.Cast(running, to=INT),
    ]
    for value in written:
        value.dtype = INT
    written[1].dtype = written[2].dtype = FLOAT
    outputs = [_any(b, go_on), b.Where(go_on, drawn, pad), drawn_log_probs, go_on, now, *grown]
    return b.body(inputs, outputs, written)


def _stops(b: Builder, given: Options, tokens: ir.Value) -> ir.Value:
    """Whether each token (...) ends its candidate."""
    # -1 is no token: the list is never empty.
    stops = b.Concat(given.stop_tokens, b.ints(-1), axis=0)
    equal = b.Cast(b.Equal(b.Unsqueeze(tokens, b.ints(-1)), stops), to=FLOAT)
    return b.Greater(b.ReduceMax(equal, b.ints(-1), keepdims=0), b.float(0))


def _append(b: Builder, table: ir.Value, new: ir.Value, numbers: ir.Value, fill: ir.Value) -> ir.Value:
    """A round's entries (S, n, B) to the end of a table (N, B, T)."""
    new = b.Transpose(new, perm=[1, 2, 0])
    steps = b.Shape(new, start=2)
    blank = b.Expand(fill, b.Concat(b.Shape(table, start=0, end=2), steps, axis=0))
    place = b.Expand(b.Unsqueeze(numbers, b.ints(2)), b.Shape(new))
    return b.Concat(table, b.ScatterElements(blank, place, new, axis=0), axis=2)


def _keep_best(b: Builder, given: Options, pruning: ir.Value, tables: Tables) -> ir.Value:
    """Which candidates (N, B) stay in the race: with pruning the best by the score so far, ended ones included.

    Speculative rejection (Sun et al., 2024), with the scorer's own running score.
    """
    found, _ = _select(b, given, tables, tables.mask)
    low = b.float(-np.inf)
    found = b.Where(b.And(tables.kept, b.Not(b.IsNaN(found))), found, low)
    size = b.Shape(found, start=0, end=1)
    _, order = b.TopK(found, size, axis=0, _outputs=2)
    ranks = b.Expand(
        b.Unsqueeze(b.Range(b.int(0), given.num_candidates, b.int(1)), b.ints(1)), b.Shape(found)
    )
    place = b.ScatterElements(b.Expand(b.int(0), b.Shape(found)), order, ranks, axis=0)
    in_race = b.ReduceSum(b.Cast(tables.kept, to=FLOAT), b.ints(0), keepdims=1)
    # The fraction of a whole number may come out a little above it.
    limit = b.Ceil(b.Sub(b.Mul(in_race, given.prune_keep), b.float(1e-4)))
    limit = b.Max(b.Cast(limit, to=INT), b.int(1))
    return b.And(tables.kept, b.Or(b.Not(pruning), b.Less(place, limit)))


def _select(b: Builder, given: Options, tables: Tables, mask: ir.Value) -> list[ir.Value]:
    """Candidate scores (N, B) and best index (B) of the tables."""
    at_step = b.Or(b.Equal(tables.sequences, given.step_token), b.Less(given.step_token, b.int(0)))
    chosen: list[ir.Value] = b.call(select, tables.scores, mask, b.Cast(at_step, to=INT), given.aggregation)
    return chosen


def _compact(b: Builder, rows: Rows, own: list[ir.Value]) -> tuple[Rows, list[ir.Value]]:
    """Only as many rows as the prompt with the most running candidates needs; their order stays."""
    running = b.Cast(rows.running, to=FLOAT)
    most = b.ReduceMax(b.ReduceSum(running, b.ints(0), keepdims=0), keepdims=0)
    count = b.Unsqueeze(b.Max(b.Cast(most, to=INT), b.int(1)), b.ints(0))
    _, index = b.TopK(running, count, axis=0, _outputs=2)
    tokens, log_probs, numbers = (
        b.GatherElements(value, index, axis=0) for value in (rows.tokens, rows.log_probs, rows.numbers)
    )
    runs = b.Greater(b.GatherElements(running, index, axis=0), b.float(0))
    batch = b.Shape(rows.tokens, start=1)
    columns = b.Range(b.int(0), b.Squeeze(batch, b.ints(0)), b.int(1))
    flat = b.Reshape(b.Add(b.Mul(index, batch), columns), b.ints(-1))
    moved = []
    for value in own:
        joined = b.Reshape(value, b.Concat(b.ints(-1), b.Shape(value, start=2), axis=0))
        shape = b.Concat(b.Shape(index), b.Shape(value, start=2), axis=0)
        moved.append(b.Reshape(b.Gather(joined, flat, axis=0), shape))
    return Rows(tokens, log_probs, runs, numbers), moved


def _results(b: Builder, given: Options, tables: Tables) -> dict[str, ir.Value]:
    """The graph's outputs."""
    ended = _stops(b, given, tables.sequences)
    ended = b.ReduceMax(b.Mul(b.Cast(ended, to=INT), tables.mask), b.ints(2), keepdims=0)
    # The order of `FINISH_REASONS`.
    reasons = b.Where(tables.pruned, b.int(2), ended)
    whole = b.Mul(tables.mask, b.Cast(b.Not(b.Unsqueeze(tables.pruned, b.ints(2))), to=INT))
    candidate_scores, best = _select(b, given, tables, whole)
    index = b.Unsqueeze(b.Max(best, b.int(0)), b.ints(0, 2))
    shape = b.Concat(b.ints(1), b.Shape(tables.sequences, start=1), axis=0)
    best_sequence = b.GatherElements(tables.sequences, b.Expand(index, shape), axis=0)
    return {
        "sequences": tables.sequences,
        "lengths": b.ReduceSum(tables.mask, b.ints(2), keepdims=0),
        "scores": tables.scores,
        "log_probs": tables.log_probs,
        "finish_reasons": reasons,
        "candidate_scores": candidate_scores,
        "best_index": best,
        "best_sequence": b.Squeeze(best_sequence, b.ints(0)),
        "computed_tokens": tables.computed,
    }


def _any(b: Builder, values: ir.Value) -> ir.Value:
    """Whether any of them is true: a bool scalar."""
    return b.Greater(b.ReduceMax(b.Cast(values, to=FLOAT), keepdims=0), b.float(0))


def _rows(place: str) -> Rows:
    kinds = {"log_probs": FLOAT, "running": BOOL}
    return Rows(*(ir.val(f"{place}/{name}", kinds.get(name, INT), ROWS) for name in Rows._fields))


def _tables() -> Tables:
    kinds = {"scores": FLOAT, "log_probs": FLOAT, "kept": BOOL, "pruned": BOOL}
    shapes: dict[str, list[str]] = {"kept": TABLE[:2], "pruned": TABLE[:2], "computed": []}
    return Tables(
        *(ir.val(f"table/{n}", kinds.get(n, INT), shapes.get(n, TABLE)) for n in Tables._fields)
    )


def _own(place: str, config: NetworkConfig) -> list[ir.Value]:
    """The candidates' keys and values, layer by layer."""
    shape = [*ROWS, config.num_kv_heads, "own_length", config.size_of_head]
    names = (f"{place}/{kind}.{i}" for i in range(config.num_layers) for kind in ("key", "value"))
    return [ir.val(name, FLOAT, shape) for name in names]

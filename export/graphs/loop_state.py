"""What the loop of `generate` carries from token to token, and the inputs that control it.

Shapes: N candidates, n of them running, B prompts, T tokens so far.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from bonnx.models.config import NetworkConfig

__all__ = [
    "BOOL",
    "FLOAT",
    "INT",
    "ROWS",
    "TABLE",
    "LoopInputs",
    "Options",
    "RunningRows",
    "Tables",
    "cache_values",
    "row_values",
    "table_values",
]

INT, FLOAT, BOOL = ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.BOOL
ROWS, TABLE = ["running", "batch"], ["num_candidates", "batch", "length"]


class LoopInputs(NamedTuple):
    """The graph inputs that control generation: one value for all prompts, or (B) values, and the stop tokens."""

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


class Options(NamedTuple):
    """`LoopInputs` as the loop reads them: one value for each prompt."""

    num_candidates: ir.Value
    """(B) int64."""
    max_new_tokens: ir.Value
    """(B) int64."""
    stop_tokens: ir.Value
    """(B, S) int64, negative where a prompt has fewer."""
    aggregation: ir.Value
    """(B, 1) int64."""
    step_token: ir.Value
    """(B, 1) int64, negative to read every position."""
    prune_every: ir.Value
    """(B) int64, above any length for never."""
    prune_keep: ir.Value
    """(B) float32."""


class RunningRows(NamedTuple):
    """State of the candidates that are still running, each (n, B)."""

    tokens: ir.Value
    """int64: tokens drawn but not yet processed by the network."""
    log_probs: ir.Value
    running: ir.Value
    """bool: False for a row that is only padding."""
    numbers: ir.Value
    """int64: the candidate's number, 0..N-1."""


class Tables(NamedTuple):
    """Results of all candidates so far."""

    sequences: ir.Value
    """(N, B, T) int64."""
    scores: ir.Value
    """(N, B, T) float32."""
    log_probs: ir.Value
    """(N, B, T) float32."""
    lengths: ir.Value
    """(N, B) int64."""
    kept: ir.Value
    """(N, B) bool: survived every pruning so far."""
    pruned: ir.Value
    """(N, B) bool: stopped by pruning before its end."""
    computed: ir.Value
    """int64 scalar: number of tokens that the network has processed, prompts excluded."""


def row_values() -> RunningRows:
    """The loop's inputs for the running candidates."""
    kinds = {"log_probs": FLOAT, "running": BOOL}
    return RunningRows(*(ir.val(f"rows/{name}", kinds.get(name, INT), ROWS) for name in RunningRows._fields))


def table_values() -> Tables:
    """The loop's inputs for the results."""
    kinds = {"scores": FLOAT, "log_probs": FLOAT, "kept": BOOL, "pruned": BOOL}
    shapes: dict[str, list[str]] = dict.fromkeys(("lengths", "kept", "pruned"), TABLE[:2]) | {"computed": []}
    return Tables(*(ir.val(f"table/{n}", kinds.get(n, INT), shapes.get(n, TABLE)) for n in Tables._fields))


def cache_values(config: NetworkConfig) -> list[ir.Value]:
    """The loop's inputs for the candidates' key-value cache, layer by layer."""
    shape: list[int | str | None] = [*ROWS, config.num_kv_heads, "own_length", config.size_of_head]
    names = (f"own/{kind}.{i}" for i in range(config.num_layers) for kind in ("key", "value"))
    return [ir.val(name, FLOAT, shape) for name in names]

"""Spare PyTorch's exporter work that it repeats, or whose result is known beforehand; the graphs are the same.

For each graph the exporter parses the source of all its converters again, runs the captured program once more to insert
conversions of types that are hardly ever missing, and compares every node with all rules that rewrite graphs, although
the last operator of a rule decides most comparisons.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from onnxscript.rewriter import RewriteRule
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.onnx._internal.fx.passes import type_promotion

__all__ = ["exported_quickly"]

_rewrite = RewriteRule.try_rewrite


@contextlib.contextmanager
def exported_quickly() -> Iterator[None]:
    """Within this context the exporter reads its converters once, and compares and computes only what it must."""
    with (
        mock.patch.object(ONNXRegistry, "from_torchlib", staticmethod(_converters)),
        mock.patch.object(type_promotion._TypePromotionInterpreter, "run_node", _promote),
        mock.patch.object(RewriteRule, "try_rewrite", _try_rewrite),
    ):
        yield


@functools.cache
def _read_converters(opset_version: int) -> ONNXRegistry:
    return _from_torchlib(opset_version)


_from_torchlib = ONNXRegistry.from_torchlib


def _converters(opset_version: int) -> ONNXRegistry:
    """Return the exporter's table of converters, of which each caller may change a copy."""
    read, copy = _read_converters(opset_version), ONNXRegistry()
    copy._opset_version = read._opset_version
    copy.functions = {target: [*functions] for target, functions in read.functions.items()}
    return copy


def _promote(interpreter: Any, node: torch.fx.Node) -> Any:
    """Insert conversions before a node; only a node whose value is not known yet is run."""
    with interpreter._set_current_node(node):
        rule = type_promotion.get_type_promotion_rule(node, interpreter.type_promotion_table)
        if rule is not None:
            interpreter._maybe_promote_node(node, rule)
    if node.op == "call_function" and "val" in node.meta:
        return node.meta["val"]
    return torch.fx.Interpreter.run_node(interpreter, node)


def _try_rewrite(rule: RewriteRule, model: Any, graph: Any, node: Any, **options: Any) -> Any:
    """Apply a rule to a node, unless its last operator is another one."""
    last = rule._target_pattern.output_nodes[0].op_identifier()
    return None if last is not None and last != node.op_identifier() else _rewrite(rule, model, graph, node, **options)

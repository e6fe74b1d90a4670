"""Spare the exporter its second trace of a program.

To replace the operators that ONNX lacks, the exporter traces a captured program once more, which takes as long as all
the rest. The operators of the graphs need that in a few cases only, which are replaced here one by one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

__all__ = ["decomposed_lightly"]

_ATEN = torch.ops.aten
_SAME = {_ATEN.__and__.Tensor: _ATEN.bitwise_and.Tensor, _ATEN.__or__.Tensor: _ATEN.bitwise_or.Tensor}


@contextlib.contextmanager
def decomposed_lightly() -> Iterator[None]:
    """Within this context the exporter replaces single operators, and traces again only a program that needs it."""
    fully = ExportedProgram.run_decompositions

    def run(program: ExportedProgram, table: Mapping[Any, Any] | None = None, **options: Any) -> ExportedProgram:
        _replace(program.graph_module)
        return fully(program, table, **options) if _needs_more(program.graph_module, table or {}) else program

    with mock.patch.object(ExportedProgram, "run_decompositions", run):
        yield


def _replace(module: GraphModule) -> None:
    """Replace operators by the equal ones that the exporter knows."""
    for node in [*module.graph.nodes]:
        if node.op != "call_function":
            continue
        if node.target is _ATEN.to.dtype and len(node.args) == 2 and not node.kwargs:
            node.target, node.args, node.kwargs = _ATEN._to_copy.default, node.args[:1], {"dtype": node.args[1]}
        elif node.target is _ATEN.detach_.default:
            # A constant of the program, which needs no gradient anyway.
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        elif node.target in _SAME:
            node.target = _SAME[node.target]
    module.recompile()


def _needs_more(module: GraphModule, table: Mapping[Any, Any]) -> bool:
    """Whether a program holds an operator that changes a tensor in place, or one that the table has to replace."""
    return any(_is_foreign(node, table) for node in module.graph.nodes)


def _is_foreign(node: Node, table: Mapping[Any, Any]) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target in table or node.target._schema.is_mutable

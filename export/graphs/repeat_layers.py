"""Trace one transformer layer of each kind, and copy its nodes for the others.

Tracing a layer takes a second, and memory that PyTorch never frees; copying nodes costs neither.

While a graph is traced, the weights of its layers are inputs, so that the exporter cannot fold them or merge equal
ones, which would be wrong for other layers. Marks show where the residual stream enters each layer. A layer's own nodes
are therefore those before the next mark that depend on the stream, the layer's weights or its cache. Everything else
they read, such as masks and rotations, is shared by all layers.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import NamedTuple

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import Tensor, nn

from .builder import IR_VERSION, name_value
from .layers import MARK, Layer, Trunk

__all__ = ["Opened", "Repetition"]


class Opened(nn.Module):
    """A module whose named tensors are arguments of `forward`."""

    def __init__(self, graph: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.inner, self.names = graph, [*names]

    def forward(self, tensors: tuple[Tensor, ...], *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The tensors in the order of their names, and the module's own inputs -> the module's outputs."""
        weights = dict(zip(self.names, tensors, strict=True))
        outputs: Tensor | tuple[Tensor, ...] = torch.func.functional_call(self.inner, weights, inputs)
        return outputs


class _Template(NamedTuple):
    """A traced layer of a graph."""

    stream: ir.Value
    weights: list[ir.Value]
    cache: list[ir.Value]
    """The graph inputs that belong to this layer."""
    grown: list[ir.Value]
    """The graph outputs that belong to this layer."""
    end: ir.Value | None
    """The stream after the layer; None for the last layer."""
    nodes: list[ir.Node]


class Repetition:
    """Reduces a trunk to the layers to be traced, and restores all layers in the traced graphs.

    The last layer is always traced, because graphs need fewer of its rows.
    """

    def __init__(self, trunk: Trunk) -> None:
        self._layers = [layer for layer in trunk.layers if isinstance(layer, Layer)]
        *kinds, _ = map(_kind, self._layers, trunk.windows, trunk.kinds_of_rotation)
        first: dict[Hashable, int] = {}
        for i, kind in enumerate(kinds):
            first.setdefault(kind, i)
        self._like = [*(first[kind] for kind in kinds), len(kinds)]
        """For each layer, the index of the layer that is traced in its place."""
        self.traced = [*first.values(), len(kinds)]
        trunk.layers = nn.ModuleList(self._layers[i] for i in self.traced)
        trunk.windows = [trunk.windows[i] for i in self.traced]
        trunk.kinds_of_rotation = [trunk.kinds_of_rotation[i] for i in self.traced]
        trunk.marked = True

    def weights(self) -> dict[str, Tensor]:
        """Return the traced layers' weights, by their names in a module that has the trunk: a graph's first inputs."""
        return {
            f"trunk.layers.{place}.{name}": weight
            for place, i in enumerate(self.traced)
            for name, weight in _weights(self._layers[i])
        }

    def repeat(self, graph: ir.Graph) -> None:
        """Restore every layer in a traced graph, with its weights as initializers.

        An input or output whose name ends with a dot and a number belongs to that layer. These come last, layer by
        layer.
        """
        templates = self._templates(graph)
        inputs = [value for value in graph.inputs[len(self.weights()) :] if _number(value) is None]
        outputs = [value for value in graph.outputs if _number(value) is None]
        marks = _marks(graph)
        stream = marks[0].inputs[0]
        assert stream is not None
        for i, like in enumerate(self._like):
            template = templates[like]
            weights = [_initializer(f"trunk.layers.{i}.{name}", weight) for name, weight in _weights(self._layers[i])]
            for weight in weights:
                graph.register_initializer(weight)
            # The traced layer's cache inputs are kept, because nodes shared by all layers may read their size.
            cache = template.cache if i == like else [_numbered(ir.Value(), value, i) for value in template.cache]
            inputs += cache
            new = {template.stream: stream}
            new |= zip([*template.weights, *template.cache], [*weights, *cache], strict=True)
            if template.end is None:
                for old, value in new.items():
                    old.replace_all_uses_with(value)
                outputs += template.grown
            else:
                graph.insert_before(marks[-1], _copies(template.nodes, new))
                stream = new[template.end]
                outputs += [_numbered(new[value], value, i) for value in template.grown]
        graph.inputs[:], graph.outputs[:] = inputs, outputs
        _tidy(graph)

    def _templates(self, graph: ir.Graph) -> dict[int, _Template]:
        """Return the traced layers of a graph by number."""
        marks, weight_inputs = _marks(graph), graph.inputs[: len(self.weights())]
        assert len(marks) == len(self.traced), "the tracer dropped a mark"
        templates = {}
        for place, (i, mark) in enumerate(zip(self.traced, marks, strict=True)):
            stream, end = mark.outputs[0], marks[place + 1].inputs[0] if mark is not marks[-1] else None
            weights = [value for value in weight_inputs if str(value.name).startswith(f"trunk.layers.{place}.")]
            cache, grown = ([x for x in values if _number(x) == i] for values in (graph.inputs, graph.outputs))
            nodes = [] if end is None else _between(graph, [stream, *weights, *cache], [end, *grown])
            templates[i] = _Template(stream, weights, cache, grown, end, nodes)
        return templates


def _kind(layer: Layer, window: int | None, rotation: str | None) -> Hashable:
    """Return everything about a layer that determines its trace, which is all but the values of its weights."""
    modules = (
        (name, type(module), frozenset((k, v) for k, v in vars(module).items() if not k.startswith("_")))
        for name, module in layer.named_modules()
    )
    weights = ((name, weight.shape, weight.stride(), weight.dtype) for name, weight in _weights(layer))
    return window, rotation, tuple(modules), tuple(weights)


def _weights(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from layer.named_parameters()
    yield from layer.named_buffers()


def _marks(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if node.op_type == MARK]


def _number(value: ir.Value) -> int | None:
    """Return the number of the layer that an input or output belongs to, if any."""
    _, _, number = str(value.name).rpartition(".")
    return int(number) if number.isdigit() and "." in str(value.name) else None


def _numbered(value: ir.Value, like: ir.Value, number: int) -> ir.Value:
    """Give a value the name, type and axes of another layer's value, with the new layer's number."""
    assert like.dtype is not None
    assert like.shape is not None
    name, _, _ = str(like.name).rpartition(".")
    return name_value(value, f"{name}.{number}", like.dtype, [*like.shape])


def _initializer(name: str, weight: Tensor) -> ir.Value:
    """Make an initializer that refers to the weight without copying it."""
    tensor = ir.tensor(weight.detach(), name=name)
    return ir.Value(name=name, shape=ir.Shape(weight.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)


def _between(graph: ir.Graph, begins: Iterable[ir.Value], ends: Iterable[ir.Value]) -> list[ir.Node]:
    """Return the nodes on the paths from `begins` to `ends`."""
    reached: set[ir.Value | None] = {*begins}
    nodes, between = [], []
    for node in graph:
        # The shape of an input belongs to no layer: it is the same for the inputs of all layers.
        of_input = node.op_type == "Shape" and node.inputs[0] in graph.inputs
        if not of_input and not reached.isdisjoint(node.inputs):
            reached.update(node.outputs)
            nodes.append(node)
    needed: set[ir.Value | None] = {*ends}
    for node in reversed(nodes):
        if not needed.isdisjoint(node.outputs):
            needed.update(node.inputs)
            between.append(node)
    return between[::-1]


def _copies(nodes: Iterable[ir.Node], new: dict[ir.Value, ir.Value]) -> list[ir.Node]:
    """Copy the nodes with the values in `new` replaced; their outputs are added to `new`."""
    copies = []
    for node in nodes:
        inputs = [None if value is None else new.get(value, value) for value in node.inputs]
        copies.append(ir.node(node.op_type, inputs, node.attributes, domain=node.domain, num_outputs=len(node.outputs)))
        for old, value in zip(node.outputs, copies[-1].outputs, strict=True):
            value.type = old.type
            new[old] = value
    return copies


def _tidy(graph: ir.Graph) -> None:
    """Remove unused nodes, such as the traced ones, and merge duplicates that the exporter could not see."""
    for graph_pass in (
        common.RemoveUnusedNodesPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
    ):
        graph_pass(ir.Model(graph, ir_version=IR_VERSION))

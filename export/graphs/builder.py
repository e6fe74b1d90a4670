"""Build ONNX graphs by hand: operators as methods, constants, loops, and calls to onnxscript functions."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Hashable, Sequence
from itertools import count
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, InlinePass

__all__ = ["DOMAIN", "IR_VERSION", "Builder", "finish", "name_value"]

# The domain of functions and layer marks, all of which are inlined or removed before a graph is written.
DOMAIN = "bonnx"
# The IR version that PyTorch's exporter writes; ONNX Runtime reads it from 1.18 on.
IR_VERSION = 10


class Builder:
    """Collects the nodes and constants of one graph.

    `builder.Add(a, b)` appends a node and returns its output; keyword arguments are attributes. With `_outputs`, a
    number above 1, it returns a list of that many outputs.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []

    def __getattr__(self, operator: str) -> Callable[..., Any]:
        def append(*inputs: ir.Value | None, _domain: str = "", _outputs: int = 1, **attributes: Any) -> Any:
            node = ir.node(operator, inputs, attributes, domain=_domain, num_outputs=_outputs)
            self.nodes.append(node)
            return node.outputs[0] if _outputs == 1 else list(node.outputs)

        return append

    def constant(self, value: NDArray[Any] | np.generic) -> ir.Value:
        """Add an initializer that holds a constant tensor."""
        array = np.asarray(value)
        tensor = ir.tensor(array)
        constant = ir.Value(
            name=f"{self.name}/constant{len(self.initializers)}",
            shape=ir.Shape(array.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.initializers.append(constant)
        return constant

    def int(self, value: builtins.int) -> ir.Value:
        """Add a constant int64 scalar."""
        return self.constant(np.array(value, np.int64))

    def ints(self, *values: builtins.int) -> ir.Value:
        """Add a constant 1-D int64 tensor."""
        return self.constant(np.array(values, np.int64))

    def float(self, value: builtins.float) -> ir.Value:
        """Add a constant float32 scalar."""
        return self.constant(np.array(value, np.float32))

    def call(self, function: Any, *inputs: ir.Value) -> Any:
        """Call an onnxscript function."""
        proto = function.to_function_proto()
        return self.__getattr__(proto.name)(*inputs, _domain=DOMAIN, _outputs=len(proto.output))

    def loop(self, trips: ir.Value, condition: ir.Value, carried: Sequence[ir.Value], body: ir.Graph) -> list[ir.Value]:
        """Append an ONNX `Loop`; return the final loop-carried values."""
        outputs = len(body.outputs) - 1
        results = self.Loop(trips, condition, *carried, _outputs=outputs, body=body)
        return [results] if outputs == 1 else list(results)

    def body(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Graph:
        """Return the collected nodes as the body of a `Loop`.

        The inputs are (iteration, condition, carried values ...), the outputs (condition, carried values ...).
        """
        for output, parameter in zip(outputs, inputs[1:], strict=True):
            output.type = parameter.type
        return ir.Graph(inputs, outputs, nodes=self.nodes, initializers=self.initializers, name=self.name)

    def as_function(self, name: str, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Function:
        """Return the collected nodes as a function, which has nodes instead of initializers."""
        constants = [ir.node("Constant", [], {"value": value.const_value}) for value in self.initializers]
        for value, constant in zip(self.initializers, constants, strict=True):
            value.replace_all_uses_with(constant.outputs[0])
        graph = ir.Graph(inputs, outputs, nodes=[*constants, *self.nodes], name=name)
        return ir.Function(DOMAIN, name, graph=graph, attributes=[])

    def extend(self, graph: ir.Graph) -> None:
        """Append the collected nodes and initializers to a graph."""
        for value in self.initializers:
            graph.register_initializer(value)
        graph.extend(self.nodes)

    def adopt(self, graph: ir.Graph) -> None:
        """Move a graph's nodes into this builder, together with its inputs; the graph is left empty."""
        nodes = list(graph)
        graph.outputs.clear()
        graph.inputs.clear()
        graph.remove(nodes)
        self.nodes += nodes

    def hoist(self, graph: ir.Graph) -> None:
        """Move a graph's initializers into this builder, reusing one of the same name and content.

        Nodes that only transpose, cast or join initializers move too: outside a loop, a runtime folds them once for
        all their readers.
        """
        by_name = {value.name: value for value in self.initializers}
        for name, value in list(graph.initializers.items()):
            del graph.initializers[name]
            twin, tensor = by_name.get(name), value.const_value
            assert tensor is not None
            if twin is not None and np.array_equal(_content(twin), tensor.numpy()):
                value.replace_all_uses_with(twin)
                continue
            if twin is not None:
                value.name = f"{self.name}/{len(self.initializers)}/{name}"
            self.initializers.append(value)
        fixed, existing = {*self.initializers}, {_change(node): node for node in self.nodes}
        for node in [node for node in graph if _change(node) is not None and fixed.issuperset(node.inputs)]:
            same = existing.get(_change(node))
            if same is not None:
                node.outputs[0].replace_all_uses_with(same.outputs[0])
            graph.remove(node)
            self.nodes += [] if same is not None else [node]


def _change(node: ir.Node) -> Hashable:
    """Return a key that is equal for equal `Transpose`, `Cast` or `Concat` nodes; None for other operators."""
    attribute = {"Transpose": "perm", "Cast": "to", "Concat": "axis"}.get(node.op_type)
    if attribute is None:
        return None
    value = node.attributes[attribute].value
    return tuple(node.inputs), tuple(value) if attribute == "perm" else value


def _content(value: ir.Value) -> NDArray[Any]:
    assert value.const_value is not None
    return value.const_value.numpy()


def name_value(value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str | ir.SymbolicDim]) -> ir.Value:
    """Set the name, type and axes of a graph's input or output."""
    value.name, value.dtype, value.shape = name, dtype, ir.Shape(shape)
    return value


def _complete(loop: ir.Node, graph: ir.Graph) -> None:
    """Give a loop of an onnxscript function a condition and the types of its body's first values, which it lacks."""
    body = loop.attributes["body"].as_graph()
    for value, dtype in ((body.inputs[0], ir.DataType.INT64), (body.inputs[1], ir.DataType.BOOL)):
        value.type = value.type or ir.TensorType(dtype)
    body.outputs[0].type = body.outputs[0].type or ir.TensorType(ir.DataType.BOOL)
    if loop.inputs[1] is None:
        # Optional by the standard, but ONNX's reference evaluator does not run a loop without one.
        always = ir.node("Constant", [], {"value": ir.tensor(np.array(True))})
        graph.insert_before(loop, [always])
        loop.replace_input_with(1, always.outputs[0])


def finish(graph: ir.Graph, functions: Sequence[Any], opset: int) -> ir.Model:
    """Make a model of a graph; functions, onnxscript's or ours, are inlined, and all names become unique."""
    graph.opset_imports.update({"": opset, DOMAIN: 1})
    ir_functions = []
    for function in functions:
        if not isinstance(function, ir.Function):
            proto = function.to_function_proto()
            proto.domain = DOMAIN
            function = ir.from_proto(proto)
        function.opset_imports.update({"": opset, DOMAIN: 1})
        ir_functions.append(function)
    model = ir.Model(graph, ir_version=IR_VERSION, functions=ir_functions)
    InlinePass()(model)
    # Those that nothing called are still there.
    model.functions.clear()
    CommonSubexpressionEliminationPass()(model)
    for part in [graph, *graph.subgraphs()]:
        for node in [node for node in part if node.op_type == "Loop"]:
            _complete(node, part)
    del graph.opset_imports[DOMAIN]
    if any(node.domain == "com.microsoft" for part in (graph, *graph.subgraphs()) for node in part):
        graph.opset_imports["com.microsoft"] = 1
    values, nodes = count(), count()
    for part in (graph, *graph.subgraphs()):
        fixed = {*graph.inputs, *graph.outputs, *graph.initializers.values(), *part.inputs, *part.initializers.values()}
        for node in part:
            node.name = f"{node.op_type}_{next(nodes)}"
            for value in node.outputs:
                if value not in fixed:
                    value.name = f"v{next(values)}"
        for value in part.outputs:
            if value.type is None:
                # Of an `If` branch or a loop in a function: checkers require a type, but functions are untyped.
                producer = value.producer()
                assert producer is not None
                assert producer.op_type == "Cast", "end each branch with a Cast"
                value.type = ir.TensorType(ir.DataType(producer.attributes["to"].as_int()))
    return model

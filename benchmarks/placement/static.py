"""Where ONNX Runtime's CUDA provider would run a graph's nodes, and what it would copy, from its registry of kernels.

It follows ONNX Runtime's own rules, on the graph as it is in the file:

- A node runs on CUDA if the registry has a kernel for its operator, version and types (`KernelRegistry`).
- What is computed from shapes alone runs on the host anyway (`GetCpuPreferredNodes`): it costs less there.
- A value that is needed on the other side is copied, once in each graph or body (`MemcpyTransformer`).
- A `Loop` copies what its body needs elsewhere at every iteration. Its own values that are on the host are the
  iteration and the condition; what it carries is on the device. ONNX Runtime's log does not count these copies.

Which inputs and outputs of a CUDA kernel are on the host is not in the registry, so it is stated here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, defs, shape_inference

from .kernels import Kernel

__all__ = ["Part", "place"]

_HOST_INPUTS = {
    **{name: {0, 1, 2} for name in ("Range",)},
    **{name: {0, 1} for name in ("Loop",)},
    **{name: {0} for name in ("ConstantOfShape", "If")},
    **{name: {1, 2, 3, 4} for name in ("Slice", "Pad")},
    **{
        name: {1}
        for name in (
            *("CumSum", "Expand", "Reshape", "Split", "Squeeze", "Tile", "TopK", "Trilu", "Unsqueeze"),
            *(f"Reduce{kind}" for kind in ("L2", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum")),
        )
    },
}
_HOST_OUTPUTS = {"Shape", "Size"}
_CONTROL = {"If", "Loop", "Scan"}
# Initializers of up to so many elements may be on the host too.
_SMALL = 100


@dataclass
class Part:
    """A graph, or the body of a loop or branch.

    Attributes:
        name: of the node and its attribute, for a body.
        cuda: nodes that run on CUDA.
        host: nodes that run on the host by design: they compute shapes.
        without: nodes that run on the host because no CUDA kernel fits, by operator.
        copies: values that are copied within it, in each run of it.
        border: values that are copied each time it is entered, because it needs them on the other side.
    """

    name: str
    cuda: int = 0
    host: int = 0
    without: Counter[str] = field(default_factory=Counter)
    copies: int = 0
    border: int = 0


def place(model: ModelProto, kernels: dict[tuple[str, str], list[Kernel]]) -> list[Part]:
    """Place the nodes of a model without functions; return the graph and its bodies, outer ones first."""
    inferred = shape_inference.infer_shapes(model)
    opsets = {entry.domain: entry.version for entry in inferred.opset_import}
    return list(_parts(_Scope(inferred.graph, None, opsets, kernels), "graph"))


class _Scope:
    """A graph or body, and where its nodes run."""

    def __init__(
        self,
        graph: GraphProto,
        outer: _Scope | None,
        opsets: dict[str, int],
        kernels: dict[tuple[str, str], list[Kernel]],
    ) -> None:
        self.graph, self.outer, self.opsets, self.kernels = graph, outer, opsets, kernels
        values = [*graph.input, *graph.output, *graph.value_info]
        self.types = {v.name: v.type.tensor_type.elem_type for v in values if v.type.HasField("tensor_type")}
        self.types |= {t.name: t.data_type for t in graph.initializer}
        self.inputs = {value.name for value in graph.input}
        self.constants = {t.name: _count(t.dims) for t in graph.initializer}
        self.nodes = [*self._fold()]
        self.made = {name for node in self.nodes for name in node.output}
        self.reasons = {id(node): self._lack(node) for node in self.nodes}
        self.on_host = self._follow_shapes()
        # Values that are made on the host, and all uses of values: True on the host.
        self.host_values = {
            name
            for node in self.nodes
            for name in node.output
            if self._runs_on_host(node) or node.op_type in _HOST_OUTPUTS
        }
        self.uses: dict[str, set[bool]] = {}
        for node in self.nodes:
            for i, name in enumerate(node.input):
                self.uses.setdefault(name, set()).add(self._runs_on_host(node) or i in _host_inputs(node))

    def _fold(self) -> Iterator[NodeProto]:
        """The nodes that are left when a session has folded constants."""
        for node in self.graph.node:
            fixed = all(not name or self.constant(name) is not None for name in node.input)
            if node.op_type == "Constant" or (node.input and fixed and node.op_type not in _CONTROL):
                tensor = next((a.t for a in node.attribute if a.name == "value"), None)
                elements = 1 if tensor is None else _count(tensor.dims)
                self.constants.update(dict.fromkeys(node.output, elements))
                if tensor is not None:
                    self.types[node.output[0]] = tensor.data_type
            else:
                yield node

    def constant(self, name: str) -> int | None:
        """The number of elements of a constant, here or outside; None for another value."""
        found = self.constants.get(name)
        return found if found is not None or self.outer is None else self.outer.constant(name)

    def type(self, name: str) -> int | None:
        """A value's type, here or outside, if it is known."""
        found = self.types.get(name)
        return found if found is not None or self.outer is None else self.outer.type(name)

    def holder(self, name: str) -> _Scope | None:
        """The graph around this one that makes a value or has it as an input."""
        scope = self.outer
        while scope is not None and name not in scope.made | scope.inputs:
            scope = scope.outer
        return scope

    def _lack(self, node: NodeProto) -> str | None:
        """Why no kernel fits a node; None if one does."""
        schema = defs.get_schema(node.op_type, self.opsets[node.domain], node.domain) if node.domain == "" else None
        since = 1 if schema is None else schema.since_version
        entries = self.kernels.get((node.domain, node.op_type), [])
        entries = [e for e in entries if e.first == since or (e.last is not None and e.first <= since <= e.last)]
        if schema is None:
            return None if entries else "operator"
        formals = [*zip(schema.inputs, node.input, strict=False), *zip(schema.outputs, node.output, strict=False)]
        actual: dict[str, str] = {}
        for formal, name in formals:
            kind = self.type(name) if name else None
            if kind is not None:
                actual.setdefault(formal.type_str, TensorProto.DataType.Name(kind).lower())
        fits = any(all(actual.get(v, next(iter(t))) in t for v, t in e.types.items()) for e in entries)
        return None if fits else "types" if entries else "operator"

    def _follow_shapes(self) -> set[int]:
        """The nodes with a kernel that the host runs, because all that they read is small and there already."""
        known = {name for node in self.nodes if node.op_type in _HOST_OUTPUTS for name in node.output}
        placed = set[int]()
        for node in self.nodes:
            if self.reasons[id(node)] is not None:
                # It counts only where shapes lead to it.
                known |= {*node.output} if known & {*node.input} else set()
                continue
            read = [(i, name) for i, name in enumerate(node.input) if name]
            free = [
                name in self.inputs or ((elements := self.constant(name)) is not None and elements <= _SMALL)
                for _, name in read
            ]
            rest = [(i, name) for (i, name), is_free in zip(read, free, strict=True) if not is_free]
            intended = any(i in _host_inputs(node) for i, _ in rest)
            if rest and not intended and node.op_type not in _CONTROL and known >= {n for _, n in rest}:
                placed.add(id(node))
                known |= {*node.output}
        return placed

    def _runs_on_host(self, node: NodeProto) -> bool:
        return self.reasons[id(node)] is not None or id(node) in self.on_host

    def part(self, name: str) -> Part:
        """Count."""
        part = Part(name)
        for node in self.nodes:
            if self.reasons[id(node)] is not None:
                part.without[node.op_type] += 1
            elif id(node) in self.on_host:
                part.host += 1
            else:
                part.cuda += 1
        for value, uses in self.uses.items():
            if not value or value in self.constants:
                continue
            if value in self.made:
                part.copies += (value in self.host_values) not in uses or len(uses) == 2
            else:
                part.copies += len(uses) == 2
        return part

    def border(self, loop: bool) -> int:
        """How many values a control operator copies for this body."""
        crossing = 0
        for value, uses in self.uses.items():
            holder = None if value in self.made | self.inputs | {*self.constants} else self.holder(value)
            if holder is not None:
                crossing += (value in holder.host_values) not in uses
        if loop:
            iteration, condition = (value.name for value in self.graph.input[:2])
            crossing += sum(self.uses.get(name) == {False} for name in (iteration, condition))
            crossing += self.graph.output[0].name not in self.host_values | {condition, *self.constants}
            # What it carries is on the device between two iterations.
            carried = [value.name for value in self.graph.input[2:]]
            crossing += sum(True in self.uses.get(name, ()) for name in carried)
            crossing += sum(value.name in self.host_values for value in self.graph.output[1 : 1 + len(carried)])
        return crossing


def _parts(scope: _Scope, name: str) -> Iterator[Part]:
    yield scope.part(name)
    for node in scope.nodes:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                body = _Scope(attribute.g, scope, scope.opsets, scope.kernels)
                label = f"{name}/{node.op_type}"
                first, *rest = _parts(body, label)
                first.border = body.border(node.op_type == "Loop")
                yield first
                yield from rest


def _host_inputs(node: NodeProto) -> set[int]:
    return _HOST_INPUTS.get(node.op_type, set())


def _count(axes: Sequence[int]) -> int:
    product = 1
    for axis in axes:
        product *= axis
    return product

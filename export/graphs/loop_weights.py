"""8-bit weights inside a loop's body."""

from __future__ import annotations

import onnx_ir as ir

from .builder import Builder

__all__ = ["localize_integer_weights"]


def localize_integer_weights(body: ir.Graph) -> None:
    """Give 8-bit products in a loop weights inside the body: a reshape of the outer weights, which runtimes fold.

    On x64 processors without VNNI, 8-bit sums of signed weights overflow, so ONNX Runtime makes the weights unsigned,
    but only if they belong to the same graph as the product. With weights from the outer graph, the sums would silently
    be wrong. Initializers in the body would work too, but onnxruntime-web finds no external data there.
    """
    b = Builder("own")
    reshaped: dict[ir.Value, ir.Value] = {}
    for node in [node for node in body if node.op_type == "MatMulInteger"]:
        weight = node.inputs[1]
        assert weight is not None
        if weight not in reshaped:
            # (0, 0) keeps the shape, which is unknown for a tied head: its weight is a transpose outside the loop.
            reshaped[weight] = b.Reshape(weight, b.ints(0, 0))
        node.replace_input_with(1, reshaped[weight])
    for value in b.initializers:
        body.register_initializer(value)
    body.insert_before(body[0], b.nodes)

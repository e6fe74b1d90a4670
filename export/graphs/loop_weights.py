"""The 8-bit weights of a loop's body."""

from __future__ import annotations

import onnx_ir as ir

from .builder import Builder

__all__ = ["own_integer_weights"]


def own_integer_weights(body: ir.Graph) -> None:
    """Give the loop's 8-bit products weights of their own graph: a reshape of those around it, which a runtime folds.

    On x64 processors without VNNI, 8-bit sums of signed weights overflow, so ONNX Runtime makes the weights unsigned
    there, but only those of the graph that holds the product. With the weights of the graph around the loop, the sums
    would silently be wrong. Initializers in the loop would do too, but onnxruntime-web finds no external data there.
    """
    b = Builder("own")
    own: dict[ir.Value, ir.Value] = {}
    for node in [node for node in body if node.op_type == "MatMulInteger"]:
        weight = node.inputs[1]
        assert weight is not None
        if weight not in own:
            # To its own shape: the weight of a head that shares the embedding's is a transpose around the loop.
            own[weight] = b.Reshape(weight, b.ints(0, 0))
        node.replace_input_with(1, own[weight])
    for value in b.initializers:
        body.register_initializer(value)
    body.insert_before(body[0], b.nodes)

"""Products of 8-bit weights in a loop: ONNX Runtime must find the weights in the loop's own graph."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["own_integer_weights"]


def own_integer_weights(body: ir.Graph) -> None:
    """Give the loop's 8-bit products weights of its own: the same bytes of the weights file under another name.

    On x64 processors without VNNI, 8-bit sums of signed weights overflow, so ONNX Runtime makes the weights unsigned
    there, but only those of the graph that holds the product. With the weights of the graph around the loop, the sums
    would silently be wrong.
    """
    own: dict[ir.Value, ir.Value] = {}
    for node in body:
        weight = node.inputs[1] if node.op_type == "MatMulInteger" else None
        if weight is None or weight.const_value is None:
            continue
        if weight not in own:
            own[weight] = ir.val(f"{weight.name}/loop", weight.dtype, weight.shape, const_value=weight.const_value)
            body.register_initializer(own[weight])
        node.replace_input_with(1, own[weight])

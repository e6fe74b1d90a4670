"""A graph pass that computes products of 16-bit weights in float32.

ONNX Runtime's CPU provider has no bfloat16 products. It has no float16 products either, but casts float16 weights to
float32 itself: once for a graph, but in every iteration for a loop's body, which takes twice as long. This pass makes
the graph cast the weights. `Builder.hoist` moves the casts out of loops, so a runtime does them once, at loading.
"""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["widened"]


def widened(graph: ir.Graph, dtype: ir.DataType) -> ir.Graph:
    """Rewrite products with weights of a dtype to `x @ Cast(weight)`, in place; return the graph."""
    for node in list(graph):
        weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
        if weight is None or not weight.is_initializer() or weight.dtype != dtype:
            continue
        inputs, (output,) = node.inputs[0], node.outputs
        assert inputs is not None
        narrow, (back,) = inputs.producer(), output.consumers()
        assert narrow is not None
        assert back.op_type == "Cast"
        casts = [ir.node("Cast", [weight], {"to": ir.DataType.FLOAT})]
        wide = narrow.inputs[0]
        if narrow.op_type != "Cast":
            # Rows of an embedding already have this dtype, because the tracer drops a cast to float32 and back.
            casts.append(ir.node("Cast", [inputs], {"to": ir.DataType.FLOAT}))
            wide = casts[1].outputs[0]
        graph.insert_before(node, casts)
        node.replace_input_with(0, wide)
        node.replace_input_with(1, casts[0].outputs[0])
        if back.outputs[0].is_graph_output():
            # Programs refer to an output by its name.
            output.name, back.outputs[0].name = back.outputs[0].name, f"{output.name}.wide"
        back.outputs[0].replace_all_uses_with(output, replace_graph_outputs=True)
        # Setting `dtype` instead would also change the values from which this one was cloned.
        output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), back.outputs[0].shape
        graph.remove(
            [part for part in (back, narrow) if part.op_type == "Cast" and not part.outputs[0].uses()], safe=True
        )
    return graph

"""Products of 16-bit weights, computed in float32.

ONNX Runtime's CPU provider has no products of bfloat16. It has none of float16 either, but there it casts their weights
itself: for a graph once, for the body of a loop at every step, which takes twice as long. So where this pass has been,
the graph casts the weights. A runtime does that once, when it loads the graph, since `Builder.hoist` takes them out of
a loop.
"""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["widened"]


def widened(graph: ir.Graph, dtype: ir.DataType) -> ir.Graph:
    """The graph, its products with weights of a type now `x @ Cast(weight)`."""
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
            # Rows of an embedding have the type already: the tracer drops a cast there and back.
            casts.append(ir.node("Cast", [inputs], {"to": ir.DataType.FLOAT}))
            wide = casts[1].outputs[0]
        graph.insert_before(node, casts)
        node.replace_input_with(0, wide)
        node.replace_input_with(1, casts[0].outputs[0])
        if back.outputs[0].is_graph_output():
            # The name of an output is how programs ask for it.
            output.name, back.outputs[0].name = back.outputs[0].name, f"{output.name}.wide"
        back.outputs[0].replace_all_uses_with(output, replace_graph_outputs=True)
        # Not `dtype`, which would change the type of the values that this one was cloned from.
        output.type = ir.TensorType(ir.DataType.FLOAT)
        graph.remove(
            [part for part in (back, narrow) if part.op_type == "Cast" and not part.outputs[0].uses()], safe=True
        )
    return graph

"""Every operator of every graph has a CUDA kernel, but for those listed here, and copies are as few as they are.

By the kernels of the onnxruntime-gpu that `benchmarks/placement/kernels.json` names: no GPU is needed.
"""

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks.placement.__main__ import graphs
from benchmarks.placement.kernels import Kernel, read_kernels
from benchmarks.placement.static import place

_, KERNELS = read_kernels()
RANKING = ("score", "rank", "rank_prefill", "rank_cached")
# CUDA has no products of 8-bit integers with a zero point of 128: at these precisions this many run on the CPU.
PRODUCTS = {
    "int8": {
        "score": 15,
        "rank": 15,
        "rank_prefill": 10,
        "rank_cached": 15,
        "generate": 28,
        "prefill": 16,
        "decode": 12,
    },
    "int4": {"score": 6, "rank": 6, "rank_prefill": 5, "rank_cached": 6, "generate": 14, "prefill": 7, "decode": 7},
}
# The host makes the random numbers, with integers, and everything that follows from sizes and options.
HOST_ONLY = {"BitShift", "BitwiseXor", "BitwiseOr", "Tile"}
# Copies in a run of the graph, and in one run of each of its bodies, at 16 bits and float32. A token of `decode` copies
# what the host knows of the rows: integers, and random numbers and options. A branch for top-k or top-p copies 3.
COPIES = {"generate": (2, 11), "prefill": (1, 3), "decode": (2, 3)}
# What a CUDA graph captures, and what moves its caches: no branches, nothing without a kernel, no copies.
ON_DEVICE = {"decode_static", "resize_cache"}


@pytest.mark.parametrize(
    ("precision", "opset"), [("fp32", 23), ("fp16", 23), ("bf16", 23), ("int8", 23), ("int4", 23), ("fp32", 18)]
)
def test_every_graph(precision, opset):
    products = PRODUCTS.get(precision, {})
    for name, model in graphs(precision, opset):
        parts = place(model, KERNELS)
        without = sum((part.without for part in parts), Counter())
        assert without.pop("MatMulInteger", 0) == products.get(name, 0), name
        copies = parts[0].copies, sum(part.copies + part.border for part in parts[1:])
        if name in ON_DEVICE:
            assert (len(parts), without.total(), copies) == (1, 0, (0, 0)), name
        elif name in RANKING:
            assert not without, name
            assert copies == (0, 0) or products, (name, copies)
        else:
            assert set(without) <= HOST_ONLY, name
            assert products or copies == COPIES[name], (name, copies)
        # Nearly everything is left for CUDA, and it is not called shapes instead.
        assert sum(part.cuda for part in parts) > 2 * sum(part.host for part in parts)


def test_experts():
    options = {"num_experts": 4, "experts_per_token": 2, "ffn_bias": False}
    score = next(model for name, model in graphs("fp32", 23, **options) if name == "score")
    whole, *bodies = place(score, KERNELS)
    assert not any(part.without for part in (whole, *bodies))
    # An iteration of each layer's loop copies its number, the condition that it goes on, and that of the next.
    assert (whole.copies, sum(part.copies + part.border for part in bodies)) == (0, 2 * 3)


def _model(nodes, inputs, outputs, constants=(), opset=23):
    values = [[helper.make_tensor_value_info(*value) for value in group] for group in (inputs, outputs)]
    tensors = [numpy_helper.from_array(np.array(array), name) for name, array in constants]
    graph = helper.make_graph(nodes, "g", *values, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def _counted(part):
    return part.cuda, part.host, dict(part.without), part.copies


@pytest.mark.parametrize(
    ("dtype", "zero", "without"),
    [(np.int8, 0, {}), (np.uint8, 128, {"MatMulInteger": 1})],
    ids=["int8", "uint8"],
)
def test_types_decide(dtype, zero, without):
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [helper.make_node("MatMulInteger", ["x", "w", "z"], ["y"])]
    constants = [("w", np.ones((2, 2), np.int8)), ("z", dtype(zero))]
    model = _model(nodes, [("x", kind, ["m", 2])], [("y", TensorProto.INT32, ["m", 2])], constants)
    (part,) = place(model, KERNELS)
    assert part.without == Counter(without)


def test_versions_decide():
    kernels = {("", "Abs"): [Kernel(6, 12, {"T": frozenset({"float"})}), Kernel(14, None, {"T": frozenset({"float"})})]}
    value = ("x", TensorProto.FLOAT, ["n"]), ("y", TensorProto.FLOAT, ["n"])
    node = helper.make_node("Abs", ["x"], ["y"])
    counts = [place(_model([node], *([v] for v in value), opset=opset), kernels)[0].cuda for opset in (12, 13)]
    # At 13 the operator is that of version 13, which neither of these is for.
    assert counts == [1, 0]


def test_shapes_stay_on_the_host_and_values_are_copied_once():
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Mul", ["shape", "two"], ["twice"]),
        helper.make_node("Reshape", ["x", "twice"], ["a"]),
        # Its numbers are on the device, so that it is, too; both readers of the result need it on the host.
        helper.make_node("Add", ["n", "two"], ["sum"]),
        helper.make_node("Expand", ["a", "sum"], ["b"]),
        helper.make_node("Expand", ["b", "sum"], ["c"]),
        helper.make_node("Unique", ["c"], ["d"]),
        helper.make_node("Abs", ["d"], ["e"]),
    ]
    inputs = [("x", TensorProto.FLOAT, ["m"]), ("n", TensorProto.INT64, [1])]
    model = _model(nodes, inputs, [("e", TensorProto.FLOAT, ["k"])], [("two", np.array([2]))])
    (part,) = place(model, KERNELS)
    # The copies are `sum` and `c` to the host, and `d` from it.
    assert _counted(part) == (6, 1, {"Unique": 1}, 3)


@pytest.mark.parametrize("from_shape", [True, False])
def test_a_loop_whose_numbers_cross_the_border(from_shape):
    size = helper.make_node("Shape", ["x"], ["own"], start=0, end=1)
    body_nodes = [
        *([size] if from_shape else []),
        helper.make_node("Mul", ["i", "own" if from_shape else "size"], ["begin"]),
        helper.make_node("Slice", ["x", "begin", "far"], ["y"]),
        helper.make_node("Identity", ["go"], ["on"]),
    ]
    scalar = (TensorProto.INT64, []), (TensorProto.BOOL, [])
    body = helper.make_graph(
        body_nodes,
        "body",
        [helper.make_tensor_value_info(name, *kind) for name, kind in zip(("i", "go"), scalar, strict=True)],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["k"]),
        ],
    )
    nodes = [
        helper.make_node("Shape", ["x"], ["size"], start=0, end=1),
        helper.make_node("Loop", ["trips", "yes"], ["ys"], body=body),
    ]
    constants = [("trips", np.array(3)), ("yes", np.array(True)), ("far", np.array([9]))]
    model = _model(nodes, [("x", TensorProto.FLOAT, ["m"])], [("ys", TensorProto.FLOAT, ["t", "k"])], constants)
    _, inside = place(onnx.shape_inference.infer_shapes(model), KERNELS)
    # Without a shape in the body the device multiplies: the iteration and the size go there, the product comes back.
    # The condition goes through the device in either case: that `Identity` runs there.
    assert (inside.copies, inside.border) == ((0, 2) if from_shape else (1, 4))

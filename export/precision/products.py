"""The graphs' matrix products: float32, 16-bit, 8-bit and 4-bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bonnx.models.network import LanguageModel, final_logits

from .linear import BLOCK, MIN_SCALE, NORMED_STEP, Linear4, Linear8, Linear16
from .outliers import SplitLinear

__all__ = [
    "Product4",
    "Product8",
    "Product16",
    "Product32",
    "QuantizedNorm",
    "SplitProduct",
    "VocabularyHead",
    "joint",
    "product",
]


def product(linear: nn.Module, scale: float = 1.0) -> nn.Module:
    """Return the module that computes `scale` times a layer in a graph."""
    if isinstance(linear, SplitLinear):
        return SplitProduct(linear, scale)
    if isinstance(linear, Linear16):
        return Product16(linear, scale)
    if isinstance(linear, Linear8):
        return Product8(linear, scale)
    if isinstance(linear, Linear4):
        return Product4(linear, scale)
    assert isinstance(linear, nn.Linear)
    return Product32(linear, scale)


def _fixed(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach(), requires_grad=False)


class _Biased(nn.Module):
    def __init__(self, bias: Tensor | None, scale: float) -> None:
        super().__init__()
        self.bias = None if bias is None else _fixed(bias * scale)

    def add(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias


class Product32(_Biased):
    """`x @ weight + bias` with the weight as (in, out)."""

    def __init__(self, linear: nn.Linear, scale: float = 1.0) -> None:
        super().__init__(linear.bias, scale)
        # A view if possible, which needs no memory; it is made contiguous when it is written.
        self.weight = _fixed((linear.weight if scale == 1.0 else linear.weight * scale).T)

    def forward(self, x: Tensor) -> Tensor:
        """(M, in) -> (M, out)."""
        return self.add(x @ self.weight)


class Product16(_Biased):
    """`Linear16`: 16-bit products, which `widen.py` turns into float32 products where these are unavailable.

    Rows without a bound are divided by their largest magnitude. Their products then sum to no more than the absolute
    weights of an output do, and `Linear16` has scaled these so that float16 can hold that sum.

    `shared` weights, which an embedding reads too, stay (out, in) in the file.
    """

    def __init__(self, linear: Linear16, scale: float = 1.0, *, shared: bool = False) -> None:
        super().__init__(linear.bias, scale)
        self.shared = shared
        self.weight = linear.weight if shared else _fixed(linear.weight.T)
        # Not folded into the weights, which would round them again.
        self.scale, self.bounded = linear.scale * scale, linear.bounded

    def forward(self, x: Tensor) -> Tensor:
        """(M, in) -> (M, out) float32."""
        if self.bounded:
            y = self._product(x)
            return self.add(y if self.scale == 1 else y * self.scale)
        rows = x.abs().amax(-1, keepdim=True).clamp(min=MIN_SCALE)
        return self.add(self._product(x / rows) * (rows if self.scale == 1 else rows * self.scale))

    def _product(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        y = _transposed(x, self.weight) if self.shared else x @ self.weight
        return y.to(torch.float32)


class Product8(_Biased):
    """`Linear8`, for rows that are float32, or uint8 from `QuantizedNorm`.

    `shared` weights, which an embedding reads too, stay (out, in) in the file and are transposed once at loading.
    """

    def __init__(self, linear: Linear8, scale: float = 1.0, *, shared: bool = False) -> None:
        super().__init__(linear.bias, scale)
        self.shared = shared
        self.weight = linear.weight if shared else _fixed(linear.weight.T)
        # Rows without a fixed range are divided by their largest magnitude, so their scale is 1/127.
        step = NORMED_STEP if linear.normed else 1 / 127
        self.scale = _fixed(linear.scale * (scale * step))
        self.step, self.zero = _fixed(torch.tensor(step)), _fixed(torch.tensor(128, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """(M, in) -> (M, out)."""
        return self.add(self.times(x, self.weight.t() if self.shared else self.weight, self.scale))

    def times(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """The product with any weights (in, out) int8 and their scale (out,)."""
        rows = None
        if x.dtype != torch.uint8:
            rows = x.abs().amax(-1, keepdim=True).clamp(min=MIN_SCALE)
            x = _node("QuantizeLinear", (x / rows, self.step, self.zero), torch.uint8, x.shape)
        integers = _node("MatMulInteger", (x, weight, self.zero), torch.int32, (x.shape[0], weight.shape[1]))
        y = integers.to(torch.float32) * scale
        return y if rows is None else y * rows


class Product4(_Biased):
    """`Linear4`, with an operator of ONNX Runtime: standard ONNX has none that computes with 4 bits."""

    def __init__(self, linear: Linear4, scale: float = 1.0) -> None:
        super().__init__(linear.bias, scale)
        self.packed, self.scale = _fixed(linear.packed), _fixed(linear.scale * scale)
        self.width = linear.width

    def forward(self, x: Tensor) -> Tensor:
        """(M, in) -> (M, out)."""
        out = self.packed.shape[0]
        # Accuracy level 4 allows 8-bit inputs.
        attributes = {"K": self.width, "N": out, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
        inputs = (x, self.packed, self.scale, *([] if self.bias is None else [None, None, self.bias]))
        return _node("com.microsoft::MatMulNBits", inputs, torch.float32, (x.shape[0], out), attributes)


class SplitProduct(nn.Module):
    """`SplitLinear`: a quantized product of most inputs, plus a float32 product of the outliers."""

    def __init__(self, split: SplitLinear, scale: float = 1.0) -> None:
        super().__init__()
        self.outliers, self.kept = split.outliers, split.kept
        self.others, self.wide = product(split.others, scale), Product32(split.wide, scale)

    def forward(self, x: Tensor) -> Tensor:
        """(M, in) -> (M, out)."""
        out: Tensor = self.others(x * self.kept) + self.wide(x.index_select(1, self.outliers))
        return out


def joint(parts: Sequence[nn.Module], x: Tensor) -> Tensor | None:
    """Compute several products of the same input, and so of the same outliers, as one with the outputs side by side.

    For few rows one product of 8 bits takes less time than several; for many, cutting the output costs more than it
    saves. The graph puts the weights together, which a runtime does once, when it loads it.

    Args:
        parts: the products.
        x: (M, in).

    Returns:
        (M, total), or None for products of different kinds, and for those of 16 and 4 bits.
    """
    first = parts[0]
    if {type(part) for part in parts} != {type(first)}:
        return None
    if isinstance(first, SplitProduct):
        others = joint([part.get_submodule("others") for part in parts], x * first.kept)
        wide = joint([part.get_submodule("wide") for part in parts], x.index_select(1, first.outliers))
        return None if others is None or wide is None else others + wide
    if not isinstance(first, Product32 | Product8):
        return None
    weight = torch.cat([part.get_parameter("weight") for part in parts], 1)
    biases = [part.bias for part in parts if isinstance(part, _Biased)]
    if isinstance(first, Product8):
        y = first.times(x, weight, torch.cat([part.get_parameter("scale") for part in parts]))
    else:
        y = x @ weight
    if all(bias is None for bias in biases):
        return y
    widths = [part.get_parameter("weight").shape[1] for part in parts]
    return y + torch.cat([torch.zeros(n) if b is None else b for b, n in zip(biases, widths, strict=True)])


class QuantizedNorm(nn.Module):
    """A norm whose output feeds `Product8`s: (M, D) -> (M, D) uint8 with zero point 128."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.step, self.zero = _fixed(torch.tensor(NORMED_STEP)), _fixed(torch.tensor(128, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """(M, D) -> (M, D) uint8."""
        return _node("QuantizeLinear", (self.norm(x), self.step, self.zero), torch.uint8, x.shape)


class VocabularyHead(nn.Module):
    """Backbone (M, D) -> logits (M, V).

    `Gemm` reads the weight as (V, D), so that a tied embedding is stored once and never transposed at run time.
    """

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.config = model.config
        if not model.config.tie_embeddings and isinstance(model.head, Linear8):
            shared = model.head.weight is model.embedding.weight
            self.product: nn.Module | None = Product8(model.head, shared=shared)
        elif not model.config.tie_embeddings and isinstance(model.head, Linear16):
            self.product = Product16(model.head, shared=True)
        else:
            self.product = None
            self.weight = model.embedding.weight if model.config.tie_embeddings else model.head.weight

    def forward(self, backbone: Tensor) -> Tensor:
        """(M, D) -> (M, V)."""
        logits = _transposed(backbone, self.weight) if self.product is None else self.product(backbone)
        return final_logits(logits, self.config)


def _transposed(x: Tensor, weight: Tensor) -> Tensor:
    """x (M, in) and weight (out, in) -> (M, out)."""
    return _node("Gemm", (x, weight), x.dtype, (x.shape[0], weight.shape[0]), {"transB": 1})


def _node(
    operator: str,
    inputs: tuple[Tensor | None, ...],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    attributes: dict[str, Any] | None = None,
) -> Tensor:
    output: Tensor = torch.onnx.ops.symbolic(operator, inputs, attributes or {}, dtype=dtype, shape=shape)
    return output

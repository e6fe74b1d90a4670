"""Matrix products as the graphs compute them: float32, 8-bit and 4-bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..models.network import LanguageModel
from .quantize import BLOCK, LEAST, NORMED_STEP, Linear4, Linear8

__all__ = ["Product4", "Product8", "Product32", "QuantizedNorm", "VocabularyHead", "product"]


def product(linear: nn.Module, scale: float = 1.0) -> nn.Module:
    """What computes `scale` times a layer."""
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
        self.weight = _fixed((linear.weight * scale).T.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """(M, in) -> (M, out)."""
        return self.add(x @ self.weight)


class Product8(_Biased):
    """`Linear8`, on rows that are float32, or already uint8 from `QuantizedNorm`.

    Weights that an embedding reads too are `shared`: left as (out, in) in the file, and transposed once at loading.
    """

    def __init__(self, linear: Linear8, scale: float = 1.0, *, shared: bool = False) -> None:
        super().__init__(linear.bias, scale)
        self.shared = shared
        self.weight = linear.weight if shared else _fixed(linear.weight.T.contiguous())
        # Rows without a fixed range are divided by their greatest value, so a step is 1/127 of it.
        step = NORMED_STEP if linear.normed else 1 / 127
        self.scale = _fixed(linear.scale * (scale * step))
        self.step, self.zero = _fixed(torch.tensor(step)), _fixed(torch.tensor(128, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """(M, in) -> (M, out)."""
        rows = None
        if x.dtype != torch.uint8:
            rows = x.abs().amax(-1, keepdim=True).clamp(min=LEAST)
            x = _node("QuantizeLinear", (x / rows, self.step, self.zero), torch.uint8, x.shape)
        weight = self.weight.T if self.shared else self.weight
        integers = _node("MatMulInteger", (x, weight, self.zero), torch.int32, (x.shape[0], weight.shape[1]))
        y = integers.to(torch.float32) * self.scale
        return self.add(y if rows is None else y * rows)


class Product4(_Biased):
    """`Linear4`, by ONNX Runtime's own operator: the standard has none that computes on 4 bits."""

    def __init__(self, linear: Linear4, scale: float = 1.0) -> None:
        super().__init__(linear.bias, scale)
        self.packed, self.scale = _fixed(linear.packed), _fixed(linear.scale * scale)
        self.width = linear.width

    def forward(self, x: Tensor) -> Tensor:
        """(M, in) -> (M, out)."""
        out = self.packed.shape[0]
        # Level 4 allows 8-bit inputs.
        attributes = {"K": self.width, "N": out, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
        inputs = (x, self.packed, self.scale, *([] if self.bias is None else [None, None, self.bias]))
        return _node("com.microsoft::MatMulNBits", inputs, torch.float32, (x.shape[0], out), attributes)


class QuantizedNorm(nn.Module):
    """A norm whose output feeds `Product8`s: (M, D) -> (M, D) uint8, 128 means 0."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.step, self.zero = _fixed(torch.tensor(NORMED_STEP)), _fixed(torch.tensor(128, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """(M, D) -> (M, D) uint8."""
        return _node("QuantizeLinear", (self.norm(x), self.step, self.zero), torch.uint8, x.shape)


class VocabularyHead(nn.Module):
    """Backbone (M, D) -> logits (M, V).

    `Gemm` reads the weight as (V, D), so that a tied embedding is stored once and nothing is transposed at every step.
    """

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        if not model.config.tie_embeddings and isinstance(model.head, Linear8):
            shared = model.head.weight is model.embedding.weight
            self.product: nn.Module | None = Product8(model.head, shared=shared)
        else:
            self.product = None
            self.weight = model.embedding.weight if model.config.tie_embeddings else model.head.weight

    def forward(self, backbone: Tensor) -> Tensor:
        """(M, D) -> (M, V)."""
        if self.product is not None:
            logits: Tensor = self.product(backbone)
            return logits
        shape = (backbone.shape[0], self.weight.shape[0])
        return _node("Gemm", (backbone, self.weight), torch.float32, shape, {"transB": 1})


def _node(
    operator: str,
    inputs: tuple[Tensor | None, ...],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    attributes: dict[str, Any] | None = None,
) -> Tensor:
    output: Tensor = torch.onnx.ops.symbolic(operator, inputs, attributes or {}, dtype=dtype, shape=shape)
    return output

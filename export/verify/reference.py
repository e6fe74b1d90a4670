"""MatMulNBits for ONNX's reference evaluator, which lacks this ONNX Runtime operator."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

__all__ = ["MatMulNBits"]


class MatMulNBits(OpRun):
    """`a @ b.T + bias` in float32, with b stored as packed 4-bit blocks."""

    op_domain = "com.microsoft"

    def _run(
        self, a: Any, packed: Any, scale: Any, zero: Any = None, group: Any = None, bias: Any = None, **attributes: Any
    ) -> tuple[Any]:
        levels = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:2], -1).astype(np.float32) - 8
        weight = (levels * scale.reshape(*packed.shape[:2], 1)).reshape(len(packed), -1)[:, : a.shape[-1]]
        y = a @ weight.T
        return (y if bias is None else y + bias,)

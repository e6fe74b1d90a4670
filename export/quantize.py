"""Fewer bits: a network whose products are computed on 8-bit or 4-bit integers, in PyTorch, as the graphs compute them.

int8: weights have a scale for each output. The inputs of the products after a norm have one fixed range, since
`rotate.py` has made them alike; those of the other products a range of their own for each row. So no row's numbers
depend on the other rows, and a candidate's score is the same in any batch.

int4: weights have a scale for each 32 inputs of each output, and rows one for each 32 inputs.

The embedding and the vocabulary head are int8 in both, stored once if they are tied. The norms, the attention and the
scorer stay float32.
"""

from __future__ import annotations

import copy

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.network import LanguageModel, TwoHeadedNetwork
from ..runtime.manifest import Precision
from .rotate import rotated

__all__ = ["BLOCK", "LEAST", "NORMED_STEP", "Embedding8", "Linear4", "Linear8", "quantized"]

# 127 steps reach 4.5 standard deviations: of a normal distribution 7 values in a million lie beyond and are cut.
NORMED_STEP = 4.5 / 127
BLOCK = 32
# In place of a range of nothing, which nothing can be divided by.
LEAST = 1e-30


class Linear8(nn.Module):
    """A linear layer with 8-bit weights and inputs."""

    def __init__(self, linear: nn.Linear, *, normed: bool) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = (weight.abs().amax(1) / 127).clamp(min=LEAST)
        self.weight = nn.Parameter((weight / scale[:, None]).round().to(torch.int8), requires_grad=False)
        """(out, in) int8."""
        self.scale = nn.Parameter(scale, requires_grad=False)
        """(out,): what one step of the weights means."""
        self.bias = linear.bias
        self.normed = normed
        """Whether the inputs come from a norm and have the fixed range."""
        # Kept, as a verification runs the layer thousands of times.
        self._levels = self.weight.to(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        step: Tensor | float = NORMED_STEP
        if not self.normed:
            step = (x.abs().amax(-1, keepdim=True) * (1 / 127)).clamp(min=LEAST)
        integers = F.linear((x / step).round().clamp(-128, 127), self._levels)
        y = integers * self.scale * step
        return y if self.bias is None else y + self.bias


class Linear4(nn.Module):
    """A linear layer with 4-bit weights and 8-bit inputs, both in blocks."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        out, width = weight.shape
        blocks = F.pad(weight, (0, -width % BLOCK)).reshape(out, -1, BLOCK)
        levels, scale = _four_bits(blocks)
        self.packed = nn.Parameter((levels[..., ::2] | levels[..., 1::2] << 4).to(torch.uint8), requires_grad=False)
        """(out, in / 32, 16) uint8: two weights a byte, the first in the low half, 8 means 0."""
        self.scale = nn.Parameter(scale, requires_grad=False)
        """(out, in / 32)."""
        self.bias = linear.bias
        self.width = width
        levels = torch.stack([self.packed & 15, self.packed >> 4], -1).flatten(-2).to(torch.float32) - 8
        self._weight = (levels * self.scale[..., None]).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        padded = F.pad(x, (0, -self.width % BLOCK))
        blocks = padded.reshape(*padded.shape[:-1], -1, BLOCK)
        step = (blocks.abs().amax(-1, keepdim=True) / 127).clamp(min=LEAST)
        return F.linear(((blocks / step).round() * step).flatten(-2), self._weight, self.bias)


class Embedding8(nn.Module):
    """A token embedding that reads the 8-bit weights of a vocabulary head, the same table (V, E)."""

    def __init__(self, head: Linear8) -> None:
        super().__init__()
        self.weight, self.scale = head.weight, head.scale

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 -> (..., E) float32."""
        return F.embedding(ids, self.weight).to(torch.float32) * F.embedding(ids, self.scale[:, None])


def quantized(model: LanguageModel | TwoHeadedNetwork, precision: Precision) -> LanguageModel | TwoHeadedNetwork:
    """A copy of a model at a precision; the model itself at fp32."""
    if precision == "fp32":
        return model
    if not isinstance(model, LanguageModel):
        return _network(model, precision)
    twin = LanguageModel.__new__(LanguageModel)
    nn.Module.__init__(twin)
    # The head is a layer of its own there, also where it shares the embedding's weights.
    twin.config = msgspec.structs.replace(model.config, tie_embeddings=False)
    twin.network = _network(model.network, precision)
    tied = model.config.tie_embeddings
    head = Linear8(_table(model.embedding) if tied else model.head, normed=False)
    table = head if tied else Linear8(_table(model.embedding), normed=False)
    _replace(twin, "head", head)
    _replace(twin, "embedding", Embedding8(table))
    return twin.eval()


def _network(network: TwoHeadedNetwork, precision: Precision) -> TwoHeadedNetwork:
    if precision == "int8":
        network = rotated(network)
        assert isinstance(network.input_projection, nn.Linear)
        _replace(network, "input_projection", Linear8(network.input_projection, normed=False))
    else:
        # Blocks of 32 weights with a scale each need no turn: it takes from them what they could adapt to.
        network = copy.deepcopy(network).requires_grad_(False)
    for block in network.layers():
        for part, names, normed in (
            (block.attention, ("q_proj", "k_proj", "v_proj"), True),
            (block.ffn, ("gate", "up"), True),
            (block.attention, ("out_proj",), False),
            (block.ffn, ("down",), False),
        ):
            for name in names:
                linear = getattr(part, name)
                _replace(part, name, Linear8(linear, normed=normed) if precision == "int8" else Linear4(linear))
    return network.eval()


def _replace(parent: nn.Module, name: str, module: nn.Module) -> None:
    """Another kind of module under a name, with the same inputs and outputs."""
    setattr(parent, name, module)


def _table(embedding: nn.Embedding) -> nn.Linear:
    """An embedding (V, E) as the linear layer E -> V that has its weights."""
    linear = nn.Linear(1, 1, bias=False)
    linear.weight = embedding.weight
    return linear


def _four_bits(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks (..., 32) -> levels 0..15 (int64) and scales (...), with the least squared error of a few scales."""
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    best = torch.full_like(extreme, torch.inf)
    scale = torch.ones_like(extreme)
    for share in torch.linspace(0.7, 1.05, 15).tolist():
        # The largest weight, of either sign, becomes -8: there is one more step on that side.
        tried = extreme * (share / -8)
        tried = torch.where(tried == 0, 1.0, tried)
        error = ((blocks / tried).round().clamp(-8, 7) * tried - blocks).square().sum(-1, keepdim=True)
        scale, best = torch.where(error < best, tried, scale), torch.minimum(error, best)
    return (blocks / scale).round().clamp(-8, 7).to(torch.int64) + 8, scale[..., 0]

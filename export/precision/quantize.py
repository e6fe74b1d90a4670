"""Quantization: a network with 16-, 8- or 4-bit weights in PyTorch, computed as the graphs compute it.

fp16 and bf16: only the weights of matrix products are rounded.

int8: weights have one scale per output. The inputs of products after a norm have one fixed range, because `rotate.py`
gives their features the same distribution; the inputs of other products have one scale per row. So have those of all
products of a network that cannot be rotated (LayerNorm, or norms behind the layers). No row's result
depends on other rows, so a candidate's score is the same in any batch.

int4: weights have one scale per output and block of 32 inputs; inputs have one scale per row and block of 32. The
products that lose the most accuracy (keys, values, and the last product of each feed-forward network) use 8 bits, with
one scale per row.

In both, inputs that `outliers.py` finds too large for 8 bits stay float32, and so do their weights.

Experts compute in float32 with weights of fewer bits (`stored.py`).

The embedding and the vocabulary head are quantized like the other products, or to int8 at int4, and stored once if they
are tied. Norms, attention and scorer stay float32.
"""

from __future__ import annotations

import copy

import msgspec
import torch
from torch import Tensor, nn

from bonnx.models.experts import Experts
from bonnx.models.network import LanguageModel, TwoHeadedNetwork
from bonnx.runtime.artifact.manifest import Precision

from .linear import Embedding8, Embedding16, Linear4, Linear8, Linear16
from .outliers import SplitLinear, find_outliers
from .rotate import rotatable, rotate
from .stored import stored

__all__ = ["quantized", "table"]

# At int4 these use 8 bits, because they lose the most accuracy: on SmolLM2 this halves the divergence from float32.
_EIGHT_OF_FOUR = ("k_proj", "v_proj", "down")
_HALVES: dict[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}


def quantized(
    model: LanguageModel | TwoHeadedNetwork, precision: Precision, *, consume: bool = False
) -> LanguageModel | TwoHeadedNetwork:
    """Return a copy of a model at a precision; at fp32, the model itself.

    With `consume`, the model's own layers are replaced one by one, so that there is never a second model in memory.
    """
    if precision == "fp32":
        return model
    outliers = {} if precision in _HALVES else find_outliers(model)
    if not isinstance(model, LanguageModel):
        return _network(model, precision, outliers, consume)
    twin = LanguageModel.__new__(LanguageModel)
    nn.Module.__init__(twin)
    # The quantized head is a separate layer, even if it shares the embedding's weights.
    twin.config = msgspec.structs.replace(model.config, tie_embeddings=False)
    final_norm = model.network.final_norm
    twin.network = _network(model.network, precision, outliers, consume)
    tied, headless = model.config.tie_embeddings, not model.config.vocabulary_head
    if headless:
        embedding = table(model.embedding)
        is_half = precision in _HALVES
        rows = (
            Embedding16(Linear16(embedding, _HALVES[precision]))
            if is_half
            else Embedding8(Linear8(embedding, normed=False))
        )
        _replace(twin, "embedding", rows)
        return twin.eval()
    tables = [table(model.embedding)] if tied else [model.head, table(model.embedding)]
    if precision in _HALVES:
        # Without rotation, the final norm is the model's own.
        head = Linear16(tables[0], _HALVES[precision], final_norm)
        _replace(twin, "head", head)
        _replace(twin, "embedding", Embedding16(head if tied else Linear16(tables[1], _HALVES[precision])))
    else:
        eights = [Linear8(linear, normed=False) for linear in tables]
        _replace(twin, "head", eights[0])
        _replace(twin, "embedding", Embedding8(eights[-1]))
    return twin.eval()


def _network(
    original: TwoHeadedNetwork, precision: Precision, outliers: dict[nn.Module, Tensor], consume: bool
) -> TwoHeadedNetwork:
    network = original if consume else copy.deepcopy(original)
    nothing = stream = torch.empty(0, dtype=torch.int64)
    rotated = precision == "int8" and rotatable(original.config)
    if rotated:
        norms = [norm for block in original.layers() for norm in (block.attention_norm, block.ffn_norm)]
        stream = torch.unique(torch.cat([outliers[norm] for norm in norms]))
        rotate(network, stream)
    # int4 is not rotated: blocks of 32 weights adapt their scales to differences that a rotation would remove.
    network.requires_grad_(False)
    if precision != "int4" and isinstance(network.input_projection, nn.Linear):
        _replace(network, "input_projection", _layer(network.input_projection, precision, None, nothing))
    for before, block in zip(original.layers(), network.layers(), strict=True):
        parts: list[tuple[str, tuple[str, ...], nn.Module | None]] = [
            ("attention", ("q_proj", "k_proj", "v_proj"), block.attention_norm),
            ("attention", ("out_proj",), None),
        ]
        if isinstance(block.ffn, Experts):
            _store_experts(block.ffn, precision)
        else:
            parts += [("ffn", ("gate", "up"), block.ffn_norm), ("ffn", ("down",), None)]
        for part, names, norm in parts:
            parent = getattr(block, part)
            for name in names:
                layer_outliers = outliers.get(getattr(getattr(before, part), name), nothing)
                if rotated and norm is not None:
                    layer_outliers = stream
                bits: Precision = "int8" if precision == "int4" and name in _EIGHT_OF_FOUR else precision
                bounded = precision in _HALVES or (rotated and bits == precision)
                known = norm if bounded and not isinstance(norm, nn.Identity) else None
                _replace(parent, name, _layer(getattr(parent, name), bits, known, layer_outliers))
    return network.eval()


def _store_experts(ffn: Experts, precision: Precision) -> None:
    for expert in ffn.experts:
        for name in ("gate", "up", "down"):
            bits: Precision = "int8" if precision == "int4" and name in _EIGHT_OF_FOUR else precision
            _replace(expert, name, stored(getattr(expert, name), bits))


def _layer(linear: nn.Linear, precision: Precision, norm: nn.Module | None, outliers: Tensor) -> nn.Module:
    """Return a layer at a precision, given the norm that produces its inputs, if any, and its outliers."""
    if precision in _HALVES:
        return Linear16(linear, _HALVES[precision], norm)
    if len(outliers):
        # Once the outliers are removed, the fixed range no longer applies to the other inputs.
        return SplitLinear(linear, outliers, lambda others: _layer(others, precision, None, outliers[:0]))
    return Linear8(linear, normed=norm is not None) if precision == "int8" else Linear4(linear)


def _replace(parent: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a submodule by another type of module with the same inputs and outputs."""
    setattr(parent, name, module)


def table(embedding: nn.Embedding) -> nn.Linear:
    """Return the linear layer E -> V that has the weights (V, E) of an embedding."""
    linear = nn.Linear(1, 1, bias=False)
    linear.weight = embedding.weight
    return linear

"""Run rows through PyTorch twice, in float64 and in the graphs' arithmetic; the difference is rounding error.

A trained network's residual stream may hold values of 26,000 next to a median of 2, so no fixed tolerance fits every
network. Instead, PyTorch's own error against float64 on the same rows shows how exact a precision can be, and ONNX
Runtime may err by `FACTOR` times as much. This holds for 8 and 4 bits too: rounding the inputs is part of such a model,
and an input halfway between two quantization levels may round either way, in PyTorch as in ONNX Runtime.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bonnx.models.network import LanguageModel, TwoHeadedNetwork, final_logits
from bonnx.models.scorer_kinds import GatedScorer
from bonnx.runtime.artifact.manifest import Scoring
from bonnx.runtime.selection.gate import last_header

from ..precision.linear import Linear4, Linear8, Linear16
from ..precision.quantize import table

__all__ = ["FACTOR", "Exact", "Outputs", "Tolerances", "activated", "certainty", "score_rows"]

Array = NDArray[Any]

# PyTorch and ONNX Runtime sum in different orders. docs/precision.md lists the measured ratios.
FACTOR = 8.0
# A lower bound for when PyTorch happens to be exact: 8 times the float32 spacing at the largest value.
_FLOOR = 8 * 2.0**-23
# Logits that are computed at a time: enough that reading the vocabulary's weights does not decide the time.
_LOGITS = 2**22


class Tolerances:
    """The tolerance of ONNX Runtime against float64, for each kind of output.

    Attributes:
        errors: for each kind, PyTorch's maximum absolute error in the graphs' arithmetic.
    """

    def __init__(self) -> None:
        self.errors: dict[str, float] = {}
        self._largest: dict[str, float] = {}

    def update(self, kind: str, exact: Array, rounded: Array) -> None:
        """Take into account an output in float64, and the same output in the graphs' arithmetic."""
        for maxima, values in ((self.errors, rounded - exact), (self._largest, exact)):
            maxima[kind] = max(maxima.get(kind, 0.0), float(np.abs(values).max(initial=0.0)))

    def allowed(self, kind: str) -> float:
        """Return the maximum absolute error that passes."""
        return max(FACTOR * self.errors[kind], _FLOOR * self._largest[kind])


class Outputs(NamedTuple):
    """A network's outputs: backbone (B, T, D), and scores (B, T) after the activation.

    Without a scorer, the score at a position is the self-certainty of the next token.
    """

    backbone: Tensor
    scores: Tensor


class Exact:
    """Computes whole, unpadded rows in float64 and in the graphs' arithmetic.

    Layers are widened to float64 one at a time, each for all rows, so no second copy of the model is held in memory.
    """

    def __init__(self, model: LanguageModel | TwoHeadedNetwork, scoring: Scoring) -> None:
        self._model, self._scoring = model, scoring
        self._network = model.network if isinstance(model, LanguageModel) else model
        self._heads: tuple[nn.Module, nn.Module] | None = None

    def rows(self, batches: Sequence[Array], tolerances: Tolerances) -> list[tuple[Outputs, Outputs]]:
        """Batches of rows (B, T[, E]) -> for each, the exact outputs and those in the graphs' arithmetic.

        Args:
            batches: token ids or embeddings.
            tolerances: is updated with PyTorch's errors of `backbone` and `scores`.
        """
        pairs = list(zip(self._run(batches, _widened), self._run(batches, _as_graphs), strict=True))
        for exact, rounded in pairs:
            for kind, a, b in zip(Outputs._fields, exact, rounded, strict=True):
                tolerances.update(kind, a.numpy(), b.numpy())
        return pairs

    def logits(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[Array, Array]]:
        """Pairs of backbones (T, D) from `rows` -> for each its logits (T, V), of many at a time."""
        assert isinstance(self._model, LanguageModel)
        most, begin = _LOGITS // self._model.config.vocab_size, 0
        while begin < len(pairs):
            end = begin + 1
            while end < len(pairs) and sum(len(exact) for exact, _ in pairs[begin : end + 1]) <= most:
                end += 1
            together = zip(*pairs[begin:end], strict=True)
            with torch.no_grad():
                wide, narrow = (self._logits(torch.cat(parts), form) for form, parts in enumerate(together))
            sizes = [len(exact) for exact, _ in pairs[begin:end]]
            for exact, rounded in zip(torch.split(wide, sizes), torch.split(narrow, sizes), strict=True):
                yield exact.numpy(), rounded.numpy()
            begin = end

    def rounded_logits(self, row: Array, positions: slice) -> Array:
        """Token ids (T,) -> logits of some positions (., V) in the graphs' arithmetic only, which is much faster."""
        (outputs,) = self._run([row[None]], _as_graphs)
        with torch.no_grad():
            logits: Array = self._logits(outputs.backbone[0, positions], 1).numpy()
        return logits

    def _logits(self, backbone: Tensor, form: int) -> Tensor:
        """(..., D) -> (..., V), in float64 (form 0) or in the graphs' arithmetic (1)."""
        assert isinstance(self._model, LanguageModel)
        return final_logits(self._vocabulary()[form](backbone), self._model.config)

    def _vocabulary(self) -> tuple[nn.Module, nn.Module]:
        """Return the vocabulary head in float64 and in the graphs' arithmetic."""
        assert isinstance(self._model, LanguageModel)
        if self._heads is None:
            head = table(self._model.embedding) if self._model.config.tie_embeddings else self._model.head
            self._heads = _widened(head), _as_graphs(head)
        return self._heads

    # A decorator, because two of these generators alternate and a `with` block in each would undo the other's setting.
    @torch.no_grad()
    def _run(self, batches: Sequence[Array], form: Callable[[nn.Module], nn.Module]) -> Iterator[Outputs]:
        network, states = self._network, []
        entry = form(network.input_projection)
        dtype = torch.float64 if form is _widened else torch.float32
        for rows in batches:
            values = torch.from_numpy(rows)
            x = (self._model.embedding(values) if isinstance(self._model, LanguageModel) else values).to(dtype)
            states.append((entry(x * network.config.embedding_scale), *network.surroundings(x)))
        for i, layer in enumerate(network.layers()):
            block = form(layer)
            states = [(block(x, rotations[i], masks[i]), rotations, masks) for x, rotations, masks in states]
        norm, scorer = form(network.final_norm), form(network.scorer)
        for (x, *_), rows in zip(states, batches, strict=True):
            backbone = norm(x)
            if network.config.has_scorer:
                yield Outputs(backbone, scored(scorer, backbone, rows, self._scoring))
            else:
                yield Outputs(backbone, certainty(self._logits(backbone, int(form is not _widened))))


def _widened(module: nn.Module) -> nn.Module:
    """Return a copy that computes in float64 with the module's weights."""
    wide = copy.deepcopy(module).double()
    for part in wide.modules():
        if isinstance(part, Linear8 | Linear4):
            part.keep(torch.float64)
    return wide


def _as_graphs(module: nn.Module) -> nn.Module:
    """Return the module, or a copy whose float16 products round inputs and outputs to float16, as the graphs do."""
    if not any(isinstance(part, Linear16) and part.weight.dtype == torch.float16 for part in module.modules()):
        return module
    halves = copy.deepcopy(module)
    for part in halves.modules():
        if isinstance(part, Linear16):
            part.forward = part.in_halves  # type: ignore[method-assign]
    return halves


def activated(scores: Tensor, scoring: Scoring) -> Tensor:
    """The scorer's outputs (..., num_labels) -> the score (...), with the label and activation that the graphs use."""
    if scoring.activation == "softmax":
        scores = scores.softmax(-1)
    scores = scores[..., scoring.label]
    return scores.sigmoid() if scoring.activation == "sigmoid" else scores


def scored(scorer: nn.Module, backbone: Tensor, rows: Array, scoring: Scoring) -> Tensor:
    """Backbone (B, T, D) of rows (B, T[, E]) -> the scores of their positions (B, T), as the graphs compute them."""
    labels: Tensor = scorer(backbone)
    if not scoring.gate_tokens:
        return activated(labels, scoring)
    assert isinstance(scorer, GatedScorer)
    places = torch.tensor([last_header(row, scoring.gate_tokens) for row in rows])
    coefficients = scorer.coefficients(backbone[torch.arange(len(rows)), places.clamp(min=0)])
    scores = torch.where(places[:, None] >= 0, (labels * coefficients[:, None]).sum(-1), torch.nan)
    return scores.sigmoid() if scoring.activation == "sigmoid" else scores


def certainty(logits: Tensor) -> Tensor:
    """Self-certainty of the next token (Kang et al., 2025): (..., V) -> (...), the mean over tokens of -log(V p)."""
    return -(logits.log_softmax(-1) + math.log(logits.shape[-1])).mean(-1)


def score_rows(
    model: LanguageModel | TwoHeadedNetwork, rows: Array, scoring: Scoring, mask: Array | None = None
) -> tuple[Array, Array]:
    """Run whole rows through PyTorch: backbone (B, T, D), and scores (B, T) after the activation; no logits.

    Without a scorer, the scores are the self-certainties of the next tokens.
    """
    values = torch.from_numpy(rows)
    network = model.network if isinstance(model, LanguageModel) else model
    with torch.no_grad():
        if isinstance(model, LanguageModel):
            values = model.embedding(values)
        backbone = network.encode(values, None if mask is None else torch.from_numpy(mask))
        if isinstance(model, LanguageModel) and not network.config.has_scorer:
            return backbone.numpy(), certainty(model.logits(backbone)).numpy()
        return backbone.numpy(), scored(network.scorer, backbone, rows, scoring).numpy()

"""Rows through PyTorch twice: in float64, and in the arithmetic of the graphs. What lies between is rounding.

A trained network's residual stream may hold 26,000 beside a median of 2, so no fixed tolerance fits every network. What
a precision can do is seen in PyTorch itself: its error against float64 on the same rows. ONNX Runtime may err `FACTOR`
times as much. 8 and 4 bits are no exception: the rounding of inputs is part of such a model, and an input that lies on
the border between two steps falls on either side, in PyTorch's arithmetic as in ONNX Runtime's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bonnx.models.network import LanguageModel, TwoHeadedNetwork
from bonnx.runtime.artifact.manifest import Scoring

from ..precision.quantize import Linear4, Linear8, Linear16, table

__all__ = ["FACTOR", "Bar", "Exact", "Outputs", "activated", "score_rows"]

Array = NDArray[Any]

# Two engines add in another order. docs/precision.md has the ratios that were measured.
FACTOR = 8.0
# Where PyTorch is exact by chance: 8 times the spacing of float32 at the largest value.
_FLOOR = 8 * 2.0**-23


class Bar:
    """What ONNX Runtime may differ from float64 by, for each kind of output.

    Attributes:
        own: for each kind, PyTorch's maximum absolute error in the arithmetic of the graphs.
    """

    def __init__(self) -> None:
        self.own: dict[str, float] = {}
        self._largest: dict[str, float] = {}

    def see(self, kind: str, exact: Array, own: Array) -> None:
        """Take in one kind of output of the same rows: in float64, and in the arithmetic of the graphs."""
        for seen, values in ((self.own, own - exact), (self._largest, exact)):
            seen[kind] = max(seen.get(kind, 0.0), float(np.abs(values).max(initial=0.0)))

    def allowed(self, kind: str) -> float:
        """The maximum absolute error that passes."""
        return max(FACTOR * self.own[kind], _FLOOR * self._largest[kind])


class Outputs(NamedTuple):
    """What a network gives for rows: backbone (B, T, D) and scores (B, T), the activation applied."""

    backbone: Tensor
    scores: Tensor


class Exact:
    """Whole, unpadded rows in float64 and in the arithmetic of the graphs.

    Layer after layer is widened to float64, for all rows at once: the memory of a second model is never taken.
    """

    def __init__(self, model: LanguageModel | TwoHeadedNetwork, scoring: Scoring) -> None:
        self._model, self._scoring = model, scoring
        self._network = model.network if isinstance(model, LanguageModel) else model
        self._heads: tuple[nn.Module, nn.Module] | None = None

    def rows(self, batches: Sequence[Array], bar: Bar) -> list[tuple[Outputs, Outputs]]:
        """Batches of rows (B, T[, E]) -> for each what is exact, and what PyTorch gives in the graphs' arithmetic.

        Args:
            batches: token ids or embeddings.
            bar: sees PyTorch's errors of `backbone` and `scores`.
        """
        pairs = list(zip(self._run(batches, _widened), self._run(batches, _as_graphs), strict=True))
        for exact, own in pairs:
            for kind, a, b in zip(Outputs._fields, exact, own, strict=True):
                bar.see(kind, a.numpy(), b.numpy())
        return pairs

    def logits(self, exact: Tensor, own: Tensor) -> tuple[Array, Array]:
        """Two backbones (T, D), as `rows` gives them -> their logits (T, V)."""
        with torch.no_grad():
            wide, same = (head(x).numpy() for head, x in zip(self._vocabulary(), (exact, own), strict=True))
        return wide, same

    def own_logits(self, row: Array) -> Array:
        """Token ids (T,) -> logits (T, V) in the arithmetic of the graphs alone, which takes far less time."""
        (outputs,) = self._run([row[None]], _as_graphs)
        with torch.no_grad():
            logits: Array = self._vocabulary()[1](outputs.backbone[0]).numpy()
        return logits

    def _vocabulary(self) -> tuple[nn.Module, nn.Module]:
        """The vocabulary head in float64 and as the graphs compute it."""
        assert isinstance(self._model, LanguageModel)
        if self._heads is None:
            head = table(self._model.embedding) if self._model.config.tie_embeddings else self._model.head
            self._heads = _widened(head), _as_graphs(head)
        return self._heads

    # As a decorator: two of these are read in turns, and each block would restore what the other has set.
    @torch.no_grad()
    def _run(self, batches: Sequence[Array], form: Callable[[nn.Module], nn.Module]) -> Iterator[Outputs]:
        network, states = self._network, []
        entry = form(network.input_projection)
        dtype = torch.float64 if form is _widened else torch.float32
        for rows in batches:
            values = torch.from_numpy(rows)
            x = (self._model.embedding(values) if isinstance(self._model, LanguageModel) else values).to(dtype)
            states.append((entry(x), *network.surroundings(x)))
        for i, layer in enumerate(network.layers()):
            block = form(layer)
            states = [(block(x, cos, sin, masks[i]), cos, sin, masks) for x, cos, sin, masks in states]
        norm, scorer = form(network.final_norm), form(network.scorer)
        for x, *_ in states:
            backbone = norm(x)
            yield Outputs(backbone, activated(scorer(backbone), self._scoring))


def _widened(module: nn.Module) -> nn.Module:
    """A copy that computes in float64, with the weights that the module has."""
    wide = copy.deepcopy(module).double()
    for part in wide.modules():
        if isinstance(part, Linear8 | Linear4):
            part.keep(torch.float64)
    return wide


def _as_graphs(module: nn.Module) -> nn.Module:
    """The module, or a copy whose products of float16 round inputs and outputs to it, as those of the graphs do."""
    if not any(isinstance(part, Linear16) and part.weight.dtype == torch.float16 for part in module.modules()):
        return module
    halves = copy.deepcopy(module)
    for part in halves.modules():
        if isinstance(part, Linear16):
            part.forward = part.in_halves  # type: ignore[method-assign]
    return halves


def activated(scores: Tensor, scoring: Scoring) -> Tensor:
    """What PyTorch's scorer gives, (..., num_labels) -> the score (...), as the graphs give it."""
    if scoring.activation == "softmax":
        scores = scores.softmax(-1)
    scores = scores[..., scoring.label]
    return scores.sigmoid() if scoring.activation == "sigmoid" else scores


def score_rows(
    model: LanguageModel | TwoHeadedNetwork, rows: Array, scoring: Scoring, mask: Array | None = None
) -> tuple[Array, Array]:
    """Whole rows through PyTorch: backbone (B, T, D) and scores (B, T), the activation applied; no logits."""
    values = torch.from_numpy(rows)
    network = model.network if isinstance(model, LanguageModel) else model
    with torch.no_grad():
        if isinstance(model, LanguageModel):
            values = model.embedding(values)
        backbone, scores = network(values, None if mask is None else torch.from_numpy(mask))
    return backbone.numpy(), activated(scores, scoring).numpy()

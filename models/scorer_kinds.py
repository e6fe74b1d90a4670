"""The kinds of scorer, which map the normed backbone to one value per label at every position.

To add one, add a subclass of `Scorer` to `KINDS` and its name to `NetworkConfig.scorer_kind`. The graphs are traced
from the same class, with its linear layers replaced by the graphs' own products.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import NetworkConfig

__all__ = ["KINDS", "GatedScorer", "LinearScorer", "MlpScorer", "NoScorer", "Scorer", "make_scorer"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
}


class Scorer(nn.Module):
    """Base class of all kinds: (..., D) -> (..., num_labels), for any number of leading axes."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def readers(self) -> list[nn.Linear]:
        """The layers that read the backbone; changes of its scale or mean are folded into their weights."""
        raise NotImplementedError

    @property
    def last(self) -> str:
        """Name of the layer that outputs the labels; reward normalization is folded into it."""
        return "dense2"


class LinearScorer(Scorer):
    """One linear layer."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self.dense2 = nn.Linear(config.hidden_size, config.num_labels, bias=config.scorer_bias)

    @property
    def readers(self) -> list[nn.Linear]:
        return [self.dense2]

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., num_labels)."""
        out: Tensor = self.dense2(x)
        return out


class MlpScorer(Scorer):
    """Linear layers `dense1`, `dense2` and so on, with an activation between them (the original's scorer has two)."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(config.dropout)
        sizes = [config.hidden_size, *config.scorer_sizes, config.num_labels]
        self.count = len(sizes) - 1
        for i in range(self.count):
            self.add_module(f"dense{i + 1}", nn.Linear(sizes[i], sizes[i + 1], bias=config.scorer_bias))

    @property
    def readers(self) -> list[nn.Linear]:
        first = self.get_submodule("dense1")
        assert isinstance(first, nn.Linear)
        return [first]

    @property
    def last(self) -> str:
        return f"dense{self.count}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., num_labels)."""
        activation = _ACTIVATIONS[self.config.scorer_activation]
        for i in range(1, self.count):
            x = self.dropout(activation(self.get_submodule(f"dense{i}")(x)))
        out: Tensor = self.get_submodule(self.last)(x)
        return out


class GatedScorer(Scorer):
    """Several objectives, whose coefficients a gate computes from one position of the prompt; see `gate.py`."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self.dense2 = nn.Linear(config.hidden_size, config.num_labels, bias=config.scorer_bias)
        self.gate = MlpScorer(msgspec.structs.replace(config, scorer_bias=True))
        self.mix = nn.Linear(config.num_labels, config.num_labels, bias=False)

    @property
    def readers(self) -> list[nn.Linear]:
        return [self.dense2, *self.gate.readers]

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> the objectives (..., num_labels)."""
        out: Tensor = self.dense2(x)
        return out

    def coefficients(self, x: Tensor) -> Tensor:
        """Output at the header of the assistant's turn (..., D) -> the objectives' coefficients (..., num_labels)."""
        out: Tensor = self.mix(self.gate(x).softmax(-1))
        return out


class NoScorer(Scorer):
    """No weights: the scores of a language model without a scorer are unknown."""

    @property
    def readers(self) -> list[nn.Linear]:
        return []

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., 1), NaN."""
        return x.new_full((*x.shape[:-1], 1), math.nan)


KINDS: dict[str, type[Scorer]] = {"mlp": MlpScorer, "linear": LinearScorer, "gated": GatedScorer, "none": NoScorer}


def make_scorer(config: NetworkConfig) -> Scorer:
    """Make a network's scorer, with new weights."""
    return KINDS[config.scorer_kind](config)

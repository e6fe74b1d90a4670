"""The kinds of scorer: what reads the normed backbone and gives one value per label at every position.

A new kind is a subclass of `Scorer` in `KINDS`, and its name in `NetworkConfig.scorer_kind`. The graphs are traced from
the same class, with its linear layers exchanged for the graphs' own products, so that it is written once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from .config import NetworkConfig

__all__ = ["KINDS", "LinearScorer", "MlpScorer", "Scorer", "make_scorer"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "relu": F.relu}


class Scorer(nn.Module):
    """The base of every kind: (..., D) -> (..., num_labels), for any number of leading axes.

    Attributes:
        dense2: the last layer, which gives the labels; the normalization of rewards is folded into it.
    """

    dense2: nn.Linear

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def readers(self) -> list[nn.Linear]:
        """The layers that read the backbone: a change of its scale or mean is folded into their weights."""
        raise NotImplementedError


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
    """Two linear layers with an activation between them (the original's scorer)."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self.dense1 = nn.Linear(config.hidden_size, config.scorer_hidden, bias=config.scorer_bias)
        self.dropout = nn.Dropout(config.dropout)
        self.dense2 = nn.Linear(config.scorer_hidden, config.num_labels, bias=config.scorer_bias)

    @property
    def readers(self) -> list[nn.Linear]:
        return [self.dense1]

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., num_labels)."""
        hidden = _ACTIVATIONS[self.config.scorer_activation](self.dense1(x))
        out: Tensor = self.dense2(self.dropout(hidden))
        return out


KINDS: dict[str, type[Scorer]] = {"mlp": MlpScorer, "linear": LinearScorer}


def make_scorer(config: NetworkConfig) -> Scorer:
    """The scorer of a network, with fresh weights."""
    return KINDS[config.scorer_kind](config)

"""The network: configurations (without torch), PyTorch modules and checkpoints.

torch is imported only when a name that needs it is accessed.
"""

from __future__ import annotations

import importlib
from typing import Any

from .config import ConfigError, LanguageModelConfig, NetworkConfig, RopeScaling, ffn_inner_size
from .head import LabelTokens

_TORCH = {
    "LanguageModel": ".network",
    "TwoHeadedNetwork": ".network",
    "build": ".network",
    "output_size": ".network",
    "recommended_defaults": ".network",
    "select_best_of_n": ".network",
    "from_edifice": ".edifice",
    "load_checkpoint": ".checkpoint",
    "save_checkpoint": ".checkpoint",
    "draw_examples": ".scorer",
    "train_scorer": ".scorer",
}

__all__ = [
    "ConfigError",
    "LabelTokens",
    "LanguageModelConfig",
    "NetworkConfig",
    "RopeScaling",
    "ffn_inner_size",
    *sorted(_TORCH),
]


def __getattr__(name: str) -> Any:
    if name in _TORCH:
        return getattr(importlib.import_module(_TORCH[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Refuse models that judge pairs of candidates, which are recognized by their names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .config import ConfigError

__all__ = ["check_pairs"]

_NAMED = re.compile(r"pair-?(rm|ranker)\b|pair-?preference", re.IGNORECASE)


def check_pairs(name: str, config: Mapping[str, Any] | None = None) -> None:
    """Refuse PairRM, pair-preference-LLaMA and models that say they were made from one of them.

    Args:
        name: the checkpoint's id on the hub, or the name of its folder.
        config: its config.json.

    Raises:
        ConfigError: with the reason.
    """
    config = config or {}
    classes = config.get("architectures")
    says = [
        name,
        config.get("_name_or_path"),
        config.get("ranker_type"),
        *(classes if isinstance(classes, list) else []),
    ]
    for text in says:
        # The name of a class continues with another word.
        if isinstance(text, str) and (_NAMED.search(text) or text.endswith("PairRM")):
            raise ConfigError(
                f"{text!r} names a model that reads two candidates and says which is better: it gives no candidate a "
                "score of its own, and choosing among N takes up to N (N - 1) runs without a shared prompt; pass a "
                "reward model, such as RLHFlow/ArmoRM-Llama3-8B-v0.1. If this is another model, rename its folder, or "
                "change what config.json says"
            )

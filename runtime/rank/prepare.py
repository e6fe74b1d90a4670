"""Read a prompt before its candidates are there."""

from __future__ import annotations

from ..arrays import Array
from ..artifact.limits import check_size
from ..engine.engine import Engine
from ..selection.gate import last_header
from ..text.reader import Item

__all__ = ["prepare", "read_prompt"]


def prepare(engine: Engine, prompt: Item, instruction: str | None = None) -> bool:
    """Compute a prompt for the rankings to come: see `Model.prepare`, whose errors these are."""
    ids = read_prompt(engine, prompt, instruction)
    if ids is None:
        return False
    engine.prompts.read(ids)
    return True


def read_prompt(engine: Engine, prompt: Item, instruction: str | None = None) -> Array | None:
    """The prompt to compute, (P,) int64 or (P, embed_dim) float32; None if it cannot be kept.

    Raises:
        InputError: it is invalid or too long.
    """
    values = engine.reader.prompt(prompt, instruction=instruction)
    if not len(values):
        return None
    check_size(engine.manifest, 1, len(values), 1, engine.memory_limit)
    header = engine.manifest.scoring.gate_tokens
    if header and last_header(values, header) < 0:
        # The gate reads each candidate, so nothing of them is shared.
        return None
    # With dynamic or longrope scaling, the keys of a longer row depend on its length.
    return values if len(values) < engine.joint_limit and engine.prompts.keeps(len(values)) else None

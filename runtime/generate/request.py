"""A prompt to continue and the options, read and checked."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from bonnx.errors import InputError

from ..arrays import Array
from ..artifact.limits import check_size
from ..batching import Shape
from ..engine.engine import Engine
from ..selection.aggregate import is_stepwise
from ..text.reader import Item
from .options import CheckedOptions, GenerateOptions, check_options

__all__ = ["GenerateRequest", "options_within", "read_request"]


@dataclass(frozen=True, eq=False)
class GenerateRequest:
    """A prompt and how to continue it.

    Attributes:
        prompt: (P,) int64.
        options: how to generate.
        key: only requests with equal keys run together; None for one that runs alone.
    """

    prompt: Array
    options: CheckedOptions
    key: Hashable

    @property
    def shape(self) -> Shape:
        return Shape(self.options.n, len(self.prompt), self.options.max_new_tokens)

    @property
    def tokens(self) -> int:
        return self.options.n * self.options.max_new_tokens

    @property
    def prompt_slot(self) -> Hashable:
        # Each has its own slot, even if prompts are equal.
        return id(self)


def read_request(engine: Engine, prompt: Item, options: GenerateOptions) -> GenerateRequest:
    """Read and check a prompt and the options.

    Raises:
        InputError: an option or the prompt is invalid.
        ArtifactError: the artifact has no language model.
    """
    engine.session("generate")
    ids = engine.reader.prompt(prompt)
    checked = options_within(engine, ids, options, engine.manifest.limits.max_tokens - len(ids))
    joins = len(ids) + checked.max_new_tokens <= engine.joint_limit and not checked.needs_host
    return GenerateRequest(ids, checked, _key(engine, checked) if joins else None)


def _key(engine: Engine, options: CheckedOptions) -> Hashable:
    """The key of a request that may run together with others."""
    # Graphs of older artifacts take one value of each option for all prompts.
    return "generate" if engine.manifest.graphs["generate"].per_prompt else options


def options_within(engine: Engine, prompt: Array, options: GenerateOptions, room: int) -> CheckedOptions:
    """The options of a generation, complete and checked.

    Args:
        engine: its limits apply.
        prompt: (P,) int64.
        options: as they were passed.
        room: the default of `max_new_tokens`.

    Raises:
        InputError: an option is invalid or exceeds the artifact's limits.
    """
    scoring = engine.manifest.scoring
    stops = engine.reader.stops(options.get("stop"), scoring)
    checked = check_options(options, stops, scoring.aggregation, max(1, room))
    if is_stepwise(checked.aggregation) and scoring.step_token is None:
        raise InputError("a step aggregation needs a step token, and the artifact's scoring rule has none")
    check_size(engine.manifest, checked.n, len(prompt), checked.max_new_tokens, engine.memory_limit)
    return checked

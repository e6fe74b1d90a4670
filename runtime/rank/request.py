"""A prompt and candidates, read and checked."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np

from bonnx.errors import InputError

from ..arrays import Array
from ..artifact.limits import check_size
from ..batching import CALL_TOKENS, Shape
from ..checks import ARGUMENTS, ArgumentNames, check_flag, check_some
from ..engine.engine import Engine
from ..selection.aggregate import aggregation_code, is_stepwise
from ..selection.vote import Answers, Ballot, make_ballot
from ..text.padding import pad, step_mask
from ..text.reader import EncodedRows, Item
from .gate import with_shared_gate

__all__ = ["RankOptions", "RankRequest", "pad_rows", "read_request", "readable_positions"]


# A shared beginning is kept if it has this many times the tokens that a run costs beside its own.
_WORTH = 4


class RankOptions(TypedDict, total=False):
    """How to rank: the options of `Model.rank`."""

    aggregation: str | None
    step_masks: Sequence[Sequence[int]] | None
    partial: bool
    truncate: bool
    instruction: str | None
    vote: str
    answers: Answers | None


@dataclass(frozen=True, eq=False)
class RankRequest:
    """A prompt and its candidates.

    Attributes:
        candidates: as they were passed.
        aggregation: how the scores of a candidate's tokens become one.
        ballot: the answers that they vote for.
        rows: prompt and candidates as the reader read them.
        values: the candidates, padded, (N, T) int64 or (N, T, embed_dim) float32.
        mask: (N, T) int64.
        steps: (N, T) int64, 1 where the aggregation may read, or (1, 1) for everywhere.
        joins: whether it may run together with others.
        continues: whether the prompt was read ahead, so that only the candidates are computed.
        beginning: number of the prompt's first tokens that other prompts share, and that are kept for all of them; 0 if
            it has nothing to do with others.
        moved: number of the prompt's last tokens that every row of `values` begins with, instead of the prompt's.
        prompt_slot: equal for requests of the same prompt, which share its slot.
    """

    candidates: Sequence[Item]
    aggregation: str
    ballot: Ballot
    rows: EncodedRows
    values: Array
    mask: Array
    steps: Array
    joins: bool = True
    continues: bool = False
    beginning: int = 0
    moved: int = 0
    prompt_slot: Hashable = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_slot", self.prompt.tobytes())

    @property
    def prompt(self) -> Array:
        """(P,) int64 or (P, embed_dim) float32."""
        assert self.rows.prompt is not None
        return self.rows.prompt

    @property
    def key(self) -> Hashable:
        if not self.joins or not len(self.prompt):
            # Without a prompt to share another graph runs.
            return None
        after: Hashable = None
        if self.continues:
            # After a prompt that is kept another graph runs, too: it reads one prompt.
            after = self.prompt_slot
        elif self.beginning:
            after = self.prompt[: self.beginning].tobytes(), len(self.prompt) > self.beginning
        return self.aggregation, self.ballot.vote, after

    @property
    def kept(self) -> int:
        """Number of the prompt's tokens that need not be computed."""
        return len(self.prompt) if self.continues else self.beginning

    @property
    def shape(self) -> Shape:
        return Shape(len(self.values), len(self.prompt), self.values.shape[1], self.kept)

    @property
    def tokens(self) -> int:
        return int(self.mask.sum())

    @property
    def sent(self) -> Shape:
        """Its size with a whole prompt, of which nothing is kept: that of the same request without company."""
        return Shape(len(self.values), len(self.prompt) + self.moved, self.values.shape[1] - self.moved)

    @property
    def sent_tokens(self) -> int:
        """Tokens of the prompt and of the candidates, each once."""
        return self.sent.prompt + self.tokens - self.moved * int(self.mask.any(1).sum())


def read_request(
    engine: Engine,
    prompt: Item,
    candidates: Sequence[Item],
    *,
    aggregation: str | None = None,
    step_masks: Sequence[Sequence[int]] | None = None,
    partial: bool = False,
    truncate: bool = False,
    instruction: str | None = None,
    vote: str = "score",
    answers: Answers | None = None,
    names: ArgumentNames = ARGUMENTS,
    share: bool = False,
) -> RankRequest:
    """Read and check a prompt and its candidates; the arguments are those of `Model.rank`, and their names for errors.

    With `share`, what the prompt and earlier ones begin with is kept for those to come.

    Raises:
        InputError: an argument is invalid; it is named.
    """
    engine.check_scorer("ranking")
    scoring = engine.manifest.scoring
    name = scoring.aggregation if aggregation is None else aggregation
    aggregation_code(name)
    check_flag("partial", partial)
    check_flag("truncate", truncate)
    check_some(candidates, names.candidates)
    rows = engine.reader.pairs(prompt, candidates, names, partial=partial, truncate=truncate, instruction=instruction)
    rows = with_shared_gate(scoring, rows, names)
    ballot = make_ballot(vote, answers, candidates, names.candidates, rows.unreadable, scoring)
    values, mask = pad_rows(engine, rows, names)
    assert rows.prompt is not None
    joins = len(rows.prompt) + values.shape[1] <= engine.joint_limit
    continues, beginning, moved = joins and engine.prompts.covers(rows.prompt), 0, 0
    if share and joins and not continues:
        call = CALL_TOKENS[engine.provider]
        # Reading a beginning takes a run of its own, which must cost little beside what is read.
        beginning = engine.prompts.shared(rows.prompt, _WORTH * call)
        rest = len(rows.prompt) - beginning
        if beginning and (len(values) - 1) * rest <= call:
            # To compute the rest of the prompt with every candidate takes less than another run, and prompts that
            # differ only there run together.
            rows, moved = rows.after(beginning), rest
            values, mask = pad(rows.items, engine.manifest.scoring.pad_token)
    steps = readable_positions(engine, name, rows, values, step_masks)
    return RankRequest(candidates, name, ballot, rows, values, mask, steps, joins, continues, beginning, moved)


def pad_rows(engine: Engine, rows: EncodedRows, names: ArgumentNames) -> tuple[Array, Array]:
    """Rows within limits, padded, and their mask.

    Raises:
        InputError: there are too many, or they are too long.
    """
    prompt = 0 if rows.prompt is None else len(rows.prompt)
    longest = max(map(len, rows.items))
    check_size(engine.manifest, len(rows.items), prompt, longest, engine.memory_limit, names)
    return pad(rows.items, engine.manifest.scoring.pad_token)


def readable_positions(
    engine: Engine, aggregation: str, rows: EncodedRows, values: Array, step_masks: Sequence[Sequence[int]] | None
) -> Array:
    """The positions that an aggregation may read, (rows, length) int64, or (1, 1) for all.

    Raises:
        InputError: the step masks do not fit, or the aggregation needs them and there are none.
    """
    scoring = engine.manifest.scoring
    if not is_stepwise(aggregation):
        if step_masks is not None:
            raise InputError(
                f"step_masks: aggregation '{aggregation}' does not read them; pass aggregation='step_{aggregation}', "
                "or no step_masks"
            )
        mask = np.ones((1, 1), np.int64)
    elif step_masks is None and rows.ends is not None:
        mask, _ = pad([ends.astype(np.int64) for ends in rows.ends], 0)
    else:
        mask = step_mask(values, step_masks, rows.skip, scoring.step_token)
    if aggregation == "last" and scoring.passes_pad and values.ndim == 2:
        # A candidate of padding only is read at its last token, as one without the end of a step.
        mask = (values != scoring.pad_token).astype(np.int64)
    if any(rows.skip):
        mask = mask * (np.arange(values.shape[1]) >= np.array(rows.skip)[:, None])
    return mask

"""Check that the gate of a gated scorer finds what it reads, and whether candidates share it."""

from __future__ import annotations

import numpy as np

from bonnx.errors import InputError

from ..artifact.manifest import Scoring
from ..checks import ArgumentNames
from ..selection.gate import last_header
from ..text.reader import EncodedRows

__all__ = ["check_gate", "with_shared_gate"]


def check_gate(scoring: Scoring, rows: EncodedRows, names: ArgumentNames) -> None:
    """Refuse rows in which the gate finds nothing to read; a model without a gate has none.

    Raises:
        InputError: with the first such row.
    """
    for i, item in enumerate(rows.items):
        whole = item if rows.prompt is None else np.concatenate([rows.prompt, item])
        if scoring.gate_tokens and len(item) and last_header(whole, scoring.gate_tokens) < 0:
            raise InputError(
                f"{names.candidate(i)}: the gate of this model reads the header of an assistant's turn (tokens "
                f"{', '.join(map(str, scoring.gate_tokens))}) and finds none; pass messages, so that the chat "
                "template writes it, or a text that contains it. A candidate that begins with white space may share a "
                "token with its end"
            )


def with_shared_gate(scoring: Scoring, rows: EncodedRows, names: ArgumentNames) -> EncodedRows:
    """Return rows whose gates all read the prompt; if one reads its candidate, rows without a prompt.

    Raises:
        InputError: as in `check_gate`.
    """
    check_gate(scoring, rows, names)
    prompt, header = rows.prompt, scoring.gate_tokens
    if not header or prompt is None:
        return rows
    at = last_header(prompt, header)
    tail = prompt[max(0, len(prompt) - len(header) + 1) :]
    # The end of the prompt and the beginning of a candidate may form a header together.
    if at >= 0 and all(last_header(np.concatenate([tail, item]), header) < 0 for item in rows.items):
        return rows
    return rows.after(0)

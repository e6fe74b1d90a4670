"""Verify `prefill` and `decode`: the host's loop draws the seed's tokens, and the same candidates as `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from bonnx.errors import ExportError
from bonnx.runtime.engine.session import Session, Stop
from bonnx.runtime.generate.continuous import ContinuousBatch
from bonnx.runtime.generate.options import CheckedOptions
from bonnx.runtime.generate.prompts import Joining, ReadPrompt, read_prompts
from bonnx.runtime.generate.rows import GrownRows, NextTokens, Rows, RowStates
from bonnx.runtime.generate.static_rows import StaticRows, draws_plainly

from .draws import edge_width, expected_token, log_softmax, uniform
from .parity import Array, Checker

__all__ = ["HostCase", "check_decode"]


class HostCase(NamedTuple):
    """A prompt (P,) int64, and if no draw hinges on rounding, the outputs of `generate` for it."""

    prompt: Array
    request: CheckedOptions
    outputs: dict[str, Array] | None


class _Recording:
    """Rows that keep the logits of each run."""

    def __init__(self, rows: Rows) -> None:
        self._rows, self.prompts, self.clear = rows, rows.prompts, rows.clear
        self.logits = list[Array]()

    def __call__(self, states: RowStates, *, logits: bool = False, stop: Stop | None = None) -> NextTokens:
        """Run the rows and keep the logits."""
        read = self._rows(states, logits=True, stop=stop)
        assert read.logits is not None
        self.logits.append(read.logits)
        return read


def check_decode(checker: Checker, cases: Sequence[HostCase]) -> None:
    """Check the host's loop over `prefill` and `decode`, and `decode_static` if it is there, for single prompts.

    At any precision, every token must be the one that the seed draws from the graphs' own logits. If a case has the
    outputs of `generate`, the candidates must be the same.

    Raises:
        ExportError: if a token, a score or a candidate's end differs.
    """
    # One graph after the other: their weights are never in memory together.
    joining = [Joining(prompt, request) for prompt, request, _ in cases]
    read = [prompt for each in joining for prompt in _read(checker.session("prefill"), each)]
    checker.close("prefill")
    rows: dict[str, Callable[[], Rows]] = {"decode": lambda: GrownRows(checker.session("decode"))}
    if "decode_static" in checker.graphs:
        rows["decode_static"] = lambda: StaticRows(checker.session)
    for graph, make in rows.items():
        for case, each, prompt in zip(cases, joining, read, strict=True):
            if graph == "decode" or draws_plainly(each.options):
                _check(checker, case, each, prompt, graph, _Recording(make()))
        checker.close(graph)


def _read(prefill: Session, joining: Joining) -> list[ReadPrompt]:
    """Read a prompt in two pieces, if it has as many tokens."""
    if half := len(joining.prompt) // 2:
        read_prompts(prefill, [joining], half)
    return read_prompts(prefill, [joining], logits=True)


def _check(
    checker: Checker, case: HostCase, joining: Joining, read: ReadPrompt, graph: str, recording: _Recording
) -> None:
    prompt, request, outputs = case
    batch = ContinuousBatch(recording, None)
    last = batch.join(read, joining)
    while batch.rows:
        batch.step()
    assert read.logits is not None
    for n, position, logits in _logits_of(read.logits, recording.logits, last.lengths):
        drawn, label = int(last.tokens[n, position]), f"{graph}, candidate {n}, token {position}"
        token, margin = expected_token(logits, uniform(request.seed, prompt, position, n), request)
        if token != drawn and margin > edge_width(0.0, request):
            raise ExportError(f"{label} is {drawn}; expected {token} from its logits and the seed")
        log_prob = log_softmax(logits[None])[0, drawn]
        size = float(np.abs(logits).max())
        checker.compare(f"{label}, log-probability", last.log_probs[n, position], np.asarray(log_prob), size)
    if outputs is None:
        return
    lengths = outputs["lengths"][:, 0]
    if not np.array_equal(last.lengths, lengths) or not np.array_equal(last.reasons, outputs["finish_reasons"][:, 0]):
        raise ExportError(f"{graph} ended candidates after {last.lengths} tokens; generate, after {lengths}")
    for n, length in enumerate(lengths):
        if not np.array_equal(last.tokens[n, :length], outputs["sequences"][n, 0, :length]):
            raise ExportError(
                f"{graph} drew {last.tokens[n, :length]}; generate, {outputs['sequences'][n, 0, :length]}"
            )
        checker.near("scores", f"{graph}, scores", last.scores[n, :length], outputs["scores"][n, 0, :length])


def _logits_of(first: Array, others: Sequence[Array], lengths: Array) -> Iterator[tuple[int, int, Array]]:
    """Yield each candidate and position with the logits (V,) float64 that its token was drawn from."""
    for position in range(int(lengths.max())):
        # One prefill row serves all candidates; after that, each candidate that reached this position has its own row.
        rows = np.flatnonzero(lengths >= position)
        for row, n in enumerate(rows):
            if lengths[n] > position:
                logits = first if position == 0 else others[position - 1][row]
                yield int(n), position, logits.astype(np.float64)

"""Verify `prefill` and `decode`: the host's loop draws the seed's tokens, and the same candidates as `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from bonnx.errors import ExportError
from bonnx.runtime.engine.session import Session
from bonnx.runtime.generate.decoding import decode_all, prefill
from bonnx.runtime.generate.options import CheckedOptions

from .draws import edge_width, expected_token, log_softmax, uniform
from .parity import Array, Checker

__all__ = ["HostCase", "check_decode"]


class HostCase(NamedTuple):
    """A prompt (P,) int64, and if no draw hinges on rounding, the outputs of `generate` for it."""

    prompt: Array
    request: CheckedOptions
    outputs: dict[str, Array] | None


class _Recording:
    """A session that keeps the logits of each run."""

    def __init__(self, session: Session) -> None:
        self._session, self.logits = session, list[Array]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def values(self, feeds: dict[str, Any], *, logits: bool = False) -> dict[str, Any]:
        """Run the session and keep the logits."""
        outputs = self._session.values(feeds, logits=True)
        self.logits.append(outputs["logits"].numpy())
        return outputs


class _Read:
    """In place of `prefill`, gives what it gave before, and in place of `decode` holds no inputs."""

    def __init__(self, outputs: dict[str, Any]) -> None:
        self._outputs = outputs

    def values(self, _: dict[str, Any], *, logits: bool = False) -> dict[str, Any]:
        """Return the recorded outputs."""
        return self._outputs

    def hold(self, _: dict[str, Any]) -> dict[str, Any]:
        """Return nothing."""
        return {}


def check_decode(checker: Checker, cases: Sequence[HostCase]) -> None:
    """Check the host's loop over `prefill` and `decode` for single prompts.

    At any precision, every token must be the one that the seed draws from the graphs' own logits. If a case has the
    outputs of `generate`, the candidates must be the same.

    Raises:
        ExportError: if a token, a score or a candidate's end differs.
    """
    # One graph after the other: their weights are never in memory together.
    alone: dict[str, Any] = {"prefill": checker.session("prefill"), "decode": _Read({})}
    read = [prefill(alone.__getitem__, prompt, request, request.n, logits=True)[0] for prompt, request, _ in cases]
    del alone
    checker.close("prefill")
    for case, outputs in zip(cases, read, strict=True):
        _check(checker, case, outputs)
    checker.close("decode")


def _check(checker: Checker, case: HostCase, read: dict[str, Any]) -> None:
    prompt, request, outputs = case
    decode = _Recording(checker.session("decode"))
    sessions: dict[str, Any] = {"prefill": _Read(read), "decode": decode}
    *_, last = decode_all(sessions.__getitem__, prompt, request, None, None)
    for n, position, logits in _logits_of(read["logits"].numpy()[0], decode.logits, last.lengths):
        drawn, label = int(last.tokens[n, position]), f"decode, candidate {n}, token {position}"
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
        raise ExportError(f"decode ended candidates after {last.lengths} tokens; generate, after {lengths}")
    for n, length in enumerate(lengths):
        if not np.array_equal(last.tokens[n, :length], outputs["sequences"][n, 0, :length]):
            raise ExportError(f"decode drew {last.tokens[n, :length]}; generate, {outputs['sequences'][n, 0, :length]}")
        checker.near("scores", "decode, scores", last.scores[n, :length], outputs["scores"][n, 0, :length])


def _logits_of(first: Array, others: Sequence[Array], lengths: Array) -> Iterator[tuple[int, int, Array]]:
    """Yield each candidate and position with the logits (V,) float64 that its token was drawn from."""
    for position in range(int(lengths.max())):
        # One prefill row serves all candidates; after that, each candidate that reached this position has its own row.
        rows = np.flatnonzero(lengths >= position)
        for row, n in enumerate(rows):
            if lengths[n] > position:
                logits = first if position == 0 else others[position - 1][row, 0]
                yield int(n), position, logits.astype(np.float64)

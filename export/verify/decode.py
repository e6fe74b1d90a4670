"""Verify `prefill` and `decode`: the host's loop draws the seed's tokens, and the same candidates as `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bonnx.errors import ExportError
from bonnx.runtime.engine.session import Session
from bonnx.runtime.generate.decoding import decode_all
from bonnx.runtime.generate.options import CheckedOptions

from .draws import edge_width, expected_token, log_softmax, uniform
from .parity import Array, Checker

__all__ = ["check_decode"]


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


def check_decode(checker: Checker, prompt: Array, request: CheckedOptions, outputs: dict[str, Array] | None) -> None:
    """Check the host's loop over `prefill` and `decode` for a single prompt.

    At any precision, every token must be the one that the seed draws from the graphs' own logits. If `outputs` of
    `generate` are given, which requires that no draw hinges on rounding, the candidates must be the same.

    Raises:
        ExportError: if a token, a score or a candidate's end differs.
    """
    recorded = {name: _Recording(checker.session(name)) for name in ("prefill", "decode")}
    *_, last = decode_all(recorded.__getitem__, prompt, request, None, None)  # type: ignore[arg-type]
    for n, position, logits in _logits_of(recorded["prefill"].logits, recorded["decode"].logits, last.lengths):
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


def _logits_of(first: Sequence[Array], others: Sequence[Array], lengths: Array) -> Iterator[tuple[int, int, Array]]:
    """Yield each candidate and position with the logits (V,) float64 that its token was drawn from."""
    for position in range(int(lengths.max())):
        # One prefill row serves all candidates; after that, each candidate that reached this position has its own row.
        rows = np.flatnonzero(lengths >= position)
        for row, n in enumerate(rows):
            if lengths[n] > position:
                logits = first[0][0] if position == 0 else others[position - 1][row, 0]
                yield int(n), position, logits.astype(np.float64)

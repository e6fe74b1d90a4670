"""Verify `prefill` and `decode`: the host's loop draws the seed's tokens, and the same candidates as `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from bonnx.errors import ExportError
from bonnx.runtime.engine.session import Session, Stop
from bonnx.runtime.generate.continuous import ContinuousBatch, Joining, ReadPrompt, read_prompts
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

    def values(self, feeds: dict[str, Any], *, logits: bool = False, stop: Stop | None = None) -> dict[str, Any]:
        """Run the session and keep the logits."""
        outputs = self._session.values(feeds, logits=True, stop=stop)
        self.logits.append(outputs["logits"].numpy())
        return outputs


def check_decode(checker: Checker, cases: Sequence[HostCase]) -> None:
    """Check the host's loop over `prefill` and `decode` for single prompts.

    At any precision, every token must be the one that the seed draws from the graphs' own logits. If a case has the
    outputs of `generate`, the candidates must be the same.

    Raises:
        ExportError: if a token, a score or a candidate's end differs.
    """
    # One graph after the other: their weights are never in memory together.
    joining = [Joining(prompt, request) for prompt, request, _ in cases]
    read = [prompt for each in joining for prompt in _read(checker.session("prefill"), each)]
    checker.close("prefill")
    for case, each, prompt in zip(cases, joining, read, strict=True):
        _check(checker, case, each, prompt)
    checker.close("decode")


def _read(prefill: Session, joining: Joining) -> list[ReadPrompt]:
    """Read a prompt in two pieces, if it has as many tokens."""
    if half := len(joining.prompt) // 2:
        read_prompts(prefill, [joining], half)
    return read_prompts(prefill, [joining], logits=True)


def _check(checker: Checker, case: HostCase, joining: Joining, read: ReadPrompt) -> None:
    prompt, request, outputs = case
    decode: Any = _Recording(checker.session("decode"))
    batch = ContinuousBatch(decode, None)
    last = batch.join(read, joining)
    while batch.rows:
        batch.step()
    assert read.logits is not None
    for n, position, logits in _logits_of(read.logits, decode.logits, last.lengths):
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
                logits = first if position == 0 else others[position - 1][row]
                yield int(n), position, logits.astype(np.float64)

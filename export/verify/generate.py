"""Verify every token, score and choice of `generate` against PyTorch."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from bonnx.errors import ExportError
from bonnx.models.network import LanguageModel
from bonnx.runtime.artifact.manifest import Aggregation, Parity
from bonnx.runtime.engine.prompt_cache import nothing_read
from bonnx.runtime.generate.decoding import generate_feeds
from bonnx.runtime.generate.options import CheckedOptions
from bonnx.runtime.generate.result import FINISH_REASONS
from bonnx.runtime.selection.aggregate import aggregate

from ..stages import Report
from .decode import HostCase, check_decode
from .draws import edge_width, expected_token, log_softmax, uniform
from .parity import Array, Checker

__all__ = ["check_generation"]

# (prompts, longest prompt, candidates, new tokens): every axis is 1 at least once.
_SHAPES = [(1, 1, 1, 1), (1, 7, 5, 9), (3, 5, 4, 6), (2, 12, 9, 7), (1, 23, 3, 12)]
# temperature, top_k, top_p, prune_every
_DRAWS = [(1.0, 0, 1.0, 0), (0.7, 5, 0.9, 2), (0.0, 0, 1.0, 0), (1.3, 0, 0.6, 3)]
# For `bonnx verify`, tried in this order until a case is safe from rounding: shape, temperature, number of tries.
_RECORDED = [((2, 4, 3, 5), 1.0, 20), ((2, 4, 3, 5), 0.0, 20), ((1, 4, 2, 1), 0.0, 40)]
# Cases are not tried if the probability that one of them is safe is less.
_HOPELESS = 0.01


class _Run(NamedTuple):
    """One run of `generate`: prompts and mask (B, P), a request for each prompt, and the outputs."""

    prompts: Array
    mask: Array
    requests: list[CheckedOptions]
    outputs: dict[str, Array]

    def candidates(self) -> Iterator[tuple[int, int]]:
        """Yield every candidate and its prompt."""
        return ((n, b) for b, request in enumerate(self.requests) for n in range(request.n))

    def column(self, b: int) -> dict[str, Array]:
        """Return one prompt's part of the outputs, (n, 1, ...) and (1)."""
        names = ("sequences", "lengths", "scores", "finish_reasons", "candidate_scores")
        parts = {name: self.outputs[name][: self.requests[b].n, b : b + 1] for name in names}
        return parts | {"best_index": self.outputs["best_index"][b : b + 1]}

    def row(self, n: int, b: int) -> tuple[Array, Array]:
        """Return a candidate's prompt (P,) and tokens (length,)."""
        return self.prompts[b][self.mask[b] > 0], self.outputs["sequences"][n, b, : self.outputs["lengths"][n, b]]


class _ExactValues(NamedTuple):
    """Float64 results at each token of a candidate: scores and log_probs (length,), and the draws.

    A draw is the token that the seed selects, and its margin to the next token.
    """

    scores: Array
    log_probs: Array
    draws: list[tuple[int, float]]


def check_generation(checker: Checker, report: Report) -> list[Parity]:
    """Check random cases of `generate` against PyTorch, and the host's loop against `generate`.

    Raises:
        ExportError: if a token, a score or a choice differs.
    """
    # Quickly: each kind of draw and each kind of shape once.
    cases = [*zip(_SHAPES[1:], _DRAWS, strict=True)] if checker.quick else [*product(_SHAPES, _DRAWS)]
    report("generating")
    runs = [_run(checker, _case(checker, shape, *options)) for shape, options in cases]
    # Loading it once more for `_record` takes less time than its memory is worth.
    checker.close("generate")
    report("computing what was generated with PyTorch in float64")
    read = _read(checker, runs)
    _record(checker, _clear_share(checker, runs, read))
    checker.close("generate")
    scores, log_probs, hosts = list[float](), list[float](), list[HostCase]()
    for run, rows in zip(runs, read, strict=True):
        for (n, b), exact in rows.items():
            label = f"generate, prompt {b}, candidate {n}"
            length = len(exact.scores)
            scores.append(checker.near("scores", label, run.outputs["scores"][n, b, :length], exact.scores))
            values = run.outputs["log_probs"][n, b, :length]
            log_probs.append(checker.near("log_probs", f"{label}, log-probabilities", values, exact.log_probs))
            _check_tokens(checker, run, n, b, exact.draws, label)
        for b, request in enumerate(run.requests):
            alone = run.column(b)
            _check_selection(checker, request, alone)
            certain = all(_is_certain(checker, request, rows[n, b].draws) for n in range(request.n))
            certain = certain and not _is_close_race(checker, request, alone)
            hosts.append(HostCase(run.prompts[b][run.mask[b] > 0], request, alone if certain else None))
    report("comparing prefill and decode")
    check_decode(checker, hosts)
    results = {
        "generate, tokens and scores": ("scores", scores),
        "generate, log-probabilities": ("log_probs", log_probs),
    }
    return [checker.parity(check, differences, kind) for check, (kind, differences) in results.items()]


def _run(checker: Checker, case: tuple[Array, Array, list[CheckedOptions]]) -> _Run:
    return _Run(*case, checker.run_graph("generate", generate_feeds(*case, None)))


def _case(
    checker: Checker, shape: tuple[int, int, int, int], temperature: float, top_k: int, top_p: float, prune: int
) -> tuple[Array, Array, list[CheckedOptions]]:
    """Draw prompts, mask and requests; the first request is as large and draws as it is told, the others vary."""
    batch, longest, count, new = shape
    assert isinstance(checker.model, LanguageModel)
    vocabulary, rng = checker.model.config.vocab_size, checker.rng
    longest = min(longest, max(1, checker.limits.max_tokens - new))
    sizes = rng.integers(1, longest + 1, batch)
    mask = (np.arange(longest) >= longest - sizes[:, None]).astype(np.int64)
    stops = tuple(int(token) for token in rng.integers(0, vocabulary, min(vocabulary // 4, 200)))
    aggregation: Aggregation = "last" if checker.network.config.has_scorer else "mean"
    requests = []
    for b in range(batch):
        seed = int(rng.integers(-(2**62), 2**62))
        requests.append(
            CheckedOptions(count, new, temperature, top_k, top_p, seed, stops, aggregation, prune, 0.5 + 0.1 * b)
        )
        temperature, top_k, top_p, prune = _DRAWS[int(rng.integers(len(_DRAWS)))]
        count, new = int(rng.integers(1, shape[2] + 1)), int(rng.integers(1, shape[3] + 1))
        stops = stops[: int(rng.integers(len(stops) + 1))]
    return rng.integers(0, vocabulary, (batch, longest)), mask, requests


def _read(checker: Checker, runs: Sequence[_Run]) -> list[dict[tuple[int, int], _ExactValues]]:
    """Recompute the candidates of each run as whole rows in PyTorch, by candidate and prompt; update the tolerance."""
    places = defaultdict[int, list[tuple[int, int, int]]](list)
    for r, run in enumerate(runs):
        for n, b in run.candidates():
            prompt, tokens = run.row(n, b)
            places[len(prompt) + len(tokens)].append((r, n, b))
    batches = [np.stack([np.concatenate(runs[r].row(n, b)) for r, n, b in group]) for group in places.values()]
    found = []
    for group, (exact, rounded) in zip(places.values(), checker.exact.rows(batches, checker.tolerances), strict=True):
        for i, (r, n, b) in enumerate(group):
            start = len(runs[r].row(n, b)[0])
            # Without a scorer, the distribution that a token was drawn from is that of the position before it.
            own = slice(start, None) if checker.network.config.has_scorer else slice(start - 1, -1)
            backbones = exact.backbone[i, start - 1 : -1], rounded.backbone[i, start - 1 : -1]
            found.append(((r, n, b), backbones, exact.scores[i, own].numpy()))
    rows: list[dict[tuple[int, int], _ExactValues]] = [{} for _ in runs]
    logits = checker.exact.logits([backbones for _, backbones, _ in found])
    for ((r, n, b), _, scores), (wide, narrow) in zip(found, logits, strict=True):
        prompt, tokens = runs[r].row(n, b)
        log_probs, near = (log_softmax(x)[np.arange(len(tokens)), tokens] for x in (wide, narrow))
        checker.tolerances.update("logits", wide, narrow)
        checker.tolerances.update("log_probs", log_probs, near)
        rows[r][n, b] = _ExactValues(scores, log_probs, _draws(wide, runs[r].requests[b], prompt, n))
    return rows


def _draws(logits: Array, request: CheckedOptions, prompt: Array, n: int) -> list[tuple[int, float]]:
    """Return a candidate's draws from the logits (length, V) of its tokens."""
    wide = logits.astype(np.float64)
    return [
        expected_token(row, uniform(request.seed, prompt, position, n), request) for position, row in enumerate(wide)
    ]


def _is_certain(checker: Checker, request: CheckedOptions, draws: Sequence[tuple[int, float]]) -> bool:
    """Whether no draw is so close to a boundary that rounding could change the token.

    Many are in an untrained model, which has flat probabilities, with a large vocabulary.
    """
    edge = edge_width(checker.tolerances.allowed("logits"), request)
    return all(margin > edge for _, margin in draws)


def _is_clear(checker: Checker, run: _Run, n: int, b: int) -> bool:
    """Whether `_is_certain` holds for a candidate that `_read` has not seen."""
    prompt, tokens = run.row(n, b)
    logits = checker.exact.rounded_logits(np.concatenate([prompt, tokens]), slice(len(prompt) - 1, -1))
    return _is_certain(checker, run.requests[b], _draws(logits, run.requests[b], prompt, n))


def _check_tokens(checker: Checker, run: _Run, n: int, b: int, draws: Sequence[tuple[int, float]], label: str) -> None:
    _, tokens = run.row(n, b)
    edge = edge_width(checker.tolerances.allowed("logits"), run.requests[b])
    for position, (token, margin) in enumerate(draws):
        if token != tokens[position] and margin > edge:
            raise ExportError(
                f"{label}: token {position} is {tokens[position]}; expected {token} from PyTorch's logits and the seed"
            )
    _check_end(run.requests[b], label, tokens, FINISH_REASONS[run.outputs["finish_reasons"][n, b]])


def _check_end(request: CheckedOptions, label: str, tokens: Array, reason: str) -> None:
    stopped = np.flatnonzero(np.isin(tokens, request.stop_tokens))
    good = {
        "stop": len(stopped) == 1 and stopped[0] == len(tokens) - 1,
        "length": not len(stopped) and len(tokens) == request.max_new_tokens,
        "pruned": not len(stopped) and request.prune_every and len(tokens) % request.prune_every == 0,
    }
    if not good[reason]:
        raise ExportError(
            f"{label} has {len(tokens)} tokens and stop tokens at {stopped}, but its finish reason is '{reason}'"
        )


def _check_selection(checker: Checker, request: CheckedOptions, outputs: dict[str, Array]) -> None:
    lengths = np.where(outputs["finish_reasons"] == FINISH_REASONS.index("pruned"), 0, outputs["lengths"])
    mask = (np.arange(outputs["sequences"].shape[2]) < lengths[..., None]).astype(np.int64)
    expected, best = aggregate(outputs["scores"], mask, np.ones((1, 1, 1)), request.aggregation)
    checker.compare("generate, candidate scores", outputs["candidate_scores"], expected)
    chosen = outputs["best_index"]
    if request.aggregation == "mean":
        # Greedy candidates are equal, and their sums are so to rounding.
        near = np.abs(expected - expected.max(0)) <= 1e-5 * np.abs(expected).max(0)
        best = np.where(near[chosen, np.arange(len(chosen))], chosen, best)
    if not np.array_equal(chosen, best):
        raise ExportError(f"generate selected {outputs['best_index']}; expected {best}")


def _is_close_race(checker: Checker, request: CheckedOptions, outputs: dict[str, Array]) -> bool:
    """Whether rounding decided which of two candidates was pruned, as it does when their scores are equal."""
    if not request.prune_every:
        return False
    close = 2 * checker.tolerances.allowed("scores")
    scores, lengths = outputs["scores"][:, 0], outputs["lengths"][:, 0]
    if request.aggregation == "mean":
        scores = scores.cumsum(1) / np.arange(1, scores.shape[1] + 1)
    for position in range(request.prune_every, scores.shape[1] + 1, request.prune_every):
        reached = np.minimum(lengths, position)
        in_order = np.sort(scores[np.arange(len(scores)), reached - 1])
        if (np.diff(in_order) <= close).any():
            return True
    return False


def _clear_share(checker: Checker, runs: Sequence[_Run], read: Sequence[dict[tuple[int, int], _ExactValues]]) -> float:
    """The share of draws at temperature 1, from all tokens, that rounding cannot change."""
    edge = edge_width(checker.tolerances.allowed("logits"), runs[0].requests[0])
    plain = [
        exact
        for run, rows in zip(runs, read, strict=True)
        for (_, b), exact in rows.items()
        if run.requests[b].temperature == 1
    ]
    margins = [margin for exact in plain for _, margin in exact.draws]
    return float(np.mean([margin > edge for margin in margins])) if margins else 1.0


def _record(checker: Checker, share: float) -> None:
    """Record one case for `bonnx verify` whose draws are clear enough that every machine draws the same tokens.

    `share` is how many draws at temperature 1 are. If no such case is found, which happens with 8 bits, nothing is
    recorded; without a scorer, the first distribution.
    """
    for shape, temperature, tries in _RECORDED:
        batch, _, count, new = shape
        if temperature > 0 and tries * share ** (batch * count * new) < _HOPELESS:
            continue
        for _ in range(tries):
            prompts, mask, (request, *_) = _case(checker, shape, temperature, 0, 1.0, 0)
            run = _run(checker, (prompts, mask, [dataclasses.replace(request, stop_tokens=())] * batch))
            if all(_is_clear(checker, run, n, b) for n, b in run.candidates()):
                checker.record("generate/1", generate_feeds(*run[:3], None), run.outputs)
                return
    if not checker.network.config.has_scorer:
        # `bonnx verify` needs a case, and `rank` has none.
        prompts, mask, (request, *_) = _case(checker, _SHAPES[1], 1.0, 0, 1.0, 0)
        feeds = {"input_ids": prompts, "attention_mask": mask, **request.drawing()}
        feeds |= nothing_read(checker.graphs["prefill"], len(prompts))
        feeds |= {"num_candidates": np.array(1), "seed": np.array(request.seed)}
        outputs = checker.run_graph("prefill", feeds)
        checker.record("prefill/1", feeds, {name: outputs[name] for name in ("logits", "certainty")})

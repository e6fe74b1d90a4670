"""Prove `generate`, `prefill` and `decode` against PyTorch: every token, score and choice."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from ..models.network import LanguageModel
from ..runtime.aggregate import aggregate
from ..runtime.errors import ExportError
from ..runtime.generation import FINISH_REASONS, Request
from ..runtime.manifest import Parity
from ..runtime.steps import generate_feeds, grow
from .parity import Array, Checker, activated

__all__ = ["check_generation", "expected_token", "uniform"]

# (prompts, longest prompt, candidates, new tokens): 1 on every axis.
_SHAPES = [(1, 1, 1, 1), (1, 7, 5, 9), (3, 5, 4, 6), (2, 12, 9, 7), (1, 23, 3, 12)]
# temperature, top_k, top_p, prune_every
_DRAWS = [(1.0, 0, 1.0, 0), (0.7, 5, 0.9, 2), (0.0, 0, 1.0, 0), (1.3, 0, 0.6, 3)]
_WORD = 2**32


def check_generation(checker: Checker) -> list[Parity]:
    """Random cases of `generate` against PyTorch, and the host's loop against `generate`.

    Raises:
        ExportError: a token, a score or a choice differs.
    """
    worst, cases = 0.0, 0
    for shape in _SHAPES:
        for options in _DRAWS:
            prompts, mask, request = _case(checker, shape, *options)
            outputs = checker.run_graph("generate", generate_feeds(prompts, mask, request, None))
            difference, certain = _compare_rows(checker, prompts, mask, request, outputs)
            worst = max(worst, difference)
            _check_selection(checker, request, outputs)
            for b in range(len(prompts)):
                alone = {name: _column(value, b) for name, value in outputs.items()}
                if certain[b] and not _is_close_race(checker, request, alone):
                    _compare_steps(checker, prompts[b][mask[b] > 0], request, alone)
            cases += 1
    _record(checker)
    return [checker.parity("generate, tokens and scores", cases, worst)]


def _case(
    checker: Checker, shape: tuple[int, int, int, int], temperature: float, top_k: int, top_p: float, prune: int
) -> tuple[Array, Array, Request]:
    batch, longest, count, new = shape
    assert isinstance(checker.model, LanguageModel)
    vocabulary, rng = checker.model.config.vocab_size, checker.rng
    longest = min(longest, max(1, checker.limits.max_tokens - new))
    sizes = rng.integers(1, longest + 1, batch)
    mask = (np.arange(longest) >= longest - sizes[:, None]).astype(np.int64)
    stops = tuple(int(token) for token in rng.integers(0, vocabulary, min(vocabulary // 4, 200)))
    seed = int(rng.integers(-(2**62), 2**62))
    request = Request(count, new, temperature, top_k, top_p, seed, stops, "last", prune, 0.5)
    return rng.integers(0, vocabulary, (batch, longest)), mask, request


def _column(value: Array, b: int) -> Array:
    """One prompt's part of an output."""
    return value[:, b : b + 1] if value.ndim > 1 else value


def _compare_rows(
    checker: Checker, prompts: Array, mask: Array, request: Request, outputs: dict[str, Array]
) -> tuple[float, Array]:
    """Every candidate as a whole row through PyTorch: its tokens are those that the draws give, its scores agree.

    Also for which prompts (B,) no draw was so close to an edge that another batch may round it to another token. With a
    large vocabulary and flat probabilities, as of a model that is not trained, many are.
    """
    worst, certain = 0.0, np.ones(len(prompts), bool)
    sequences, lengths = outputs["sequences"], outputs["lengths"]
    for n, b in np.ndindex(lengths.shape):
        prompt, length = prompts[b][mask[b] > 0], lengths[n, b]
        tokens, what = sequences[n, b, :length], f"generate, prompt {b}, candidate {n}"
        logits, scores = _read(checker, prompt, tokens)
        log_probs = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        log_probs = (log_probs - logits.max(1, keepdims=True))[np.arange(length), tokens]
        worst = max(worst, checker.compare(what, outputs["scores"][n, b, :length], scores))
        worst = max(worst, checker.compare(what, outputs["log_probs"][n, b, :length], log_probs.astype(np.float32)))
        for step in range(length):
            token, margin = expected_token(logits[step], uniform(request.seed, prompt, step, n), request)
            certain[b] &= margin > checker.tolerance.edge
            if token != tokens[step] and margin > checker.tolerance.edge:
                raise ExportError(f"{what}: token {step} is {tokens[step]}, PyTorch and the seed give {token}")
        _check_end(request, what, tokens, FINISH_REASONS[outputs["finish_reasons"][n, b]])
    return worst, certain


def _check_end(request: Request, what: str, tokens: Array, reason: str) -> None:
    stopped = np.flatnonzero(np.isin(tokens, request.stop_tokens))
    good = {
        "stop": len(stopped) == 1 and stopped[0] == len(tokens) - 1,
        "length": not len(stopped) and len(tokens) == request.max_new_tokens,
        "pruned": not len(stopped) and request.prune_every and len(tokens) % request.prune_every == 0,
    }
    if not good[reason]:
        raise ExportError(f"{what} has {len(tokens)} tokens, stop tokens at {stopped}, but its end is '{reason}'")


def _check_selection(checker: Checker, request: Request, outputs: dict[str, Array]) -> None:
    lengths = np.where(outputs["finish_reasons"] == FINISH_REASONS.index("pruned"), 0, outputs["lengths"])
    mask = (np.arange(outputs["sequences"].shape[2]) < lengths[..., None]).astype(np.int64)
    found, best = aggregate(outputs["scores"], mask, np.ones((1, 1, 1)), request.aggregation)
    checker.compare("generate, candidate scores", outputs["candidate_scores"], found)
    if not np.array_equal(outputs["best_index"], best):
        raise ExportError(f"generate chose {outputs['best_index']}, NumPy {best}")


def _is_close_race(checker: Checker, request: Request, outputs: dict[str, Array]) -> bool:
    """Whether two candidates were so close at a pruning that rounding decides: equal ones are, to the last bits."""
    if not request.prune_every:
        return False
    relative, absolute, _ = checker.tolerance
    scores, lengths = outputs["scores"][:, 0], outputs["lengths"][:, 0]
    for step in range(request.prune_every, scores.shape[1] + 1, request.prune_every):
        reached = np.minimum(lengths, step)
        found = np.sort(scores[np.arange(len(scores)), reached - 1])
        if (np.diff(found) <= relative * np.abs(found[1:]) + absolute).any():
            return True
    return False


def _compare_steps(checker: Checker, prompt: Array, request: Request, outputs: dict[str, Array]) -> None:
    """The host's loop over `prefill` and `decode` gives the same candidates for a prompt that stands alone."""
    *_, last = grow(checker.session, prompt, request, None, None)
    lengths = outputs["lengths"][:, 0]
    if not np.array_equal(last.lengths, lengths) or not np.array_equal(last.reasons, outputs["finish_reasons"][:, 0]):
        raise ExportError(f"decode ended candidates after {last.lengths} tokens, generate after {lengths}")
    for n, length in enumerate(lengths):
        if not np.array_equal(last.tokens[n, :length], outputs["sequences"][n, 0, :length]):
            raise ExportError(f"decode gave {last.tokens[n, :length]}, generate {outputs['sequences'][n, 0, :length]}")
        checker.compare("decode, scores", last.scores[n, :length], outputs["scores"][n, 0, :length])


def _record(checker: Checker) -> None:
    """One case for `bonnx verify`, all of whose draws are far from an edge, so that any machine gives its tokens."""
    far = min(10 * checker.tolerance.edge, 0.1)
    # Where probabilities are so flat that no such case is found, the most likely tokens.
    for temperature in (*[1.0] * 50, *[0.0] * 50):
        prompts, mask, request = _case(checker, (2, 4, 3, 5), temperature, 0, 1.0, 0)
        feeds = generate_feeds(prompts, mask, dataclasses.replace(request, stop_tokens=()), None)
        outputs = checker.run_graph("generate", feeds)
        sequences = outputs["sequences"]
        rows = ((n, prompts[b][mask[b] > 0], sequences[n, b]) for n, b in np.ndindex(sequences.shape[:2]))
        if all(_margin(checker, request, *row) > far for row in rows):
            break
    checker.record("generate/1", feeds, outputs)


def _margin(checker: Checker, request: Request, candidate: int, prompt: Array, tokens: Array) -> float:
    """The least distance of a candidate's draws from an edge."""
    logits, _ = _read(checker, prompt, tokens)
    draws = (
        expected_token(logits[step], uniform(request.seed, prompt, step, candidate), request)
        for step in range(len(tokens))
    )
    return min(margin for _, margin in draws)


def _read(checker: Checker, prompt: Array, tokens: Array) -> tuple[Array, Array]:
    """What PyTorch gives for a candidate: the logits of each token (length, V) float64, and its scores (length,)."""
    row = torch.from_numpy(np.concatenate([prompt, tokens]))[None]
    with torch.no_grad():
        _, scores, logits = checker.model(row)
    found: Array = logits[0, len(prompt) - 1 : -1].double().numpy()
    return found, activated(scores, checker.scoring)[0, len(prompt) :].numpy()


def uniform(seed: int, prompt: Array, step: int, candidate: int) -> float:
    """The number in [0, 1) that decides a token: what `sampling.py` does, in Python's own integers."""
    start = _mix(_mix((seed // _WORD + 0x9E3779B9) % _WORD) ^ (seed % _WORD))
    total = sum(_mix((int(token) + _mix(i + 1)) % _WORD) for i, token in enumerate(prompt)) % _WORD
    row = _mix((_mix(total ^ start) + step * 0x9E3779B1) % _WORD)
    return (_mix((row + candidate * 0x85EBCA77) % _WORD) >> 9) / 2**23


def _mix(x: int) -> int:
    """MurmurHash3's finalizer (Appleby, 2011)."""
    x ^= x >> 16
    x = x * 0x85EBCA6B % _WORD
    x ^= x >> 13
    x = x * 0xC2B2AE35 % _WORD
    return x ^ x >> 16


def expected_token(logits: Array, point: float, request: Request) -> tuple[int, float]:
    """The token of one row of logits (V,) float64, and how far the draw is from another one's share."""
    order = np.argsort(-logits, kind="stable")
    if request.temperature == 0:
        gap = logits[order[0]] - logits[order[1]] if len(order) > 1 else 1.0
        return int(order[0]), float(gap)
    scaled = logits / np.float64(np.float32(request.temperature))
    likely = np.exp(scaled - scaled.max())
    likely /= likely.sum()
    edge = 1.0
    if request.top_k or request.top_p < 1:
        if request.top_k and request.top_k < len(order):
            # Which token is the k-th may itself be a close thing.
            edge = float(np.min(likely[order[request.top_k - 1]] - likely[order[request.top_k]]))
            order = order[: request.top_k]
        likely = likely[order] / (likely[order].sum() if request.top_k else 1.0)
        before = np.cumsum(likely) - likely
        kept = before < np.float32(request.top_p)
        if request.top_p < 1:
            edge = min(edge, float(np.abs(before[1:] - np.float32(request.top_p)).min(initial=1.0)))
        order, likely = order[kept], likely[kept]
    else:
        order = np.arange(len(logits))
    sums = np.cumsum(likely)
    target = point * sums[-1]
    place = min(int((sums <= target).sum()), len(order) - 1)
    return int(order[place]), min(edge, float(np.abs(sums - target).min()))

"""The bar that fewer bits must pass: how often the artifact selects the candidate that the float32 model would.

Errors of single scores say little about a ranking, so the selection itself is counted, on prompts that the model was
not trained on. Where several candidates are equally good, which of them is taken is no matter: one that float32 rates
lower by at most 1% of the spread of the candidates' scores counts as its choice too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from ..models.network import LanguageModel, TwoHeadedNetwork
from ..runtime.aggregate import aggregate, best_of_n
from ..runtime.errors import ExportError, InputError
from ..runtime.inputs import Item, pad
from ..runtime.manifest import Agreement, Scoring
from ..runtime.model import Model
from .parity import activated

__all__ = ["HeldOut", "measure", "random_prompts", "read_held_out"]

CANDIDATES, NEW_TOKENS, RANDOM_PROMPTS = 16, 64, 50
_AS_GOOD = 0.01


class HeldOut(NamedTuple):
    """A prompt, and its candidates; a language model's artifact samples them itself if there are none."""

    prompt: Item
    candidates: Sequence[Item] | None = None


class _Line(msgspec.Struct):
    prompt: str | list[int]
    candidates: list[str | list[int]] | None = None


def read_held_out(path: Path) -> list[HeldOut]:
    """A file of one prompt a line, of one JSON object with `prompt` and `candidates` a line, or an .npz file.

    The .npz file is for embeddings: `prompts` (prompts, length, embed_dim) and `candidates` (prompts, num_candidates,
    length, embed_dim), float32.

    Raises:
        InputError: it cannot be read, or is empty.
    """
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                found = [HeldOut(p, list(c)) for p, c in zip(arrays["prompts"], arrays["candidates"], strict=True)]
        else:
            lines = path.read_text(encoding="utf-8").splitlines()
            found = [_parse(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    except (OSError, KeyError, ValueError) as e:
        raise InputError(f"cannot read held-out prompts from {path}: {e}; see `bonnx export --help`") from e
    if not found:
        raise InputError(f"{path} has no prompts; expected one a line")
    return found


def _parse(line: str, where: str) -> HeldOut:
    if not line.lstrip().startswith("{"):
        return HeldOut(line)
    try:
        entry = msgspec.json.decode(line, type=_Line)
    except msgspec.MsgspecError as e:
        raise InputError(f"{where}: expected a prompt, or an object with 'prompt' and 'candidates': {e}") from e
    return HeldOut(entry.prompt, entry.candidates)


def random_prompts(model: LanguageModel | TwoHeadedNetwork, longest: int, seed: int) -> list[HeldOut]:
    """What there is without a file: noise, on which a ranking means little."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(RANDOM_PROMPTS):
        length = int(rng.integers(1, max(1, min(24, longest // 2)) + 1))
        if isinstance(model, LanguageModel):
            found.append(HeldOut(rng.integers(0, model.config.vocab_size, length)))
            continue
        rows = rng.standard_normal((CANDIDATES + 1, length, model.config.embed_dim), np.float32)
        found.append(HeldOut(rows[0], list(rows[1:])))
    return found


def measure(
    model: LanguageModel | TwoHeadedNetwork,
    artifact: Model,
    cases: Sequence[HeldOut],
    *,
    source: str,
    least: float,
) -> Agreement:
    """Let the artifact select, and the float32 model from the same candidates.

    Args:
        model: float32, in inference mode.
        artifact: of fewer bits.
        cases: prompts.
        source: where they come from.
        least: the share of selections as good as float32's that the artifact must reach, 0 to 1.

    Raises:
        ExportError: it does not reach it.
        InputError: a prompt or candidate cannot be read.
    """
    scoring = artifact.manifest.scoring
    same = as_good = 0
    for i, case in enumerate(cases):
        prompt = artifact.reader.read(case.prompt, f"held-out prompt {i}", candidate=False, partial=True)
        if case.candidates is None:
            room = artifact.manifest.limits.max_tokens - len(prompt)
            drawn = artifact.generate(prompt, n=CANDIDATES, max_new_tokens=min(NEW_TOKENS, room), seed=i)
            candidates: list[Any] = [candidate.tokens for candidate in drawn.candidates]
            chosen = drawn.best_index
        else:
            what = f"held-out prompt {i}, candidates"
            candidates = [artifact.reader.read(c, what, candidate=True, partial=False) for c in case.candidates]
            chosen = artifact.rank(prompt, candidates).best_index
        scores = _scores(model, prompt, candidates, scoring)
        expected = int(best_of_n(scores[:, None])[0])
        # Two equal candidates are the same choice.
        is_same = np.array_equal(candidates[chosen], candidates[expected])
        same += int(is_same)
        spread = np.nanmax(scores) - np.nanmin(scores)
        as_good += int(is_same or scores[expected] - scores[chosen] <= _AS_GOOD * spread)
    share = as_good / len(cases)
    if share < least:
        raise ExportError(
            f"{artifact.manifest.precision} selects a candidate as good as float32's for {as_good} of {len(cases)} "
            f"prompts ({source}), {100 * share:.1f}%; at least {100 * least:g}% were asked for: use a higher "
            "precision, or a lower --min-agreement"
        )
    return Agreement(prompts=len(cases), share=share, same=same / len(cases), least=least, source=source)


def _scores(model: LanguageModel | TwoHeadedNetwork, prompt: Any, candidates: list[Any], scoring: Scoring) -> Any:
    """The float32 model's candidate scores (num_candidates,), from whole rows."""
    rows, mask = pad([np.concatenate([prompt, candidate]) for candidate in candidates], scoring.pad_token)
    with torch.no_grad():
        scores = activated(model(torch.from_numpy(rows), torch.from_numpy(mask))[1], scoring)
    own = mask.copy()
    own[:, : len(prompt)] = 0
    found, _ = aggregate(scores.numpy()[:, None], own[:, None], np.ones((1, 1, 1)), scoring.aggregation)
    return found[:, 0]

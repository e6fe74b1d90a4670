"""The test for reduced precision: how often the artifact selects the candidate that the float32 model would.

Errors of individual scores say little about a ranking, so this counts selections, on prompts that the model was not
trained on. If several candidates are equally good, any of them will do: a candidate counts as float32's choice if
float32 rates it lower than its best by at most 1% of the spread of the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bonnx.errors import ExportError, InputError
from bonnx.models.config import LanguageModelConfig, NetworkConfig
from bonnx.models.network import LanguageModel, TwoHeadedNetwork
from bonnx.runtime.arrays import Array
from bonnx.runtime.artifact.manifest import Agreement, Manifest, Scoring
from bonnx.runtime.engine.engine import Engine
from bonnx.runtime.files.lines import in_line, load_arrays, read_values
from bonnx.runtime.files.values import name_of, to_candidate, to_prompt
from bonnx.runtime.model import Model
from bonnx.runtime.rank.request import read_request
from bonnx.runtime.selection.aggregate import aggregate, best_of_n
from bonnx.runtime.text.padding import pad
from bonnx.runtime.text.reader import Item

from ..stages import Report, silent
from .candidates import score_candidates
from .questions import draw_questions

__all__ = ["HeldOut", "default_prompts", "measure", "read_held_out"]

CANDIDATES, NEW_TOKENS, PROMPTS, QUICK_PROMPTS = 16, 64, 50, 20
_AS_GOOD = 0.01
# Enough tokens for the longest built-in question and answer with any tokenizer.
_QUESTION_TOKENS = 512


class HeldOut(NamedTuple):
    """A prompt and its candidates; without candidates, a language model's artifact samples its own."""

    prompt: Item
    candidates: Sequence[Item] | None = None


def read_held_out(path: Path) -> list[HeldOut]:
    """Read prompts from a text file, a JSON Lines file or an .npz file.

    A text file has one prompt per line, a JSON Lines file one object with `prompt` and `candidates` per line. An .npz
    file is for embeddings: `prompts` (prompts, length, embed_dim) and `candidates` (prompts, num_candidates, length,
    embed_dim), float32.

    Raises:
        InputError: if the file cannot be read or is empty.
    """
    try:
        questions = _arrays(load_arrays(path)) if path.suffix == ".npz" else _lines(path)
    except InputError as e:
        raise InputError(f"held-out prompts: {e}; see `bonnx export --help`") from e
    if not questions:
        raise InputError(f"{path} has no prompts; expected one per line")
    return questions


def _arrays(loaded: Array | dict[str, Array]) -> list[HeldOut]:
    arrays = loaded if isinstance(loaded, dict) else {}
    missing = [name for name in ("prompts", "candidates") if name not in arrays]
    if missing:
        raise InputError(f"expected an array '{missing[0]}'; got {', '.join(arrays) or 'none'}")
    prompts, candidates = arrays["prompts"], arrays["candidates"]
    if len(prompts) != len(candidates):
        raise InputError(f"expected as many 'prompts' as 'candidates'; got {len(prompts)} and {len(candidates)}")
    return [HeldOut(prompt, list(answers)) for prompt, answers in zip(prompts, candidates, strict=True)]


def _lines(path: Path) -> list[HeldOut]:
    questions = []
    for number, value in read_values(path):
        with in_line(path, number):
            if isinstance(value, InputError):
                raise value
            candidates = value.get("candidates") if isinstance(value, dict) else None
            if not isinstance(candidates, list | None):
                raise InputError(f"'candidates': expected a list; got {name_of(candidates)}")
            answers = None if candidates is None else [to_candidate(candidate) for candidate in candidates]
            questions.append(HeldOut(to_prompt(value), answers))
    return questions


def default_prompts(
    manifest: Manifest, config: LanguageModelConfig | NetworkConfig, seed: int, *, quick: bool = False
) -> tuple[list[HeldOut], str]:
    """Return default prompts for when the user gives none, and a name for them.

    They are questions if the model reads text; otherwise noise, which is a weak test. A model that generates draws the
    candidates itself. `quick` gives fewer of them.
    """
    count = QUICK_PROMPTS if quick else PROMPTS
    generates = isinstance(config, LanguageModelConfig) and config.vocabulary_head
    text, longest = manifest.text, manifest.limits.max_tokens
    header = manifest.scoring.gate_tokens
    # A gate reads what a chat template writes.
    silent = bool(header) and text.chat_template is None
    if manifest.tokenizer is None or text.unknown == "refuse" or longest < _QUESTION_TOKENS or silent:
        return _noise(config, longest, seed, header, count), "random tokens"
    questions = draw_questions(count, CANDIDATES, seed)
    if generates:
        return [HeldOut(question) for question, _ in questions], "built-in questions"
    if text.chat_template is None:
        return [HeldOut(f"{question}\n", answers) for question, answers in questions], "built-in questions"
    chats = [([{"role": "user", "content": question}], answers) for question, answers in questions]
    return [HeldOut(*chat) for chat in chats], "built-in questions"


def _noise(
    config: LanguageModelConfig | NetworkConfig, longest: int, seed: int, header: Sequence[int], count: int
) -> list[HeldOut]:
    """Return random prompts and candidates; `header` ends each prompt."""
    rng, questions = np.random.default_rng(seed), []
    for _ in range(count):
        length = int(rng.integers(1, max(1, min(24, longest // 2)) + 1))
        if isinstance(config, LanguageModelConfig):
            ids = rng.integers(0, config.vocab_size, (CANDIDATES + 1, length))
            prompt = np.concatenate([ids[0], np.array(header, np.int64)])
            questions.append(HeldOut(prompt, None if config.vocabulary_head else list(ids[1:])))
            continue
        rows = rng.standard_normal((CANDIDATES + 1, length, config.embed_dim), np.float32)
        questions.append(HeldOut(rows[0], list(rows[1:])))
    return questions


def measure(
    load: Callable[[], LanguageModel | TwoHeadedNetwork],
    engine: Engine,
    cases: Sequence[HeldOut],
    *,
    source: str,
    least: float,
    report: Report = silent,
) -> Agreement:
    """Let the artifact and the float32 model select from the same candidates, and compare their choices.

    Args:
        load: returns the float32 model in inference mode; called after the artifact has been closed.
        engine: runs the artifact of reduced precision.
        cases: the prompts.
        source: where the prompts come from, for messages and the manifest.
        least: minimum share of selections that must be as good as float32's, 0 to 1.
        report: is told what begins.

    Raises:
        ExportError: if the share is lower.
        InputError: if a prompt or candidate cannot be read.
    """
    without = next((i for i, case in enumerate(cases) if case.candidates is None), None)
    if without is not None and "generate" not in engine.manifest.graphs:
        raise InputError(
            f"held-out prompt {without} has no candidates, and this model cannot generate any; expected an object with "
            "'prompt' and 'candidates' on each line"
        )
    report(f"selecting for {len(cases)} held-out prompts with ONNX Runtime")
    selected = [_select(engine, case, number) for number, case in enumerate(cases)]
    engine.close()
    report("scoring their candidates with PyTorch in float32")
    model, scoring = load(), engine.manifest.scoring
    same = as_good = 0
    errors: list[Any] = []
    for prompt, candidates, chosen, artifact_scores in selected:
        scores = _scores(model, engine, prompt, candidates, scoring)
        expected = int(best_of_n(scores[:, None])[0])
        # Identical candidates are the same choice.
        is_same = np.array_equal(candidates[chosen], candidates[expected])
        same += int(is_same)
        spread = np.nanmax(scores) - np.nanmin(scores)
        as_good += int(is_same or scores[expected] - scores[chosen] <= _AS_GOOD * spread)
        errors.append(np.abs(artifact_scores - scores))
    share, error = as_good / len(cases), np.concatenate(errors)
    if share < least:
        raise ExportError(
            f"{engine.manifest.precision} selects a candidate as good as float32's for {as_good} of {len(cases)} "
            f"prompts ({source}), {100 * share:.1f}%; expected at least {100 * least:g}%: use a higher precision, or "
            "lower --min-agreement"
        )
    return Agreement(
        prompts=len(cases),
        share=share,
        same=same / len(cases),
        mean_error=float(np.nanmean(error)),
        max_error=float(np.nanmax(error)),
        least=least,
        source=source,
    )


def _select(engine: Engine, case: HeldOut, number: int) -> tuple[Item, list[Any], int, Any]:
    """Return the prompt, its candidates, the index that the artifact selects, and its scores (num_candidates,)."""
    artifact = Model(engine)
    try:
        if case.candidates is not None:
            ranking = artifact.rank(case.prompt, case.candidates)
            return case.prompt, list(case.candidates), ranking.best_index, ranking.candidate_scores
        prompt = engine.reader.prompt(case.prompt)
        room = engine.manifest.limits.max_tokens - len(prompt)
        drawn = artifact.generate(prompt, n=CANDIDATES, max_new_tokens=min(NEW_TOKENS, room), seed=number)
    except InputError as e:
        raise InputError(f"held-out prompt {number}: {e}") from e
    scores = np.array([candidate.score for candidate in drawn.candidates], np.float32)
    return prompt, [candidate.tokens for candidate in drawn.candidates], drawn.best_index, scores


def _scores(
    model: LanguageModel | TwoHeadedNetwork, engine: Engine, prompt: Item, candidates: list[Any], scoring: Scoring
) -> Any:
    """Return the float32 model's candidate scores (num_candidates,)."""
    if not engine.manifest.has_scorer:
        _, mask = pad(candidates, scoring.pad_token)
        certainties = score_candidates(model, np.asarray(prompt), candidates, scoring)[:, None]
        return aggregate(certainties, mask[:, None], np.ones((1, 1, 1)), scoring.aggregation)[0][:, 0]
    request = read_request(engine, prompt, candidates)
    scores = score_candidates(model, request.prompt, request.rows.items, scoring)[:, None]
    method = scoring.aggregation.removeprefix("step_")
    return aggregate(scores, request.mask[:, None], request.steps[:, None], method)[0][:, 0]

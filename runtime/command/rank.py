"""`bonnx rank`: score candidates after a prompt and choose the best."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..inputs import Item
from ..manifest import VOTES
from ..model import load
from ..ranking import Ranking
from . import print_json

__all__ = ["configure", "parse_item", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("artifact", help="folder that `bonnx export` wrote")
    parser.add_argument(
        "--prompt", required=True, help="text, a JSON list of messages or of token ids, or an .npy file of embeddings"
    )
    parser.add_argument(
        "--candidates",
        required=True,
        metavar="FILE",
        help="one candidate a line, or a JSON list of texts, of lists of steps or of lists of token ids; '-' reads "
        "stdin; for embeddings an .npy file (candidates, length, embed_dim) or an .npz file with one array each",
    )
    parser.add_argument("--aggregation", help="last, mean, min, max, prod, or step_ and one of these")
    parser.add_argument("--vote", choices=VOTES, default="score", help="by the answers' scores, or by their number")
    parser.add_argument("--answers", help="what candidates vote for: boxed, number or regex:PATTERN")
    parser.add_argument("--partial", action="store_true", help="candidates are not finished: append no end token")
    parser.add_argument("--truncate", action="store_true", help="leave out the beginning of a prompt that is too long")
    parser.add_argument("--provider", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int)


def run(arguments: argparse.Namespace) -> int:
    """Rank and print."""
    prompt, candidates = _prompt(arguments.prompt), _candidates(arguments.candidates)
    model = load(arguments.artifact, provider=arguments.provider, threads=arguments.threads)
    ranking = model.rank(
        prompt,
        candidates,
        aggregation=arguments.aggregation,
        partial=arguments.partial,
        truncate=arguments.truncate,
        vote=arguments.vote,
        answers=arguments.answers,
    )
    if arguments.json:
        print_json(_as_json(ranking) | {"provider": model.provider})
    else:
        _show(ranking, candidates)
    return 0


def _as_json(ranking: Ranking) -> dict[str, Any]:
    found = {
        "best_index": ranking.best_index,
        "best": ranking.best.tolist() if isinstance(ranking.best, np.ndarray) else ranking.best,
        "candidate_scores": _finite(ranking.candidate_scores),
        "scores": [_finite(scores) for scores in ranking.scores],
        "aggregation": ranking.aggregation,
        "order": ranking.order,
        "margin": None if ranking.margin is None else _finite([ranking.margin])[0],
    }
    if ranking.step_scores is not None:
        found["step_scores"] = [_finite(scores) for scores in ranking.step_scores]
    if ranking.cut:
        found["cut"] = ranking.cut
    if ranking.unreadable:
        found["unreadable"] = {str(i): reason for i, reason in ranking.unreadable.items()}
    if ranking.answers is not None:
        found["answers"] = ranking.answers
    if ranking.group_scores is not None:
        found["group_scores"] = _finite(ranking.group_scores)
    return found


def _show(ranking: Ranking, candidates: Sequence[Item]) -> None:
    """A line for each candidate; with a vote its answer's score and its answer too."""
    answers = ["" if answer is None else str(answer) for answer in ranking.answers or ()]
    width = max(map(len, answers), default=0)
    for i, score in enumerate(ranking.candidate_scores):
        line = f"{'*' if i == ranking.best_index else ' '} {score:9.5f}"
        if ranking.group_scores is not None:
            line += f"  {ranking.group_scores[i]:9.5f}"
        if answers:
            line += f"  {answers[i]:<{width}}"
        shown = str(candidates[i]) if isinstance(candidates[i], str | list) else f"candidate {i}"
        if i in ranking.unreadable:
            shown += f" (cannot be read: {ranking.unreadable[i]})"
        print(f"{line}  {shown}".replace("\n", "\\n"))


def _finite(values: Any) -> list[float | None]:
    """JSON has no NaN and no infinity: null."""
    return [float(value) if math.isfinite(value) else None for value in values]


def _prompt(text: str) -> Item:
    if text.endswith(".npy"):
        prompt: Item = _load_arrays(Path(text))
        return prompt
    return parse_item(text)


def parse_item(text: str) -> Item:
    """A JSON list of whole numbers is token ids, one of objects a conversation; anything else is text."""
    if text.startswith("["):
        try:
            value = json.loads(text)
        except ValueError:
            return text
        if isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in value):
            return value
        if isinstance(value, list) and all(isinstance(message, dict) for message in value):
            return value
    return text


def _load_arrays(path: Path) -> Any:
    try:
        loaded = np.load(path, allow_pickle=False)
        return [loaded[name] for name in loaded.files] if path.suffix == ".npz" else loaded
    except (OSError, ValueError) as e:
        raise InputError(f"cannot read {path} as numpy arrays: {e}") from e


def _candidates(name: str) -> list[Item]:
    if name.endswith((".npy", ".npz")):
        return list(_load_arrays(Path(name)))
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"--candidates: cannot read {name}: {e}") from e
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except ValueError:
            values = None
        if isinstance(values, list):
            if any(not isinstance(value, str | list) for value in values):
                raise InputError(f"--candidates: {name}: expected a JSON list of texts or of lists of token ids")
            # A flat list of numbers would be one candidate of ids on one line; that form is a list of lists.
            return values
    return [*text.splitlines()]

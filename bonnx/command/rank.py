"""`bonnx rank`: score candidates after a prompt and choose the best."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from bonnx.runtime.artifact.manifest import AGGREGATIONS, VOTES
from bonnx.runtime.files.lines import load_arrays, read_candidates
from bonnx.runtime.files.values import to_prompt, to_value
from bonnx.runtime.model import load
from bonnx.runtime.rank.result import Ranking
from bonnx.runtime.text.reader import Item

from ..errors import InputError
from . import add_cache_dir, print_json, print_text

__all__ = ["configure", "parse_prompt", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("artifact", help="folder that `bonnx export` wrote")
    parser.add_argument(
        "--prompt",
        required=True,
        help="text; or as JSON a list of messages or of token ids; or an .npy file of embeddings",
    )
    parser.add_argument(
        "--candidates",
        required=True,
        metavar="FILE",
        help="one candidate a line, text or JSON, or one JSON list of texts, of lists of steps or of lists of token "
        "ids; '-' reads stdin; for embeddings an .npy file (candidates, length, embed_dim) or an .npz file with one "
        "array each",
    )
    parser.add_argument(
        "--text", action="store_true", help="read prompt and candidates as text even where they look like JSON"
    )
    parser.add_argument(
        "--aggregation",
        help=f"{', '.join(AGGREGATIONS)}, or step_ and one of these; by default the artifact's own rule",
    )
    parser.add_argument(
        "--vote", choices=VOTES, default="score", help="choose by score, or vote by the answers' weights or number"
    )
    parser.add_argument("--answers", help="what candidates vote for: boxed, number or regex:PATTERN")
    parser.add_argument("--partial", action="store_true", help="candidates are unfinished: append no end token")
    parser.add_argument("--truncate", action="store_true", help="drop the beginning of a prompt that is too long")
    parser.add_argument(
        "--instruction", help="of a reranker: what makes a document relevant (default: the model's own)"
    )
    parser.add_argument("--provider", choices=["auto", "cpu", "cuda"], default="auto", help="where the model runs")
    parser.add_argument("--threads", type=int, help="CPU threads of one run; by default one for each physical core")
    add_cache_dir(parser)


def run(arguments: argparse.Namespace) -> int:
    """Rank and print."""
    prompt, candidates = _prompt(arguments), _candidates(arguments)
    model = load(
        arguments.artifact, provider=arguments.provider, threads=arguments.threads, cache_dir=arguments.cache_dir
    )
    ranking = model.rank(
        prompt,
        candidates,
        aggregation=arguments.aggregation,
        partial=arguments.partial,
        truncate=arguments.truncate,
        instruction=arguments.instruction,
        vote=arguments.vote,
        answers=arguments.answers,
    )
    if arguments.json:
        print_json(ranking.to_dict() | {"provider": model.provider})
    else:
        _show(ranking, candidates)
    return 0


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
        print_text(f"{line}  {shown}")


def parse_prompt(text: str, option: str, *, literal: bool) -> Item:
    """A prompt of the command line, read as a line of a file is.

    Raises:
        InputError: it begins as JSON does and is no prompt.
    """
    try:
        return to_prompt(to_value(text, literal=literal))
    except InputError as e:
        raise InputError(f"{option}: {e}") from e


def _prompt(arguments: argparse.Namespace) -> Item:
    text: str = arguments.prompt
    if text.endswith(".npy") and not arguments.text:
        # The reader refuses a file that holds several arrays.
        return cast(Item, load_arrays(Path(text)))
    return parse_prompt(text, "--prompt", literal=arguments.text)


def _candidates(arguments: argparse.Namespace) -> list[Item]:
    name: str = arguments.candidates
    try:
        if name.endswith((".npy", ".npz")):
            arrays = load_arrays(Path(name))
            return list(arrays.values() if isinstance(arrays, dict) else arrays)
        return read_candidates(name, literal=arguments.text)
    except InputError as e:
        raise InputError(f"--candidates: {e}") from e

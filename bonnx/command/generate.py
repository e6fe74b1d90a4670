"""`bonnx generate`: sample N completions of a prompt, score them, choose the best."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import msgspec
import numpy as np
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bonnx.runtime.engine.engine import Engine, open_engine
from bonnx.runtime.files.lines import read_prompts
from bonnx.runtime.generate.options import DEFAULTS, SEARCH_OPTIONS, GenerateOptions, option_help
from bonnx.runtime.generate.request import options_within
from bonnx.runtime.generate.result import Candidate, Generation
from bonnx.runtime.model import Model
from bonnx.runtime.report import SearchRecord, show
from bonnx.runtime.search import METHODS
from bonnx.runtime.text.reader import Item

from ..errors import BonnxError, InputError, NoWinnerError, UpstreamError
from . import add_cache_dir, print_json
from .rank import parse_prompt
from .upstream import add_upstream, answerer, upstream_settings

__all__ = ["configure", "run"]

# The fields of a candidate with `--json`.
_CANDIDATE = ("text", "tokens", "score", "finish_reason", "top_tokens", "top_log_probs")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("artifact", help="folder that `bonnx export` wrote")
    parser.add_argument("prompt", nargs="?", help="text, or as JSON a list of token ids or of messages")
    parser.add_argument("--prompts", metavar="FILE", help="file of prompts, one a line, text or JSON; '-' reads stdin")
    parser.add_argument("--text", action="store_true", help="read prompts as text even where they look like JSON")
    _add_sampling(parser)
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="cut what is not finished after this time")
    parser.add_argument("--method", help=f"how to spend n completions in a search: {', '.join(METHODS)}")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the method, such as width=4"
    )
    parser.add_argument("--policy", metavar="FILE", help="choose the method by the prompt's difficulty")
    parser.add_argument("--answers", help="what candidates vote for: boxed, number, regex:PATTERN or tool")
    parser.add_argument("--vote", help="score, weighted or majority; by default the method's own")
    parser.add_argument("--save", metavar="RUN", help="also append the search to this folder, for `bonnx report`")
    add_upstream(parser)
    parser.add_argument("--provider", choices=["auto", "cpu", "cuda"], default="auto", help="where the model runs")
    parser.add_argument("--threads", type=int, help="CPU threads of one run; by default one for each physical core")
    add_cache_dir(parser)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    """An option for each of `GenerateOptions`, with its default and help."""
    hints = get_type_hints(GenerateOptions)
    for name, default in DEFAULTS.items():
        flag = "-n" if name == "n" else f"--{name.replace('_', '-')}"
        if name == "stop":
            parser.add_argument(flag, action="append", help=f"{option_help(name)}; may be repeated; here texts only")
            continue
        kinds = get_args(hints[name]) or (hints[name],)
        kind = next(kind for kind in (int, float, str) if kind in kinds)
        parser.add_argument(flag, type=kind, default=default, help=option_help(name))


def run(arguments: argparse.Namespace) -> int:
    """Generate and print."""
    prompts = _prompts(arguments)
    options = cast(GenerateOptions, {name: getattr(arguments, name) for name in DEFAULTS})
    engine = open_engine(
        arguments.artifact, provider=arguments.provider, threads=arguments.threads, cache_dir=arguments.cache_dir
    )
    bad = 0
    with ExitStack() as stack:
        answer = _answerer(engine, options, arguments, stack)
        for line, prompt in prompts:
            try:
                if isinstance(prompt, InputError):
                    raise prompt
                answer(prompt)
            except (InputError, NoWinnerError, UpstreamError) as e:
                if line is None:
                    raise
                bad += 1
                _tell(line, e, arguments)
    if bad:
        print(f"bonnx generate: {bad} of the prompts could not be answered", file=sys.stderr)
    return 1 if bad else 0


def _answerer(
    engine: Engine, options: GenerateOptions, arguments: argparse.Namespace, stack: ExitStack
) -> Callable[[Item], None]:
    """A function that prints the answer to a prompt; options that would fail for every prompt are refused now."""
    if arguments.upstream is not None:
        return answerer(Model(engine, arguments.artifact), arguments, _settings(arguments), stack)
    upstream_settings(arguments)
    if arguments.method is not None or arguments.policy is not None:
        settings = _search_settings(arguments, options)
        return lambda prompt: _search(engine, prompt, settings, arguments)
    for name in ("set", "answers", "vote", "save"):
        if getattr(arguments, name):
            raise InputError(f"--{name} belongs to --method, --policy or --upstream")
    options_within(engine, np.zeros(1, np.int64), options, engine.manifest.limits.max_tokens - 1)
    model = Model(engine, arguments.artifact)

    def answer(prompt: Item) -> None:
        if arguments.json:
            print_json(_as_json(prompt, model.generate(prompt, deadline=arguments.deadline, **options)))
        else:
            _show(model, prompt, options, arguments.deadline)

    return answer


def _tell(line: int, error: BonnxError, arguments: argparse.Namespace) -> None:
    """Print why a line of `--prompts` has no answer, in its place among the answers."""
    if arguments.json:
        print_json({"ok": False, "line": line, "error": type(error).__name__, "reason": str(error)})
    where = f"{arguments.prompts}, line {line}: "
    print(f"bonnx generate: {where}{str(error).removeprefix(where)}", file=sys.stderr)


def _prompts(arguments: argparse.Namespace) -> Iterator[tuple[int | None, Item | InputError]]:
    """The prompts, those of a file with their lines, read as they are needed."""
    if (arguments.prompt is None) == (arguments.prompts is None):
        raise InputError("expected a prompt, or --prompts FILE; got " + ("both" if arguments.prompt else "neither"))
    if arguments.prompt is not None:
        return iter([(None, parse_prompt(arguments.prompt, "prompt", literal=arguments.text))])
    return iter(read_prompts(arguments.prompts, literal=arguments.text))


def _search_settings(arguments: argparse.Namespace, options: GenerateOptions) -> dict[str, Any]:
    """The arguments of `Model.search`."""
    if arguments.prune_every:
        raise InputError("--prune-every: with a method, pruning is one of its own: --method pruned --set every=12")
    if arguments.top_log_probs:
        raise InputError("--top-log-probs: not available with a method; leave it out")
    settings: dict[str, object] = {
        name: value for name, value in options.items() if name in SEARCH_OPTIONS and value is not None
    }
    settings |= _settings(arguments)
    if arguments.method is not None and arguments.policy is None:
        settings["method"] = arguments.method
    elif arguments.method is not None:
        raise InputError("--method: a policy chooses the method; leave one of them out")
    settings |= {"budget": arguments.n, "policy": arguments.policy, "deadline": arguments.deadline}
    return settings | {"answers": arguments.answers, "vote": arguments.vote}


def _settings(arguments: argparse.Namespace) -> dict[str, object]:
    """The settings of the method."""
    settings: dict[str, object] = {}
    for setting in arguments.set:
        name, equals, value = setting.partition("=")
        if not equals:
            raise InputError(f"--set: expected NAME=VALUE, such as width=4; got {setting!r}")
        settings[name] = _value(value)
    return settings


def _value(text: str) -> float | bool | str:
    """A number, true or false if it is one, else the text."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _search(engine: Engine, prompt: Item, settings: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Search, print, and save the search with --save."""
    result = Model(engine, arguments.artifact).search(prompt, **settings)
    record = result.to_record(prompt, engine.reader.pieces)
    if arguments.save:
        folder = Path(arguments.save)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "searches.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        except OSError as e:
            raise InputError(f"--save: cannot write to {folder}: {e.strerror or e}") from e
    if arguments.json:
        print_json({"best": _text_or_tokens(result.best), **record})
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=10_000)
    show(console, msgspec.convert(record, SearchRecord))


def _as_json(prompt: Item, result: Generation) -> dict[str, object]:
    whole = result.to_dict()
    candidates = [
        {name: candidate[name] for name in _CANDIDATE if name in candidate} for candidate in whole["candidates"]
    ]
    chosen = {"best_index": result.best_index, "best": _text_or_tokens(result.best), "candidates": candidates}
    counts = {name: whole[name] for name in ("prompt_tokens", "computed_tokens")}
    return {"prompt": prompt, **chosen, **counts}


def _text_or_tokens(candidate: Candidate) -> str | list[int]:
    tokens: list[int] = candidate.tokens.tolist()
    return tokens if candidate.text is None else candidate.text


def _show(model: Model, prompt: Item, options: GenerateOptions, deadline: float | None) -> None:
    """The candidates as they grow, where there is a terminal to show it; then a table."""
    console = Console(highlight=False)
    title = Text(str(prompt).replace("\n", "\\n"))
    if console.is_terminal:
        with Live(console=console, refresh_per_second=12) as live:
            result = model.generate(
                prompt,
                deadline=deadline,
                on_progress=lambda grown: live.update(_table(title, grown, sort=False)),
                **options,
            )
            live.update(_table(title, result, sort=True))
    else:
        result = model.generate(prompt, deadline=deadline, **options)
        # A file or a pipe has no width: nothing is folded or cut there.
        Console(highlight=False, width=10_000).print(_table(title, result, sort=True))
    tokens = f"{result.prompt_tokens} prompt tokens computed once, {result.computed_tokens} of the candidates"
    print(f"{tokens}, {model.provider}", file=sys.stderr)


def _table(title: Text, result: Generation, *, sort: bool) -> Table:
    """One line a candidate, the best first at the end, so that a long list is read from the top."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    table.add_column("#", justify="right")
    table.add_column("score", justify="right")
    table.add_column("tokens", justify="right")
    table.add_column("end")
    table.add_column("candidate", overflow="fold")
    numbers = list(range(len(result.candidates)))
    if sort:
        numbers.sort(key=lambda i: -_rankable(result.candidates[i].score))
    for i in numbers:
        candidate = result.candidates[i]
        best = i == result.best_index
        score = "-" if math.isnan(candidate.score) else f"{candidate.score:.5f}"
        text = Text(str(_text_or_tokens(candidate)).replace("\n", "\\n"))
        row = ("*" if best else "", str(i), score, str(len(candidate.tokens)), candidate.finish_reason or "...", text)
        table.add_row(*row, style="bold green" if best else None)
    return table


def _rankable(score: float) -> float:
    return -math.inf if math.isnan(score) else score

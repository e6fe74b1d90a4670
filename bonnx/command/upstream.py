"""`--upstream`: sample completions from another server: the options of two commands, and what `bonnx generate` does."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bonnx.runtime.best_of_n.best_of_n import BestOfN
from bonnx.runtime.best_of_n.result import BestOfNResult
from bonnx.runtime.generate.options import DEFAULTS
from bonnx.runtime.model import Model
from bonnx.runtime.text.reader import Item
from bonnx.runtime.upstream.settings import UpstreamSettings, read_key

from ..errors import InputError
from . import print_json

__all__ = ["add_upstream", "answerer", "upstream_settings"]

_KEY = "BONNX_UPSTREAM_KEY"
# What OpenAI's protocol calls an option, or an extension of it that most servers know.
_FIELDS = {"max_new_tokens": "max_tokens"}


def add_upstream(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--upstream",
        metavar="URL",
        help="sample completions from this OpenAI-compatible server, such as http://localhost:9000/v1",
    )
    parser.add_argument("--upstream-model", metavar="NAME", help="the upstream's model")
    parser.add_argument(
        "--upstream-key-file", type=Path, help=f"file with the key of the upstream; or set {_KEY} in the environment"
    )
    parser.add_argument(
        "--upstream-concurrency",
        type=int,
        default=16,
        metavar="REQUESTS",
        help="maximum number of open requests to the upstream",
    )


def upstream_settings(arguments: argparse.Namespace) -> UpstreamSettings | None:
    """The upstream; None if there is none.

    Raises:
        InputError: an option is invalid, or there is one without an upstream.
    """
    if arguments.upstream is None:
        for name in ("upstream_model", "upstream_key_file"):
            if getattr(arguments, name) is not None:
                raise InputError(f"--{name.replace('_', '-')} belongs to --upstream")
        return None
    key = read_key(arguments.upstream_key_file, _KEY)
    return UpstreamSettings(arguments.upstream, arguments.upstream_model, key, arguments.upstream_concurrency)


def answerer(
    model: Model, arguments: argparse.Namespace, settings: dict[str, Any], stack: ExitStack
) -> Callable[[Item], None]:
    """A function that answers a prompt with completions of the upstream, and prints them.

    Args:
        model: scores.
        arguments: of the command.
        settings: of the method.
        stack: closes the connections to the upstream.

    Raises:
        InputError: an option is invalid, or is not available with an upstream.
    """
    from bonnx.runtime.upstream.client import Upstream

    for name in ("policy", "save", "prune_every", "top_log_probs"):
        if getattr(arguments, name):
            raise InputError(f"--{name.replace('_', '-')}: not available with --upstream")
    upstream = upstream_settings(arguments)
    assert upstream is not None
    client = stack.enter_context(
        Upstream(upstream.url, upstream.model, api_key=upstream.api_key, concurrency=upstream.concurrency)
    )
    best_of_n = BestOfN(model, client)
    sampling = {
        _FIELDS.get(name, name): value
        for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop")
        # The protocol has no `top_k`; servers that do not know it need not see its default.
        if (value := getattr(arguments, name)) is not None and (name == "temperature" or value != DEFAULTS[name])
    }

    def answer(prompt: Item) -> None:
        result = best_of_n.run(
            prompt,
            arguments.n,
            method=arguments.method or "best_of_n",
            vote=arguments.vote,
            answers=arguments.answers,
            aggregation=arguments.aggregation,
            deadline=arguments.deadline,
            sampling=sampling,
            **settings,
        )
        if arguments.json:
            print_json({"prompt": prompt, "best": result.best.text, **result.to_dict()})
        else:
            _show(prompt, result)

    return answer


def _show(prompt: Item, result: BestOfNResult) -> None:
    """The completions in a table, the best one last, so that a long list is read from its end."""
    console = Console(highlight=False)
    table = Table(title=Text(str(prompt).replace("\n", "\\n")), title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for heading in ("#", "score"):
        table.add_column(heading, justify="right")
    table.add_column("end")
    table.add_column("completion", overflow="fold")
    for i in reversed(result.ranking.order):
        completion, score = result.completions[i], result.ranking.candidate_scores[i]
        best = i == result.best_index
        text = str(completion.text or completion.message).replace("\n", "\\n")
        number = "-" if score != score else f"{score:.5f}"
        cells = ("*" if best else "", str(i), number, completion.finish_reason or "", Text(text))
        table.add_row(*cells, style="bold green" if best else None)
    (console if console.is_terminal else Console(highlight=False, width=10_000)).print(table)
    for failure in result.failures:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"one completion failed: {failure.reason}")

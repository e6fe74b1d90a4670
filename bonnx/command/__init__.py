"""The `bonnx` command: data to stdout, everything else to stderr; exit 2 for wrong usage, 1 for failure."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from types import ModuleType

from .. import __version__
from ..errors import BonnxError, InputError
from .interrupt import STOPPED, Interrupt, interruptible

__all__ = ["STOPPED", "add_cache_dir", "main", "print_json", "print_text"]

# Each module has `configure(parser)` and `run(arguments) -> exit code`; only the chosen one is imported.
_COMMANDS = {
    "export": ("bonnx.command.export", "write a model as an artifact and verify it"),
    "inspect": ("bonnx.command.inspect", "show what an artifact contains"),
    "verify": ("bonnx.command.verify", "check an artifact on this machine"),
    "doctor": ("bonnx.command.doctor", "show what is installed and what is wrong with it"),
    "generate": ("bonnx.command.generate", "sample completions, score them and choose the best"),
    "report": ("bonnx.command.report", "show a search run in a browser or in the terminal"),
    "rank": ("bonnx.command.rank", "score candidates after a prompt and choose the best"),
    "batch": ("bonnx.command.batch", "rank every row of a file"),
    "serve": ("bonnx.command.serve", "serve a model over HTTP"),
    "page": ("bonnx.command.page", "write a web page that runs a model in the visitor's browser"),
}
# Marks that change the direction in which the rest of a line is shown.
_TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
# The exit code of a program that wrote to a pipe without a reader, as shells report it.
_READER_LEFT = 141
# The extra that a command needs.
_EXTRAS = {"serve": "serve", "export": "export"}


class _Help(argparse.HelpFormatter):
    """Help in which every option shows its default, where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # 0 equals False, and is a default to show.
        silent = action.default is None or action.default is False or action.default in ([], argparse.SUPPRESS)
        if action.option_strings and action.help and not silent:
            return f"{action.help} (default: %(default)s)"
        return action.help


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    name = next((word for word in argv if not word.startswith("-")), None)
    prefix = f"bonnx {name}" if name in _COMMANDS else "bonnx"
    with interruptible(f"{prefix}: stopped") as interrupt:
        try:
            try:
                code = _run(argv, name, prefix, interrupt)
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()
        except BrokenPipeError:
            # The reader has read enough, as `head` does; what is still in the buffer is dropped.
            with contextlib.suppress(OSError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _READER_LEFT
        except BaseException as e:
            # A module that is being imported may turn it into another error.
            if not interrupt.noticed and not isinstance(e, KeyboardInterrupt):
                raise
            _say(f"{prefix}: stopped")
            return STOPPED
    return code


def _run(argv: list[str], chosen: str | None, prefix: str, interrupt: Interrupt) -> int:
    parser = argparse.ArgumentParser(prog="bonnx", description="Best-of-N on ONNX.")
    parser.add_argument("--version", action="version", version=f"bonnx {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    module: ModuleType | None = None
    for name, (path, summary) in _COMMANDS.items():
        subparser = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", formatter_class=_Help
        )
        if name == chosen:
            try:
                module = importlib.import_module(path)
            except Exception as e:  # a broken package may raise anything
                if interrupt.noticed:
                    raise
                return _not_imported(name, e)
            module.configure(subparser)
            subparser.add_argument("--json", action="store_true", help="print JSON, one object a line")
    arguments = parser.parse_args(argv)
    assert module is not None, "argparse refuses a command that is not listed"
    try:
        code: int = module.run(arguments)
    except BonnxError as e:
        if interrupt.noticed:
            # An import that was interrupted looks like a broken installation.
            raise
        if arguments.json:
            print_json({"ok": False, "error": type(e).__name__, "reason": str(e)})
        _say(f"{prefix}: {e}")
        return 2 if isinstance(e, InputError) else 1
    except BrokenPipeError:
        raise
    except OSError as e:
        # Errors that no command expects: a full disk, a file that vanished.
        _say(f"{prefix}: {e}")
        return 1
    return code


def _not_imported(name: str, error: Exception) -> int:
    """Say which extra a command needs, or that what is installed is broken."""
    missing = (error.name or "") if isinstance(error, ImportError) else ""
    if missing.startswith("bonnx"):
        raise error
    if isinstance(error, ModuleNotFoundError) and "." not in missing:
        extra = _EXTRAS.get(name)
        command = f"pip install bonnx[{extra}]" if extra else "pip install bonnx"
        _say(f"bonnx {name}: {missing} is not installed; run `{command}`")
    else:
        # If only a part of a package is missing, the package is broken, or another module has its name.
        reason = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        _say(f"bonnx {name}: {missing or 'a package'} cannot be imported: {reason}; run `bonnx doctor`")
    return 1


def _say(line: str) -> None:
    """Print a line on stderr, if there is one."""
    if sys.stderr is None:
        # `print` would use stdout, which is for data.
        return
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def add_cache_dir(parser: argparse.ArgumentParser) -> None:
    """Add the option of `bonnx.load`, as an absolute path: workers may run in other folders."""
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        type=os.path.abspath,
        help="keep optimized graphs and packed weights there, so that all graphs and processes share their memory "
        "(CPU only; default: no cache)",
    )


def print_json(value: Mapping[str, object]) -> None:
    """One object on stdout; in ASCII where it holds what stdout's encoding does not, such as half a surrogate pair."""
    try:
        print(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except UnicodeEncodeError:
        print(json.dumps(value, allow_nan=False))


def print_text(line: str) -> None:
    """A line on stdout; what its encoding does not hold is escaped, and what would end the line or steer a terminal."""
    encoding = sys.stdout.encoding or "utf-8"
    line = "".join(c if c == " " or c.isprintable() else _escaped(c) for c in line)
    print(line.encode(encoding, "backslashreplace").decode(encoding))


def _escaped(character: str) -> str:
    """As a program would write it. Spaces of other widths and invisible joiners belong to text."""
    category = unicodedata.category(character)
    steers = category in ("Cc", "Zl", "Zp") or unicodedata.bidirectional(character) in _TURNS
    return character.encode("unicode_escape").decode() if steers else character

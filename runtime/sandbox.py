"""Chat templates of strangers in Jinja2's sandbox: what they may call, how long they may run. Imported lazily."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from .errors import ArtifactError, InputError
from .parts import Parts, TakesTextError

__all__ = ["compile_template", "render"]

# Turns of all loops and calls of all macros in one rendering; size of one product; characters of the text.
MAX_STEPS, MAX_SIZE, MAX_CHARACTERS = 200_000, 10_000_000, 10_000_000


class _RefusalError(TemplateError):
    """What `raise_exception` in a template raises."""


class _EndlessError(TemplateError):
    """A rendering exceeds what it may cost."""


class _Rendering:
    """What one rendering may still cost, and the time of day that it sees."""

    def __init__(self, now: datetime) -> None:
        self.steps, self.now = MAX_STEPS, now


_rendering: ContextVar[_Rendering] = ContextVar("rendering")


class _Generation(Extension):
    """`{% generation %}`, which marks the assistant's words for training, is a block that only writes its content."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    @staticmethod
    def _content(caller: Callable[[], str]) -> str:
        return caller()


class _SteppedCode(CodeGenerator):
    """Calls `environment.step()` at every turn of a loop and every call of a macro: templates must end."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:  # noqa: N802 - named by jinja2
        node.body.insert(0, _step())
        super().visit_For(node, frame)

    def visit_Macro(self, node: nodes.Macro, frame: Frame) -> None:  # noqa: N802
        node.body.insert(0, _step())
        super().visit_Macro(node, frame)


def _step() -> nodes.Node:
    return nodes.ExprStmt(nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None))


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox in which transformers renders templates, with an end to everything."""

    code_generator_class = _SteppedCode
    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension])
        self.filters["tojson"] = _to_json
        self.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_SafeNamespace
        )

    def step(self) -> None:
        rendering = _rendering.get()
        rendering.steps -= 1
        if rendering.steps < 0:
            raise _EndlessError(f"more than {MAX_STEPS} turns of its loops")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        size = _size(operator, left, right)
        if size > MAX_SIZE:
            raise _EndlessError(f"a result of `{operator}` of size {size}")
        return super().call_binop(context, operator, left, right)


def _size(operator: str, left: Any, right: Any) -> int:
    """Size of a product or power: characters or items of what is repeated, bits of an integer."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        return bits * right if operator == "**" else bits + right.bit_length()
    times, repeated = (left, right) if isinstance(left, int) else (right, left)
    return times * len(repeated) if isinstance(times, int) and isinstance(repeated, (str, list, tuple)) else 0


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Plain JSON; jinja2's own filter writes `<` and the like for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, default=_listed
    )


def _listed(value: Any) -> list[Any]:
    if isinstance(value, Parts):
        return list(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def _raise_exception(message: Any) -> None:
    raise _RefusalError(str(message))


def _strftime_now(form: str) -> str:
    return _rendering.get().now.strftime(form)


class _Dict:
    """`dict` for templates: makes dictionaries, but is not Python's type, whose attributes lead further."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _SafeNamespace(Namespace):
    """`namespace` for templates, closed to names of Python's inside."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be a template's own name
        self, *positional = args
        values = dict(*positional, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


def compile_template(source: str) -> jinja2.Template:
    """The template, ready to be rendered by many threads.

    Raises:
        ArtifactError: it is no template; the line is named.
    """
    try:
        return _Sandbox().from_string(source)
    except jinja2.TemplateSyntaxError as e:
        raise ArtifactError(f"chat template, line {e.lineno}: {e.message}; correct it and export again") from e
    except Exception as e:  # jinja2 evaluates constants when it compiles, and Python limits nesting
        raise ArtifactError(f"chat template: cannot be compiled: {type(e).__name__}: {e}") from e


def _bounded(pieces: Iterator[str]) -> Iterator[str]:
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > MAX_CHARACTERS:
            raise _EndlessError(f"more than {MAX_CHARACTERS} characters")
        yield piece


def render(template: jinja2.Template, given: Mapping[str, Any], now: datetime) -> str:
    """The text that `template` writes for `given`; `now` is what `strftime_now` tells.

    Raises:
        InputError: the template refuses these messages, or fails on them.
        ArtifactError: it reached for what the sandbox withholds, or exceeds what a rendering may cost.
        TakesTextError: it takes a text where content is in parts.
    """
    token = _rendering.set(_Rendering(now))
    try:
        return "".join(_bounded(template.generate(**given)))
    except _RefusalError as e:
        raise InputError(f"the model's chat template refuses these messages: {e}") from e
    except _EndlessError as e:
        raise ArtifactError(f"the chat template was stopped: {e}; correct the template and export again") from e
    except (SecurityError, OverflowError, MemoryError, RecursionError) as e:
        raise ArtifactError(f"the chat template was refused: {type(e).__name__}: {e}") from e
    except TakesTextError:
        raise
    except Exception as e:  # whatever an expression of the template raises
        raise InputError(f"the model's chat template cannot render these messages: {type(e).__name__}: {e}") from e
    finally:
        _rendering.reset(token)

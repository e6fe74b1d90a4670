"""Chat templates in Jinja2's sandbox: untrusted code with a budget for what it reads and makes. Imported lazily."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from types import BuiltinMethodType, MethodType
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import LoopControlExtension
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from markupsafe import Markup

from bonnx.errors import ArtifactError, InputError

from .budget import EndlessError, deep_size, method_size, operator_size, shallow_size, spec_size
from .parts import TakesTextError
from .rendering import current_budget, rendering, spend_shown
from .template_code import GenerationTag, MeteredCode
from .template_functions import RefusalError, add_functions, write

__all__ = ["compile_template", "render"]

# Characters of the text.
MAX_CHARACTERS = 10_000_000


class _Formatter(SandboxedFormatter):
    """`str.format` that pays for each field before it is written."""

    def convert_field(self, value: object, conversion: str | None) -> object:
        spend_shown(value, "format")
        return super().convert_field(value, conversion)

    def format_field(self, value: object, format_spec: str) -> str:
        spend_shown(value, "format")
        current_budget().spend(4 * spec_size(format_spec), "format")
        text: str = super().format_field(value, format_spec)
        return text


class _EscapeFormatter(_Formatter, SandboxedEscapeFormatter):
    pass


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox in which transformers renders templates, with a budget for every operation."""

    code_generator_class = MeteredCode
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, LoopControlExtension], finalize=write
        )
        add_functions(self.filters, self.tests, self.globals)

    def turn(self, constant: int) -> bool:
        """A turn of a loop or a call of a macro, with `constant` bytes of the template's own text."""
        current_budget().turn(constant)
        return True

    def shown(self, values: tuple[object, ...]) -> tuple[object, ...]:
        """Values that are joined as texts."""
        for value in values:
            spend_shown(value, "a result of `~`")
        return values

    def read(self, value: object) -> object:
        """A value that is compared."""
        if isinstance(value, (str, list, tuple, dict)):
            budget = current_budget()
            budget.spend(deep_size(value, budget.left), "a comparison")
        return value

    def copied(self, value: object) -> object:
        """A value of which a part is copied."""
        current_budget().spend(shallow_size(value), "a slice")
        return value

    def call(self, context: Context, obj: object, /, *args: object, **kwargs: object) -> object:
        owner = obj.__self__ if isinstance(obj, (BuiltinMethodType, MethodType)) else None
        if owner is self and callable(obj):
            return obj(*args)
        method = str(getattr(obj, "__name__", "a call"))
        budget, name = current_budget(), f"`{method}`"
        size = 0
        if isinstance(owner, (str, bytes, int, float, list, tuple, dict)) or owner in (str, bytes, int, dict):
            args = tuple(list(arg) if isinstance(arg, Iterator) else arg for arg in args)
            # Jinja2 adds the names of the scope, such as `_loop_vars`.
            named = [value for key, value in kwargs.items() if not key.startswith("_")]
            size = method_size(method, owner, [*args, *named], budget.left)
        budget.spend(size, name)
        return budget.check(super().call(context, obj, *args, **kwargs), name)

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        budget, name = current_budget(), f"a result of `{operator}`"
        budget.spend(operator_size(operator, left, right, budget.left), name)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: object) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None or not isinstance(value, (BuiltinMethodType, MethodType)):
            return None
        source, takes_map = value.__self__, value.__name__ == "format_map"
        assert isinstance(source, str)
        escape = source.escape if isinstance(source, Markup) else None
        formatter = _Formatter(self) if escape is None else _EscapeFormatter(self, escape=escape)

        def format(*args: Any, **kwargs: object) -> str:
            if takes_map:
                (kwargs,), args = args, ()
            text: str = type(source)(formatter.vformat(source, args, kwargs))
            return text

        return format


def compile_template(source: str) -> jinja2.Template:
    """The template, ready to be rendered by many threads.

    Raises:
        ArtifactError: it is not a valid template; the message names the line.
    """
    try:
        return _Sandbox().from_string(source)
    except jinja2.TemplateSyntaxError as e:
        raise ArtifactError(f"chat template, line {e.lineno}: {e.message}; correct it and export again") from e
    except Exception as e:  # Jinja2 evaluates constants when it compiles, and Python limits nesting
        raise ArtifactError(f"chat template: cannot be compiled: {type(e).__name__}: {e}") from e


def _bounded(pieces: Iterator[str]) -> Iterator[str]:
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > MAX_CHARACTERS:
            raise EndlessError(f"more than {MAX_CHARACTERS} characters")
        yield piece


def render(template: jinja2.Template, variables: Mapping[str, object], now: datetime) -> str:
    """The text that `template` writes for `variables`; `now` is the time that `strftime_now` gives.

    Raises:
        InputError: the template refuses these messages, or fails on them.
        ArtifactError: it accessed something that the sandbox withholds, or exceeded its budget.
        TakesTextError: it expects a text where the content is in parts.
    """
    try:
        with rendering(variables, now, MAX_CHARACTERS):
            return "".join(_bounded(template.generate(**variables)))
    except RefusalError as e:
        raise InputError(f"the model's chat template refuses these messages: {e}") from e
    except EndlessError as e:
        raise ArtifactError(f"the chat template was stopped: {e}; correct the template and export again") from e
    except (SecurityError, OverflowError, MemoryError, RecursionError) as e:
        raise ArtifactError(f"the chat template was refused: {type(e).__name__}: {e}") from e
    except TakesTextError:
        raise
    except Exception as e:  # anything that an expression of the template raises
        raise InputError(f"the model's chat template cannot render these messages: {type(e).__name__}: {e}") from e

"""Chat templates of strangers in Jinja2's sandbox: what they may call, how long they may run. Imported lazily."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from types import BuiltinMethodType, MethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame, operators
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.utils import Namespace, generate_lorem_ipsum, pass_context
from markupsafe import Markup

from ...errors import ArtifactError, InputError
from .budget import (
    STRING,
    Budget,
    EndlessError,
    deep_size,
    filter_size,
    method_size,
    operator_size,
    shallow_size,
    shown_size,
    spec_size,
)
from .parts import Parts, TakesTextError

__all__ = ["compile_template", "render"]

# Characters of the text.
MAX_CHARACTERS = 10_000_000


class _RefusalError(TemplateError):
    """What `raise_exception` in a template raises."""


class _Rendering:
    """What one rendering may still cost, and the time of day that it sees."""

    def __init__(self, given: int, now: datetime) -> None:
        self.budget, self.now = Budget(given), now


_rendering: ContextVar[_Rendering] = ContextVar("rendering")


def _budget() -> Budget:
    return _rendering.get().budget


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


class _MeteredCode(CodeGenerator):
    """Makes templates pay for what `_Sandbox` cannot see: loops, macros, `~`, comparisons and slices."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:  # noqa: N802 - named by jinja2
        node.body.insert(0, nodes.ExprStmt(_step(node.body)))
        if node.test is not None:
            node.test = nodes.And(_step([]), node.test)
        super().visit_For(node, frame)

    def visit_Macro(self, node: nodes.Macro, frame: Frame) -> None:  # noqa: N802
        node.body.insert(0, nodes.ExprStmt(_step(node.body)))
        super().visit_Macro(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        join = "markup_join" if frame.eval_ctx.autoescape else "str_join"
        if frame.eval_ctx.volatile:
            join = "(markup_join if context.eval_ctx.volatile else str_join)"
        self.write(f"{join}(environment.shown((")
        for item in node.nodes:
            self.visit(item, frame)
            self.write(", ")
        self.write(")))")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:  # noqa: N802
        self.write("(environment.read(")
        self.visit(node.expr, frame)
        for operand in node.ops:
            self.write(f") {operators[operand.op]} environment.read(")
            self.visit(operand.expr, frame)
        self.write("))")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:  # noqa: N802
        if not isinstance(node.arg, nodes.Slice):
            super().visit_Getitem(node, frame)
            return
        self.write("environment.copied(")
        self.visit(node.node, frame)
        self.write(")[")
        self.visit(node.arg, frame)
        self.write("]")


def _step(body: list[nodes.Node]) -> nodes.Expr:
    """A call of `environment.step` with the bytes of the template's own text in a body."""
    texts = [data.data for node in body for data in node.find_all(nodes.TemplateData)]
    texts += [const.value for node in body for const in node.find_all(nodes.Const) if isinstance(const.value, str)]
    size = nodes.Const(sum(map(shallow_size, texts)))
    return nodes.Call(nodes.EnvironmentAttribute("step"), [size], [], None, None)


class _Formatter(SandboxedFormatter):
    """`str.format` that pays for each field before it is written."""

    def convert_field(self, value: Any, conversion: Any) -> Any:
        _spend_shown(value, "format")
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> Any:
        _spend_shown(value, "format")
        _budget().spend(4 * spec_size(format_spec), "format")
        return super().format_field(value, format_spec)


class _EscapeFormatter(_Formatter, SandboxedEscapeFormatter):
    pass


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox in which transformers renders templates, with an end to everything."""

    code_generator_class = _MeteredCode
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension], finalize=_finalize
        )
        self.filters["tojson"] = _to_json
        self.filters.update({name: _metered_filter(name, function) for name, function in self.filters.items()})
        self.tests.update({name: _metered_test(name, self.tests) for name in _READING_TESTS})
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
            dict=_Dict(),
            namespace=_SafeNamespace,
            lipsum=_lipsum,
        )

    def step(self, constant: int) -> bool:
        _budget().step(constant)
        return True

    def shown(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """Values that are joined as texts."""
        for value in values:
            _spend_shown(value, "a result of `~`")
        return values

    def read(self, value: Any) -> Any:
        """A value that is compared."""
        if isinstance(value, (str, list, tuple, dict)):
            budget = _budget()
            budget.spend(deep_size(value, budget.left), "a comparison")
        return value

    def copied(self, value: Any) -> Any:
        """A value of which a part is copied."""
        _budget().spend(shallow_size(value), "a slice")
        return value

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = obj.__self__ if isinstance(obj, (BuiltinMethodType, MethodType)) else None
        if owner is self:
            return obj(*args)
        budget, what = _budget(), f"`{getattr(obj, '__name__', 'a call')}`"
        size = 0
        if isinstance(owner, (str, bytes, int, float, list, tuple, dict)) or owner in (str, bytes, int, dict):
            args = tuple(list(arg) if isinstance(arg, Iterator) else arg for arg in args)
            # jinja2 adds the names of the scope, such as `_loop_vars`.
            named = [value for name, value in kwargs.items() if not name.startswith("_")]
            size = method_size(obj.__name__, owner, [*args, *named], budget.left)
        budget.spend(size, what)
        return budget.check(super().call(context, obj, *args, **kwargs), what)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget, what = _budget(), f"a result of `{operator}`"
        budget.spend(operator_size(operator, left, right, budget.left), what)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., Any] | None:
        if super().wrap_str_format(value) is None:
            return None
        source, takes_map = value.__self__, value.__name__ == "format_map"
        escape = source.escape if isinstance(source, Markup) else None
        formatter = _Formatter(self) if escape is None else _EscapeFormatter(self, escape=escape)

        def format(*args: Any, **kwargs: Any) -> Any:
            if takes_map:
                (values,) = args
                return type(source)(formatter.vformat(source, (), values))
            return type(source)(formatter.vformat(source, args, kwargs))

        return format


# Tests that read all of a value; the others look at its type.
_READING_TESTS = (
    *("in", "lower", "upper", "==", "eq", "equalto", "!=", "ne"),
    *(">", "gt", "greaterthan", ">=", "ge", "<", "lt", "lessthan", "<=", "le"),
)
_LEADING: dict[str | None, Callable[[Context], tuple[Any, ...]]] = {
    "context": lambda context: (context,),
    "eval_context": lambda context: (context.eval_ctx,),
    "environment": lambda context: (context.environment,),
    None: lambda context: (),
}


def _metered_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pays first. As it takes the context, jinja2 never runs it when it compiles."""
    leading = _LEADING[getattr(getattr(function, "jinja_pass_arg", None), "name", None)]
    what = f"the filter `{name}`"

    @pass_context
    def metered(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget()
        if name in ("join", "sum") and isinstance(value, Iterator):
            value = list(value)
        extra = list(args[:1]) if name in ("batch", "slice") else []
        budget.spend(
            STRING * sum(n for n in [*extra, *kwargs.values()] if extra and isinstance(n, int) and n > 0), what
        )
        budget.spend(filter_size(name, value, [*args, *kwargs.values()], budget.left), what)
        return budget.check(function(*leading(context), value, *args, **kwargs), what)

    return metered


def _metered_test(name: str, tests: Mapping[str, Any]) -> Callable[..., Any]:
    function = tests[name]

    @pass_context
    def metered(context: Context, *values: Any) -> Any:
        budget = _budget()
        budget.spend(sum(deep_size(value, budget.left) for value in values), "a test")
        return function(*values)

    return metered


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    """What `{{ value }}` writes pays for its text."""
    _spend_shown(value, "the text")
    return value


def _spend_shown(value: Any, what: str) -> None:
    budget = _budget()
    budget.spend(shown_size(value, budget.left), what)


def _lipsum(n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:
    _budget().spend(STRING * abs(n) * (abs(min) + abs(max)), "`lipsum`")
    return generate_lorem_ipsum(n, html, min, max)


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
    _spend_shown(message, "`raise_exception`")
    raise _RefusalError(str(message)[:2000])


def _strftime_now(form: str) -> str:
    _budget().spend(256 * shallow_size(form), "`strftime_now`")
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
            raise EndlessError(f"more than {MAX_CHARACTERS} characters")
        yield piece


def render(template: jinja2.Template, given: Mapping[str, Any], now: datetime) -> str:
    """The text that `template` writes for `given`; `now` is what `strftime_now` tells.

    Raises:
        InputError: the template refuses these messages, or fails on them.
        ArtifactError: it reached for what the sandbox withholds, or exceeds what a rendering may cost.
        TakesTextError: it takes a text where content is in parts.
    """
    token = _rendering.set(_Rendering(deep_size(dict(given), MAX_CHARACTERS), now))
    try:
        return "".join(_bounded(template.generate(**given)))
    except _RefusalError as e:
        raise InputError(f"the model's chat template refuses these messages: {e}") from e
    except EndlessError as e:
        raise ArtifactError(f"the chat template was stopped: {e}; correct the template and export again") from e
    except (SecurityError, OverflowError, MemoryError, RecursionError) as e:
        raise ArtifactError(f"the chat template was refused: {type(e).__name__}: {e}") from e
    except TakesTextError:
        raise
    except Exception as e:  # whatever an expression of the template raises
        raise InputError(f"the model's chat template cannot render these messages: {type(e).__name__}: {e}") from e
    finally:
        _rendering.reset(token)

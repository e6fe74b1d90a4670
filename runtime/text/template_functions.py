"""The functions of chat templates: filters, tests and globals that pay for what they read and make before they run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, NoReturn, TypeAlias

from jinja2.exceptions import SecurityError, TemplateError
from jinja2.runtime import Context
from jinja2.utils import Namespace, generate_lorem_ipsum, pass_context

from .budget import STRING, deep_size, filter_size, shallow_size
from .parts import ContentParts
from .rendering import current_budget, current_time, spend_shown

__all__ = ["RefusalError", "add_functions", "write"]

_Function: TypeAlias = Callable[..., object]


class RefusalError(TemplateError):
    """What `raise_exception` in a template raises."""


def add_functions(
    filters: MutableMapping[str, _Function],
    tests: MutableMapping[str, Any],
    variables: MutableMapping[str, object],
) -> None:
    """Make Jinja2's filters and tests pay, and add the functions that transformers gives to templates."""
    filters["tojson"] = _to_json
    filters.update({name: _metered_filter(name, function) for name, function in filters.items()})
    tests.update({name: _metered_test(tests[name]) for name in _READING_TESTS})
    variables.update(
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
        dict=_Dict(),
        namespace=_SafeNamespace,
        lipsum=_lipsum,
    )


# Tests that read all of a value; the others look at its type.
_READING_TESTS = (
    *("in", "lower", "upper", "==", "eq", "equalto", "!=", "ne"),
    *(">", "gt", "greaterthan", ">=", "ge", "<", "lt", "lessthan", "<=", "le"),
)
# The leading arguments that Jinja2 passes to filters that request them.
_LEADING: dict[str | None, Callable[[Context], tuple[object, ...]]] = {
    "context": lambda context: (context,),
    "eval_context": lambda context: (context.eval_ctx,),
    "environment": lambda context: (context.environment,),
    None: lambda context: (),
}


def _metered_filter(name: str, function: _Function) -> _Function:
    """A filter that pays first. It takes the context, so Jinja2 never runs it at compile time."""
    leading = _LEADING[getattr(getattr(function, "jinja_pass_arg", None), "name", None)]
    shown = f"the filter `{name}`"

    @pass_context
    def metered(context: Context, value: object, *args: object, **kwargs: object) -> object:
        budget = current_budget()
        if name in ("join", "sum") and isinstance(value, Iterator):
            value = list(value)
        extra = list(args[:1]) if name in ("batch", "slice") else []
        budget.spend(
            STRING * sum(n for n in [*extra, *kwargs.values()] if extra and isinstance(n, int) and n > 0), shown
        )
        budget.spend(filter_size(name, value, [*args, *kwargs.values()], budget.left), shown)
        return budget.check(function(*leading(context), value, *args, **kwargs), shown)

    return metered


def _metered_test(function: _Function) -> _Function:
    @pass_context
    def metered(context: Context, *values: object) -> object:
        budget = current_budget()
        budget.spend(sum(deep_size(value, budget.left) for value in values), "a test")
        return function(*values)

    return metered


@pass_context
def write(context: Context, value: object) -> object:
    """Pays for the text that `{{ value }}` writes."""
    spend_shown(value, "the text")
    return value


def _lipsum(n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:
    current_budget().spend(STRING * abs(n) * (abs(min) + abs(max)), "`lipsum`")
    return generate_lorem_ipsum(n, html, min, max)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; Jinja2's own filter writes `<` and the like for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, default=_listed
    )


def _listed(value: object) -> list[object]:
    if isinstance(value, ContentParts):
        return list(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def _raise_exception(message: object) -> NoReturn:
    spend_shown(message, "`raise_exception`")
    raise RefusalError(str(message)[:2000])


def _strftime_now(form: str) -> str:
    current_budget().spend(256 * shallow_size(form), "`strftime_now`")
    return current_time().strftime(form)


class _Dict:
    """`dict` for templates: makes dictionaries, but is not Python's type, whose attributes lead to its internals."""

    def __call__(self, *args: Any, **kwargs: object) -> dict[object, object]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[object, object]:
        return dict.fromkeys(*args)


class _SafeNamespace(Namespace):
    """`namespace` for templates, closed to names that lead into Python's internals."""

    def __init__(*args: Any, **kwargs: object) -> None:  # `self` may be a template's own name
        self, *positional = args
        values = dict(*positional, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: object) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")

"""The reference shows what Python's own `help` shows where a method's signature is made while the program runs.

`generate`, `stream` and `search` take their sampling options from one definition, which reading the source cannot see.
"""

import importlib
import inspect
import re
from typing import Any

import griffe

_KINDS = {
    inspect.Parameter.POSITIONAL_OR_KEYWORD: griffe.ParameterKind.positional_or_keyword,
    inspect.Parameter.KEYWORD_ONLY: griffe.ParameterKind.keyword_only,
    inspect.Parameter.VAR_KEYWORD: griffe.ParameterKind.var_keyword,
}


class RunningSignatures(griffe.Extension):
    """Takes the parameters and the docstring of such a method from the program."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Replace what the source says."""
        if func.docstring is None or "shows_options" not in str([decorator.value for decorator in func.decorators]):
            return
        method = getattr(getattr(importlib.import_module(func.module.path), func.parent.name), func.name)
        func.docstring.value = inspect.getdoc(method)
        func.parameters = griffe.Parameters(*map(_parameter, inspect.signature(method).parameters.values()))


def _parameter(given: inspect.Parameter) -> griffe.Parameter:
    default = None if given.default is given.empty else repr(given.default)
    if given.kind is given.VAR_KEYWORD:
        default = "{}"
    annotation = None if given.annotation is given.empty else inspect.formatannotation(given.annotation)
    if annotation is not None:
        # Names without their modules, and without the quotes of what is not evaluated.
        annotation = re.sub(r"\b(?:\w+\.)+(?=\w)", "", annotation.strip("'"))
    return griffe.Parameter(given.name, annotation=annotation, kind=_KINDS[given.kind], default=default)

"""The JSON Schema of `manifest.json`, for programs that read artifacts without bonnx.

It is made from the types of manifest.py: `python -m bonnx.runtime.artifact.schema` writes `manifest.schema.json` beside
them. Run it when they change.
"""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path

import msgspec

from . import manifest

__all__ = ["SCHEMA_FILE", "manifest_schema"]

SCHEMA_FILE = Path(__file__).with_name("manifest.schema.json")


def manifest_schema() -> dict[str, object]:
    """The schema of this version in draft 2020-12, with the docstrings of classes and fields as descriptions."""
    # `object` stands for any JSON value: an option of the model or of a template.
    _, parts = msgspec.json.schema_components(
        [manifest.Manifest], schema_hook=lambda kind: {"description": "Any value."}, ref_template="#/$defs/{name}"
    )
    for name, fields in _field_docstrings().items():
        for field, text in fields.items():
            parts[name]["properties"][field]["description"] = text
    # A manifest of another version may mean other things by the same names.
    parts["Manifest"]["properties"]["schema_version"]["const"] = manifest.SCHEMA_VERSION
    whole = parts.pop("Manifest")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **whole, "$defs": parts}


def _field_docstrings() -> dict[str, dict[str, str]]:
    """The texts below the fields of each class: Python itself does not keep them."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(manifest)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        texts = {
            field.target.id: " ".join(text.value.value.split())
            for field, text in zip(node.body, node.body[1:], strict=False)
            if isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        }
        if texts:
            found[node.name] = texts
    return found


if __name__ == "__main__":
    SCHEMA_FILE.write_text(json.dumps(manifest_schema(), indent=2) + "\n", encoding="utf-8")

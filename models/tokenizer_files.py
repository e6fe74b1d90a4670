"""The tokenizer files of a checkpoint, and how they are copied into one of bonnx's."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import ConfigError
from .huggingface import is_huggingface

__all__ = ["class_fields", "copy_tokenizer"]

TOKENIZER = "tokenizer.json"
_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_TEMPLATES = "additional_chat_templates"
# The fields of config.json by which transformers chooses the tokenizer's class.
_CLASS = ("model_type", "tokenizer_class")


def class_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config.json, bonnx's or transformers', that determine the tokenizer's class.

    bonnx's config.json stores those of the checkpoint that the tokenizer came from under `tokenizer`.

    Raises:
        ConfigError: if `tokenizer` is not an object.
    """
    fields = config if is_huggingface(config) else config.get("tokenizer", {})
    if not isinstance(fields, Mapping):
        raise ConfigError(f"config.json, 'tokenizer': expected an object; found {fields!r:.80}")
    return {name: fields[name] for name in _CLASS if fields.get(name) is not None}


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer and the chat templates from one checkpoint's folder to another.

    Raises:
        ConfigError: if there is no tokenizer.json, or both folders are the same.
    """
    if not (source / TOKENIZER).is_file():
        raise ConfigError(f"{source / TOKENIZER} is missing; expected the folder of a checkpoint with a tokenizer")
    if source.resolve() == target.resolve():
        raise ConfigError(
            f"{target}: the checkpoint would replace the one that it was made from; choose another folder"
        )
    target.mkdir(parents=True, exist_ok=True)
    for name in (TOKENIZER, *_FILES):
        (target / name).unlink(missing_ok=True)
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    shutil.rmtree(target / _TEMPLATES, ignore_errors=True)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, target / _TEMPLATES)

"""The files of a checkpoint that say how text becomes tokens, and their way into a checkpoint of ours."""

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
# What transformers reads of config.json to choose the tokenizer's class.
_CLASS = ("model_type", "tokenizer_class")


def class_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a config.json, ours or transformers': the fields that decide the tokenizer's class.

    Ours keep those of the checkpoint that the tokenizer came from under `tokenizer`.

    Raises:
        ConfigError: `tokenizer` is no object.
    """
    fields = config if is_huggingface(config) else config.get("tokenizer", {})
    if not isinstance(fields, Mapping):
        raise ConfigError(f"config.json, 'tokenizer': expected an object; found {fields!r:.80}")
    return {name: fields[name] for name in _CLASS if fields.get(name) is not None}


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer and the chat templates of a checkpoint's folder into another one.

    Raises:
        ConfigError: there is no tokenizer.json, or both are one folder.
    """
    if not (source / TOKENIZER).is_file():
        raise ConfigError(f"{source / TOKENIZER} is missing; expected the folder of the checkpoint with its tokenizer")
    if source.resolve() == target.resolve():
        raise ConfigError(f"{target}: the checkpoint would replace the one that it is made from; choose another folder")
    target.mkdir(parents=True, exist_ok=True)
    for name in (TOKENIZER, *_FILES):
        (target / name).unlink(missing_ok=True)
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    shutil.rmtree(target / _TEMPLATES, ignore_errors=True)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, target / _TEMPLATES)

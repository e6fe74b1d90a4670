"""The tokenizer files of a checkpoint, and how they are copied into one of bonnx's."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import ConfigError
from .files import read_json
from .huggingface import is_huggingface

__all__ = ["class_fields", "copy_tokenizer", "token_id"]

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


def token_id(folder: Path, token: int | str) -> int:
    """Return the id of a token of a checkpoint's tokenizer, by its text or by the name of a special one (`cls_token`).

    Raises:
        ConfigError: if there is no such token.
    """
    if isinstance(token, int):
        return token
    try:
        tokenizer = read_json(folder / TOKENIZER)
        named = read_json(folder / _FILES[0]).get(token) if (folder / _FILES[0]).is_file() else None
    except OSError as e:
        raise ConfigError(f"token {token!r}: the checkpoint's {TOKENIZER} cannot be read: {e.strerror or e}") from e
    text = named.get("content") if isinstance(named, dict) else token if named is None else named
    for added in tokenizer.get("added_tokens") or []:
        if added.get("content") == text:
            return int(added["id"])
    vocabulary = (tokenizer.get("model") or {}).get("vocab")
    if isinstance(vocabulary, dict) and text in vocabulary:
        return int(vocabulary[text])
    raise ConfigError(
        f"{folder / TOKENIZER} has no token {text!r}, which must be appended to every text; expected the text of one "
        "token, the name of a special token in tokenizer_config.json, or an id"
    )


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

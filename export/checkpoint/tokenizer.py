"""Read a Hugging Face checkpoint's tokenizer as a single `tokenizer.json` that reproduces transformers' tokens."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from bonnx.models.config import ConfigError
from bonnx.models.files import check_present
from bonnx.models.tokenizer_files import class_fields

from .tokenizer_class import build_tokenizer

__all__ = ["TextFiles", "check_vocabulary", "read_tokenizer", "with_pair_template"]

TOKENIZER, SETTINGS, CONFIG = "tokenizer.json", "tokenizer_config.json", "config.json"
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
# Files that a folder may have instead of tokenizer.json, and that transformers can convert.
OTHER_FORMATS = (
    "tokenizer.model",
    "spm.model",
    "tekken.json",
    "tiktoken.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


class TextFiles(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an artifact needs to tokenize text as the checkpoint's model expects."""

    folder: Path
    json: bytes  # a tokenizer.json that neither truncates nor pads
    chat_template: str | None
    pair_template: str | None = None  # a reranker's, which replaces the chat template
    special_tokens: dict[str, str]  # texts by the names that chat templates use, such as bos_token
    adds_special_tokens: bool  # special tokens are added to plain text; never to the text of a chat template


def read_tokenizer(folder: str | os.PathLike[str], *, template: str | None = None) -> TextFiles | None:
    """Read the tokenizer and chat template of a checkpoint folder; None if it has no tokenizer at all.

    transformers does not use every tokenizer.json as it is (see `tokenizer_class`). The returned one produces the ids
    of `AutoTokenizer.from_pretrained(folder)`: with its post-processor for plain text, without it for the text of a
    chat template.

    Args:
        folder: the checkpoint.
        template: the name of a chat template, if there are several; by default `default`.

    Raises:
        ConfigError: if a file is missing or unreadable, or the tokenizer needs transformers to run.
    """
    folder = Path(folder)
    check_present(folder)
    path = folder / TOKENIZER
    if not path.is_file():
        others = [name for name in (*OTHER_FORMATS, SETTINGS) if (folder / name).is_file()]
        if not others:
            return None
        call = f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        raise ConfigError(
            f"{path}: missing; found {', '.join(others)}. Convert the tokenizer once with transformers: "
            f'python -c "from transformers import AutoTokenizer as A; {call.replace("AutoTokenizer", "A")}"'
        )
    settings = _read_json(folder / SETTINGS)
    special, family = _read_json(folder / "special_tokens_map.json"), class_fields(_read_json(folder / CONFIG))
    tokenizer, special_tokens = build_tokenizer(path, _read_json(path), settings, special, family)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return TextFiles(
        folder=folder,
        json=tokenizer.to_str().encode(),
        chat_template=_choose(_templates(folder, settings), template, folder),
        special_tokens=special_tokens,
        adds_special_tokens=tokenizer.num_special_tokens_to_add(False) > 0,
    )


def with_pair_template(files: TextFiles, template: str) -> TextFiles:
    """Return the files of a reranker: a template of a query and a document, and none for conversations."""
    return msgspec.structs.replace(files, chat_template=None, pair_template=template)


def check_vocabulary(files: TextFiles, vocab_size: int) -> None:
    """Refuse a tokenizer with tokens that have no row in the embedding.

    Raises:
        ConfigError: with the token, its id and the file that defines it.
    """
    vocabulary = tokenizers.Tokenizer.from_str(files.json.decode()).get_vocab(with_added_tokens=True)
    token, largest = max(vocabulary.items(), key=lambda item: item[1], default=("", -1))
    if largest < vocab_size:
        return
    data = _read_json(files.folder / TOKENIZER)
    stored = token in data["model"]["vocab"] or any(added["content"] == token for added in data.get("added_tokens", ()))
    raise ConfigError(
        f"{files.folder / (TOKENIZER if stored else SETTINGS)}: token {token!r} has the id {largest}, but "
        f"vocab_size is {vocab_size} in {files.folder / CONFIG}; resize the model's embeddings, or remove the token"
    )


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; empty if the file does not exist."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"{path}: cannot be read as JSON: {e}") from e
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a JSON object; got {type(data).__name__}")
    return data


def _templates(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Return chat templates by name. If template files exist, all templates in tokenizer_config.json are ignored."""
    paths = {path.stem: path for path in sorted((folder / TEMPLATES).glob("*.jinja"))}
    if (folder / TEMPLATE).is_file():
        paths.setdefault("default", folder / TEMPLATE)
    try:
        files = {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
    except (OSError, ValueError) as e:
        raise ConfigError(f"{folder}: a chat template cannot be read: {e}") from e
    named = files or settings.get("chat_template") or {}
    if isinstance(named, str):
        named = {"default": named}
    elif isinstance(named, list) and all(isinstance(item, dict) for item in named):
        named = {item.get("name"): item.get("template") for item in named}
    if not isinstance(named, dict) or not all(isinstance(x, str) for item in named.items() for x in item):
        raise ConfigError(f"{folder / SETTINGS}: chat_template: expected a text or a list of names and templates")
    return named


def _choose(templates: dict[str, str], name: str | None, folder: Path) -> str | None:
    if not templates and name is None:
        return None
    chosen = templates.get(name or "default")
    if chosen is None:
        names = ", ".join(sorted(templates)) or "none"
        raise ConfigError(f"{folder}: expected a chat template named '{name or 'default'}'; found: {names}")
    return chosen

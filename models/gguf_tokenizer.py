"""Find the tokenizer of a GGUF file: files beside it, or the file's own, which transformers converts."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from .config import ConfigError

__all__ = ["find_tokenizer"]


def find_tokenizer(path: Path, size: int, kind: str | None) -> Path:
    """Return the folder of a GGUF file's tokenizer: that of the file if it has a tokenizer.json, else a temporary one.

    Args:
        path: the GGUF file.
        size: number of tokens in its vocabulary.
        kind: the file's `tokenizer.ggml.model`; without one, the folder of the file is returned.

    Raises:
        ConfigError: if transformers is not installed, or cannot convert the tokenizer.
    """
    if kind in (None, "none", "no_vocab") or (path.parent / "tokenizer.json").is_file():
        return path.parent
    advice = f"copy tokenizer.json and tokenizer_config.json of the original model to {path.parent}"
    try:
        import transformers
    except ImportError as e:
        raise ConfigError(
            f"{path}: transformers is not installed, which converts its tokenizer; run `pip install transformers`, or "
            f"{advice}"
        ) from e
    folder = Path(tempfile.mkdtemp(prefix="bonnx-tokenizer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        tokenizer.save_pretrained(folder)
    except Exception as e:  # converting runs the classes of many models, which may raise anything
        raise ConfigError(f"{path}: transformers cannot convert its tokenizer: {e}; {advice}") from e
    _remove_added(folder, size)
    return folder


def _remove_added(folder: Path, size: int) -> None:
    """Remove the special tokens that transformers' class adds and the model lacks, such as GPT-2's."""
    path, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    described = json.loads(settings.read_text(encoding="utf-8"))
    kept = [token for token in tokenizer["added_tokens"] if token["id"] < size]
    removed = {token["content"] for token in tokenizer["added_tokens"]} - {token["content"] for token in kept}
    tokenizer["added_tokens"] = kept
    described = {
        name: value
        for name, value in described.items()
        if not (name.endswith("_token") and isinstance(value, str) and value in removed)
    }
    # The file is complete, so that no class may replace parts of it.
    described["tokenizer_class"] = "TokenizersBackend"
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    settings.write_text(json.dumps(described, indent=2, ensure_ascii=False), encoding="utf-8")

"""Open a checkpoint: find its files, its base model if it is an adapter, and read its config.

A checkpoint is a folder in bonnx's format or that of transformers, an adapter of peft with its base model, or a GGUF
file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .adapters import ADAPTER_CONFIG, ADAPTER_FILES, LoraSettings, read_settings
from .config import ConfigError
from .config_reader import ConfigReader
from .families import FAMILIES
from .fields import check_fields
from .files import check_folder, check_present, read_json
from .gguf import read_gguf
from .gguf_config import translate_gguf
from .gguf_tokenizer import find_tokenizer
from .hub import HubSource, download, parse_source
from .huggingface import is_huggingface
from .lora import MergedWeights, merged_config
from .pairs import check_pairs
from .tokenizer_files import token_id
from .weights import INDEX_FILE, WEIGHTS_FILE, TensorReader, Weights

__all__ = ["CONFIG_FILE", "OpenedCheckpoint", "open_checkpoint"]

CONFIG_FILE, _GENERATION_FILE = "config.json", "generation_config.json"
# A folder with one of these has a tokenizer of its own.
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint whose config has been read.

    Attributes:
        path: what was opened, for messages.
        config: its config.json; of an adapter, that of the merged model.
        weights: opens the tensors.
        find_tokenizer: returns the folder of the tokenizer's files.
        source: what it was made from, if it is an adapter: the names of adapter and base model, or their hub ids with
            commits.
        remarks: sentences for the user.
        pair_template: of a GGUF file, the text of a query and a document, with `{query}` and `{document}` for these.
    """

    path: Path
    config: dict[str, Any]
    weights: Callable[[], TensorReader]
    find_tokenizer: Callable[[], Path]
    source: str | None = None
    remarks: tuple[str, ...] = ()
    pair_template: str | None = None

    @cached_property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer's files.

        Raises:
            ConfigError: if the tokenizer of a GGUF file cannot be converted.
        """
        return self.find_tokenizer()


def open_checkpoint(
    folder: str | os.PathLike[str], *, base: str | None = None, adapter: str | None = None, source: str | None = None
) -> OpenedCheckpoint:
    """Open a checkpoint's folder.

    Args:
        folder: the checkpoint, an adapter, or a GGUF file.
        base: folder or hub id of an adapter's base model; by default the one in the adapter's folder, or the one that
            its adapter_config.json names.
        adapter: name of an adapter, whose files are in a subfolder of this name; `default` is the folder itself.
        source: hub id and commit of `folder`, if it is from a hub.

    Raises:
        ConfigError: if a file is missing, unreadable or not supported, or the base model is not the one that the
            adapter was trained on.
    """
    folder = Path(folder)
    place = _adapter_folder(folder, adapter)
    if place is None:
        if base is not None or adapter is not None:
            raise ConfigError(f"{folder} is not an adapter, so it has no base model; omit --base and --adapter")
        return _open_model(folder)
    check_present(place)
    settings = read_settings(place)
    root, name, remarks = _base(settings, folder, place, base)
    if not (root / CONFIG_FILE).is_file() and any((root / file).is_file() for file in ADAPTER_FILES):
        raise ConfigError(
            f"{root}: the base model of {place} is an adapter itself; merge it first, and pass it with --base"
        )
    model = _open_model(root)
    if not is_huggingface(model.config):
        raise ConfigError(
            f"{root}: expected the base model of {place} in the format of transformers; found bonnx's own"
        )
    if model.config.get("quantization_config") is not None:
        raise ConfigError(
            f"{root}: the base model of {place} is quantized; pass the model that it was made from with --base"
        )
    try:
        check_fields(model.config)
    except ConfigError as e:
        raise ConfigError(f"{root}: {e}") from e
    family = FAMILIES[model.config["model_type"]]
    tied = ConfigReader(model.config).flag("tie_word_embeddings", family.tied)
    merged = MergedWeights(model.weights(), place, settings, family, tied=tied)
    config = merged_config(model.config, merged, settings, family)
    own = any((place / file).is_file() for file in _TOKENIZER)
    if own and config.get("pad_token_id") is None and (pad := _pad_token(place)) is not None:
        config["pad_token_id"] = pad
        remarks.append(
            f"the base model has no pad token; that of the adapter's tokenizer ({pad}) is used, as in training"
        )
    return OpenedCheckpoint(
        path=place,
        config=config,
        weights=lambda: merged,
        find_tokenizer=lambda: place if own else model.tokenizer,
        source=f"{source or place.resolve().name} on {name}",
        remarks=tuple(remarks),
    )


def _open_model(path: Path) -> OpenedCheckpoint:
    """Open a folder that is not an adapter, or a GGUF file."""
    if path.suffix == ".gguf" and not path.is_dir():
        return _open_gguf(path)
    config = _read_config(path)
    return OpenedCheckpoint(path, config, lambda: Weights(path), lambda: path)


def _pad_token(folder: Path) -> int | None:
    """Return the id of the pad token of a folder's tokenizer."""
    settings = folder / "tokenizer_config.json"
    if not settings.is_file() or read_json(settings).get("pad_token") is None:
        return None
    return token_id(folder, "pad_token")


def _open_gguf(path: Path) -> OpenedCheckpoint:
    """Open a GGUF file."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    check_present(path.parent)
    file = read_gguf(path)
    config, weights = translate_gguf(file)
    template = file.metadata.get("tokenizer.chat_template.rerank")
    return OpenedCheckpoint(
        path,
        config,
        lambda: weights,
        lambda: find_tokenizer(path, config["vocab_size"], file.metadata.get("tokenizer.ggml.model")),
        pair_template=template if isinstance(template, str) else None,
    )


def _adapter_folder(folder: Path, name: str | None) -> Path | None:
    """Return the folder of the adapter, or None if the checkpoint is not one."""
    inside = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
    own = any((folder / file).is_file() for file in ADAPTER_FILES)
    if name is not None and (inside or own):
        if name in inside or (name == "default" and own):
            return folder / name if name in inside else folder
        found = ", ".join([*inside, *(["default"] if own else [])]) or "none"
        raise ConfigError(f"{folder}: expected an adapter named {name!r}; found {found}")
    if own:
        return folder
    if inside and not (folder / CONFIG_FILE).is_file():
        raise ConfigError(
            f"{folder} contains {len(inside)} adapter{'s' if len(inside) > 1 else ''} in subfolders; choose one with "
            f"--adapter NAME: {', '.join(inside)}"
        )
    return None


def _base(settings: LoraSettings, folder: Path, place: Path, stated: str | None) -> tuple[Path, str, list[str]]:
    """Return the folder of the base model, its name or its hub id and commit, and remarks."""
    if stated is not None:
        return _resolve(parse_source(stated), settings, stated_by="--base")
    for beside in dict.fromkeys((place, folder)):
        if any((beside / file).is_file() for file in (WEIGHTS_FILE, INDEX_FILE)):
            remark = (
                f"the adapter {place} was merged into the weights in {beside}; if these contain it already, move "
                f"{' and '.join(ADAPTER_FILES[:2])} out of the folder"
            )
            return beside, beside.resolve().name, [remark]
    if settings.base is None:
        raise ConfigError(
            f"{settings.path}: 'base_model_name_or_path' is missing; pass the model that the adapter was trained on "
            "with --base"
        )
    for path in (place / settings.base, Path(settings.base)):
        if path.is_dir():
            return _resolve(path, settings, stated_by=str(settings.path))
    try:
        return _resolve(parse_source(settings.base), settings, stated_by=str(settings.path))
    except ConfigError as e:
        raise ConfigError(
            f"{settings.path}: the base model {settings.base!r} cannot be read: {e}. Pass its folder or id with --base"
        ) from e


def _resolve(source: Path | HubSource, settings: LoraSettings, stated_by: str) -> tuple[Path, str, list[str]]:
    """Download a base model if it is on a hub, at the revision that the adapter was trained on."""
    pinned = settings.revision
    if isinstance(source, Path):
        # A snapshot in the hub's cache has its commit as its name; of another folder the revision is unknown.
        commit = source.resolve().name if source.resolve().parent.name == "snapshots" else None
        if pinned is not None and commit is not None and not commit.startswith(pinned):
            raise _other_revision(settings, f"{source} is {commit}", stated_by)
        remarks = [] if pinned is None else [f"the adapter was trained on revision {pinned} of {settings.base}"]
        return source, source.resolve().name, remarks
    if pinned is not None and source.revision is None and (settings.base in (None, source.repo)):
        source = HubSource(source.repo, pinned, source.file)
    folder, commit = download(source)
    if pinned is not None and source.revision not in (None, pinned) and not commit.startswith(pinned):
        raise _other_revision(settings, f"{source} is {commit}", stated_by)
    return folder, str(HubSource(source.repo, commit, source.file)), []


def _other_revision(settings: LoraSettings, found: str, stated_by: str) -> ConfigError:
    return ConfigError(
        f"{settings.path}, 'revision': the adapter was trained on revision {settings.revision} of its base model, but "
        f"{found} ({stated_by}); pass that revision with --base {settings.base or 'ID'}@{settings.revision}"
    )


def _read_config(folder: Path) -> dict[str, Any]:
    """Check a folder and read its config.json, with the end tokens of generation_config.json."""
    check_folder(folder)
    try:
        config = read_json(folder / CONFIG_FILE)
    except OSError as e:
        raise ConfigError(
            f"cannot read the checkpoint {folder}: {e.strerror or e} ({CONFIG_FILE}); "
            f"expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
        ) from e
    check_pairs(folder.resolve().name, config)
    if is_huggingface(config) and (folder / _GENERATION_FILE).is_file():
        # transformers' generation takes the end tokens from this file if it has any; often there are more of them.
        config |= {k: v for k, v in read_json(folder / _GENERATION_FILE).items() if k == "eos_token_id"}
    return config

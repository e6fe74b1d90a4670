"""Download checkpoints from a hub by id.

The endpoint, cache, token and offline mode are those of `huggingface_hub` (HF_ENDPOINT, HF_HOME, HF_TOKEN,
HF_HUB_OFFLINE). Only JSON, templates and safetensors are downloaded, so nothing in a repository can run.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from .adapters import ADAPTER_FILES, ADAPTER_WEIGHTS
from .config import ConfigError
from .files import unpickling
from .pairs import check_pairs

__all__ = ["HubSource", "download", "parse_source"]

_WANTED = [
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    # A module's own settings, such as 1_LogitScore/config.json.
    "[0-9]_*/config.json",
]
# A star in these patterns also matches slashes. Subfolders contain other models; consolidated* repeats the weights.
_UNWANTED = ["*/*.safetensors", "*/*.safetensors.index.json", "additional_chat_templates/*/*", "consolidated*"]
# An adapter in a subfolder, with its own tokenizer, and the base model that may be above it.
_OF_ADAPTER = ["adapter_config.json", "adapter_model.safetensors", "tokenizer*.json", "special_tokens_map.json"]
_OF_ADAPTER += ["added_tokens.json", "chat_template.jinja"]
_OF_GGUF = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>\w(?!.*\.\.)[\w./-]*))?"
    r"(:(?P<file>\w(?!.*\.\.)[\w./-]*\.gguf))?",
    re.ASCII,
)


@dataclass(frozen=True)
class HubSource:
    """A model repository on the hub.

    Attributes:
        repo: `org/name`.
        revision: branch, tag or commit; None for the repository's main branch.
        file: path of a GGUF file in it; None for its safetensors.
    """

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{self.repo}{revision}" + ("" if self.file is None else f":{self.file}")


def parse_source(text: str) -> Path | HubSource:
    """Parse `--checkpoint`: an existing folder or GGUF file, or else `org/name` or `org/name@revision`.

    A path after a colon, `org/name:file.gguf`, is that of a GGUF file in the repository.

    Raises:
        ConfigError: if it is neither, or the id is that of a model that judges pairs.
    """
    if os.path.isdir(text) or (text.endswith(".gguf") and os.path.isfile(text)):
        return Path(text)
    match = None if os.path.lexists(text) else _ID.fullmatch(text)
    if match is None:
        state = "is a file" if os.path.isfile(text) else "is neither an existing folder nor an id"
        raise ConfigError(
            f"checkpoint {text!r} {state}; expected a folder with config.json, or an id on the hub "
            "such as org/name, org/name@revision or org/name:file.gguf"
        )
    check_pairs(match["repo"])
    return HubSource(match["repo"], match["revision"], match["file"])


def download(source: HubSource, adapter: str | None = None) -> tuple[Path, str]:
    """Download a checkpoint; return where it is in the hub's cache and the revision's current commit (40 hex digits).

    It is a folder, or a GGUF file if the source names one.

    If the hub cannot be reached, a complete snapshot in the cache is used, with its commit.

    Args:
        source: the repository.
        adapter: name of an adapter in a subfolder, which is downloaded too; `default` is the one at the top.

    Raises:
        ConfigError: if huggingface_hub is not installed, the hub cannot be reached or has no such repository or
            revision, the repository is gated, the download fails, or the repository contains no safetensors.
    """
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ModuleNotFoundError as e:
        raise ConfigError(
            f"checkpoint {source}: {e.name} is not installed; run `pip install bonnx[hub]`, or pass a folder"
        ) from e
    wanted, unwanted, needed = _patterns(source, adapter)
    try:
        folder = Path(
            snapshot_download(source.repo, revision=source.revision, allow_patterns=wanted, ignore_patterns=unwanted)
        )
        complete = any((folder / name).is_file() for name in needed)
        files = [] if complete else HfApi().list_repo_files(source.repo, revision=folder.name)
    # Network errors are those of its HTTP library, which differs between versions.
    except Exception as e:
        raise ConfigError(f"checkpoint {source}: {_reason(e)}") from e
    if not complete:
        raise ConfigError(f"checkpoint {source}: {_refusal(source, files)}")
    return folder if source.file is None else folder / source.file, folder.name


def _patterns(source: HubSource, adapter: str | None) -> tuple[list[str], list[str], list[str]]:
    """Return the patterns of the files to download and of those not to, and the files one of which must be there."""
    if source.file is not None:
        # A model that was split has several files, and its tokenizer is beside it.
        files = re.sub(r"-\d{5}-of-(\d{5}\.gguf)$", r"-*-of-\1", source.file)
        place = source.file.rpartition("/")[0]
        return [files, *(f"{place}/{name}".lstrip("/") for name in _OF_GGUF)], [], [source.file]
    if adapter is None or adapter == "default":
        return _WANTED, _UNWANTED, [*_WEIGHTS, *ADAPTER_FILES[:2]]
    wanted = [*(name for name in _WANTED if name != "*.safetensors"), "model*.safetensors"]
    wanted += [f"{adapter}/{name}" for name in _OF_ADAPTER]
    return wanted, ["*/*.safetensors.index.json", "*/model*.safetensors"], [f"{adapter}/{ADAPTER_WEIGHTS}"]


def _reason(error: Exception) -> str:
    """Return why a download failed, and what to do."""
    from huggingface_hub import constants, errors

    # The library's messages span several lines.
    detail = " ".join(str(error.__cause__ or error).split())
    if isinstance(error, errors.GatedRepoError):
        return "the repository is gated; accept its terms on its page, and set HF_TOKEN to a token of that account"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"no folder has this name, and {constants.ENDPOINT} has no such repository, or it is private; check the "
            "name, or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision; expected a branch, a tag or a commit"
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return (
            f"{constants.ENDPOINT} cannot be reached, and the cache does not contain the complete checkpoint "
            f"({detail}); check the connection, HF_ENDPOINT and HF_HUB_OFFLINE, or pass a folder"
        )
    return f"the download failed ({type(error).__name__}: {detail}); try again, and it resumes where it stopped"


def _refusal(source: HubSource, files: list[str]) -> str:
    """Return why a repository with these files is not a supported checkpoint, and what to do."""
    adapters = sorted(
        name.removesuffix(f"/{ADAPTER_FILES[0]}") for name in files if name.endswith(f"/{ADAPTER_FILES[0]}")
    )
    if adapters:
        return f"it contains adapters in subfolders; choose one with --adapter: {', '.join(adapters)}"
    gguf = sorted(name for name in files if name.endswith(".gguf"))
    if gguf:
        named = HubSource(source.repo, source.revision, gguf[0])
        return f"found {len(gguf)} GGUF files; pass the name of one that is there, such as {named}"
    if source.file is not None:
        return f"the repository has no GGUF files; found {', '.join(sorted(files)[:8]) or 'no files'}"
    pickles = sorted(name for name in files if name.endswith(_PICKLES))
    if pickles:
        expected = ADAPTER_WEIGHTS if ADAPTER_FILES[2] in pickles else _WEIGHTS[0]
        return (
            f"it has no {expected}, only {pickles[0]}: a pickle, which can run any code when it is opened, so it is "
            "never downloaded. Look at the pull requests on its page for safetensors converted by the hub, and pass "
            f"{source.repo}@refs/pr/N with that pull request's number; or run `hf download {source.repo} --local-dir "
            f"FOLDER`. {unpickling(pickles, expected)} and pass FOLDER"
        )
    return f"expected {_WEIGHTS[0]} in it; found {', '.join(sorted(files)[:8]) or 'no files'}"

"""Checkpoints by their id on a hub: which text is one, and the download of the files that a checkpoint needs.

The endpoint, cache, token and offline mode are those of `huggingface_hub` (HF_ENDPOINT, HF_HOME, HF_TOKEN,
HF_HUB_OFFLINE). Only JSON, templates and safetensors are asked for: nothing of a repository can run.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from .adapters import check_adapter_files
from .config import ConfigError
from .files import unpickling

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
]
# A star of these patterns matches slashes too. Folders hold other models; consolidated* holds the same weights again.
_UNWANTED = ["*/*.safetensors", "*/*.safetensors.index.json", "additional_chat_templates/*/*", "consolidated*"]
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>\w(?!.*\.\.)[\w./-]*))?", re.ASCII)


@dataclass(frozen=True)
class HubSource:
    """A repository of models on the hub.

    Attributes:
        repo: `org/name`.
        revision: branch, tag or commit; None is the repository's main branch.
    """

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def parse_source(text: str) -> Path | HubSource:
    """What `--checkpoint` names: a folder if there is one of this name, else `org/name` or `org/name@revision`.

    Raises:
        ConfigError: it is neither.
    """
    if os.path.isdir(text):
        return Path(text)
    match = None if os.path.lexists(text) else _ID.fullmatch(text)
    if match is None:
        state = "is a file" if os.path.isfile(text) else "is neither, and no folder of this name is there"
        raise ConfigError(
            f"checkpoint {text!r} {state}; expected a folder with config.json, or an id on the hub "
            "such as org/name or org/name@revision"
        )
    return HubSource(match["repo"], match["revision"])


def download(source: HubSource) -> tuple[Path, str]:
    """The folder of the checkpoint in the hub's cache, and the commit (40 hex digits) that the revision is now.

    Where the hub cannot be reached, a whole snapshot in the cache is taken, with its own commit.

    Raises:
        ConfigError: huggingface_hub is not installed; the hub cannot be reached or has no such repository or revision;
            the repository is gated; the download broke off; it holds an adapter, or no weights in safetensors.
    """
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ModuleNotFoundError as e:
        raise ConfigError(
            f"checkpoint {source}: {e.name} is not installed; run `pip install bonnx[hub]`, or pass a folder"
        ) from e
    try:
        folder = Path(
            snapshot_download(source.repo, revision=source.revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
        )
        complete = any((folder / name).is_file() for name in _WEIGHTS)
        files = [] if complete else HfApi().list_repo_files(source.repo, revision=folder.name)
    # Its errors of the network are those of the HTTP library below it, which differs by version.
    except Exception as e:
        raise ConfigError(f"checkpoint {source}: {_reason(e)}") from e
    check_adapter_files(folder)
    if not complete:
        raise ConfigError(f"checkpoint {source}: {_refusal(source, files)}")
    return folder, folder.name


def _reason(error: Exception) -> str:
    """Why a download failed, and what to do."""
    from huggingface_hub import constants, errors

    # The library's messages go over several lines.
    detail = " ".join(str(error.__cause__ or error).split())
    if isinstance(error, errors.GatedRepoError):
        return "the repository is gated; accept its terms on its page, and set HF_TOKEN to a token of that account"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"no folder has this name, and {constants.ENDPOINT} has no such repository or shows it to its members "
            "only; check the name, or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision; expected a branch, a tag or a commit of it"
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return (
            f"{constants.ENDPOINT} cannot be reached, and the cache does not hold the checkpoint whole ({detail}); "
            "check the connection, HF_ENDPOINT and HF_HUB_OFFLINE, or pass a folder"
        )
    return f"the download failed ({type(error).__name__}: {detail}); try again: it resumes where it stopped"


def _refusal(source: HubSource, files: list[str]) -> str:
    """Why a repository with these files is no checkpoint."""
    pickles = sorted(name for name in files if name.endswith(_PICKLES))
    if pickles:
        return (
            f"it has no {_WEIGHTS[0]}, only {pickles[0]}: a pickle, which can run any code when it is opened, and is "
            "never downloaded. Look among the pull requests on its page for the hub's own safetensors, and pass "
            f"{source.repo}@refs/pr/N with that request's number; or run `hf download {source.repo} --local-dir "
            "FOLDER`. "
            f"{unpickling(pickles)} and pass FOLDER"
        )
    return f"expected {_WEIGHTS[0]} in it; found {', '.join(sorted(files)[:8]) or 'no files'}"

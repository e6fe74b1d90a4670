"""Read an artifact's folder and refuse one that is not as it was written. ONNX Runtime sees nothing before this."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath

import msgspec

from bonnx.errors import ArtifactError

from .decode_json import decode_json
from .manifest import MANIFEST, SCHEMA_VERSION, Manifest, seal_is_intact
from .unfinished import unfinished

__all__ = ["CARD", "MANIFEST", "WEIGHTS", "file_digest", "locate", "read_manifest", "read_verified", "replace_file"]

# For people to read and edit; nothing depends on it, so the manifest does not list it.
CARD = "README.md"
# The external data of every graph, beside it.
WEIGHTS = "weights.bin"
_MANIFEST_LIMIT = 16 * 2**20
# How the small text begins that Git LFS leaves where a file was not downloaded.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def read_verified(folder: Path) -> Manifest:
    """The manifest, after the path, size and sha256 of every file that is computed with has been checked.

    The model card may be edited or missing, and the folder may hold other files, such as those of a version control.

    Raises:
        ArtifactError: the first thing that is wrong.
    """
    manifest = read_manifest(folder)
    # Older artifacts list their card, too.
    paths = {name: locate(folder, name) for name in manifest.files if name != CARD}
    for name, path in paths.items():
        expected, size = manifest.files[name], path.stat().st_size
        if size != expected.size:
            _check_pointer(path)
            raise ArtifactError(
                f"{path}: expected {expected.size} bytes, got {size}; "
                "the file was cut or edited: copy the artifact again, or export it again"
            )
    for name, path in paths.items():
        if file_digest(path) != manifest.files[name].sha256:
            raise ArtifactError(
                f"{path}: its sha256 is not the one in {MANIFEST}; "
                "the file was edited or damaged: copy the artifact again, or export it again"
            )
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest, its seal, schema version and references checked.

    Raises:
        ArtifactError: no manifest, another schema version, edited, or it names what is not there.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _MANIFEST_LIMIT:
            raise ArtifactError(f"{path}: larger than {_MANIFEST_LIMIT} bytes; this is not a manifest")
        text = path.read_bytes()
    except OSError as e:
        _check_link(path)
        reason = e.strerror or str(e)
        raise ArtifactError(
            f"{folder} is not an artifact: cannot read {MANIFEST} ({reason}); expected a folder made by `bonnx export`"
        ) from e
    _check_pointer(path)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ArtifactError(f"{path} is not JSON: {e}; export the artifact again") from e
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path}: schema_version is {version!r}, this bonnx reads {SCHEMA_VERSION}; "
            "export the model again, or install the bonnx that wrote it"
        )
    if not seal_is_intact(text):
        raise ArtifactError(f"{path}: its seal does not match its content; it was edited: export the artifact again")
    try:
        manifest = decode_json(text, Manifest)
    except msgspec.MsgspecError as e:
        raise ArtifactError(f"{path}: {e}; export the artifact again") from e
    referred = [graph.file for graph in manifest.graphs.values()]
    pair = manifest.text.pair
    texts = (manifest.tokenizer, manifest.text.chat_template, None if pair is None else pair.template)
    referred += [name for name in texts if name is not None]
    weights = {str(PurePosixPath(graph.file).with_name(WEIGHTS)) for graph in manifest.graphs.values()}
    referred += sorted(name for name in weights if (folder / name).exists())
    for name in referred:
        if name not in manifest.files:
            raise ArtifactError(f"{path}: it uses '{name}', which is not in its list of files; export again")
    return manifest


def locate(folder: Path, name: str) -> Path:
    """The path of one of the artifact's files.

    Raises:
        ArtifactError: the name leaves the folder, by itself or through a link, or there is no such file.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name or not pure.parts:
        raise ArtifactError(f"{folder / MANIFEST}: the path '{name}' leaves the artifact's folder; refused")
    path = folder / pure
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as e:
        _check_link(path)
        raise ArtifactError(f"{path} is missing: copy the artifact again, or export it again") from e
    if not real.is_relative_to(folder.resolve()):
        raise ArtifactError(
            f"{path} is a link to {real}, outside the artifact's folder; refused. Copy a folder of a hub's cache "
            "with its links followed (`cp -rL`), or download it into a folder of its own (`hf download --local-dir`)"
        )
    if not real.is_file():
        raise ArtifactError(f"{path}: expected a file; copy the artifact again, or export it again")
    return path


def _check_link(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise ArtifactError(
            f"{path} is a link to {path.readlink()}, which is not there; copy the artifact again with its links "
            "followed (`cp -rL`)"
        )


def _check_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ArtifactError(
                f"{path} is a pointer of Git LFS, and not the file itself; run `git lfs pull` in the clone"
            )


def file_digest(path: Path) -> str:
    """Hex sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def replace_file(path: Path, data: bytes) -> None:
    """Write a file atomically: the old one stays until the new one is complete."""
    part = path.with_name(path.name + ".part")
    with unfinished(part):
        part.write_bytes(data)
        part.replace(path)

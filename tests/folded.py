"""An artifact as `--single-file` leaves it, from one that was exported without: it costs no export."""

import shutil

import msgspec

from bonnx.export.artifact import _write_manifest
from bonnx.export.single_file import keep_one
from bonnx.runtime.artifact.folder import CARD, MANIFEST, read_manifest


def folded(artifact, folder, name):
    """Copy an artifact to `folder`, with the weights inside of the graph `name` alone."""
    shutil.copytree(artifact, folder)
    manifest = read_manifest(folder)
    for file in (MANIFEST, CARD):
        (folder / file).unlink()
    _write_manifest(msgspec.structs.replace(manifest, graphs=keep_one(folder, manifest.graphs, name)), folder)
    return folder

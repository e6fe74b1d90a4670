"""Artifacts that are damaged, foreign or hostile are refused, each with one clear error."""

import json
import os
import shutil

import msgspec
import numpy as np
import onnx
import pytest

import bonnx
from bonnx import ArtifactError
from bonnx.runtime.artifact.folder import file_digest, read_manifest
from bonnx.runtime.artifact.manifest import File, seal


def reseal(folder, **changes):
    """What an attacker who knows the format would do: change the manifest and seal it again."""
    manifest = msgspec.structs.replace(read_manifest(folder), **changes)
    (folder / "manifest.json").write_bytes(seal(manifest))


def test_a_changed_byte_in_any_file_is_found(small, tmp_path, rng):
    names = [path.relative_to(small) for path in small.rglob("*") if path.is_file() and path.name != "README.md"]
    assert len(names) == 7
    for name in names:
        folder = shutil.copytree(small, tmp_path / str(name).replace("/", "-"))
        data = bytearray((folder / name).read_bytes())
        for place in {0, len(data) - 1, int(rng.integers(len(data)))}:
            damaged = data.copy()
            damaged[place] ^= 1
            (folder / name).write_bytes(damaged)
            with pytest.raises(ArtifactError, match=str(name.name)):
                bonnx.verify(folder)
        (folder / name).write_bytes(data)
        assert bonnx.verify(folder)[1]


def test_what_is_not_computed_with_may_change(edited, rng):
    """A card that people edit or delete, and what file managers and version controls leave in a folder."""
    files = read_manifest(edited).files
    assert "README.md" not in files
    prompt, candidate = rng.standard_normal((2, 3, 12)).astype(np.float32)
    expected = bonnx.load(edited).rank(prompt, [candidate]).candidate_scores
    (edited / "README.md").write_text("---\nlicense: mit\n---\n# Ours\n")
    (edited / ".DS_Store").write_bytes(b"\0")
    (edited / ".git").mkdir()
    (edited / "onnx" / "notes.txt").write_text("kept")
    assert (bonnx.load(edited).rank(prompt, [candidate]).candidate_scores == expected).all()
    assert bonnx.verify(edited)[1]
    (edited / "README.md").unlink()
    assert bonnx.verify(edited)[1]
    # An artifact of an earlier version, whose manifest lists the card.
    reseal(edited, files=files | {"README.md": File(sha256="0" * 64, size=1)})
    assert bonnx.verify(edited)[1]


@pytest.mark.parametrize("name", ["tokenizer.json", "onnx/weights.bin", "onnx/rank.onnx"])
def test_what_is_computed_with_is_hashed(countdown, tmp_path, name):
    """A manifest that is sealed anew without one of its files."""
    folder = shutil.copytree(countdown, tmp_path / "artifact")
    files = {file: entry for file, entry in read_manifest(folder).files.items() if file != name}
    reseal(folder, files=files)
    with pytest.raises(ArtifactError, match=f"it uses '{name}', which is not in its list"):
        bonnx.load(folder)


def test_truncated_and_missing_files(edited):
    weights = edited / "onnx/weights.bin"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match=rf"expected {len(data)} bytes, got {len(data) - 1}"):
        bonnx.load(edited)
    weights.unlink()
    with pytest.raises(ArtifactError, match=r"weights\.bin is missing"):
        bonnx.load(edited)


def test_foreign_folders(tmp_path, edited):
    with pytest.raises(ArtifactError, match="is not an artifact"):
        bonnx.load(tmp_path / "nowhere")
    manifest = edited / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"schema_version": 2', '"schema_version": 99'))
    with pytest.raises(ArtifactError, match="schema_version is 99, this bonnx reads 2"):
        bonnx.load(edited)
    manifest.write_text("[" * 100_000)
    with pytest.raises(ArtifactError, match="is not JSON"):
        bonnx.load(edited)
    manifest.write_text("[]")
    with pytest.raises(ArtifactError, match="schema_version is None"):
        bonnx.load(edited)
    manifest.write_text(text.replace('"max_tokens": 40', '"max_tokens": 41'))
    with pytest.raises(ArtifactError, match="it was edited"):
        bonnx.load(edited)


@pytest.mark.parametrize("name", ["../outside.bin", "/etc/hostname", "onnx/../../outside.bin", "..\\outside.bin"])
def test_a_path_that_leaves_the_folder(edited, name):
    (edited.parent / "outside.bin").write_bytes(b"x")
    files = dict(read_manifest(edited).files) | {name: File(sha256="0" * 64, size=1)}
    reseal(edited, files=files)
    with pytest.raises(ArtifactError, match="leaves the artifact's folder"):
        bonnx.load(edited)


def test_a_link_out_of_the_folder(edited):
    weights, outside = edited / "onnx/weights.bin", edited.parent / "outside.bin"
    os.replace(weights, outside)
    weights.symlink_to(outside)
    with pytest.raises(ArtifactError, match=r"is a link to .*outside the artifact's folder; .*cp -rL"):
        bonnx.load(edited)


def test_a_graph_that_disagrees_with_the_manifest(edited):
    manifest = read_manifest(edited)
    rank = manifest.graphs["rank"]
    inputs = [msgspec.structs.replace(rank.inputs[0], dtype="float16"), *rank.inputs[1:]]
    reseal(edited, graphs={**manifest.graphs, "rank": msgspec.structs.replace(rank, inputs=inputs)})
    with pytest.raises(ArtifactError, match="the manifest says"):
        bonnx.load(edited)


@pytest.mark.parametrize("name", ["onnx/weights.bin", "manifest.json"])
def test_pointers_of_git_lfs_and_links_to_nothing(edited, name):
    (edited / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 1\n")
    with pytest.raises(ArtifactError, match=rf"{name} is a pointer of Git LFS.*git lfs pull"):
        bonnx.load(edited)
    (edited / name).unlink()
    (edited / name).symlink_to("../blobs/0a0a")
    with pytest.raises(ArtifactError, match=r"is a link to \.\./blobs/0a0a, which is not there"):
        bonnx.load(edited)


def test_weights_outside_the_folder_are_not_read(edited):
    """A graph with honest hashes that points its weights elsewhere."""
    outside = edited.parent / "outside.bin"
    shutil.copy(edited / "onnx/weights.bin", outside)
    path = edited / "onnx/rank.onnx"
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../../outside.bin"
    path.write_bytes(model.SerializeToString())
    files = dict(read_manifest(edited).files)
    files["onnx/rank.onnx"] = File(sha256=file_digest(path), size=path.stat().st_size)
    reseal(edited, files=files)
    with pytest.raises(ArtifactError, match=r"rank\.onnx"):
        bonnx.load(edited)


def test_recorded_outputs_that_are_not_met(edited):
    """The hashes fit, the numbers do not: what another kernel could do."""
    path = edited / "golden.npz"
    recorded = dict(np.load(path))
    name = next(key for key in recorded if key.endswith("out/scores"))
    recorded[name] = recorded[name] + np.float32(0.01)
    np.savez_compressed(path, **recorded)
    files = dict(read_manifest(edited).files)
    files["golden.npz"] = File(sha256=file_digest(path), size=path.stat().st_size)
    reseal(edited, files=files)
    with pytest.raises(ArtifactError, match="differs from PyTorch"):
        bonnx.verify(edited)


def test_the_manifest_is_plain_json(small):
    document = json.loads((small / "manifest.json").read_text())
    assert {"name": "best_index", "dtype": "int64", "shape": ["batch"]} in document["graphs"]["rank"]["outputs"]


def test_weights_that_are_written_over_in_use_are_noticed(edited, rng):
    model = bonnx.load(edited)
    prompt, *candidates = rng.standard_normal((4, 5, 12)).astype(np.float32)
    expected = model.rank(prompt, candidates).candidate_scores
    weights, kept = edited / "onnx" / "weights.bin", edited / "onnx" / "kept.bin"
    # A file that takes its place is another one.
    weights.rename(kept)
    weights.write_bytes(b"?" * kept.stat().st_size)
    assert (model.rank(prompt, candidates).candidate_scores == expected).all()
    with kept.open("r+b") as file:
        file.write(b"?")
    with pytest.raises(ArtifactError, match="overwritten while in use"):
        model.rank(prompt, candidates)

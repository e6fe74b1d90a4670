"""The model repository against Triton's own schema, and its graphs against the artifact."""

import shutil

import msgspec
import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format

import bonnx
from bonnx.export import triton as triton_module
from bonnx.export.triton import write_repository
from bonnx.runtime.errors import ExportError
from bonnx.runtime.folder import read_manifest
from bonnx.runtime.inputs import pad
from bonnx.runtime.manifest import seal
from tests.tolerance import RUNTIME, within


def schema():
    """Triton's own; imported late, because grpc is slow to come."""
    from tritonclient.grpc import model_config_pb2

    return model_config_pb2


def with_scoring(artifact, folder, **changes):
    """A copy of an artifact with another rule."""
    shutil.copytree(artifact, folder)
    manifest = read_manifest(folder)
    manifest = msgspec.structs.replace(manifest, scoring=msgspec.structs.replace(manifest.scoring, **changes))
    (folder / "manifest.json").write_bytes(seal(manifest))
    return folder


def session(repository, name):
    return onnxruntime.InferenceSession(repository / name / "1" / "model.onnx", providers=["CPUExecutionProvider"])


def padded(items):
    """Requests of one shape, as a client makes them: (B, T) and the mask."""
    return pad([np.asarray(item) for item in items], 0)


def draw(rng, model, length):
    count = int(rng.integers(1, length + 1))
    if model.reader.width is None:
        return rng.integers(0, model.reader.vocabulary, count)
    return rng.standard_normal((count, model.reader.width)).astype(np.float32)


@pytest.mark.parametrize("name", ["small", "tiny"])
def test_every_config_is_tritons_and_says_what_the_model_has(request, tmp_path, name):
    artifact = request.getfixturevalue(name)
    names = write_repository(artifact, tmp_path / "models")
    assert names == [f"{name}_rank", f"{name}_score"] + ([f"{name}_generate"] if name == "tiny" else [])
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == sorted(names)
    pb = schema()
    types = {"tensor(int64)": pb.TYPE_INT64, "tensor(float)": pb.TYPE_FP32}
    for model in names:
        text = (tmp_path / "models" / model / "config.pbtxt").read_text()
        config = text_format.Parse(text, pb.ModelConfig())
        assert (config.name, config.backend) == (model, "onnxruntime")
        batched = not model.endswith("generate")
        assert (config.max_batch_size > 0) == config.HasField("dynamic_batching") == batched
        own = session(tmp_path / "models", model)
        for declared, values in ((config.input, own.get_inputs()), (config.output, own.get_outputs())):
            assert [value.name for value in declared] == [value.name for value in values]
            for entry, value in zip(declared, values, strict=True):
                assert entry.data_type == types[value.type]
                axes = [axis if isinstance(axis, int) else -1 for axis in value.shape]
                assert list(entry.dims) == axes[int(batched) :]
                assert value.shape, "Triton knows no scalars"
                if batched:
                    assert value.shape[0] == "batch"


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("small", {}),
        ("small", {"aggregation": "mean"}),
        ("small", {"aggregation": "step_min"}),
        ("tiny", {"aggregation": "prod"}),
        ("tiny", {"aggregation": "step_mean"}),
        ("tiny", {"passes_pad": True, "pad_token": 5}),
    ],
)
def test_requests_that_are_joined_get_what_each_gets_alone(request, rng, tmp_path, name, rule):
    artifact = with_scoring(request.getfixturevalue(name), tmp_path / "artifact", **rule)
    model = bonnx.load(artifact)
    write_repository(artifact, tmp_path / "models")
    steps = rule.get("aggregation", "").startswith("step") and name == "small"
    kind = "ids" if name == "tiny" else "embeds"
    batch, count = 4, 3
    prompts = [draw(rng, model, 6) for _ in range(batch)]
    candidates = [[draw(rng, model, 7) for _ in range(count)] for _ in range(batch)]
    flat, mask = padded([c for own in candidates for c in own])
    feeds = dict(zip((f"prompt_{kind}", "prompt_mask"), padded(prompts), strict=True))
    feeds |= {
        f"candidate_{kind}": flat.reshape(batch, count, *flat.shape[1:]),
        "candidate_mask": mask.reshape(batch, count, -1),
    }
    marks = rng.integers(0, 2, feeds["candidate_mask"].shape)
    if steps:
        feeds["step_mask"] = marks
    scores, found, best = session(tmp_path / "models", f"{name}_rank").run(None, feeds)
    for b in range(batch):
        given = [marks[b, i, : len(c)] for i, c in enumerate(candidates[b])] if steps else None
        expected = model.rank(prompts[b], candidates[b], step_masks=given)
        assert within(found[b], expected.candidate_scores, RUNTIME)
        assert within(found[b][best[b, 0]], found[b].max(), RUNTIME)
        for i, own in enumerate(expected.scores):
            assert within(scores[b, i, : len(own)], own, RUNTIME)
    rows, row_mask = padded(prompts)
    own = {"input_ids" if kind == "ids" else "inputs_embeds": rows, "attention_mask": row_mask}
    if steps:
        own["step_mask"] = row_marks = rng.integers(0, 2, row_mask.shape)
    scored = session(tmp_path / "models", f"{name}_score").run(["row_scores", "backbone"], own)
    given = [row_marks[i, : len(row)] for i, row in enumerate(prompts)] if steps else None
    expected = model.score(prompts, backbone=True, step_masks=given)
    assert within(scored[0][:, 0], expected.row_scores, RUNTIME)
    for i, backbone in enumerate(expected.backbone):
        assert within(scored[1][i, : len(backbone)], backbone, RUNTIME)


def test_generate_takes_lists_of_one(tiny, rng, tmp_path):
    model = bonnx.load(tiny)
    write_repository(tiny, tmp_path / "models")
    prompt = draw(rng, model, 8)
    whole = {"num_candidates": 4, "max_new_tokens": 6, "top_k": 0, "seed": 9, "aggregation": 0, "step_token": -1}
    feeds = {name: np.array([value]) for name, value in (whole | {"prune_every": 0}).items()}
    feeds |= {name: np.array([1], np.float32) for name in ("temperature", "top_p", "prune_keep")}
    feeds |= {"input_ids": prompt[None], "attention_mask": np.ones((1, len(prompt)), np.int64)}
    feeds |= {"stop_tokens": np.zeros(0, np.int64)}
    sequences, best = session(tmp_path / "models", "tiny_generate").run(["sequences", "best_index"], feeds)
    expected = model.generate(prompt, n=4, max_new_tokens=6, seed=9)
    assert sequences[:, 0].tolist() == [candidate.tokens.tolist() for candidate in expected.candidates]
    assert best[0] == expected.best_index


def test_a_repository_is_written_whole_or_not_at_all(small, tmp_path, monkeypatch):
    place = tmp_path / "models"
    write_repository(small, place)
    with pytest.raises(ExportError, match="exists; choose another folder"):
        write_repository(small, place)
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(triton_module, "_config", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_repository(small, place, overwrite=True)
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["models"]
    write_repository(small, place, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    with pytest.raises(ExportError, match="not a model repository"):
        write_repository(small, tmp_path / "mine", overwrite=True)
    weights = [*place.glob("*/1/weights.bin")]
    assert len({path.stat().st_ino for path in weights}) == 1

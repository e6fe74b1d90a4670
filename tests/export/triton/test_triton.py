"""`--triton`: configs against Triton's own schema, graphs against what the artifact itself answers."""

import shutil
from argparse import ArgumentParser

import msgspec
import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig
from tritonclient.utils import np_to_triton_dtype

import bonnx
from bonnx import ExportError
from bonnx.command.export import configure, run
from bonnx.export.triton import repository
from bonnx.export.triton.repository import write_repository
from bonnx.runtime.artifact.folder import MANIFEST, read_verified
from bonnx.runtime.artifact.manifest import Scoring, seal
from bonnx.runtime.text.padding import pad
from tests.tolerance import RUNTIME, within

RULES = {
    "last": Scoring(),
    "mean of steps": Scoring(aggregation="step_mean", step_token=3, end_token=7, stop_tokens=[9, 7]),
    "product of steps that the caller tells": Scoring(aggregation="step_prod"),
    "last but padding": Scoring(passes_pad=True, pad_token=5),
}
ORT = {"tensor(int64)": "INT64", "tensor(float)": "FP32"}


class Artifact:
    """An artifact, its repository, and the repository's models as a server sees them."""

    def __init__(self, folder, repository):
        self.folder, self.repository = folder, repository
        self.model, self.manifest = bonnx.load(folder), read_verified(folder)
        self.names = write_repository(folder, repository)
        self.configs, self.sessions = {}, {}
        for name in self.names:
            text = (self.repository / name / "config.pbtxt").read_text()
            graph = name.rsplit("_", 1)[1]
            self.configs[graph] = text_format.Parse(text, ModelConfig())
            path = self.repository / name / "1" / "model.onnx"
            self.sessions[graph] = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def infer(self, graph, feeds):
        """As the server: inputs are checked against the config, outputs come by name."""
        config, session = self.configs[graph], self.sessions[graph]
        assert set(feeds) == {value.name for value in config.input}
        for value in config.input:
            fits(value, feeds[value.name], config.max_batch_size)
        names = [value.name for value in config.output]
        outputs = dict(zip(names, session.run(names, feeds), strict=True))
        for value in config.output:
            fits(value, outputs[value.name], config.max_batch_size)
        return outputs


def fits(value, array, max_batch_size):
    assert DataType.Name(value.data_type) == f"TYPE_{np_to_triton_dtype(array.dtype)}"
    dims = [*value.dims] if max_batch_size == 0 else [-1, *value.dims]
    assert array.ndim == len(dims), value.name
    assert all(dim in (-1, size) for dim, size in zip(dims, array.shape, strict=True)), value.name


@pytest.fixture(scope="module", params=[*RULES, "embeddings"])
def artifact(request, tmp_path_factory, small, tiny):
    """A network over embeddings, or a language model with each rule: its graphs are the same for all of them."""
    folder = tmp_path_factory.mktemp("triton")
    if request.param == "embeddings":
        return Artifact(small, folder / "repository")
    shutil.copytree(tiny, folder / "artifact")
    manifest = msgspec.structs.replace(read_verified(tiny), name='../of "words"/11', scoring=RULES[request.param])
    (folder / "artifact" / MANIFEST).write_bytes(seal(manifest))
    return Artifact(folder / "artifact", folder / "repository")


def draw(rng, artifact, longest):
    length = int(rng.integers(1, longest + 1))
    if artifact.manifest.kind == "language_model":
        # Few, so that steps, ends and pads are common.
        return rng.integers(0, 11, length)
    return rng.standard_normal((length, 12)).astype(np.float32)


def padded(rng, items):
    """Stacked, each padded on a side of its own, with what must not count."""
    values, mask = pad(items, 0)
    values[mask == 0] = 3
    for row, item in enumerate(items):
        if rng.random() < 0.5:
            values[row], mask[row] = (np.roll(x[row], len(values[row]) - len(item), 0) for x in (values, mask))
    return values, mask


def placed(mask, marks):
    """What is values of each item's tokens, where they lie; elsewhere 1, which must not count."""
    aligned = np.ones_like(mask)
    for row, values in enumerate(marks):
        aligned[row][mask[row] > 0] = values
    return aligned


def marked(rng, artifact, graph, mask, items):
    """A step mask, if the model wants one: as an input, and as the caller of `rank` and `score` gives it."""
    if "step_mask" not in {value.name for value in artifact.configs[graph].input}:
        return {}, {}
    marks = [rng.integers(0, 2, len(item)).tolist() for item in items]
    return {"step_mask": placed(mask, marks)}, {"step_masks": marks}


def alone(feeds, b):
    return {name: value[b : b + 1] for name, value in feeds.items()}


def same(served, expected):
    both = served.dtype == expected.dtype and (np.isnan(served) == np.isnan(expected)).all()
    return both and within(np.nan_to_num(served), np.nan_to_num(expected), RUNTIME)


def test_configs_agree_with_schema_graphs_and_manifest(artifact):
    manifest = artifact.manifest
    told = manifest.scoring.aggregation == "step_prod"
    graphs = ["rank", "score", *(["generate"] if manifest.kind == "language_model" and not told else [])]
    prefix = "small" if manifest.kind == "network" else "_of_words_11"
    assert artifact.names == [f"{prefix}_{graph}" for graph in graphs]
    assert sorted(path.name for path in artifact.repository.iterdir()) == sorted(artifact.names)
    for name, graph in zip(artifact.names, graphs, strict=True):
        config, session = artifact.configs[graph], artifact.sessions[graph]
        assert (config.name, config.backend, config.default_model_filename) == (name, "onnxruntime", "model.onnx")
        assert config.max_batch_size > 0
        assert config.HasField("dynamic_batching")
        folder = artifact.repository / name / "1"
        assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "weights.bin"]
        assert (folder / "weights.bin").read_bytes() == (artifact.folder / "onnx/weights.bin").read_bytes()
        known = {v.name: v.dtype for v in (*manifest.graphs[graph].inputs, *manifest.graphs[graph].outputs)}
        known["row_scores"] = "float32"
        for declared, actual in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
            assert [value.name for value in declared] == [value.name for value in actual]
            for value, other in zip(declared, actual, strict=True):
                assert DataType.Name(value.data_type) == f"TYPE_{ORT[other.type]}"
                assert np_to_triton_dtype(np.dtype(known[value.name])) == ORT[other.type]
                shape = [axis if isinstance(axis, int) else -1 for axis in other.shape]
                # Triton's rules: the axis of requests is variable and not listed; no tensor is a scalar.
                assert [*value.dims] == shape[1:]
                assert value.dims
                assert not value.HasField("reshape")
                assert shape[0] == -1


def test_rank(artifact, rng):
    for _ in range(3):
        batch, count = (int(n) for n in rng.integers(1, 5, 2))
        prompts = [draw(rng, artifact, 6) for _ in range(batch)]
        candidates = [[draw(rng, artifact, 5) for _ in range(count)] for _ in range(batch)]
        prompt, prompt_mask = padded(rng, prompts)
        flat = [item for row in candidates for item in row]
        values, mask = padded(rng, flat)
        steps, marks = marked(rng, artifact, "rank", mask, flat)
        kind = "ids" if artifact.manifest.kind == "language_model" else "embeds"
        rows = {f"candidate_{kind}": values, "candidate_mask": mask, **steps}
        feeds = {f"prompt_{kind}": prompt, "prompt_mask": prompt_mask}
        feeds |= {name: value.reshape(batch, count, *value.shape[1:]) for name, value in rows.items()}
        served = artifact.infer("rank", feeds)
        assert served["scores"].shape == feeds["candidate_mask"].shape
        for b in range(batch):
            own_marks = {name: given[b * count : (b + 1) * count] for name, given in marks.items()}
            ranking = artifact.model.rank(prompts[b], candidates[b], **own_marks)
            assert same(served["candidate_scores"][b], ranking.candidate_scores)
            assert served["best_index"][b].tolist() == [ranking.best_index]
            for n in range(count):
                assert within(served["scores"][b, n][feeds["candidate_mask"][b, n] > 0], ranking.scores[n], RUNTIME)
            single = artifact.infer("rank", alone(feeds, b))
            assert all(same(single[name][0], value[b]) for name, value in served.items())


def test_candidates_that_are_missing_only_fill_up(artifact, rng):
    """Requests of unequal sizes share a batch if they are padded: a candidate without tokens cannot win."""
    kind = "ids" if artifact.manifest.kind == "language_model" else "embeds"
    candidates = [draw(rng, artifact, 4) for _ in range(3)]
    prompt, prompt_mask = padded(rng, [draw(rng, artifact, 4)])
    values, mask = padded(rng, candidates)
    steps, _ = marked(rng, artifact, "rank", mask, candidates)
    feeds = {f"prompt_{kind}": prompt, "prompt_mask": prompt_mask}
    feeds |= {f"candidate_{kind}": values[None], "candidate_mask": mask[None]}
    feeds |= {name: value[None] for name, value in steps.items()}
    expected = artifact.infer("rank", feeds)
    wider = {
        name: value if name.startswith("prompt") else np.concatenate([value, value], 1) for name, value in feeds.items()
    }
    wider["candidate_mask"][:, 3:] = 0
    served = artifact.infer("rank", wider)
    assert same(served["candidate_scores"][:, :3], expected["candidate_scores"])
    assert np.isnan(served["candidate_scores"][:, 3:]).all()
    assert served["best_index"].tolist() == expected["best_index"].tolist()


def test_score(artifact, rng):
    name = "input_ids" if artifact.manifest.kind == "language_model" else "inputs_embeds"
    for _ in range(3):
        rows = [draw(rng, artifact, 9) for _ in range(int(rng.integers(1, 6)))]
        values, mask = padded(rng, rows)
        steps, marks = marked(rng, artifact, "score", mask, rows)
        feeds = {name: values, "attention_mask": mask, **steps}
        served = artifact.infer("score", feeds)
        expected = artifact.model.score(rows, backbone=True, **marks)
        assert same(served["row_scores"][:, 0], expected.row_scores)
        for b in range(len(rows)):
            real = mask[b] > 0
            assert within(served["scores"][b, real, 0], expected.scores[b], RUNTIME)
            assert within(served["backbone"][b, real], expected.backbone[b], RUNTIME)
            single = artifact.infer("score", alone(feeds, b))
            assert same(single["row_scores"][0], served["row_scores"][b])
            assert within(single["backbone"][0, real], served["backbone"][b, real], RUNTIME)


@pytest.mark.parametrize("artifact", ["last", "mean of steps"], indirect=True)
def test_generate(artifact, rng):
    prompts = [draw(rng, artifact, 6) for _ in range(3)]
    ids, mask = padded(rng, prompts)
    options = {"n": [16, 3, 1], "max_new_tokens": [10, 17, 4], "top_k": [120, 0, 7], "top_p": [0.97, 1.0, 0.5]}
    options |= {"temperature": [0.8, 1.3, 0.0], "seed": rng.integers(2**31, size=3).tolist()}
    columns = {"num_candidates" if name == "n" else name: np.array(values)[:, None] for name, values in options.items()}
    floats = ("temperature", "top_p")
    feeds = {name: column.astype(np.float32 if name in floats else np.int64) for name, column in columns.items()}
    feeds |= {"input_ids": ids, "attention_mask": mask}
    served = artifact.infer("generate", feeds)
    for b, prompt in enumerate(prompts):
        expected = artifact.model.generate(prompt, **{name: values[b] for name, values in options.items()})
        single, count = artifact.infer("generate", alone(feeds, b)), options["n"][b]
        for n, candidate in enumerate(expected.candidates):
            length = int(served["lengths"][b, n])
            assert served["sequences"][b, n, :length].tolist() == candidate.tokens.tolist()
            assert single["sequences"][0, n, :length].tolist() == candidate.tokens.tolist()
            assert within(served["scores"][b, n, :length], candidate.scores, RUNTIME)
            assert within(served["log_probs"][b, n, :length], candidate.log_probs, RUNTIME)
            assert bonnx.FINISH_REASONS[served["finish_reasons"][b, n]] == candidate.finish_reason
        assert not served["lengths"][b, count:].any()
        assert np.isnan(served["candidate_scores"][b, count:]).all()
        scores = np.array([candidate.score for candidate in expected.candidates], np.float32)
        assert within(served["candidate_scores"][b, :count], scores, RUNTIME)
        assert served["best_index"][b].tolist() == [expected.best_index]
        best = served["best_sequence"][b, : len(expected.best.tokens)]
        assert best.tolist() == expected.best.tokens.tolist()


def test_an_artifact_whose_options_are_for_all_prompts_is_refused(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "artifact")
    manifest = read_verified(tiny)
    graphs = {name: msgspec.structs.replace(graph, per_prompt=[]) for name, graph in manifest.graphs.items()}
    (tmp_path / "artifact" / MANIFEST).write_bytes(seal(msgspec.structs.replace(manifest, graphs=graphs)))
    with pytest.raises(ExportError, match="one value of each option for all prompts; export it again"):
        write_repository(tmp_path / "artifact", tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_weights_lie_on_the_disk_once(artifact):
    first, *others = (artifact.repository / name / "1" / "weights.bin" for name in artifact.names)
    assert all(first.samefile(other) for other in others)
    # The artifact's own file stays by itself: tools refuse a file of several names, and what is edited here is not it.
    assert not first.samefile(artifact.folder / "onnx/weights.bin")


def test_where_links_cannot_be_made_weights_are_copied(small, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(repository.os, "link", refuse)
    names = write_repository(small, tmp_path / "repository")
    copies = [tmp_path / "repository" / name / "1" / "weights.bin" for name in names]
    assert {path.read_bytes() for path in copies} == {(small / "onnx/weights.bin").read_bytes()}
    assert not copies[0].samefile(copies[1])


def test_the_same_artifact_gives_the_same_files(small, tmp_path):
    written = []
    for _ in range(2):
        write_repository(small, tmp_path / "repository", overwrite=True)
        files = sorted(path for path in (tmp_path / "repository").rglob("*") if path.is_file())
        written.append([(str(path), path.read_bytes()) for path in files])
    assert written[0] == written[1]
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]


def test_an_existing_folder_is_kept_unless_export_wrote_all_of_it(small, tmp_path):
    repository = tmp_path / "repository"
    write_repository(small, repository)
    with pytest.raises(ExportError, match="exists; choose another folder, or pass --overwrite"):
        write_repository(small, repository)
    (repository / "mine").mkdir()
    (repository / "mine" / "config.pbtxt").write_text('name: "mine"')
    with pytest.raises(ExportError, match=r"mine was not written by .*choose another folder"):
        write_repository(small, repository, overwrite=True)
    assert (repository / "mine" / "config.pbtxt").read_text() == 'name: "mine"'
    for inner in (small / "triton", small.parent):
        with pytest.raises(ExportError, match="one contains the other"):
            write_repository(small, inner, overwrite=True)


def test_a_failure_leaves_nothing_and_keeps_what_was_there(small, tmp_path, monkeypatch):
    folder = tmp_path / "repository"
    write_repository(small, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    checked = []

    def refuse(path):
        checked.append(path)
        if len(checked) == 2:
            raise ExportError("the second graph is not valid ONNX")

    monkeypatch.setattr(repository, "check_structure", refuse)
    with pytest.raises(ExportError, match="second graph"):
        write_repository(small, folder, overwrite=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    checked.clear()
    with pytest.raises(ExportError, match="second graph"):
        write_repository(small, tmp_path / "another")
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]


def test_the_command_refuses_before_it_works(tmp_path):
    parser = ArgumentParser()
    configure(parser)
    (tmp_path / "t").mkdir()
    with pytest.raises(ExportError, match="exists"):
        run(parser.parse_args(["-o", str(tmp_path / "out"), "--triton", str(tmp_path / "t")]))
    assert [path.name for path in tmp_path.iterdir()] == ["t"]

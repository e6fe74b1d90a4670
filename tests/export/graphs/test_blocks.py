"""Attention in blocks gives what the network gives in one piece, wherever the borders of blocks and windows lie."""

import itertools

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from bonnx.export.graphs import blocks
from bonnx.export.graphs.selection import plain_selection
from bonnx.export.graphs.trace import trace_graphs
from bonnx.models.config import LanguageModelConfig, NetworkConfig
from bonnx.models.network import LanguageModel
from bonnx.runtime.artifact.manifest import Scoring

SIZES = {"embed_dim": 16, "hidden_size": 16, "num_heads": 4, "scorer_hidden": 8, "num_layers": 2}
KINDS = {
    "plain": (23, {"num_kv_heads": 2}),
    "cap": (18, {"num_kv_heads": 4, "attention_cap": 1.5}),
    "cap, windows": (23, {"num_kv_heads": 1, "attention_cap": 2.0, "sliding_window": 6, "sliding_layers": [1]}),
}
# Positions of a block, in place of those that suit a processor.
ROWS, CANDIDATES, CANDIDATE = 5, 12, 3


@pytest.fixture(scope="module", params=KINDS)
def traced(request):
    """A model, and its graphs."""
    opset, options = KINDS[request.param]
    network = NetworkConfig(**SIZES, **options)
    model = LanguageModel(LanguageModelConfig(network=network, vocab_size=50, vocabulary_head=False)).eval()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ROWS_BLOCK", ROWS), ("CANDIDATES_BLOCK", CANDIDATES), ("CANDIDATE_BLOCK", CANDIDATE)):
            patch.setattr(blocks, name, value)
        graphs = {name: ir.to_proto(graph) for name, graph in trace_graphs(model, Scoring(), opset=opset)}
    return model, graphs


def _run(graphs, name, feeds, *, reference=False):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    evaluator = (
        ReferenceEvaluator(graphs[name])
        if reference
        else onnxruntime.InferenceSession(graphs[name].SerializeToString(), options, providers=["CPUExecutionProvider"])
    )
    names = {value.name for value in graphs[name].graph.input}
    outputs = [value.name for value in graphs[name].graph.output]
    given = {key: value for key, value in (plain_selection() | feeds).items() if key in names}
    return dict(zip(outputs, evaluator.run(None, given), strict=True))


def _padded(rng, *shape):
    """A mask of random padding: at the end, at the beginning, or in the middle of a row, never all of it."""
    mask = np.ones(shape, np.int64)
    for row in mask.reshape(-1, shape[-1]):
        start, end = sorted(rng.integers(0, shape[-1] + 1, 2))
        row[start:end] = 0
        row[rng.integers(shape[-1])] = 1
    return mask


def _expected(model, ids, mask):
    """What the network gives for each row without its padding: backbone and scores at the real positions."""
    backbone, scores = np.zeros((*ids.shape, 16), np.float32), np.zeros(ids.shape, np.float32)
    for row, real, state, score in zip(ids, mask > 0, backbone, scores, strict=True):
        with torch.no_grad():
            found, rated = model(torch.tensor(row[real])[None])
        state[real], score[real] = found[0].numpy(), rated[0, :, 0].numpy()
    return backbone, scores


def _check(found, expected, real):
    np.testing.assert_allclose(found[real], expected[real], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("length", [1, ROWS, ROWS + 1, 3 * ROWS + 2])
def test_rows(traced, rng, length):
    model, graphs = traced
    ids, mask = rng.integers(0, 50, (3, length)), _padded(rng, 3, length)
    feeds = {"input_ids": ids, "attention_mask": mask, "num_candidates": np.array(3)}
    backbone, scores = _expected(model, ids, mask)
    for reference in (False, True)[: 1 + (length == ROWS + 1)]:
        found = _run(graphs, "score", feeds, reference=reference)
        _check(found["backbone"], backbone, mask > 0)
        _check(found["scores"][:, :, 0], scores, mask > 0)


@pytest.mark.parametrize("prompt", [1, 2 * ROWS, 4 * ROWS + 3])
@pytest.mark.parametrize(
    ("count", "length"), [(1, 1), (2, 2 * CANDIDATE + 1), (2 * CANDIDATES, 4), (3, CANDIDATES + 1)]
)
def test_candidates_after_a_prompt(traced, rng, prompt, count, length):
    model, graphs = traced
    ids, mask = rng.integers(0, 50, (2, prompt)), _padded(rng, 2, prompt)
    candidates, real = rng.integers(0, 50, (count, 2, length)), _padded(rng, count, 2, length)
    rows = [
        np.concatenate([np.broadcast_to(a, (count, 2, prompt)), b], 2) for a, b in ((ids, candidates), (mask, real))
    ]
    rows = [part.reshape(count * 2, -1) for part in rows]
    expected = _expected(model, *rows)[1].reshape(count, 2, -1)[:, :, prompt:]
    feeds = {"prompt_ids": ids, "prompt_mask": mask, "candidate_ids": candidates, "candidate_mask": real}
    _check(_run(graphs, "rank", feeds)["scores"], expected, real > 0)
    # The same in two graphs, the prompt read in pieces.
    shapes = {value.name: value.type.tensor_type.shape.dim for value in graphs["rank_prefill"].graph.input}
    past = {
        name: np.zeros([2, *(axis.dim_value or 1 for axis in axes[1:])], np.float32)
        for name, axes in shapes.items()
        if name.startswith("past")
    }
    borders = sorted({0, prompt, *rng.integers(0, prompt + 1, 2).tolist()})
    for begin, end in itertools.pairwise(borders):
        piece = {"prompt_ids": ids[:, begin:end], "prompt_mask": mask[:, :end]}
        cache = _run(graphs, "rank_prefill", piece | past)
        past = {name.replace("prompt", "past"): value for name, value in cache.items()}
    feeds = {"prompt_mask": mask, "candidate_ids": candidates, "candidate_mask": real}
    _check(_run(graphs, "rank_cached", feeds | cache)["scores"], expected, real > 0)

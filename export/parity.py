"""Prove an exported folder: ONNX's own checks, then ONNX Runtime and the reference evaluator against PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from ..models.network import LanguageModel, TwoHeadedNetwork, select_best_of_n
from ..runtime.aggregate import aggregate
from ..runtime.difference import greatest_difference
from ..runtime.errors import ExportError
from ..runtime.manifest import AGGREGATIONS, Graph, Limits, Parity, Precision, Scoring
from ..runtime.session import Options, Session
from .reference import MatMulNBits

__all__ = ["TOLERANCES", "Checker", "Tolerance", "activated", "check_structure"]

Array = NDArray[Any]


class Tolerance(NamedTuple):
    """What two engines may differ by: `|a - b| <= relative |b| + absolute`; scores of a trained model are of order 1.

    A draw closer than `edge` to the border between two tokens may fall on either side of it.
    """

    relative: float
    absolute: float
    edge: float


# Of the same precision in PyTorch. With fewer bits the last digit of a float32 decides now and then to which step an
# input is rounded; the whole step that is then the difference decides more such cases in the layers above.
TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(1e-4, 5e-5, 1e-4),
    "int8": Tolerance(0.1, 0.2, 0.05),
    "int4": Tolerance(0.1, 0.2, 0.05),
}
# (prompt length, candidate length, candidates, batch): 1 on every axis, odd, long.
_SHAPES = [(1, 1, 1, 1), (1, 7, 5, 1), (9, 1, 3, 2), (33, 5, 1, 3), (5, 3, 17, 2), (13, 11, 4, 1), (101, 29, 2, 1)]
_RANDOM_SHAPES, _LONG = 12, 257


def check_structure(path: Path) -> None:
    """`onnx.checker` and strict shape inference on a written file.

    Raises:
        ExportError: either refuses it.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(str(path))
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as e:
        raise ExportError(f"{path.name} is not valid ONNX: {e}") from e


class Checker:
    """Compares a model with its graphs on fresh random inputs.

    The reference is the PyTorch model, of the graphs' precision, run on whole rows without padding, one row at a time:
    no code of the graphs.
    """

    def __init__(
        self,
        model: LanguageModel | TwoHeadedNetwork,
        folder: Path,
        graphs: dict[str, Graph],
        scoring: Scoring,
        limits: Limits,
        precision: Precision = "fp32",
        seed: int = 0,
    ) -> None:
        self.tolerance = TOLERANCES[precision]
        self.model, self.folder, self.graphs, self.scoring, self.limits = model.eval(), folder, graphs, scoring, limits
        self.ids = isinstance(model, LanguageModel)
        self.network = model.network if isinstance(model, LanguageModel) else model
        self.rng = np.random.default_rng(seed)
        self.sessions = {n: Session(folder / g.file, g, Options(provider="cpu")) for n, g in graphs.items()}
        self.recorded: dict[str, Array] = {}

    def run(self) -> list[Parity]:
        """Every check.

        Raises:
            ExportError: a difference is greater than allowed, or another candidate was selected.
        """
        checks = [self._rank("rank, right padding", "right"), self._rank("rank, left padding", "left")]
        checks += [self._rank("rank, no padding", "none"), self._score(), self._selection(), self._reference()]
        return checks

    def case(self, prompt: int, length: int, count: int, batch: int, padding: str) -> tuple[dict[str, Array], Array]:
        """Random feeds of `rank` and the scores (count, batch, length) that PyTorch gives; padding is 0."""
        rng, axis = self.rng, ([] if self.ids else [self.network.config.embed_dim])
        prompt_size = np.full(batch, prompt) if padding == "none" else rng.integers(1, prompt + 1, batch)
        sizes = np.full((count, batch), length) if padding == "none" else rng.integers(1, length + 1, (count, batch))
        prompt_mask, mask = _mask(prompt_size, prompt, padding), _mask(sizes, length, padding)
        prompts, candidates = self._draw(batch, prompt, *axis), self._draw(count, batch, length, *axis)
        expected = np.zeros(mask.shape, np.float32)
        for n, b in np.ndindex(count, batch):
            row = np.concatenate([prompts[b][prompt_mask[b] > 0], candidates[n, b][mask[n, b] > 0]])
            expected[n, b][mask[n, b] > 0] = self.torch_scores(row[None])[1][0, prompt_size[b] :]
        suffix = "ids" if self.ids else "embeds"
        feeds = {f"prompt_{suffix}": prompts, "prompt_mask": prompt_mask}
        feeds |= {f"candidate_{suffix}": candidates, "candidate_mask": mask}
        return feeds | {"step_mask": np.ones((1, 1, 1), np.int64), "aggregation": np.array(0)}, expected

    def torch_scores(self, rows: Array) -> tuple[Array, Array]:
        """Whole unpadded rows -> backbone (B, T, D) and scores (B, T), the activation applied."""
        with torch.no_grad():
            backbone, scores = self.model(torch.from_numpy(rows))[:2]
        return backbone.numpy(), activated(scores, self.scoring).numpy()

    def _draw(self, *shape: int) -> Array:
        if self.ids:
            assert isinstance(self.model, LanguageModel)
            return self.rng.integers(0, self.model.config.vocab_size, shape)
        return self.rng.standard_normal(shape, np.float32)

    def _shapes(self) -> Iterator[tuple[int, int, int, int]]:
        longest = max(2, min(_LONG, self.limits.max_tokens // 2))
        for prompt, length, count, batch in _SHAPES:
            yield min(prompt, longest), min(length, longest), count, batch
        yield longest, longest, 2, 1
        for _ in range(_RANDOM_SHAPES):
            prompt, length = self.rng.integers(1, min(24, longest) + 1, 2)
            count, batch = self.rng.integers(1, [9, 4])
            yield int(prompt), int(length), int(count), int(batch)

    def _rank(self, name: str, padding: str) -> Parity:
        worst, cases = 0.0, 0
        for shape in self._shapes():
            feeds, expected = self.case(*shape, padding)
            outputs = self.run_graph("rank", feeds)
            worst = max(worst, self.compare(f"{name} {shape}", outputs["scores"], expected))
            self._same_choice(f"{name} {shape}", feeds, outputs, expected)
            cases += 1
            if cases in (2, 5):
                self.record(f"rank/{padding}{cases}", feeds, outputs, scores=expected)
        return self.parity(name, cases, worst)

    def _score(self) -> Parity:
        """The same rows unpadded, padded on the right, and padded on the left, through `score`."""
        worst, cases = 0.0, 0
        for _, length, count, batch in self._shapes():
            axis = [] if self.ids else [self.network.config.embed_dim]
            row, extra = self._draw(count * batch, length, *axis), int(self.rng.integers(1, 6))
            backbone, expected = self.torch_scores(row)
            for left in (0, extra):
                right = extra if left == 0 and cases % 2 else 0
                widths = [(0, 0), (left, right), *[(0, 0) for _ in axis]]
                mask = np.pad(np.ones((count * batch, length), np.int64), widths[:2])
                feeds = {"input_ids" if self.ids else "inputs_embeds": np.pad(row, widths), "attention_mask": mask}
                feeds |= {"num_candidates": np.array(count), "aggregation": np.array(0)}
                feeds["step_mask"] = np.ones((1, 1, 1), np.int64)
                outputs = self.run_graph("score", feeds)
                real = slice(left, left + length)
                worst = max(worst, self.compare("score", outputs["scores"][:, real, 0], expected))
                worst = max(worst, self.compare("score, backbone", outputs["backbone"][:, real], backbone))
                cases += 1
                if cases == 4:
                    exact = {"scores": outputs["scores"].copy(), "backbone": outputs["backbone"].copy()}
                    exact["scores"][:, real, 0], exact["backbone"][:, real] = expected, backbone
                    self.record("score/4", feeds, outputs, **exact)
        return self.parity("score, padded and unpadded", cases, worst)

    def _selection(self) -> Parity:
        """Every aggregation, with and without steps, ragged and with empty candidates, against NumPy."""
        worst, cases = 0.0, 0
        for code, name in enumerate(AGGREGATIONS):
            for stepwise in (False, True):
                feeds, _ = self.case(4, 9, 6, 3, "right")
                feeds["candidate_mask"][self.rng.integers(6), 0] = 0
                feeds["aggregation"] = np.array(code)
                if stepwise:
                    feeds["step_mask"] = self.rng.integers(0, 2, feeds["candidate_mask"].shape)
                outputs = self.run_graph("rank", feeds)
                found, best = aggregate(outputs["scores"], feeds["candidate_mask"], feeds["step_mask"], name)
                worst = max(worst, self.compare(f"selection {name}", outputs["candidate_scores"], found))
                if not np.array_equal(outputs["best_index"], best):
                    raise ExportError(f"selection {name}: the graph chose {outputs['best_index']}, NumPy {best}")
                cases += 1
        return self.parity("selection, all aggregations", cases, worst)

    def _reference(self) -> Parity:
        """ONNX's own reference evaluator on a small case of `rank`."""
        feeds, expected = self.case(3, 2, 2, 1, "right")
        evaluator = ReferenceEvaluator(onnx.load(str(self.folder / self.graphs["rank"].file)), new_ops=[MatMulNBits])
        outputs = dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))
        self._same_choice("reference evaluator", feeds, outputs, expected)
        return self.parity(
            "ONNX reference evaluator", 1, self.compare("reference evaluator", outputs["scores"], expected)
        )

    def run_graph(self, name: str, feeds: dict[str, Array]) -> dict[str, Array]:
        """All outputs of a graph."""
        names = [value.name for value in self.graphs[name].outputs]
        return dict(zip(names, self.sessions[name].run(feeds, names), strict=True))

    def _same_choice(self, what: str, feeds: dict[str, Array], outputs: dict[str, Array], expected: Array) -> None:
        """The selected index is PyTorch's, unless the two best are closer than the tolerance."""
        final, _ = aggregate(expected, feeds["candidate_mask"], feeds["step_mask"], "last")
        chosen = select_best_of_n(torch.from_numpy(final)).numpy()
        best, taken = (np.take_along_axis(final, index[None], 0)[0] for index in (chosen, outputs["best_index"]))
        relative, absolute, _ = self.tolerance
        if (best - taken > relative * np.abs(best) + absolute).any():
            raise ExportError(f"{what}: the graph chose {outputs['best_index']}, PyTorch {chosen}; nothing was written")

    def compare(self, what: str, found: Array, expected: Array) -> float:
        """The greatest absolute difference; NaN equals NaN.

        Raises:
            ExportError: it is greater than allowed.
        """
        try:
            return greatest_difference(found, expected, self.tolerance.relative, self.tolerance.absolute)
        except ValueError as e:
            raise ExportError(f"{what}: {e}; nothing was written") from e

    def parity(self, check: str, cases: int, worst: float) -> Parity:
        """The result of one check."""
        relative, absolute, _ = self.tolerance
        return Parity(check=check, cases=cases, max_difference=worst, relative=relative, absolute=absolute)

    def record(self, name: str, feeds: dict[str, Array], outputs: dict[str, Array], **exact: Array) -> None:
        """Keep a case for `bonnx verify`, with the exact outputs in place of those found."""
        self.recorded |= {f"{name}/in/{key}": value for key, value in feeds.items()}
        self.recorded |= {f"{name}/out/{key}": value for key, value in (outputs | exact).items()}


def activated(scores: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """What PyTorch's scorer gives, (..., num_labels) -> the score (...), as the graphs give it."""
    if scoring.activation == "softmax":
        scores = scores.softmax(-1)
    scores = scores[..., scoring.label]
    return scores.sigmoid() if scoring.activation == "sigmoid" else scores


def _mask(sizes: Array, length: int, padding: str) -> Array:
    index = np.arange(length)
    real = index >= length - sizes[..., None] if padding == "left" else index < sizes[..., None]
    return real.astype(np.int64)

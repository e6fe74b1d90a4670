"""Verify an exported folder: ONNX's own checks, then ONNX Runtime and the reference evaluator against PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from bonnx.errors import ExportError
from bonnx.models.network import LanguageModel, TwoHeadedNetwork, select_best_of_n
from bonnx.runtime.artifact.manifest import Graph, Limits, Parity, Scoring
from bonnx.runtime.engine.compare import maximum_difference
from bonnx.runtime.engine.session import Session, SessionOptions
from bonnx.runtime.selection.aggregate import aggregate, elect

from ..graphs.selection import plain_selection
from .exact import Exact, Outputs, Tolerances
from .inputs import padding_mask, put_header
from .reference import MatMulNBits

__all__ = ["Case", "Checker", "check_structure"]

Array = NDArray[Any]

# Relative tolerance between an aggregation or vote in the graph and in NumPy, for the same scores.
_ARITHMETIC = 1e-5
# (prompt length, candidate length, candidates, batch): every axis is 1 at least once; some sizes are odd, some long.
_SHAPES = [(1, 1, 1, 1), (1, 7, 5, 1), (9, 1, 3, 2), (33, 5, 1, 3), (5, 3, 17, 2), (13, 11, 4, 1), (101, 29, 2, 1)]
_RANDOM_SHAPES, _LONG = 12, 257
# Models with more parameters get fewer shapes, and skip the reference evaluator, which copies every weight.
_LARGE = 100_000_000


def check_structure(path: Path) -> None:
    """Run `onnx.checker` and strict shape inference on a written file.

    Raises:
        ExportError: if either rejects it.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(str(path), load_external_data=False)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as e:
        raise ExportError(f"{path.name} is not valid ONNX: {e}") from e


class Case(NamedTuple):
    """One run of a graph.

    `judge` maps its outputs to the maximum difference, or raises `ExportError`. `kind` is the kind of output whose
    tolerance applies; None where NumPy computes the expected values from the graph's own scores.
    """

    check: str
    graph: str
    feeds: dict[str, Array]
    judge: Callable[[dict[str, Array]], float]
    kind: str | None = None


class Checker:
    """Compares a model with its graphs on fresh random inputs.

    The reference is the PyTorch model with the graphs' weights, run in float64 on whole, unpadded rows; it shares no
    code with the graphs. The tolerance is PyTorch's own rounding error times a factor: see `exact.py`. PyTorch runs
    first, so that its memory can be freed before ONNX Runtime needs any.
    """

    def __init__(
        self,
        model: LanguageModel | TwoHeadedNetwork,
        folder: Path,
        graphs: dict[str, Graph],
        scoring: Scoring,
        limits: Limits,
        seed: int = 0,
    ) -> None:
        self.model, self.folder, self.graphs, self.scoring, self.limits = model.eval(), folder, graphs, scoring, limits
        self.ids = isinstance(model, LanguageModel)
        self.network = model.network if isinstance(model, LanguageModel) else model
        self.is_large = sum(p.numel() for p in model.parameters()) > _LARGE
        self.rng = np.random.default_rng(seed)
        self.exact, self.tolerances = Exact(model, scoring), Tolerances()
        self.recorded: dict[str, Array] = {}
        self._sessions: dict[str, Session] = {}
        self._pending: list[tuple[Array, Callable[[Outputs], None]]] = []
        self._backbones: list[float] = []

    def cases(self) -> list[Case]:
        """Return every case, with PyTorch's outputs already computed."""
        cases = [*self._rank("rank, right padding", "right"), *self._rank("rank, left padding", "left")]
        cases += [*self._rank("rank, no padding", "none"), *self._score()]
        cases += [] if self.is_large else [self._reference()]
        self.compute()
        return cases

    def compute(self) -> None:
        """Run PyTorch on the rows of all pending cases, and fill in their expected outputs."""
        pending, self._pending = self._pending, []
        outputs = self.exact.rows([rows for rows, _ in pending], self.tolerances)
        for (_, put), (exact, _) in zip(pending, outputs, strict=True):
            put(exact)

    def run(self, cases: Sequence[Case]) -> list[Parity]:
        """Run the cases one graph at a time, and judge their outputs.

        Raises:
            ExportError: if a difference exceeds its tolerance, or a graph selected a different candidate.
        """
        differences: dict[str, list[float]] = {case.check: [] for case in cases}
        for graph in dict.fromkeys(case.graph for case in cases):
            for case in cases:
                if case.graph == graph:
                    differences[case.check].append(case.judge(self.run_graph(graph, case.feeds)))
            self.close(graph)
        kinds = {case.check: case.kind for case in cases}
        parity = [self.parity(check, values, kinds[check]) for check, values in differences.items()]
        return [*parity, self.parity("score, backbone", self._backbones, "backbone")] if self._backbones else parity

    def case(self, prompt: int, length: int, count: int, batch: int, padding: str) -> tuple[dict[str, Array], Array]:
        """Draw random feeds for `rank`, and an array (count, batch, length) float64 for the exact scores.

        `compute` fills in the scores; padding stays 0.
        """
        feeds = self.feeds(prompt, length, count, batch, padding)
        suffix = "ids" if self.ids else "embeds"
        prompts, candidates = feeds[f"prompt_{suffix}"], feeds[f"candidate_{suffix}"]
        prompt_mask, mask = feeds["prompt_mask"], feeds["candidate_mask"]
        expected = np.zeros(mask.shape)
        # Batch rows of equal length, so that none needs padding.
        lengths = prompt_mask.sum(1) + mask.sum(2)
        for length in np.unique(lengths):
            places = np.argwhere(lengths == length)
            rows = [
                np.concatenate([prompts[b][prompt_mask[b] > 0], candidates[n, b][mask[n, b] > 0]]) for n, b in places
            ]

            def put(exact: Outputs, places: Array = places) -> None:
                for (n, b), scores in zip(places, exact.scores.numpy(), strict=True):
                    expected[n, b][mask[n, b] > 0] = scores[prompt_mask[b].sum() :]

            self._pending.append((np.stack(rows), put))
        return feeds, expected

    def feeds(self, prompt: int, length: int, count: int, batch: int, padding: str) -> dict[str, Array]:
        """Draw random feeds for `rank`; with a gate, each prompt has a header that it reads."""
        header = np.array(self.scoring.gate_tokens, np.int64)
        prompt = max(prompt, len(header))
        rng, axis = self.rng, ([] if self.ids else [self.network.config.embed_dim])
        prompt_size = (
            np.full(batch, prompt) if padding == "none" else rng.integers(max(1, len(header)), prompt + 1, batch)
        )
        sizes = np.full((count, batch), length) if padding == "none" else rng.integers(1, length + 1, (count, batch))
        if self._stretches(prompt + length):
            sizes = np.broadcast_to(sizes[:1], sizes.shape)
        suffix = "ids" if self.ids else "embeds"
        feeds = {f"prompt_{suffix}": self._draw(batch, prompt, *axis)}
        feeds["prompt_mask"] = padding_mask(prompt_size, prompt, padding)
        for row, mask in zip(feeds[f"prompt_{suffix}"], feeds["prompt_mask"], strict=True):
            put_header(rng, self.scoring.gate_tokens, row, np.flatnonzero(mask))
        feeds |= {f"candidate_{suffix}": self._draw(count, batch, length, *axis)}
        return feeds | {"candidate_mask": padding_mask(sizes, length, padding)} | plain_selection()

    def _stretches(self, length: int) -> bool:
        """Whether rotary frequencies depend on a row's length; `rank` uses those of the longest candidate for all."""
        scaling = self.network.config.rope_scaling
        return scaling is not None and scaling.depends_on_length and length > scaling.original_max_positions

    def _draw(self, *shape: int) -> Array:
        if self.ids:
            assert isinstance(self.model, LanguageModel)
            return self.rng.integers(0, self.model.config.vocab_size, shape)
        return self.rng.standard_normal(shape, np.float32)

    def _shapes(self) -> Iterator[tuple[int, int, int, int]]:
        longest = max(2, min(_LONG, self.limits.max_tokens // 2))
        for prompt, length, count, batch in _SHAPES[:4] if self.is_large else _SHAPES:
            yield min(prompt, longest), min(length, longest), count, batch
        yield longest, longest, 2, 1
        for _ in range(3 if self.is_large else _RANDOM_SHAPES):
            prompt, length = self.rng.integers(1, min(24, longest) + 1, 2)
            count, batch = self.rng.integers(1, [9, 4])
            yield int(prompt), int(length), int(count), int(batch)

    def _rank(self, name: str, padding: str) -> Iterator[Case]:
        for number, shape in enumerate(self._shapes()):
            feeds, expected = self.case(*shape, padding)
            kept = f"rank/{padding}{number + 1}" if number in (1, 4) else None

            def judge(
                outputs: dict[str, Array],
                label: str = f"{name} {shape}",
                feeds: dict[str, Array] = feeds,
                expected: Array = expected,
                kept: str | None = kept,
            ) -> float:
                worst = self.near("scores", label, outputs["scores"], expected)
                self._same_choice(label, feeds, outputs, expected)
                if kept is not None:
                    self.record(kept, feeds, outputs, scores=expected)
                return worst

            yield Case(name, "rank", feeds, judge, "scores")

    def _score(self) -> Iterator[Case]:
        """Run the same rows through `score` unpadded, padded on the right, and padded on the left."""
        for number, (_, length, count, batch) in enumerate(self._shapes()):
            axis = [] if self.ids else [self.network.config.embed_dim]
            length = max(length, len(self.scoring.gate_tokens))
            row, extra = self._draw(count * batch, length, *axis), int(self.rng.integers(1, 6))
            for tokens in row:
                put_header(self.rng, self.scoring.gate_tokens, tokens, np.arange(length))
            size = count * batch, length
            exact = {"scores": np.zeros(size), "backbone": np.zeros((*size, self.network.config.hidden_size))}

            def put(outputs: Outputs, exact: dict[str, Array] = exact) -> None:
                exact["scores"][:], exact["backbone"][:] = outputs.scores.numpy(), outputs.backbone.numpy()

            self._pending.append((row, put))
            for left in (0, extra):
                right = extra if left == 0 and number % 2 else 0
                widths = [(0, 0), (left, right), *[(0, 0) for _ in axis]]
                mask = np.pad(np.ones((count * batch, length), np.int64), widths[:2])
                feeds = {"input_ids" if self.ids else "inputs_embeds": np.pad(row, widths), "attention_mask": mask}
                feeds |= {"num_candidates": np.array(count), **plain_selection()}
                kept = "score/4" if number == 1 and left else None
                judge = partial(self._judge_score, feeds, exact, slice(left, left + length), kept)
                yield Case("score, padded and unpadded", "score", feeds, judge, "scores")

    def _judge_score(
        self,
        feeds: dict[str, Array],
        exact: dict[str, Array],
        real: slice,
        kept: str | None,
        outputs: dict[str, Array],
    ) -> float:
        worst = self.near("scores", "score", outputs["scores"][:, real, 0], exact["scores"])
        backbone = outputs["backbone"][:, real]
        self._backbones.append(self.near("backbone", "score, backbone", backbone, exact["backbone"]))
        if kept is not None:
            expected = {"scores": outputs["scores"].copy(), "backbone": outputs["backbone"].copy()}
            expected["scores"][:, real, 0], expected["backbone"][:, real] = exact["scores"], exact["backbone"]
            self.record(kept, feeds, outputs, **expected)
        return worst

    def _reference(self) -> Case:
        """Run ONNX's reference evaluator on a small case of `rank` in which two of three candidates share an answer."""
        feeds, expected = self.case(3, 2, 3, 1, "right")
        feeds |= {"answer_ids": np.array([[5], [0], [5]]), "vote": np.array(1)}

        def judge(_: dict[str, Array]) -> float:
            model = onnx.load(str(self.folder / self.graphs["rank"].file))
            evaluator = ReferenceEvaluator(model, new_ops=[MatMulNBits])
            outputs = dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))
            best, groups = elect(outputs["candidate_scores"], feeds["answer_ids"], "weighted", self.scoring.vote_weight)
            if outputs["best_index"] != best:
                raise ExportError(f"reference evaluator: the graph selected {outputs['best_index']}; expected {best}")
            self.compare("reference evaluator, vote", outputs["group_scores"], groups)
            return self.near("scores", "reference evaluator", outputs["scores"], expected)

        return Case("ONNX reference evaluator", "rank", feeds, judge, "scores")

    def session(self, name: str) -> Session:
        """Return a graph's session, opened at first use."""
        if name not in self._sessions:
            graph = self.graphs[name]
            self._sessions[name] = Session(self.folder / graph.file, graph, SessionOptions(provider="cpu"))
        return self._sessions[name]

    def close(self, name: str) -> None:
        """Close a graph's session to free its memory."""
        self._sessions.pop(name, None)

    def run_graph(self, name: str, feeds: dict[str, Array]) -> dict[str, Array]:
        """Run a graph and return all of its outputs."""
        names = [value.name for value in self.graphs[name].outputs]
        return dict(zip(names, self.session(name).run(feeds, names), strict=True))

    def _same_choice(self, label: str, feeds: dict[str, Array], outputs: dict[str, Array], expected: Array) -> None:
        """Require the index that PyTorch selects, unless the two best scores are closer than the tolerance."""
        final, _ = aggregate(expected, feeds["candidate_mask"], feeds["step_mask"], "last")
        chosen = select_best_of_n(torch.from_numpy(final)).numpy()
        best, taken = (np.take_along_axis(final, index[None], 0)[0] for index in (chosen, outputs["best_index"]))
        if (best - taken > 2 * self.tolerances.allowed("scores")).any():
            raise ExportError(
                f"{label}: the graph selected {outputs['best_index']}; expected {chosen} from PyTorch's scores; "
                "nothing was written"
            )

    def near(self, kind: str, label: str, values: Array, exact: Array) -> float:
        """Return the maximum absolute difference from the exact values; NaN equals NaN.

        Args:
            kind: the kind of output, whose tolerance applies: `backbone`, `scores` or `log_probs`.
            label: names the values in error messages.
            values: a graph's output.
            exact: float64, same shape.

        Raises:
            ExportError: if the difference exceeds the tolerance.
        """
        return self._difference(label, values, exact, self.tolerances.allowed(kind))

    def compare(self, label: str, values: Array, expected: Array, size: float = 1.0) -> float:
        """Return the maximum absolute difference from NumPy's result for the same numbers; NaN equals NaN.

        Args:
            label: names the values in error messages.
            values: a graph's output.
            expected: NumPy's result.
            size: magnitude of the largest number that both are computed from, if it exceeds the results' own.

        Raises:
            ExportError: if the difference exceeds the tolerance.
        """
        largest = np.abs(expected[np.isfinite(expected)]).max(initial=size)
        return self._difference(label, values, expected, _ARITHMETIC * float(largest))

    def _difference(self, label: str, values: Array, expected: Array, allowed: float) -> float:
        try:
            return maximum_difference(values, expected, allowed)
        except ValueError as e:
            raise ExportError(f"{label}: {e}; nothing was written") from e

    def parity(self, check: str, differences: Sequence[float], kind: str | None) -> Parity:
        """Summarize the differences of one check."""
        error, allowed = (0.0, None) if kind is None else (self.tolerances.errors[kind], self.tolerances.allowed(kind))
        worst = max(differences)
        return Parity(check=check, cases=len(differences), max_difference=worst, pytorch_error=error, allowed=allowed)

    def record(self, name: str, feeds: dict[str, Array], outputs: dict[str, Array], **exact: Array) -> None:
        """Keep a case for `bonnx verify`: exact outputs in place of the graph's, and the tolerance of each."""
        outputs = {key: value for key, value in outputs.items() if key != "objectives"}
        recorded = {key: value.astype(outputs[key].dtype) for key, value in (outputs | exact).items()}
        self.recorded |= {f"{name}/in/{key}": value for key, value in feeds.items()}
        self.recorded |= {f"{name}/out/{key}": value for key, value in recorded.items()}
        for key, value in recorded.items():
            if value.dtype == np.float32:
                kind = key if key in self.tolerances.errors else "scores"
                self.recorded[f"{name}/allowed/{key}"] = np.array(self.tolerances.allowed(kind))

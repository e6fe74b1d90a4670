"""Verify an exported folder: ONNX's own checks, then ONNX Runtime and the reference evaluator against PyTorch."""

from __future__ import annotations

from collections import defaultdict
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
from ..precision.linear import Linear8
from .draws import log_softmax
from .exact import Exact, Outputs, Tolerances
from .inputs import Drawn, Inputs, Padding
from .reference import MatMulNBits
from .spill import trim

__all__ = ["Case", "Checker", "check_structure"]

Array = NDArray[Any]

# Relative tolerance between an aggregation or vote in the graph and in NumPy, for the same scores.
_ARITHMETIC = 1e-5
# Models with more parameters get fewer shapes, and skip the reference evaluator, which copies every weight.
_LARGE = 100_000_000
# Tokens of a row whose log-probabilities measure the error of 8 bits; an error in a row lasts to its end.
_MEASURED = 4
# Products of smaller models gain nothing from a second thread, whose waiting takes processor time.
_SMALL = 10_000_000


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
        *,
        quick: bool = False,
    ) -> None:
        self.model, self.folder, self.graphs, self.scoring, self.limits = model.eval(), folder, graphs, scoring, limits
        self.network = model.network if isinstance(model, LanguageModel) else model
        size = sum(p.numel() for p in model.parameters())
        self.is_large, self.threads = size > _LARGE, 1 if size < _SMALL else None
        self.rng, self.quick = np.random.default_rng(seed), quick
        self._rounds = any(isinstance(module, Linear8) for module in model.modules())
        self.inputs = Inputs(model, scoring, limits, self.rng)
        self.exact, self.tolerances = Exact(model, scoring), Tolerances()
        self.recorded: dict[str, Array] = {}
        self._sessions: dict[str, Session] = {}
        self._pending: list[tuple[Array, Callable[[Outputs], None]]] = []
        self._backbones: list[float] = []

    def cases(self) -> list[Case]:
        """Return every case, with PyTorch's outputs already computed."""
        # With 8-bit inputs a few rows have far larger errors than all others: a measure of few rows is too small.
        shapes = [*self.inputs.shapes(large=self.is_large, quick=self.quick and not self._rounds)]
        # The same rows padded on either side, and whole ones, which `score` reads too.
        ragged = [self.draw(*shape, ragged=True) for shape in shapes]
        whole = [self.draw(*shape, ragged=False) for shape in shapes]
        cases = [*self._rank("rank, right padding", ragged, "right"), *self._rank("rank, left padding", ragged, "left")]
        cases += [*self._rank("rank, no padding", whole, "none"), *self._score(whole)]
        cases += [] if self.is_large else [self._reference()]
        self.compute()
        return cases

    def compute(self) -> None:
        """Run PyTorch on the rows of all pending cases, and fill in their expected outputs."""
        pending, self._pending = self._pending, []
        outputs = self.exact.rows([rows for rows, _ in pending], self.tolerances)
        for (_, put), (exact, _) in zip(pending, outputs, strict=True):
            put(exact)
        if self._rounds and isinstance(self.model, LanguageModel) and self.model.config.vocabulary_head:
            self._measure_log_probs([rows for rows, _ in pending], outputs)

    def _measure_log_probs(self, batches: Sequence[Array], outputs: Sequence[tuple[Outputs, Outputs]]) -> None:
        """Take the last tokens of all rows into account, too: those that `generate` draws may be too few."""
        tokens = [row[-_MEASURED:] for rows in batches for row in rows]
        ends = slice(-_MEASURED - 1, -1)
        backbones = [(a, b) for wide, near in outputs for a, b in zip(wide.backbone, near.backbone, strict=True)]
        logits = self.exact.logits([(wide[ends], near[ends]) for wide, near in backbones])
        for row, (wide, near) in zip(tokens, logits, strict=True):
            # A row of one token has nothing before it.
            own = row[len(row) - len(wide) :]
            exact, rounded = (log_softmax(x)[np.arange(len(own)), own] for x in (wide, near))
            self.tolerances.update("logits", wide, near)
            self.tolerances.update("log_probs", exact, rounded)

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

    def draw(self, prompt: int, length: int, count: int, batch: int, *, ragged: bool) -> Drawn:
        """Draw prompts and candidates; `compute` fills in what PyTorch makes of them."""
        drawn = self.inputs.draw(prompt, length, count, batch, ragged=ragged)
        # Batches of rows of equal length, so that none needs padding.
        by_length = defaultdict[int, list[tuple[int, int]]](list)
        for n, b in drawn.places:
            by_length[len(drawn.row(n, b))].append((n, b))
        for places in by_length.values():

            def put(exact: Outputs, places: list[tuple[int, int]] = places) -> None:
                drawn.scores |= zip(places, exact.scores.numpy(), strict=True)
                if not ragged:
                    drawn.backbones |= zip(places, exact.backbone.numpy(), strict=True)

            self._pending.append((np.stack([drawn.row(n, b) for n, b in places]), put))
        return drawn

    def _rank(self, name: str, drawn: Sequence[Drawn], padding: Padding) -> Iterator[Case]:
        for number, rows in enumerate(drawn):
            feeds = self.inputs.feeds(rows, padding)
            kept = f"rank/{padding}{number + 1}" if number in (1, 4) else None
            yield Case(name, "rank", feeds, partial(self._judge_rank, name, rows, feeds, kept), "scores")

    def _judge_rank(
        self, name: str, rows: Drawn, feeds: dict[str, Array], kept: str | None, outputs: dict[str, Array]
    ) -> float:
        expected = rows.expected(feeds["candidate_mask"])
        label = f"{name} {(*rows.widths, *expected.shape[:2])}"
        worst = self.near("scores", label, outputs["scores"], expected)
        self._same_choice(label, feeds, outputs, expected)
        if kept is not None:
            self.record(kept, feeds, outputs, scores=expected)
        return worst

    def _score(self, drawn: Sequence[Drawn]) -> Iterator[Case]:
        """Run the beginnings of rows through `score` unpadded, padded on the right, and padded on the left."""
        for number, rows in enumerate(drawn):
            whole = np.stack([rows.row(n, b) for n, b in rows.places])
            length = rows.widths[1]
            if self.scoring.gate_tokens or self.inputs.stretches(whole.shape[1]):
                # What follows decides where a gate reads, and frequencies that depend on the length.
                length = whole.shape[1]
            row, extra = whole[:, :length], int(self.rng.integers(1, 6))
            for left in (0, extra):
                right = extra if left == 0 and number % 2 else 0
                widths = [(0, 0), (left, right), *[(0, 0)] * (whole.ndim - 2)]
                mask = np.pad(np.ones(row.shape[:2], np.int64), widths[:2])
                feeds = {"input_ids" if self.inputs.ids else "inputs_embeds": np.pad(row, widths)}
                feeds |= {"attention_mask": mask, "num_candidates": np.array(len(rows.candidates)), **plain_selection()}
                kept = "score/4" if number == 1 and left else None
                judge = partial(self._judge_score, feeds, rows, slice(left, left + length), kept)
                yield Case("score, padded and unpadded", "score", feeds, judge, "scores")

    def _judge_score(
        self,
        feeds: dict[str, Array],
        rows: Drawn,
        real: slice,
        kept: str | None,
        outputs: dict[str, Array],
    ) -> float:
        length = real.stop - real.start
        exact = {
            name: np.stack([values[place][:length] for place in rows.places])
            for name, values in (("scores", rows.scores), ("backbone", rows.backbones))
        }
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
        rows = self.draw(3, 2, 3, 1, ragged=True)
        feeds = self.inputs.feeds(rows, "right")
        feeds |= {"answer_ids": np.array([[5], [0], [5]]), "vote": np.array(1)}

        def judge(_: dict[str, Array]) -> float:
            model = onnx.load(str(self.folder / self.graphs["rank"].file))
            evaluator = ReferenceEvaluator(model, new_ops=[MatMulNBits])
            outputs = dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))
            best, groups = elect(outputs["candidate_scores"], feeds["answer_ids"], "weighted", self.scoring.vote_weight)
            if outputs["best_index"] != best:
                raise ExportError(f"reference evaluator: the graph selected {outputs['best_index']}; expected {best}")
            self.compare("reference evaluator, vote", outputs["group_scores"], groups)
            expected = rows.expected(feeds["candidate_mask"])
            return self.near("scores", "reference evaluator", outputs["scores"], expected)

        return Case("ONNX reference evaluator", "rank", feeds, judge, "scores")

    def session(self, name: str) -> Session:
        """Return a graph's session, opened at first use."""
        if name not in self._sessions:
            graph = self.graphs[name]
            options = SessionOptions(provider="cpu", threads=self.threads)
            self._sessions[name] = Session(self.folder / graph.file, graph, options)
        return self._sessions[name]

    def close(self, name: str) -> None:
        """Close a graph's session to free its memory."""
        self._sessions.pop(name, None)
        trim()

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

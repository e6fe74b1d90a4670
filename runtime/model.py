"""An artifact that answers: `bonnx.load`, then `rank`, `score` and `generate`."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .errors import ArtifactError, InputError, NoWinnerError
from .folder import locate, read_verified
from .generation import FINISH_REASONS, Candidate, GenerateOptions, Generation, Request, make_request
from .inputs import Item, Reader, aggregation_code, check_some, is_stepwise, pad, step_mask
from .limits import check_size
from .manifest import Manifest
from .session import Array, Options, Provider, Session
from .steps import generate_feeds, grow
from .text import Text

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Model", "Ranking", "Scored", "load"]


@dataclass(frozen=True)
class Ranking:
    """What `rank` found.

    Attributes:
        best_index: index of the winner; ties go to the lowest.
        best: the winner, as it was passed.
        candidate_scores: (num_candidates,) float32; NaN for a candidate that cannot win.
        scores: for each candidate (its length,) float32, one score for each of its tokens.
        aggregation: how a candidate's scores became one.
    """

    best_index: int
    best: Item
    candidate_scores: NDArray[np.float32]
    scores: list[NDArray[np.float32]]
    aggregation: str


@dataclass(frozen=True)
class Scored:
    """What `score` found.

    Attributes:
        best_index: index of the best row.
        row_scores: (rows,) float32.
        scores: for each row (its length,) float32.
        backbone: for each row (its length, hidden_size) float32, or None if it was not asked for.
        aggregation: how a row's scores became one.
    """

    best_index: int
    row_scores: NDArray[np.float32]
    scores: list[NDArray[np.float32]]
    backbone: list[NDArray[np.float32]] | None
    aggregation: str


def load(
    path: str | os.PathLike[str],
    *,
    provider: Provider = "auto",
    threads: int | None = None,
    device_id: int = 0,
    memory_limit: int | None = None,
) -> Model:
    """Open an artifact.

    Args:
        path: the folder that `bonnx export` wrote. Every file's hash is checked first.
        provider: `cpu`, `cuda`, or `auto` (CUDA where it works, else the CPU; `model.provider` says which).
        threads: CPU threads of one call; ONNX Runtime's default (one for each physical core) if not given.
        device_id: which CUDA device.
        memory_limit: bytes that one call may take: a call that would need more is refused before it starts, and on
            CUDA the arena is limited to it.

    Raises:
        ArtifactError: not an artifact, or not as it was written.
        ProviderError: ONNX Runtime is missing, or the provider that was asked for is not to be had.
        InputError: an option has no meaning.
    """
    options = Options(provider=provider, threads=threads, device_id=device_id, memory_limit=memory_limit)
    folder = Path(path)
    return Model(folder, read_verified(folder), options)


class Model:
    """An open artifact. Safe to share between threads; graphs are loaded when first used."""

    def __init__(self, folder: Path, manifest: Manifest, options: Options) -> None:
        self.folder, self.manifest, self.options = folder, manifest, options
        text = None
        if manifest.tokenizer is not None:
            text = Text(locate(folder, manifest.tokenizer), manifest.scoring)
        self.reader = Reader(manifest, text)
        self._suffix = "ids" if manifest.kind == "language_model" else "embeds"
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()
        # Loaded now, so that a provider that is not to be had is said at once.
        self.provider = self.session("rank").provider

    def __repr__(self) -> str:
        return f"<bonnx.Model {self.manifest.name!r} from {str(self.folder)!r} on {self.provider}>"

    def session(self, name: str) -> Session:
        """The session of one graph, made at its first use.

        Raises:
            ArtifactError: the artifact has no such graph.
        """
        with self._lock:
            if name not in self._sessions:
                graph = self.manifest.graphs.get(name)
                if graph is None:
                    raise ArtifactError(
                        f"{self.folder} has no graph '{name}', only {', '.join(sorted(self.manifest.graphs))}; "
                        "export the model again with a bonnx that writes it"
                    )
                self._sessions[name] = Session(locate(self.folder, graph.file), graph, self.options)
            return self._sessions[name]

    def rank(
        self,
        prompt: Item,
        candidates: Sequence[Item],
        *,
        aggregation: str | None = None,
        step_masks: Sequence[Sequence[int]] | None = None,
        partial: bool = False,
    ) -> Ranking:
        """Score candidates after a prompt and choose the best; the prompt is computed once.

        Args:
            prompt: text, token ids, or embeddings (length, embed_dim) float32.
            candidates: one or more, of the same kinds; their lengths may differ.
            aggregation: `last`, `mean`, `min`, `max`, `prod`, or `step_` and one of these to read only the positions
                where a step ends; the artifact's own rule if not given.
            step_masks: for each candidate 0 or 1 for each token, 1 where a step ends; needed for embeddings.
            partial: text candidates are not finished yet: no end token is appended.

        Raises:
            InputError: nothing to rank, or something that cannot be.
            NoWinnerError: every score is NaN.
        """
        name = aggregation or self.manifest.scoring.aggregation
        selection = {"aggregation": np.array(aggregation_code(name), np.int64)}
        check_some(candidates, "candidates")
        first = self.reader.read(prompt, "prompt", candidate=False, partial=True)
        items, values, mask = self._padded(candidates, "candidates", partial, len(first))
        feeds = selection | {
            f"prompt_{self._suffix}": first[None],
            "prompt_mask": np.ones((1, len(first)), np.int64),
            f"candidate_{self._suffix}": values[:, None],
            "candidate_mask": mask[:, None],
            "step_mask": self._steps(name, values, step_masks)[:, None],
        }
        scores, found, best = self.session("rank").run(feeds, ["scores", "candidate_scores", "best_index"])
        index = winner(int(best[0]), "candidates")
        per_token = [scores[i, 0, : len(item)] for i, item in enumerate(items)]
        return Ranking(index, candidates[index], found[:, 0], per_token, name)

    def score(
        self,
        rows: Sequence[Item],
        *,
        aggregation: str | None = None,
        step_masks: Sequence[Sequence[int]] | None = None,
        partial: bool = False,
        backbone: bool = False,
    ) -> Scored:
        """Score whole rows, each by itself, at every position, and choose the best.

        Args:
            rows: one or more texts, lists of token ids, or embeddings (length, embed_dim) float32.
            aggregation: as in `rank`.
            step_masks: as in `rank`.
            partial: as in `rank`.
            backbone: also return the backbone's outputs.

        Raises:
            InputError: nothing to score, or something that cannot be.
            NoWinnerError: every score is NaN.
        """
        name = aggregation or self.manifest.scoring.aggregation
        selection = {"aggregation": np.array(aggregation_code(name), np.int64)}
        check_some(rows, "rows")
        items, values, mask = self._padded(rows, "rows", partial, 0)
        feeds = selection | {
            "input_ids" if self._suffix == "ids" else "inputs_embeds": values,
            "attention_mask": mask,
            "num_candidates": np.array(len(items), np.int64),
            "step_mask": self._steps(name, values, step_masks)[:, None],
        }
        wanted = ["scores", "candidate_scores", "best_index", *(["backbone"] if backbone else [])]
        scores, found, best, *rest = self.session("score").run(feeds, wanted)
        index = winner(int(best[0]), "rows")
        return Scored(
            index,
            found[:, 0],
            [scores[i, : len(item), 0] for i, item in enumerate(items)],
            [rest[0][i, : len(item)] for i, item in enumerate(items)] if backbone else None,
            name,
        )

    def generate(
        self,
        prompt: Item,
        *,
        deadline: float | None = None,
        on_progress: Callable[[Generation], object] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Sample N completions, score every token, choose the best: one run of one graph.

        With a deadline or a callback the host steers the same steps, and the tokens are the same.

        Args:
            prompt: text or token ids.
            deadline: seconds; what still grows then is cut, with `deadline` as its finish reason.
            on_progress: called with the candidates after every token.
            **options: see `GenerateOptions`.

        Raises:
            InputError: an option or the prompt has no meaning.
            ArtifactError: the artifact has no language model.
            NoWinnerError: every candidate's score is NaN.
        """
        request, ids = self._request(prompt, options)
        until = _clock(deadline)
        if until is None and on_progress is None:
            result = self._generate(ids, request)
        else:
            for result in self._stream(ids, request, until):
                if on_progress is not None:
                    on_progress(result)
        winner(result.best_index, "candidates")
        return result

    def stream(
        self, prompt: Item, *, deadline: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Iterator[Generation]:
        """As `generate`, but gives the candidates after every token; the last ones are the result.

        To cancel, stop reading: nothing runs between two of them. The options are checked at the call.
        """
        request, ids = self._request(prompt, options)
        return self._stream(ids, request, _clock(deadline))

    def _request(self, prompt: Item, options: GenerateOptions) -> tuple[Request, Array]:
        """Everything checked, and the prompt's tokens."""
        scoring, limits = self.manifest.scoring, self.manifest.limits
        self.session("generate")
        ids = self.reader.read(prompt, "prompt", candidate=False, partial=True)
        stops = self.reader.stops(options.get("stop"), scoring.end_token)
        request = make_request(options, stops, scoring.aggregation, max(1, limits.max_tokens - len(ids)))
        if is_stepwise(request.aggregation) and scoring.step_token is None:
            raise InputError("a step aggregation needs a step token, and the artifact's scoring rule has none")
        check_size(self.manifest, request.n, len(ids), request.max_new_tokens, self.options.memory_limit)
        return request, ids

    def _generate(self, ids: Array, request: Request) -> Generation:
        names = ["sequences", "lengths", "scores", "log_probs", "finish_reasons", "candidate_scores", "best_index"]
        feeds = generate_feeds(ids[None], np.ones((1, len(ids)), np.int64), request, self.manifest.scoring.step_token)
        outputs = self.session("generate").run(feeds, [*names, "computed_tokens"])
        tokens, lengths, scores, log_probs, reasons, found = (array[:, 0] for array in outputs[:6])
        rows = zip(tokens, scores, log_probs, lengths, found, reasons, strict=True)
        candidates = [self._candidate(*row) for row in rows]
        return Generation(int(outputs[6][0]), candidates, len(ids), int(outputs[7]), request.aggregation)

    def _stream(self, ids: Array, request: Request, until: float | None) -> Iterator[Generation]:
        for growing in grow(self.session, ids, request, self.manifest.scoring.step_token, until):
            found, best = growing.select()
            parts = (growing.tokens, growing.scores, growing.log_probs, growing.lengths, found, growing.reasons)
            candidates = [self._candidate(*row) for row in zip(*parts, strict=True)]
            yield Generation(best, candidates, len(ids), growing.computed, request.aggregation)

    def _candidate(
        self, tokens: Array, scores: Array, log_probs: Array, length: int, score: float, reason: int
    ) -> Candidate:
        tokens, scores, log_probs = tokens[:length], scores[:length], log_probs[:length]
        text = None if self.reader.text is None else self.reader.text.decode(tokens.tolist())
        return Candidate(text, tokens, scores, log_probs, float(score), FINISH_REASONS[reason] if reason >= 0 else None)

    def _padded(self, rows: Sequence[Item], what: str, partial: bool, prompt: int) -> tuple[list[Array], Array, Array]:
        """What is to be scored after a prompt of that many tokens: read, within limits, and padded with its mask."""
        items = [self.reader.read(row, f"{what}[{i}]", candidate=True, partial=partial) for i, row in enumerate(rows)]
        check_size(self.manifest, len(items), prompt, max(map(len, items)), self.options.memory_limit)
        return items, *pad(items, self.manifest.scoring.pad_token)

    def _steps(self, name: str, values: Array, given: Sequence[Sequence[int]] | None) -> Array:
        if not is_stepwise(name):
            return np.ones((1, 1), np.int64)
        return step_mask(values, given, self.manifest.scoring.step_token)


def _clock(deadline: float | None) -> float | None:
    """Seconds from now, on the clock of `time.monotonic`."""
    if deadline is not None and not deadline > 0:
        raise InputError(f"deadline: expected seconds above 0; got {deadline!r}")
    return None if deadline is None else time.monotonic() + deadline


def winner(index: int, what: str) -> int:
    if index < 0:
        raise NoWinnerError(f"none of the {what} can win: every score is NaN; look for NaN or infinity in the inputs")
    return index

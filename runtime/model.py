"""An artifact that answers: `bonnx.load`, then `rank`, `score` and `generate`."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ArtifactError, InputError, NoWinnerError
from .arrays import Array
from .artifact.folder import locate, read_verified
from .artifact.limits import check_size, estimate_memory
from .artifact.manifest import Manifest
from .checks import check_flag, check_function, check_number, check_path, check_some, check_whole, is_list, shown
from .engine.session import Options, Provider, Session, Stop
from .generate.decoding import clock, grow
from .generate.options import GenerateOptions, Request, make_request
from .generate.result import Generation
from .generate.run import Draft, make_candidate, run_drafts
from .rank.result import Ranking, Scored, winner
from .rank.run import Job, Shape, padded_tokens, plan, run_jobs
from .selection.aggregate import aggregation_code, is_stepwise
from .selection.vote import Answers, make_ballot
from .text.chat import ChatTemplate
from .text.compose import Writer
from .text.padding import pad, step_mask
from .text.reader import Item, Reader, Rows
from .text.tokenizer import Text

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .search.policy import Policy
    from .search.result import SearchResult
    from .search.tree import Scorer

__all__ = ["Model", "checked_request", "load"]


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
    folder = check_path("path", path)
    return Model(folder, read_verified(folder), options)


class Model:
    """An open artifact. Safe to share between threads; graphs are loaded when first used."""

    def __init__(self, folder: Path, manifest: Manifest, options: Options) -> None:
        self.folder, self.manifest, self.options = folder, manifest, options
        rules, text, chat = manifest.text, None, None
        if manifest.tokenizer is not None:
            text = Text(locate(folder, manifest.tokenizer), manifest.scoring, rules)
        if rules.chat_template is not None:
            source = locate(folder, rules.chat_template).read_bytes().decode()
            chat = ChatTemplate(source, rules.template_tokens)
        self.reader = Reader(manifest, text, Writer(rules, chat))
        # Dynamic rope scaling goes by the longest row of a run that is longer than this: such rows run by themselves.
        scaling = manifest.network.get("rope_scaling") or {}
        self._alike = (
            scaling["original_max_positions"] if scaling.get("kind") == "dynamic" else manifest.limits.max_tokens
        )
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
            if not isinstance(name, str) or name not in self._sessions:
                graph = self.manifest.graphs.get(name) if isinstance(name, str) else None
                if graph is None:
                    raise ArtifactError(
                        f"{self.folder} has no graph '{name}', only {', '.join(sorted(self.manifest.graphs))}; "
                        "export the model again with a bonnx that writes it"
                    )
                self._sessions[name] = Session(locate(self.folder, graph.file), graph, self.options)
            return self._sessions[name]

    def close(self) -> None:
        """Give back the memory of the graphs that are loaded; one that is used again is loaded again."""
        with self._lock:
            self._sessions.clear()

    def rank(
        self,
        prompt: Item,
        candidates: Sequence[Item],
        *,
        aggregation: str | None = None,
        step_masks: Sequence[Sequence[int]] | None = None,
        partial: bool = False,
        truncate: bool = False,
        vote: str = "score",
        answers: Answers | None = None,
    ) -> Ranking:
        """Score candidates after a prompt and choose the best; the prompt is computed once.

        A candidate in which there is nothing to read (an empty text or list, no step, an empty step, no row of
        embeddings), or whose text the tokenizer cannot encode, does not end the call: its score is NaN, it cannot win,
        and `Ranking.unreadable` says why. Whatever else is wrong with a candidate does: another type, dtype or width, a
        token id outside the vocabulary, more tokens than the artifact takes.

        Args:
            prompt: text, messages (`{"role": ..., "content": ...}` each), token ids, or embeddings (length, embed_dim)
                float32.
            candidates: one or more; text is what follows the prompt, or what the assistant answers the messages; a list
                of texts is a candidate in steps.
            aggregation: `last`, `mean`, `min`, `max`, `prod`, or `step_` and one of these to read only the positions
                where a step ends; the artifact's own rule if not given.
            step_masks: for each candidate 0 or 1 for each token, 1 where a step ends; needed for embeddings, and only
                for the `step_` aggregations.
            partial: text candidates are not finished yet: no end token is appended, and no template closes the answer.
            truncate: leave out the beginning of a prompt that is too long, instead of an error; `Ranking.cut` says how
                much. A candidate is never cut.
            vote: `score` (the best candidate), or the best candidate of one answer: `weighted` (the answer whose
                candidates' weights sum to most: their probabilities, or the softmax of raw scores) or `majority` (the
                answer of most candidates). If no candidate has an answer, the best candidate wins.
            answers: what each candidate votes for, anything hashable or None; or how to find it in a text: `boxed`,
                `number` or `regex:PATTERN` (see `bonnx.runtime.selection.answers`), or a function of a candidate.
                Needed to vote.

        Raises:
            InputError: nothing to rank, or something that cannot be; or none of the candidates can be read.
            NoWinnerError: every score is NaN.
        """
        job = self.job(
            prompt,
            candidates,
            aggregation=aggregation,
            step_masks=step_masks,
            partial=partial,
            truncate=truncate,
            vote=vote,
            answers=answers,
        )
        (found,) = self.run_together([job])
        if isinstance(found, NoWinnerError):
            raise found
        return found

    def job(
        self,
        prompt: Item,
        candidates: Sequence[Item],
        *,
        aggregation: str | None = None,
        step_masks: Sequence[Sequence[int]] | None = None,
        partial: bool = False,
        truncate: bool = False,
        vote: str = "score",
        answers: Answers | None = None,
    ) -> Job:
        """Read and check what `rank` is to run, for `run_together` or `rank_all`; the arguments are those of `rank`.

        Raises:
            InputError: nothing to rank, or something that cannot be.
        """
        name = self.manifest.scoring.aggregation if aggregation is None else aggregation
        aggregation_code(name)
        check_flag("partial", partial)
        check_flag("truncate", truncate)
        check_some(candidates, "candidates")
        rows = self.reader.pairs(prompt, candidates, partial=partial, truncate=truncate)
        ballot = make_ballot(vote, answers, candidates, "candidates", rows.unreadable, self.manifest.scoring)
        values, mask = self._padded(rows)
        steps = self._steps(name, rows, values, step_masks)
        assert rows.prompt is not None
        joins = len(rows.prompt) + values.shape[1] <= self._alike
        return Job(candidates, name, ballot, rows, values, mask, steps, joins)

    def run_together(self, jobs: Sequence[Job], stop: Stop | None = None) -> list[Ranking | NoWinnerError]:
        """Rank jobs of equal keys in one run; for each its ranking, or the error that it has no winner."""
        run = lambda graph, feeds, wanted: self.session(graph).run(feeds, wanted, stop)  # noqa: E731
        return run_jobs(run, jobs, self._suffix, self.manifest.scoring.pad_token)

    def fits(self, tokens: int) -> Callable[[int, Shape], bool]:
        """For `plan`: whether a run stays within so many tokens, the artifact's limits and the memory limit."""
        limits, memory = self.manifest.limits, self.options.memory_limit

        def fits(columns: int, shape: Shape) -> bool:
            if padded_tokens(columns, shape) > tokens or shape.candidates > limits.max_candidates:
                return False
            needed = columns * estimate_memory(self.manifest, shape.candidates, shape.prompt, shape.length)
            return memory is None or needed <= memory

        return fits

    def rank_all(self, jobs: Sequence[Job], *, tokens: int = 2048, waste: float = 0.2) -> list[Ranking | NoWinnerError]:
        """Rank many jobs, those of like shape in one run; scores differ from `rank`'s by rounding only.

        Args:
            jobs: what `job` made.
            tokens: greatest size of a joint run, padding included.
            waste: greatest share of a joint run's tokens that may be padding, in [0, 1).

        Returns:
            for each job its ranking, or the error that it has no winner.

        Raises:
            InputError: not jobs, or bounds that are none.
        """
        if not is_list(jobs) or not all(isinstance(job, Job) for job in jobs):
            raise InputError(f"jobs: expected a list of what `job` made; got {shown(jobs)}")
        check_whole("tokens", tokens, 1)
        check_number("waste", waste, "a number of at least 0 and below 1", lambda share: 0 <= share < 1)
        found: dict[int, Ranking | NoWinnerError] = {}
        for places in plan(jobs, self.fits(tokens), waste) if jobs else []:
            found |= zip(places, self.run_together([jobs[i] for i in places]), strict=True)
        return [found[i] for i in range(len(jobs))]

    def score(
        self,
        rows: Sequence[Item],
        *,
        aggregation: str | None = None,
        step_masks: Sequence[Sequence[int]] | None = None,
        partial: bool = False,
        backbone: bool = False,
        vote: str = "score",
        answers: Answers | None = None,
    ) -> Scored:
        """Score whole rows, each by itself, at every position, and choose the best.

        A row that cannot be read does not end the call, as in `rank`.

        Args:
            rows: one or more texts, conversations (lists of messages), lists of token ids, or embeddings (length,
                embed_dim) float32.
            aggregation: as in `rank`.
            step_masks: as in `rank`.
            partial: as in `rank`.
            backbone: also return the backbone's outputs.
            vote: as in `rank`.
            answers: as in `rank`, for each row.

        Raises:
            InputError: nothing to score, or something that cannot be.
            NoWinnerError: every score is NaN.
        """
        name = self.manifest.scoring.aggregation if aggregation is None else aggregation
        check_flag("partial", partial)
        check_flag("backbone", backbone)
        selection = {"aggregation": np.array(aggregation_code(name), np.int64)}
        check_some(rows, "rows")
        read = self.reader.rows(rows, "rows", partial=partial)
        ballot = make_ballot(vote, answers, rows, "rows", read.unreadable, self.manifest.scoring)
        selection |= ballot.feeds()
        values, mask = self._padded(read)
        feeds = selection | {
            "input_ids" if self._suffix == "ids" else "inputs_embeds": values,
            "attention_mask": mask,
            "num_candidates": np.array(len(rows), np.int64),
            "step_mask": self._steps(name, read, values, step_masks)[:, None],
        }
        wanted = ["scores", "candidate_scores", "best_index", "group_scores", *(["backbone"] if backbone else [])]
        scores, found, best, groups, *rest = self.session("score").run(feeds, wanted)
        index = winner(int(best[0]), "rows")
        return Scored(
            index,
            found[:, 0],
            [scores[i, : len(item), 0] for i, item in enumerate(read.items)],
            [rest[0][i, : len(item)] for i, item in enumerate(read.items)] if backbone else None,
            name,
            *ballot.count(found[:, 0], groups[:, 0]),
            unreadable=read.unreadable,
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
            prompt: text, messages or token ids.
            deadline: seconds; what still grows then is cut, with `deadline` as its finish reason.
            on_progress: called with the candidates after every token.
            **options: see `GenerateOptions`.

        Raises:
            InputError: an option or the prompt has no meaning.
            ArtifactError: the artifact has no language model.
            NoWinnerError: every candidate's score is NaN.
        """
        draft = self.draft(prompt, **options)
        until = clock(deadline)
        if on_progress is not None:
            check_function("on_progress", on_progress)
        if until is None and on_progress is None:
            (result,) = self.generate_together([draft])
        else:
            for result in self._stream(draft, until):
                if on_progress is not None:
                    on_progress(result)
        winner(result.best_index, "candidates")
        return result

    def draft(self, prompt: Item, **options: Unpack[GenerateOptions]) -> Draft:
        """Read and check what `generate` is to run, for `generate_together`; the arguments are those of `generate`.

        Raises:
            InputError: an option or the prompt has no meaning.
            ArtifactError: the artifact has no language model.
        """
        self.session("generate")
        ids = self.reader.prompt(prompt)
        request = checked_request(self, ids, options, self.manifest.limits.max_tokens - len(ids))
        return Draft(ids, request, len(ids) + request.max_new_tokens <= self._alike)

    def generate_together(self, drafts: Sequence[Draft], stop: Stop | None = None) -> list[Generation]:
        """Generate for drafts of equal keys in one run of one graph; `best_index` is -1 where nothing can win."""
        scoring, text = self.manifest.scoring, self.reader.text
        session = self.session("generate")
        run = lambda feeds, wanted: session.run(feeds, wanted, stop)  # noqa: E731
        return run_drafts(run, drafts, scoring.step_token, scoring.pad_token, None if text is None else text.decode)

    def stream(
        self, prompt: Item, *, deadline: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Iterator[Generation]:
        """As `generate`, but gives the candidates after every token; the last ones are the result.

        To cancel, stop reading: nothing runs between two of them. The options are checked at the call.
        """
        return self._stream(self.draft(prompt, **options), clock(deadline))

    def search(
        self,
        prompt: Item,
        method: str = "best_of_n",
        budget: int = 16,
        *,
        answers: Answers | None = None,
        vote: str | None = None,
        scorer: Scorer | None = None,
        deadline: float | None = None,
        policy: Policy | str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> SearchResult:
        """Spend a budget of completions on a prompt by a method of one's choice, and choose the best candidate.

        Args:
            prompt: text, messages or token ids.
            method: one of `bonnx.runtime.search.METHODS`: `best_of_n`, `weighted`, `majority`, `self_certainty`,
                `adaptive`, `pruned`, `beam`, `lookahead`, `dvts` or `revisions`; docs/search.md says what each does.
            budget: completions that it may cost; the result's `cost` says what it did cost.
            answers: how to find what a candidate votes for: `boxed`, `number`, `regex:PATTERN`, or a function of its
                text (of its token ids where there is no tokenizer); None is no answer.
            vote: `score`, `weighted` or `majority`, if not the method's own.
            scorer: a function of the token ids of prompt and completion that gives a score in place of the model's own.
                One that gives NaN says that the candidate cannot win.
            deadline: seconds; what still grows then is cut, and the choice is made from what there is.
            policy: a file that `Policy.save` wrote, or a policy: it chooses the method by the prompt's difficulty.
            **options: the method's settings (`width`, `rounds`, ...), and `max_new_tokens`, `temperature`, `top_k`,
                `top_p`, `seed`, `stop` and `aggregation` as in `generate`.

        Raises:
            InputError: an option or the prompt has no meaning, the budget is less than the method needs, the policy is
                another model's, or the scorer raised.
            ArtifactError: the artifact has no language model.
            NoWinnerError: every candidate's score is NaN.
        """
        from .search import search

        return search(self, prompt, method, budget, answers, vote, scorer, deadline, policy, options)

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """What each token of a completion adds to its text; its number where the artifact has no tokenizer."""
        text, ids = self.reader.text, self.reader.completion(tokens)
        return [f"{token} " for token in ids] if text is None else text.pieces(ids)

    def _stream(self, draft: Draft, until: float | None) -> Iterator[Generation]:
        request, text = draft.request, self.reader.text
        decode = None if text is None else text.decode
        for growing in grow(self.session, draft.prompt, request, self.manifest.scoring.step_token, until):
            found, best = growing.select()
            parts = (growing.tokens, growing.scores, growing.log_probs, growing.lengths, found, growing.reasons)
            candidates = [make_candidate(decode, draft.prompt, *row) for row in zip(*parts, strict=True)]
            yield Generation(best, candidates, len(draft.prompt), growing.computed, request.aggregation)

    def _padded(self, rows: Rows) -> tuple[Array, Array]:
        """Rows within limits, padded, and their mask."""
        prompt = 0 if rows.prompt is None else len(rows.prompt)
        check_size(self.manifest, len(rows.items), prompt, max(map(len, rows.items)), self.options.memory_limit)
        return pad(rows.items, self.manifest.scoring.pad_token)

    def _steps(self, name: str, rows: Rows, values: Array, given: Sequence[Sequence[int]] | None) -> Array:
        """Positions that the aggregation may read, (rows, length) or (1, 1) for all."""
        if not is_stepwise(name):
            if given is not None:
                raise InputError(
                    f"step_masks: aggregation '{name}' does not read them; pass aggregation='step_{name}', or no marks"
                )
            mask = np.ones((1, 1), np.int64)
        elif given is None and rows.ends is not None:
            mask, _ = pad([ends.astype(np.int64) for ends in rows.ends], 0)
        else:
            mask = step_mask(values, given, rows.skip, self.manifest.scoring.step_token)
        if name == "last" and self.manifest.scoring.passes_pad and values.ndim == 2:
            # A candidate that is padding from end to end is read at its last token, as one without a step's end.
            mask = (values != self.manifest.scoring.pad_token).astype(np.int64)
        if any(rows.skip):
            mask = mask * (np.arange(values.shape[1]) >= np.array(rows.skip)[:, None])
        return mask


def checked_request(model: Model, ids: Array, options: GenerateOptions, room: int) -> Request:
    """The request of a generation, everything checked; `room` is its longest completion if the options do not say.

    Raises:
        InputError: an option has no meaning, or it is more than the artifact's limits allow.
    """
    scoring = model.manifest.scoring
    stops = model.reader.stops(options.get("stop"), scoring)
    request = make_request(options, stops, scoring.aggregation, max(1, room))
    if is_stepwise(request.aggregation) and scoring.step_token is None:
        raise InputError("a step aggregation needs a step token, and the artifact's scoring rule has none")
    check_size(model.manifest, request.n, len(ids), request.max_new_tokens, model.options.memory_limit)
    return request

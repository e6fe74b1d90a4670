"""`bonnx.load` opens an artifact as a `Model`, which ranks, scores, generates, streams and searches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from bonnx.errors import NoWinnerError

from .artifact.manifest import Manifest
from .checks import check_function
from .engine.engine import PROMPT_CACHE, Engine, open_engine
from .engine.session import Provider
from .generate import run as generation
from .generate.decoding import clock
from .generate.options import SEARCH_OPTIONS, GenerateOptions, shows_options
from .generate.request import read_request as read_generate_request
from .generate.result import Generation
from .generate.vote import check_vote, choose_by_vote
from .rank.prepare import prepare
from .rank.request import read_request
from .rank.result import Ranking, Scored, winner
from .rank.run import run_together
from .rank.score import score_rows
from .selection.vote import Answers
from .text.reader import Item

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .protocol import ModelLike
    from .search.artifact_tree import ScoreFunction
    from .search.policy import Policy
    from .search.result import SearchResult

__all__ = ["Model", "load"]


def load(
    path: str | os.PathLike[str],
    *,
    provider: Provider = "auto",
    threads: int | None = None,
    device_id: int = 0,
    memory_limit: int | None = None,
    prompt_cache: int = PROMPT_CACHE,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Model:
    """Open an artifact.

    Args:
        path: the folder that `bonnx export` wrote. Every file's hash is checked first.
        provider: `cpu`, `cuda`, or `auto` (CUDA where it works, else the CPU; `model.provider` says which).
        threads: CPU threads of one call; ONNX Runtime's default (one for each physical core) if not given.
        device_id: which CUDA device.
        memory_limit: bytes that one call may take: a call that would need more is refused before it starts, and on
            CUDA the arena is limited to it.
        prompt_cache: bytes of keys and values that `Model.prepare` may keep; by default 512 MiB.
        cache_dir: folder in which each graph is kept as ONNX Runtime optimized it for this processor, with its packed
            weights (on the CPU only; a few times the size of the artifact). The graphs, and all processes that use the
            folder, then share the memory of the weights. Not used by default.

    Raises:
        ArtifactError: not an artifact, or not as it was written.
        ProviderError: ONNX Runtime is missing, or the requested provider is unavailable.
        InputError: an option is invalid.
    """
    engine = open_engine(
        path,
        provider=provider,
        threads=threads,
        device_id=device_id,
        memory_limit=memory_limit,
        prompt_cache=prompt_cache,
        cache_dir=cache_dir,
    )
    return Model(engine, os.fspath(path))


class Model:
    """An open artifact. Safe to share between threads; each graph is loaded on first use.

    Attributes:
        manifest: the artifact's description of itself.
        provider: where it runs, `cpu` or `cuda`.
    """

    def __init__(self, engine: Engine, name: str | os.PathLike[str] = "") -> None:
        self._engine, self._name = engine, name

    @property
    def manifest(self) -> Manifest:
        return self._engine.manifest

    @property
    def provider(self) -> str:
        return self._engine.provider

    def __repr__(self) -> str:
        return f"<bonnx.Model {self.manifest.name!r} from {str(self._name)!r} on {self.provider}>"

    def close(self) -> None:
        """Free the memory of the loaded graphs and of prompts; a graph is loaded again when it is next used."""
        self._engine.close()

    def prepare(self, prompt: Item, *, instruction: str | None = None) -> bool:
        """Compute a prompt before its candidates are there: `rank` then computes the candidates only.

        The prompt's keys and values are kept until the prompts that were used later fill `prompt_cache`. A prompt that
        begins like one of them, such as the next turn of a conversation, continues from there. Another thread may call
        `rank` meanwhile: it waits. `BestOfN` and `bonnx serve --upstream` call this themselves.

        Args:
            prompt: as in `rank`.
            instruction: as in `rank`.

        Returns:
            whether it is kept: it does not exceed `prompt_cache`, its rope scaling does not depend on the length, the
            artifact has the graphs for it, and a reranker's template begins with the query.

        Raises:
            InputError: the prompt is invalid.
        """
        return prepare(self._engine, prompt, instruction)

    def rank(
        self,
        prompt: Item,
        candidates: Sequence[Item],
        *,
        aggregation: str | None = None,
        step_masks: Sequence[Sequence[int]] | None = None,
        partial: bool = False,
        truncate: bool = False,
        instruction: str | None = None,
        vote: str = "score",
        answers: Answers | None = None,
    ) -> Ranking:
        """Score candidates after a prompt and choose the best; the prompt is computed once.

        An empty candidate (an empty text or list, no steps, an empty step, no rows of embeddings), or one whose text
        the tokenizer cannot encode, does not fail the call: its score is NaN, it cannot win, and `Ranking.unreadable`
        says why. Any other invalid candidate is an error: a wrong type, dtype or width, a token id outside the
        vocabulary, more tokens than the artifact takes.

        Args:
            prompt: text, messages (`{"role": ..., "content": ...}` each), token ids, or embeddings (length, embed_dim)
                float32.
            candidates: one or more; a text continues the prompt, or answers the messages as the assistant; a list of
                texts is a candidate in steps.
            aggregation: `last`, `mean`, `min`, `max`, `prod`, or `step_` and one of these, which read only the
                positions where a step ends; by default the artifact's own rule.
            step_masks: for each candidate 0 or 1 for each token, 1 where a step ends; only for the `step_`
                aggregations, which need them if the candidates are embeddings.
            partial: text candidates are not finished yet: no end token is appended, and no template closes the answer.
            truncate: drop the beginning of a prompt that is too long instead of raising an error; `Ranking.cut` says
                how much. Candidates are never cut.
            instruction: of a reranker of queries and documents: what makes one relevant; by default the model's own.
            vote: `score` (the best candidate), or the best candidate of one answer: `weighted` (the answer whose
                candidates' weights have the largest sum: their probabilities, or the softmax of raw scores) or
                `majority` (the answer of most candidates). If no candidate has an answer, the best candidate wins.
            answers: what each candidate votes for, any hashable or None; or how to find it in a text: `boxed`,
                `number` or `regex:PATTERN` (see `bonnx.runtime.selection.answers`), or a function of a candidate.
                Needed to vote.

        Raises:
            InputError: an argument is invalid, or none of the candidates can be read.
            NoWinnerError: every score is NaN.
        """
        request = read_request(
            self._engine,
            prompt,
            candidates,
            aggregation=aggregation,
            step_masks=step_masks,
            partial=partial,
            truncate=truncate,
            instruction=instruction,
            vote=vote,
            answers=answers,
        )
        (ranking,) = run_together(self._engine, [request])
        if isinstance(ranking, NoWinnerError):
            raise ranking
        return ranking

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
        """Score whole rows at every position, each row by itself, and choose the best.

        A row that cannot be read does not fail the call, as in `rank`.

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
            InputError: an argument is invalid, or none of the rows can be read.
            NoWinnerError: every score is NaN.
        """
        return score_rows(
            self._engine,
            rows,
            aggregation=aggregation,
            step_masks=step_masks,
            partial=partial,
            backbone=backbone,
            vote=vote,
            answers=answers,
        )

    @shows_options()
    def generate(
        self,
        prompt: Item,
        *,
        vote: str = "score",
        answers: Answers | None = None,
        deadline: float | None = None,
        on_progress: Callable[[Generation], object] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Sample N completions, score every token, choose the best: one run of one graph.

        With a deadline, a callback, `top_log_probs`, or a stop text of several tokens the host decodes token by token
        instead; the tokens are the same.

        Args:
            prompt: text, messages or token ids.
            vote: as in `rank`.
            answers: how to find what a candidate votes for: `boxed`, `number`, `regex:PATTERN`, or a function of its
                text (of its token ids where there is no tokenizer). Needed to vote.
            deadline: in seconds; candidates unfinished by then are cut, with the finish reason `deadline`.
            on_progress: called with the candidates after every token.
            **options: how to generate.

        Raises:
            InputError: an option or the prompt is invalid.
            ArtifactError: the artifact has no language model.
            NoWinnerError: every candidate's score is NaN.
        """
        scoring = self.manifest.scoring
        check_vote(vote, answers, scoring)
        request, until = read_generate_request(self._engine, prompt, options), clock(deadline)
        if on_progress is not None:
            check_function("on_progress", on_progress)
        if until is None and on_progress is None:
            (result,) = generation.run_together(self._engine, [request])
        else:
            for result in generation.stream(self._engine, request, until):
                if on_progress is not None:
                    on_progress(result)
        winner(result.best_index, "candidates")
        return choose_by_vote(result, vote, answers, scoring)

    @shows_options()
    def stream(
        self, prompt: Item, *, deadline: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Iterator[Generation]:
        """As `generate`, but yields the candidates after every token; the last ones are the result.

        To cancel, stop iterating: nothing is computed in between. The options are checked when it is called.

        Args:
            prompt: as in `generate`.
            deadline: as in `generate`.
            **options: how to generate.
        """
        return generation.stream(self._engine, read_generate_request(self._engine, prompt, options), clock(deadline))

    @shows_options(SEARCH_OPTIONS)
    def search(
        self,
        prompt: Item,
        method: str = "best_of_n",
        budget: int = 16,
        *,
        answers: Answers | None = None,
        vote: str | None = None,
        scorer: ScoreFunction | None = None,
        deadline: float | None = None,
        policy: Policy | str | os.PathLike[str] | None = None,
        **options: object,
    ) -> SearchResult:
        """Spend a budget of completions on a prompt by a search method, and choose the best candidate.

        Args:
            prompt: text, messages or token ids.
            method: one of `bonnx.runtime.search.METHODS`: `best_of_n`, `weighted`, `majority`, `self_certainty`,
                `adaptive`, `pruned`, `beam`, `lookahead`, `dvts` or `revisions`; docs/search.md says what each does.
            budget: the maximum number of completions; the result's `cost` says what was computed.
            answers: how to find what a candidate votes for: `boxed`, `number`, `regex:PATTERN`, or a function of its
                text (of its token ids where there is no tokenizer); None is for no answer.
            vote: `score`, `weighted` or `majority`; by default the method's own.
            scorer: a function of the token ids of prompt and completion that returns a score, which replaces the
                model's own; NaN means that the candidate cannot win.
            deadline: in seconds; completions unfinished by then are cut, and the choice is made from what there is.
            policy: a policy, or a file that `Policy.save` wrote: it chooses the method by the prompt's difficulty.
            **options: the method's settings (docs/search.md lists them), and these of `generate`:

        Raises:
            InputError: an option or the prompt is invalid, the budget is less than the method needs, the policy is
                another model's, or the scorer raised.
            ArtifactError: the artifact has no language model.
            NoWinnerError: every candidate's score is NaN.
        """
        from .search import search

        return search(self._engine, prompt, method, budget, answers, vote, scorer, deadline, policy, options)


if TYPE_CHECKING:
    _fits: type[ModelLike] = Model

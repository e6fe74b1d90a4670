"""Generation in one run of one graph, or token by token; the tokens are the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from ..arrays import Array
from ..batching import CALL_TOKENS, Shape
from ..engine.engine import Engine
from ..engine.session import Stop
from ..text.padding import pad
from .decoding import decode_all, generate_feeds
from .growing import Growing
from .options import CheckedOptions
from .request import GenerateRequest
from .result import FINISH_REASONS, Candidate, Generation

__all__ = ["cost", "ends_in_stop", "generation_of", "make_candidate", "run_together", "stream"]

_OUTPUTS = ["sequences", "lengths", "scores", "log_probs", "finish_reasons", "candidate_scores", "best_index"]
# The text of token ids behind a prompt's, as `Tokenizer.decode`; None where there is no tokenizer.
_Decode = Callable[[list[int], list[int], str | None], str] | None


def run_together(engine: Engine, requests: Sequence[GenerateRequest], stop: Stop | None = None) -> list[Generation]:
    """Generate for requests of equal keys in one run; `best_index` is -1 where nothing can win."""
    scoring = engine.manifest.scoring
    if requests[0].options.needs_host:
        return [_in_a_loop(engine, request, stop) for request in requests]
    prompts, mask = pad([request.prompt for request in requests], scoring.pad_token)
    feeds = generate_feeds(prompts, mask, [request.options for request in requests], scoring.step_token)
    outputs = engine.session("generate").run(feeds, _OUTPUTS, stop)
    tokens, lengths, scores, log_probs, reasons, candidate_scores, best = outputs
    results = []
    for b, request in enumerate(requests):
        options = request.options
        parts = (tokens, scores, log_probs, lengths, candidate_scores, reasons)
        rows = zip(*(array[: options.n, b] for array in parts), strict=True)
        candidates = [make_candidate(_decode(engine, options), request.prompt, *row) for row in rows]
        # Each token of a candidate is read once, for its score.
        computed = int(lengths[:, b].sum())
        results.append(Generation(int(best[b]), candidates, len(request.prompt), computed, options.aggregation))
    return results


def cost(engine: Engine) -> Callable[[int, Shape], float]:
    """For `company`: what a run costs at most, in tokens; every token of a completion is a call of the network."""
    call = CALL_TOKENS[engine.provider]
    return lambda slots, shape: slots * shape.prompt + shape.length * (call + slots * shape.candidates)


def _in_a_loop(engine: Engine, request: GenerateRequest, stop: Stop | None) -> Generation:
    """Generate token by token; see `CheckedOptions.needs_host`.

    Raises:
        InterruptedError: `stop` was set.
    """
    result: Generation | None = None
    for state in stream(engine, request, None):
        result = state
        if stop is not None and stop.terminate:
            raise InterruptedError("the generation was stopped")
    assert result is not None
    return result


def stream(engine: Engine, request: GenerateRequest, deadline: float | None) -> Iterator[Generation]:
    """The candidates after every token; the last ones are the result.

    Args:
        engine: runs it.
        request: made by `read_request`.
        deadline: on the clock of `time.monotonic`, or None.
    """
    step_token, ends = engine.manifest.scoring.step_token, ends_in_stop(engine, request)
    for growing in decode_all(engine, request.prompt, request.options, step_token, deadline, ends):
        yield generation_of(engine, request, growing)


def generation_of(engine: Engine, request: GenerateRequest, growing: Growing) -> Generation:
    """The candidates of a request as they stand."""
    decode, options = _decode(engine, request.options), request.options
    candidate_scores, best = growing.select()
    parts = (growing.tokens, growing.scores, growing.log_probs, growing.lengths, candidate_scores, growing.reasons)
    candidates = [make_candidate(decode, request.prompt, *row) for row in zip(*parts, strict=True)]
    if options.top_log_probs:
        candidates = [
            replace(c, top_tokens=tokens[: len(c.tokens)], top_log_probs=log_probs[: len(c.tokens)])
            for c, tokens, log_probs in zip(candidates, growing.top_tokens, growing.top_log_probs, strict=True)
        ]
    return Generation(best, candidates, len(request.prompt), growing.computed, options.aggregation)


def _decode(engine: Engine, options: CheckedOptions) -> _Decode:
    tokenizer = engine.reader.tokenizer
    return None if tokenizer is None else functools.partial(tokenizer.decode, stop_texts=options.stop_texts)


def ends_in_stop(engine: Engine, request: GenerateRequest) -> Callable[[Array], bool] | None:
    """Whether the last token of a completion completes a stop text; None if its tokens alone say so."""
    tokenizer, options = engine.reader.tokenizer, request.options
    if tokenizer is None or not options.stops_in_text:
        return None
    before = request.prompt.tolist()
    return lambda tokens: tokenizer.ends_in_stop(tokens.tolist(), before, options.stop_texts)


def make_candidate(
    decode: _Decode,
    prompt: Array,
    tokens: Array,
    scores: Array,
    log_probs: Array,
    length: int,
    score: float,
    reason: int,
) -> Candidate:
    """One completion from its row; `reason` is an index into `FINISH_REASONS`, below 0 while it grows."""
    completion = tokens[:length]
    ended = FINISH_REASONS[reason] if reason >= 0 else None
    text = None if decode is None else decode(completion.tolist(), prompt.tolist(), ended)
    return Candidate(text, completion, scores[:length], log_probs[:length], float(score), ended)

"""`/predict`, `/` and `/info`, as clients of Text Embeddings Inference and Hugging Face's InferenceClient send them."""

from __future__ import annotations

from typing import Annotated, ClassVar

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from bonnx.errors import InputError

from ...checks import ArgumentNames
from ..answer import json_response
from ..ranking import ClientRequest
from ..rows import label_name, score_rows
from ..schemas import FAIL_FAST, MOST_ITEMS, RequestBody, Text
from ..service import Service
from ..text_embeddings import model_info, tei_score

__all__ = ["add"]

_NOUNS = ("input", "input", "inputs")
_NOT_CUT = "inputs are never cut; leave it out, and send inputs that fit"


class PredictParameters(RequestBody):
    """What Hugging Face's InferenceClient sends beside the inputs."""

    elsewhere: ClassVar[dict[str, str]] = {"function_to_apply": 'send "raw_scores" beside "inputs"'}
    top_k: int | None = Field(None, ge=1, description="has no effect: there is one label")


class PredictBody(RequestBody):
    """Texts and pairs of texts to score."""

    elsewhere: ClassVar[dict[str, str]] = {
        "query": "send it to /rerank",
        "texts": "send them to /rerank",
        "truncation_direction": _NOT_CUT,
    }
    inputs: (
        Text
        | Annotated[list[Text], FAIL_FAST, Field(min_length=1, max_length=2)]
        | Annotated[
            list[Annotated[list[Text], FAIL_FAST, Field(min_length=1, max_length=2)]],
            FAIL_FAST,
            Field(min_length=1, max_length=MOST_ITEMS),
        ]
    ) = Field(description="expected a text, a pair of texts, or a list of lists of one or two texts")
    raw_scores: bool = Field(False, description="scores as the model gives them, where these are no probabilities")
    truncate: bool = Field(False, description="has no effect: inputs are never cut")
    parameters: PredictParameters | None = None


def add(routes: APIRouter, service: Service) -> None:
    """Declare the endpoints."""

    async def predict(request: Request, body: PredictBody) -> Response:
        """Score a text, or a second text after a first, as Text Embeddings Inference does."""
        is_batch = not isinstance(body.inputs, str) and isinstance(body.inputs[0], list)
        inputs = body.inputs if is_batch else [[body.inputs] if isinstance(body.inputs, str) else body.inputs]
        scores = await _scores(service, request, inputs, is_batch=is_batch)  # type: ignore[arg-type]
        label, raw = label_name(service), body.raw_scores
        answers = [[{"score": tei_score(service, score, raw=raw), "label": label}] for score in scores]
        return json_response(answers if is_batch else answers[0])

    for path in ("/predict", "/"):
        routes.post(path, name="predict", include_in_schema=path == "/predict")(predict)

    @routes.get("/info", name="info")
    async def info() -> Response:
        """The model and the limits of this server, in the words of Text Embeddings Inference."""
        return json_response(model_info(service))


async def _scores(service: Service, request: Request, inputs: list[list[str]], *, is_batch: bool) -> list[float]:
    """One score for each input.

    Raises:
        InputError: an input cannot be scored; there is no place for a warning.
    """
    names = [f"inputs[{i}]" if is_batch else "inputs" for i in range(len(inputs))]
    alone = [i for i, texts in enumerate(inputs) if len(texts) == 1]
    pairs = [i for i, texts in enumerate(inputs) if len(texts) == 2]
    scores = [0.0] * len(inputs)
    warnings: list[str] = []
    if alone:
        called = ArgumentNames("prompt", "inputs", _NOUNS, [names[i] for i in alone])
        scored = await score_rows(service, request, [inputs[i][0] for i in alone], called)
        warnings += scored.warnings
        for i, score in zip(alone, scored.scores, strict=True):
            scores[i] = score
    if pairs:
        asked = [
            ClientRequest(inputs[i][0], [inputs[i][1]], ArgumentNames(names[i], names[i], _NOUNS, [names[i]]))
            for i in pairs
        ]
        outcomes = await service.rank_all(request, asked)
        warnings += [warning for outcome in outcomes for warning in outcome.warnings]
        for i, outcome in zip(pairs, outcomes, strict=True):
            scores[i] = outcome.scores[0]
    if warnings:
        raise InputError("; ".join(warnings[:3]))
    return scores

"""OpenAI's endpoints: `/v1/models`, `/v1/chat/completions`, `/v1/completions`, with the best of N as the answer."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from fastapi import APIRouter
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from bonnx.errors import InputError

from ...artifact.manifest import Aggregation
from ...generate.options import GenerateOptions
from ...search.beam import Beam
from ...search.methods import vote_of
from ...text.reader import Item
from ..answer import check_model, event_stream, json_response, to_runtime
from ..choosing import Chosen, Rule, choose_from_upstream
from ..completions_answer import completions_answer
from ..completions_stream import LiveCompletion, completions_events
from ..generating import choose_from_artifact
from ..method_fields import method_of, with_method
from ..schemas import FAIL_FAST, Messages, RequestBody, Text, option_field
from ..service import Service

__all__ = ["add"]

# As OpenAI's own limit.
_MOST_CHOICES = 128
# Fields that are read here; an upstream gets all others.
_OURS = ("bonnx", "best_of", "n", "stream", "stream_options", "model")


@with_method()
class BonnxOptions(RequestBody):
    """How to choose; what is not given is the server's default."""

    best_of: int | None = Field(None, ge=1, le=_MOST_CHOICES, strict=True, description="completions to sample")
    vote: Literal["score", "weighted", "majority"] | None = Field(None, description="by default the method's own")
    answers: Annotated[str, Field(pattern=r"^(boxed|number|tool|tool-except:.{1,1000})$")] | None = Field(
        None,
        description="expected 'boxed' or 'number' to find the answer in a text, 'tool' for the tools that are called, "
        "or 'tool-except:FIELD,FIELD' to ignore arguments",
    )
    aggregation: Aggregation | None = None
    truncate: bool = Field(False, description="leave out the beginning of a prompt that is too long for the scorer")
    deadline: float | None = Field(None, gt=0, description="seconds after which the best of what has come is returned")
    step: Annotated[str, Field(min_length=1, max_length=1000)] | None = Field(
        None, description="the text that ends a step of an upstream's completion; by default the scorer's"
    )


class StreamOptions(RequestBody):
    """As OpenAI has them."""

    include_usage: bool = False
    include_obfuscation: bool = Field(False, description="has no effect")


class CompletionsBody(RequestBody):
    """What both endpoints take."""

    elsewhere: ClassVar[dict[str, str]] = {"truncate_prompt_tokens": 'send "bonnx": {"truncate": true}'}
    model: str | None = Field(None, description="this server's model, if it is given")
    n: int = Field(1, ge=1, le=_MOST_CHOICES, strict=True, description="choices to return, the best ones")
    best_of: int | None = Field(
        None,
        ge=1,
        le=_MOST_CHOICES,
        strict=True,
        description="completions to sample; by default the server's number",
    )
    stream: bool = Field(
        False, description="send server-sent events: a single completion as it comes, several once they are chosen"
    )
    stream_options: StreamOptions | None = None
    bonnx: BonnxOptions | None = Field(None, description="how to choose")

    is_chat: ClassVar[bool] = False

    @property
    def item(self) -> Item:
        """What is to be answered or completed."""
        raise NotImplementedError

    @property
    def wants_log_probs(self) -> bool:
        """Whether the answer is to have the log-probability of each token."""
        return False

    @property
    def top_log_probs(self) -> int:
        """Number of most likely tokens at each place whose log-probabilities the answer is to have."""
        return 0


class ChatPrompt(CompletionsBody):
    """A conversation to answer."""

    messages: Messages = Field(min_length=1, description="expected a list of messages")

    is_chat: ClassVar[bool] = True

    @property
    def item(self) -> Item:
        return to_runtime(self.messages, "messages")


class TextPrompt(CompletionsBody):
    """A text to complete."""

    prompt: Text = Field(description="expected a text")

    @property
    def item(self) -> Item:
        return self.prompt


class GeneratedBody(CompletionsBody):
    """What is known of generation where the artifact does it."""

    max_tokens: int | None = option_field("max_new_tokens", default=None)
    temperature: float = option_field("temperature")
    top_p: float = option_field("top_p")
    seed: int | None = option_field("seed", default=None, description="of every random number; random if not given")
    stop: Text | Annotated[list[Text], FAIL_FAST, Field(max_length=16)] | None = Field(
        None, description="expected a text, or a list of at most 16 of them"
    )
    user: str | None = Field(None, description="has no effect")

    @property
    def limit(self) -> int | None:
        """Maximum number of tokens of a completion."""
        return self.max_tokens

    def options(self, aggregation: str | None, own_stops: Sequence[int]) -> GenerateOptions:
        """How to generate; `own_stops` end a completion, too, as in OpenAI's servers."""
        seed = secrets.randbits(48) if self.seed is None else self.seed
        options = GenerateOptions(
            temperature=self.temperature,
            top_p=self.top_p,
            aggregation=aggregation,
            seed=seed,
            max_new_tokens=self.limit,
        )
        if self.top_log_probs:
            options["top_log_probs"] = self.top_log_probs
        if self.stop is not None:
            options["stop"] = [*own_stops, *([self.stop] if isinstance(self.stop, str) else self.stop)]
        return options


class ChatBody(ChatPrompt, GeneratedBody):
    """A conversation to answer."""

    max_completion_tokens: int | None = option_field("max_new_tokens", default=None)
    logprobs: bool = Field(False, description="return the log-probability of each token")
    top_logprobs: int | None = Field(
        None, ge=0, le=20, strict=True, description="with logprobs: also of so many of the most likely tokens; slower"
    )

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wants_log_probs(self) -> bool:
        return self.logprobs

    @property
    def top_log_probs(self) -> int:
        if self.top_logprobs and not self.logprobs:
            raise InputError('top_logprobs: send "logprobs": true as well')
        return self.top_logprobs or 0


class TextBody(TextPrompt, GeneratedBody):
    """A text to complete."""

    logprobs: int | None = Field(
        None,
        ge=0,
        le=5,
        strict=True,
        description="return the log-probability of each token, and of so many of the most likely ones; slower above 0",
    )

    @property
    def wants_log_probs(self) -> bool:
        return self.logprobs is not None

    @property
    def top_log_probs(self) -> int:
        return self.logprobs or 0


class ForwardedChatBody(ChatPrompt):
    """A conversation that the upstream answers; fields that are not listed go to it as they are."""

    model_config = ConfigDict(extra="allow")


class ForwardedTextBody(TextPrompt):
    """A text that the upstream completes; fields that are not listed go to it as they are."""

    model_config = ConfigDict(extra="allow")


def add(routes: APIRouter, service: Service) -> None:
    """Declare the endpoints."""

    @routes.get("/v1/models", name="models")
    async def models() -> Response:
        """The one model of this server."""
        model = {"id": service.name, "object": "model", "created": service.started, "owned_by": "bonnx"}
        return json_response({"object": "list", "data": [model]})

    if service.upstream is None and not service.generates:
        return
    chat_body, text_body = (ChatBody, TextBody) if service.upstream is None else (ForwardedChatBody, ForwardedTextBody)

    async def chat_completions(request: Request, body: CompletionsBody) -> Response:
        """Answer a conversation with the best of several completions."""
        return await _respond(service, request, body)

    async def completions(request: Request, body: CompletionsBody) -> Response:
        """Complete a text with the best of several completions."""
        return await _respond(service, request, body)

    for path, endpoint, kind in (
        ("/v1/chat/completions", chat_completions, chat_body),
        ("/v1/completions", completions, text_body),
    ):
        endpoint.__annotations__["body"] = kind
        routes.post(path, name=endpoint.__name__)(endpoint)


async def _respond(service: Service, request: Request, body: CompletionsBody) -> Response:
    check_model(service, body.model)
    rule = _rule(service, body)
    chat, log_probs = body.is_chat, body.wants_log_probs
    # Of one completion nothing is to be chosen: it is sent as it comes.
    live = LiveCompletion(service, is_chat=chat, log_probs=log_probs) if body.stream and rule.samples_one else None

    def answer(chosen: Chosen) -> dict[str, object]:
        return completions_answer(service, chosen, rule, body.n, is_chat=chat, log_probs=log_probs)

    choosing = _choose(service, request, body, rule, live)
    chosen = await choosing if live is None else await live.start(choosing)
    if not body.stream:
        assert chosen is not None
        return json_response(answer(chosen))
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    if chosen is None:
        assert live is not None
        return event_stream(live.events(answer, with_usage=with_usage))
    return event_stream(completions_events(answer(chosen), is_chat=chat, with_usage=with_usage))


async def _choose(
    service: Service, request: Request, body: CompletionsBody, rule: Rule, live: LiveCompletion | None
) -> Chosen:
    """The completions, from the artifact or the upstream; `live` gets a single one as it comes."""
    if isinstance(body, GeneratedBody):
        own_stops = service.engine.reader.stops(None, service.engine.manifest.scoring).tokens
        options = body.options(rule.aggregation, own_stops)
        return await choose_from_artifact(
            service, request, body.item, options, rule, None if live is None else live.take_state
        )
    assert service.upstream is not None
    if not rule.samples and (body.model_extra or {}).get("logprobs") not in (None, False):
        raise InputError(f"logprobs: not available with bonnx.method '{rule.method}'; leave it out")
    forwarded = body.model_dump(exclude_unset=True, exclude={*_OURS})
    return await choose_from_upstream(
        service, service.upstream, request, body.item, forwarded, rule, None if live is None else live.take_piece
    )


def _rule(service: Service, body: CompletionsBody) -> Rule:
    """How to choose, from the body and the server's defaults.

    Raises:
        InputError: fields that do not go together.
    """
    given = body.bonnx or BonnxOptions.model_validate({})
    if body.best_of is not None and given.best_of is not None and body.best_of != given.best_of:
        raise InputError(f"best_of: {body.best_of}, but bonnx.best_of is {given.best_of}; leave one of them out")
    limit = service.engine.manifest.limits.max_candidates
    best_of = body.best_of or given.best_of or max(min(service.settings.best_of, limit), body.n)
    if best_of < body.n:
        raise InputError(f"best_of: expected at least n, {body.n}; got {best_of}")
    if best_of > limit:
        raise InputError(f"best_of: this server takes at most {limit}; got {best_of}")
    method, runner = method_of(given, "bonnx.")
    vote = vote_of(method, given.vote, has_answers=given.answers is not None)
    if vote in ("weighted", "majority") and given.answers is None:
        raise InputError(f"bonnx.vote: '{vote}' needs bonnx.answers: 'boxed', 'number' or 'tool'")
    if given.step is not None and not (isinstance(runner, Beam) and service.upstream is not None):
        raise InputError("bonnx.step: belongs to 'beam', 'dvts' and 'lookahead' over an upstream; leave it out")
    return Rule(
        best_of, method, runner, vote, given.answers, given.aggregation, given.truncate, given.deadline, given.step
    )

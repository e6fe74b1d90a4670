"""What a caller passes to generate with, as one kind of function."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

from bonnx.errors import InputError

from ..checks import check_function, is_list, shown
from ..generate.options import GenerateOptions
from ..protocol import ModelLike
from ..seeds import seed_after
from ..text.reader import Item
from ..upstream.completion import Completion, Failure
from ..upstream.continuation import CONTINUES, stopped_by
from ..upstream.cost import SamplingCost

if TYPE_CHECKING:
    from ..upstream.client import Upstream

__all__ = ["Generator", "as_generator", "is_server"]

Sampling: TypeAlias = Mapping[str, object]


class Generator(Protocol):
    """Samples completions of a prompt, each as it comes."""

    def __call__(
        self, prompt: Item, n: int, first: int, sampling: Sampling, until: float | None, cost: SamplingCost
    ) -> AsyncGenerator[Completion | Failure, None]:
        """Sample.

        Args:
            prompt: text or messages.
            n: number of completions.
            first: how many completions of this prompt were sampled before.
            sampling: further fields of the request, or arguments of the function.
            until: deadline on the clock of `time.monotonic`.
            cost: what to add the cost to.
        """
        ...


# All completions of one call: prompt, n, how many were sampled before, further arguments, and where to note the cost.
_Ask: TypeAlias = Callable[[Item, int, int, Sampling, SamplingCost], Awaitable[Sequence[Completion]]]


def is_server(generate: object) -> bool:
    """Whether what the caller passes to generate with asks a server, which can continue a completion."""
    return hasattr(generate, "sample") or (hasattr(generate, "chat") and hasattr(generate, "completions"))


def as_generator(generate: object, model: str | None) -> Generator:
    """The generator that an upstream, an OpenAI client, a model or a function stands for.

    Raises:
        InputError: it is none of these, or a client without the name of a model.
    """
    if hasattr(generate, "sample"):
        return _of_upstream(cast("Upstream", generate), model)
    if hasattr(generate, "chat") and hasattr(generate, "completions"):
        if model is None:
            raise InputError("model: expected the name of the model that the client's requests ask for")
        return _of_calls(_call_client(generate, model))
    if hasattr(generate, "generate") and hasattr(generate, "rank"):
        return _of_calls(_call_model(cast(ModelLike, generate)))
    check_function("generate", generate)
    return _of_calls(_call_function(cast(Callable[..., Any], generate)))


def _of_upstream(upstream: Upstream, model: str | None) -> Generator:
    async def generate(
        prompt: Item, n: int, first: int, sampling: Sampling, until: float | None, cost: SamplingCost
    ) -> AsyncGenerator[Completion | Failure, None]:
        named = {} if model is None else {"model": model}
        body = {**named, **sampling, **_prompt_fields(prompt)}
        async with contextlib.aclosing(upstream.sample(body, n, until=until, first=first, cost=cost)) as arrivals:
            async for arrival in arrivals:
                yield arrival

    return generate


def _of_calls(call: _Ask) -> Generator:
    """A generator whose calls give all completions at once; those that a call does not give are asked for singly."""

    async def generate(
        prompt: Item, n: int, first: int, sampling: Sampling, until: float | None, cost: SamplingCost
    ) -> AsyncGenerator[Completion | Failure, None]:
        async def some(number: int, count: int) -> Sequence[Completion | Failure]:
            left = None if until is None else max(0.0, until - time.monotonic())
            try:
                completions = await asyncio.wait_for(call(prompt, count, number, sampling, cost), left)
            except asyncio.TimeoutError:
                return [Failure("the deadline passed before the completion ended")] * count
            except (InputError, TypeError):
                # The caller's mistake, which every other call would repeat.
                raise
            except Exception as e:
                return [Failure(f"generate raised {type(e).__name__}: {e}", getattr(e, "status_code", None))] * count
            return completions[:count]

        arrived = await some(first, n)
        for arrival in arrived:
            yield arrival
        rest = [asyncio.ensure_future(some(number, 1)) for number in range(first + len(arrived), first + n)]
        try:
            for task in asyncio.as_completed(rest):
                for arrival in await task or [Failure("generate gave no completion")]:
                    yield arrival
        finally:
            for one in rest:
                one.cancel()

    return generate


def _call_function(function: Callable[..., Any]) -> _Ask:
    async def call(prompt: Item, n: int, first: int, sampling: Sampling, cost: SamplingCost) -> Sequence[Completion]:
        items = function(prompt, n, **sampling) if is_async else asyncio.to_thread(function, prompt, n, **sampling)
        items = await items
        if not is_list(items):
            raise InputError(f"generate: expected a list of {n} texts or messages; got {shown(items)}")
        return [_completion(item, i) for i, item in enumerate(items)]

    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    return call


def _call_model(model: ModelLike) -> _Ask:
    async def call(prompt: Item, n: int, first: int, sampling: Sampling, cost: SamplingCost) -> Sequence[Completion]:
        # With the seed of an earlier call the completions would be the same.
        options = cast(GenerateOptions, {**sampling, "n": n})
        seed = options.get("seed")
        if seed is None or isinstance(seed, int):
            options["seed"] = seed_after(seed or 0, first)
        generation = await asyncio.to_thread(model.generate, prompt, **options)
        cost.add(generation.prompt_tokens, sum(len(candidate.tokens) for candidate in generation.candidates))
        completions = [
            Completion(candidate.text, None, candidate.finish_reason)
            for candidate in generation.candidates
            if candidate.text is not None
        ]
        if len(completions) < len(generation.candidates):
            raise InputError("generate: expected a model with a tokenizer; this one gives token ids only")
        return completions

    return call


def _call_client(client: Any, model: str) -> _Ask:
    """An `openai.OpenAI` or `openai.AsyncOpenAI`, with the retries and the timeout that it was made with."""

    async def call(prompt: Item, n: int, first: int, sampling: Sampling, cost: SamplingCost) -> Sequence[Completion]:
        fields = _prompt_fields(prompt)
        chat = "messages" in fields
        create = client.chat.completions.create if chat else client.completions.create
        body = {"model": model, **sampling, **fields, **({"n": n} if n > 1 else {})}
        # Not of OpenAI's own fields.
        if continues := {name: body.pop(name) for name in CONTINUES if name in body}:
            body["extra_body"] = {**cast(Mapping[str, object], body.get("extra_body") or {}), **continues}
        if isinstance(seed := body.get("seed"), int):
            body["seed"] = seed_after(seed, first)
        answer = await create(**body) if is_async else await asyncio.to_thread(create, **body)
        # The client passes on whatever a server sends, null too.
        counted = [getattr(answer.usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
        if counted[0] is not None:
            cost.add(counted[0], counted[1] or 0)
        choices = answer.choices or ()
        ends = [(choice.finish_reason, stopped_by(choice.model_extra or {})) for choice in choices]
        if not chat:
            return [Completion(choice.text or "", None, *end) for choice, end in zip(choices, ends, strict=True)]
        messages = [choice.message for choice in choices]
        return [
            Completion(message.content or "", message.model_dump(exclude_none=True), *end)
            for message, end in zip(messages, ends, strict=True)
        ]

    is_async = inspect.iscoroutinefunction(client.close)
    return call


def _prompt_fields(prompt: Item) -> dict[str, object]:
    """The fields of OpenAI's API that a prompt is sent in."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if is_list(prompt) and len(prompt) and all(isinstance(message, Mapping) for message in prompt):
        return {"messages": [dict(cast(Mapping[str, object], message)) for message in prompt]}
    raise InputError(f"prompt: expected a text or a list of messages; got {shown(prompt)}")


def _completion(item: object, place: int) -> Completion:
    """A completion from what a function gives."""
    if isinstance(item, Completion):
        return item
    if isinstance(item, str):
        return Completion(item)
    if isinstance(item, Mapping):
        content = item.get("content")
        return Completion(content if isinstance(content, str) else "", item)
    raise InputError(f"generate, completion {place}: expected a text or a message; got {shown(item)}")

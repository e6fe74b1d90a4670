"""A server that speaks OpenAI's protocol and misbehaves as it is told."""

import asyncio
import contextlib
import inspect
import itertools
import json
import threading
import time

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


class FakeUpstream:
    """Answers each request with the next of its `behaviours`; the last one answers all that follow.

    A behaviour takes the request's body and returns a response. Attributes: `url`; `bodies` and `headers` of the
    requests so far; `cancelled`: how many requests the client gave up.
    """

    def __init__(self, *behaviours):
        self.behaviours, self.bodies, self.headers, self.paths, self.cancelled = [*behaviours], [], [], [], 0
        routes = [Route(f"/v1{path}", self._answer, methods=["POST"]) for path in ("/chat/completions", "/completions")]
        config = uvicorn.Config(Starlette(routes=routes), "127.0.0.1", 0, log_level="critical", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self):
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}/v1"
        return self

    def __exit__(self, *_):
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)

    def wait_for_cancellation(self):
        """Wait until the client has given up a request; how many it has given up."""
        end = time.monotonic() + 30
        while not self.cancelled and time.monotonic() < end:
            time.sleep(0.02)
        return self.cancelled

    async def _answer(self, request):
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(request.headers)
        self.paths.append(request.url.path)
        behaviour = self.behaviours.pop(0) if len(self.behaviours) > 1 else self.behaviours[0]
        try:
            response = behaviour(body)
            if inspect.isawaitable(response):
                response = await self._unless_given_up(request, response)
            if not isinstance(response, StreamingResponse):
                return response
            response.body_iterator = self._watched(response.body_iterator)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return response

    async def _unless_given_up(self, request, answering):
        """Wait for an answer, and note if the client leaves before it."""
        answering = asyncio.ensure_future(answering)
        leaving = asyncio.ensure_future(request.receive())
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            answering.cancel()
            self.cancelled += 1
            return Response()
        leaving.cancel()
        return answering.result()

    async def _watched(self, parts):
        try:
            async for part in parts:
                yield part
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def answer(*texts, honours_n=True, usage=(5, 2), model="fake"):
    """Answers whole, with so many of the texts as were asked for, or with one if `n` is ignored."""

    def behave(body):
        count = body.get("n", 1) if honours_n else 1
        chat = "messages" in body
        choices = [
            {"index": i, "finish_reason": "stop"}
            | ({"message": {"role": "assistant", "content": text}} if chat else {"text": text})
            for i, text in enumerate(texts[:count])
        ]
        counted = {"prompt_tokens": usage[0], "completion_tokens": usage[1] * len(choices)}
        return JSONResponse({"model": model, "choices": choices, "usage": counted})

    return behave


def stream(*texts, honours_n=True, pause=0.0, cut_after=None, done=True, reasons=True, usage=(5, 2)):
    """Streams the texts word by word, side by side; `cut_after` breaks the connection after so many have ended."""

    def behave(body):
        count = min(len(texts), body.get("n", 1) if honours_n else 1)
        chat = "messages" in body

        async def parts():
            words = [text.split(" ") for text in texts[:count]]
            ended = 0
            for place in range(max(map(len, words))):
                for index, own in enumerate(words):
                    if place >= len(own):
                        continue
                    piece = own[place] + (" " if place < len(own) - 1 else "")
                    content = {"delta": {"role": "assistant", "content": piece}} if chat else {"text": piece}
                    is_last = place == len(own) - 1
                    reason = "stop" if is_last and reasons else None
                    yield _event({"model": "fake", "choices": [{"index": index, "finish_reason": reason} | content]})
                    ended += is_last
                    if ended == cut_after:
                        raise ConnectionResetError
                await asyncio.sleep(pause)
            if "stream_options" in body:
                counted = {"prompt_tokens": usage[0], "completion_tokens": usage[1] * count}
                yield _event({"choices": [], "usage": counted})
            if done:
                yield "data: [DONE]\n\n"

        return StreamingResponse(parts(), media_type="text/event-stream")

    return behave


def continues(write, tells="stop_reason", pause=0.0):
    """Continues what the client sends, up to one of its stop texts.

    Args:
        write: takes what there is (the prompt, or the final message of the assistant) and the number of the completion
            among all, and returns how it goes on to its end.
        tells: the field that says which stop text it was; `text`, where the answer includes it; None if nothing does.
        pause: seconds before an answer that continues a completion.
    """
    count = itertools.count()

    def choice(body, index):
        chat = "messages" in body
        final = body["messages"][-1] if chat else {}
        begun = (final["content"] if final["role"] == "assistant" else "") if chat else body["prompt"]
        text = write(begun, 0 if body.get("temperature") == 0 else next(count))
        places = {stop: text.find(stop) for stop in body.get("stop", []) if stop in text}
        stop = min(places, key=places.get, default=None)
        if stop is not None:
            text = text[: places[stop]] + (stop if tells == "text" else "")
        told = {tells: stop} if tells in ("stop_reason", "matched_stop") else {}
        said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        return {"index": index, "finish_reason": "stop"} | said | told

    async def behave(body):
        await asyncio.sleep(pause if "continue_final_message" in body or ";" in body.get("prompt", "") else 0)
        choices = [choice(body, index) for index in range(body.get("n", 1))]
        usage = {"prompt_tokens": 5, "completion_tokens": 2 * len(choices)}
        return JSONResponse({"model": "fake", "choices": choices, "usage": usage})

    return behave


def events(*values):
    """Streams these events as they are."""

    async def parts():
        for value in values:
            yield value if isinstance(value, str) else _event(value)

    return lambda body: StreamingResponse(parts(), media_type="text/event-stream")


def error(status, message="it is broken", headers=None):
    """Answers with an error in OpenAI's shape."""
    return lambda body: JSONResponse({"error": {"message": message}}, status, headers)


def page(text, status=200, kind="text/html"):
    """Answers with a text of another kind."""
    return lambda body: Response(text, status, media_type=kind)


def silence(body):
    """Begins an answer and never goes on."""

    async def parts():
        yield ": thinking\n\n"
        await asyncio.sleep(60)

    return StreamingResponse(parts(), media_type="text/event-stream")


def refuses_several(behaviour, status=400):
    """Refuses requests for more than one completion."""
    return lambda body: error(status, "n must be 1")(body) if body.get("n", 1) > 1 else behaviour(body)


def _event(value):
    return f"data: {json.dumps(value)}\n\n"


@contextlib.contextmanager
def closed_port():
    """The address of a port at which nothing listens."""
    with FakeUpstream(answer("")) as upstream:
        url = upstream.url
    yield url

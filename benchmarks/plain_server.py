"""The simplest server, as a baseline: each request is one run in a thread of FastAPI's pool.

`python -m benchmarks.plain_server ARTIFACT PORT [UPSTREAM THREADS]`; with an upstream it is the simplest gateway,
too: it collects the completions, and ranks them when all have come.
"""

from __future__ import annotations

import sys
from contextlib import aclosing
from typing import Any

import fastapi
import pydantic
import uvicorn
from starlette.concurrency import run_in_threadpool

import bonnx

threads = int(sys.argv[4]) if len(sys.argv) > 4 else None
model = bonnx.load(sys.argv[1], threads=threads) if __name__ == "__main__" else None
upstream = bonnx.Upstream(sys.argv[3], "timed") if len(sys.argv) > 3 else None
app = fastapi.FastAPI()


class RankBody(pydantic.BaseModel):
    """A request, with fields as in `bonnx serve`."""

    prompt: str | list[int]
    candidates: list[str] | list[list[int]] | None = None
    n: int | None = None
    seed: int = 0
    max_new_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0


@app.post("/v1/best-of-n")
def best_of_n(body: RankBody) -> dict[str, Any]:
    assert model is not None
    if body.candidates is not None:
        ranking = model.rank(body.prompt, body.candidates)
        return {"best_index": ranking.best_index, "scores": ranking.candidate_scores.tolist()}
    assert body.n is not None
    options = body.model_dump(include={"n", "seed", "max_new_tokens", "temperature", "top_p"})
    generation = model.generate(body.prompt, **options)
    return {"best_index": generation.best_index, "texts": [candidate.text for candidate in generation.candidates]}


class ChatBody(pydantic.BaseModel):
    """A chat completion of one completion; the other fields of a request are ignored."""

    messages: list[dict[str, str]]
    max_tokens: int
    seed: int
    temperature: float
    top_p: float


@app.post("/v1/chat/completions")
def chat(body: ChatBody) -> dict[str, Any]:
    assert model is not None
    options = body.model_dump(include={"seed", "temperature", "top_p"})
    generation = model.generate(body.messages, n=1, max_new_tokens=body.max_tokens, **options)
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": generation.best.text}}]}


class CompletionsBody(pydantic.BaseModel):
    """A request to the gateway, with fields as in `bonnx serve`."""

    prompt: str
    best_of: int
    user: str


@app.post("/v1/completions")
async def completions(body: CompletionsBody) -> dict[str, Any]:
    assert model is not None
    assert upstream is not None
    async with aclosing(upstream.sample({"prompt": body.prompt, "user": body.user}, body.best_of)) as arrivals:
        texts = [arrival.text async for arrival in arrivals if isinstance(arrival, bonnx.Completion)]
    ranking = await run_in_threadpool(model.rank, body.prompt, texts)
    choice = {"index": 0, "text": texts[ranking.best_index], "finish_reason": "stop"}
    return {"choices": [choice], "scores": ranking.candidate_scores.tolist()}


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[2]), log_level="warning")

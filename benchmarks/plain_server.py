"""The simplest server, as a baseline: each request is one run in a thread of FastAPI's pool.

`python -m benchmarks.plain_server ARTIFACT PORT`
"""

from __future__ import annotations

import sys
from typing import Any

import fastapi
import pydantic
import uvicorn

import bonnx

model = bonnx.load(sys.argv[1]) if __name__ == "__main__" else None
app = fastapi.FastAPI()


class RankBody(pydantic.BaseModel):
    """A request, with fields as in `bonnx serve`."""

    prompt: str | list[int]
    candidates: list[str] | list[list[int]] | None = None
    n: int | None = None
    seed: int = 0


@app.post("/v1/best-of-n")
def best_of_n(body: RankBody) -> dict[str, Any]:
    assert model is not None
    if body.candidates is not None:
        ranking = model.rank(body.prompt, body.candidates)
        return {"best_index": ranking.best_index, "scores": ranking.candidate_scores.tolist()}
    assert body.n is not None
    generation = model.generate(body.prompt, n=body.n, seed=body.seed)
    return {"best_index": generation.best_index, "texts": [candidate.text for candidate in generation.candidates]}


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[2]), log_level="warning")

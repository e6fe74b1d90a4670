"""Time from the last completion's arrival to the answer: `bonnx serve --upstream` and a gateway that ranks at the end.

`python -m benchmarks.gateway artifacts/countdown --large` measures Countdown (puzzles, solutions of about 20 tokens)
and a random model of 85M parameters (prompts of 64 and 512 tokens, completions of 64). This program is the upstream
and the client: for each request it sends 16 completions at random times within --seconds, and notes when it sends the
last. Both gateways receive through `bonnx.Upstream`; the other one (`benchmarks/plain_server.py`) then calls
`model.rank` with all completions. They take turns, each with the same prompts, completions and times.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import httpx
import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from benchmarks.loading import free_port, server
from benchmarks.rates import measure_rates
from benchmarks.record import add_output, record
from bonnx.models.countdown.puzzle import draw_solution

GATEWAYS = ("ranks at the end", "bonnx serve")
VOCABULARY = 1000
# A prompt, and its completions.
Draw: TypeAlias = Callable[[random.Random], tuple[str, list[str]]]


@dataclass(frozen=True)
class Case:
    """What is asked and what the upstream answers: completions with the seconds after which each is sent."""

    prompt: str
    completions: list[tuple[float, str]]


@dataclass
class Upstream:
    """A server that sends the completions of a case, which a request names in its field `user`."""

    cases: list[Case]
    sent: dict[str, float] = field(default_factory=dict)

    async def answer(self, request: Request) -> Response:
        """All completions as events, each whole."""
        body = await request.json()
        return StreamingResponse(self._events(body["user"], int(body["n"])), media_type="text/event-stream")

    async def _events(self, user: str, n: int) -> AsyncIterator[bytes]:
        case, start = self.cases[int(user.split()[0])], time.perf_counter()
        assert n == len(case.completions)
        for index, (seconds, text) in enumerate(case.completions):
            await asyncio.sleep(max(0.0, start + seconds - time.perf_counter()))
            self.sent[user] = time.perf_counter()
            yield _event({"choices": [{"index": index, "text": text, "finish_reason": "stop"}]})
        yield _event({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": n}}) + b"data: [DONE]\n\n"


def _event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


@contextlib.asynccontextmanager
async def serving(upstream: Upstream, port: int) -> AsyncIterator[None]:
    """Run the upstream in this event loop, whose clock and times it shares."""
    routes = [Route("/v1/completions", upstream.answer, methods=["POST"])]
    here = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), port=port, log_level="critical", lifespan="off"))
    # Ctrl-C is this program's.
    here.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    task = asyncio.ensure_future(here.serve())
    while not here.started:
        await asyncio.sleep(0.01)
    yield
    here.should_exit = True
    await task


def draw_cases(
    count: int, n: int, seconds: float, draw: Callable[[random.Random], tuple[str, list[str]]]
) -> list[Case]:
    rng = random.Random(0)
    cases = []
    for _ in range(count):
        prompt, texts = draw(rng)
        cases.append(Case(prompt, list(zip(sorted(rng.uniform(0, seconds) for _ in range(n)), texts, strict=True))))
    return cases


def draw_puzzle(rng: random.Random, n: int) -> tuple[str, list[str]]:
    """A puzzle of Countdown with the solutions of n puzzles."""
    puzzle, solution = draw_solution(rng, 4)
    return puzzle.prompt, [solution, *(draw_solution(rng, 4)[1] for _ in range(n - 1))]


def draw_words(rng: random.Random, n: int, prompt: int, completion: int) -> tuple[str, list[str]]:
    """Words, each of which is one token of the random model."""
    # w0 stands for unknown words.
    words = lambda length: " ".join(f"w{rng.randrange(1, VOCABULARY)}" for _ in range(length))  # noqa: E731
    return words(prompt) + " ", [words(completion) for _ in range(n)]


def random_model(folder: Path) -> Path:
    """Export the 85M model of the other benchmarks with a vocabulary of words and without a vocabulary head."""
    import tokenizers
    import torch

    from bonnx.export.artifact import export_model
    from bonnx.export.checkpoint.tokenizer import TextFiles
    from bonnx.models.config import LanguageModelConfig, NetworkConfig
    from bonnx.models.network import LanguageModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "num_kv_heads": 4, "ffn_inner": 2048}
    network = NetworkConfig(embed_dim=768, scorer_hidden=256, dropout=0.0, **sizes)
    config = LanguageModelConfig(network=network, vocab_size=VOCABULARY, vocabulary_head=False)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    text = TextFiles(
        folder=folder, json=words.to_str().encode(), chat_template=None, special_tokens={}, adds_special_tokens=False
    )
    export_model(LanguageModel(config).eval(), folder / "85M", name="85M", tokenizer=text)
    return folder / "85M"


@contextlib.contextmanager
def gateways(artifact: Path, upstream: int, threads: int) -> Iterator[dict[str, int]]:
    """Start both gateways; gives their ports."""
    url = f"http://127.0.0.1:{upstream}/v1"
    plain, ours = free_port(), free_port()
    served = ["-m", "bonnx", "serve", str(artifact), "--port", str(ours), "--threads", str(threads), "--timeout", "120"]
    served += ["--upstream", url, "--upstream-model", "timed", "--served-model-name", "timed"]
    command = ["-m", "benchmarks.plain_server", str(artifact), str(plain), url, str(threads)]
    with server(served, ours, "/health"), server(command, plain, "/health"):
        yield dict(zip(GATEWAYS, (plain, ours), strict=True))


async def measure(ports: dict[str, int], upstream: Upstream, port: int, n: int) -> dict[str, list[float]]:
    """Seconds from the last completion to the answer, of each gateway for each case; the first case warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ports}
    async with serving(upstream, port), httpx.AsyncClient(timeout=120) as client:
        for number, case in enumerate(upstream.cases):
            best = {}
            for name in GATEWAYS if number % 2 else GATEWAYS[::-1]:
                user = f"{number} {name}"
                body = {"model": "timed", "prompt": case.prompt, "best_of": n, "user": user}
                response = await client.post(f"http://127.0.0.1:{ports[name]}/v1/completions", json=body)
                took = time.perf_counter() - upstream.sent[user]
                if response.status_code != 200:
                    raise SystemExit(f"{name}: {response.status_code} {response.text[:500]}")
                best[name] = response.json()["choices"][0]["text"]
                if number:
                    seconds[name].append(took)
            if len(set(best.values())) > 1:
                print(f"case {number}: the gateways chose differently: {best}")
    return seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("countdown", type=Path, metavar="ARTIFACT", nargs="?", help="artifact of Countdown")
    parser.add_argument("--large", action="store_true", help="also measure a random model of 85M parameters")
    parser.add_argument("--large-artifact", type=Path, metavar="DIR", help="where that model is, or is to be exported")
    parser.add_argument("--requests", type=int, default=50, help="for each gateway (default: %(default)s)")
    parser.add_argument("-n", type=int, default=16, help="completions of a request (default: %(default)s)")
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 512], help="the large model's, in tokens")
    parser.add_argument(
        "--seconds", type=float, default=2, help="within which the completions arrive (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=2, help="of each gateway's model (default: %(default)s)")
    add_output(parser)
    arguments = parser.parse_args()
    n, figures = arguments.n, []
    print("| model | prompt, tokens | gateway | p50, ms | p99, ms | ranks at the end takes |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        rows: list[tuple[str, Path, str, Draw]] = []
        if arguments.countdown is not None:
            rows.append(("Countdown", arguments.countdown, "11 to 14", lambda rng: draw_puzzle(rng, n)))
        if arguments.large:
            folder = arguments.large_artifact or Path(place)
            large = folder / "85M" if (folder / "85M").exists() else random_model(folder)
            for length in arguments.prompts:
                draw = lambda rng, length=length: draw_words(rng, n, length, 64)  # noqa: E731
                rows.append(("85M", large, str(length), draw))
        for model, artifact, length, draw in rows:
            upstream, port = Upstream(draw_cases(arguments.requests + 1, n, arguments.seconds, draw)), free_port()
            with gateways(artifact, port, arguments.threads) as ports:
                seconds = asyncio.run(measure(ports, upstream, port, n))
            end = np.median(seconds[GATEWAYS[0]])
            for name in GATEWAYS:
                p50, p99 = 1e3 * np.percentile(seconds[name], [50, 99])
                ratio = f"{end / np.median(seconds[name]):.1f} times as long"
                print(f"| {model} | {length} | {name} | {p50:.1f} | {p99:.1f} | {ratio} |", flush=True)
                figure = {"way": name, "model": model, "prompt": length, "n": n, "within_seconds": arguments.seconds}
                figures.append(figure | {"requests": arguments.requests, "p50_ms": float(p50), "p99_ms": float(p99)})
    record("gateway", figures, rates=measure_rates(arguments.threads), path=arguments.output)


if __name__ == "__main__":
    main()

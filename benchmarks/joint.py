"""What a run of `rank` costs beside its tokens: the constant by which `runtime/batching.py` joins requests on the CPU.

`python -m benchmarks.joint ARTIFACT ...` runs prompts with candidates of random ids on one thread, alone and several
together, and fits processor time = fixed + per token * tokens to the medians. Processor time, because other work on
the machine hardly changes it. `CALL_TOKENS` is the ratio.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from benchmarks.record import add_output, record
from bonnx.runtime.engine.engine import Engine, open_engine
from bonnx.runtime.rank.request import read_request
from bonnx.runtime.rank.run import run_together

# Tokens of a prompt, candidates, tokens of each, and prompts of a run.
SIZES = [(6, 1, 6, 1), (6, 1, 6, 2), (6, 1, 6, 4), (12, 2, 10, 1), (12, 2, 10, 4), (12, 4, 20, 1), (12, 4, 20, 4)]


def seconds(engine: Engine, size: tuple[int, int, int, int], repeats: int) -> float:
    """Median processor time of a run."""
    rng, (prompt, candidates, length, count) = np.random.default_rng(0), size
    draw = lambda tokens: rng.integers(0, engine.manifest.size("vocab_size"), tokens).tolist()  # noqa: E731
    requests = [read_request(engine, draw(prompt), [draw(length) for _ in range(candidates)]) for _ in range(count)]
    taken = []
    for _ in range(repeats + 1):
        start = time.process_time()
        run_together(engine, requests)
        taken.append(time.process_time() - start)
    return float(np.median(taken[1:]))


def main() -> None:
    """Print one row for each artifact."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", nargs="+")
    parser.add_argument("--repeats", type=int, default=15)
    add_output(parser)
    arguments = parser.parse_args()
    figures = []
    print("| model | fixed, ms | a token, ms | fixed, tokens |\n|---|---|---|---|")
    for artifact in arguments.artifact:
        engine = open_engine(artifact, provider="cpu", threads=1)
        tokens = np.array([count * (prompt + n * length) for prompt, n, length, count in SIZES])
        taken = np.array([seconds(engine, size, arguments.repeats) for size in SIZES])
        # Relative errors: small runs count as much as large ones.
        (fixed, each), *_ = np.linalg.lstsq(np.stack([1 / taken, tokens / taken], 1), np.ones(len(SIZES)), rcond=None)
        name = engine.manifest.name
        print(f"| {name} | {1e3 * fixed:.2f} | {1e3 * each:.4f} | {fixed / each:.0f} |", flush=True)
        figures.append({"model": name, "fixed_seconds": fixed, "token_seconds": each, "fixed_tokens": fixed / each})
    record("joint", figures, path=arguments.output)


if __name__ == "__main__":
    main()

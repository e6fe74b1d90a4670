"""Rows of files for the tests of `bonnx batch`."""

import json

import pyarrow as pa
import pytest

from bonnx.runtime.batch import here, run_batch

ROW = {"prompt": [1, 2], "candidates": [[3], [4, 5]]}
LISTS = pa.list_(pa.list_(pa.int64()))


def draw_row(rng, number):
    candidates = [rng.integers(0, 130, rng.integers(1, 9)).tolist() for _ in range(rng.integers(1, 5))]
    prompt = rng.integers(0, 130, rng.integers(1, 12)).tolist()
    return {
        "id": number,
        "prompt": prompt,
        "candidates": candidates,
        "note": "é\u2028\n",
        "big": 2**70,
        "x": {"y": [1.5]},
    }


def dump(value):
    return json.dumps(value).encode()


def write(path, rows):
    with path.open("wb") as file:
        for row in rows:
            file.write(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def interrupted(task, output, at, error, **options):
    """Stop a run after so many chunks."""

    def work(task, chunks):
        for number, result in enumerate(here(task, chunks)):
            if number == at:
                raise error
            yield result

    with pytest.raises(type(error)):
        run_batch(task, output, work, rows=8, **options)

"""The small language model, and one call that ranks rows and returns what came out."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

import bonnx
from bonnx.runtime.batch import Task, run_batch
from bonnx.runtime.batch.worker import Worker
from bonnx.runtime.engine.engine import open_engine


@pytest.fixture(scope="module")
def engine(tiny):
    return open_engine(tiny)


@pytest.fixture(scope="module")
def model(tiny):
    return bonnx.load(tiny)


@pytest.fixture
def batch(tiny, engine, tmp_path):
    """Rank lines of JSON, or a table; what came out, and the reasons of the rows that are bad."""

    def batch(rows, **options):
        table = isinstance(rows, pa.Table)
        kind = "parquet" if table else "jsonl"
        source, output = tmp_path / f"rows.{kind}", tmp_path / f"out.{kind}"
        if table:
            parquet.write_table(rows, source, row_group_size=2)
        else:
            source.write_bytes(rows if isinstance(rows, bytes) else b"\n".join(rows))
        worker = Worker(Task(artifact=str(tiny), source=str(source), **options), engine)
        summary = run_batch(worker.task, output, lambda _, chunks: map(worker, chunks), rows=3, overwrite=True)
        path = output.with_name(f"{output.name}.errors.jsonl")
        errors = [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
        ranked = parquet.ParquetFile(output).read() if table else output.read_bytes().split(b"\n")[:-1]
        assert (len(ranked), len(errors)) == (summary.rows, summary.bad)
        assert all(error["reason"] for error in errors)
        return ranked, {error["line"]: error["reason"] for error in errors}

    return batch

"""An output has one writer."""

import fcntl
import os
import threading
from collections import Counter

import pytest

import bonnx
from bonnx.runtime.batch import Task, here, run_batch
from bonnx.runtime.batch.output import Output, _take
from tests.runtime.batch.rows import draw_row, write


def test_two_runs_do_not_write_one_file(tiny, rng, tmp_path):
    source, output = write(tmp_path / "rows.jsonl", [draw_row(rng, 0)]), tmp_path / "out.jsonl"
    with Output(output, {}, overwrite=False), pytest.raises(bonnx.InputError, match="another run is writing it"):
        run_batch(Task(artifact=str(tiny), source=str(source)), output, here)


def test_one_lock_has_one_holder(tmp_path):
    """Many take a lock, see who else holds it, remove it and let it go, as runs do at their ends."""
    path, holders, together, taken = tmp_path / "o.lock", Counter(), [], Counter()

    def run(number):
        while taken[number] < 60:
            try:
                lock = _take(path, tmp_path / "o")
            except bonnx.InputError:
                continue
            holders[number] = 1
            together.append(sum(holders.values()))
            holders[number] = 0
            taken[number] += 1
            path.unlink()
            lock.close()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(together) == {1}
    assert not path.exists()


def test_a_lock_that_was_removed_while_it_was_opened_is_taken_anew(tmp_path, monkeypatch):
    path, real, calls = tmp_path / "o.lock", fcntl.flock, []

    def flock(file, how):
        if not calls:
            path.unlink()
        calls.append(how)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with _take(path, tmp_path / "o") as lock:
        assert len(calls) == 2
        assert os.path.samestat(os.fstat(lock.fileno()), path.stat())
        with pytest.raises(bonnx.InputError, match="another run is writing it"):
            _take(path, tmp_path / "o")

    def without(file, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    with pytest.raises(bonnx.InputError, match=r"o\.jsonl: cannot be written: No locks available"):
        Output(tmp_path / "o.jsonl", {}, overwrite=False)

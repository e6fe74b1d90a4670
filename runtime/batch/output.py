"""The output while it grows, and the journal from which an interrupted run resumes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from pathlib import Path
from typing import IO

import msgspec

from bonnx.errors import BonnxError, InputError

from ..artifact.decode_json import decode_json
from .tables import join
from .worker import ChunkResult

__all__ = ["Journal", "Output"]

_SECONDS = 1.0


class Journal(msgspec.Struct, forbid_unknown_fields=True):
    """How much of a run is done and on the disk.

    Attributes:
        identity: everything that the output depends on: a run resumes only one of equal identity.
        chunks: number of chunks that are done.
        rows: number of rows that were ranked.
        bad: number of rows that were not.
        output: bytes of the output, if it is JSON lines.
        errors: bytes of the errors.
        done: every chunk is done, and the parts only have to be moved into place.
    """

    identity: dict[str, object]
    chunks: int = 0
    rows: int = 0
    bad: int = 0
    output: int = 0
    errors: int = 0
    done: bool = False


class Output:
    """Writes results in their order. Use it as a context.

    `OUT.part` grows (of Parquet a folder of parts) beside `OUT.errors.part`; `OUT.progress` says how much of them is
    done. At the end they become `OUT` and, if there are any, `OUT.errors.jsonl`.

    Args:
        path: of the output.
        identity: see `Journal`.
        overwrite: start again, and replace an existing output.

    Raises:
        InputError: the output exists, another run is writing it, or its parts belong to another run.
    """

    def __init__(self, path: Path, identity: dict[str, object], *, overwrite: bool) -> None:
        self.path, self._parquet = path, path.suffix == ".parquet"
        self._part, self._errors, self._joined_parts = (
            path.with_name(path.name + end) for end in (".part", ".errors.part", ".joined.part")
        )
        self._progress = path.with_name(path.name + ".progress")
        self._lock: IO[bytes] | None = None
        self._saved, self._due = 0, 0.0
        self.journal = Journal(identity)
        if not path.parent.is_dir():
            raise InputError(f"{path.parent}: there is no such folder")
        if os.path.isdir(path):
            raise InputError(f"{path}: it is a folder; expected the name of a file")
        try:
            self._lock = _take(path.with_name(path.name + ".lock"), path)
            self._begin(overwrite)
        except OSError as e:
            self.close()
            raise InputError(f"{path}: cannot be written: {e.strerror or e}; choose a folder that can be") from e
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Keep what is done for the next start."""
        for file in (getattr(self, "_file", None), getattr(self, "_error_file", None), self._lock):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()

    def add(self, result: ChunkResult) -> None:
        """The next chunk's result.

        Raises:
            BonnxError: it cannot be written.
        """
        assert result.number == self.journal.chunks, "results come in their order"
        try:
            if self._parquet:
                (self._part / f"{result.number:012}").write_bytes(result.output)
            else:
                self._file.write(result.output)
            self._error_file.write(result.errors)
            self.journal.chunks += 1
            self.journal.rows += result.rows
            self.journal.bad += result.bad
            self.journal.output += len(result.output)
            self.journal.errors += len(result.errors)
            if time.monotonic() > self._due:
                self.save()
        except OSError as e:
            raise BonnxError(
                f"{self.path}: cannot be written: {e.strerror or e}; free some space and start again: the run resumes"
            ) from e

    def save(self) -> None:
        """Write everything to the disk, then the journal that says so."""
        if not self._parquet:
            _sync(self._file)
        else:
            for number in range(self._saved, self.journal.chunks):
                with (self._part / f"{number:012}").open("rb") as file:
                    os.fsync(file.fileno())
            _sync_folder(self._part)
        _sync(self._error_file)
        new = self._progress.with_name(self._progress.name + ".new")
        with new.open("wb") as file:
            file.write(msgspec.json.encode(self.journal))
            _sync(file)
        new.replace(self._progress)
        _sync_folder(self.path.parent)
        self._saved, self._due = self.journal.chunks, time.monotonic() + _SECONDS

    def finish(self) -> None:
        """Make the parts the output, once every chunk is done. If that is interrupted, the next start repeats it.

        Raises:
            BonnxError: it cannot be written.
        """
        try:
            if not self.journal.done:
                self.journal.done = True
                self.save()
            self._place()
        except OSError as e:
            raise BonnxError(
                f"{self.path}: cannot be written: {e.strerror or e}; free some space and start again: the run resumes"
            ) from e

    def _place(self) -> None:
        if self._parquet and self._part.is_dir():
            joined = self.path.with_name(self.path.name + ".joined")
            join([self._part / f"{number:012}" for number in range(self.journal.chunks)], joined)
            joined.replace(self.path)
            # Under another name first: a folder with some of its parts would look like a run whose parts are gone.
            self._part.replace(self._joined_parts)
        elif self._part.is_file():
            self._part.replace(self.path)
        _remove(self._joined_parts)
        final = self.path.with_name(self.path.name + ".errors.jsonl")
        if self.journal.bad and self._errors.is_file():
            self._errors.replace(final)
        elif not self.journal.bad:
            final.unlink(missing_ok=True)
        self._errors.unlink(missing_ok=True)
        _sync_folder(self.path.parent)
        # Last: until this is done, a start repeats all of the above.
        self._progress.unlink()
        # The lock is still held: a run that opened the file before finds that it is no longer the file of this name.
        self.path.with_name(self.path.name + ".lock").unlink(missing_ok=True)

    def _begin(self, overwrite: bool) -> None:
        if overwrite:
            for path in (self._progress, self._errors, self._part, self._joined_parts):
                _remove(path)
        elif self._progress.is_file():
            self._resume()
            if self.journal.done:
                return
        elif self.path.exists():
            raise InputError(f"{self.path} exists; choose another file, or pass --overwrite")
        if not self._progress.is_file():
            _remove(self._part)
        if self._parquet:
            self._part.mkdir(exist_ok=True)
            there = {int(path.name): path for path in self._part.iterdir() if path.name.isdecimal()}
            if missing := [number for number in range(self.journal.chunks) if number not in there]:
                raise InputError(
                    f"{self._part}: part {missing[0]} is gone: something else changed it; pass --overwrite"
                )
            for number, path in there.items():
                if number >= self.journal.chunks:
                    path.unlink()
        else:
            self._file = _open_at(self._part, self.journal.output)
        self._error_file = _open_at(self._errors, self.journal.errors)
        self._saved = self.journal.chunks
        self.save()

    def _resume(self) -> None:
        identity = self.journal.identity
        try:
            self.journal = decode_json(self._progress.read_bytes(), Journal)
        except msgspec.MsgspecError as e:
            raise InputError(f"{self._progress} cannot be read: {e}; pass --overwrite to start again") from e
        old = self.journal.identity
        differs = [name for name in {**old, **identity} if old.get(name) != json.loads(json.dumps(identity.get(name)))]
        if differs:
            changes = "; ".join(f"{name} was {old.get(name)!r}, is {identity.get(name)!r}" for name in sorted(differs))
            raise InputError(
                f"{self.path}: the parts that exist were made with other settings ({changes}); resume with the "
                "same, or pass --overwrite"
            )


def _open_at(path: Path, size: int) -> IO[bytes]:
    """A file to append to, cut to a size.

    Raises:
        InputError: it is shorter.
    """
    file = path.open("ab")
    if path.stat().st_size < size:
        file.close()
        raise InputError(f"{path} is shorter than its journal says: something else changed it; pass --overwrite")
    file.truncate(size)
    return file


def _take(path: Path, output: Path) -> IO[bytes]:
    """The lock of an output, held until it is closed.

    Raises:
        InputError: another run holds it.
        OSError: it cannot be made, or this file system has no locks.
    """
    while True:
        lock = path.open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The run that held it may have removed it after it was opened here: and the name may be another file's now.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                    return lock
        except BlockingIOError as e:
            lock.close()
            raise InputError(f"{output}: another run is writing it") from e
        except BaseException:
            lock.close()
            raise
        lock.close()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

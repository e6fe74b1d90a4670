"""Ctrl-C ends whatever runs, soon and with one line; nothing is left half-written. A reader may leave at any time."""

import os
import subprocess
import sys

import pytest

from tests.signals import interrupt

PUZZLE = "3,7,12,25>98:"
SOON = 3.0  # a second, on a machine that does other things too
BEGUN = "print('begun', flush=True)"


def check_stopped(ended, name):
    assert (ended.code, ended.stderr.splitlines()[-1:]) == (130, [f"bonnx {name}: stopped"]), ended
    assert "Traceback" not in ended.stderr
    assert ended.seconds < SOON


# Says when the first run of ONNX Runtime begins, which would take much longer than the test.
TOLD = """
import sys, bonnx
from bonnx.runtime.engine.session import Session
run = Session.run
def told(self, *arguments):
    Session.run = run
    print("begun", flush=True)
    return run(self, *arguments)
Session.run = told
"""


def test_generate(countdown):
    command = ["generate", str(countdown), PUZZLE, "-n", "4096", "--json"]
    code = f"{TOLD}sys.argv[1:] = {command!r}\nfrom bonnx.__main__ import main\nsys.exit(main())"
    check_stopped(interrupt(["-c", code], after=None), "generate")


def test_a_program_that_generates(countdown):
    code = f"""{TOLD}
model = bonnx.load({str(countdown)!r})
try:
    model.generate({PUZZLE!r}, n=4096)
except KeyboardInterrupt:
    # The model is still good.
    print(len(model.generate({PUZZLE!r}, n=2, max_new_tokens=3).candidates))
"""
    ended = interrupt(["-c", code], after=None)
    assert (ended.code, ended.stdout, ended.stderr) == (0, "begun\n2\n", "")
    assert ended.seconds < SOON


def test_export(tmp_path, rng):
    """At any moment, imports included."""
    for seconds in rng.uniform(0.5, 6, 2):
        ended = interrupt(["-m", "bonnx", "export", "-o", tmp_path / "artifact"], after=seconds)
        check_stopped(ended, "export")
        assert list(tmp_path.iterdir()) == []


# A library's loop that knows nothing of Python's signals.
STUCK = """
import hashlib, pathlib
from bonnx.command.interrupt import interruptible
from bonnx.runtime.artifact.unfinished import unfinished
part = pathlib.Path("part")
with interruptible("bonnx export: stopped"), unfinished(part):
    part.write_text("half")
    print("begun", flush=True)
    while True:
        try:
            hashlib.pbkdf2_hmac("sha256", b"", b"", ROUNDS)
        except KeyboardInterrupt:
            pass
"""


@pytest.mark.parametrize(("times", "rounds"), [(1, 10**9), (2, 1000)])
def test_what_does_not_notice_is_ended_from_outside(tmp_path, times, rounds):
    """After a moment; or at the second Ctrl-C, where the first was swallowed."""
    ended = interrupt(["-c", STUCK.replace("ROUNDS", str(rounds))], after=None, times=times, cwd=tmp_path)
    check_stopped(ended, "export")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["inspect", "rank", "generate", "--help"])
def test_a_reader_that_leaves(countdown, tmp_path, command):
    (tmp_path / "candidates").write_text("12-3=9;\n" * 300)
    arguments = {
        "rank": [countdown, "--prompt", PUZZLE, "--candidates", tmp_path / "candidates", "--json"],
        "generate": [countdown, PUZZLE, "-n", "4"],
    }.get(command, [] if command.startswith("-") else [countdown])
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "bonnx", command, *arguments],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=100,
        check=False,
    )
    os.close(write)
    assert done.stderr == ""
    # Help and rich's console have a way of their own.
    assert done.returncode in (141, {"generate": 1}.get(command, 0 if command.startswith("-") else 141))


@pytest.mark.skipif(os.name != "posix", reason="needs a shell that closes streams")
@pytest.mark.parametrize(
    ("closed", "code", "said"),
    [("<&-", 2, "bonnx rank: --candidates: cannot read -: standard input is closed\n"), ("2>&-", 2, "")],
)
def test_streams_that_are_closed(countdown, closed, code, said):
    command = f'echo | "{sys.executable}" -m bonnx rank "{countdown}" --prompt 1 --candidates - {closed}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", said)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_disk_that_is_full(countdown):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "bonnx", "inspect", countdown]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "bonnx inspect: [Errno 28] No space left on device\n"


# ONNX Runtime makes an ImportError of its own of a Ctrl-C while it is loaded.
LOADING = """
import os, signal, sys
try:
    os.kill(os.getpid(), signal.SIGINT)
    print("after")
except KeyboardInterrupt:
    raise ImportError("initialization failed")
"""


def test_an_import_that_is_interrupted_is_no_broken_installation(countdown, tmp_path):
    (tmp_path / "onnxruntime.py").write_text(LOADING)
    done = subprocess.run(
        [sys.executable, "-m", "bonnx", "generate", countdown, PUZZLE, "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "bonnx generate: stopped\n")


# A type that msgspec looks up while the signal arrives.
DECODING = """
import os, signal, threading, time
import msgspec
from bonnx.runtime.artifact import decode_json
threads = []
def hook(kind, value):
    threads.append(threading.current_thread())
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.3)
    return kind(value)
class Number(int): pass
class Counted(msgspec.Struct):
    number: Number
decode = msgspec.json.decode
msgspec.json.decode = lambda text, type: decode(text, type=type, dec_hook=hook)
try:
    decode_json.decode_json(b'{"number": 1}', Counted)
except KeyboardInterrupt:
    print("stopped", threads[0] is threading.main_thread())
"""


def test_decoding_is_not_interrupted():
    done = subprocess.run([sys.executable, "-c", DECODING], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "stopped False\n", "")

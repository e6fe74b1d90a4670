"""Processes that are told to stop."""

import signal
import subprocess
import sys
import time
from dataclasses import dataclass


@dataclass
class Ended:
    code: int
    seconds: float
    stdout: str
    stderr: str


def interrupt(command, *, after, cwd=None, times=1):
    """Start Python with these arguments, press Ctrl-C after so many seconds, or soon after it has written a line."""
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, **piped) as process:
        try:
            said = "" if after is not None else process.stdout.readline()
            # What it said it would do begins a moment after.
            time.sleep(0.3 if after is None else after)
            start = time.monotonic()
            for _ in range(times):
                process.send_signal(signal.SIGINT)
                time.sleep(0.05)
            stdout, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
    return Ended(process.returncode, time.monotonic() - start, said + stdout, stderr)

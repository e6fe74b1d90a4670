"""The installed `bonnx` command, in a process and a folder of its own."""

import shutil
import subprocess
import sys
from pathlib import Path

COMMAND = shutil.which("bonnx", path=str(Path(sys.executable).parent)) or shutil.which("bonnx")


def run(folder, *arguments, given=None):
    """The finished process; `given` is its standard input."""
    assert COMMAND, "the bonnx command is not installed"
    command = [COMMAND, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, input=given, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done

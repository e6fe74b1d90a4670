"""Servers for tests: in a thread of this process, or the installed command."""

import contextlib
import json
import re
import subprocess
import sys
import threading
import time

from bonnx.runtime.serve import create_app
from bonnx.runtime.serve.server import make_server

COMMAND = [sys.executable, "-m", "bonnx", "serve"]


@contextlib.contextmanager
def served(engine, settings=None):
    """The address of a real server in this process, so that a test may reach into its engine."""
    app = create_app(engine, settings)
    server = make_server(app, "127.0.0.1", 0, grace=5)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


class Process:
    """`bonnx serve` as a user runs it.

    Attributes:
        url: where it listens.
        lines: what it logged so far, as objects.
    """

    def __init__(self, artifact, *options, env=None, cwd=None):
        self.popen = subprocess.Popen(
            [*COMMAND, str(artifact), "--port", "0", *options], stderr=subprocess.PIPE, text=True, env=env, cwd=cwd
        )
        self.lines, self.url, self._ready = [], None, threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._ready.wait(60), "the server did not start"
        assert self.url is not None, self.lines

    def _read(self):
        for line in self.popen.stderr:
            self.lines.append(json.loads(line) if line.startswith("{") else {"text": line})
            found = re.search(r"running on (http://\S+)", self.lines[-1].get("message", ""))
            if found:
                self.url = found[1]
                self._ready.set()
        self._ready.set()

    def stop(self, signal):
        """Its exit code, after everything it logged has been read."""
        self.popen.send_signal(signal)
        code = self.popen.wait(60)
        self._reader.join(10)
        return code

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        self._reader.join(10)
        self.popen.stderr.close()

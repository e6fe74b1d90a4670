"""A hub on this machine: the part of the API that a download uses, for one repository."""

import contextlib
import hashlib
import json
import os
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REPO = "org/tiny-reward"


@contextlib.contextmanager
def serve():
    """The hub, until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = Hub(url=f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass
class Hub:
    """What the hub holds, what was asked of it, and how it misbehaves.

    Attributes:
        branches: name -> commit.
        commits: commit -> {path: content}.
        token: without it the repository is gated; None: open to all.
        cut: path whose connection is cut in the middle, and which the hub no longer serves afterwards.
        asked: paths whose content was asked for.
    """

    branches: dict = field(default_factory=dict)
    commits: dict = field(default_factory=dict)
    token: str | None = None
    cut: str | None = None
    asked: list = field(default_factory=list)
    url: str = ""

    def push(self, files, branch="main"):
        sha = hashlib.sha1(os.urandom(16)).hexdigest()
        self.commits[sha], self.branches[branch] = dict(files), sha
        return sha


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        api, page = f"/api/models/{REPO}/", f"/{REPO}/resolve/"
        if not path.startswith((api, page)):
            return self.refuse(404, "RepoNotFound")
        if hub.token is not None and self.headers["Authorization"] != f"Bearer {hub.token}":
            return self.refuse(403, "GatedRepo")
        kind, _, rest = path.removeprefix(api).partition("/") if path.startswith(api) else ("", "", path[len(page) :])
        # A branch may have slashes in its name, as refs/pr/1 has.
        first = rest.partition("/")[0]
        revision = next((b for b in hub.branches if f"{rest}/".startswith(f"{b}/")), first)
        name = rest[len(revision) + 1 :]
        sha = hub.branches.get(revision, revision)
        if sha not in hub.commits:
            return self.refuse(404, "RevisionNotFound")
        files = hub.commits[sha]
        if kind == "revision":
            return self.answer({"id": REPO, "sha": sha, "siblings": [{"rfilename": name} for name in files]})
        if kind == "tree":
            return self.answer(
                [{"type": "file", "path": n, "size": len(c), "oid": _blob(c)} for n, c in sorted(files.items())]
            )
        if name not in files:
            return self.refuse(404, "EntryNotFound")
        return self.serve(name, files[name], sha)

    def serve(self, name, content, sha):
        hub = self.server.hub
        if self.command == "GET":
            if hub.cut == name and name in hub.asked:
                return self.refuse(503, "Down")
            hub.asked.append(name)
        whole = len(content)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
        self.send_header("X-Repo-Commit", sha)
        self.send_header("ETag", f'"{_blob(content)}"')
        self.send_header("Content-Length", str(whole - start))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[start : whole // 2 if hub.cut == name else None])
            self.close_connection = hub.cut == name

    def answer(self, value):
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def _blob(content):
    """Name of a file's content, as git computes it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

"""A server for looking at a page on this machine: static files, with the headers that threads need."""

from __future__ import annotations

import http.server
from pathlib import Path
from typing import Any

__all__ = ["make_server"]


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Static files of one folder."""

    # Connections stay open: a page has many small files.
    protocol_version = "HTTP/1.1"

    extensions_map = {  # noqa: RUF012
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".js": "text/javascript",
        ".wasm": "application/wasm",
        ".json": "application/json",
    }

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the files of a page are many."""


def make_server(folder: Path, port: int) -> http.server.ThreadingHTTPServer:
    """A server that listens on this machine only; `serve_forever` runs it. Port 0 takes any free one."""

    def handler(*args: Any) -> _Handler:
        return _Handler(*args, directory=str(folder))

    return http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)

"""`bonnx page`: a page that runs a model in the visitor's browser."""

from __future__ import annotations

import argparse
from pathlib import Path

from bonnx.runtime.page import write_page
from bonnx.runtime.page.serve import make_server

from ..errors import InputError
from . import print_json

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("artifact", metavar="ARTIFACT", help="folder of a language model")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier page")
    parser.add_argument("--curve", metavar="FILE", help="show accuracy against N: a report.json as Countdown has")
    parser.add_argument(
        "--packages",
        metavar="DIR",
        help="folder node_modules with onnxruntime-web and the tokenizers; by default npm fetches them",
    )
    parser.add_argument(
        "--webgpu",
        action="store_true",
        help="let the page use WebGPU where a browser has it, and it chooses the same winner in less time (27 MB more)",
    )
    parser.add_argument(
        "--serve",
        nargs="?",
        type=int,
        const=8080,
        metavar="PORT",
        help="serve the page on this machine until Ctrl-C; without a number on port 8080",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the page; perhaps serve it."""
    page = write_page(
        Path(arguments.artifact),
        Path(arguments.output),
        curve=None if arguments.curve is None else Path(arguments.curve),
        packages=None if arguments.packages is None else Path(arguments.packages),
        webgpu=arguments.webgpu,
        overwrite=arguments.overwrite,
    )
    if arguments.json:
        print_json({"ok": True, "output": str(page.folder), "bytes": page.bytes, "model_bytes": page.model_bytes})
    else:
        print(f"wrote {page.folder}: {page.bytes / 1e6:.0f} MB, of which the model is {page.model_bytes / 1e6:.0f} MB")
    if arguments.serve is None:
        return 0
    try:
        server = make_server(page.folder, arguments.serve)
    except OSError as e:
        raise InputError(f"port {arguments.serve}: {e.strerror or e}; choose another one") from e
    print(f"http://localhost:{server.server_address[1]}/ (Ctrl-C ends)", flush=True)
    with server:
        server.serve_forever()
    return 0

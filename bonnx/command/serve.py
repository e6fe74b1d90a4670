"""`bonnx serve`: a model behind HTTP."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
from pathlib import Path

from bonnx.runtime.artifact.folder import read_verified
from bonnx.runtime.engine.engine import open_engine
from bonnx.runtime.serve import Settings, create_app
from bonnx.runtime.serve.server import bind_to, log_to_stderr, make_server

from ..errors import InputError
from . import add_cache_dir
from .ray_cluster import add_ray_address, join_cluster, not_installed, warn_if_too_large
from .upstream import add_upstream, upstream_settings

__all__ = ["configure", "run", "settings_of"]

_KEY = "BONNX_API_KEY"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    default = Settings()
    parser.add_argument("artifact", help="folder that `bonnx export` wrote")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; the default accepts connections from this machine only",
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="port to listen on; 0 takes a free one, which the log names"
    )
    parser.add_argument(
        "--api-key-file", type=Path, help=f"file with the key that clients must send; or set {_KEY} in the environment"
    )
    parser.add_argument("--provider", choices=["auto", "cpu", "cuda"], default="auto", help="where the model runs")
    parser.add_argument("--threads", type=int, help="CPU threads of one run; by default one for each physical core")
    add_cache_dir(parser)
    parser.add_argument(
        "--memory-limit", type=int, metavar="BYTES", help="memory that one run may take; unlimited by default"
    )
    bounds = (
        ("timeout", float, "SECONDS", "maximum time for a request"),
        ("body-timeout", float, "SECONDS", "maximum time for a body to arrive"),
        ("max-body", int, "BYTES", "maximum size of a request's body"),
        (
            "max-tokens",
            int,
            "TOKENS",
            "maximum size of a request, including padding and everything that it may generate",
        ),
        ("max-queue", int, "REQUESTS", "maximum number of waiting requests; further ones are answered with 429"),
        ("max-searches", int, "SEARCHES", "maximum number of searches by the model that run at once"),
        ("batch-tokens", int, "TOKENS", "maximum size of rankings that run together"),
        ("batch-candidates", int, "CANDIDATES", "maximum number of candidates that grow in one batch"),
        (
            "generation-memory",
            int,
            "BYTES",
            "maximum size of the keys and values of all generations that run at once; others wait",
        ),
        ("prompt-cache", int, "BYTES", "keys and values of prompts and their beginnings to keep for the next requests"),
        ("batch-wait", float, "SECONDS", "time to wait for more requests while the model is idle"),
    )
    for name, kind, unit, what in bounds:
        value = getattr(default, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=kind, metavar=unit, default=value, help=what)
    _add_completions(parser, default)
    _add_ray(parser)
    parser.add_argument(
        "--max-connections",
        type=int,
        default=1024,
        help="maximum number of connections; further ones are answered with 503",
    )
    parser.add_argument(
        "--grace", type=int, default=30, metavar="SECONDS", help="time to finish requests in when the server is stopped"
    )


def _add_ray(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ray", action="store_true", help="serve on Ray: replicas, each with its own limits and queues"
    )
    add_ray_address(parser)
    parser.add_argument(
        "--every-node",
        action="store_true",
        help="listen on every node of the cluster that has a replica; by default on its head node",
    )
    parser.add_argument("--replicas", type=int, default=1, help="minimum number of replicas on Ray")
    parser.add_argument(
        "--max-replicas", type=int, help="maximum number of replicas on Ray, by load; by default as many as --replicas"
    )
    parser.add_argument(
        "--scale-up-after",
        type=float,
        metavar="SECONDS",
        default=30.0,
        help="time of more load after which Ray adds replicas",
    )
    parser.add_argument(
        "--scale-down-after",
        type=float,
        metavar="SECONDS",
        default=600.0,
        help="time of less load after which Ray removes replicas",
    )
    parser.add_argument("--replica-gpus", type=float, default=0, help="GPUs of each replica; above 0 it runs on CUDA")


def _add_completions(parser: argparse.ArgumentParser, default: Settings) -> None:
    parser.add_argument("--served-model-name", metavar="NAME", help="how clients name the model; by default as it is")
    parser.add_argument(
        "--best-of",
        type=int,
        metavar="N",
        default=default.best_of,
        help="completions to sample for a chat or text completion that does not say how many",
    )
    add_upstream(parser)
    parser.add_argument(
        "--cors-origin", action="append", metavar="ORIGIN", help="web page that may call the server; may be repeated"
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until the process gets a signal."""
    settings = settings_of(arguments)
    if arguments.host not in ("127.0.0.1", "localhost", "::1") and settings.api_key is None:
        print(
            f"bonnx serve: anyone who can reach {arguments.host} can use this server; see --api-key-file",
            file=sys.stderr,
        )
    return _on_ray(arguments, settings) if arguments.ray else _here(arguments, settings)


def _here(arguments: argparse.Namespace, settings: Settings) -> int:
    for name, least in (("max_connections", 1), ("grace", 0)):
        if getattr(arguments, name) < least:
            option = name.replace("_", "-")
            raise InputError(f"--{option}: expected at least {least}; got {getattr(arguments, name)}")
    # Until the server runs there is nothing to finish: Ctrl-C ends the process at once, even while it loads.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sockets = bind_to(arguments.host, arguments.port)
    engine = open_engine(
        arguments.artifact,
        provider=arguments.provider,
        threads=arguments.threads,
        memory_limit=arguments.memory_limit,
        prompt_cache=settings.prompt_cache,
        cache_dir=arguments.cache_dir,
    )
    server = make_server(
        create_app(engine, settings), most_connections=arguments.max_connections, grace=arguments.grace
    )
    log_to_stderr()

    def leave(number: int, frame: object) -> None:
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        # For a signal that comes before uvicorn listens to it; when it has stopped, it raises what it got once more.
        signal.signal(number, leave)
    server.run(sockets)
    return 0 if server.started else 1


def _on_ray(arguments: argparse.Namespace, settings: Settings) -> int:
    try:
        from bonnx.runtime.serve.cluster import Scale, deploy, run_until_told
    except ModuleNotFoundError as e:
        raise not_installed(e) from e
    if not arguments.port:
        raise InputError("--port: Ray Serve takes no free port by itself; expected a number from 1 on, got 0")
    most = arguments.replicas if arguments.max_replicas is None else arguments.max_replicas
    scale = Scale(
        replicas=arguments.replicas,
        most_replicas=most,
        cpus=arguments.threads or 1,
        gpus=arguments.replica_gpus,
        up_after=arguments.scale_up_after,
        down_after=arguments.scale_down_after,
    )
    read_verified(Path(arguments.artifact))
    artifact = str(Path(arguments.artifact).resolve())
    application = deploy(artifact, settings, scale, memory_limit=arguments.memory_limit, cache_dir=arguments.cache_dir)
    if arguments.ray_address is None:
        # Ray would say that it is in use by a trace, after it has started everything else.
        for listener in bind_to(arguments.host, arguments.port):
            listener.close()
    join_cluster(arguments.ray_address)
    warn_if_too_large("bonnx serve", scale.replicas, scale.cpus)
    run_until_told(application, arguments.host, arguments.port, every_node=arguments.every_node)
    return 0


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The limits of the server, from the arguments.

    Raises:
        InputError: one is invalid, or the key cannot be read.
    """
    key = os.environ.get(_KEY)
    if arguments.api_key_file is not None:
        try:
            key = arguments.api_key_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"--api-key-file: cannot read {arguments.api_key_file}: {e}") from e
    names = [field.name for field in dataclasses.fields(Settings) if hasattr(arguments, field.name)]
    bounds = {name: getattr(arguments, name) for name in names if name != "upstream"}
    origins = tuple(arguments.cors_origin or ())
    name = arguments.served_model_name
    return Settings(api_key=key, model_name=name, cors_origins=origins, upstream=upstream_settings(arguments), **bounds)

"""The same server on Ray Serve: the application is the ingress of replicas, each with its own model and queues."""

from __future__ import annotations

import signal
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray
from ray import serve

from bonnx.errors import InputError

from ..engine.engine import open_engine
from ..engine.session import Provider
from .app import create_app
from .server import log_to_stderr
from .settings import Settings

if TYPE_CHECKING:
    import fastapi

__all__ = ["Scale", "deploy", "run_until_told"]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The number of replicas, and the resources of each.

    Attributes:
        replicas: minimum number of replicas.
        most_replicas: maximum number; Ray adds and removes replicas by load.
        cpus: cores of each replica, and threads of its runs.
        gpus: GPUs of each replica; above 0 the model runs on CUDA.

    Raises:
        InputError: a number is invalid.
    """

    replicas: int = 1
    most_replicas: int = 1
    cpus: int = 1
    gpus: float = 0

    def __post_init__(self) -> None:
        if not 1 <= self.replicas <= self.most_replicas:
            raise InputError(
                f"replicas: expected at least 1 and at most {self.most_replicas}, the most allowed; got {self.replicas}"
            )
        if self.cpus < 1 or self.gpus < 0:
            raise InputError(f"cpus and gpus of a replica: expected at least 1 and 0; got {self.cpus} and {self.gpus}")


def deploy(
    artifact: str,
    settings: Settings,
    scale: Scale,
    *,
    memory_limit: int | None = None,
    cache_dir: str | None = None,
) -> serve.Application:
    """The Ray Serve application, for `ray.serve.run`.

    Args:
        artifact: folder of the artifact, which every node must reach by this path.
        settings: limits of each replica; `max_queue` requests wait at each.
        scale: number and resources of the replicas.
        memory_limit: see `bonnx.load`.
        cache_dir: see `bonnx.load`; replicas of one node share the memory of its weights.
    """

    def build() -> fastapi.FastAPI:
        # This runs in the replica: Ray adds its stderr to the replica's log.
        log_to_stderr()
        provider: Provider = "cuda" if scale.gpus else "cpu"
        engine = open_engine(
            artifact,
            provider=provider,
            threads=scale.cpus,
            memory_limit=memory_limit,
            cache_dir=cache_dir,
            prompt_cache=settings.prompt_cache,
        )
        return create_app(engine, settings)

    deployment = serve.deployment(
        name="bonnx",
        num_replicas=scale.replicas,
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus},
        # The queue that answers 429 is bonnx's own; Ray's holds what no replica has taken yet.
        max_ongoing_requests=settings.max_queue + 64,
        max_queued_requests=settings.max_queue,
        graceful_shutdown_timeout_s=settings.timeout,
    )(serve.ingress(build)())
    if scale.most_replicas > scale.replicas:
        # Requests run faster together: a replica with a few requests at once is not overloaded yet.
        bounds = {"min_replicas": scale.replicas, "max_replicas": scale.most_replicas, "target_ongoing_requests": 16}
        deployment = deployment.options(num_replicas="auto", autoscaling_config=bounds)
    application: serve.Application = deployment.bind()
    return application


def run_until_told(application: serve.Application, host: str, port: int, address: str | None) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        application: the result of `deploy`.
        host: address to listen on.
        port: port to listen on.
        address: address of a running cluster; by default one is started here.
    """
    stopping = threading.Event()
    ray.init(address=address, include_dashboard=False, log_to_driver=False)
    try:
        # Only now, because Ray sets its own handlers, which end the process with a trace.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopping.set())
        serve.start(http_options={"host": host, "port": port})
        serve.run(application, name="bonnx", route_prefix="/")
        stopping.wait()
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()

"""What runs on Ray Serve, how many of it, and for how long."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.config import ProxyLocation, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from bonnx.errors import InputError

from ...engine.session import Provider
from ..server import log_to_stderr
from ..settings import Settings
from .ingress import create_ingress
from .replica import Replica
from .router import PromptRouter

if TYPE_CHECKING:
    from starlette.types import ASGIApp

__all__ = ["Scale", "deploy", "run_until_told"]

_APPLICATION, _MODEL = "bonnx", "Model"
# Requests run faster together: a replica with a few requests at once is not overloaded yet.
_REQUESTS_OF_A_REPLICA = 16
# What the ingress does never blocks: it needs no thread beside that of Ray Serve.
_ONE_THREAD = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}
# An ingress only forwards: there is one for four replicas.
_REQUESTS_OF_AN_INGRESS = 64


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The number of replicas, and the resources of each.

    Attributes:
        replicas: minimum number of replicas.
        most_replicas: maximum number; Ray adds and removes replicas, so that each has about 16 requests at once.
        cpus: cores of each replica, and threads of its runs.
        gpus: GPUs of each replica; above 0 the model runs on CUDA.
        up_after: seconds of more load after which replicas are added.
        down_after: seconds of less load after which replicas are removed.

    Raises:
        InputError: a number is invalid.
    """

    replicas: int = 1
    most_replicas: int = 1
    cpus: int = 1
    gpus: float = 0
    up_after: float = 30.0
    down_after: float = 600.0

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise InputError(f"replicas: expected at least 1; got {self.replicas}")
        if self.most_replicas < self.replicas:
            raise InputError(
                f"most_replicas: expected at least {self.replicas}, the number of replicas; got {self.most_replicas}"
            )
        if self.cpus < 1 or self.gpus < 0:
            raise InputError(f"cpus and gpus of a replica: expected at least 1 and 0; got {self.cpus} and {self.gpus}")
        if not (0 <= self.up_after < math.inf and 0 <= self.down_after < math.inf):
            raise InputError(
                "up_after and down_after of a replica: expected seconds, at least 0; "
                f"got {self.up_after} and {self.down_after}"
            )


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
    provider: Provider = "cuda" if scale.gpus else "cpu"
    model = serve.deployment(
        name=_MODEL,
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus},
        # The queue that answers 429 is bonnx's own; Ray's holds what no replica has taken yet.
        max_ongoing_requests=settings.max_queue + 64,
        max_queued_requests=settings.max_queue,
        # The application has a log of its own.
        logging_config=LoggingConfig(enable_access_log=False),
        request_router_config=RequestRouterConfig(request_router_class=PromptRouter),  # type: ignore[arg-type]
        graceful_shutdown_timeout_s=settings.timeout,
        **_scaling(scale, scale.replicas, _REQUESTS_OF_A_REPLICA),
    )(Replica)
    ingress = serve.deployment(
        name="Ingress",
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": _ONE_THREAD}},
        logging_config=LoggingConfig(enable_access_log=False),
        max_ongoing_requests=scale.most_replicas * (settings.max_queue + 64),
        graceful_shutdown_timeout_s=settings.timeout,
        **_scaling(scale, 1, _REQUESTS_OF_AN_INGRESS),
    )(serve.ingress(_build(settings))())
    replicas = model.bind(artifact, settings, provider, scale.cpus, memory_limit, cache_dir)
    application: serve.Application = ingress.bind(replicas)
    return application


def _build(settings: Settings) -> Callable[[], ASGIApp]:
    def build() -> ASGIApp:
        # This runs in the ingress: Ray adds its stderr to the log.
        log_to_stderr()
        here = serve.get_replica_context().app_name
        return create_ingress(serve.get_deployment_handle(_MODEL, here), settings)

    return build


def _scaling(scale: Scale, least: int, requests: int) -> dict[str, Any]:
    """Arguments of `serve.deployment`: how many replicas, and at how many requests of each there are more."""
    if least == scale.most_replicas:
        return {"num_replicas": least}
    # Ray looks at the mean of this time, and measures a few times in it.
    period = min(30.0, max(1.0, scale.up_after))
    autoscaling = {
        "min_replicas": least,
        "max_replicas": scale.most_replicas,
        "target_ongoing_requests": requests,
        "upscale_delay_s": scale.up_after,
        "downscale_delay_s": scale.down_after,
        "look_back_period_s": period,
        "metrics_interval_s": period / 3,
    }
    return {"num_replicas": "auto", "autoscaling_config": autoscaling}


def run_until_told(application: serve.Application, host: str, port: int, *, every_node: bool = False) -> None:
    """Serve until SIGTERM or SIGINT, on the cluster that `ray.init` has joined, which is left at the end.

    Args:
        application: the result of `deploy`.
        host: address to listen on.
        port: port to listen on.
        every_node: listen on every node that has a replica, instead of the head node.
    """
    try:
        # Ray has set its own handlers, which end the process with a trace.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.default_int_handler)
        where = ProxyLocation.EveryNode if every_node else ProxyLocation.HeadOnly
        serve.start(where, {"host": host, "port": port})
        serve.run(application, name=_APPLICATION, route_prefix="/")
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()

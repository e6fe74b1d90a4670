"""`--ray`: the cluster that two commands run on."""

from __future__ import annotations

import argparse
import re
import socket
import sys

from ..errors import InputError

__all__ = ["add_ray_address", "join_cluster", "not_installed", "warn_if_too_large"]

# For a connection; Ray itself would wait for minutes.
_SECONDS = 5.0


def add_ray_address(parser: argparse.ArgumentParser) -> None:
    """Declare the option."""
    parser.add_argument(
        "--ray-address", metavar="ADDRESS", help="address of a running cluster; by default one is started here"
    )


def not_installed(missing: ModuleNotFoundError) -> InputError:
    """The error for a package that only Ray needs."""
    return InputError(f"--ray: {missing.name} is not installed; run `pip install bonnx[ray]`")


def warn_if_too_large(command: str, count: int, cpus: int) -> None:
    """Say on stderr that a cluster has too few cores for so many processes: Ray waits for more, in silence."""
    import ray

    there = int(ray.cluster_resources().get("CPU", 0))  # type: ignore[no-untyped-call]
    if count * cpus > there:
        print(
            f"{command}: the cluster has {there} cores, and {count} times {cpus} were asked for; what does not fit "
            "starts when there are more",
            file=sys.stderr,
        )


def join_cluster(address: str | None) -> None:
    """Join a cluster, or start one.

    Args:
        address: as `ray.init` takes it; None for a cluster of this machine.

    Raises:
        InputError: there is no cluster at the address.
    """
    import ray

    try:
        if address is not None and (found := re.fullmatch(r"([^/]+):(\d+)", address)):
            socket.create_connection((found[1], int(found[2])), _SECONDS).close()
        ray.init(address=address, include_dashboard=False, log_to_driver=False)
    except (OSError, OverflowError, ValueError) as e:
        raise InputError(
            f"--ray-address: there is no cluster at {address} ({str(e).strip().splitlines()[0]:.200}); start one with "
            "`ray start --head`, which prints its address, or leave the option out"
        ) from e

"""Put load on a local server: clients that each send one request after another over one connection."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Load", "free_port", "load", "processor_seconds", "server"]


@dataclass
class Load:
    """The clients' results.

    Attributes:
        seconds: duration of the load.
        times: latency of each answered request, in seconds.
        statuses: number of answers by status; 0 for a broken connection.
        bodies: body of each answer with a status other than 200.
        processor: seconds of processor time that the server took, if the caller knows.
    """

    seconds: float
    times: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    bodies: list[bytes] = field(default_factory=list)
    processor: float = float("nan")

    @property
    def rate(self) -> float:
        """Answers with status 200 per second."""
        return self.statuses.get(200, 0) / self.seconds

    def percentile(self, share: float) -> float:
        """Return the seconds within which this share of the requests was answered."""
        times = sorted(self.times)
        return times[min(len(times) - 1, int(share * len(times)))] if times else float("nan")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def processor_seconds(pid: int) -> float:
    """Processor time of a process, user and system; NaN if it is gone, or where there is no /proc."""
    try:
        # The name, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def server(
    command: Sequence[str], port: int, ready: str, *, only_200: bool = False, program: str = sys.executable
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server process until the block ends.

    Args:
        command: arguments of the program.
        port: the port on which the server listens.
        ready: a path that answers once the server is up.
        only_200: another status than 200 means that the server is not up yet.
        program: what is run; by default Python.
    """
    process = subprocess.Popen([program, *command], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{ready}", timeout=5).close()
                break
            except urllib.error.HTTPError:
                if not only_200:
                    break
                time.sleep(0.1)
            except OSError:
                time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def load(port: int, path: str, bodies: Sequence[Any], clients: int, seconds: float) -> Load:
    """Send requests from several clients at once.

    Args:
        port: the server's port.
        path: the endpoint's path.
        bodies: JSON request bodies, distributed among the clients.
        clients: number of clients.
        seconds: duration of the load.
    """
    requests = []
    for body in bodies:
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        requests.append(head.encode() + data)
    return asyncio.run(_load(port, requests, clients, seconds))


async def _load(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> Load:
    start = time.perf_counter()
    load = Load(seconds)
    until = start + seconds
    await asyncio.gather(*(_client(port, requests, i, clients, until, load) for i in range(clients)))
    load.seconds = time.perf_counter() - start
    return load


async def _client(port: int, requests: Sequence[bytes], first: int, step: int, until: float, load: Load) -> None:
    number = first
    while time.perf_counter() < until:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            load.statuses[0] = load.statuses.get(0, 0) + 1
            await asyncio.sleep(0.05)
            continue
        try:
            while time.perf_counter() < until:
                start = time.perf_counter()
                writer.write(requests[number % len(requests)])
                number += step
                status, body, stays = await _answer(reader)
                load.times.append(time.perf_counter() - start)
                load.statuses[status] = load.statuses.get(status, 0) + 1
                if status != 200:
                    load.bodies.append(body)
                if not stays:
                    break
        except (OSError, asyncio.IncompleteReadError, ValueError):
            load.statuses[0] = load.statuses.get(0, 0) + 1
        finally:
            writer.close()


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes, bool]:
    """Read an answer; return its status, its body, and whether the connection stays open."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    length = int(head.split("content-length:")[1].split("\r\n")[0])
    body = await reader.readexactly(length)
    return int(head.split(" ")[1]), body, "connection: close" not in head

"""What Ray Serve adds to a request, and what becomes of requests whose replica is killed.

`python -m benchmarks.cluster artifacts/countdown` puts the same load on `bonnx serve` and on `bonnx serve --ray` with
one replica, in turns, and prints processor time for a request, by the part that took it: Ray's HTTP proxy, the ingress,
the replica, and all that Ray does beside requests. With these it prints how many parts of each kind 1, 10 and 100 nodes
need. `--kills N`: under the same load on two replicas, one is killed every five seconds, and answers are counted.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import statistics
import threading
import time
import timeit
from collections import Counter
from pathlib import Path

from benchmarks.loading import Load, free_port, load, processor_seconds, server
from benchmarks.rates import measure_rates
from benchmarks.record import add_output, record
from benchmarks.serve import bodies
from bonnx.runtime.serve.cluster.router import order_of_preference

# What a process's title begins with.
PARTS = {
    "ray::ProxyActor": "proxy",
    "ray::ServeReplica:bonnx:Ingress": "ingress",
    "ray::ServeReplica:bonnx:Model": "replica",
}


def processes(name: str) -> dict[int, str]:
    """Processes of this machine by the part that they are: a part of Ray Serve, or `name` by its command."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        part = next((part for start, part in PARTS.items() if title.startswith(start)), None)
        if part is None and ("ray::" in title or "/ray/" in title or name in title):
            part = "beside" if name == "--ray" else "server"
        if part is not None:
            found[int(folder.name)] = part
    return found


def replica_pids() -> list[int]:
    """The processes that hold a model."""
    return [pid for pid, part in processes("--ray").items() if part == "replica"]


def seconds_of(name: str) -> Counter[str]:
    """Processor seconds that each part has taken."""
    taken: Counter[str] = Counter()
    for pid, part in processes(name).items():
        seconds = processor_seconds(pid)
        taken[part] += 0.0 if math.isnan(seconds) else seconds
    return taken


def measure(artifact: str, work: str, arguments: argparse.Namespace, *, ray: bool) -> tuple[dict[str, float], Load]:
    """Processor seconds for a request by part, and the load."""
    port, requests = free_port(), bodies(work)
    command = ["-m", "bonnx", "serve", artifact, "--port", str(port), "--threads", "1", *(["--ray"] if ray else [])]
    # The port is on the command line of no other process.
    name = "--ray" if ray else f"--port {port}"
    with server(command, port, "/health", only_200=True):
        load(port, "/v1/best-of-n", requests, 8, 2.0)
        before = seconds_of(name)
        measured = load(port, "/v1/best-of-n", requests, arguments.clients, arguments.seconds)
        taken = seconds_of(name)
    answers = measured.statuses.get(200, 0)
    each = {part: (taken[part] - before[part]) / answers for part in taken if part != "beside"}
    # This does not grow with the number of requests.
    return each | {"beside": (taken["beside"] - before["beside"]) / measured.seconds}, measured


def kill(artifact: str, arguments: argparse.Namespace) -> Counter[int]:
    """Answers by status while one of two replicas is killed every five seconds."""
    port, requests = free_port(), bodies("rank") + bodies("mixed", most_tokens=48)
    random.Random(0).shuffle(requests)
    command = ["-m", "bonnx", "serve", artifact, "--port", str(port), "--threads", "1", "--ray", "--replicas", "2"]
    killed, over = 0, threading.Event()

    def kill_one() -> None:
        nonlocal killed
        while killed < arguments.kills and not over.wait(5.0):
            replicas = replica_pids()
            # The other one must be there: a request that loses two replicas is answered with 503.
            if len(replicas) >= 2:
                os.kill(replicas[0], signal.SIGKILL)
                killed += 1
        over.set()

    statuses: Counter[int] = Counter()
    with server([*command, "--timeout", "120"], port, "/health", only_200=True):
        thread = threading.Thread(target=kill_one, daemon=True)
        thread.start()
        while not over.is_set():
            measured = load(port, "/v1/best-of-n", requests, arguments.clients, 5.0)
            statuses.update(measured.statuses)
            for body in measured.bodies[:3]:
                print(body[:300].decode(errors="replace"))
        thread.join()
    return statuses


def plan(each: dict[str, float], nodes: int, cores: int) -> dict[str, float]:
    """Requests per second of so many nodes, and how many of their cores forward requests instead of computing."""
    forwarding = each["proxy"] + each["ingress"]
    # With one replica for each node.
    ids, key = [str(i) for i in range(nodes)], os.urandom(16)
    routing = min(timeit.repeat(lambda: order_of_preference(key, ids, [0] * nodes), number=20, repeat=5)) / 20
    rate = nodes * cores / (forwarding + routing + each["replica"])
    return {
        "nodes": nodes,
        "requests_a_second": rate,
        "proxy_cores": rate * each["proxy"],
        "ingress_cores": rate * (each["ingress"] + routing),
        "routing_seconds": routing,
    }


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", nargs="+", default=["rank", "generate"])
    parser.add_argument("--cores", type=int, default=16, help="cores of a node in the plan (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=0, help="kill so many replicas instead")
    add_output(parser)
    arguments = parser.parse_args()
    if arguments.kills:
        begun = time.monotonic()
        statuses = kill(arguments.artifact, arguments)
        print(f"{arguments.kills} replicas killed in {time.monotonic() - begun:.0f} s: {dict(statuses)}")
        figures = [{"way": "killed", "kills": arguments.kills, "answers": statuses[200]}]
        figures[0]["failed"] = statuses.total() - statuses[200]
        record("cluster", figures, rates=None, path=arguments.output)
        return
    figures = []
    for work in arguments.work:
        runs: dict[bool, list[tuple[dict[str, float], Load]]] = {True: [], False: []}
        for _ in range(arguments.repeats):
            for ray, taken in runs.items():
                taken.append(measure(arguments.artifact, work, arguments, ray=ray))
        for ray, taken in runs.items():
            each = {part: statistics.median(t[part] for t, _ in taken) for part in taken[0][0]}
            rate = statistics.median(m.rate for _, m in taken)
            way = "bonnx serve --ray" if ray else "bonnx serve"
            print(f"{work:<9} {way:<18} {rate:7.1f} requests/s; processor, ms a request:", end=" ")
            print(", ".join(f"{part} {1000 * value:.2f}" for part, value in sorted(each.items()) if part != "beside"))
            figures.append({"way": way, "work": work, "requests_a_second": rate} | _named(each))
            if ray:
                print(f"{'':<9} Ray beside the requests: {each['beside']:.2f} of a core")
                for nodes in (1, 10, 100):
                    planned = plan(each, nodes, arguments.cores)
                    print(f"{'':<9} {', '.join(f'{name} {value:.4g}' for name, value in planned.items())}")
                    figures.append({"way": "plan", "work": work, "cores": arguments.cores} | planned)
    record("cluster", figures, rates=measure_rates(os.cpu_count() or 1), path=arguments.output)


def _named(each: dict[str, float]) -> dict[str, float]:
    return {f"{part}_{'cores' if part == 'beside' else 'seconds'}": value for part, value in each.items()}


if __name__ == "__main__":
    main()

"""A Ray cluster of several nodes on this machine, in processes of its own.

python -m tests.drills.nodes CPUS ...    a head without CPUs, and a node with so many each

Prints a line of JSON: {"address", "gcs": process, "nodes": [{"id", "raylet": process}, ...]}; ends with its
standard input.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tests.drills.runs import free_port

MARK = "POLYGLANCE_DRILL"  # an environment variable of every process of a cluster, and of its drivers


def main(arguments: list[str]) -> None:
    """Run a cluster until standard input ends."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": free_port()}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=int(cpus)) for cpus in arguments]

    def process_of(node: Any, name: str) -> int:
        return node.all_processes[name][0].process.pid

    facts = {
        "address": cluster.address,
        "gcs": process_of(cluster.head_node, "gcs_server"),
        "nodes": [{"id": node.node_id, "raylet": process_of(node, "raylet")} for node in nodes],
    }
    print(json.dumps(facts), flush=True)
    sys.stdin.read()
    cluster.shutdown()


class Cluster(NamedTuple):
    """A cluster that is up: its address; the process of its head's store; {id, raylet: process} of its nodes;
    what its drivers have as environment."""

    address: str
    gcs: int
    nodes: list[dict[str, Any]]
    env: dict[str, str]

    def processes(self, word: str = "") -> list[psutil.Process]:
        """Return the processes of the cluster, and of its drivers, whose command line has `word`."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get(MARK) == self.env[MARK] and word in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def raylet_of(self, process: psutil.Process) -> dict[str, Any]:
        """Return the node that a worker process is on."""
        above = {parent.pid for parent in process.parents()}
        return next(node for node in self.nodes if node["raylet"] in above)


@contextmanager
def ray_cluster(folder: Path, *cpus: int) -> Iterator[Cluster]:
    """A cluster with nodes of so many CPUs. At the end no process of it is left."""
    # short: the path of a socket has 107 characters
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env |= {MARK: f"{os.getpid()}-{time.monotonic_ns()}", "RAY_worker_niceness": "0", "PYTHONUNBUFFERED": "1"}
    env |= {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "tests.drills.nodes", *map(str, cpus)]
    with open(folder / "cluster.txt", "a") as log:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
    cluster = Cluster("", 0, [], env)
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("{")), None)
        assert line, f"no cluster; see {folder}/cluster.txt"
        facts = json.loads(line)
        yield Cluster(**facts, env={**env, "RAY_ADDRESS": facts["address"]})
    finally:
        assert process.stdin is not None
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        for each in cluster.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()


if __name__ == "__main__":
    main(sys.argv[1:])

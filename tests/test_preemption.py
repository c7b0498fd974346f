"""Ray takes a node away: the run saves, and goes on elsewhere; workers of several nodes. On a real cluster of
three nodes."""

import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pretrain.train import run
from raylib import checkpoint
from raylib.monitoring import read_metrics

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow]


@pytest.fixture
def nodes():
    """A head without CPUs, and two nodes of two."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 10**8})
    for _ in range(2):
        cluster.add_node(num_cpus=2, object_store_memory=10**8)
    ray.init(address=cluster.address)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def drain_node_of_workers(address: str) -> str:
    """Drain the node where training workers run, with two minutes' notice; returns its id."""
    import ray

    busy = [
        node["NodeID"]
        for node in ray.nodes()
        if node["Alive"]
        and node["Resources"].get("CPU")
        and ray._private.state.available_resources_per_node()[node["NodeID"]].get("CPU", 0) == 0
    ]
    command = [str(Path(sys.executable).with_name("ray")), "drain-node", f"--address={address}"]
    reason = [
        "--reason=DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message=spot",
        "--deadline-remaining-seconds=120",
    ]
    subprocess.run([*command, f"--node-id={busy[0]}", *reason], check=True, capture_output=True)
    return busy[0]


def test_preempted_node_is_a_checkpoint_and_the_run_goes_on_elsewhere(nodes, mini, capfd):
    settings = ("fit.steps=200", "fit.save_every=150", "fit.keep=2", "max_failures=0", "max_preemptions=1")
    whole, moved = mini("name=whole", *settings), mini("name=moved", *settings)
    assert run(whole)["finished"]
    folder, drained = Path(moved.runs) / "moved", []

    def drain():
        while len(read_metrics(folder)) < 10:
            time.sleep(0.05)
        drained.append(drain_node_of_workers(nodes.address))

    thread = threading.Thread(target=drain)
    thread.start()
    assert run(moved)["finished"]
    thread.join()
    printed = "".join(capfd.readouterr())
    line = r"(?m)^Ray takes a node of this run away; preemption 1 of 1: goes on from (step_\d+) on others$"
    (name,) = re.findall(line, printed)
    assert 10 <= int(name[5:]) < 150
    records = [[r for r in read_metrics(Path(c.runs) / c.name) if "lr" in r] for c in (whole, moved)]
    steady = [[{k: v for k, v in r.items() if k.startswith("loss/")} for r in each] for each in records]
    assert steady[0] == steady[1] and len(steady[0]) == 200
    assert checkpoint.find_newest(folder).name == "step_000200"


def test_workers_of_two_nodes_find_each_other(nodes, mini):
    """Three, where a node has room for two: not by the loopback interface, as those of one node do."""
    result = run(mini("name=spread", "workers=3"))
    assert result["finished"] and result["workers"] == 3

"""Rows: workers, driver, raylet and head of a Ray cluster that are killed, a job that is stopped, a node that
is taken away."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from raylib import checkpoint
from raylib.monitoring import read_metrics
from tests.drills.damage import NUMBERS
from tests.drills.disks import require_whole
from tests.drills.harness import ROOT, Drill, row
from tests.drills.nodes import Cluster, ray_cluster
from tests.drills.runs import Case, free_port, last_lines, outcome, pretraining, require_equal

STEPS, EVERY = 60, 5
WAIT = 240.0  # seconds, at most, for whatever is waited for


def ray_case(drill: Drill) -> Case:
    """Return a pretraining run on 2 workers of Ray, ZeRO-2."""
    steps = (f"fit.steps={STEPS}", f"fit.save_every={EVERY}", "fit.eval_every=10", "fit.keep=2")
    return pretraining(drill.data, "runtime=ray", "workers=2", *steps)


@contextmanager
def driver(case: Case, runs: Path, cluster: Cluster) -> Iterator[subprocess.Popen]:
    """A driver of the run, as a process of its own; what it prints is in log.txt."""
    with open(runs / "log.txt", "a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *case.command(runs)], cwd=ROOT, env=cluster.env, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def finish(case: Case, runs: Path, cluster: Cluster) -> None:
    """Start the run and wait for its end.

    Raises:
        AssertionError: it did not end well.
    """
    with driver(case, runs, cluster) as process:
        code = process.wait(WAIT)
    assert code == 0, f"exit code {code}; {last_lines(runs / 'log.txt')}"


def undisturbed(drill: Drill) -> dict:
    """Return what the run comes to if nothing disturbs it."""
    if "ray" not in drill.workshop.outcomes:
        runs = Path(tempfile.mkdtemp(prefix="undisturbed-", dir=drill.workshop.folder))
        with ray_cluster(runs, 2) as cluster:
            finish(ray_case(drill), runs, cluster)
        drill.workshop.outcomes["ray"] = outcome(runs / "run")
    return drill.workshop.outcomes["ray"]


def require_same(drill: Drill, runs: Path) -> None:
    """Raises AssertionError: losses, weights, best or scores are not those of the undisturbed run; a step was
    logged twice."""
    found, expected = outcome(runs / "run"), undisturbed(drill)
    require_equal({k: found[k] for k in NUMBERS}, {k: expected[k] for k in NUMBERS})
    for part in ("retrieval", "interval"):
        assert found["result"][part] == expected["result"][part], part


def wait_until(what: str, holds: Callable[[], object], process: subprocess.Popen | None = None) -> None:
    """Wait until `holds()`.

    Raises:
        AssertionError: the process ended before, or it takes too long.
    """
    end = time.monotonic() + WAIT
    while not holds():
        assert process is None or process.poll() is None, f"before {what} it ended with {process.returncode}"
        assert time.monotonic() < end, f"{what}: not in {WAIT:.0f} s"
        time.sleep(0.05)


def wait_for_step(runs: Path, step: int, process: subprocess.Popen) -> None:
    """Wait until a run has logged `step`."""
    wait_until(
        f"step {step}", lambda: (read_metrics(runs / "run") or [{"step": 0}])[-1]["step"] >= step, process
    )


def newest_step(runs: Path) -> int:
    """Return the step of a run's newest checkpoint; 0: it has none."""
    newest = checkpoint.find_newest(runs / "run")
    return checkpoint.verify(newest)["step"] if newest else 0


@row
def ray_worker_killed(drill: Drill) -> None:
    """SIGKILL of a Ray Train worker, three times in a run on 2. Each time the run goes on by itself from its
    newest checkpoint, and comes to what it comes to undisturbed."""
    undisturbed(drill)
    with ray_cluster(drill.folder, 2) as cluster, driver(ray_case(drill), drill.folder, cluster) as process:
        for step in drill.some([7, 23, 41], few=1):
            wait_for_step(drill.folder, step, process)
            workers = cluster.processes("RayTrainWorker")
            drill.rng.choice(workers).kill()
            drill.count += 1
        code = process.wait(WAIT)
    assert code == 0, f"exit code {code}; {last_lines(drill.folder / 'log.txt')}"
    require_same(drill, drill.folder)


@row
def ray_raylet_killed(drill: Drill) -> None:
    """SIGKILL of the raylet of a node on which workers are; another node has room. The run goes on there by
    itself, and comes to what it comes to undisturbed."""
    undisturbed(drill)
    with (
        ray_cluster(drill.folder, 2, 2) as cluster,
        driver(ray_case(drill), drill.folder, cluster) as process,
    ):
        wait_for_step(drill.folder, 12, process)
        node = cluster.raylet_of(cluster.processes("RayTrainWorker")[0])
        os.kill(node["raylet"], signal.SIGKILL)
        drill.count += 1
        code = process.wait(WAIT)
    assert code == 0, f"exit code {code}; {last_lines(drill.folder / 'log.txt')}"
    require_same(drill, drill.folder)


@row
def ray_driver_killed(drill: Drill) -> None:
    """SIGKILL of the driver. Its workers end and register nothing more; the same command on the same cluster
    goes on to what it comes to undisturbed."""
    undisturbed(drill)
    case = ray_case(drill)
    with ray_cluster(drill.folder, 2) as cluster:
        with driver(case, drill.folder, cluster) as process:
            wait_for_step(drill.folder, 12, process)
            process.kill()
            process.wait()
            drill.count += 1
            at_once = checkpoint.read_registry(drill.folder / "run")
            wait_until("the end of the workers", lambda: not cluster.processes("RayTrainWorker"))
            after = checkpoint.read_registry(drill.folder / "run")
            # one that was just being registered may still be
            added = [name for name in after.checkpoints if name not in at_once.checkpoints]
            assert len(added) <= 1, f"workers without a driver registered {added}"
        finish(case, drill.folder, cluster)
    require_same(drill, drill.folder)


@row
def ray_driver_killed_and_started_at_once(drill: Drill) -> None:
    """SIGKILL of the driver, and the same command at once, while its workers still live. The new start takes
    over; the old workers register nothing."""
    undisturbed(drill)
    case = ray_case(drill)
    with ray_cluster(drill.folder, 4) as cluster, driver(case, drill.folder, cluster) as process:
        wait_for_step(drill.folder, 12, process)
        process.kill()
        process.wait()
        drill.count += 1
        finish(case, drill.folder, cluster)
    require_same(drill, drill.folder)


@row
def ray_head_killed(drill: Drill) -> None:
    """SIGKILL of the cluster's head. The job ends with an error; the same command on a new cluster goes on to
    what it comes to undisturbed."""
    undisturbed(drill)
    case = ray_case(drill)
    with ray_cluster(drill.folder, 2) as cluster, driver(case, drill.folder, cluster) as process:
        wait_for_step(drill.folder, 12, process)
        os.kill(cluster.gcs, signal.SIGKILL)
        drill.count += 1
        code = process.wait(WAIT)
        assert code != 0, "exit code 0 without a cluster"
    require_whole(drill.folder / "run")
    with ray_cluster(drill.folder, 2) as cluster:
        finish(case, drill.folder, cluster)
    require_same(drill, drill.folder)


@row
def ray_preemption_notice(drill: Drill) -> None:
    """A node on which workers are is to be taken away in a minute (Ray's drain, reason preemption); another
    has room. The run saves at the next step, and comes to what it comes to undisturbed, by itself or started
    again."""
    undisturbed(drill)
    case = ray_case(drill)
    with ray_cluster(drill.folder, 2, 2) as cluster, driver(case, drill.folder, cluster) as process:
        wait_for_step(drill.folder, 11, process)
        node = cluster.raylet_of(cluster.processes("RayTrainWorker")[0])
        drain = [
            *("ray", "drain-node", "--address", cluster.address, "--node-id", node["id"]),
            *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "preempted"),
            *("--deadline-remaining-seconds", "60"),
        ]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(drain, env={**cluster.env, "PATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-500:]
        drill.count += 1
        code = process.wait(WAIT)
        text = (drill.folder / "log.txt").read_text()
        assert re.search("preempt|notice|taken away|drain", text, re.IGNORECASE), "not a word of the notice"
        assert code in (0, 143), f"exit code {code}; {last_lines(drill.folder / 'log.txt')}"
        if code:
            finish(case, drill.folder, cluster)
    require_same(drill, drill.folder)


@row
def ray_job_stopped(drill: Drill) -> None:
    """SIGTERM of `python -m cluster run`, which stops its job as `ray job stop` does. The run has saved the
    step that it was in; the same command goes on to what it comes to undisturbed; no process is left."""
    undisturbed(drill)
    case = ray_case(drill)
    env = {**os.environ, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "POLYGLANCE_RUNS": str(drill.folder)}
    command = [
        *(sys.executable, "-m", "cluster", "run", "--dashboard-port", str(free_port()), "--"),
        *("python", "-m", *case.command(drill.folder)),
    ]
    for ends in (True, False):
        with open(drill.folder / "log.txt", "a") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
        try:
            if ends:
                wait_for_step(drill.folder, 12, process)
                process.send_signal(signal.SIGTERM)
                drill.count += 1
            code = process.wait(WAIT)
        finally:
            process.kill()
        if ends:
            assert code == 143, f"exit code {code}"
            logged = max(line["step"] for line in read_metrics(drill.folder / "run") if "lr" in line)
            saved = newest_step(drill.folder)
            assert saved >= logged, (
                f"saved at step {saved} of {logged}; {last_lines(drill.folder / 'log.txt')}"
            )
        else:
            assert code == 0, f"exit code {code}; {last_lines(drill.folder / 'log.txt')}"
    # `info` of a process that has just ended is None
    left = [
        p for p in psutil.process_iter(["cmdline"]) if str(drill.folder) in " ".join(p.info["cmdline"] or ())
    ]
    assert not left, f"processes left: {left}"
    require_same(drill, drill.folder)


@row
def clusters_of_one_job(drill: Drill) -> None:
    """`python -m cluster run`: its exit code, signals, and SIGKILL of itself; a search whose driver is killed
    (the tests marked `drill`)."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "drill", "-p", "no:cacheprovider"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    found = re.search(r"(\d+) passed", done.stdout)
    drill.count += int(found[1]) if found else 0
    assert done.returncode == 0, " / ".join(done.stdout.strip().splitlines()[-3:])

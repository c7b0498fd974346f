"""Runs on a real local Ray cluster with DeepSpeed ZeRO-2: resume, kills, other numbers of workers.

Float32, dropout 0, so that equal means equal.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.__main__ import main
from pretrain.train import run
from raylib import checkpoint
from raylib.config import dump_config
from raylib.errors import UserError
from raylib.launch import launch
from raylib.monitoring import read_metrics
from raylib.ray_cluster import job_has_ended, private_ray, this_job

pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One cluster for all tests here; its processes go when the driver's connection ends."""
    import ray

    options = {"num_cpus": 4, "include_dashboard": True, "dashboard_port": 0, "object_store_memory": 10**8}
    with private_ray():
        ray.init(address="local", **options)
    yield
    ray.shutdown()


def losses(config) -> dict[int, dict[str, float]]:
    """{step: terms} of a run, each step once."""
    records = [r for r in read_metrics(Path(config.runs) / config.name) if "lr" in r]
    assert [r["step"] for r in records] == sorted({r["step"] for r in records})
    return {r["step"]: {k: v for k, v in r.items() if k.startswith(("loss/", "lr"))} for r in records}


def has_traceback(printed: str) -> bool:
    """Return whether a worker, or Ray Train's controller, has printed one; other actors of Ray's do where a
    machine has several clusters."""
    return bool(re.search(r"(?m)^(.*(RayTrainWorker|TrainController) pid=\d+\S* )?Traceback", printed))


def states(config, step) -> dict[str, bytes]:
    """Everything that the workers saved at `step` to train on: weights, moments and counts."""
    folder = Path(config.runs) / config.name / "checkpoints" / checkpoint.step_name(step)
    files = [*folder.glob("optimizer-*"), folder / "model.safetensors"]
    assert len(files) == 2 * config.workers + 1
    return {file.name: file.read_bytes() for file in files}


def test_ray_stopped_run_resumes_bit_exactly(mini):
    whole, parts = mini("name=whole"), mini("name=parts")
    result = run(whole)
    assert result["finished"]
    assert result["workers"] == 2
    stopped = run(mini("name=parts", "fit.stop_after=3"))
    assert not stopped["finished"]
    assert not (Path(parts.runs) / "parts" / "result.json").exists()
    run(parts)
    assert losses(whole) == losses(parts)  # to the bit; so is the data
    assert states(whole, 6) == states(parts, 6)
    assert run(whole) == {}  # complete: says so and does nothing


@pytest.mark.slow
def test_ray_resume_with_another_number_of_workers_agrees(mini):
    runs = Path(mini().runs)
    one = mini("name=one", "workers=1")
    run(mini("name=two", "fit.stop_after=3"))
    shutil.copytree(runs / "two", runs / "two-then-one")
    run(mini("name=two"))
    run(mini("name=one", "workers=1", "fit.stop_after=3"))
    shutil.copytree(runs / "one", runs / "one-then-two")
    run(one)
    run(mini("name=local", "workers=1", "runtime=local"))
    expected = losses(mini("name=two"))
    for name, workers in (("two-then-one", 1), ("one-then-two", 2)):
        config = mini(f"name={name}", f"workers={workers}")
        stored = (runs / name / "config.json").read_text().replace('"name": "two"', f'"name": "{name}"')
        (runs / name / "config.json").write_text(stored.replace('"name": "one"', f'"name": "{name}"'))
        assert run(config)["workers"] == workers
    for name in ("one", "local", "two-then-one", "one-then-two"):
        got = losses(mini(f"name={name}"))
        assert got.keys() == expected.keys()
        for step in expected:
            assert got[step] == pytest.approx(expected[step], rel=2e-4), (name, step)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["ray", "local"])
def test_ray_run_goes_on_without_ray_and_the_reverse(mini, first):
    """Under ZeRO to the bit; between 2 workers of Ray's and PyTorch in this process but for rounding."""
    parts = [f"runtime={first}", f"runtime={'local' if first == 'ray' else 'ray'}"]
    zero = ("name=zero", "workers=1", "fit.sharding=zero2")
    run(mini("name=whole", "workers=1"))
    run(mini(*zero, parts[0], "fit.stop_after=3"))
    assert run(mini(*zero, parts[1]))["finished"]
    assert losses(mini("name=zero")) == losses(mini("name=whole"))
    assert states(mini("name=zero", "workers=1"), 6) == states(mini("name=whole", "workers=1"), 6)
    settings = {"runtime=ray": "workers=2", "runtime=local": "fit.sharding=none"}
    run(mini("name=mixed", parts[0], settings[parts[0]], "fit.stop_after=3"))
    end = run(mini("name=mixed", parts[1], settings[parts[1]]))
    assert (end["engine"], end["workers"]) == (("torch", 1) if first == "ray" else ("deepspeed", 2))
    got, expected = losses(mini("name=mixed")), losses(mini("name=whole"))
    assert got.keys() == expected.keys()
    for step, terms in expected.items():
        assert got[step] == pytest.approx(terms, rel=2e-4)


@pytest.mark.slow
def test_ray_killed_worker_is_replaced_without_trace(mini, capfd):
    settings = ["fit.steps=60", "fit.save_every=10", "fit.keep=2"]
    undisturbed = mini("name=undisturbed", *settings)
    killed = mini("name=killed", *settings, "fit.track=tensorboard")
    run(undisturbed)
    victims = []

    def kill():
        folder = Path(killed.runs) / "killed"
        while not (checkpoint.find_newest(folder) and len(read_metrics(folder)) >= 25):
            time.sleep(0.02)
        own = psutil.Process().children(recursive=True)
        workers = [p for p in own if "RayTrainWorker" in " ".join(p.cmdline())]
        victims.append(workers[-1].pid)
        os.kill(workers[-1].pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    result = run(killed)
    thread.join()
    assert len(victims) == 1
    assert result["finished"]
    printed = "".join(capfd.readouterr())
    line = r"(?m)^worker \d died \(its process was killed.*\); attempt 2 of 4 goes on from step_0000[2-5]0$"
    assert len(re.findall(line, printed)) == 1 and not has_traceback(printed), printed
    assert losses(undisturbed) == losses(killed)
    kept = sorted(p.name for p in (Path(killed.runs) / "killed" / "checkpoints").glob("step_*"))
    assert kept == ["step_000050", "step_000060"]
    assert checkpoint.find_best(Path(killed.runs) / "killed").is_dir()
    tracked = EventAccumulator(str(Path(killed.runs) / "killed" / "tensorboard"), {"scalars": 0}).Reload()
    assert [event.step for event in tracked.Scalars("loss/itm")] == list(range(1, 61))


@pytest.mark.slow
def test_ray_killed_driver_leaves_workers_that_register_nothing_and_another_start_goes_on(mini, tmp_path):
    """Two owners: SIGKILL of the driver, and the same command again at once."""
    settings = ["fit.steps=90", "fit.save_every=1", "fit.keep=99"]
    undisturbed, killed = mini("name=undisturbed", *settings), mini("name=killed", *settings)
    run(undisturbed)
    (tmp_path / "killed.json").write_text(dump_config(killed))
    command = [sys.executable, "-m", "pretrain", "--config", str(tmp_path / "killed.json")]
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    folder = tmp_path / "killed"

    def registered() -> list[str]:
        return checkpoint.read_registry(folder).checkpoints if folder.is_dir() else []

    first = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(registered()) < 10:
        assert first.poll() is None
        time.sleep(0.02)
    tree = psutil.Process(first.pid).children(recursive=True)
    workers = [p for p in tree if "RayTrainWorker" in " ".join(p.cmdline())]
    assert len(workers) == 2
    first.kill()
    first.wait()
    before = registered()
    again = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive and again.poll() is None
    # a rename may have been under way; the workers would have saved five times a second
    assert len(registered()) <= len(before) + 1
    said = again.communicate(timeout=300)[0]
    assert again.returncode == 0 and f"taken over from process {first.pid} on " in said, said
    assert losses(undisturbed) == losses(killed)
    assert states(undisturbed, 90) == states(killed, 90)


def test_ray_only_complete_registered_checkpoints_count(mini):
    config = mini("name=broken", "fit.stop_after=4")
    run(config)
    folder = Path(config.runs) / "broken"
    leftover = folder / "checkpoints" / "step_000005"
    shutil.copytree(folder / "checkpoints" / "step_000004", leftover)
    assert checkpoint.find_newest(folder).name == "step_000004"  # not registered, so it is not there
    newest = folder / "checkpoints" / "step_000004"
    shard = newest / "optimizer-00001.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=rf"{shard.name}: {len(data) // 2} bytes instead of {len(data)}"):
        run(mini("name=broken"))
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: missing"):
        run(mini("name=broken"))
    with pytest.raises(UserError, match="no checkpoint 'step_000003'; there are: .*step_000002"):
        run(mini("name=broken", "resume=step_000003"))
    assert run(mini("name=broken", "resume=step_000002"))["finished"]
    assert sorted(losses(config)) == [1, 2, 3, 4, 5, 6]
    assert (folder / "checkpoints.before-1" / "step_000004").is_dir()


def tell_resources(runtime, config):
    return {"finished": True, "cpus": runtime.cpus, "threads": torch.get_num_threads()}


@pytest.mark.slow
def test_ray_worker_has_cpus_for_its_loaders(mini, tmp_path):
    """Of four: a worker's, and those of its loaders, as far as they go."""
    for settings, cpus in (
        (("workers=1", "fit.loader_workers=2"), 3),
        (("workers=1", "fit.loader_workers=null"), 2),
        (("workers=2", "fit.loader_workers=7"), 1),
    ):
        found = launch(tell_resources, mini(*settings), tmp_path)
        assert (found["cpus"], found["threads"]) == (cpus, 1)


def test_ray_user_error_on_worker_is_one_line_and_not_retried(mini, tmp_path, capfd):
    config = mini("name=nan", "optim.lr=1e30", "optim.clip=1e30", "optim.warmup=0")
    with pytest.raises(UserError, match=r"step \d: .* not finite; lower optim.lr"):
        run(config)
    printed = "".join(capfd.readouterr())
    assert not has_traceback(printed) and "attempt" not in printed


def signal_at(config, lines: int, *numbers: int) -> threading.Thread:
    """Send this process, the driver of a run, signals as soon as its log has so many lines."""

    def send():
        folder = Path(config.runs) / config.name
        while len(read_metrics(folder)) < lines:
            time.sleep(0.02)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.05)  # signals of one kind that wait together are one

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGTERM, 143, "SIGTERM")])
def test_ray_notice_to_the_driver_is_a_checkpoint(mini, capfd, number, code, name):
    settings = ("fit.steps=60", "fit.save_every=50", "fit.keep=2")
    whole, parts = mini("name=whole", *settings), mini("name=parts", *settings)
    assert run(whole)["finished"]
    thread = signal_at(parts, 8, number)
    assert start(parts) == code
    thread.join()
    newest = checkpoint.find_newest(Path(parts.runs) / "parts")
    step = checkpoint.read_meta(newest)["step"]
    assert 8 <= step < 50
    last = "".join(capfd.readouterr().err).splitlines()[-1]
    assert last == f"stopped by {name} at step {step} of 60; saved; the same command goes on from there"
    assert start(parts) == 0 and losses(whole) == losses(parts)


def start(config) -> int:
    """Run a config as a command; return its exit code."""
    file = Path(config.runs) / f"{config.name}.json"
    file.write_text(dump_config(config), encoding="utf-8")
    return main(["--config", str(file)])


@pytest.mark.slow
def test_ray_second_ctrl_c_ends_at_once(mini, capfd):
    config = mini("name=twice", "fit.steps=100000", "fit.log_every=1")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread = signal_at(config, 3, signal.SIGINT, signal.SIGINT)
        assert start(config) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1] == "interrupted; the same command resumes from the newest checkpoint"
    logged = len(read_metrics(Path(config.runs) / "twice"))
    time.sleep(3)
    assert len(read_metrics(Path(config.runs) / "twice")) == logged  # nobody trains any more


@pytest.mark.slow
def test_ray_failures_beyond_the_limit_end_with_one_line(mini, capfd):
    config = mini("name=dying", "fit.steps=100000", "max_failures=0")

    def kill():
        while len(read_metrics(Path(config.runs) / "dying")) < 3:
            time.sleep(0.02)
        own = psutil.Process().children(recursive=True)
        os.kill([p for p in own if "RayTrainWorker" in " ".join(p.cmdline())][-1].pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    assert start(config) == 1
    thread.join()
    printed = capfd.readouterr()
    last = printed.err.splitlines()[-1]
    assert re.fullmatch(r"error: worker \d died .*; 1 failures, more than max_failures=0; the same .*", last)
    assert not has_traceback(printed.out + printed.err)


@pytest.mark.slow
def test_ray_terminal_has_no_notices_of_rays(mini):
    config = mini("name=quiet")
    file = Path(config.runs) / "config_to_run.json"
    file.write_text(dump_config(config), encoding="utf-8")
    command = [sys.executable, "-m", "pretrain", "--config", file]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    begins, dashboard, *rest = done.stdout.splitlines()
    assert begins.startswith("run 'quiet' in ") and dashboard.startswith("Ray's dashboard: http://")
    # errors of Ray stay, such as of its cleaner of placement groups on a machine too busy to answer
    for words in ("TrainingReport", "Deprecat", "pid=", "INFO"):
        assert not [line for line in rest if words in line]


@pytest.mark.slow
def test_ray_metrics_of_a_training_are_in_the_prometheus_endpoint(mini):
    import ray

    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    sample = r'(?m)^(ray_polyglance_\w+){.*run="([^"]+)".*} (\S+)$'
    gauges, ended = {}, threading.Event()

    def scrape():
        while not ended.wait(1.0):
            text = urllib.request.urlopen(url, timeout=10).read().decode()
            for name, label, value in re.findall(sample, text):
                gauges.setdefault((label, name), set()).add(float(value))

    thread = threading.Thread(target=scrape)
    thread.start()
    config = mini("name=gauged", "fit.steps=400", "fit.log_every=20", "fit.save_every=0", "fit.eval_every=0")
    run(config)
    ended.set()
    thread.join()
    lines = [r for r in read_metrics(Path(config.runs) / "gauged") if "lr" in r]
    names = {"loss/itm", "lr", "epoch", "tokens_per_second", "memory_gb", "waiting", "eta_seconds"}
    for name in names:
        shown = gauges["gauged", f"ray_polyglance_{name.replace('/', '_')}"]
        assert shown and all(any(value == pytest.approx(line[name]) for line in lines) for value in shown), (
            name
        )


SECOND_CLUSTER = """
import json
import os
from raylib.ray_cluster import ray_cluster

with ray_cluster():
    import ray
    from ray.util.state import list_actors

    @ray.remote
    class Here:
        def look(self):
            return os.environ["RAY_ADDRESS"], os.nice(0), [actor.class_name for actor in list_actors()]

    actor = Here.remote()
    address, niceness, actors = ray.get(actor.look.remote())
    assert address == ray.get_runtime_context().gcs_address, address
    assert niceness == os.nice(0), "Ray's 15 more would starve a search beside anything else"
    assert actors == ["Here"], actors
"""


@pytest.mark.slow
def test_ray_processes_know_their_cluster_among_several():
    """Beside that of this module: Ray Train's actors ask which others live, and so do those of users."""
    ours = ("RAY_ADDRESS", "RAY_worker_niceness")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run([sys.executable, "-c", SECOND_CLUSTER], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "multiple active" not in done.stdout + done.stderr


OTHER_DRIVER = """
import json
from raylib.ray_cluster import ray_cluster, this_job

with ray_cluster():
    print(json.dumps(this_job()))
"""


@pytest.mark.slow
def test_ray_job_of_an_owner_that_has_ended_is_known(monkeypatch):
    """By which a run is taken over whose lock another machine has left."""
    import ray

    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    done = subprocess.run([sys.executable, "-c", OTHER_DRIVER], capture_output=True, text=True)
    ended, end = {"ray": json.loads(done.stdout.splitlines()[-1])}, time.monotonic() + 60
    while not job_has_ended(ended) and time.monotonic() < end:  # Ray notes it a moment later
        time.sleep(0.2)
    assert job_has_ended(ended) is True
    assert job_has_ended({"ray": this_job()}) is False
    # numbers of jobs come again in another cluster
    assert job_has_ended({"ray": {**this_job(), "pid": 1}}) is None

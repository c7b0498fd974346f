"""The local cluster, its errors, and the files for Slurm, Kubernetes and the installation."""

import asyncio
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import types
import urllib.request
from pathlib import Path

import psutil
import pytest
import yaml
from packaging.requirements import Requirement

import cluster
from cluster.__main__ import main
from cluster.submit import follow
from pretrain.__main__ import main as pretrain
from raylib import checkpoint
from raylib.config import dump_config
from raylib.errors import UserError
from raylib.monitoring import read_metrics
from tests.factories import free_port

pytestmark = pytest.mark.xdist_group("ray")
ROOT = Path(__file__).parent.parent


def start(command: list[str], runs: Path) -> subprocess.Popen:
    """`python -m cluster run` with `command`, its output in one pipe."""
    arguments = [sys.executable, "-m", "cluster", "run", "--dashboard-port", str(free_port()), "--", *command]
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env={**os.environ, "POLYGLANCE_RUNS": str(runs)},
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def find_token(output: str) -> Path:
    return Path(re.search(r"token: (\S+)\)", output)[1])


def list_processes(token: Path) -> list[list[str]]:
    """Command lines of the processes that were given this token."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAY_AUTH_TOKEN_PATH") == str(token):
                found.append(process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def assert_nothing_left(output: str) -> None:
    token = find_token(output)
    assert list_processes(token) == []
    assert not token.parent.exists()


@pytest.fixture
def ignored_run():
    """A file under the checkout's `runs`."""
    (ROOT / "runs").mkdir(exist_ok=True)
    run = Path(tempfile.mkdtemp(prefix="test-", dir=ROOT / "runs"))
    (run / "checkpoint").write_text("large")
    yield
    shutil.rmtree(run)


@pytest.mark.usefixtures("ignored_run")
def test_cluster_job_gets_checkout_without_git_ignored_files(tmp_path):
    show = "print('hello', os.environ['POLYGLANCE_RUNS'], sorted(map(str, pathlib.Path().rglob('*'))))"
    with start(["python", "-c", f"import os, pathlib; {show}"], tmp_path / "runs") as process:
        output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    begin, up, submission, *job = output.splitlines()
    assert begin == "starting a local Ray cluster: 2 CPUs, 0 GPUs" and up.startswith("cluster up; dashboard ")
    assert submission.startswith("$ ray job submit ")
    assert len(job) == 1 and job[0].startswith("hello "), "Ray's own lines reach the terminal"
    runs, files = re.search(r"^hello (\S+) (\[.*\])$", output, re.MULTILINE).groups()
    assert runs == str(tmp_path / "runs")
    files = [Path(name) for name in json.loads(files.replace("'", '"'))]
    assert Path("raylib/sample/data/tokenizer.model") in files
    assert Path("pyproject.toml") in files
    parts = {part for path in files for part in path.parts}
    assert not parts & {".git", ".venv", "runs", "__pycache__", ".pytest_cache", ".ruff_cache"}
    assert_nothing_left(output)


@pytest.mark.drill
@pytest.mark.parametrize(("ends", "code"), [("sys.exit(7)", 7), ("os.kill(os.getpid(), 9)", 137)])
def test_cluster_run_returns_exit_code_of_job(ends, code, tmp_path):
    with start(["python", "-c", f"import os, sys; {ends}"], tmp_path) as process:
        output = process.communicate(timeout=240)[0]
    assert process.returncode == code, output
    assert_nothing_left(output)


@pytest.mark.drill
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_cluster_signal_stops_job_then_cluster(number, tmp_path):
    # a child that ignores SIGTERM, in a session of its own
    child = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('running', flush=True); "
        "time.sleep(600)"
    )
    parent = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session=True)"
    )
    lines = []
    with start(["python", "-c", parent], tmp_path) as process:
        for line in process.stdout:
            lines.append(line)
            if line == "running\n":
                process.send_signal(number)
                process.send_signal(number)
                break
        output = "".join(lines) + process.communicate(timeout=120)[0]
    assert process.returncode == 128 + number, output
    assert f"{number.name}: stopping" in output
    assert_nothing_left(output)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["ray job stop", "SIGTERM", "second Ctrl-C"])
def test_cluster_job_that_is_stopped_saves_and_ends_with_143(by, mini, tmp_path, monkeypatch):
    """Told by Ray, or by this launcher, which does the same; Ctrl-C does so once. It ends with its job, and
    not when that may take no longer."""
    monkeypatch.setenv("POLYGLANCE_STOP_SECONDS", "600")
    config = mini("name=stopped", "fit.steps=100000", "fit.log_every=1")
    file, ended, run = tmp_path / "config.json", tmp_path / "ended", tmp_path / "stopped"
    file.write_text(dump_config(config), encoding="utf-8")
    # what Ray starts, told to end as its child is
    wrapper = (
        "import signal, subprocess, sys; signal.signal(15, lambda *_: None); "
        f"code = subprocess.call([sys.executable, '-m', 'pretrain', '--config', '{file}']); "
        f"open('{ended}', 'w').write(str(code))"
    )
    with start(["python", "-c", wrapper], tmp_path) as process:
        head = [process.stdout.readline() for _ in range(2)]
        while not read_metrics(run):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
        if by == "ray job stop":
            token = find_token("".join(head))
            url = re.search(r"dashboard (\S+)", "".join(head))[1]
            request = urllib.request.Request(f"{url}/api/jobs/")
            request.add_header("Authorization", f"Bearer {token.read_text()}")
            (job,) = json.load(urllib.request.urlopen(request, timeout=10))
            stop = [
                Path(sys.executable).with_name("ray"),
                "job",
                "stop",
                "--address",
                url,
                job["submission_id"],
            ]
            env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
            subprocess.run(stop, env=env, check=True, capture_output=True)
        elif by == "SIGTERM":
            process.terminate()
        else:
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
        output = "".join(head) + process.communicate(timeout=120)[0]
    assert process.returncode == (130 if by == "second Ctrl-C" else 143), output
    if by != "second Ctrl-C":
        step = checkpoint.read_meta(checkpoint.find_newest(run))["step"]
        assert ended.read_text() == "143", output
        assert f"stopped by SIGTERM at step {step} of 100000; saved; the same command goes on" in output
    assert_nothing_left(output)


@pytest.mark.drill
def test_cluster_ends_with_killed_launcher(tmp_path):
    lines = []
    command = ["python", "-c", "import time; print('running', flush=True); time.sleep(600)"]
    with start(command, tmp_path) as process:
        for line in process.stdout:
            lines.append(line)
            if line == "running\n":
                process.kill()
                break
    token = find_token("".join(lines))
    limit = time.monotonic() + 60
    while (left := list_processes(token)) and time.monotonic() < limit:
        time.sleep(0.5)
    shutil.rmtree(token.parent)
    assert left == []


def test_cluster_occupied_port_is_one_line_error(capsys):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        assert main(["run", "--dashboard-port", str(port), "--", "true"]) == 1
    choose = "choose another: make run PORT=N, or --dashboard-port N"
    assert capsys.readouterr().err == f"error: port {port}: Address already in use; {choose}\n"


@pytest.mark.parametrize("port", [10_002, 19_999])
def test_cluster_port_of_rays_workers_is_refused_with_the_reason(port, capsys):
    assert main(["run", "--dashboard-port", str(port), "--", "true"]) == 2
    reason = "Ray gives 10002 to 19999 to its workers; choose another: make run PORT=N, or --dashboard-port N"
    assert capsys.readouterr().err == f"error: port {port}: {reason}\n"


def test_cluster_missing_machine_requirements_are_reported(monkeypatch):
    with pytest.raises(UserError, match="port 0: not between"):
        cluster.check_machine(0)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(67_108_864, 0, 67_108_864)
    )
    with pytest.raises(UserError, match=r"^/dev/shm has 67 MB free, the cluster needs 300; .*--shm-size=1g"):
        cluster.check_machine(free_port())
    monkeypatch.setattr(os.path, "ismount", lambda path: False)
    with pytest.raises(UserError, match="^/dev/shm has 0 MB free"):
        cluster.check_machine(free_port())
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="has no ray; `make run` installs it"):
        cluster.check_machine(free_port())


@pytest.mark.parametrize(
    ("printed", "cause"),
    [
        ("something\nno luck today", "no luck today"),
        ("Traceback\n  File x\nValueError: no port\nPorts: {}\nIf you allocate", "ValueError: no port"),
        ("Some Ray subprocesses exited:\n  raylet [exit code=1]\nAll killed.", "raylet [exit code=1]"),
    ],
)
def test_cluster_failed_start_keeps_its_log_and_tells_rays_cause(printed, cause, tmp_path):
    (tmp_path / "ray").write_text(f"#!/bin/sh\ncat <<'E'\n{printed}\nE\nexit 1\n")
    (tmp_path / "ray").chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)
    # `ray` is looked for beside the interpreter first
    code = "import sys; from cluster.__main__ import main; sys.executable = sys.argv[1]; main(sys.argv[2:])"
    arguments = [tmp_path / "python", "run", "--dashboard-port", str(free_port()), "--", "true"]
    completed = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    told = re.escape(f"({cause})")
    error = rf"error: the cluster did not come up {told}; see (\S+)/start.log and .*\n"
    folder = Path(re.fullmatch(error, completed.stderr)[1])
    assert [path.name for path in folder.iterdir()] == ["start.log"]
    shutil.rmtree(folder)


class LogOfJob:
    """A job server's answers: the log of a job in `parts`."""

    def __init__(self, parts: list[str]):
        self.parts = parts

    async def tail_job_logs(self, job):
        for part in self.parts:
            yield part

    def get_job_info(self, job):
        return types.SimpleNamespace(message="Runtime env setup failed: no space")


@pytest.mark.parametrize(
    ("parts", "out", "err"),
    [
        (
            ["INFO Runtime env is set up\nRunning entry", "point for job 7: a\nstep 1\nst", "ep 2\n"],
            "step 1\nstep 2\n",
            "",
        ),
        (["Running entrypoint for job 7: a", "\n", "error: one\n"], "error: one\n", ""),
        (
            ["INFO Runtime env is set up\n"],
            "",
            "INFO Runtime env is set up\nRuntime env setup failed: no space\n",
        ),
    ],
)
def test_cluster_log_begins_with_the_jobs_own_first_line(parts, out, err, capsys):
    asyncio.run(follow(LogOfJob(parts), "7"))
    assert capsys.readouterr() == (out, err)


def test_cluster_run_without_command_is_an_error(capsys):
    assert main(["run"]) == 2
    assert "give one after --" in capsys.readouterr().err


def test_cluster_submission_equals_plain_ray_job_submit(monkeypatch):
    monkeypatch.delenv("POLYGLANCE_RUNS", raising=False)
    command = ["python", "-m", "pretrain", "tiny", "name=a b"]
    line = cluster.compose_submission("http://127.0.0.1:8265", command)
    assert line[:7] == shlex.split("ray job submit --address http://127.0.0.1:8265 --working-dir .")
    assert line[7] == "--runtime-env-json"
    assert line[9:] == ["--", *command]
    env = json.loads(line[8])["env_vars"]
    assert env["POLYGLANCE_RUNS"] == str(ROOT / "runs")
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert env.get("POLYGLANCE_COMMIT") == (git.stdout.strip() or None)


def test_cluster_submission_elsewhere_uploads_nothing(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # of an installed package: its folder is site-packages, which no job gets
    monkeypatch.delenv("POLYGLANCE_RUNS", raising=False)
    line = cluster.compose_submission("", ["python"])
    assert "--working-dir" not in line and cluster.job_folder() == tmp_path
    assert json.loads(line[6])["env_vars"] == {"POLYGLANCE_RUNS": str(tmp_path / "runs")}
    monkeypatch.setenv("POLYGLANCE_RUNS", "elsewhere")
    line = cluster.compose_submission("", ["python"])
    assert json.loads(line[6])["env_vars"]["POLYGLANCE_RUNS"] == str(tmp_path / "elsewhere")


def test_cluster_rayjob_manifest_matches_project(capsys):
    spec = yaml.safe_load((ROOT / "cluster/rayjob.yaml").read_text(encoding="utf-8"))["spec"]
    python, m, module, *arguments = spec["entrypoint"].split()
    assert (python, m, module) == ("python", "-m", "pretrain")
    assert pretrain([*arguments, "--print-config"]) == 0
    config = json.loads(capsys.readouterr().out)
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    containers = [group["template"]["spec"]["containers"][0] for group in groups]
    gpus = [int(each["resources"]["limits"].get("nvidia.com/gpu", 0)) for each in containers]
    assert gpus[0] == 0
    assert gpus[1] * groups[1]["replicas"] == config["workers"] == 8
    for container, group in zip(containers, groups, strict=True):
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        assert "persistentVolumeClaim" in mounts["/shared"]
    # a notice comes soon enough for a save of the seconds that the run is told of
    env = yaml.safe_load(spec["runtimeEnvYAML"])
    seconds = int(env["env_vars"]["POLYGLANCE_STOP_SECONDS"])
    for container, group, name in zip(
        containers, groups, ("RAY_JOB_STOP_WAIT_TIME_S", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"), strict=True
    ):
        assert container["env"] == [{"name": name, "value": str(seconds)}]
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] > seconds
    assert env["env_vars"]["POLYGLANCE_RUNS"].startswith("/shared/")
    assert config["corpus"].startswith("/shared/")
    assert cluster["authOptions"] == {"mode": "token"}
    assert f"ray=={cluster['rayVersion']}" in (ROOT / "requirements.txt").read_text(encoding="utf-8").split()


def write_tools(folder, tools):
    """Stand-ins, {name: lines of Bash}, in an environment that slurm.sh activates."""
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").write_text(f"PATH={folder}/.venv/bin:$PATH\n")
    for name, body in tools.items():
        tool = folder / ".venv/bin" / name
        tool.write_text(f"#!/bin/bash\n{body}\n")
        tool.chmod(0o755)


@pytest.mark.parametrize(("started", "code"), [(True, 5), (False, 1)])
def test_cluster_slurm_script_starts_nodes_and_cleans_up(started, code, tmp_path):
    """Run with stand-ins for Slurm and Ray: what the nodes would be told, and that nothing stays."""
    script = ROOT / "cluster/slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    tools = {
        "scontrol": "echo node-a; echo node-b",
        "srun": 'while [ "$1" != ray ]; do shift; done; exec "$@"',
        "ray": 'printf "%s\\n" "$@" >ray.txt; cp "$RAY_AUTH_TOKEN_PATH" token.txt; [ -e fail ] && exit 0; '
        'while [ "$1" != -- ]; do shift; done; shift; exec "$@"',
        "python": 'if [ "$1" = -c ]; then exec python3 "$@"; fi; '
        'echo "$RAY_ADDRESS" "$@" >python.txt; exit 5',
    }
    write_tools(tmp_path, tools)
    if not started:
        (tmp_path / "fail").touch()
    job = {
        "SUBMIT_DIR": tmp_path,
        "JOB_ID": 1,
        "JOB_NUM_NODES": 2,
        "JOB_NODELIST": "node-[a-b]",
        "CPUS_ON_NODE": 4,
    }
    env = {k: v for k, v in os.environ.items() if k != "POLYGLANCE_RUNS"}
    env |= {f"SLURM_{name}": str(value) for name, value in job.items()}
    completed = subprocess.run(
        ["bash", script, "base", "corpus=/a b"], env=env, capture_output=True, text=True
    )
    assert completed.returncode == code, completed.stderr
    assert len((tmp_path / "token.txt").read_text()) == 64
    assert list((tmp_path / "runs").iterdir()) == []
    reported = (tmp_path / "ray.txt").read_text().split("\n")
    assert reported[:5] == ["symmetric-run", "--address", "node-a:6379", "--min-nodes", "2"]
    if started:
        command = (tmp_path / "python.txt").read_text()
        assert command == "node-a:6379 -m pretrain base workers=16 corpus=/a b\n"
    else:
        assert "did not start" in completed.stderr


def test_cluster_slurm_script_passes_a_notice_to_the_driver_and_waits_for_its_save(tmp_path):
    """With a stand-in for the run, which takes a second to save; to srun it would be SIGKILL."""
    script = ROOT / "cluster/slurm.sh"
    tools = {
        "scontrol": "echo node-a",
        "srun": 'trap "touch killed" TERM; while [ "$1" != ray ]; do shift; done; "$@"',
        "ray": 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"',
        "python": 'if [ "$1" = -c ]; then exec python3 "$@"; fi; '
        'trap "sleep 1; echo saved; exit 143" TERM; touch begun; while :; do sleep 0.05; done',
    }
    write_tools(tmp_path, tools)
    job = {"SUBMIT_DIR": tmp_path, "JOB_ID": 1, "JOB_NUM_NODES": 1, "JOB_NODELIST": "node-a"}
    env = {k: v for k, v in os.environ.items() if k != "POLYGLANCE_RUNS"} | {"SLURM_CPUS_ON_NODE": "4"}
    env |= {f"SLURM_{name}": str(value) for name, value in job.items()}
    with subprocess.Popen(["bash", script, "base"], env=env, stdout=subprocess.PIPE, text=True) as batch:
        while not (tmp_path / "begun").exists():
            assert batch.poll() is None
            time.sleep(0.02)
        batch.terminate()
        assert batch.communicate(timeout=30)[0] == "saved\n"
    assert batch.returncode == 143 and not (tmp_path / "killed").exists()
    assert list((tmp_path / "runs").iterdir()) == []


def test_requirements_are_all_pinned():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert all(re.fullmatch(r"[\w.]+", version) for version in pins.values())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for expected in [*project["dependencies"], *extras["ray"], *extras["finetune"], *extras["dev"]]:
        requirement = Requirement(expected)
        assert requirement.specifier.contains(pins[requirement.name.lower()]), expected


def test_make_run_submits_tiny_recipe():
    line = ["make", "-n", "--no-print-directory", "run", "NAME=a", "PORT=9", "ARGS=fit.steps=3"]
    made = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    command = " ".join(made.stdout.replace("\\\n", " ").split("exec ")[-1].split())
    assert command.endswith(
        " -m cluster run --cpus 2 --gpus 0 --dashboard-port 9 -- python -m pretrain tiny name=a fit.steps=3"
    )

"""A local Ray cluster for one job (`python -m cluster run`); the files beside are for Slurm and Kubernetes.

1. `check_machine`: Ray, the dashboard's port, shared memory.
2. `_start_head`: `ray start --head` as a child, on 127.0.0.1, with a token of its own, everything it writes
   in one folder.
3. `_submit_job`: the job is submitted as `ray job submit` does it, to this or any other cluster; its log is
   followed (`cluster.submit`), its exit code returned.
4. `_stop_all`: the job, then the processes that came from here, by their ids, and the folder.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

from raylib.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
OBJECT_STORE_BYTES = 200_000_000  # batches do not pass through it
SHARED_MEMORY_BYTES = 300_000_000  # the object store, and the batches that loader processes hand over
START_SECONDS, STOP_SECONDS = 120, 15  # at most, of the cluster
JOB_STOP_SECONDS = 60  # at most, for a job to save and end; POLYGLANCE_STOP_SECONDS gives it more
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # prctl(2)
WORKER_PORTS = range(10_002, 20_000)  # Ray's, for worker processes
# in what `ray start` prints: an exception's own line, or that of a process which ended
CAUSE = re.compile(r"^(?:[\w.]*(?:Error|Exception): .*|.*\[exit code=.*)$", re.MULTILINE)
FINAL_STATES = ("SUCCEEDED", "FAILED", "STOPPED")


class SignalReceived(BaseException):
    """Signal `args[0]` asked this process to end."""


class Cluster(NamedTuple):
    """A head that has been started."""

    head: subprocess.Popen
    url: str
    env: dict[str, str]  # for every process that talks to it
    folder: Path  # logs, sockets, token

    def request(self, path: str, method: str = "GET") -> Any:
        """Return the job server's reply (REST), parsed. Raises `OSError` if there is none, or a refusal."""
        token = Path(self.env["RAY_AUTH_TOKEN_PATH"]).read_text(encoding="ascii")
        http_request = urllib.request.Request(
            self.url + path, method=method, headers={"Authorization": f"Bearer {token}"}
        )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(http_request, timeout=10) as reply:
            return json.load(reply)

    def jobs(self) -> list[dict]:
        """Return the records of the submitted jobs, oldest first: `submission_id`, `status`,
        `driver_exit_code`, ..."""
        submitted = [job for job in self.request("/api/jobs/") if job["submission_id"]]
        return sorted(submitted, key=lambda job: job["start_time"])


def run_job(command: list[str], cpus: int, gpus: int, port: int) -> int:
    """Run `command` as a job on a cluster that lives only as long; returns its exit code.

    For a process of its own: at the end, every process that descends from the calling one is stopped. `port`
    is that of the dashboard, which also is the job server.

    Raises:
        UserError: the machine lacks something, or the cluster did not come up.
    """
    check_machine(port)
    folder = Path(
        tempfile.mkdtemp(prefix="polyglance-", dir="/tmp")
    )  # short: a socket's path has 107 characters
    cluster = None
    try:
        for number in SIGNALS:
            signal.signal(number, _interrupt)
        # processes whose parent dies become children of this one, so that none is lost
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        print(f"starting a local Ray cluster: {cpus} CPUs, {gpus} GPUs", flush=True)
        cluster = _start_head(folder, cpus, gpus, port)
        _wait_until_up(cluster)
        print(
            f"cluster up; dashboard {cluster.url} (token: {cluster.env['RAY_AUTH_TOKEN_PATH']})", flush=True
        )
        return _submit_job(cluster, command)
    except SignalReceived as stopped:
        print(
            f"{signal.Signals(stopped.args[0]).name}: stopping the job and the cluster",
            file=sys.stderr,
            flush=True,
        )
        return 128 + stopped.args[0]
    finally:
        hurry = threading.Event()
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # must not leave half a cluster
        signal.signal(signal.SIGINT, lambda *_: hurry.set())  # a second Ctrl-C waits for no save
        _stop_all(cluster, hurry)
        (folder / "token").unlink(missing_ok=True)
        if not isinstance(sys.exc_info()[1], UserError):  # which names the logs
            shutil.rmtree(folder, ignore_errors=True)


def check_machine(port: int) -> None:
    """Check that a local cluster can start here.

    Raises:
        UserError: it cannot.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError(f"{sys.executable} has no ray; `make run` installs it, or train with runtime=local")
    if not 0 < port < 1 << 16:
        raise UserError(f"port {port}: not between 1 and 65535")
    if port in WORKER_PORTS:
        raise UserError(
            f"port {port}: Ray gives {WORKER_PORTS[0]} to {WORKER_PORTS[-1]} to its workers; choose another: "
            "make run PORT=N, or --dashboard-port N"
        )
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as e:
            raise UserError(
                f"port {port}: {e.strerror}; choose another: make run PORT=N, or --dashboard-port N"
            ) from None
    free = shutil.disk_usage("/dev/shm").free if os.path.ismount("/dev/shm") else 0
    if free < SHARED_MEMORY_BYTES and sys.platform.startswith("linux"):
        raise UserError(
            f"/dev/shm has {free // 10**6} MB free, the cluster needs {SHARED_MEMORY_BYTES // 10**6}; "
            "delete files there, enlarge it (docker run --shm-size=1g), or train without Ray: "
            "python -m pretrain tiny runtime=local"
        )


def compose_submission(url: str, command: list[str]) -> list[str]:
    """Return the `ray job submit` line, run in `job_folder()`: what it uploads is the checkout without what
    git ignores. Elsewhere the packages are installed, and nothing is uploaded: the cluster runs in the user's
    folder.

    A job's copy of a checkout has no history, so it is told where runs go and which commit it is.
    """
    folder = job_folder()
    env = {"POLYGLANCE_RUNS": str(Path(os.environ.get("POLYGLANCE_RUNS") or folder / "runs").absolute())}
    upload = []
    if folder == ROOT:
        upload = ["--working-dir", "."]
        with contextlib.suppress(FileNotFoundError):  # no git, no commit
            head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
            if head.returncode == 0:
                env["POLYGLANCE_COMMIT"] = head.stdout.strip()
                from raylib.provenance import has_local_changes  # heavy: it brings PyTorch

                env |= {"POLYGLANCE_LOCAL_CHANGES": "1"} if has_local_changes() else {}
    options = ["--address", url, *upload, "--runtime-env-json", json.dumps({"env_vars": env})]
    return ["ray", "job", "submit", *options, "--", *command]


def job_folder() -> Path:
    """Return the folder that a job is run in: the checkout for whoever is in it, else the current folder."""
    here = Path.cwd()
    # an installed package lies in site-packages, which is no folder to run in, or to upload
    in_checkout = (ROOT / "pyproject.toml").is_file() and here.is_relative_to(ROOT)
    return ROOT if in_checkout else here


def job_stop_seconds() -> int:
    """Return how long a job that was asked to end may take to save.

    Raises:
        UserError: POLYGLANCE_STOP_SECONDS is no number.
    """
    given = os.environ.get("POLYGLANCE_STOP_SECONDS") or str(JOB_STOP_SECONDS)
    if not given.isdecimal():
        raise UserError(f"POLYGLANCE_STOP_SECONDS={given}: no number of seconds")
    return int(given)


def _start_head(folder: Path, cpus: int, gpus: int, port: int) -> Cluster:
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32), encoding="ascii")
    gcs = _free_port()
    skipped = ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN")  # of another cluster
    local = f"{os.environ.get('no_proxy', '')},127.0.0.1,localhost".lstrip(",")
    env = {k: v for k, v in os.environ.items() if k not in skipped} | {
        # the job's `python`
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        # some of Ray's actors else look for any cluster of this machine
        "RAY_ADDRESS": f"127.0.0.1:{gcs}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # 15 by default, for machines that have something better to do
        "RAY_JOB_STOP_WAIT_TIME_S": str(job_stop_seconds()),  # for a job to save; then it is killed
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # its job has ended: nothing to move elsewhere
        # "one machine": every server then listens on 127.0.0.1 alone
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "PYTHONUNBUFFERED": "1",
        "no_proxy": local,
        "NO_PROXY": local,
    }
    command = [
        "ray",
        "start",
        "--head",
        "--block",
        "--include-dashboard=true",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={port}",
        "--node-ip-address=127.0.0.1",
        f"--port={gcs}",
        "--dashboard-agent-listen-port=0",
        f"--ray-client-server-port={_free_port()}",
        f"--temp-dir={folder}/ray",
        f"--num-cpus={cpus}",
        f"--num-gpus={gpus}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
    ]
    with open(folder / "start.log", "wb") as log:
        # a session of its own: Ctrl-C reaches this process alone, which stops job and cluster in order
        head = subprocess.Popen(
            command,
            cwd=folder if job_folder() == ROOT else job_folder(),  # workers' too, where nothing is uploaded
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
            # when this process dies, be it by SIGKILL, the head ends
            preexec_fn=lambda: _prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
        )
    return Cluster(head, f"http://127.0.0.1:{port}", env, folder)


def _wait_until_up(cluster: Cluster) -> None:
    limit = time.monotonic() + START_SECONDS
    while time.monotonic() < limit and cluster.head.poll() is None:
        with contextlib.suppress(OSError):
            cluster.jobs()
            if cluster.request("/nodes?view=summary")["data"]["summary"]:  # whose agent starts jobs
                return
        time.sleep(0.3)
    log = cluster.folder / "start.log"
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    cause = (CAUSE.findall(text) or text.splitlines() or ["Ray printed nothing"])[-1].strip()
    raise UserError(f"the cluster did not come up ({cause}); see {log} and {cluster.folder}/ray")


def _submit_job(cluster: Cluster, command: list[str]) -> int:
    submission = compose_submission(cluster.url, command)
    print(f"$ {shlex.join(submission)}", flush=True)
    upload = {"working_dir": "."} if "--working-dir" in submission else {}
    runtime_env = {**upload, **json.loads(submission[submission.index("--runtime-env-json") + 1])}
    follower = subprocess.Popen(
        [sys.executable, "-m", "cluster.submit", cluster.url, json.dumps(runtime_env), *command],
        cwd=job_folder(),
        env=cluster.env,
        start_new_session=True,
    )
    while follower.poll() is None and cluster.head.poll() is None:
        time.sleep(0.3)
        _reap(follower, cluster.head)
    # the follower ends with the job, or because it lost its connection
    while (job := _find_job(cluster)) and job["status"] not in FINAL_STATES:
        time.sleep(1)
        _reap(cluster.head)
    if job is None:  # it was not accepted
        return follower.returncode or 1
    code = job["driver_exit_code"]
    if code is None:  # Ray keeps none of a job that was stopped; else it never ran
        return 128 + signal.SIGTERM if job["status"] == "STOPPED" else 1
    return code if code >= 0 else 128 - code


def _find_job(cluster: Cluster) -> dict | None:
    """Return the job, the first that was submitted; None if there is none."""
    while cluster.head.poll() is None:
        with contextlib.suppress(OSError):  # a busy machine answers late
            return next(iter(cluster.jobs()), None)
        time.sleep(1)
    raise UserError(f"the cluster ended before the job; see {cluster.folder}/start.log")


def _stop_all(cluster: Cluster | None, hurry: threading.Event) -> None:
    """End the job, which saves first unless there is a `hurry`; then all processes that came from here."""
    import psutil

    if cluster and cluster.head.poll() is None:
        with contextlib.suppress(OSError):  # no job server yet, or no more
            for job in cluster.jobs():
                if job["status"] not in FINAL_STATES:
                    cluster.request(f"/api/jobs/{job['submission_id']}/stop", "POST")
            limit = time.monotonic() + job_stop_seconds() + STOP_SECONDS
            while any(job["status"] not in FINAL_STATES for job in cluster.jobs()):
                if time.monotonic() > limit or hurry.wait(0.2):
                    break
                _reap(cluster.head)
    if not hurry.is_set():
        psutil.wait_procs([p for p in psutil.Process().children() if _follows(p)], timeout=5)
    for process in psutil.Process().children():
        process.terminate()  # the head ends its own children
    limit = time.monotonic() + STOP_SECONDS
    while processes := psutil.Process().children(recursive=True):
        if time.monotonic() > limit:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        psutil.wait_procs(processes, timeout=0.2)


def _reap(*own: subprocess.Popen) -> None:
    """Let go of children that have ended, `own` with their exit codes. The job's processes are among them,
    once their parent has ended: to Ray, which waits for a job that it stops, they live until then."""
    for process in own:
        process.poll()
    with contextlib.suppress(ChildProcessError):  # there is none
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _follows(process: Any) -> bool:
    """Return whether a child prints the job's log: it ends with the job, after its last lines."""
    import psutil

    with contextlib.suppress(psutil.Error):  # it has ended
        return "cluster.submit" in process.cmdline()
    return False


def _interrupt(number: int, frame: Any) -> None:
    raise SignalReceived(number)


def _prctl(option: int, value: int) -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _free_port() -> int:
    """Return a port between those that Ray gives its workers and those that systems give at random: it stays
    free."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", 20_000 + secrets.randbelow(12_000)))
            return probe.getsockname()[1]

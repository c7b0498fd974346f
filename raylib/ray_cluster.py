"""The Ray cluster that a process works on: the one that RAY_ADDRESS names, or one of its own, for this
machine alone; what its processes are told."""

import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raylib.errors import MachineError, UserError
from raylib.notice import JOB_CONFIG, STOP_SECONDS, known_grace

RAY_ENV = {  # environment variables of every process
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # Train's run page needs it
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # or every print comes twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # `raylib.ray_run` has its own, which costs no step
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of a trial are what they are everywhere
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune shows a table of ours only with its older output
    # a stopped trial's loaders may end before its process is given to the next
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",
    "TUNE_GLOBAL_CHECKPOINT_S": "0.2",  # or ten seconds of a search are lost with its driver
    "RAY_worker_niceness": "0",  # 15 by default: beside anything else on the machine workers would starve
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",  # "(RayTrainWorker pid=...)" before each line of a worker
    # Python's own: Ray shows its deprecation warnings, of its own code too, where nothing is set
    "PYTHONWARNINGS": "default::DeprecationWarning:__main__",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a checkpoint of a pruning round has no score
}
CONNECT_SECONDS = 10.0  # for the head of a cluster to answer
WRONG_TOKEN = (
    "this cluster has a token, and this process another or none; set RAY_AUTH_MODE=token, and "
    "RAY_AUTH_TOKEN_PATH= to the file with its token"
)
NO_CLUSTER = "start that cluster, give the address of another, or unset RAY_ADDRESS to start one here"
TRACKER_ENV = ("WANDB_", "MLFLOW_")  # of trackers, which trials have in their own processes


@contextmanager
def ray_cluster(quiet: bool = False) -> Iterator[None]:
    """Be in a cluster within the block (`connect_to_ray`); one that was started for it ends with it."""
    has_started = connect_to_ray(quiet)
    import ray

    try:
        yield
    finally:
        if has_started:
            ray.shutdown()


def connect_to_ray(quiet: bool = False) -> bool:
    """Join the cluster that RAY_ADDRESS names, or start one here; return whether this process did so.
    `quiet`: nothing that workers print comes here.

    Raises:
        UserError: Ray is not installed, or RAY_ADDRESS is no address of a cluster.
        MachineError: there is no cluster at that address, or it does not take this process (another version,
            another token); none starts here.
    """
    for name, value in RAY_ENV.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise UserError(
            "ray is not installed; install the pinned requirements, or run with runtime=local"
        ) from None
    if ray.is_initialized():
        return False
    if grace := known_grace():  # workers, who save, do not have this process's environment
        os.environ[STOP_SECONDS] = f"{grace.seconds:g}"
    on_sigterm = signal.getsignal(signal.SIGTERM)
    # that tokens are on is no news; a warning if they are off stays
    tokens = logging.getLogger("ray._private.authentication.authentication_token_setup")
    tokens.addFilter(lambda record: "is enabled" not in record.getMessage())
    address = os.environ.get("RAY_ADDRESS") or "local"
    _check_address(address)
    # a terminal that is closed tells all of its processes: Ray's own, which inherit this, stay until a run
    # has saved
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    words: list[str] = []
    try:
        is_local = address == "local"
        if is_local:
            _make_private_token()
        with private_ray() if is_local else _stderr_kept(words):
            context: Any = ray.init(
                address=address,
                log_to_driver=not quiet,
                logging_level=logging.WARNING,
                runtime_env=_worker_environment(address),
            )
    except Exception as e:  # of many kinds: no connection, another version, a token
        reason = " ".join(str(e).split())[:300] or type(e).__name__
        if any("InvalidAuthToken" in text for text in (reason, *words)):
            raise MachineError(f"RAY_ADDRESS={address}: {WRONG_TOKEN}") from e
        if address == "local":
            raise MachineError(
                f"Ray does not start here ({reason}); its logs are in /tmp/ray/session_latest/logs; "
                "runtime=local trains without it"
            ) from e
        raise MachineError(f"RAY_ADDRESS={address}: {reason}; {NO_CLUSTER}") from e
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    sys.stderr.write("".join(words))
    if address == "local":
        print(f"Ray's dashboard: http://{context.dashboard_url} (a token? `ray get-auth-token`)", flush=True)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray sets its own, which ends the process at once
    return True


@contextmanager
def _stderr_kept(words: list[str]) -> Iterator[None]:
    """Append to `words` what anything in this process writes on stderr in the block: Ray's code in C++ tells
    there, once a second, why it is refused, and its exception does not."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            words.append(file.read().decode(errors="replace"))


def _worker_environment(address: str) -> dict[str, Any]:
    """Return Ray's runtime environment of all processes of this one's job: what is for them of its variables,
    and RAY_ADDRESS. Actors of Ray Train look which others live, and on a machine with several clusters they
    would ask whichever was started last."""
    variables = {k: v for k, v in os.environ.items() if _is_for_workers(k, address == "local")}
    if address.startswith("ray://"):
        return {"env_vars": variables}
    if JOB_CONFIG in os.environ:  # submitted: it may have a hook of its own, and Ray allows one
        return {"env_vars": {**variables, "RAY_ADDRESS": address}}

    # by its code, not by name: such a process imports nothing of ours
    def set_address() -> None:
        import os

        import ray

        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address

    return {"env_vars": variables, "worker_process_setup_hook": set_address}


@contextmanager
def private_ray() -> Iterator[None]:
    """Let all servers of a Ray cluster that is started in the block listen on 127.0.0.1, and none report to
    Ray's makers how it is used, unless RAY_USAGE_STATS_ENABLED says so.

    Ray has the first for systems whose firewalls ask about each server, and no other way to it: `ray.init`
    takes the machine's outer address even if it is told 127.0.0.1."""
    from ray._private import ray_constants

    usage = "RAY_USAGE_STATS_ENABLED"
    private = {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0", usage: os.environ.get(usage, "0")}
    stored = {name: os.environ[name] for name in private if name in os.environ}
    before = ray_constants.ENABLE_RAY_CLUSTER
    # this process read the first when it imported Ray; those that it starts do now
    os.environ |= private
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        for name in private:
            del os.environ[name]
        os.environ |= stored


def _check_address(address: str) -> None:
    """Look for a cluster at RAY_ADDRESS: Ray itself would go on trying for minutes.

    Raises:
        UserError: it is no address. MachineError: nothing answers there.
    """
    if address in ("local", "auto") or address.startswith("ray://"):
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in address or not port.isdecimal() or int(port) >= 1 << 16:
        raise UserError(f"RAY_ADDRESS={address}: not of the form HOST:PORT, such as 10.0.0.1:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as e:
        reason = e.strerror or e
        raise MachineError(f"RAY_ADDRESS={address}: nothing answers there ({reason}); {NO_CLUSTER}") from None


def this_job() -> dict[str, Any]:
    """Return {"job", "node", "pid"} of this driver, as `job_has_ended` finds it."""
    import ray

    return {
        "job": ray.get_runtime_context().get_job_id(),
        "node": ray.util.get_node_ip_address(),
        "pid": os.getpid(),
    }


def job_has_ended(record: Mapping[str, Any]) -> bool | None:
    """Return whether the Ray job of a run's owner (`raylib.lock`) has ended; None: that is not known on the
    cluster of RAY_ADDRESS, or there is none."""
    if "RAY_ADDRESS" not in os.environ:
        return None
    with ray_cluster():
        from ray.util.state import list_jobs
        from ray.util.state.exception import RayStateApiException

        job = record["ray"]
        try:
            # numbers of jobs come again in another cluster, those of a process on its node hardly
            found = [entry for entry in list_jobs(detail=True) if entry.job_id == job["job"]]
        except RayStateApiException:  # no dashboard
            return None
    drivers = [entry for entry in found if entry.driver_info]
    same = [
        entry.status
        for entry in drivers
        if (entry.driver_info.node_ip_address, int(entry.driver_info.pid)) == (job["node"], job["pid"])
    ]
    return same[0] in ("SUCCEEDED", "FAILED", "STOPPED") if same else None


def _make_private_token() -> None:
    """Make the token that Ray keeps for this user's clusters, readable for this user alone: Ray's own is for
    everybody on the machine."""
    given = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or any(map(os.environ.get, given)):
        return
    path = Path.home() / ".ray" / "auth_token"
    if path.is_file():
        if path.stat().st_uid == os.getuid():
            path.chmod(0o600)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32))


def _is_for_workers(variable: str, is_local: bool) -> bool:
    """Return whether an environment variable of this process is one for every process of a cluster. Those of
    one that is started here have it anyway, and what is handed to Ray stands in its logs, which everybody on
    the machine can read: trackers' keys."""
    # WANDB_SERVICE is the address of this process's own helper
    return variable in (*RAY_ENV, STOP_SECONDS) or (
        not is_local and variable.startswith(TRACKER_ENV) and variable != "WANDB_SERVICE"
    )

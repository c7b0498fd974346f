"""Run a training function here, or on the workers of a Ray cluster."""

import hashlib
import json
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from raylib import checkpoint
from raylib.config import differing_paths, dump_config, read_stored_settings, without_settings
from raylib.display import hide_secrets
from raylib.distributed import barrier
from raylib.errors import MachineError, UserError
from raylib.fileio import copy_atomically, read_json_object, write_atomically
from raylib.lock import add_ray_job, hold_run, stored_owner, watch_file, work_for
from raylib.notice import JOB_CONFIG, STOP_SECONDS, Interrupted, known_grace, stop_line
from raylib.provenance import DataFile, record_identity
from raylib.ray_run import train_on_ray
from raylib.runtime import LocalRuntime, Reporter, Runtime, set_deterministic
from raylib.settings import MUTABLE_SETTINGS, LaunchConfig
from raylib.trackers import flatten
from raylib.tracking import RunTracking, track_run

RAY_ENV = {  # environment variables of every process
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # Train's run page needs it
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # or every print comes twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # `raylib.ray_run` has its own, which costs no step
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of a trial are what they are everywhere
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune shows a table of ours only with its older output
    # a stopped trial's loaders may end before its process is given to the next
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",
    "TUNE_GLOBAL_CHECKPOINT_S": "0.2",  # or ten seconds of a search are lost with its driver
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",  # "(RayTrainWorker pid=...)" before each line of a worker
    # Python's own: Ray shows its deprecation warnings, of its own code too, where nothing is set
    "PYTHONWARNINGS": "default::DeprecationWarning:__main__",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a checkpoint of a pruning round has no score
}


CONNECT_SECONDS = 10.0  # for the head of a cluster to answer
NO_CLUSTER = "start that cluster, give the address of another, or unset RAY_ADDRESS to start one here"
JOB_COPIES = "working_dir_files"  # folder of Ray's, with the copies of jobs' working directories
IDLE_CPUS = 0.01  # of a trial that only waits for its workers: 0 is refused
TRACKER_ENV = ("WANDB_", "MLFLOW_")  # of trackers, which trials have in their own processes


def run_folder(config: LaunchConfig) -> Path:
    """Return the folder of a run."""
    return Path(config.runs).absolute() / config.name


def is_main_process(config: LaunchConfig) -> bool:
    """Return whether this process prints and writes for the run: of torchrun's processes, the first does."""
    return config.runtime == "ray" or int(os.environ.get("RANK", 0)) == 0


def count_workers(config: LaunchConfig) -> int:
    """Return how many processes train together: `workers` on Ray, torchrun's here."""
    return config.workers if config.runtime == "ray" else int(os.environ.get("WORLD_SIZE", 1))


def no_log(*parts: Any, **options: Any) -> None:
    """Print nothing: `print` of every process but the main one."""


def config_hash(config: LaunchConfig) -> str:
    """Return the SHA-256 of the settings that numbers depend on: all but `name` and those that may change
    within a run."""
    values = without_settings(config.model_dump(mode="json"), {"name", *MUTABLE_SETTINGS})
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def hold(config: LaunchConfig) -> AbstractContextManager[bool]:
    """Own the folder of a run in the block (`raylib.lock.hold_run`); under torchrun worker 0 does for all."""
    if not is_main_process(config):
        return nullcontext(False)
    warn_of_copy(config.runs)
    return hold_run(run_folder(config), job_has_ended)


def warn_of_copy(runs: str) -> None:
    """Print a line if a relative `runs` lies in the copy of a working directory that a Ray job runs in."""
    if not Path(runs).is_absolute() and JOB_COPIES in Path.cwd().parts:
        print(
            f"warning: runs={runs} is relative, and this job's working directory is a copy that Ray deletes "
            f"({Path.cwd()}): give runs= an absolute path, or set POLYGLANCE_RUNS",
            file=sys.stderr,
            flush=True,
        )


def open_run(
    config: LaunchConfig, files: Iterable[DataFile] = (), verify: bool = False, code: Iterable[Path] = ()
) -> None:
    """Prepare a run's folder, which the caller holds: store its config and copies of the user's own files,
    `code`; compare its data, `files`, with what it began with; apply `resume`.

    Raises:
        UserError: two files of `code` have one name; the folder belongs to a run of other settings (they are
            named); its data changed (`raylib.provenance`); a checkpoint to resume from is missing or not
            whole; a setting of a new run holds a password.
    """
    run, code = run_folder(config), list(dict.fromkeys(code))
    if len({file.name for file in code}) < len(code):
        raise UserError(f"two files of one name: {', '.join(map(str, code))}; rename one")
    (run / checkpoint.FOLDER).mkdir(parents=True, exist_ok=True)
    stored = run / "config.json"
    if stored.exists():
        before = read_stored_settings(type(config), read_json_object(stored)).values
        changed = [
            p for p in differing_paths(before, config.model_dump(mode="json")) if p not in MUTABLE_SETTINGS
        ]
        if changed:
            raise UserError(
                f"{run} holds a run with other settings ({', '.join(changed)}); give this one another name="
                f"{checkpoint.hint_if_unsaved(run)}"
            )
    elif shown := _secret_settings(config):
        raise UserError(
            f"{', '.join(shown)}: an address with a password or a key in it, which config.json and trackers "
            "would show; leave it to the environment (docs/security.md)"
        )
    for note in record_identity(run, files, verify):
        print(note, flush=True)
    write_atomically(stored, dump_config(config) + "\n")
    watch_file(stored)
    for file in code:
        copy_atomically(file, run / file.name)  # which may be the copy itself: a kill must not cost it
    checkpoint.settle(run)
    if config.resume != "newest":
        checkpoint.rewind(run, config.resume)
    elif start := checkpoint.find_newest(run):
        checkpoint.verify(start)


def drop_unneeded(config: LaunchConfig) -> None:
    """Drop what the finished run of `config` does not keep."""
    if not config.keep_optimizer and is_main_process(config):
        checkpoint.drop_optimizers(run_folder(config))


def tracked(config: Any) -> AbstractContextManager[RunTracking]:
    """Track the run of `config`, whose folder is there, by its `fit.track` while the block lasts: see
    `track_run`."""
    same = config.model_copy(update={"fit": config.fit.model_copy(update={"seed": 0})})
    tags = {"recipe": config.recipe, "seed": str(config.fit.seed), "settings": config_hash(same)[:12]}
    return track_run(
        run_folder(config),
        config.stored_as,
        config.model_dump(mode="json"),
        {name: value for name, value in tags.items() if value},
        config.fit.track if is_main_process(config) else (),
    )


def _secret_settings(config: LaunchConfig) -> list[str]:
    """Return the paths of settings with a password or a key in an address."""
    texts = {path: str(value) for path, value in flatten(config.model_dump(mode="json")).items()}
    return [path for path, text in texts.items() if hide_secrets(text) != text]


def launch(
    main: Callable[[Runtime, Any], dict], config: Any, run: Path, reporter: Reporter | None = None
) -> dict:
    """Call `main(runtime, config)` on every worker; return the result of worker 0. In a trial of a search,
    `reporter` reports every checkpoint.

    Raises:
        UserError: raised by `main` on any worker, in one line.
    """
    with tracked(config) as tracking:
        if config.runtime == "local":
            set_deterministic(config.fit.deterministic)
            runtime = LocalRuntime(run, config.fit.keep, reporter)
            barrier()  # the others come here while the first still opens the run
            with work_for(None if is_main_process(config) else stored_owner(run)):
                result = main(runtime, config)
        else:
            result = _on_ray(main, config, run, reporter)
        if notice := result.get("notice"):
            line = stop_line(notice, result["steps"], result["total_steps"])
            raise Interrupted(notice, line if is_main_process(config) else "")
        if not result["finished"]:
            tracking.status = "stopped"
        return result


def _on_ray(main: Callable, config: Any, run: Path, reporter: Reporter | None) -> dict:
    with ray_cluster():
        import ray

        resources = ray.cluster_resources()
        gpu = resources.get("GPU", 0) > 0 if config.gpu is None else config.gpu
        available = int(resources.get("GPU" if gpu else "CPU", 0))
        if available < config.workers:
            raise UserError(
                f"workers={config.workers}, but the cluster has {available} {'GPUs' if gpu else 'CPUs'}; set "
                f"workers={available}"
            )
        is_trial = reporter is not None
        worker = worker_resources(list_nodes(), config.workers, gpu, config.fit.loader_workers, is_trial)
        add_ray_job(run, this_job())
        return train_on_ray(main, config, run, worker, reporter)


def list_nodes() -> list[dict[str, float]]:
    """Return what each node of the cluster has in all: {"CPU", "GPU", ...}."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def worker_resources(
    nodes: list[dict[str, float]], workers: int, gpu: bool, loaders: int | None, is_trial: bool = False
) -> dict[str, float]:
    """Return what each of `workers` asks of the cluster: its GPU, a CPU for itself, and one for each of its
    loader processes, as far as `nodes` have them; at the least what it cannot do without.

    loaders: None asks for the share of a GPU in the CPUs of its node, without GPUs for one loader.
    is_trial: others run beside it, so that it asks for no more than that share, without GPUs for no loader.
    """
    share = gpu_share(nodes)
    wanted = 1 + (1 if loaders is None else loaders)
    if gpu and (loaders is None or is_trial):
        wanted = share if loaders is None else min(share, wanted)
    elif is_trial:
        wanted = 1
    # of each node a hundredth is left to drivers, and trials that wait for their workers
    rooms = [
        (max(0.0, node.get("CPU", 0) - IDLE_CPUS), int(node.get("GPU", 0)) if gpu else workers)
        for node in nodes
    ]
    for cpus in range(wanted, 0, -1):
        if sum(min(int(room // cpus), most) for room, most in rooms) >= workers:
            return {"CPU": cpus, "GPU": 1} if gpu else {"CPU": cpus}
    return {"GPU": 1} if gpu else {"CPU": 1}


def gpu_share(nodes: list[dict[str, float]]) -> int:
    """Return how many CPUs each GPU has on the node of `nodes` where that is the fewest, but for a hundredth
    of one; 0: none has a GPU."""
    shares = (int((n.get("CPU", 0) - IDLE_CPUS) // n["GPU"]) for n in nodes if n.get("GPU", 0) >= 1)
    return max(0, min(shares, default=0))


def map_parts(worker: type, arguments: tuple, parts: Iterable[Any], workers: int) -> Iterator[Any]:
    """Yield `worker(*arguments)(part)` of every part as it is done, on so many workers of Ray Data, each with
    a GPU if the cluster has any; parts and results are JSON. What a worker that died had begun, another does.

    Raises:
        UserError: Ray is not installed; what a worker raised.
    """
    rows = [{"part": json.dumps(part)} for part in parts]
    if not rows:
        return
    with ray_cluster():
        import ray
        from ray.data import ActorPoolStrategy, DataContext

        DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # plans, and that there are no bars
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _PartCaller,
            fn_constructor_args=(worker, arguments),
            batch_size=1,
            compute=ActorPoolStrategy(size=min(workers, len(rows))),
            num_gpus=gpus,
        )
        for row in results.iter_rows():
            result = json.loads(row["result"])
            if "user_error" in result:
                raise UserError(result["user_error"])
            yield result["value"]


class _PartCaller:
    """A worker as Ray Data calls it. A user's mistake is a result: raised, it would be tried again."""

    def __init__(self, worker: type, arguments: tuple):
        self.worker = worker(*arguments)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        try:
            result = {"value": self.worker(json.loads(batch["part"][0]))}
        except UserError as e:
            result = {"user_error": str(e)}
        return {"result": [json.dumps(result)]}


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
    try:
        is_local = address == "local"
        if is_local:
            _make_private_token()
        with private_ray() if is_local else nullcontext():
            context: Any = ray.init(
                address=address,
                log_to_driver=not quiet,
                logging_level=logging.WARNING,
                runtime_env=_worker_environment(address),
            )
    except Exception as e:  # of many kinds: no connection, another version, a token
        reason = " ".join(str(e).split())[:300] or type(e).__name__
        if address == "local":
            raise MachineError(
                f"Ray does not start here ({reason}); its logs are in /tmp/ray/session_latest/logs; "
                "runtime=local trains without it"
            ) from e
        raise MachineError(f"RAY_ADDRESS={address}: {reason}; {NO_CLUSTER}") from e
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if address == "local":
        print(f"Ray's dashboard: http://{context.dashboard_url} (a token? `ray get-auth-token`)", flush=True)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray sets its own, which ends the process at once
    return True


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
        if (entry.driver_info["node_ip_address"], int(entry.driver_info["pid"])) == (job["node"], job["pid"])
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

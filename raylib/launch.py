"""Run a training function here, or on the workers of a Ray cluster."""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from raylib import checkpoint
from raylib.config import differing_paths, dump_config, read_stored_settings, without_settings
from raylib.distributed import barrier
from raylib.errors import UserError, hide_secrets, name_some
from raylib.fileio import copy_atomically, read_json_object, write_atomically
from raylib.lock import add_ray_job, hold_run, stored_owner, watch_file, work_for
from raylib.notice import Interrupted, stop_line
from raylib.provenance import DataFile, record_identity
from raylib.ray_cluster import job_has_ended, ray_cluster, this_job
from raylib.ray_run import train_on_ray
from raylib.runtime import LocalRuntime, Reporter, Runtime, set_deterministic
from raylib.settings import MUTABLE_SETTINGS, LaunchConfig
from raylib.trackers import flatten
from raylib.tracking import RunTracking, track_run

JOB_COPIES = "working_dir_files"  # folder of Ray's, with the copies of jobs' working directories
IDLE_CPUS = 0.01  # of a trial that only waits for its workers: 0 is refused


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
    if os.path.lexists(stored):
        before = read_stored_settings(type(config), read_json_object(stored)).values
        changed = [
            p for p in differing_paths(before, config.model_dump(mode="json")) if p not in MUTABLE_SETTINGS
        ]
        if changed == ["name"]:
            raise UserError(
                f"{run} holds the run '{before['name']}', whose folder was renamed: name it so again, or "
                "give this one another name="
            )
        if changed:
            raise UserError(
                f"{run} holds a run with other settings ({name_some(changed)}); give this one another name="
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

"""A trial: the ordinary run of a config in a folder of its own, which goes on from its newest checkpoint when
started again, and the log of its reports, which outlives the driver and Ray's own files.

A report is what Tune is told after each checkpoint and at the end:

    epoch, epochs       done, in all
    age                 effective epochs: those of pruning rounds left out
    judged              prunable: the scores may be compared with other trials' to stop this one or them
    finished            False of a checkpoint; a trial whose last report says False was stopped
    spent               seconds of all starts of this trial
    start_seconds       to the first batch of its first start
    NAME, loss/NAME     scores, losses
    trouble             what is not finite: the trial has failed
"""

import contextlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ray
from pydantic import BaseModel
from ray import tune
from ray.exceptions import ObjectLostError, RayActorError
from ray.tune.integration.ray_train import TuneReportCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raylib import cache, checkpoint
from raylib.config import change_settings
from raylib.errors import MachineError, NotFinite, error_line
from raylib.fileio import append_jsonl, read_json, read_jsonl, repair_jsonl, write_json
from raylib.finite import require_finite_values
from raylib.launch import LaunchConfig, run_folder
from raylib.lock import make_folder, require_owned, work_for
from raylib.runtime import release_memory
from raylib.search.config import SearchContext, SearchJob
from raylib.search.space import Setting, apply_changes, config_changes
from raylib.settings import update_deviations

REPORTS = "told.jsonl"
SETTING = "setting.json"  # that the trial has now, in its folder
MACHINE_ERROR = "machine_error"  # in a report: the line of a failure that is not the trial's
# Marks beside the knobs of a setting that was proposed before: the trial whose score it takes, untrained;
# or how many trials had it before, each of which was trained on a seed of its own
REPEAT_OF, REPLICATE = "repeat_of", "replicate"
REPLICATE_SEEDS = 1000  # replicates begin so far above the recipe's seed: those just above it are final runs'


class TrialResult(NamedTuple):
    """The outcome of a trial. `state`: finished, stopped or failed; a stopped one has the scores that it was
    stopped at. `seconds`: of its own; `start_seconds`: until its first batch. `repeat_of`: the trial with the
    same setting that all of this is of, for it was not trained again; `replicate`: how many trials had its
    setting before, on other seeds."""

    id: str
    state: str
    setting: Setting
    scores: dict[str, float]
    epoch: float
    epochs: float
    seconds: float
    start_seconds: float | None
    error: str | None
    repeat_of: str | None = None
    replicate: int = 0


class StoredReport(BaseModel, extra="allow"):
    """A line of a trial's log: see above. Scores and losses are numbers by name."""

    at: float = 0.0
    epoch: float = 0.0
    epochs: float = 0.0
    finished: bool = False
    spent: float = 0.0
    age: float = 0.0
    judged: bool = False
    trouble: str | None = None
    __pydantic_extra__: dict[str, float]


class TrialProgress(NamedTuple):
    """effective_epoch: epochs that trained the trial's model; prunable: whether its method is complete, so
    that its scores may be compared with other trials'."""

    effective_epoch: float
    prunable: bool


def append_report(run: Path, values: dict[str, Any]) -> None:
    """Append a line to the log of a trial, with the time "at".

    Raises:
        NotFinite: a value is not finite; nothing is appended.
    """
    require_finite_values(str(run), values)
    append_jsonl(run / REPORTS, {"at": time.time(), **values}, durable=True)


def read_reports(run: Path) -> list[dict[str, Any]]:
    """Return the reports of a trial, in order; one that is cut off is left out."""
    return read_jsonl(run / REPORTS, StoredReport)


def repair_reports(run: Path) -> list[str]:
    """Take out of the log of a trial what a crash left; return in words what."""
    return repair_jsonl(run / REPORTS, "at")


def read_setting(run: Path) -> Setting | None:
    """Return the setting that a trial has now; None: it has none yet.

    Raises:
        UserError: it is damaged.
    """
    path = run / SETTING
    return read_json(path, "a trial's setting", shape=dict[str, Any]) if os.path.lexists(path) else None


class TuneReporter:
    """A `raylib.runtime.Reporter` that tells Tune `to_report(metrics, epochs_before)`: of a checkpoint, with
    the epochs trained before this training. `keep`: Tune keeps the checkpoints too. `num_epochs`: of this
    training; None: as the trial's config says."""

    def __init__(
        self,
        to_report: Callable[[dict[str, Any], int], dict[str, Any]],
        keep: bool,
        epochs_before: int = 0,
        num_epochs: int | None = None,
    ):
        self.to_report, self.keep = to_report, keep
        self.epochs_before, self.num_epochs = epochs_before, num_epochs

    def __call__(self, metrics: dict[str, Any], checkpoint: Path) -> None:
        stored = tune.Checkpoint.from_directory(checkpoint) if self.keep else None
        tune.report(self._report(metrics), checkpoint=stored)

    def after(self, epochs: int, num_epochs: int | None = None) -> "TuneReporter":
        return TuneReporter(self.to_report, self.keep, self.epochs_before + epochs, num_epochs)

    def train_callback(self) -> "TrainCallback":
        return TrainCallback(self._report)

    def _report(self, metrics: dict[str, Any]) -> dict[str, Any]:
        epochs = {} if self.num_epochs is None else {"epochs": self.num_epochs}
        return self.to_report({**metrics, **epochs}, self.epochs_before)


class TrainCallback(TuneReportCallback):
    """Puts the reports of Ray Train's first worker, as `to_report` makes them, into the queue from which the
    trial's session passes them to Tune."""

    def __init__(self, to_report: Callable[[dict[str, Any]], dict[str, Any]]):
        super().__init__()
        self.to_report = to_report

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self._training_actor_item_queue.put(self.to_report(metrics[0]))


def trial(setting: Setting, context: SearchContext) -> None:
    """Run one setting, on the recipe's seed, or, a replicate, on one of its own; Tune's trainable of a
    search."""
    if REPEAT_OF in setting:
        tune.report({REPEAT_OF: setting[REPEAT_OF], "epoch": 0.0, "judged": False, "finished": False})
        return
    with machine_errors_reported(context.folder), work_for(context.owner):
        config = setting_config(context, without_marks(setting), "trials", tune.get_context().get_trial_id())
        if REPLICATE in setting:
            seed = context.base.fit.seed + REPLICATE_SEEDS + setting[REPLICATE]
            config = change_settings(config, {"fit.seed": seed})
        run = run_folder(config)
        make_folder(run)
        if context.keeps_checkpoints and (given := tune.get_checkpoint()):
            with given.as_directory() as folder:
                _adopt_checkpoint(config, Path(folder))
        write_json(run / SETTING, setting)
        run_trial(context, config, context.keeps_checkpoints)
        if not context.keeps_checkpoints:
            drop_checkpoints(run)


def final(cell: dict[str, Any], context: SearchContext, settings: list[Setting | None]) -> None:
    """Run a cell of the grid of best settings and fresh seeds; Tune's trainable of the last stage. None is
    the recipe as it is."""
    with machine_errors_reported(context.folder), work_for(context.owner):
        index, seed = cell["cell"]
        config = setting_config(context, settings[index], "finals", f"setting{index}_seed{seed}")
        config = change_settings(config, {"fit.seed": seed, "keep_optimizer": False})
        run_trial(context, config, keep=False)


@contextlib.contextmanager
def machine_errors_reported(folder: Path) -> Iterator[None]:
    """Report a failure of the machine in the block, such as a full disk, to the driver, which ends the
    search: another setting would meet it too, and no trial is to be counted as failed by it. A connection
    that was lost may be a trial's own affair: Tune tries it again. `folder`: of the search."""
    try:
        yield
    except Exception as e:
        line = error_line(e, folder)
        if not isinstance(line, MachineError) or isinstance(e, ConnectionError | TimeoutError):
            raise
        tune.report({MACHINE_ERROR: str(line), "epoch": 0.0, "judged": False, "finished": False})


def without_marks(setting: Setting) -> Setting:
    """Return a setting without `REPEAT_OF` and `REPLICATE`."""
    return {name: value for name, value in setting.items() if name not in (REPEAT_OF, REPLICATE)}


def setting_config(context: SearchContext, setting: Setting | None, part: str, name: str) -> LaunchConfig:
    """Return the config of a setting, with a run folder in this `part` of the search's folder."""
    changes = {} if setting is None else config_changes(context.space.knobs, setting)
    config = apply_changes(context.base, changes)
    folder = {"runs": str(context.folder / part), "name": name, "recipe": context.config.recipe}
    return update_deviations(config.model_copy(update=folder))


def run_trial(context: SearchContext, config: LaunchConfig, keep: bool) -> None:
    """Run `config`, report every checkpoint and, last, the scores of the model that the run leaves. Whatever
    is not finite (a loss, weights, a score) ends the trial, as "trouble"."""
    job, folder, began = context.job, run_folder(config), time.time()
    cache.set_cache(context.object_cache)
    num_epochs = job.epochs_per_run(config) * job.num_runs(config)
    make_folder(folder)
    earlier = read_reports(folder)
    seconds_before = earlier[-1].get("spent", 0.0) if earlier else 0.0

    def report(epoch: float, **values: Any) -> dict[str, Any]:
        spent = seconds_before + time.time() - began
        common = {"epoch": epoch, "epochs": num_epochs, "judged": False, "finished": False, "spent": spent}
        require_owned(folder)
        line = {**common, **values}
        # a training that goes on from a checkpoint reports it again, should it have died before it could
        if "age" not in line or not any(epoch == known.get("epoch") for known in read_reports(folder)):
            append_report(folder, line)
        return line

    # Where Ray Train trains, this is called in its controller, another process than the one of the end: so
    # what both must know is read from the log.
    def checkpoint_report(metrics: dict[str, Any], epochs_before: int) -> dict[str, Any]:
        done, scores = job.parse_report(config, metrics)
        epoch = epochs_before + done
        start = _start_seconds(folder) or {"start_seconds": metrics["ready"] - began}
        losses = {name: value for name, value in metrics.items() if name.startswith("loss/")}
        progress = trial_progress(job, config, epoch)
        # after its last epoch nothing is left to stop
        prunable = progress.prunable and epoch < num_epochs and bool(scores)
        return report(epoch, age=progress.effective_epoch, judged=prunable, **start, **scores, **losses)

    try:
        with logged(folder):
            scores = job.run(config, TuneReporter(checkpoint_report, keep))
        require_finite_values(f"{folder}: scores", scores)
    except NotFinite as e:
        epoch = max((line.get("epoch", 0.0) for line in read_reports(folder)), default=0.0)
        tune.report(report(epoch, trouble=str(e)))
        return
    finally:
        release_memory()  # the next trial of this process needs it
    newest = checkpoint.find_newest(folder) if keep else None
    stored = tune.Checkpoint.from_directory(newest) if newest else None
    tune.report(report(num_epochs, finished=True, **_start_seconds(folder), **scores), checkpoint=stored)


@contextlib.contextmanager
def logged(run: Path) -> Iterator[None]:
    """Append to a run's log what is printed in the block."""
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(run / "log.txt", "a", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(log))
        stack.enter_context(contextlib.redirect_stderr(log))
        yield


def _start_seconds(run: Path) -> dict[str, float]:
    """Return {"start_seconds"} of the first training of a trial; {} before it."""
    starts = (line["start_seconds"] for line in read_reports(run) if "start_seconds" in line)
    return next(({"start_seconds": start} for start in starts), {})


def model_epochs(job: SearchJob, config: LaunchConfig) -> int:
    """Return how many epochs train the model of a trial: all but those of pruning rounds."""
    return job.num_runs(config) * (job.epochs_per_run(config) - job.stage_epochs(config))


def trial_progress(job: SearchJob, config: LaunchConfig, epoch: float) -> TrialProgress:
    """Return where a trial stands after `epoch` epochs. Each of its runs begins with pruning rounds and with
    epochs whose scores say little of its method, such as those with frozen layers."""
    length, pruning = job.epochs_per_run(config), job.stage_epochs(config)
    runs_before = max(0, math.ceil(epoch / length) - 1)
    epoch_of_run = epoch - runs_before * length
    effective = runs_before * (length - pruning) + max(0.0, epoch_of_run - pruning)
    return TrialProgress(effective, epoch_of_run >= job.warmup_epochs(config))


def drop_checkpoints(run: Path) -> None:
    """Delete the checkpoints of a run whose scores alone are needed: they are most of its bytes."""
    for folder in [*run.rglob(checkpoint.FOLDER), *run.rglob(checkpoint.OLD_BEST)]:
        shutil.rmtree(folder, ignore_errors=True)


def has_checkpoints(run: Path) -> bool:
    """Return whether a run, or a part of it, still has checkpoints."""
    return any(run.rglob(checkpoint.FOLDER))


def _adopt_checkpoint(config: LaunchConfig, folder: Path) -> None:
    """Take another member's checkpoint, with the settings that this one has now."""
    run = run_folder(config)
    make_folder(run)
    # without its config, the run takes the settings that have changed in mid-run; the results are of the
    # model that it had before
    for name in ("config.json", "result.json", "part.json"):
        (run / name).unlink(missing_ok=True)
    checkpoint.copy_from(run, folder)


# {(cache's actor, key): object} that this process has unpacked: its next trial need not unpack it again
_unpacked: dict[tuple[str, str], Any] = {}


@ray.remote(num_cpus=0)
class _ReferenceTable:
    """Object references by key. An object lives as long as its owner, so this actor, and not the trial that
    created it, puts it into the store: trials end long before the search does."""

    def __init__(self):
        self.references: dict[str, ray.ObjectRef] = {}

    def get(self, key: str) -> ray.ObjectRef | None:
        return self.references.get(key)

    def put(self, key: str, value: Any) -> None:
        self.references.setdefault(key, ray.put(value))


class RayObjectCache:
    """Objects in Ray's object store, for as long as the search runs, owned on its driver's node. It is
    pickled to trials as a handle of the actor that holds the references."""

    def __init__(self, folder: Path):
        self.folder = folder
        driver_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        table: Any = _ReferenceTable  # a class of Ray's since its decorator
        self.actor = table.options(scheduling_strategy=driver_node).remote()

    def get_or_create(self, key: str, fn: Callable[[], Any]) -> Any:
        """Return the object stored under `key`; if there is none, store `fn()` and return it."""
        actor = self.actor._actor_id.hex()
        if (actor, key) not in _unpacked:
            for other in [other for other in list(_unpacked) if other[0] != actor]:
                _unpacked.pop(other, None)  # an earlier search's, in a process that Ray uses again
            _unpacked[actor, key] = self._fetch(key, fn)
        return _unpacked[actor, key]

    def _fetch(self, key: str, fn: Callable[[], Any]) -> Any:
        try:
            reference = ray.get(self.actor.get.remote(key))
            if reference is not None:
                return ray.get(reference)
            value = fn()
            ray.get(self.actor.put.remote(key, value))
            return value
        except (RayActorError, ObjectLostError):
            # lost with its node; whatever is cached follows from its key, so every trial can make its own
            return fn()

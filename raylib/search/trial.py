"""A trial: the ordinary run of a config in a folder of its own, which goes on from its newest checkpoint when
started again."""

import contextlib
import gc
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from raylib import cache, checkpoint
from raylib.config import change_settings
from raylib.errors import NotFinite
from raylib.finite import require_finite_values
from raylib.launch import LaunchConfig, run_folder
from raylib.search import space
from raylib.search.config import Searching, SearchJob
from raylib.search.trial_log import read_told, tell


class TrainCallback(TuneReportCallback):
    """Puts the reports of Ray Train's first worker, as `to_report` makes them, into the queue from which the
    trial's session passes them to Tune."""

    def __init__(self, to_report: Callable[[dict[str, Any]], dict[str, Any]]):
        super().__init__()
        self.to_report = to_report

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self._training_actor_item_queue.put(self.to_report(metrics[0]))


# to_report(what a checkpoint reports, epochs trained before this training) -> what Tune is told
ToReport = Callable[[dict[str, Any], int], dict[str, Any]]


class TuneReporter:
    """A `raylib.runtime.Reporter` that tells Tune `to_report(metrics, epochs_before)`. `keep`: Tune keeps the
    checkpoints too, for population-based training copies them from trial to trial."""

    def __init__(
        self, to_report: ToReport, keep: bool, epochs_before: int = 0, num_epochs: int | None = None
    ):
        self.to_report, self.keep = to_report, keep
        self.epochs_before, self.num_epochs = epochs_before, num_epochs

    def __call__(self, metrics: dict[str, Any], checkpoint: Path) -> None:
        kept = tune.Checkpoint.from_directory(checkpoint) if self.keep else None
        tune.report(self._report(metrics), checkpoint=kept)

    def after(self, epochs: int, num_epochs: int | None = None) -> "TuneReporter":
        return TuneReporter(self.to_report, self.keep, self.epochs_before + epochs, num_epochs)

    def train_callback(self) -> "TrainCallback":
        return TrainCallback(self._report)

    def _report(self, metrics: dict[str, Any]) -> dict[str, Any]:
        epochs = {} if self.num_epochs is None else {"epochs": self.num_epochs}
        return self.to_report({**metrics, **epochs}, self.epochs_before)


def trial(setting: space.Setting, search: Searching) -> None:
    """Tune's function: one setting, on the recipe's seed."""
    config = configured(search, setting, "trials", tune.get_context().get_trial_id())
    if search.keep and (given := tune.get_checkpoint()):
        with given.as_directory() as folder:
            _go_on_from(config, Path(folder))
    run(search, config, search.keep)
    if not search.keep:
        tidy(run_folder(config))


def final(chosen: dict[str, Any], search: Searching, settings: list[space.Setting | None]) -> None:
    """Tune's function of the last stage: one of the best settings, on a fresh seed. None is the recipe as it
    is."""
    which, seed = chosen["setting"], chosen["seed"]
    config = configured(search, settings[which], "finals", f"setting{which}_seed{seed}")
    run(search, change_settings(config, {"fit.seed": seed}), False)


def configured(search: Searching, setting: space.Setting | None, part: str, name: str) -> LaunchConfig:
    """The config of a setting, in a folder of the search's."""
    config = change_settings(search.base, {} if setting is None else space.read(search.knobs, setting))
    return config.model_copy(update={"runs": str(Path(search.folder) / part), "name": name})


def run(search: Searching, config: LaunchConfig, keep: bool) -> None:
    """Run `config` and tell Tune after each checkpoint {"epoch", "epochs", "age" without pruning rounds,
    "judged", "spent" seconds of all its starts, "start_seconds" to its first batch, "finished", scores,
    losses}; and, last, the scores of the model that the run leaves. What is not finite (a loss, weights, a
    score) ends the trial, as "trouble"."""
    job, folder, began = search.job, run_folder(config), time.time()
    cache.set_cache(search.object_cache)
    total = job.epochs_per_run(config) * job.num_runs(config)
    folder.mkdir(parents=True, exist_ok=True)
    earlier = read_told(folder)
    spent = earlier[-1]["spent"] if earlier else 0.0

    def told(epoch: float, **values: Any) -> dict[str, Any]:
        common = {
            "epoch": epoch,
            "epochs": total,
            "judged": False,
            "finished": False,
            "spent": spent + time.time() - began,
        }
        tell(folder, {**common, **values})
        return {**common, **values}

    def shape(metrics: dict[str, Any], before: int) -> dict[str, Any]:
        done, scores = job.parse_report(
            config, metrics
        )  # in another process, where Ray Train trains: what is known is in the file
        start = _first_start(folder) or {"start_seconds": metrics["ready"] - began}
        losses = {name: value for name, value in metrics.items() if name.startswith("loss/")}
        age, settled = standing(job, config, before + done)
        judged = settled and before + done < total and bool(scores)
        return told(before + done, age=age, judged=judged, **start, **scores, **losses)

    try:
        with open(folder / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            scores = job.run(config, TuneReporter(shape, keep))
        require_finite_values(f"{folder}: scores", scores)
    except NotFinite as e:
        tune.report(told(max((line["epoch"] for line in read_told(folder)), default=0.0), trouble=str(e)))
        return
    finally:
        gc.collect()
    kept = tune.Checkpoint.from_directory(checkpoint.find_newest(folder)) if keep else None
    tune.report(told(total, finished=True, **_first_start(folder), **scores), checkpoint=kept)


def _first_start(run: Path) -> dict[str, float]:
    """{"start_seconds"} of the first training of a trial; nothing before it."""
    starts = [line["start_seconds"] for line in read_told(run) if "start_seconds" in line]
    return {"start_seconds": starts[0]} if starts else {}


def trained(job: SearchJob, config: LaunchConfig) -> int:
    """How many epochs the model of a trial is trained, pruning rounds left out."""
    return job.num_runs(config) * (job.epochs_per_run(config) - job.pruning_epochs(config))


def standing(job: SearchJob, config: LaunchConfig, epoch: float) -> tuple[float, bool]:
    """After `epoch` epochs of a trial: how many of them trained the model, pruning rounds left out, and
    whether its method is what it will be in the part that is under way."""
    length, rounds = job.epochs_per_run(config), job.pruning_epochs(config)
    part = max(0, math.ceil(epoch / length) - 1)
    inside = epoch - part * length
    return part * (length - rounds) + max(0.0, inside - rounds), inside >= job.warmup_epochs(config)


def tidy(run: Path) -> None:
    """Drop the checkpoints of a run whose scores are all that is wanted: they are most of its bytes."""
    for folder in [*run.rglob(checkpoint.FOLDER), *run.rglob(checkpoint.BEST)]:
        shutil.rmtree(folder, ignore_errors=True)


def _go_on_from(config: LaunchConfig, folder: Path) -> None:
    """Take another member's checkpoint, with the settings that this one has now."""
    run = run_folder(config)
    if (run / "config.json").is_file():
        (run / "config.json").unlink()  # its settings have changed in mid-run: that is the point
    for name in ("result.json", "part.json"):
        (run / name).unlink(missing_ok=True)
    run.mkdir(parents=True, exist_ok=True)
    checkpoint.copy_from(run, folder)

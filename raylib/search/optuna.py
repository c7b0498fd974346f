"""Optuna under Ray Tune, and Tune run in a folder so that the same start goes on after anything.

Tune copies its state there in place, several times a second. A driver that is killed meanwhile leaves half a
file, and from that Tune would, with no more than a line in its log, begin a search of one trial: so the state
is kept twice.
"""

import contextlib
import io
import json
import math
import pickle
import re
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray import cloudpickle, tune
from ray.tune.search.optuna import OptunaSearch

from raylib.fileio import atomic_file
from raylib.finite import finite_values
from raylib.renames import PICKLED
from raylib.search.config import SearchConfig
from raylib.search.samplers import build_sampler
from raylib.search.space import DefineByRun, Space
from raylib.search.trial import TrialResult, drop_checkpoints

JOURNAL = "optuna.journal"  # of a study, in the search's folder
STATE_FILES = (
    "experiment_state-*.json",
    "tuner.pkl",
    "basic-variant-state-*.json",
    "search_gen_state-*.json",
    "searcher-state-*.pkl",
)
BACKUP = ".kept"  # folder of the copy
STATES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "stopped", TrialState.FAIL: "failed"}
ANSI_COLOURS = re.compile(r"\x1b\[\d*m")  # of Ray's tracebacks
BACKUP_SECONDS = 2.0  # between copies
OLD_PACKAGE = b"raylib.tune."  # which `PICKLED` renames


class OptunaSearcher(OptunaSearch):
    """`OptunaSearch` tells Optuna of a trial that was stopped, or that crashed, as of one that finished with
    its last value. Here a stopped one counts as pruned, with its score of each epoch; a failed one as
    failed."""

    _metric: Any  # a goal, or a list of two
    _ot_study: Any

    def restore(self, checkpoint_path: str) -> None:
        """Go on from the state that was saved last. Trials that Optuna knows, but Tune died before it could
        save, are failed; a published setting, or one of a grid, is proposed again."""
        super().restore(checkpoint_path)
        # The study is in its journal at once, Tune's own state only now and then: trials that were asked for
        # in between would run for ever in the study, and never be tried again.
        saved = {trial.number for trial in self._ot_trials.values()}
        for lost in self._ot_study.get_trials(states=(TrialState.RUNNING,)):
            if lost.number not in saved:
                self._ot_study.tell(lost.number, state=TrialState.FAIL)
                if given := lost.system_attrs.get("fixed_params"):
                    self._ot_study.enqueue_trial(given)

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        # two goals have no intermediate values; the last report repeats the best checkpoint's score
        if isinstance(self._metric, list) or trial_id in self._completed_trials or result.get("finished"):
            return
        value = result.get(self._metric)
        if value is None or not math.isfinite(value):
            return
        with warnings.catch_warnings(), contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            warnings.simplefilter("ignore")  # after a restart reports come again
            self._ot_trials[trial_id].report(value, int(result["epoch"]))

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        if trial_id in self._completed_trials:
            return
        names = self._metric if isinstance(self._metric, list) else [self._metric]
        state = trial_state(result, error, names)
        if state == TrialState.PRUNED and result:
            # Tune does not pass on the report at which a trial was stopped
            self.on_trial_result(trial_id, result)
        values = [result[name] for name in names] if state == TrialState.COMPLETE and result else None
        self._ot_study.tell(self._ot_trials[trial_id], values, state=state, skip_if_finished=True)
        self._completed_trials.add(trial_id)


def trial_state(result: dict | None, error: bool, names: Sequence[str] = ()) -> TrialState:
    """Return the state of a trial by its last report: finished, stopped (PRUNED) or failed, as one is whose
    scores `names` are not finite."""
    if error or not result or result.get("trouble"):
        return TrialState.FAIL
    if not all(math.isfinite(result[name]) for name in names if name in result):
        return TrialState.FAIL
    return TrialState.COMPLETE if result.get("finished") else TrialState.PRUNED


def build_searcher(config: SearchConfig, space: Space, num_trials: int, folder: Path) -> OptunaSearcher:
    """Return the searcher of `config` over a space, its study in `folder`/optuna.journal (`optuna-dashboard`
    reads it); published settings, or the grid, come first."""
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    first = {"grid": space.grid_settings(), "random": []}
    two_goals = len(config.goals) > 1
    return OptunaSearcher(
        space=DefineByRun(space.knobs),
        metric=list(config.goals) if two_goals else config.goals[0],
        mode=["max"] * len(config.goals) if two_goals else "max",
        points_to_evaluate=first.get(config.algorithm, list(space.published)),
        sampler=build_sampler(config, space, num_trials),
        study_name=config.name,
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(folder / JOURNAL))),
    )


def run_tuner(
    folder: Path,
    trainable: Callable,
    make_tune_config: Callable[[], tune.TuneConfig],
    metrics: tuple[str, ...],
    num_trials: int,
    max_failures: int,
    param_space: dict | None = None,
) -> list[TrialResult]:
    """Run Tune in `folder`, or go on where it was; return the trials with their scores `metrics`.
    `make_tune_config` is called at the first start alone.

    Raises:
        KeyboardInterrupt: fewer than `num_trials` trials ended: Tune itself returns as if all was well.
    """
    if restore_state(folder):
        tuner = tune.Tuner.restore(str(folder), trainable, resume_unfinished=True)
    else:
        tune_config = make_tune_config()  # which may refuse to begin: the folder stays as it is then
        shutil.rmtree(folder, ignore_errors=True)
        tuner = tune.Tuner(
            trainable,
            param_space=param_space,
            tune_config=tune_config,
            run_config=tune.RunConfig(
                name=folder.name,
                storage_path=str(folder.parent),
                failure_config=tune.FailureConfig(max_failures=max_failures),
                callbacks=[DropStoppedCheckpoints(folder.parent / "trials"), BackUpState(folder)],
            ),
        )
    grid = tuner.fit()
    results = [grid[i] for i in range(len(grid))]
    if len(results) < num_trials or not all(map(has_ended, results)):
        raise KeyboardInterrupt
    return [trial_result(result, metrics) for result in results]


def has_ended(result: tune.Result) -> bool:
    """Return whether a trial has ended; one that was interrupted is left as it is."""
    # Tune's stored state may lack the "done" of a trial that returned by itself: it is set after the last
    # report
    last = result.metrics or {}
    return result.error is not None or any(last.get(key) for key in ("done", "finished", "trouble"))


def trial_result(result: tune.Result, metrics: tuple[str, ...]) -> TrialResult:
    """Return a trial's result by its last report: of a stopped one, that at which it was stopped."""
    last = result.metrics or {}
    scores = {m: last[m] for m in metrics if m in last}
    finite = finite_values(scores)
    not_finite = ", ".join(scores.keys() - finite.keys())
    trouble = last.get("trouble") or (f"{not_finite} not finite" if not_finite else None)
    return TrialResult(
        id=last.get("trial_id", Path(result.path).name),
        state=STATES[trial_state(last, result.error is not None, metrics)],
        setting=result.config or {},
        scores=finite,
        epoch=last.get("epoch", 0),
        epochs=last.get("epochs", 0),
        seconds=last.get("spent", 0.0),
        start_seconds=last.get("start_seconds"),
        error=ANSI_COLOURS.sub("", str(result.error)).strip() if result.error else trouble,
    )


class DropStoppedCheckpoints(tune.Callback):
    """Drops the checkpoints of trials that were stopped: nobody goes on from them."""

    def __init__(self, runs: Path):
        self.runs = runs

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        if not (trial.last_result or {}).get("finished"):
            drop_checkpoints(self.runs / trial.trial_id)


class BackUpState(tune.Callback):
    """Copies the state of the search in `folder` from time to time, when it can be read."""

    def __init__(self, folder: Path):
        self.folder, self.last = folder, 0.0

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        if time.monotonic() - self.last >= BACKUP_SECONDS:
            self.last = time.monotonic()
            back_up_state(self.folder)


def back_up_state(folder: Path) -> None:
    """Copy the state in `folder`, unless Tune is writing it just now."""
    files = newest_state_files(folder)
    before = [path.stat().st_mtime_ns for path in files]
    fresh = folder / f"{BACKUP}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    for path in files:
        shutil.copy2(path, fresh)
    # Files that can be read may still be of different moments: only if none was written meanwhile are they
    # one state. Then the old copy goes; between the two moves, the new one still has its temporary name.
    if is_readable(fresh) and [path.stat().st_mtime_ns for path in newest_state_files(folder)] == before:
        shutil.rmtree(folder / BACKUP, ignore_errors=True)
        fresh.rename(folder / BACKUP)


def restore_state(folder: Path) -> bool:
    """Return whether there is a state to go on from in `folder`; a damaged one gives way to the copy. What an
    earlier version pickled is written anew by the names of today."""
    # the last of these: killed between the two moves of a copy
    for copy in (folder, folder / BACKUP, folder / f"{BACKUP}.new"):
        if is_readable(copy):
            state = {path.name: _by_new_names(path.read_bytes()) for path in newest_state_files(copy)}
            for path in newest_state_files(folder):
                if path.name not in state:
                    path.unlink()
            for name, data in state.items():
                with atomic_file(folder / name) as temporary:
                    temporary.write_bytes(data)
            return True
    return False


def is_readable(folder: Path) -> bool:
    """Return whether all files of the state in `folder` can be read."""
    files = newest_state_files(folder)
    if not {"tuner.pkl", "experiment_state"} <= {path.name.partition("-")[0] for path in files}:
        return False
    try:
        for path in files:  # all but the first are pickles, some of them by the name of .json
            (json.loads if path.name.startswith("experiment_state") else _unpickle)(path.read_bytes())
    except Exception:  # whatever half a pickle makes of itself
        return False
    return True


def newest_state_files(folder: Path) -> list[Path]:
    """Return the files that Tune would read: of each kind the one of the last driver."""
    return [max(paths) for kind in STATE_FILES if (paths := list(folder.glob(kind)))]


class _Unpickler(pickle.Unpickler):
    """Reads what earlier versions of this code pickled, by the names of today."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in PICKLED:
            module, name = PICKLED[f"{module}.{name}"].rsplit(".", 1)
        return super().find_class(module, name)


def _unpickle(data: bytes) -> Any:
    return _Unpickler(io.BytesIO(data)).load()


def _by_new_names(data: bytes) -> bytes:
    old = OLD_PACKAGE.hex().encode()
    if data.startswith(b"{"):  # Tune's JSON, which holds pickles as hexadecimal text
        pickled = rb"8005[0-9a-f]*" + old + rb"[0-9a-f]*"
        return re.sub(pickled, lambda m: _by_new_names(bytes.fromhex(m[0].decode())).hex().encode(), data)
    return cloudpickle.dumps(_unpickle(data)) if OLD_PACKAGE in data else data

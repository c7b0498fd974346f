"""Ray Tune, run in a folder so that the same start goes on after anything, with more trials if it has more.

Tune copies its state there in place, several times a second. A driver that is killed meanwhile leaves half a
file, and from that Tune would, with no more than a line in its log, begin a search of one trial: so the state
is kept twice.
"""

import io
import json
import logging
import pickle
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import cloudpickle, tune
from ray.tune.search import SearchAlgorithm

from raylib.config import load_user_file, user_file_error
from raylib.errors import UserError
from raylib.fileio import atomic_file
from raylib.finite import finite_values
from raylib.lock import stop_if_lost
from raylib.renames import PICKLED
from raylib.search.display import SearchTable, TensorBoardScores
from raylib.search.optuna import STATES, trial_state
from raylib.search.space import Distribution
from raylib.search.trial import REPEAT_OF, REPLICATE, TrialResult, drop_checkpoints, without_marks

STATE_FILES = (
    "experiment_state-*.json",
    "basic-variant-state-*.json",
    "search_gen_state-*.json",
    "searcher-state-*.pkl",
)
BACKUP = ".kept"  # folder of the copy
ANSI_COLOURS = re.compile(r"\x1b\[\d*m")  # of Ray's tracebacks
BACKUP_SECONDS = 2.0  # between copies
# messages of Tune's that are for those who call it: how it would go on after Ctrl-C, what took it seconds
FOR_CALLERS = ("Experiment has been interrupted", "Trials did not complete", "performance bottleneck")
OLD_PACKAGE = b"raylib.tune."  # which `PICKLED` renames


def run_tuner(
    folder: Path,
    trainable: Callable,
    metrics: tuple[str, ...],
    search_alg: SearchAlgorithm,
    num_trials: int,
    table: SearchTable,
    goes_on: bool = False,
    knobs: Mapping[str, Distribution] = {},
    callbacks: Sequence[tune.Callback] = (),
    **arguments: Any,
) -> list[TrialResult]:
    """Run Tune in `folder`; return the trials with their scores `metrics`.

    Args:
        num_trials: that there will be.
        table: shown in the terminal.
        goes_on: from the state in `folder`, see `restore_state`.
        knobs: columns of TensorBoard's table of trials.
        callbacks: of the user, beside those that a search needs.
        arguments: more of `tune.run`.

    Raises:
        KeyboardInterrupt: it was interrupted: Tune itself returns as if all was well.
    """
    logging.getLogger("ray.tune").setLevel(logging.WARNING)  # it tells of every file that it writes or reads
    for name in ("ray.tune.tune", "ray.tune.utils.util"):
        logging.getLogger(name).addFilter(_is_for_users)
    # `tune.run` and not `Tuner`, which would go on with its pickle of the first start's arguments
    analysis = tune.run(
        trainable,
        name=folder.name,
        storage_path=str(folder.parent),
        search_alg=search_alg,
        resume_config=tune.ResumeConfig() if goes_on else None,
        callbacks=[
            DropStoppedCheckpoints(folder.parent / "trials"),
            BackUpState(folder),
            TensorBoardScores(metrics, knobs),
            *callbacks,
        ],
        progress_reporter=table,
        verbose=1,
        raise_on_failed_trial=False,
        **arguments,
    )
    grid = tune.ResultGrid(analysis)
    results = [grid[i] for i in range(len(grid))]
    begins_no_more = search_alg.is_finished() or len(results) >= num_trials
    if not (begins_no_more and all(map(has_ended, results))):
        raise KeyboardInterrupt
    return [trial_result(result, metrics) for result in results]


def load_callbacks(file: str | None) -> list[tune.Callback]:
    """Return what `callbacks()` of a Python file of the user's returns; none of no file.

    Raises:
        UserError: the file does not run, has no such function, or it returns something else.
    """
    if file is None:
        return []
    make = vars(load_user_file(file)).get("callbacks")
    if not callable(make):
        raise UserError(
            f"{file}: it defines no function callbacks(), which returns a list of Tune's callbacks"
        )
    try:
        found = list(make())
    except Exception as e:
        raise user_file_error(e, Path(file)) from e
    if wrong := [type(each).__name__ for each in found if not isinstance(each, tune.Callback)]:
        raise UserError(f"{file}: callbacks() returns {', '.join(wrong)}, no callback of Ray Tune")
    return found


def _is_for_users(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in FOR_CALLERS)


def has_ended(result: tune.Result) -> bool:
    """Return whether a trial has ended; one that was interrupted is left as it is."""
    # Tune's stored state may lack the "done" of a trial that returned by itself: it is set after the last
    # report
    last = result.metrics or {}
    return result.error is not None or any(
        last.get(key) for key in ("done", "finished", "trouble", REPEAT_OF)
    )


def trial_result(result: tune.Result, metrics: tuple[str, ...]) -> TrialResult:
    """Return a trial's result by its last report: of a stopped one, that at which it was stopped."""
    last, setting = result.metrics or {}, result.config or {}
    scores = {m: last[m] for m in metrics if m in last}
    finite = finite_values(scores)
    not_finite = ", ".join(scores.keys() - finite.keys())
    trouble = last.get("trouble") or (f"{not_finite} not finite" if not_finite else None)
    return TrialResult(
        id=last.get("trial_id", Path(result.path).name),
        state=STATES[trial_state(last, result.error is not None, metrics)],
        setting=without_marks(setting),
        scores=finite,
        epoch=last.get("epoch", 0),
        epochs=last.get("epochs", 0),
        seconds=last.get("spent", 0.0),
        start_seconds=last.get("start_seconds"),
        error=ANSI_COLOURS.sub("", str(result.error)).strip() if result.error else trouble,
        repeat_of=setting.get(REPEAT_OF),
        replicate=setting.get(REPLICATE, 0),
    )


def with_repeats(results: Sequence[TrialResult]) -> list[TrialResult]:
    """Return the results, a repeat's with what became of the trial whose score it takes."""
    by_id = {result.id: result for result in results}
    outcomes: list[TrialResult] = []
    for result in results:
        if first := by_id.get(result.repeat_of or ""):
            result = result._replace(
                state=first.state,
                scores=first.scores,
                epoch=first.epoch,
                epochs=first.epochs,
                error=first.error,
            )
        outcomes.append(result)
    return outcomes


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
        stop_if_lost(self.folder)  # Tune would make a folder that is gone anew
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
    if not any(path.name.startswith("experiment_state") for path in files):
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

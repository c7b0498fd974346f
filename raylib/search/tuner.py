"""Runs Tune in a folder so that the same start goes on after anything.

Tune copies its state there in place, several times a second. A driver that is killed meanwhile leaves half a
file, and from that Tune would, with no more than a line in its log, begin a search of one trial: so the state
is kept twice.
"""

import json
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from ray import tune

from raylib.search.trial import tidy

KINDS = (
    "experiment_state-*.json",
    "tuner.pkl",
    "basic-variant-state-*.json",
    "search_gen_state-*.json",
    "searcher-state-*.pkl",
)
KEPT = ".kept"  # folder of the copy
EVERY = 2.0  # seconds between copies


def fitted(
    folder: Path,
    trainable: Callable,
    tuning: Callable[[], tune.TuneConfig],
    param_space: dict | None,
    failures: int,
    trials: int,
) -> tune.ResultGrid:
    """Run Tune in `folder`, or go on where it was; `tuning` is asked for at the first start alone.

    Raises:
        KeyboardInterrupt: fewer than `trials` trials ended: Tune itself returns as if all was well.
    """
    if recover(folder):
        tuner = tune.Tuner.restore(str(folder), trainable, resume_unfinished=True)
    else:
        tune_config = tuning()  # which may refuse to begin: what is there stays then
        shutil.rmtree(folder, ignore_errors=True)
        tuner = tune.Tuner(
            trainable,
            param_space=param_space,
            tune_config=tune_config,
            run_config=tune.RunConfig(
                name=folder.name,
                storage_path=str(folder.parent),
                failure_config=tune.FailureConfig(max_failures=failures),
                callbacks=[Tidy(str(folder.parent / "trials")), Keep(folder)],
            ),
        )
    grid = tuner.fit()
    if len(grid) < trials or not all(_ended(result) for result in grid):
        raise KeyboardInterrupt
    return grid


class Tidy(tune.Callback):
    """Drops the checkpoints of trials that were stopped: nobody goes on from them."""

    def __init__(self, runs: str):
        self.runs = Path(runs)

    def on_trial_complete(self, iteration: int, trials: list, trial, **info) -> None:
        if not (trial.last_result or {}).get("finished"):
            tidy(self.runs / trial.trial_id)


class Keep(tune.Callback):
    """Copies the state of the search in `folder` from time to time, when it is whole."""

    def __init__(self, folder: Path):
        self.folder, self.last = folder, 0.0

    def on_step_end(self, iteration: int, trials: list, **info) -> None:
        if time.monotonic() - self.last >= EVERY:
            self.last = time.monotonic()
            keep(self.folder)


def keep(folder: Path) -> None:
    """Copy the state in `folder`, unless Tune is writing it just now."""
    files = newest(folder)
    before = [path.stat().st_mtime_ns for path in files]
    fresh = folder / f"{KEPT}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    for path in files:
        shutil.copy2(path, fresh)
    if is_whole(fresh) and [path.stat().st_mtime_ns for path in newest(folder)] == before:
        shutil.rmtree(folder / KEPT, ignore_errors=True)
        fresh.rename(folder / KEPT)


def recover(folder: Path) -> bool:
    """Whether there is a state to go on from in `folder`; a damaged one gives way to the copy."""
    if is_whole(folder):
        return True
    for copy in (folder / KEPT, folder / f"{KEPT}.new"):  # the second: killed between the two moves
        if is_whole(copy):
            for path in newest(folder):
                path.unlink()
            for path in newest(copy):
                shutil.copy2(path, folder)
            return True
    return False


def is_whole(folder: Path) -> bool:
    """Whether all files of the state in `folder` can be read."""
    files = newest(folder)
    if not {"tuner.pkl", "experiment_state"} <= {path.name.partition("-")[0] for path in files}:
        return False
    try:
        for path in files:  # all but the first are pickles, some of them by the name of .json
            (json if path.name.startswith("experiment_state") else pickle).loads(path.read_bytes())
    except Exception:  # whatever half a pickle makes of itself
        return False
    return True


def newest(folder: Path) -> list[Path]:
    """The files that Tune would read: of each kind the one of the last driver."""
    return [max(found) for kind in KINDS if (found := list(folder.glob(kind)))]


def _ended(result: tune.Result) -> bool:
    """Whether nothing more will come of a trial, which Tune leaves as it is where it was interrupted."""
    return result.error is not None or bool((result.metrics or {}).get("done"))

"""Ray Tune, run in a folder: it begins trials, hears their reports, tries again what crashed.

What Tune writes there (its state, results, TensorBoard's events) is for people: no search goes on from it,
and no pickle of it is read (`raylib.search.trial_log`).
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.error import TuneError
from ray.tune.search import SearchAlgorithm

from raylib.config import load_user_file, user_file_error
from raylib.errors import MachineError, UserError, error_line
from raylib.lock import stop_if_lost
from raylib.search.display import SearchTable, TensorBoardScores
from raylib.search.optuna import STATES, trial_state
from raylib.search.space import Distribution
from raylib.search.trial import MACHINE_ERROR, drop_checkpoints
from raylib.search.trial_log import TrialLog

ANSI_COLOURS = re.compile(r"\x1b\[\d*m")  # of Ray's tracebacks
# messages of Tune's that are for those who call it: how it would go on after Ctrl-C, what took it seconds,
# that it could not keep its own state, which nobody reads
FOR_CALLERS = (
    "Experiment has been interrupted",
    "Trials did not complete",
    "performance bottleneck",
    "Saving experiment state to storage",
)


def run_tuner(
    folder: Path,
    trainable: Callable,
    metrics: tuple[str, ...],
    search_alg: SearchAlgorithm,
    table: SearchTable,
    knobs: Mapping[str, Distribution] = {},
    callbacks: Sequence[tune.Callback] = (),
    **arguments: Any,
) -> None:
    """Run Tune in `folder` until all trials of `search_alg` have ended.

    Args:
        metrics: names of the scores that trials report.
        table: shown in the terminal.
        knobs: columns of TensorBoard's table of trials.
        callbacks: beside those that every search needs.
        arguments: more of `tune.run`.

    Raises:
        KeyboardInterrupt: it was interrupted: Tune itself returns as if all was well.
        MachineError: a trial met one.
    """
    logging.getLogger("ray.tune").setLevel(logging.WARNING)  # it tells of every file that it writes or reads
    for name in ("ray.tune.tune", "ray.tune.utils.util", "ray.tune.execution.experiment_state"):
        logging.getLogger(name).addFilter(_is_for_users)
    # `tune.run` and not `Tuner`, which would keep a pickle of the first start's arguments
    try:
        analysis = tune.run(
            trainable,
            name=folder.name,
            storage_path=str(folder.parent),
            search_alg=search_alg,
            callbacks=[EndSearch(folder), *callbacks, TensorBoardScores(metrics, knobs)],
            progress_reporter=table,
            verbose=1,
            raise_on_failed_trial=False,
            **arguments,
        )
    except TuneError as e:  # Tune makes text of whatever is raised while it handles a report
        line = error_line(e.__context__) if e.__context__ else None
        raise line or e from None
    if not (search_alg.is_finished() and all(trial.is_finished() for trial in analysis.trials)):
        raise KeyboardInterrupt


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


class EndSearch(tune.Callback):
    """Ends all of Tune where a trial reports a failure of the machine, or the search in `folder` is lost."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        stop_if_lost(self.folder)  # Tune would make a folder that is gone anew

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        if line := result.get(MACHINE_ERROR):
            raise MachineError(line)


class RecordTrials(tune.Callback):
    """Enters into the log what becomes of trials, and drops the checkpoints of those that were stopped:
    nobody goes on from them."""

    def __init__(self, log: TrialLog, metrics: Sequence[str]):
        self.log, self.metrics = log, metrics

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        state = STATES[trial_state(trial.last_result, False, self.metrics)]
        self.log.end(trial.trial_id, state)
        if state != "finished":
            drop_checkpoints(self.log.runs / trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        file = trial.error_file  # of this driver, text
        text = Path(file).read_text(encoding="utf-8", errors="replace") if file else ""
        last = text.rpartition("Failure # ")[2].partition("\n")[2]  # of several tries
        self.log.end(trial.trial_id, "failed", ANSI_COLOURS.sub("", last).strip() or None)

"""Optuna under Ray Tune, told the truth: which trials were stopped, which failed, and how far each was when
it scored."""

import contextlib
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray.tune.search.optuna import OptunaSearch

from raylib.errors import require
from raylib.search.space import Space, Suggest

JOURNAL = "optuna.journal"  # of a study, in the search's folder


class Searcher(OptunaSearch):
    """`OptunaSearch` tells Optuna of a trial that was stopped, or that crashed, as of one that finished with
    its last value. Here a stopped one counts as pruned, with its score of each epoch; a failed one as
    failed."""

    def restore(self, checkpoint_path: str) -> None:
        """Go on from what was saved last. Trials that Optuna knows, but Tune died before it could save, are
        failed; a published setting, or one of a grid, is proposed again."""
        super().restore(checkpoint_path)
        known = {trial.number for trial in self._ot_trials.values()}
        for lost in self._ot_study.get_trials(states=(TrialState.RUNNING,)):
            if lost.number not in known:
                self._ot_study.tell(lost.number, state=TrialState.FAIL)
                if given := lost.system_attrs.get("fixed_params"):
                    self._ot_study.enqueue_trial(given)

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        if (
            isinstance(self._metric, str)
            and trial_id not in self._completed_trials
            and not result.get("finished")
        ):
            value = result.get(self._metric)
            if value is not None and math.isfinite(value):
                with (
                    warnings.catch_warnings(),
                    contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError),
                ):
                    warnings.simplefilter("ignore")  # after a restart things are told again
                    self._ot_trials[trial_id].report(value, int(result["epoch"]))

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        if trial_id in self._completed_trials:
            return
        names = self._metric if isinstance(self._metric, list) else [self._metric]
        state, values = state_of(result, error, names), None
        if state == TrialState.PRUNED:
            self.on_trial_result(
                trial_id, result
            )  # Tune does not tell the searcher of the epoch that a trial was stopped at
        if state == TrialState.COMPLETE:
            values = [result[name] for name in names]
        self._ot_study.tell(self._ot_trials[trial_id], values, state=state, skip_if_finished=True)
        self._completed_trials.add(trial_id)


def state_of(result: dict | None, error: bool, names: Sequence[str] = ()) -> TrialState:
    """Return what became of a trial, by the last that it told: finished, stopped (PRUNED) or failed, as one
    is whose scores `names` are not finite."""
    if error or not result or result.get("trouble"):
        return TrialState.FAIL
    if not all(math.isfinite(result[name]) for name in names if name in result):
        return TrialState.FAIL
    return TrialState.COMPLETE if result.get("finished") else TrialState.PRUNED


def searcher(
    search: str, space: Space, goals: tuple[str, ...], seed: int, trials: int, folder: Path, name: str
) -> Searcher:
    """The searcher called `search` over a space, its study called `name` in `folder`/optuna.journal
    (`optuna-dashboard` reads it); published settings, or the grid, first."""
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    samplers = {
        # fewer than the usual ten random trials where there are few in all
        "tpe": lambda: optuna.samplers.TPESampler(
            seed=seed,
            multivariate=True,
            group=True,
            constant_liar=True,
            n_startup_trials=max(3, min(10, trials // 8)),
        ),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        "grid": lambda: optuna.samplers.RandomSampler(seed=seed),  # every trial is enqueued
        "nsga2": lambda: optuna.samplers.NSGAIISampler(
            seed=seed, population_size=max(4, min(50, trials // 4))
        ),
        "cmaes": lambda: (
            require("cmaes", "ray")
            and optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        ),
    }
    return Searcher(
        space=Suggest(space.knobs),
        metric=list(goals) if len(goals) > 1 else goals[0],
        mode=["max"] * len(goals) if len(goals) > 1 else "max",
        points_to_evaluate={"grid": space.points(), "random": []}.get(search, list(space.published)),
        sampler=samplers[search](),
        study_name=name,
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(folder / JOURNAL))),
    )

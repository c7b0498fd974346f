"""Optuna under Ray Tune: the searcher, its study, and evidence from another search."""

import contextlib
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FixedTrial, FrozenTrial, TrialState, create_trial
from ray.tune.search import SearchGenerator
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.searcher import Searcher

from raylib.config import differing_paths, validate
from raylib.errors import UserError
from raylib.launch import MUTABLE_SETTINGS
from raylib.search.config import Repeats, SearchConfig, read_search
from raylib.search.samplers import build_sampler
from raylib.search.space import DefineByRun, Knobs, Setting, SettingKey, Space, config_changes
from raylib.search.trial import REPEAT_OF, REPLICATE

JOURNAL = "optuna.journal"  # of a study, in the search's folder
STATES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "stopped", TrialState.FAIL: "failed"}


class SearcherOptions(NamedTuple):
    """Options that may be others when a search goes on. runs: the folder of the trials' folders; key: equal
    for settings that are the same training; repeats: see `SearchConfig`; max_concurrent: trials at a time;
    max_seconds: of this search, after which no trial begins."""

    runs: Path
    key: SettingKey
    repeats: Repeats = "score"
    max_concurrent: int = 10**9
    max_seconds: float = math.inf


class OptunaSearcher(OptunaSearch):
    """`OptunaSearch` tells Optuna of a trial that was stopped, or that crashed, as of one that finished with
    its last value. Here a stopped one counts as pruned, with its score of each epoch; a failed one as failed.

    A setting that was proposed before, a repeat, is marked for its trial: by `REPEAT_OF`, not to be trained,
    and Optuna is told what became of the first trial, as soon as that is known; or by `REPLICATE`, to be
    trained on another seed.
    """

    _metric: Any  # a goal, or a list of two
    _ot_study: Any

    def __init__(self, options: SearcherOptions, **arguments: Any):
        self.options = options
        self._repeats: dict[str, str] = {}  # {trial: the first one with its setting, whose score it takes}
        self._keys: dict[str, str | None] = {}  # of each trial
        self._seconds, self._began = 0.0, time.monotonic()  # of earlier starts; this start
        super().__init__(**arguments)

    def _setup_study(self, mode: str | list) -> None:
        super()._setup_study(mode)
        self._ot_study.set_metric_names(self._goals)

    def learn(self, evidence: Sequence[FrozenTrial]) -> None:
        """Enter trials of another search into the study, those that an earlier start has not."""
        entered = [trial.user_attrs for trial in self._ot_study.get_trials(deepcopy=False)]
        for trial in evidence:
            if trial.user_attrs not in entered:
                self._ot_study.add_trial(trial)

    @property
    def _goals(self) -> list[str]:
        return self._metric if isinstance(self._metric, list) else [self._metric]

    def seconds(self) -> float:
        """Return how long this search has been under way, over all of its starts."""
        return self._seconds + time.monotonic() - self._began

    def save(self, checkpoint_path: str) -> None:
        self._seconds, self._began = self.seconds(), time.monotonic()
        super().save(checkpoint_path)

    def restore(self, checkpoint_path: str) -> None:
        """Go on from the state that was saved last, with the options of today. Trials that Optuna knows, but
        Tune died before it could save, are failed; a published setting, or one of a grid, is proposed
        again."""
        options = self.options
        super().restore(checkpoint_path)  # an earlier version's state has no repeats and no keys
        self.options, self._began, self._keys = options, time.monotonic(), {}
        # The study is in its journal at once, Tune's own state only now and then: trials that were asked for
        # in between would run for ever in the study, and never be tried again.
        saved = {trial.number for trial in self._ot_trials.values()}
        for lost in self._ot_study.get_trials(states=(TrialState.RUNNING,)):
            if lost.number not in saved:
                self._ot_study.tell(lost.number, state=TrialState.FAIL)
                if given := lost.system_attrs.get("fixed_params"):
                    self._ot_study.enqueue_trial(given)

    def suggest(self, trial_id: str) -> Any:
        """Return a setting, perhaps marked; None: not now; `Searcher.FINISHED`: the time is up."""
        if self.seconds() >= self.options.max_seconds:
            return Searcher.FINISHED
        waiting = self._ot_trials.keys() - self._completed_trials - self._repeats.keys()
        if len(waiting) >= self.options.max_concurrent:
            return None
        setting: Any = super().suggest(trial_id)
        trial = self._ot_trials[trial_id]
        trial.set_user_attr("trial", trial_id)
        earlier = self._trained_before(trial_id, setting)
        if not earlier:
            trial.set_user_attr("folder", str(self.options.runs / trial_id))
            return setting
        if self.options.repeats == "replicate":
            trial.set_user_attr("folder", str(self.options.runs / trial_id))
            trial.set_user_attr("replicate", len(earlier))
            return {**setting, REPLICATE: len(earlier)}
        self._repeats[trial_id] = earlier[0]
        trial.set_user_attr("score of trial", earlier[0])
        return {**setting, REPEAT_OF: earlier[0]}

    def _trained_before(self, trial_id: str, setting: Setting) -> list[str]:
        """Return the trials before this one that were trained with an equal setting, or still are."""
        for earlier, trial in self._ot_trials.items():
            if earlier not in self._keys:  # this one, and all those from before there were keys
                self._keys[earlier] = self.options.key(trial.params)
        key = self._keys[trial_id]
        if key is None:
            return []
        trained = (earlier for earlier in self._keys if earlier not in self._repeats)
        return [earlier for earlier in trained if earlier != trial_id and self._keys[earlier] == key]

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        # two goals have no intermediate values; the last report repeats the best checkpoint's score
        if len(self._goals) > 1 or trial_id in self._completed_trials or result.get("finished"):
            return
        value = result.get(self._metric)
        if value is not None and math.isfinite(value) and trial_id not in self._repeats:
            self._report(trial_id, value, int(result["epoch"]))

    def _report(self, trial_id: str, value: float, epoch: int) -> None:
        with warnings.catch_warnings(), contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            warnings.simplefilter("ignore")  # after a restart reports come again
            self._ot_trials[trial_id].report(value, epoch)

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        if trial_id in self._completed_trials:
            return
        if trial_id not in self._repeats:
            state = trial_state(result, error, self._goals)
            if state == TrialState.PRUNED and result:
                # Tune does not pass on the report at which a trial was stopped
                self.on_trial_result(trial_id, result)
            values = (
                [result[goal] for goal in self._goals] if state == TrialState.COMPLETE and result else None
            )
            self._tell(trial_id, state, values, result["epoch"] if result and "epoch" in result else 0)
        # a repeat may have ended before the first trial did
        for repeat, first in self._repeats.items():
            if first in self._completed_trials and repeat not in self._completed_trials:
                first_trial = self._ot_study.get_trials(deepcopy=False)[self._ot_trials[first].number]
                for epoch, value in first_trial.intermediate_values.items():
                    self._report(repeat, value, epoch)
                values = first_trial.values if first_trial.state == TrialState.COMPLETE else None
                self._tell(repeat, first_trial.state, values, 0)

    def _tell(self, trial_id: str, state: TrialState, values: Sequence[float] | None, epochs: float) -> None:
        trial = self._ot_trials[trial_id]
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):  # it was told before a restart
            trial.set_user_attr("epochs", epochs)
        self._ot_study.tell(trial, values, state=state, skip_if_finished=True)
        self._completed_trials.add(trial_id)


class GrowingGenerator(SearchGenerator):
    """Tune's generator of `num_trials` trials, which goes on to as many as this start asks for: Tune itself
    goes on to as many as the first start did."""

    def __init__(self, searcher: OptunaSearcher, num_trials: int):
        super().__init__(searcher)
        self.num_trials = num_trials

    def restore_from_dir(self, dirpath: str) -> None:
        super().restore_from_dir(dirpath)
        self._total_samples, self._finished = self.num_trials, False


def trial_state(result: dict | None, error: bool, names: Sequence[str] = ()) -> TrialState:
    """Return the state of a trial by its last report: finished, stopped (PRUNED) or failed, as one is whose
    scores `names` are not finite."""
    if error or not result or result.get("trouble"):
        return TrialState.FAIL
    if not all(math.isfinite(result[name]) for name in names if name in result):
        return TrialState.FAIL
    return TrialState.COMPLETE if result.get("finished") else TrialState.PRUNED


def build_searcher(
    config: SearchConfig, space: Space, num_trials: int, folder: Path, options: SearcherOptions, begins: bool
) -> OptunaSearcher:
    """Return the searcher of `config` over a space, its study in `folder`/optuna.journal (`optuna-dashboard`
    reads it). Of a search that `begins`, published settings, or the grid, come first."""
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    first = {"grid": space.grid_settings(), "random": []}.get(config.algorithm, list(space.published))
    two_goals = len(config.goals) > 1
    return OptunaSearcher(
        options,
        space=DefineByRun(space.knobs),
        metric=list(config.goals) if two_goals else config.goals[0],
        mode=["max"] * len(config.goals) if two_goals else "max",
        points_to_evaluate=first if begins else [],
        sampler=build_sampler(config, space, num_trials),
        study_name=config.name,
        storage=open_journal(folder),
    )


def open_journal(folder: Path) -> optuna.storages.JournalStorage:
    """Return Optuna's storage of the search in `folder`."""
    return optuna.storages.JournalStorage(JournalFileBackend(str(folder / JOURNAL)))


def load_evidence(folder: Path, study_name: str, knobs: Knobs) -> tuple[list[FrozenTrial], int]:
    """Return (the finished trials of the search in `folder` that lie in the space, as trials of another
    study; how many finished ones do not).

    Raises:
        UserError: it has no study.
    """
    if not (folder / JOURNAL).is_file():
        raise UserError(f"warm_start={folder}: no {JOURNAL} there; give the folder of a search")
    study = optuna.load_study(study_name=study_name, storage=open_journal(folder))
    finished = study.get_trials(states=(TrialState.COMPLETE,))
    evidence = []
    for trial in finished:
        with contextlib.suppress(UserError):  # it lies outside of the space
            config_changes(knobs, trial.params)
            fixed = FixedTrial(trial.params)
            DefineByRun(knobs)(fixed)
            attributes = {"warm_start": str(folder), "trial": trial.user_attrs.get("trial", trial.number)}
            evidence.append(
                create_trial(
                    params=trial.params,
                    distributions=fixed.distributions,
                    values=trial.values,
                    user_attrs=attributes,
                )
            )
    return evidence, len(finished) - len(evidence)


class WarmStart(NamedTuple):
    """Trials of another search that this one learns from, and in words which, and what was else there."""

    trials: list[FrozenTrial]
    description: str


def load_warm_start(
    config: SearchConfig, space: Space, fingerprint: dict[str, Any], recipe: type
) -> WarmStart:
    """Return what `config.warm_start` has for this search.

    Raises:
        UserError: it is no search of the same goal, or none of its trials lies in the space.
    """
    if config.warm_start is None:
        return WarmStart([], "")
    folder = Path(config.warm_start).absolute()
    try:
        stored = read_search(folder, recipe)
    except UserError as e:
        raise UserError(f"warm_start={config.warm_start}: {e}") from None
    if stored is None:
        raise UserError(f"warm_start={config.warm_start}: no search.json there; give the folder of a search")
    other = validate(SearchConfig, stored["search"], f"{folder}/search.json")
    if other.goals != config.goals:
        raise UserError(
            f"warm_start={config.warm_start}: it searched for {' and '.join(other.goals)}, this one for "
            f"{' and '.join(config.goals)}: its scores say nothing here"
        )
    trials, num_outside = load_evidence(folder, other.name, space.knobs)
    if not trials:
        raise UserError(
            f"warm_start={config.warm_start}: none of its {num_outside} finished trials lies in this space"
        )
    here = {"name", *MUTABLE_SETTINGS}
    differing = [
        path for path in differing_paths(stored["recipe"], fingerprint["recipe"]) if path not in here
    ]
    outside = f"; {num_outside} lie outside of this space" if num_outside else ""
    settings = f"other settings there: {', '.join(differing)}" if differing else "the same settings there"
    return WarmStart(
        trials, f"warm start from {len(trials)} finished trials of {folder}{outside}; {settings}"
    )

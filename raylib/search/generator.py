"""The source of a search's trials for Ray Tune: those that earlier starts have left unfinished, then new ones
of Optuna's."""

import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import optuna
from optuna.trial import FixedTrial, FrozenTrial, TrialState, create_trial
from ray.tune.experiment import Trial
from ray.tune.experiment.config_parser import _create_trial_from_spec, _make_parser
from ray.tune.search import SearchAlgorithm

from raylib.errors import UserError
from raylib.randomness import hash64
from raylib.search.config import Repeats, SearchConfig
from raylib.search.optuna import JOURNAL, STATES, open_study, trial_state
from raylib.search.samplers import build_sampler
from raylib.search.space import DefineByRun, Setting, SettingKey, Space
from raylib.search.trial import REPEAT_OF, REPLICATE, without_marks
from raylib.search.trial_log import Outcome, TrialLog


class GeneratorOptions(NamedTuple):
    """Options that may be others when a search goes on. num_trials: that there will be; key: equal for
    settings that are the same training; repeats: see `SearchConfig`; max_concurrent: trials at a time;
    max_seconds: of this search, after which no trial begins; seed: of the trials' names."""

    num_trials: int
    key: SettingKey
    repeats: Repeats = "score"
    max_concurrent: int = 10**9
    max_seconds: float = math.inf
    seed: int = 0


class StudyTrial(NamedTuple):
    """A trial in Optuna's study: its number, the storage's number of it, its setting."""

    number: int
    storage_id: int
    setting: Setting


class OptunaGenerator(SearchAlgorithm):
    """Tune's source of trials: those that earlier starts have left unfinished, then new ones of Optuna's.

    A trial that was stopped counts as pruned in Optuna, with its score of each epoch; a failed one as failed.
    A setting that was proposed before, a repeat, is marked for its trial: by `REPEAT_OF`, not to be trained,
    and Optuna is told what became of the first trial, as soon as that is known; or by `REPLICATE`, to be
    trained on another seed.
    """

    def __init__(
        self,
        study: optuna.Study,
        goals: Sequence[str],
        space: Callable[[optuna.Trial], None],
        log: TrialLog,
        options: GeneratorOptions,
    ):
        self.study, self.goals, self.space, self.log, self.options = study, list(goals), space, log, options
        self.waiting: list[str] = []  # begun by an earlier start, to be run on
        self.completed: set[str] = set()
        self._study_trials: dict[str, StudyTrial] = {}
        self._unnamed: list[int] = []  # trials of the study without a name: the driver died in between
        self._reported: set[tuple[str, int]] = set()  # (trial, epoch)
        self._repeats: dict[str, str] = {}  # {trial: the first one with its setting, whose score it takes}
        self._keys: dict[str, str | None] = {}  # of each trial
        self._parser = _make_parser()

    def learn(self, evidence: Sequence[FrozenTrial]) -> None:
        """Enter trials of another search into the study, those that an earlier start has not."""
        entered = [trial.user_attrs for trial in self.study.get_trials(deepcopy=False)]
        for trial in evidence:
            if trial.user_attrs not in entered:
                self.study.add_trial(trial)

    # ---- going on

    def read_study(self) -> None:
        """Enter into the log what the study has and the log lacks; the driver may have died between the
        two."""
        for trial in self.study.get_trials(deepcopy=False):
            name = trial.user_attrs.get("trial")
            if "warm_start" in trial.user_attrs or trial.state == TrialState.WAITING:
                continue
            if name is None:
                if trial.state == TrialState.RUNNING:
                    self._unnamed.append(trial._trial_id)
                continue
            self._enter(name, trial)
            if name not in self.log.settings:
                self.log.restore(name, self._marked(trial), JOURNAL)
            if trial.state.is_finished() and name not in self.log.outcomes:
                self.log.end(name, STATES[trial.state])

    def go_on(self, is_stopped: Callable[[str], bool]) -> None:
        """Enter into the study what the log and the reports have and it lacks, and find out what is left to
        be run. `is_stopped`: whether the stopping rule has ended a trial at its last report."""
        for name, setting in self.log.settings.items():
            if name not in self._study_trials:
                self._add_to_study(name, setting)
            if REPEAT_OF in setting:
                self._repeats[name] = setting[REPEAT_OF]
        for name in self.log.settings:
            if name not in self.completed:
                self._settle(name, is_stopped)

    def _enter(self, name: str, trial: FrozenTrial) -> None:
        self._study_trials[name] = StudyTrial(trial.number, trial._trial_id, trial.params)
        self._reported |= {(name, epoch) for epoch in trial.intermediate_values}
        if trial.state.is_finished():
            self.completed.add(name)

    def _marked(self, trial: FrozenTrial) -> Setting:
        """Return the setting of a trial of the study, with its marks."""
        attributes = trial.user_attrs
        marks = {REPEAT_OF: attributes.get("score of trial"), REPLICATE: attributes.get("replicate")}
        return {**trial.params, **{mark: value for mark, value in marks.items() if value is not None}}

    def _add_to_study(self, name: str, setting: Setting) -> None:
        """Enter a trial that the study has lost."""
        self.log.notes.append(f"{JOURNAL}: it lacks trial {name}, which is entered again")
        fixed = FixedTrial(without_marks(setting))
        self.space(cast(optuna.Trial, fixed))
        self.study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                params=fixed.params,
                distributions=fixed.distributions,
                user_attrs=self._attributes(name, setting),
            )
        )
        self._enter(name, self.study.get_trials(deepcopy=False)[-1])

    def _settle(self, name: str, is_stopped: Callable[[str], bool]) -> None:
        """Tell Optuna what the log and the reports say of a trial that runs in the study."""
        reports, outcome = self.log.reports(name), self.log.outcomes.get(name)
        for report in reports:
            self.on_trial_result(name, report)
        last = reports[-1] if reports else {}
        if name in self._repeats:
            outcome = outcome or Outcome("stopped")
        elif outcome is None and (last.get("finished") or last.get("trouble") or is_stopped(name)):
            outcome = Outcome(STATES[trial_state(last, False, self.goals)])
        if outcome is None:
            self.waiting.append(name)
            return
        self.on_trial_complete(name, last, error=outcome.state == "failed")
        self.log.end(name, *outcome)

    # ---- new trials

    def suggest(self, name: str) -> Setting | None:
        """Return a new trial's setting, perhaps marked; None: the time is up."""
        if self.log.seconds() >= self.options.max_seconds:
            return None
        storage_id = self._unnamed.pop(0) if self._unnamed else None
        trial = self.study.ask() if storage_id is None else optuna.Trial(self.study, storage_id)
        self.space(trial)
        setting: Setting = dict(trial.params)
        self._study_trials[name] = StudyTrial(trial.number, trial._trial_id, setting)
        if earlier := self._trained_before(name):
            if self.options.repeats == "replicate":
                setting = {**setting, REPLICATE: len(earlier)}
            else:
                self._repeats[name] = earlier[0]
                setting = {**setting, REPEAT_OF: earlier[0]}
        # the name comes last: a trial without one was asked for in part, and is asked for again
        for attribute, value in self._attributes(name, setting).items():
            trial.set_user_attr(attribute, value)
        return setting

    def _attributes(self, name: str, setting: Setting) -> dict[str, Any]:
        """Return what optuna-dashboard shows of a trial."""
        attributes: dict[str, Any] = {}
        if REPEAT_OF in setting:
            attributes["score of trial"] = setting[REPEAT_OF]
        else:
            attributes["folder"] = str(self.log.runs / name)
        if REPLICATE in setting:
            attributes["replicate"] = setting[REPLICATE]
        return {**attributes, "trial": name}

    def _trained_before(self, name: str) -> list[str]:
        """Return the trials before this one that were trained with an equal setting, or still are."""
        for each, known in self._study_trials.items():
            if each not in self._keys:
                self._keys[each] = self.options.key(known.setting)
        key = self._keys[name]
        if key is None:
            return []
        trained = (each for each in self._study_trials if each not in self._repeats and each != name)
        return [each for each in trained if self._keys[each] == key]

    # ---- Tune's interface

    def add_configurations(self, experiments: Any) -> None:
        (self.experiment,) = experiments

    @property
    def total_samples(self) -> int:
        return self.options.num_trials

    def is_finished(self) -> bool:
        has_all = len(self.log.settings) >= self.options.num_trials
        return not self.waiting and (has_all or self._finished)

    def next_trial(self) -> Trial | None:
        """Return a trial to run; None: not now, or no more."""
        if (name := self.next_name()) is None:
            return None
        setting = self.log.settings[name]
        spec = {**self.experiment.spec, "config": dict(setting)}
        tag = str([*self.log.settings].index(name) + 1)
        return _create_trial_from_spec(
            spec, self._parser, evaluated_params=dict(setting), experiment_tag=tag, trial_id=name
        )

    def next_name(self) -> str | None:
        """Return the name of a trial to run, whose setting is in the log then."""
        ended = self.completed | self._repeats.keys() | {*self.waiting}
        if self.is_finished() or len(self.log.settings.keys() - ended) >= self.options.max_concurrent:
            return None
        if self.waiting:
            return self.waiting.pop(0)
        # random as Tune's own, and the same in a search that was killed
        name = f"{int(hash64(self.options.seed, len(self.log.settings), 'trial')) >> 32:08x}"
        setting = self.suggest(name)
        if setting is None:
            self.set_finished()
            return None
        self.log.begin(name, setting)
        return name

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        # two goals have no intermediate values; the last report repeats the best checkpoint's score
        if len(self.goals) > 1 or trial_id in self.completed or result.get("finished"):
            return
        value = result.get(self.goals[0])
        if value is not None and math.isfinite(value) and trial_id not in self._repeats:
            self._report(trial_id, value, int(result.get("epoch", 0)))

    def _report(self, name: str, value: float, epoch: int) -> None:
        if (name, epoch) not in self._reported:  # after a restart reports come again
            self._reported.add((name, epoch))
            self.study._storage.set_trial_intermediate_value(
                self._study_trials[name].storage_id, epoch, value
            )

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        if trial_id in self.completed:
            return
        if trial_id not in self._repeats:
            state = trial_state(result, error, self.goals)
            if state == TrialState.PRUNED and result:
                # Tune does not pass on the report at which a trial was stopped
                self.on_trial_result(trial_id, result)
            values = (
                [result[goal] for goal in self.goals] if state == TrialState.COMPLETE and result else None
            )
            self._tell(trial_id, state, values, result["epoch"] if result and "epoch" in result else 0)
        # a repeat may have ended before the first trial did
        for repeat, first in self._repeats.items():
            if first in self.completed and repeat not in self.completed:
                first_trial = self.study.get_trials(deepcopy=False)[self._study_trials[first].number]
                for epoch, value in first_trial.intermediate_values.items():
                    self._report(repeat, value, epoch)
                values = first_trial.values if first_trial.state == TrialState.COMPLETE else None
                self._tell(repeat, first_trial.state, values, 0)

    def _tell(self, name: str, state: TrialState, values: Sequence[float] | None, epochs: float) -> None:
        study_trial = self._study_trials[name]
        self.study._storage.set_trial_user_attr(study_trial.storage_id, "epochs", epochs)
        self.study.tell(study_trial.number, values, state=state)
        self.completed.add(name)


def build_generator(
    config: SearchConfig, space: Space, log: TrialLog, options: GeneratorOptions
) -> OptunaGenerator:
    """Return the source of trials of `config` over a space, its study in optuna.journal beside the log
    (`optuna-dashboard` reads it). Published settings, or the grid, come first.

    Raises:
        UserError: the journal is another user's, and has pickles in it.
    """
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = log.path.with_name(JOURNAL)
    if config.algorithm == "cmaes" and journal.is_file() and journal.stat().st_uid != os.getuid():
        raise UserError(
            f"{journal}: another user's, with pickles of Optuna's CMA-ES in it, which going on would "
            "execute; give the search another name=, or make the file yours (chown) if you trust it"
        )
    first = {"grid": space.grid_settings(), "random": []}.get(config.algorithm, list(space.published))
    study = open_study(log, config.name, config.goals)
    study.sampler = build_sampler(config, space, options.num_trials)
    # a driver that died in between has entered some of them, or none
    lacking = list(first)
    for trial in study.get_trials(deepcopy=False):
        setting = trial.system_attrs.get("fixed_params", trial.params)
        if "warm_start" not in trial.user_attrs and setting in lacking:
            lacking.remove(setting)
    for setting in log.settings.values():  # of a journal that is lost
        if without_marks(setting) in lacking and not study.get_trials(deepcopy=False):
            lacking.remove(without_marks(setting))
    for setting in lacking:
        study.enqueue_trial(setting)
    generator = OptunaGenerator(study, config.goals, DefineByRun(space.knobs), log, options)
    generator.read_study()
    return generator

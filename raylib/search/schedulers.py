"""Early stopping: Tune's own rules, asked only where trials can be compared; and whether early scores rank
trials as the last ones do.

A trial says itself where it is prunable (`judged` in its reports): not while its method is incomplete (layers
still frozen, a pruning mask not yet found), and not after its last epoch. Rules count effective epochs
(`age`), without those of pruning rounds, whose model is not the trial's.
"""

import itertools
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from ray import tune
from ray.tune.experiment.trial import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from raylib.display import markdown_table
from raylib.errors import UserError
from raylib.renames import rename_path
from raylib.search.space import Choice, Distribution, Each, Int, Knobs, OneOf, Setting
from raylib.search.trial import read_reports, read_setting
from raylib.search.trial_log import TrialLog

# finished trials: for a rank correlation; for a recommendation based on it
MIN_TRIALS, MIN_TRIALS_TO_RECOMMEND = 4, 8
MIN_CORRELATION = 0.5  # rank correlation from which on an early score is worth stopping by


class Member(NamedTuple):
    """A trial as a stopping rule knows it: Tune's own objects are others after a restart."""

    trial_id: str


class FilterReports(TrialScheduler, ABC):
    """Mixin before one of Tune's rules: passes on the comparable reports alone, each once, after those of
    earlier drivers."""

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        self.ages: dict[str, float] = {}  # of the last report that was passed on, of each trial

    # Tune restores nothing of what its rules knew: a rule that starts empty would compare the trials to come
    # with nobody.
    def replay(self, log: TrialLog) -> set[str]:
        """Enter the reports of earlier drivers in their order; return the trials that the rule stops at their
        last ones, which may be what the driver was killed in."""
        reports = [(r["at"], name, r) for name in log.settings for r in log.reports(name)]
        decisions = {}
        for _, name, report in sorted(reports, key=lambda entry: entry[0]):
            decisions[name] = self.decide(name, report, None)
        return {name for name, decision in decisions.items() if decision == TrialScheduler.STOP}

    def on_trial_result(self, controller: Any, trial: Trial, result: dict) -> str:
        return self.decide(trial.trial_id, result, controller)

    def decide(self, name: str, report: dict, controller: Any) -> str:
        """Return whether a trial goes on after a report; `controller`: Tune's, None of a replay."""
        # a trial that goes on from its checkpoint may report it again
        if not self.is_comparable(report) or report["age"] <= self.ages.get(name, -1):
            return TrialScheduler.CONTINUE
        self.ages[name] = report["age"]
        return self.compare(Member(name), report, controller)

    # Scores of unlike states say nothing of each other: a half-frozen model's is low whatever its settings
    # are. And no comparison with a NaN is true, so a rule would neither stop its trial nor ever forget it.
    def is_comparable(self, report: dict) -> bool:
        """Return whether a trial may be compared with others by this report."""
        return bool(report.get("judged")) and math.isfinite(report.get(self._metric, math.nan))

    @abstractmethod
    def compare(self, trial: Any, report: dict, controller: Any) -> str:
        """Return the rule's decision by a comparable report."""


class Asha(FilterReports, AsyncHyperBandScheduler):
    """Asynchronous successive halving (Li et al. 2020) over effective epochs."""

    def compare(self, trial: Any, report: dict, controller: Any) -> str:
        score = self._metric_op * report[self._metric]
        return self._brackets[0].on_result(trial, report[self._time_attr], score)

    def on_trial_complete(self, controller: Any, trial: Trial, result: dict) -> None:
        """Enter nothing: the last report is of the best checkpoint, not of the last epoch."""
        self._trial_info.pop(trial.trial_id, None)


class Median(FilterReports, MedianStoppingRule):
    """Median stopping (Golovin et al. 2017) over effective epochs."""

    def compare(self, trial: Any, report: dict, controller: Any) -> str:
        self._stopped_trials.discard(trial)  # an earlier driver may have heard of reports in another order
        # where it knows too few trials, the rule asks Tune whether others wait for their turn
        nobody: Any = SimpleNamespace(get_live_trials=list)
        return MedianStoppingRule.on_trial_result(self, controller or nobody, trial, report)

    def on_trial_complete(self, controller: Any, trial: Trial, result: dict) -> None:
        """Enter nothing: the last report of a stopped trial is entered already, that of a finished one is of
        its best epoch."""


class ParetoHalving(FIFOScheduler):
    """Asynchronous successive halving for two goals: of the trials that have been at a rung, the best
    1 / `reduction_factor` by `pareto_order` of their scores there go on.

    rungs: {epoch: {trial: its scores}}, the last rung first.
    """

    def __init__(self, goals: Sequence[str], min_epochs: int, reduction_factor: float, max_epochs: int):
        super().__init__()
        self.goals, self.reduction_factor = goals, reduction_factor
        epochs = (int(min_epochs * reduction_factor**k) for k in itertools.count())
        below_end = list(itertools.takewhile(lambda epoch: epoch < max_epochs, epochs))
        self.rungs: dict[int, dict[str, tuple[float, ...]]] = {epoch: {} for epoch in reversed(below_end)}

    def on_trial_result(self, controller: Any, trial: Trial, result: dict) -> str:
        """Enter the trial's scores at the last rung that it has reached, if it is new there, and compare."""
        reached = (scores for epoch, scores in self.rungs.items() if result["age"] >= epoch)
        scores = next(reached, None)
        if scores is None or trial.trial_id in scores:
            return TrialScheduler.CONTINUE
        scores[trial.trial_id] = tuple(result[goal] for goal in self.goals)
        num_survivors = math.ceil(len(scores) / self.reduction_factor)
        best = pareto_order(list(scores.values()))[:num_survivors]
        is_best = len(scores) - 1 in best  # the trial's are the last
        return TrialScheduler.CONTINUE if is_best else TrialScheduler.STOP


class ParetoAsha(FilterReports, ParetoHalving):
    """`ParetoHalving` over effective epochs (Schmucker et al. 2021, with hypervolume in place of their
    epsilon-net)."""

    def is_comparable(self, report: dict) -> bool:
        """Return whether a trial may be compared with others by this report."""
        scores = [report.get(goal, math.nan) for goal in self.goals]
        return bool(report.get("judged")) and all(map(math.isfinite, scores))

    def compare(self, trial: Any, report: dict, controller: Any) -> str:
        return ParetoHalving.on_trial_result(self, None, trial, report)


def pareto_order(points: Sequence[Sequence[float]]) -> list[int]:
    """Return the indices of points, two scores each, best first: front by front (those that no other point of
    the fronts to come dominates), in a front those first that add most to its hypervolume; the first of
    equals first."""
    rest, order = list(range(len(points))), []
    while rest:
        front = [i for i in rest if not any(_dominates(points[j], points[i]) for j in rest)]
        added = dict(zip(front, hypervolume_contributions([points[i] for i in front]), strict=True))
        order += sorted(front, key=lambda i: -added[i])
        rest = [i for i in rest if i not in added]
    return order


def _dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] >= b[0] and a[1] >= b[1] and tuple(a) != tuple(b)


def hypervolume_contributions(front: Sequence[Sequence[float]]) -> list[float]:
    """Return how much of the area between (0, 0) and a front each of its points adds alone: (x - the next
    smaller x) (y - the next smaller y). 0 of a point that is there twice."""
    order = sorted(range(len(front)), key=lambda i: front[i][0])  # so that y falls
    added = [0.0] * len(front)
    for k, i in enumerate(order):
        x_before = front[order[k - 1]][0] if k else 0.0
        y_after = front[order[k + 1]][1] if k + 1 < len(order) else 0.0
        added[i] = (front[i][0] - x_before) * (front[i][1] - y_after)
    return added


class Population(PopulationBasedTraining):
    """Population-based training (Jaderberg et al. 2017). Its members are entered into the `log`, and go on
    with the settings that they had, each from its own newest checkpoint."""

    def __init__(self, log: TrialLog, **arguments: Any):
        super().__init__(**arguments)
        self.log = log

    def on_trial_add(self, controller: Any, trial: Trial) -> None:
        # draws a setting in any case, so that members that have not begun yet draw what they would have drawn
        super().on_trial_add(controller, trial)
        if trial.trial_id not in self.log.settings:
            self.log.begin(trial.trial_id, dict(trial.config))
            return
        setting = read_setting(self.log.runs / trial.trial_id)
        trial.set_config(dict(self.log.settings[trial.trial_id] if setting is None else setting))
        if reports := [report for report in self.log.reports(trial.trial_id) if self.is_comparable(report)]:
            state, last = self._trial_state[trial], reports[-1]
            self._save_trial_state(state, last["epoch"], last, trial)
            # the interval goes on from its last multiple, not from the restart
            state.last_perturbation_time = (
                last["epoch"] // self._perturbation_interval * self._perturbation_interval
            )

    def on_trial_result(self, controller: Any, trial: Trial, result: dict) -> str:
        if not self.is_comparable(result):
            return TrialScheduler.CONTINUE
        return super().on_trial_result(controller, trial, result)

    def is_comparable(self, report: dict) -> bool:
        """Return False for members at their end: no training would follow a change of their settings."""
        at_end = report.get("epoch", 0) >= report.get("epochs", 0)
        return not at_end and math.isfinite(report.get(self._metric, math.nan))


def build_scheduler(
    rule: str, goals: Sequence[str], min_epochs: int, reduction_factor: float, max_epochs: int
) -> Asha | Median | ParetoAsha | None:
    """Return the stopping rule asha or median; None of "none". `max_epochs`: more than any trial has."""
    if rule == "none":
        return None
    common: dict[str, Any] = {
        "time_attr": "age",
        "metric": goals[0],
        "mode": "max",
        "grace_period": min_epochs,
    }
    # `time_attr` is no training iteration of Tune's: a pruning round is one, too, and a trial goes on at the
    # epoch of its checkpoint after a crash.
    if len(goals) > 1:
        return ParetoAsha(
            goals=goals, min_epochs=min_epochs, reduction_factor=reduction_factor, max_epochs=max_epochs
        )
    if rule == "median":
        return Median(**common, min_samples_required=3)
    return Asha(**common, max_t=max_epochs, reduction_factor=reduction_factor, stop_last_trials=False)


class ClampToSpace:
    """Moves values that a mutation has taken out of their range back to its end."""

    def __init__(self, knobs: Knobs):
        self.knobs = knobs

    def __call__(self, setting: Setting) -> Setting:
        ranges = {path: knob for path, knob in self.knobs.items() if not isinstance(knob, Choice)}
        clamped = {path: min(max(setting[path], knob.low), knob.high) for path, knob in ranges.items()}
        return {**setting, **clamped}


def check_mutable(knobs: Knobs, mutable_paths: tuple[str, ...], kind: str = "") -> None:
    """Check that all knobs may change in mid-run, as those of a population do. kind: of the config
    (`raylib.renames`).

    Raises:
        UserError: one cannot.
    """
    fixed = [
        path
        for path, knob in knobs.items()
        if isinstance(knob, OneOf | Each)
        or (isinstance(knob, Distribution) and rename_path(kind, path) not in mutable_paths)
    ]
    if fixed:
        raise UserError(
            f"algorithm=pbt: {', '.join(fixed)} cannot change in mid-run; what can: "
            f"{', '.join(mutable_paths)}"
        )


def build_population(knobs: Knobs, metric: str, perturb_every: int, seed: int, log: TrialLog) -> Population:
    """Return a population: every so many epochs the worst quarter goes on from the best quarter's
    checkpoints, with settings moved a fifth up or down or drawn anew."""
    knobs = {path: knob for path, knob in knobs.items() if isinstance(knob, Distribution)}
    random.seed(seed)  # Tune's mutations are drawn from these two
    np.random.seed(seed)
    return Population(
        log,
        time_attr="epoch",
        metric=metric,
        mode="max",
        perturbation_interval=perturb_every,
        require_attrs=False,
        hyperparam_mutations={path: _tune_domain(knob) for path, knob in knobs.items()},
        custom_explore_fn=ClampToSpace(knobs),
    )


def _tune_domain(knob: Distribution) -> Any:
    """Return a knob as Tune's own kind of distribution."""
    if isinstance(knob, Choice):
        return list(knob.values)
    if isinstance(knob, Int):
        return (tune.lograndint if knob.log else tune.randint)(knob.low, knob.high + 1)
    return (tune.loguniform if knob.log else tune.uniform)(knob.low, knob.high)


class RankAgreement(NamedTuple):
    """Spearman's rho, from -1 to 1, of the scores of `num_trials` trials after `epoch` effective epochs with
    their last ones."""

    epoch: int
    rho: float
    num_trials: int


def rank_agreements(
    runs: Path, last: Mapping[str, float], goal: str, min_epochs: int, reduction_factor: float
) -> list[RankAgreement]:
    """Return the agreements after one epoch and at ASHA's rungs; none where all trials score alike.

    Args:
        runs: the folder of the trials' folders.
        last: {trial: score at its end} of those that finished.
    """
    from scipy import stats

    curves = [(learning_curve(runs / name, goal, prunable_only=True), score) for name, score in last.items()]
    longest = max((epoch for curve, _ in curves for epoch in curve), default=0)
    rungs = itertools.takewhile(
        lambda epoch: epoch <= longest, (int(min_epochs * reduction_factor**k) for k in itertools.count())
    )
    agreements = []
    for epoch in sorted({1, *rungs}):
        pairs = [(curve[epoch], score) for curve, score in curves if epoch in curve]
        early, final = zip(*pairs, strict=True) if pairs else ((), ())
        if len(pairs) >= MIN_TRIALS and len(set(early)) > 1 and len(set(final)) > 1:
            rho = float(stats.spearmanr(early, final).statistic)
            agreements.append(RankAgreement(epoch, rho, len(pairs)))
    return agreements


def learning_curve(run: Path, goal: str, prunable_only: bool) -> dict[int, float]:
    """Return {effective epoch: score} of a trial; `prunable_only`: where its method is complete."""
    return {
        int(report["age"]): report[goal]
        for report in read_reports(run)
        if "age" in report and math.isfinite(report.get(goal, math.nan))
        if report.get("judged") or not prunable_only
    }


def describe_agreements(agreements: Sequence[RankAgreement], stopped_from: int | None) -> str:
    """Return a table, and a recommendation if trials were stopped from the epoch `stopped_from` on by scores
    that say little of the last; `stopped_from`: None where none was. "" of no agreement."""
    if not agreements:
        return ""
    lines = [["after epoch", "rank correlation with the last score", "trials"]]
    lines += [[str(a.epoch), f"{a.rho:.2f}", str(a.num_trials)] for a in agreements]
    text = markdown_table(lines, words=0) + "\n\nSpearman's, of the trials that finished."
    if stopped_from is None:
        return text
    text += " With those that were stopped it may be more."
    first = next((a for a in agreements if a.epoch == stopped_from), None)
    if first is None or first.num_trials < MIN_TRIALS_TO_RECOMMEND or first.rho >= MIN_CORRELATION:
        return text
    later = (a.epoch for a in agreements if a.epoch > stopped_from and a.rho >= MIN_CORRELATION)
    instead = next((f"`min_epochs={epoch}`" for epoch in later), "`early_stopping=none`")
    return (
        f"{text} **Trials were stopped from epoch {stopped_from} on, where scores tell little of the last: "
        f"try {instead}.**"
    )

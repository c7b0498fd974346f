"""Which trials go on: Tune's own rules, asked only where a trial may be judged.

A trial says so itself (`judged`): not while its method is still under way to what it is (layers frozen yet, a
mask not found), and not after its last epoch. Its age is in epochs, without those of pruning rounds: a
round's model is not the trial's. What trials had scored is read back when a search goes on after its driver
died.
"""

import math
import random
import time
from pathlib import Path

import numpy as np
from ray import tune
from ray.tune.experiment.trial import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from raylib.errors import UserError
from raylib.search.space import Choice, Distribution, Each, Int, Knobs, OneOf, Setting
from raylib.search.trial_log import read_told

STARTED = (
    time.time()
)  # of this driver: what trials told before is remembered, what they tell from now on comes by itself


class _Fair:
    """Asks the rule beside it about results that count alone, and tells it first what trials had told an
    earlier driver. `runs`: where the trials' folders are."""

    runs: Path
    remembered = False

    def on_trial_result(self, controller, trial: Trial, result: dict) -> str:
        if not self.remembered:
            self.remembered = True
            for known in controller.get_trials():
                told = read_told(self.runs / known.trial_id)
                self.remember(known, [r for r in told if r["at"] < STARTED and self.counts(r)])
        return (
            super().on_trial_result(controller, trial, result)
            if self.counts(result)
            else TrialScheduler.CONTINUE
        )

    def counts(self, result: dict) -> bool:
        """Whether a trial may be judged by `result`."""
        return bool(result.get("judged")) and math.isfinite(result.get(self._metric, math.nan))


class Asha(_Fair, AsyncHyperBandScheduler):
    """Asynchronous successive halving (Li et al. 2020) over epochs."""

    def remember(self, trial: Trial, results: list[dict]) -> None:
        """Enter what a trial had scored before a restart."""
        for result in results:
            self._brackets[0].on_result(
                trial, result[self._time_attr], self._metric_op * result[self._metric]
            )

    def on_trial_complete(self, controller, trial: Trial, result: dict) -> None:
        """Nothing more: the last result is of the best checkpoint, not of the last epoch."""
        self._trial_info.pop(trial.trial_id, None)


class Median(_Fair, MedianStoppingRule):
    """Median stopping (Golovin et al. 2017) over epochs."""

    def on_trial_complete(self, controller, trial: Trial, result: dict) -> None:
        """Nothing more: the last result of a stopped trial is entered already, that of a finished one is of
        its best epoch."""

    def remember(self, trial: Trial, results: list[dict]) -> None:
        """Enter what a trial had scored before a restart."""
        if results:
            self._results[trial] = results


class Population(_Fair, PopulationBasedTraining):
    """Population-based training (Jaderberg et al. 2017)."""

    def counts(self, result: dict) -> bool:
        """Members that are at their end change no more: nothing would be trained with what they changed
        to."""
        return result["epoch"] < result["epochs"] and math.isfinite(result.get(self._metric, math.nan))

    def remember(self, trial: Trial, results: list[dict]) -> None:
        """Enter where a member was before a restart, and the checkpoint that others may take."""
        if results:
            state, last = self._trial_state[trial], results[-1]
            self._save_trial_state(state, last["epoch"], last, trial)
            state.last_perturbation_time = (
                last["epoch"] // self._perturbation_interval * self._perturbation_interval
            )
            state.last_checkpoint = trial.checkpoint


def scheduler(
    stop: str, metric: str, grace: int, reduction: float, longest: int, runs: Path
) -> TrialScheduler | None:
    """The rule called `stop`; None for "none". longest: more epochs than any trial has. runs: where the
    trials' folders are."""
    if stop == "none":
        return None
    common = {"time_attr": "age", "metric": metric, "mode": "max", "grace_period": grace}
    if stop == "median":
        rule = Median(**common, min_samples_required=3)
    else:
        rule = Asha(**common, max_t=longest, reduction_factor=reduction, stop_last_trials=False)
    rule.runs = runs
    return rule


class Within:
    """Sets what a mutation has moved out of its range back to the end; an object, so that a search can be
    kept in a file."""

    def __init__(self, knobs: Knobs):
        self.knobs = knobs

    def __call__(self, setting: Setting) -> Setting:
        return {
            **setting,
            **{
                path: min(max(setting[path], knob.low), knob.high)
                for path, knob in self.knobs.items()
                if not isinstance(knob, Choice)
            },
        }


def check_changeable(knobs: Knobs, changeable: tuple[str, ...]) -> None:
    """Whether all knobs may change in mid-run, as those of a population do.

    Raises:
        UserError: one cannot.
    """
    fixed = [
        path
        for path, knob in knobs.items()
        if isinstance(knob, OneOf | Each) or (isinstance(knob, Distribution) and path not in changeable)
    ]
    if fixed:
        raise UserError(
            f"search=pbt: {', '.join(fixed)} cannot change in mid-run; what can: {', '.join(changeable)}"
        )


def population(knobs: Knobs, metric: str, every: int, seed: int, runs: Path) -> Population:
    """A population: every so many epochs the worst quarter goes on from the best quarter's checkpoints, with
    settings moved a fifth up or down or drawn anew. runs: where the trials' folders are."""
    knobs = {path: knob for path, knob in knobs.items() if isinstance(knob, Distribution)}
    random.seed(seed)  # Tune's mutations are drawn from these two
    np.random.seed(seed)
    rule = Population(
        time_attr="epoch",
        metric=metric,
        mode="max",
        perturbation_interval=every,
        require_attrs=False,
        hyperparam_mutations={path: _domain(knob) for path, knob in knobs.items()},
        custom_explore_fn=Within(knobs),
    )
    rule.runs = runs
    return rule


def _domain(knob: Distribution):
    """A knob as Tune's own kind of distribution."""
    if isinstance(knob, Choice):
        return list(knob.values)
    if isinstance(knob, Int):
        return (tune.lograndint if knob.log else tune.randint)(knob.low, knob.high + 1)
    return (tune.loguniform if knob.log else tune.uniform)(knob.low, knob.high)

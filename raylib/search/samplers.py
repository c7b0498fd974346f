"""Samplers of Optuna: those of a search's algorithms, and published settings as distributions around them.

`PriorSampler` is the ensemble of PriorBand (Mallik et al. 2023, section 4). Half of the trials come from TPE,
which begins at random; so do the first few. The others are sampled around a centre: one of the published
settings, or the best trial so far (the incumbent). Evidence decides between these: a centre is as likely as
its surroundings explain the trials that are good. So a setting that was published for another model soon has
no share.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from raylib.errors import require
from raylib.randomness import generator, hash64
from raylib.search.config import SearchConfig
from raylib.search.space import Setting, Space

MODEL_SHARE = 0.5  # of the trials, TPE's: as PriorBand's share of random ones at the first rung
WIDTH = 0.2  # standard deviation around a number, in its range as 0 to 1
CHANGE = 0.5  # probability that a choice is drawn anew, and that a number of the incumbent changes
MIN_FINISHED = 3  # trials; from fewer nothing is concluded, and all are TPE's
TOP_SHARE = 1 / 3  # of the finished trials, those that a centre should explain
CENTRE = "polyglance:centre"  # in a trial's attributes: the setting that it is sampled around; none: TPE's


def build_sampler(config: SearchConfig, space: Space, num_trials: int) -> BaseSampler:
    """Return the sampler of `config.algorithm`; each trial's draws are seeded by its number."""

    def tpe(seed: int) -> BaseSampler:
        # fewer than the usual ten random trials where there are few in all
        startup = max(3, min(10, num_trials // 8))
        return optuna.samplers.TPESampler(
            seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=startup
        )

    def nsga2(seed: int) -> BaseSampler:
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(4, min(50, num_trials // 4)))

    def cmaes(seed: int) -> BaseSampler:
        require("cmaes", "ray")
        return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)

    samplers: dict[str, Callable[[int], BaseSampler]] = {
        "tpe": tpe,
        "priorband": tpe,
        "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
        "grid": lambda seed: optuna.samplers.RandomSampler(seed=seed),  # every trial is enqueued
        "nsga2": nsga2,
        "cmaes": cmaes,
    }
    sampler = SeededSampler(samplers[config.algorithm], config.seed)
    return PriorSampler(space.published, sampler, config.seed) if config.algorithm == "priorband" else sampler


class SeededSampler(BaseSampler):
    """A sampler `build(seed of a trial)` for each trial anew: what a trial draws depends on (seed, its
    number) and on the trials before it, never on what this process drew before, so that a search that goes on
    draws what it would have drawn."""

    def __init__(self, build: Callable[[int], BaseSampler], seed: int):
        self.build, self.seed = build, seed
        self.number, self.sampler = -1, build(0)

    def _of(self, trial: FrozenTrial) -> BaseSampler:
        if trial.number != self.number:
            seed = hash64(self.seed, trial.number, "sampler") % 2**32
            self.number, self.sampler = trial.number, self.build(int(seed))
        return self.sampler

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._of(trial).before_trial(study, trial)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        # a trial that a killed driver asked for in part has drawn some of its parameters already
        seed = hash64(self.seed, trial.number, param_name) % 2**32
        return self.build(int(seed)).sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        # it draws nothing; another trial may be asked for just now
        self.build(0).after_trial(study, trial, state, values)


class PriorSampler(BaseSampler):
    """Samples around `published` settings, around the best trial, or as `model` does. What a trial draws
    depends on (seed, its number) and on the trials before it, so a search that goes on draws the same."""

    def __init__(self, published: Sequence[Setting], model: BaseSampler, seed: int):
        self.published, self.model, self.seed = list(published), model, seed

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Decide what the trial is sampled around."""
        rng = generator(self.seed, trial.number, "centre")
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        # PriorBand samples around the published setting before anything is known; where it is wrong, those
        # trials are lost
        if self.published and len(finished) >= MIN_FINISHED and rng.random() >= MODEL_SHARE:
            centres, shares = self.weigh_centres(finished)
            centre = centres[rng.choice(len(centres), p=shares)]
            study._storage.set_trial_system_attr(trial._trial_id, CENTRE, centre)
        self.model.before_trial(study, trial)

    def weigh_centres(self, finished: Sequence[FrozenTrial]) -> tuple[list[Setting], np.ndarray]:
        """Return (centres, their probabilities): the published settings, and last the best trial's.

        A centre's score is the probability density of the good trials around it, the better ones counting
        more (PriorBand, equation 3).
        """
        finished = sorted(finished, key=lambda trial: trial.values[0], reverse=True)
        # the best one is left out: it is its own centre, and would speak for itself
        good = finished[1 : max(2, math.ceil(TOP_SHARE * len(finished)))]
        centres = [*self.published, finished[0].params]
        scores = np.array(
            [
                sum((len(good) - rank) * _density(trial, centre) for rank, trial in enumerate(good))
                for centre in centres
            ]
        )
        return centres, scores / scores.sum()

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        if _centre(study, trial) is not None:
            return {}
        return self.model.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self.model.sample_relative(study, trial, search_space) if search_space else {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        centre = _centre(study, trial)
        if centre is None or param_name not in centre:  # a knob of an alternative that the centre has not
            return self.model.sample_independent(study, trial, param_name, param_distribution)
        rng = generator(self.seed, trial.number, param_name)
        changes = rng.random() < CHANGE
        value = centre[param_name]
        if isinstance(param_distribution, CategoricalDistribution):
            choices = param_distribution.choices
            return choices[rng.integers(len(choices))] if changes else value
        if centre not in self.published and not changes:
            return value
        place = -1.0
        while not 0 <= place <= 1:  # a normal distribution, cut off at the ends of the range
            place = rng.normal(_to_unit(value, param_distribution), WIDTH)
        return _from_unit(place, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self.model.after_trial(study, trial, state, values)


def _centre(study: optuna.Study, trial: FrozenTrial) -> Setting | None:
    return study._storage.get_trial_system_attrs(trial._trial_id).get(CENTRE)


def _density(trial: FrozenTrial, centre: Setting) -> float:
    """Return the probability density of a trial's setting around `centre`, over ranges as 0 to 1."""
    density = 1.0
    for name, distribution in trial.distributions.items():
        value = trial.params[name]
        if isinstance(distribution, CategoricalDistribution):
            chance = 1 / len(distribution.choices)
            if name in centre:
                chance = CHANGE * chance + (1 - CHANGE) * (value == centre[name])
            density *= chance
        elif name in centre:
            middle, place = _to_unit(centre[name], distribution), _to_unit(value, distribution)
            within = _normal_cdf((1 - middle) / WIDTH) - _normal_cdf(-middle / WIDTH)
            density *= math.exp(-(((place - middle) / WIDTH) ** 2) / 2) / (
                WIDTH * math.sqrt(2 * math.pi) * within
            )
    return density


def _normal_cdf(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


def _to_unit(value: float, distribution: BaseDistribution) -> float:
    """Return the place of a number in its range, from 0 to 1, in the logarithm where that is even."""
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high = distribution.low, distribution.high
    if low == high:
        return 0.5
    if distribution.log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low)


def _from_unit(place: float, distribution: BaseDistribution) -> float | int:
    """Return the number at a place in its range."""
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high = distribution.low, distribution.high
    if distribution.log:
        value = math.exp(math.log(low) + place * (math.log(high) - math.log(low)))
    else:
        value = low + place * (high - low)
    value = min(max(value, low), high)  # rounding
    return round(value) if isinstance(distribution, IntDistribution) else value

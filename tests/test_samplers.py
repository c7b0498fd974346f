"""Published settings as distributions: shares that follow the evidence, densities, draws."""

import statistics

import numpy as np
import optuna
import pytest

from raylib.search.config import SearchConfig
from raylib.search.samplers import CENTRE, MIN_FINISHED, WIDTH, PriorSampler, _density, build_sampler
from raylib.search.space import Choice, DefineByRun, Float, Int, OneOf, Space

KNOBS = {"rate": Float(1e-5, 1e-1, log=True), "layers": Int(1, 9), "source": Choice("a", "b", None)}
PUBLISHED = {"rate": 1e-2, "layers": 8, "source": "a"}


def make_study(published=(PUBLISHED,), seed=0, knobs=KNOBS) -> optuna.Study:
    space = Space("", "", knobs, published=published)
    sampler = build_sampler(SearchConfig(recipe="", algorithm="priorband", seed=seed), space, 40)
    return optuna.create_study(direction="maximize", sampler=sampler)


def ask(study: optuna.Study, value: float = 0.0, knobs=KNOBS) -> optuna.trial.FrozenTrial:
    """A trial's setting, told to the study with a score."""
    trial = study.ask()
    DefineByRun(knobs)(trial)
    study.tell(trial, value)
    return study.trials[-1]


def finished(study: optuna.Study, setting: dict, value: float) -> None:
    study.enqueue_trial(setting)
    ask(study, value)


@pytest.mark.parametrize("centre", [PUBLISHED, {"rate": 1e-5, "layers": 1, "source": None}])
def test_prior_density_adds_up_to_one(centre):
    study = make_study()
    trial = ask(study)
    total = 0.0
    places = (np.arange(200) + 0.5) / 200
    for source in ("a", "b", None):
        for rate in 10 ** (-5 + 4 * places):
            trial.params = {"rate": float(rate), "source": source}
            trial.distributions.pop("layers", None)
            total += _density(trial, centre) / len(places)
    assert total == pytest.approx(1, abs=1e-3)


def test_prior_first_trials_are_the_models():
    study = make_study()
    trials = [ask(study) for _ in range(MIN_FINISHED)]
    assert not any(CENTRE in trial.system_attrs for trial in trials)


def test_prior_share_follows_evidence():
    right, wrong = make_study(), make_study()
    near = {"rate": 1.2e-2, "layers": 8, "source": "a"}
    far = {"rate": 1e-5, "layers": 1, "source": "b"}
    for study, good, bad in ((right, near, far), (wrong, far, near)):
        for number in range(6):
            finished(study, good, 1.0 - number / 100)
            finished(study, bad, 0.1)
    _, of_right = right.sampler.weigh_centres(right.trials)
    _, of_wrong = wrong.sampler.weigh_centres(wrong.trials)
    assert of_right == pytest.approx([0.5, 0.5], abs=0.05)  # the best trial stands where the paper's does
    assert of_wrong[0] < 0.01


def test_prior_trials_lie_around_the_published_setting_and_half_are_the_models():
    trials = []
    for seed in range(100):
        study = make_study(seed=seed)
        for number in range(MIN_FINISHED):  # so that the incumbent is the published setting
            finished(study, PUBLISHED, 1.0 - number)
        trials.append(ask(study))
    around = [trial for trial in trials if CENTRE in trial.system_attrs]
    assert 30 < len(around) < 70
    places = [(np.log10(trial.params["rate"]) + 5) / 4 for trial in around]
    assert statistics.fmean(places) == pytest.approx(0.75, abs=0.05)
    assert statistics.stdev(places) == pytest.approx(WIDTH, abs=0.05)
    assert all(1e-5 <= trial.params["rate"] <= 1e-1 and 1 <= trial.params["layers"] <= 9 for trial in trials)
    unchanged = statistics.fmean(trial.params["source"] == "a" for trial in around)
    assert unchanged == pytest.approx(0.5 + 0.5 / 3, abs=0.15)


def test_prior_draws_follow_from_seed_and_number():
    first, second = make_study(seed=3), make_study(seed=3)
    found = [[ask(study, float(n % 3)).params for n in range(12)] for study in (first, second)]
    assert found[0] == found[1]
    assert found[0] != [ask(make_study(seed=4)).params for _ in range(12)]


def test_prior_leaves_knobs_of_other_alternatives_to_the_model():
    knobs = {"tuned": OneOf(lora={"rank": Int(2, 64, log=True)}, adapter={"bottleneck": Int(8, 128)})}
    study = make_study(({"tuned": "lora", "rank": 8},), knobs=knobs)
    names = {frozenset(ask(study, knobs=knobs).params) for _ in range(30)}
    assert names == {frozenset({"tuned", "rank"}), frozenset({"tuned", "bottleneck"})}


def test_prior_sampler_without_published_settings_is_the_model():
    sampler = optuna.samplers.RandomSampler(seed=5)
    plain = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=5))
    study = optuna.create_study(sampler=PriorSampler((), sampler, 0))
    assert [ask(study).params for _ in range(5)] == [ask(plain).params for _ in range(5)]

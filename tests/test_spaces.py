"""Spaces without Ray: what they hold, how they become settings of a config, what is refused before any
trial."""

import itertools
import math
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from finetune.config import FinetuneConfig
from finetune.recipes import RECIPES as FINETUNE
from pretrain.recipes import RECIPES as PRETRAIN
from raylib import renames
from raylib.config import Config, change_settings, override
from raylib.errors import UserError
from raylib.search import space
from raylib.search.schedulers import check_mutable
from raylib.search.space import Choice, Each, Float, Int, OneOf, Space
from tune_spaces.__main__ import main, open_space, parse_settings
from tune_spaces.jobs import FinetuneSearchJob
from tune_spaces.spaces import SPACES

ROOT = Path(__file__).resolve().parent.parent


class Inner(Config):
    rate: float = 0.5
    size: int = 3


class Whole(Config):
    lr: float = 1.0
    inner: Inner | None = None
    parts: tuple[float, ...] = ()


KNOBS = {
    "lr": Float(0.1, 10, log=True),
    "how": OneOf(
        none={},
        small={"inner.rate": Float(0, 1), "inner.size": 4},
        large={"inner.rate": Float(2, 3), "more": OneOf(a={}, b={"inner.size": Int(5, 6)})},
    ),
    "parts": Each(2, Choice(0.5, 1.5)),
}


def test_space_alternatives_have_settings_of_their_own():
    setting = {"lr": 1.0, "how": "small", "inner.rate@small": 0.25, "parts[0]": 0.5, "parts[1]": 1.5}
    assert space.config_changes(KNOBS, setting) == {
        "lr": 1.0,
        "inner.rate": 0.25,
        "inner.size": 4,
        "parts": [0.5, 1.5],
    }
    other = {
        "lr": 1.0,
        "how": "large",
        "inner.rate@large": 2.5,
        "more": "b",
        "inner.size": 6,
        "parts[0]": 0.5,
        "parts[1]": 0.5,
    }
    assert change_settings(Whole(), space.config_changes(KNOBS, other)) == Whole(
        lr=1, inner=Inner(rate=2.5, size=6), parts=(0.5, 0.5)
    )


def test_space_enumerates_all_combinations_of_alternatives():
    assert sorted(tuple(sorted(a.items())) for a in space.alternatives(KNOBS)) == [
        (("how", "large"), ("more", "a")),
        (("how", "large"), ("more", "b")),
        (("how", "none"),),
        (("how", "small"),),
    ]


def test_space_corners_reach_every_bound():
    reached = {}
    for _, values in space.corners(KNOBS):
        for path, value in values.items():
            reached.setdefault(path, set()).update(value if isinstance(value, list) else [value])
    assert reached == {
        "lr": {0.1, 10},
        "inner.rate": {0, 1, 2, 3},
        "inner.size": {4, 5, 6},
        "parts": {0.5, 1.5},
    }


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"lr": 1.0, "how": "none", "parts[0]": 0.5}, "has no value for parts[1]"),
        ({"lr": 11.0, "how": "none", "parts[0]": 0.5, "parts[1]": 0.5}, "lr=11.0 is not in 0.1 to 10"),
        (
            {"lr": 1.0, "how": "none", "more": "a", "parts[0]": 0.5, "parts[1]": 0.5},
            "more, which no knob of its alternatives is called",
        ),
        (
            {"lr": 1.0, "how": "odd", "parts[0]": 0.5, "parts[1]": 0.5},
            "how=odd is not in one of none, small, large",
        ),
    ],
)
def test_space_settings_outside_are_refused(setting, words):
    with pytest.raises(UserError) as refused:
        space.config_changes(KNOBS, setting)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("knobs", "more", "words"),
    [
        ({}, {}, "has no knob: nothing in it varies"),
        ({"lr": 3.0}, {}, "has no knob: nothing in it varies"),
        ({"lrr": Float(0, 1)}, {}, "unknown setting 'lrr'; did you mean lr?"),
        ({"inner.size": Choice("large")}, {}, "inner.size"),
        ({"lr": Float(2, 1)}, {}, "lr: 2 to 1 is empty"),
        ({"lr": Choice()}, {}, "is empty"),
        ({"lr": Float(0, 1, log=True)}, {}, "needs values above 0 for log=True"),
        (
            {"lr": Float(0, 1)},
            {"published": ({"lr": 2.0},)},
            "its published settings: lr=2.0 is not in 0 to 1",
        ),
        ({"lr": Float(0, 1)}, {"grid": {"lr": (0.5, 4.0)}}, "lr=4.0 is not in 0 to 1"),
    ],
)
def test_space_that_would_fail_in_a_trial_is_refused(knobs, more, words):
    with pytest.raises(UserError) as refused:
        space.check_space("mine", Space("", "", knobs, **more), Whole())
    assert words in str(refused.value) and "'mine'" in str(refused.value)


@pytest.mark.parametrize("name", SPACES)
def test_space_paths_all_resolve_against_their_recipe(name):
    chosen = SPACES[name]
    base = {**FINETUNE, **PRETRAIN}[chosen.recipe]()
    space.check_space(name, chosen, base)
    for setting in chosen.published:  # the papers' settings are those that their recipes have
        change_settings(base, space.config_changes(chosen.knobs, setting))


@pytest.mark.parametrize(
    "name", sorted(set(SPACES) - {"alignment", "best_of_all", "best_of_scenes", "sparse"})
)
def test_space_published_settings_equal_the_recipe(name):
    chosen = SPACES[name]
    base = {**FINETUNE, **PRETRAIN}[chosen.recipe]()
    settled = space.config_changes(chosen.knobs, chosen.published[0])
    changed = change_settings(base, settled)
    for path in settled:
        usual = {
            "strategies.distillation.layers": (3, 6, 9, 12),
            "strategies.distillation.weights": (1, 1, 1, 1),
        }.get(path)
        assert _at(changed, path) == (usual if _at(base, path) is None else _at(base, path)), path


def _at(config, path):
    for name in path.split("."):
        config = getattr(config, name)
    return config


def test_space_distributions_are_what_optuna_draws():
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = []
    for _ in range(300):
        trial = study.ask()
        space.DefineByRun(KNOBS)(trial)
        drawn.append(trial.params)
        space.config_changes(KNOBS, trial.params)  # in the space, with nothing more
    assert {p["how"] for p in drawn} == {"none", "small", "large"}
    below = sum(p["lr"] < 1 for p in drawn) / len(drawn)
    assert abs(below - 0.5) < 0.1  # log-uniform about 1


def test_space_grid_is_a_product_over_published_settings():
    knobs = {"a": Int(1, 9), "b": Int(1, 9), "c": Int(1, 9)}
    chosen = Space("", "", knobs, published=({"a": 1, "b": 2, "c": 3},), grid={"a": (4, 5), "b": (6, 7)})
    assert chosen.grid_settings() == [{"a": a, "b": b, "c": 3} for a, b in itertools.product((4, 5), (6, 7))]


def test_space_can_be_a_user_file(tmp_path, capsys):
    own = tmp_path / "mine.py"
    own.write_text(
        'from raylib.search.space import Float\nSPACE = {"optim.lr": Float(1e-5, 1e-3, log=True)}\n'
    )
    name, chosen = open_space(str(own))
    assert name == "mine" and chosen.knobs == {"optim.lr": Float(1e-5, 1e-3, log=True)}
    assert main([str(own)]) == 0 and "optim.lr: 1e-05 to 0.001, log-uniform" in capsys.readouterr().out
    own.write_text("SPAC = {}\n")
    for given, words in (
        (str(own), "defines no SPACE"),
        (f"{own}.py", "no such file"),
        ("prio", "did you mean prior"),
    ):
        with pytest.raises(UserError, match=words):
            open_space(given)


def test_tune_spaces_settings_go_to_search_or_recipe():
    search, rest = parse_settings(
        ["recipe=scenes_xgqa", "num_trials=7", "epochs=3", "dev_sets=both", "optim.lr=1e-3"], ""
    )
    assert (search.num_trials, search.dev_sets, rest) == (7, "both", ["epochs=3", "optim.lr=1e-3"])
    with pytest.raises(UserError, match="recipe= is missing"):
        parse_settings(["num_trials=7"], "")
    with pytest.raises(UserError, match="has two: take tpe"):
        parse_settings(["recipe=scenes_xgqa", "algorithm=cmaes", "dev_sets=both"], "")


def test_seed_interval_and_front_equal_slow_references():
    from raylib.metrics import t_interval
    from raylib.search.final_runs import pareto_front
    from raylib.search.trial import TrialResult

    mean, half = t_interval([0.1, 0.4, 0.7])
    assert math.isclose(mean, 0.4) and math.isclose(
        half, 4.302653 * 0.3 / 3**0.5, rel_tol=1e-6
    )  # t of 2 degrees of freedom
    assert t_interval([0.3]) == (0.3, None)
    points = [(1, 5), (2, 4), (2, 3), (3, 3), (3, 3), (0, 6), (1, 4)]
    rows = [
        TrialResult(str(i), "finished", {}, {"a": a, "b": b}, 1, 1, 1, None, None)
        for i, (a, b) in enumerate(points)
    ]
    kept = {int(row.id) for row in pareto_front(rows, ("a", "b"))}
    assert (
        kept
        == {
            i
            for i, (a, b) in enumerate(points)
            if not any((c >= a and d >= b) and (c, d) != (a, b) for c, d in points)
        }
        == {0, 1, 3, 4, 5}
    )


def test_tune_spaces_help_lists_every_space():
    shown = subprocess.run([sys.executable, "-m", "tune_spaces"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 2 and all(name in shown.stdout for name in SPACES)


def test_space_with_a_renamed_path_goes_on(monkeypatch):
    """Written, and perhaps searched, before the rename: its names stay, the config has today's."""
    old = {"optim.horizon": "optim.schedule_factor", "strategies.prior.near": "strategies.prior.k"}
    monkeypatch.setitem(renames.RENAMED, "finetune", old)
    branch = {"strategies.prior.near": Int(2, 4), "strategies.prior.alpha": 3.0}
    mine = Space("", "", {"optim.horizon": Float(1, 2), "how": OneOf(prior=branch, none={})})
    base = FinetuneConfig(task="xgqa")
    space.check_space("mine", mine, base)
    setting = {"optim.horizon": 1.5, "how": "prior", "strategies.prior.near": 3}
    changes = space.config_changes(mine.knobs, setting)
    config = space.apply_changes(base, changes)
    assert "strategies.prior.near" in changes and config.strategies.prior.k == 3
    assert config.optim.schedule_factor == 1.5
    assert space.SettingKey(mine.knobs, base)(setting) is not None
    check_mutable({"strategies.prior.near": Int(2, 4)}, ("strategies.prior.k",), "finetune")


def test_search_of_english_alone_goes_by_its_own_dev_set():
    """Paper 4's rows train a model for each language, English too."""
    recipe = FINETUNE["p4_xtd_few_lora"]()
    for languages, allowed in (("en", True), ("de", False), ("en,de", False)):
        config = override(recipe, ["model=m", "data=d", f"languages={languages}"])
        with nullcontext() if allowed else pytest.raises(UserError, match="set dev_sets=target_dev"):
            assert FinetuneSearchJob().trial_config(config, "english_dev").dev_languages == ()
    config = override(recipe, ["model=m", "data=d", "languages=en"])
    assert FinetuneSearchJob()._scores(config, {"en": 0.5}) == {"english_dev": 0.5}

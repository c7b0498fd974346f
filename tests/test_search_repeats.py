"""Repeats, limits and evidence of a searcher, two goals' early stopping, the table: without a cluster."""

import itertools
import json
import random
from types import SimpleNamespace

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler

from raylib.config import Config, dump_config
from raylib.errors import UserError
from raylib.launch import LaunchConfig
from raylib.loop import FitConfig
from raylib.search.config import SearchConfig, check_fingerprint
from raylib.search.display import SearchTable
from raylib.search.generator import GeneratorOptions, build_generator
from raylib.search.optuna import load_evidence
from raylib.search.schedulers import build_scheduler, hypervolume_contributions, pareto_order
from raylib.search.space import Choice, Float, Int, OneOf, SettingKey, Space
from raylib.search.trial import REPEAT_OF, REPLICATE, append_report
from raylib.search.trial_log import TrialLog

CONTINUE, STOP = TrialScheduler.CONTINUE, TrialScheduler.STOP


class Inner(Config):
    rate: float = 0.5


class Fitted(LaunchConfig):
    x: float = 1.0
    fit: FitConfig = FitConfig()


class Whole(Config):
    x: float = 1.0
    n: int = 0
    inner: Inner = Inner()


SPACE = Space("", "", {"x": Choice(1.0, 2.0), "way": OneOf(a={}, b={"n": Int(0, 3)})})


def build(tmp_path, space=SPACE, algorithm="tpe", num_trials=8, goals=None, **options):
    """A source of trials, which goes on where another one in the same folder was."""
    settings = {"dev_sets": "both"} if goals else {"metric": "score"}
    config = SearchConfig(recipe="", name="s", algorithm=algorithm, num_trials=num_trials, **settings)
    options = GeneratorOptions(num_trials, SettingKey(space.knobs, Whole()), **options)
    found = build_generator(config, space, TrialLog(tmp_path), options)
    found.go_on(lambda name: False)
    return found


def start(found, name):
    """Begin a trial of this name; return its setting."""
    setting = found.suggest(name)
    found.log.begin(name, setting)
    return setting


def states(found):
    return [(t.user_attrs.get("trial"), t.state, t.value) for t in found.study.trials]


def test_setting_key_is_that_of_the_config_to_six_digits():
    key = SettingKey({"inner.rate": Float(0, 1), **SPACE.knobs}, Whole())
    alike = {"inner.rate": 0.1, "x": 1.0, "way": "a"}
    assert key(alike) == key({**alike, "inner.rate": 0.1 + 1e-9})
    assert key(alike) == key({**alike, "way": "b", "n": 0})  # another alternative, the same config
    assert key(alike) != key({**alike, "inner.rate": 0.1001}) and key(alike) != key({**alike, "x": 2.0})
    assert key({**alike, "x": 3.0}) is None  # its trial will tell


@pytest.mark.parametrize("algorithm", ["tpe", "random", "grid"])
def test_searcher_marks_a_setting_that_it_has_proposed(tmp_path, algorithm):
    one = Space("", "", {"x": Choice(1.0)}, grid={"x": (1.0, 1.0)})
    found = build(tmp_path, one, algorithm)
    assert found.suggest("first") == {"x": 1.0}
    assert found.suggest("second") == {"x": 1.0, REPEAT_OF: "first"}
    found.on_trial_result("first", {"score": 0.25, "epoch": 1})
    found.on_trial_complete("second", {REPEAT_OF: "first", "finished": False})  # before the first has ended
    assert states(found)[1] == ("second", TrialState.RUNNING, None)
    found.on_trial_complete("first", {"score": 0.5, "epoch": 2, "finished": True})
    assert found.suggest("third") == {"x": 1.0, REPEAT_OF: "first"}  # not of the second
    found.on_trial_complete("third", {REPEAT_OF: "first", "finished": False})
    assert [state[1:] for state in states(found)] == [(TrialState.COMPLETE, 0.5)] * 3
    assert [trial.intermediate_values for trial in found.study.trials] == [{1: 0.25}] * 3


def test_searcher_repeat_of_a_stopped_or_failed_trial_is_that(tmp_path):
    found = build(
        tmp_path, Space("", "", {"x": Choice(1.0, 2.0)}, ({"x": 1.0}, {"x": 2.0}, {"x": 1.0}, {"x": 2.0}))
    )
    assert [found.suggest(name).get(REPEAT_OF) for name in "abcd"] == [None, None, "a", "b"]
    found.on_trial_complete("a", {"score": 0.5, "epoch": 3, "finished": False})
    found.on_trial_complete("b", None, error=True)
    found.on_trial_complete("c", {REPEAT_OF: "a"})
    found.on_trial_complete("d", {REPEAT_OF: "b"})
    stopped, failed = (TrialState.PRUNED, 0.5), (TrialState.FAIL, None)
    assert [state[1:] for state in states(found)] == [stopped, failed, stopped, failed]
    assert found.study.trials[2].intermediate_values == {3: 0.5}


def test_searcher_knows_repeats_after_a_restart(tmp_path):
    space = Space("", "", {"x": Choice(1.0, 2.0)}, ({"x": 1.0}, {"x": 1.0}, {"x": 1.0}))
    found = build(tmp_path, space, max_seconds=1.0)
    start(found, "first")
    start(found, "second")
    again = build(tmp_path, space, max_seconds=60.0)
    assert again.waiting == ["first"]  # a repeat is not run again
    assert start(again, "third")[REPEAT_OF] == "first" and again.options.max_seconds == 60.0
    again.on_trial_complete("first", {"score": 0.5, "epoch": 2, "finished": True})
    assert [state[1:] for state in states(again)] == [(TrialState.COMPLETE, 0.5)] * 3


def test_searcher_replicates_count_those_that_were_trained(tmp_path):
    found = build(tmp_path, Space("", "", {"x": Choice(1.0)}), repeats="replicate")
    assert [found.suggest(name).get(REPLICATE) for name in "abc"] == [None, 1, 2]
    for name, score in zip("abc", (0.1, 0.2, 0.3), strict=True):
        found.on_trial_complete(name, {"score": score, "epoch": 1, "finished": True})
    assert [value for *_, value in states(found)] == [0.1, 0.2, 0.3]


def test_searcher_begins_no_more_than_its_limits_allow(tmp_path):
    found = build(tmp_path, Space("", "", {"x": Float(0, 1)}), max_concurrent=2, max_seconds=100.0)
    first, second = found.next_name(), found.next_name()
    assert first and second and found.next_name() is None
    found.on_trial_complete(first, {"score": 0.1, "epoch": 1, "finished": True})
    assert found.next_name() and len(found.study.trials) == 3
    found.log._began -= 99.0  # as if so many seconds had passed
    found.on_trial_complete(second, {"score": 0.1, "epoch": 1, "finished": True})
    last = found.next_name()
    found.log._began -= 2.0
    assert found.suggest("e") is None
    found.on_trial_complete(last, {"score": 0.1, "epoch": 1, "finished": True})
    assert found.next_name() is None and found.is_finished()  # the time is up
    again = build(tmp_path, Space("", "", {"x": Float(0, 1)}), max_seconds=1000.0, num_trials=5)
    assert 99.0 <= again.log.seconds() < 150.0 and len(again.log.settings) == 4 and not again.is_finished()


def test_evidence_lies_in_the_space_and_is_entered_once(tmp_path):
    wide, narrow = Float(0, 4), Float(0, 1)
    found = build(tmp_path, Space("", "", {"x": wide}, ({"x": 0.5}, {"x": 3.0}, {"x": 0.25})))
    for name in "abc":
        start(found, name)
    for name in "ab":
        found.on_trial_complete(name, {"score": 0.5, "epoch": 1, "finished": True})
    found.on_trial_complete("c", {"score": 0.5, "epoch": 1, "finished": False})  # stopped: no evidence
    evidence, num_outside = load_evidence(tmp_path, "s", {"x": narrow})
    assert [trial.params for trial in evidence] == [{"x": 0.5}] and num_outside == 1
    (tmp_path / "other").mkdir()
    other = build(tmp_path / "other", Space("", "", {"x": narrow}))
    other.learn(evidence)
    other.learn(evidence)
    assert [(trial.params, trial.value) for trial in other.study.trials] == [({"x": 0.5}, 0.5)]
    assert REPEAT_OF not in other.suggest("a")


def area(points, steps=60):
    """The area that points dominate in the unit square, by counting cells."""
    cells = itertools.product(range(steps), repeat=2)
    return sum(any(p[0] * steps > i and p[1] * steps > j for p in points) for i, j in cells) / steps**2


def test_hypervolume_contributions_equal_slow_references():
    dice = random.Random(0)
    for _ in range(20):
        points = [(dice.randint(1, 59) / 60, dice.randint(1, 59) / 60) for _ in range(6)]
        front = [p for p in points if not any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points)]
        added = hypervolume_contributions(front)
        for i, point in enumerate(front):
            others = front[:i] + front[i + 1 :]
            assert added[i] == pytest.approx(area([*others, point]) - area(others), abs=1e-9)
        losses = [[-x, -y] for x, y in front]
        import numpy as np
        from optuna._hypervolume import compute_hypervolume

        whole = compute_hypervolume(np.array(losses), np.zeros(2))
        for i in range(len(front)):
            rest = np.array(losses[:i] + losses[i + 1 :]).reshape(-1, 2)
            assert added[i] == pytest.approx(
                whole - compute_hypervolume(rest, np.zeros(2)) if len(rest) else whole
            )


def test_pareto_order_is_front_by_front():
    points = [(0.2, 0.2), (0.9, 0.1), (0.5, 0.5), (0.1, 0.9), (0.4, 0.4), (0.5, 0.5)]
    order = pareto_order(points)
    assert set(order[:4]) == {1, 2, 3, 5} and order[4:] == [4, 0]
    assert pareto_order([(0.1, 0.3), (0.6, 0.2), (0.5, 0.25)])[0] == 1  # it adds most


def test_two_goals_are_stopped_by_hypervolume_at_equal_epochs(tmp_path):
    trials = [SimpleNamespace(trial_id=str(i)) for i in range(6)]
    controller = SimpleNamespace(get_trials=lambda: trials)
    rule = build_scheduler("asha", ["a", "b"], min_epochs=1, reduction_factor=2.0, max_epochs=9)
    assert list(rule.rungs) == [8, 4, 2, 1]

    def tell(i, age, a, b, judged=True):
        return rule.on_trial_result(controller, trials[i], {"age": age, "judged": judged, "a": a, "b": b})

    assert tell(0, 1, 0.5, 0.5) == CONTINUE
    assert tell(1, 1, 0.4, 0.4) == STOP  # dominated
    assert tell(2, 1, 0.9, 0.1) == CONTINUE  # of the best two of three
    assert tell(3, 1, 0.1, 0.1, judged=False) == CONTINUE and tell(3, 1, float("nan"), 0.9) == CONTINUE
    assert tell(3, 1, 0.1, 0.52) == STOP  # on the front, but it adds little
    assert tell(0, 1, 0.0, 0.0) == CONTINUE  # at this rung it has been
    assert tell(0, 2, 0.1, 0.1) == CONTINUE and tell(2, 3, 0.9, 0.2) == CONTINUE  # another rung


def test_two_goals_are_compared_with_trials_before_a_restart(tmp_path):
    log = TrialLog(tmp_path)
    for i, (a, b) in enumerate([(0.5, 0.5), (0.9, 0.2)]):
        log.begin(str(i), {})
        (tmp_path / "trials" / str(i)).mkdir(parents=True)
        append_report(tmp_path / "trials" / str(i), {"age": 1, "judged": True, "a": a, "b": b})
    rule = build_scheduler("asha", ["a", "b"], 1, 2.0, 9)
    rule.replay(log)
    report = {"age": 1, "judged": True, "a": 0.1, "b": 0.4}
    assert rule.on_trial_result(None, SimpleNamespace(trial_id="2"), report) == STOP


def test_search_table_has_scores_settings_and_the_best_so_far():
    def trial(name, status, config, **last):
        return SimpleNamespace(trial_id=name, status=status, config=config, last_result=last)

    done = {"epoch": 4.0, "epochs": 4}
    trials = [
        trial("aa", "TERMINATED", {"optim.lr": 1e-3}, english_dev=0.25, finished=True, **done),
        trial("bb", "TERMINATED", {"optim.lr": 3e-3}, english_dev=0.5, finished=True, **done),
        trial("cc", "TERMINATED", {"optim.lr": 0.1}, english_dev=0.9, finished=False, epoch=1.0, epochs=4),
        trial("dd", "RUNNING", {"strategies.prior.k": 5}),
        trial("ee", "TERMINATED", {"optim.lr": 1e-3, REPEAT_OF: "aa"}, **{REPEAT_OF: "aa"}, finished=False),
        trial("ff", "ERROR", {"optim.lr": 9.0}),
    ]
    table = SearchTable("search 'x'", ["english_dev"], 9)
    lines = [" ".join(line.split()) for line in table.table(trials).splitlines()]
    assert lines == [
        "6 of 9 trials: 2 finished, 1 stopped, 1 running, 1 repeat, 1 failed",
        "best so far: english_dev 50.0 % by bb, optim.lr 0.003",
        "trial state epoch english_dev, % setting",
        "dd running prior.k 5",
        "cc stopped 1 of 4 90.0 optim.lr 0.1",
        "bb finished 4 of 4 50.0 optim.lr 0.003",
        "aa finished 4 of 4 25.0 optim.lr 0.001",
        "ee repeat of aa 4 of 4 25.0 optim.lr 0.001",
        "ff failed optim.lr 9",
    ]
    assert table.should_report(trials, done=True) and not table.should_report(trials)


def test_study_has_the_names_of_its_goals(tmp_path):
    found = build(tmp_path, Space("", "", {"x": Float(0, 1)}), algorithm="nsga2", goals=2)
    assert found.study.metric_names == ["english_dev", "target_dev"]
    assert isinstance(found.study, optuna.Study)


def fingerprint(**search):
    config = SearchConfig(recipe="curve", name="s", **search)
    parts = {"search": json.loads(dump_config(config)), "recipe": json.loads(dump_config(Fitted()))}
    return {"space": {"name": "x"}, **parts}


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ({}, {"num_trials": 30, "final_seeds": 5}, ["num_trials=30 (20 before)", "final_seeds=5 (3 before)"]),
        ({"num_finalists": 1}, {"num_finalists": 2}, ["num_finalists=2 (1 before)"]),
        ({"max_hours": 1.0}, {"max_hours": 2.0}, ["max_hours=2.0 (1.0 before)"]),
        ({"max_hours": 1.0}, {}, ["max_hours=None (1.0 before)"]),
        ({}, {"max_hours": 2.0}, []),
        ({}, {"max_concurrent": 3, "repeats": "replicate", "max_failures": 0, "warm_start": "runs/o"}, []),
        ({}, {"num_trials": 10}, "num_trials=20, which can only grow: num_trials=10 would leave out"),
        ({}, {"early_stopping": "none"}, r"other settings \(search.early_stopping\)"),
        ({}, {"seed": 1, "algorithm": "random"}, r"other settings \(search.algorithm, search.seed\)"),
        (
            {"algorithm": "pbt"},
            {"algorithm": "pbt", "num_trials": 30},
            r"other settings \(search.num_trials\)",
        ),
    ],
)
def test_search_may_grow_and_change_what_no_past_trial_depends_on(tmp_path, before, now, words):
    (tmp_path / "search.json").write_text(json.dumps(fingerprint(**before)))
    if isinstance(words, str):
        with pytest.raises(UserError, match=words):
            check_fingerprint(tmp_path, fingerprint(**now), Fitted)
    else:
        assert check_fingerprint(tmp_path, fingerprint(**now), Fitted) == words


@pytest.mark.parametrize(("path", "free"), [("loader_workers", True), ("seed", False), ("eval_every", False)])
def test_search_recipe_may_change_where_no_trial_depends_on_it(tmp_path, path, free):
    (tmp_path / "search.json").write_text(json.dumps(fingerprint()))
    changed = fingerprint()
    changed["recipe"]["fit"][path] = 7
    if free:
        assert check_fingerprint(tmp_path, changed, Fitted) == []
    else:
        with pytest.raises(UserError, match=rf"other settings \(recipe.fit.{path}\)"):
            check_fingerprint(tmp_path, changed, Fitted)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"algorithm": "random", "warm_start": "runs/o"},
            "algorithm=random learns nothing from other trials",
        ),
        ({"algorithm": "pbt", "max_hours": 1}, "begins all its members at once; leave max_hours out"),
        (
            {"dev_sets": "both", "early_stopping": "median"},
            "is for one goal; dev_sets=both has two: take asha",
        ),
    ],
)
def test_search_settings_that_do_not_go_together_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        SearchConfig(recipe="curve", **settings)


@pytest.mark.parametrize("algorithm", ["tpe", "nsga2", "random"])
def test_searcher_of_two_goals_goes_on_beside_stopped_trials(tmp_path, algorithm):
    knobs = {"x": Float(0, 1), "way": OneOf(a={}, b={"n": Int(0, 3)})}
    found = build(tmp_path, Space("", "", knobs), algorithm=algorithm, goals=2, num_trials=30)
    for i in range(30):
        setting = found.suggest(str(i))
        report = {"english_dev": setting["x"], "target_dev": 1 - setting["x"], "epoch": 1 + i % 3}
        found.on_trial_result(str(i), report)
        found.on_trial_complete(str(i), {**report, "finished": i % 3 == 2})
    trials = found.study.trials
    for i, trial in enumerate(trials):  # a repeat takes the state of the trial before it
        if "score of trial" not in trial.user_attrs:
            assert trial.state == (TrialState.COMPLETE if i % 3 == 2 else TrialState.PRUNED)
    assert len(trials) == 30 and sum("score of trial" in trial.user_attrs for trial in trials) < 10

"""A search compares finite scores alone."""

import json
import math
from types import SimpleNamespace

import pytest
from optuna.trial import TrialState

from finetune.recipes import RECIPES
from raylib.config import dump_config
from raylib.errors import NotFinite, UserError
from raylib.search import early_stopping as early
from raylib.search import schedulers
from raylib.search.optuna import searcher, state_of
from raylib.search.schedulers import Population, scheduler
from raylib.search.search import _compare, _row
from raylib.search.space import Float, Space
from raylib.search.trial_log import read_told, tell

NAN = math.nan


@pytest.mark.parametrize("value", [NAN, math.inf])
def test_trial_with_non_finite_score_is_failed(value):
    finished = {"finished": True, "english_dev": 0.5, "target_dev": value, "trial_id": "t"}
    assert state_of(finished, False, ("english_dev",)) == TrialState.COMPLETE
    assert state_of(finished, False, ("english_dev", "target_dev")) == TrialState.FAIL
    row = _row(
        SimpleNamespace(metrics=finished, error=None, config={}, path="t"), ("english_dev", "target_dev")
    )
    assert (row.state, row.scores, row.error) == ("failed", {"english_dev": 0.5}, "target_dev not finite")


def test_trial_with_non_finite_score_is_hidden_from_optuna(tmp_path):
    found = searcher("random", Space("", "", {"x": Float(0, 1)}), ("score",), 0, 4, tmp_path, "s")
    for name, score in (("good", 0.25), ("bad", NAN)):
        found.suggest(name)
        found.on_trial_complete(name, {"finished": True, "score": score})
    states = {trial.state: trial.value for trial in found._ot_study.trials}
    assert states == {TrialState.COMPLETE: 0.25, TrialState.FAIL: None}


@pytest.mark.parametrize("stop", ["asha", "median"])
def test_schedulers_ignore_non_finite_scores(tmp_path, stop):
    rule = scheduler(stop, "score", grace=1, reduction=2.0, longest=9, runs=tmp_path)
    assert [rule.counts({"age": 1, "judged": True, "score": score}) for score in (0.5, NAN, math.inf)] == [
        True,
        False,
        False,
    ]
    population = schedulers.population({"optim.lr": Float(0, 1)}, "score", 1, 0, tmp_path)
    assert isinstance(population, Population)
    assert [population.counts({"epoch": 1, "epochs": 2, "score": score}) for score in (0.5, NAN)] == [
        True,
        False,
    ]


def test_trial_log_refuses_non_finite_scores(tmp_path):
    tell(tmp_path, {"epoch": 1.0, "score": 0.5})
    with pytest.raises(NotFinite, match=f"{tmp_path}: score not finite"):
        tell(tmp_path, {"epoch": 2.0, "score": NAN})
    assert [line["score"] for line in read_told(tmp_path)] == [0.5]


def test_trial_log_non_finite_lines_of_older_versions_are_skipped(tmp_path):
    """Four trials, one of which told NaN after its first epoch, as JSON of Python's."""
    for i in range(5):
        run = tmp_path / str(i)
        run.mkdir()
        score = "NaN" if i == 4 else 0.1 * i
        (run / "told.jsonl").write_text(f'{{"age": 1, "judged": true, "score": {score}}}\n')
    (found,) = early.agreements(tmp_path, {str(i): 0.1 * i for i in range(5)}, "score", 1, 3.0)
    assert found.trials == 4 and found.rho == pytest.approx(1.0)


def test_search_folder_without_newer_setting_goes_on(tmp_path):
    base = RECIPES["scenes_xvnli"]()
    question = {"search": {"trials": 3}, "recipe": json.loads(dump_config(base))}
    before = json.loads(json.dumps(question))
    del before["recipe"]["fit"]["max_skipped"]
    (tmp_path / "search.json").write_text(json.dumps(before))
    _compare(tmp_path, question, type(base))
    before["recipe"]["fit"]["seed"] = 7
    (tmp_path / "search.json").write_text(json.dumps(before))
    with pytest.raises(UserError, match=r"other settings \(recipe.fit\)"):
        _compare(tmp_path, question, type(base))

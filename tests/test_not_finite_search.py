"""A search compares finite scores alone."""

import json
import math

import pytest
from optuna.trial import TrialState

from finetune.recipes import RECIPES
from raylib.config import dump_config
from raylib.errors import NotFinite, UserError
from raylib.renames import RENAMED
from raylib.search.config import SearchConfig, check_fingerprint
from raylib.search.generator import GeneratorOptions, build_generator
from raylib.search.optuna import trial_state
from raylib.search.schedulers import Population, build_population, build_scheduler, rank_agreements
from raylib.search.space import Float, SettingKey, Space
from raylib.search.trial import append_report, read_reports
from raylib.search.trial_log import TrialLog

NAN = math.nan


@pytest.mark.parametrize("value", [NAN, math.inf])
def test_trial_with_non_finite_score_is_failed(value, tmp_path):
    finished = {"finished": True, "english_dev": 0.5, "target_dev": value}
    assert trial_state(finished, False, ("english_dev",)) == TrialState.COMPLETE
    assert trial_state(finished, False, ("english_dev", "target_dev")) == TrialState.FAIL
    log = TrialLog(tmp_path)
    log.begin("t", {})
    log.end("t", "failed")
    (tmp_path / "trials" / "t").mkdir(parents=True)
    report = json.dumps({"at": 1.0, **finished}) + "\n"  # with NaN, as earlier versions wrote it
    (tmp_path / "trials" / "t" / "told.jsonl").write_text(report)
    (row,) = log.results(("english_dev", "target_dev"))
    assert (row.state, row.scores, row.error) == ("failed", {"english_dev": 0.5}, "target_dev not finite")


def test_trial_with_non_finite_score_is_hidden_from_optuna(tmp_path):
    config = SearchConfig(recipe="", name="s", algorithm="random", metric="score")
    chosen = Space("", "", {"x": Float(0, 1)})
    options = GeneratorOptions(4, SettingKey(chosen.knobs, config))
    found = build_generator(config, chosen, TrialLog(tmp_path), options)
    for name, score in (("good", 0.25), ("bad", NAN)):
        found.suggest(name)
        found.on_trial_complete(name, {"finished": True, "score": score})
    states = {trial.state: trial.value for trial in found.study.trials}
    assert states == {TrialState.COMPLETE: 0.25, TrialState.FAIL: None}


@pytest.mark.parametrize("stop", ["asha", "median"])
def test_schedulers_ignore_non_finite_scores(tmp_path, stop):
    rule = build_scheduler(stop, ["score"], min_epochs=1, reduction_factor=2.0, max_epochs=9)
    assert [
        rule.is_comparable({"age": 1, "judged": True, "score": score}) for score in (0.5, NAN, math.inf)
    ] == [
        True,
        False,
        False,
    ]
    population = build_population({"optim.lr": Float(0, 1)}, "score", 1, 0, TrialLog(tmp_path))
    assert isinstance(population, Population)
    assert [population.is_comparable({"epoch": 1, "epochs": 2, "score": score}) for score in (0.5, NAN)] == [
        True,
        False,
    ]


def test_trial_log_refuses_non_finite_scores(tmp_path):
    append_report(tmp_path, {"epoch": 1.0, "score": 0.5})
    with pytest.raises(NotFinite, match=f"{tmp_path}: score not finite"):
        append_report(tmp_path, {"epoch": 2.0, "score": NAN})
    assert [line["score"] for line in read_reports(tmp_path)] == [0.5]


def test_trial_log_non_finite_lines_of_older_versions_are_skipped(tmp_path):
    """Four trials, one of which told NaN after its first epoch, as JSON of Python's."""
    for i in range(5):
        run = tmp_path / str(i)
        run.mkdir()
        score = "NaN" if i == 4 else 0.1 * i
        (run / "told.jsonl").write_text(f'{{"age": 1, "judged": true, "score": {score}}}\n')
    (found,) = rank_agreements(tmp_path, {str(i): 0.1 * i for i in range(5)}, "score", 1, 3.0)
    assert found.num_trials == 4 and found.rho == pytest.approx(1.0)


def test_search_folder_without_newer_setting_goes_on(tmp_path):
    base, config = RECIPES["scenes_xvnli"](), SearchConfig(recipe="scenes_xvnli", num_trials=3)
    fingerprint = {"search": json.loads(dump_config(config)), "recipe": json.loads(dump_config(base))}
    stored = json.loads(json.dumps(fingerprint))
    del stored["recipe"]["fit"]["max_skipped"]
    for old, new in RENAMED["search"].items():
        stored["search"][old] = stored["search"].pop(new)
    (tmp_path / "search.json").write_text(json.dumps(stored))
    check_fingerprint(tmp_path, fingerprint, type(base))
    stored["recipe"]["fit"]["seed"] = 7
    (tmp_path / "search.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"other settings \(recipe.fit.seed\)"):
        check_fingerprint(tmp_path, fingerprint, type(base))

"""Searches on a real cluster over a stage that computes its score: repeats, growth, warm start, records."""

import csv
import json
from pathlib import Path

import pytest

from raylib.config import override
from raylib.errors import UserError
from raylib.fileio import read_jsonl
from raylib.search.config import SearchConfig
from raylib.search.space import Choice, Float, Int, OneOf, Space
from tests.curve_search import CurveConfig, CurveJob
from tests.factories import search_cluster

pytestmark = pytest.mark.xdist_group("ray")


X = Space("", "", {"x": Float(0, 1)}, grid={"x": (0.2, 0.4, 0.2)})


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One cluster for all tests here."""
    with search_cluster(num_cpus=3):
        yield


@pytest.fixture
def search(tmp_path):
    """`search(space, *search settings, recipe=)` -> the folder of a finished search."""
    from raylib.search.search import run_search

    def run(space, *settings, recipe=()):
        first = SearchConfig(recipe="curve", name="search", runs=str(tmp_path), num_trials=3, final_seeds=0)
        config = override(first, ["early_stopping=none", *settings])
        return run_search(config, "x", space, CurveJob(), override(CurveConfig(), list(recipe)))

    return run


def trials(folder):
    with open(folder / "trials.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def trained(folder):
    return read_jsonl(folder / "trained.jsonl")


def study_of(folder, name="search"):
    import optuna

    from raylib.search.optuna import open_journal

    return optuna.load_study(study_name=name, storage=open_journal(folder))


@pytest.mark.parametrize("max_concurrent", [1, 3])
def test_search_takes_the_score_of_a_setting_that_is_proposed_again(search, max_concurrent):
    folder = search(X, "algorithm=grid", f"max_concurrent={max_concurrent}", recipe=["wait=0.3"])
    assert sorted(line["x"] for line in trained(folder)) == [0.2, 0.4]
    rows = trials(folder)
    (repeat,) = [row for row in rows if row["repeat_of"]]
    (first,) = [row for row in rows if row["trial"] == repeat["repeat_of"]]
    assert repeat["english_dev"] == first["english_dev"] and repeat["x"] == first["x"] == "0.2"
    assert [row["state"] for row in rows] == ["finished"] * 3 and float(repeat["seconds"]) == 0
    told = {trial.user_attrs["trial"]: trial for trial in study_of(folder).trials}
    assert told[repeat["trial"]].value == told[first["trial"]].value == float(first["english_dev"])
    assert told[repeat["trial"]].user_attrs["score of trial"] == first["trial"]
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert (
        "1 proposed a setting again and took its score, untrained" in report
        and "| trained | 2 | 6 |" in report
    )


@pytest.mark.slow
def test_search_replicates_are_trained_on_other_seeds_and_pooled(search):
    folder = search(
        X, "algorithm=grid", "repeats=replicate", "max_concurrent=1", "num_finalists=1", "final_seeds=2"
    )
    searched = [line for line in trained(folder) if not line["run"].startswith("setting")]
    assert [(line["x"], line["seed"]) for line in searched] == [(0.2, 0), (0.4, 0), (0.2, 1001)]
    assert [row["replicate"] for row in trials(folder)] == ["0", "0", "1"]
    report = (folder / "report.md").read_text(encoding="utf-8")
    scores = [float(row["english_dev"]) for row in trials(folder) if row["x"] == "0.2"]
    assert f" and 1 more | x 0.2 | {50 * sum(scores):.1f} ± " in report
    finals = {(line["x"], line["seed"]) for line in trained(folder) if line["run"].startswith("setting")}
    assert {seed for _, seed in finals} == {1, 2}  # which no replicate had


@pytest.mark.slow
def test_search_grows_on_the_same_command_and_keeps_what_was_run(search, capsys):
    settings = ["algorithm=random", "num_finalists=1"]
    folder = search(X, *settings, "num_trials=3", "final_seeds=1")
    first, before = trials(folder), trained(folder)
    more = [*settings, "num_trials=5", "final_seeds=2", "max_concurrent=2"]
    assert search(X, *more) == folder
    assert "goes on with num_trials=5 (3 before), final_seeds=2 (1 before)" in capsys.readouterr().out
    rows = trials(folder)
    assert len(rows) == 5 and rows[:3] == first and trained(folder)[: len(before)] == before
    assert len({row["x"] for row in rows}) == 5
    cells = [(line["run"], line["seed"]) for line in trained(folder) if line["run"].startswith("setting")]
    assert {seed for _, seed in cells} == {1, 2}
    assert len(study_of(folder).trials) == 5
    best = max(float(row["english_dev"]) for row in rows)
    finals = study_of(folder, "search_finals")
    assert finals.metric_names == ["english_dev"]
    winner = max(finals.trials, key=lambda trial: trial.value)
    assert winner.user_attrs["seeds"] == [1, 2] and winner.user_attrs["test targets"] == 0.25
    assert {row["x"] for row in rows if float(row["english_dev"]) == best} <= {
        str(t.params["x"]) for t in finals.trials if t.params
    }
    cells = len(finals.trials) * 2
    assert sum(len(list(tune.glob("*/result.json"))) for tune in (folder / "finals").glob("tune*")) == cells
    count = len(trained(folder))
    search(X, *more)
    assert "is complete" in capsys.readouterr().out and len(trained(folder)) == count
    with pytest.raises(UserError, match="num_trials=5, which can only grow: num_trials=4"):
        search(X, *settings, "num_trials=4", "final_seeds=2")
    with pytest.raises(UserError, match=r"other settings \(search.algorithm\)"):
        search(X, "algorithm=tpe", "num_finalists=1", "num_trials=5", "final_seeds=2")


@pytest.mark.slow
def test_search_trains_a_later_winner_again_to_test_it(search, tmp_path):
    """With more trials another setting wins, or with more seeds: the weights of losers are not kept."""
    folder = search(X, "algorithm=random", "num_trials=2", "num_finalists=2", "final_seeds=1")
    runs = {run.name: run for run in (folder / "finals").glob("setting*_seed*")}
    kept = [name for name, run in runs.items() if (run / "checkpoints").is_dir()]
    assert len(kept) == 1
    loser = next(run for name, run in runs.items() if name not in kept and not (run / "test.json").is_file())
    lines = (loser / "told.jsonl").read_text().splitlines()  # as if it had been the best
    last = {**json.loads(lines[-1]), "english_dev": 2.0}
    (loser / "told.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    (folder / "report.md").unlink()
    search(X, "algorithm=random", "num_trials=2", "num_finalists=2", "final_seeds=1")
    assert [line["run"] for line in trained(folder)].count(loser.name) == 2
    assert (loser / "test.json").is_file()


@pytest.mark.slow
def test_search_time_that_is_up_ends_it_and_more_goes_on(search):
    some = ["algorithm=random", "num_trials=6", "max_concurrent=1"]
    folder = search(X, *some, f"max_hours={2 / 3600}", recipe=["wait=0.3"])
    num_begun = len(trials(folder))
    assert 1 <= num_begun < 6 and {row["state"] for row in trials(folder)} == {"finished"}
    assert "were over before 6 trials had begun" in (folder / "report.md").read_text(encoding="utf-8")
    search(X, *some, "max_hours=1", recipe=["wait=0.3"])
    assert len(trials(folder)) == 6 == len(trained(folder))


@pytest.mark.slow
def test_search_learns_from_another_search(search, tmp_path, capsys):
    both = {"how": OneOf(a={}, b={"n": Int(1, 3)})}
    other = Space(
        "",
        "",
        {"x": Choice(0.25, 2.0), **both},
        published=({"x": 0.25, "how": "a"}, {"x": 2.0, "how": "b", "n": 2}),
    )
    search(other, "name=other", "num_trials=2", recipe=["epochs=2"])
    wide = Space("", "", {"x": Choice(0.25, 0.5, 0.75), **both})
    with pytest.raises(UserError, match="warm_start=nowhere: no search.json there"):
        search(wide, "warm_start=nowhere")
    with pytest.raises(UserError, match="searched for english_dev, this one for target_dev"):
        search(wide, "dev_sets=target_dev", f"warm_start={tmp_path / 'other'}")
    with pytest.raises(UserError, match="none of its 2 finished trials lies in this space"):
        search(X, f"warm_start={tmp_path / 'other'}")
    folder = search(wide, f"warm_start={tmp_path / 'other'}", "num_trials=2")
    said = f"warm start from 1 finished trials of {tmp_path / 'other'}; 1 lie outside of this space; "
    said += "other settings there: epochs"
    assert said in capsys.readouterr().out and f"It began with a {said}" in (folder / "report.md").read_text(
        encoding="utf-8"
    )
    evidence = [trial for trial in study_of(folder).trials if "warm_start" in trial.user_attrs]
    assert [trial.params for trial in evidence] == [{"x": 0.25, "how": "a"}] and len(
        study_of(folder).trials
    ) == 3
    assert len(trials(folder)) == 2
    search(wide, f"warm_start={tmp_path / 'other'}", "num_trials=3")  # which enters nothing twice
    assert len(study_of(folder).trials) == 4


def test_search_of_two_goals_stops_what_adds_no_hypervolume(search):
    grid = Space("", "", {"x": Float(0, 1)}, grid={"x": (0.5, 0.45, 0.55, 0.0, 1.0, 0.4)})
    two = ["dev_sets=both", "algorithm=grid", "early_stopping=asha", "reduction_factor=2", "max_concurrent=1"]
    folder = search(grid, *two)
    states = {float(row["x"]): row["state"] for row in trials(folder)}
    assert states[0.5] == "finished" and states[0.0] == states[1.0] == "stopped"
    told = {trial.params["x"]: trial.state.name for trial in study_of(folder).trials}
    assert told[0.0] == "PRUNED" and told[0.5] == "COMPLETE"
    assert study_of(folder).metric_names == ["english_dev", "target_dev"]


def plugin_data(events, name):
    return events.summary_metadata[f"_hparams_/{name}"].plugin_data.content


def test_search_records_for_optuna_and_tensorboard_are_by_name(search):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    knobs = {"x": Float(0, 1), "how": OneOf(a={}, b={"n": Int(1, 3)})}
    published = ({"x": 0.3, "how": "a"}, {"x": 0.2, "how": "b", "n": 2})
    folder = search(Space("", "", knobs, published), "num_trials=2", "early_stopping=asha")
    for trial in study_of(folder).trials:
        name = trial.user_attrs["trial"]
        assert Path(trial.user_attrs["folder"]) == folder / "trials" / name and trial.user_attrs[
            "epochs"
        ] in (1, 3)
        (file,) = (folder / "tune" / name).glob("events*")
        events = EventAccumulator(str(file)).Reload()
        assert set(events.Tags()["scalars"]) == {"english_dev", "final/english_dev"}
        columns = HParamsPluginData.FromString(plugin_data(events, "experiment")).experiment
        assert [column.name for column in columns.hparam_infos] == ["x", "how", "n"]
        assert [column.name.tag for column in columns.metric_infos] == ["final/english_dev"]
        own = HParamsPluginData.FromString(plugin_data(events, "session_start_info")).session_start_info
        assert set(own.hparams) == set(trial.params) and own.hparams["x"].number_value == trial.params["x"]
    assert study_of(folder).metric_names == ["english_dev"]

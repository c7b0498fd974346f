"""Searches on a real local cluster: trials, early stopping, crashes, the last stage, the report."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.__main__ import main as finetune_main
from finetune.recipes import RECIPES
from raylib.checkpoint import find_newest
from raylib.config import load_config, override
from raylib.errors import UserError
from raylib.monitoring import read_metrics
from raylib.search.config import SearchConfig
from raylib.search.space import Choice, Float, OneOf, Space
from raylib.search.trial import read_reports
from tests.conftest import QUICK
from tests.factories import search_cluster
from tune_spaces.jobs import FinetuneSearchJob

pytestmark = pytest.mark.xdist_group("ray")
ROOT = Path(__file__).resolve().parent.parent
LR = Space(
    "learning rate",
    "scenes_xvnli",
    {"optim.lr": Float(1e-5, 1e-2, log=True)},
    published=({"optim.lr": 5e-4},),
)
# so few steps teach entailment nothing: all trials would have the score of one answer
RETRIEVAL = LR._replace(recipe="scenes_xflickrco")
SMALL = (*QUICK, "epochs=3", 'languages=["en","ru"]', "test_limit=12", "train_limit=60", "batch=30")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One cluster for all tests here."""
    with search_cluster(num_cpus=2):
        yield


@pytest.fixture
def search(tmp_path, model, scenes):
    """`search(space, *search settings, job=, recipe=)` -> the folder of a finished search."""
    from raylib.search.search import run_search

    def run(space, *settings, job=None, recipe=(), task="scenes_xvnli"):
        config = override(
            SearchConfig(
                recipe=task, name="search", runs=str(tmp_path), num_trials=3, final_seeds=0, num_finalists=2
            ),
            list(settings),
        )
        base = override(RECIPES[task](), [f"model={model}", f"data={scenes}", *SMALL, *recipe])
        return run_search(config, "lr", space, job or FinetuneSearchJob(), base)

    return run


def trials(folder: Path) -> list[dict[str, str]]:
    """trials.csv."""
    with open(folder / "trials.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


CALLBACKS = """
from pathlib import Path
from ray import tune

class Names(tune.Callback):
    def on_trial_complete(self, iteration, trials, trial, **info):
        with open(Path(__file__).with_name("names.txt"), "a") as file:
            print(trial.trial_id, file=file)

def callbacks():
    return [Names()]
"""


def test_search_ends_with_runnable_config_and_report(search, tmp_path, capsys):
    own = tmp_path / "my_callbacks.py"
    own.write_text(CALLBACKS)
    given = (RETRIEVAL, "num_trials=4", "final_seeds=2", "early_stopping=asha", "reduction_factor=2")
    folder = search(*given, f"callbacks={own}", task=RETRIEVAL.recipe)
    ended = (tmp_path / "names.txt").read_text().split()
    assert {run.name for run in (folder / "trials").iterdir()} < set(ended)  # and those of the final runs
    rows = trials(folder)
    assert len(rows) == 4 and rows[0]["optim.lr"] == "0.0005"  # the published setting comes first
    assert {row["state"] for row in rows} <= {"finished", "stopped"}
    for row in rows:
        assert (row["state"] == "finished") == (float(row["epoch"]) == 3.0)
    report = (folder / "report.md").read_text(encoding="utf-8")
    for words in (
        "# Search of `lr` over",
        "English development set alone",
        "published",
        "Stopping saved",
        "test, targets",
    ):
        assert words in report, words
    for figure in ("history.png", "curves.png", "slices.png"):
        assert figure in report and (folder / figure).stat().st_size > 5000
    assert not list((folder / "trials").glob("*/checkpoints"))  # most of its bytes
    for run in (folder / "trials").iterdir():  # no test set was looked at in the search
        assert not (run / "predictions").exists()
    tested = sorted(path.parent.name for path in (folder / "finals").glob("*/test.json"))
    names, settings = json.loads((folder / "finals" / "settings.json").read_text())
    assert "published" in names and len(tested) in (
        2,
        4,
    )  # the winner and the published setting, two seeds each
    best = load_config(type(RECIPES["scenes_xvnli"]()), folder / "best.yaml")
    assert best.run_test and best.optim.lr in [setting["optim.lr"] for setting in settings]
    assert finetune_main(["--config", str(folder / "best.yaml")]) == 0
    assert "mean of the targets" in capsys.readouterr().out
    search(*given, task=RETRIEVAL.recipe)
    assert "is complete" in capsys.readouterr().out
    (folder / "report.md").unlink()  # as if it had been killed before it was written
    search(*given, task=RETRIEVAL.recipe)
    assert (folder / "report.md").read_text(encoding="utf-8") == report
    with pytest.raises(
        UserError, match=r"other settings \(search.reduction_factor\); give this one another name"
    ):
        search(*given[:-1], "reduction_factor=3", task=RETRIEVAL.recipe)


LOGGERS = """
from pathlib import Path
from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.air.integrations.wandb import WandbLoggerCallback

here = Path(__file__).parent

def callbacks():
    mlflow = MLflowLoggerCallback(tracking_uri=f"sqlite:///{here}/tune.db", experiment_name="lr")
    return [mlflow, WandbLoggerCallback(project="lr", mode="offline", dir=str(here))]
"""


@pytest.mark.heavy
def test_search_takes_rays_loggers_of_wandb_and_mlflow(search, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "loggers.py").write_text(LOGGERS)
    folder = search(LR, "num_trials=2", "early_stopping=none", f"callbacks={tmp_path}/loggers.py")
    client = MlflowClient(f"sqlite:///{tmp_path}/tune.db")
    runs = client.search_runs([client.get_experiment_by_name("lr").experiment_id])
    lrs = {row["optim.lr"] for row in trials(folder)}
    assert {run.data.params["optim.lr"] for run in runs} == lrs and len(runs) == 2
    assert all(run.data.metrics["english_dev"] > 0 for run in runs)
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 2


def test_search_refuses_to_resume_with_other_data(search, scenes, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    first = {"recipe": (f"data={data}", "epochs=1")}
    folder = search(LR, "num_trials=1", "early_stopping=none", **first)
    (folder / "report.md").unlink()  # as if it had been killed before it was written
    with open(data / "XVNLI/annotations/en/dev.jsonl", "a", encoding="utf-8") as file:
        file.write("\n")
    with pytest.raises(
        UserError, match="data changed since this run began: .*XVNLI/annotations/en/dev.jsonl .other content"
    ):
        search(LR, "num_trials=1", "early_stopping=none", **first)


def test_search_with_verify_compares_data_content(search, scenes, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    first = {"recipe": (f"data={data}", "epochs=1")}
    folder = search(LR, "num_trials=1", "early_stopping=none", **first)
    (folder / "report.md").unlink()
    dev = data / "XVNLI/annotations/en/dev.jsonl"
    time, content = dev.stat().st_mtime_ns, dev.read_text(encoding="utf-8")
    dev.write_text(content.replace("A picture", "a picture", 1), encoding="utf-8")
    assert len(dev.read_bytes()) == len(content.encode()) and dev.read_text(encoding="utf-8") != content
    os.utime(dev, ns=(time, time))  # as a copy with kept times
    with pytest.raises(UserError, match="XVNLI/annotations/en/dev.jsonl .other content"):
        search(LR, "num_trials=1", "early_stopping=none", recipe=(*first["recipe"], "verify=true"))


class Deadly(FinetuneSearchJob):
    """At one learning rate the process dies: always, or the first time."""

    def run(self, config, reporter):
        mark = Path(config.runs).parent / "died"
        if config.optim.lr == 0.25 or (config.optim.lr == 0.5 and not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if config.optim.lr == 0.125:
            raise RuntimeError("as a bug would")
        return super().run(config, reporter)


@pytest.mark.slow
def test_search_crashed_trials_are_retried_then_failed(search):
    choices = Space(
        "",
        "",
        {"optim.lr": Choice(0.25, 0.125, 1e-3, 0.5, 1e30)},
        grid={"optim.lr": (0.25, 0.125, 0.5, 1e-3, 1e30)},
    )
    folder = search(choices, "algorithm=grid", "max_failures=1", "early_stopping=none", job=Deadly())
    rows = {float(row["optim.lr"]): row for row in trials(folder)}
    assert {lr: row["state"] for lr, row in rows.items()} == {
        0.25: "failed",
        0.125: "failed",
        0.5: "finished",
        1e-3: "finished",
        1e30: "failed",
    }
    assert (
        "as a bug would" in rows[0.125]["error"] and "test_search.py" in rows[0.125]["error"]
    )  # the traceback
    assert "not finite" in rows[1e30]["error"]  # a NaN ends its trial
    assert "## Failed" in (folder / "report.md").read_text(encoding="utf-8")
    for study in _studies(folder):
        assert sorted(trial.state.name for trial in study.trials) == ["COMPLETE"] * 2 + ["FAIL"] * 3


def _studies(folder):
    import optuna
    from optuna.storages.journal import JournalFileBackend

    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "optuna.journal")))
    return [
        optuna.load_study(study_name=s.study_name, storage=storage)
        for s in optuna.get_all_study_summaries(storage)
    ]


@pytest.mark.slow
def test_search_trials_share_cached_objects(tmp_path):
    import ray

    from raylib.search.trial import RayObjectCache

    cache = RayObjectCache(tmp_path)

    @ray.remote(num_cpus=0)
    def trial(cache):
        made = []
        value = cache.get_or_create("what", lambda: made.append(1) or list(range(5)))
        return made, value, cache.get_or_create("what", lambda: made.append(1)) is value

    first, second = ray.get(trial.remote(cache)), ray.get(trial.remote(cache))
    assert sorted([first, second]) == [([], [0, 1, 2, 3, 4], True), ([1], [0, 1, 2, 3, 4], True)]
    ray.kill(cache.actor)  # as with its node
    assert ray.get(trial.remote(cache))[1:] == ([0, 1, 2, 3, 4], True)


def test_search_stopped_trials_are_pruned_in_optuna(search):
    folder = search(
        RETRIEVAL, "num_trials=6", "reduction_factor=2", "max_concurrent=1", task=RETRIEVAL.recipe
    )
    states = {row["state"] for row in trials(folder)}
    (study,) = _studies(folder)
    optuna_states = {"finished": "COMPLETE", "stopped": "PRUNED", "failed": "FAIL"}
    assert {optuna_states[state] for state in states} == {trial.state.name for trial in study.trials}
    assert "stopped" in states
    for trial in study.trials:
        assert set(trial.intermediate_values) <= {1, 2, 3}


@pytest.mark.parametrize(
    ("settings", "recipe", "words"),
    [
        (
            ("metric=dev/ru",),
            (),
            "metric=dev/ru: no run reports that; with dev_sets=english_dev there are english_dev",
        ),
        (("algorithm=grid",), (), "space 'lr' has no grid"),
        (("cpus_per_trial=5",), (), "cpus_per_trial=5, but no node of the cluster has more than 2 CPUs"),
        (
            ("min_epochs=3",),
            (),
            "compared after min_epochs=3 epochs, and have 3; set early_stopping=none, or more epochs=",
        ),
        (("algorithm=pbt",), ("strategies.sparse.rounds=2",), "algorithm=pbt: a trial must be one training"),
        (
            ("algorithm=pbt", "dev_sets=target_dev"),
            ("setting=few_shot", 'languages=["ru","de"]'),
            "must be one training",
        ),
        (("workers_per_trial=4",), (), "workers_per_trial=4, but the cluster has 2 CPUs"),
        ((), ("setting=untrained",), "does not train: there is nothing to search"),
        ((), ("setting=single_language",), "set dev_sets=target_dev"),
        (
            (),
            ("strategies.unfreezing.layers=9",),
            "strategies.unfreezing.layers=9, but the model has 4 layers",
        ),
        (("metric=english_dev", "dev_sets=target_dev"), (), "metric=english_dev: no run reports that"),
    ],
)
def test_search_wrong_settings_are_one_line_errors_before_any_trial(
    search, tmp_path, settings, recipe, words
):
    with pytest.raises(UserError) as refused:
        search(LR, *settings, recipe=recipe)
    assert words in str(refused.value)
    assert not (tmp_path / "search" / "tune").exists()


@pytest.mark.slow
def test_search_with_two_goals_has_a_front(search):
    two = ("algorithm=nsga2", "dev_sets=both", "early_stopping=none")
    folder = search(LR, "num_trials=6", *two, "final_seeds=1")
    rows = trials(folder)
    assert {row["state"] for row in rows} == {"finished"} and all(row["target_dev"] for row in rows)
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert "front.png" in report and "target languages'** development sets, as two goals" in report


@pytest.mark.slow
def test_search_population_changes_settings_during_a_run(search):
    folder = search(LR, "num_trials=4", "algorithm=pbt", "final_seeds=0", recipe=("epochs=6",))
    assert {row["state"] for row in trials(folder)} == {"finished"}
    moved = [path for path in (folder / "tune").glob("pbt_policy_*.txt") if path.read_text()]
    assert moved  # some member went on from another's checkpoint
    assert not list((folder / "tune").glob("*/checkpoint_*")) and not list(
        (folder / "trials").glob("*/checkpoints")
    )


@pytest.mark.slow
def test_search_trial_trains_on_own_workers_under_zero(search):
    rates = (1e-2, 1e-7, 1e-3)
    fast = Space("", "", {"optim.lr": Choice(*rates)}, grid={"optim.lr": rates})
    folder = search(fast, "algorithm=grid", "workers_per_trial=1", "reduction_factor=2", "max_concurrent=1")
    rows = trials(folder)
    assert len(rows) == 3 and {row["state"] for row in rows} <= {"finished", "stopped"}
    assert all(row["start_seconds"] for row in rows)


@pytest.mark.slow
def test_search_over_pretraining(mini, tmp_path, capsys):
    from raylib.search.search import run_search
    from tune_spaces.jobs import PretrainSearchJob

    mix = Space(
        "",
        "",
        {"data.text.alpha": Float(0, 1), "objective": OneOf(both={}, plain={"objective.weights.itm": 0.0})},
    )
    base = mini("fit.steps=4", "fit.eval_every=2")
    config = SearchConfig(
        recipe="tiny", name="mix", runs=str(tmp_path), num_trials=2, final_seeds=1, num_finalists=1
    )
    folder = run_search(config, "mix", mix, PretrainSearchJob(), base)
    assert {row["state"] for row in trials(folder)} <= {"finished", "stopped"}
    assert "best.yaml" in capsys.readouterr().out


@pytest.mark.drill
def test_search_killed_driver_resumes_without_loss(tmp_path, model, scenes):
    """SIGKILL in mid-search, then the same command: finished trials stay as they were, the one under way goes
    on from its checkpoint, the searcher knows what it knew, and the number of trials is what was asked
    for."""
    command = [
        sys.executable,
        "-m",
        "tune_spaces",
        "layer_decay",
        "recipe=scenes_xvnli",
        "name=killed",
        f"runs={tmp_path}",
        f"model={model}",
        f"data={scenes}",
        "num_trials=5",
        "max_concurrent=1",
        "final_seeds=0",
        "early_stopping=none",
        *SMALL,
        "epochs=8",
    ]
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    folder = tmp_path / "killed"
    first = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    deadline = time.time() + 240
    while time.time() < deadline:  # until one is finished and a second has a checkpoint
        completed = [path.parent for path in folder.glob("trials/*/result.json")]
        going = [
            run
            for run in folder.glob("trials/*")
            if run not in completed and (newest := find_newest(run)) and newest.name >= "step_000006"
        ]
        if completed and going:
            break
        time.sleep(0.1)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert completed and going
    before = {path.name: (path / "result.json").read_bytes() for path in completed}
    steps = max(r["step"] for r in read_metrics(going[0]) if "lr" in r)
    again = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert again.returncode == 0, again.stdout + again.stderr
    for noise in ("pid=", " INFO ", "View detailed results", "Token authentication is enabled"):
        assert noise not in again.stdout + again.stderr, again.stdout + again.stderr
    assert f"{folder}: taken over from process {first.pid} on " in again.stdout
    assert "5 of 5 trials: 5 finished" in again.stdout and "best so far: english_dev" in again.stdout
    rows = trials(folder)
    assert len(rows) == 5 and {row["state"] for row in rows} == {"finished"}
    assert {name: (folder / "trials" / name / "result.json").read_bytes() for name in before} == before
    went_on = [r["step"] for r in read_metrics(going[0]) if "lr" in r]
    assert went_on == sorted(set(went_on)) and steps in went_on
    epochs = [line["epoch"] for line in read_reports(going[0]) if not line["finished"]]
    assert (
        epochs == sorted(set(epochs)) == list(range(1, 9))
    )  # none was trained twice, which one that starts anew would
    assert len({row["strategies.layer_decay.factor"] for row in rows}) == 5  # none was proposed twice
    (study,) = _studies(folder)
    assert len(study.trials) == 5 and {trial.state.name for trial in study.trials} == {"COMPLETE"}
    assert {trial.params["strategies.layer_decay.factor"] for trial in study.trials} == {
        float(row["strategies.layer_decay.factor"]) for row in rows
    }

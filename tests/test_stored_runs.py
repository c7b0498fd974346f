"""Runs, exports and searches stored by an earlier version still load: evaluated, resumed, exported, compared.

`data/runs_2026_11.tar.xz` was written by commit f467c9f, before settings were renamed and files moved: a
pretraining run stopped at step 2 of 4 and its export, fine-tuning runs (classification, retrieval, few-shot
from the first, one stopped at step 2) and what a search chose; models of width 4, optimizer states of
finished runs left out. `data/scenes_2026_11.tar.xz` has what they read of the emoji scenes of their time.
"""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from finetune.__main__ import main as finetune
from pretrain.__main__ import main as pretrain
from tests.factories import extract_stored_runs


@pytest.fixture
def folder(tmp_path, monkeypatch, corpus):
    """The current folder, with the stored runs and the data that they were made from; for the pretraining
    run today's sample corpus, and no record of what it began with, like runs of still earlier versions."""
    extract_stored_runs(tmp_path)
    run = tmp_path / "runs" / "pretrained"
    stored = tmp_path / read_json(run / "config.json")["corpus"]
    stored.parent.mkdir()
    stored.symlink_to(corpus)
    (run / "identity.json").write_text(json.dumps(read_json(run / "identity.json") | {"data": {}}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["classified", "retrieved", "few_shot"])
def test_stored_finetuning_run_is_evaluated_to_the_same_scores(folder, name):
    before = read_json(f"runs/{name}/result.json")
    assert finetune(["evaluate", f"runs/{name}"]) == 0
    after = read_json(f"runs/{name}/result.json")
    for key in ("accuracy", "retrieval", "mean_targets", "gap"):
        assert before.get(key) == after.get(key), key


def assert_refused_until_converted(start, name, capsys):
    """A run whose optimizer state is a pickle is not trained on before it is converted."""
    assert start() == 2
    assert capsys.readouterr().err.count(f"python -m pretrain convert {Path('runs', name).absolute()} ") == 1
    assert pretrain(["convert", f"runs/{name}"]) == 0
    assert "pickles" in capsys.readouterr().out and not list(Path("runs", name).rglob("optimizer.pt"))
    assert start() == 0


def test_stored_finetuning_run_is_converted_and_resumed(folder, capsys):
    def start():
        return finetune(["--config", "runs/stopped/config.json", "fit.stop_after=null"])

    assert_refused_until_converted(start, "stopped", capsys)
    assert read_json("runs/stopped/result.json")["accuracy"]


def test_stored_pretraining_run_is_converted_and_resumed(folder, capsys):
    def start():
        return pretrain(["--config", "runs/pretrained/config.json", "fit.stop_after=null"])

    assert_refused_until_converted(start, "pretrained", capsys)
    lines = [json.loads(line) for line in Path("runs/pretrained/metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == 4


def test_stored_pretraining_run_is_exported_to_the_same_weights(folder):
    assert pretrain(["export", "runs/pretrained", "again"]) == 0
    before, after = load_file("model/model.safetensors"), load_file("again/model.safetensors")
    assert before.keys() == after.keys() and all(value.equal(after[name]) for name, value in before.items())


def test_stored_search_choice_is_run(folder):
    shutil.rmtree("runs/stopped")
    assert finetune(["--config", "runs/searched/best.yaml", "epochs=1", "name=stopped"]) == 0


def test_stored_runs_are_compared(folder, capsys):
    assert finetune(["compare", "runs/classified", "runs/few_shot"]) == 0
    assert "layer decay (factor 0.9)" in capsys.readouterr().out

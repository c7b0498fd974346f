"""Fine-tuning runs from the command line, on the miniature IGLUE: what they leave, resume, settings,
mistakes."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from finetune import report
from finetune.__main__ import main
from finetune.build import build_model, find_task, read_split
from finetune.recipes import RECIPES
from finetune.stores import images
from finetune.strategies.prior import LinguisticPriorConfig
from finetune.tasks.datasets import TASKS
from raylib.checkpoint import find_best
from raylib.config import override
from raylib.models.finetuned import find_evaluated
from raylib.monitoring import read_metrics
from raylib.sample import DATA
from raylib.sample.scenes import read_labels
from tests.conftest import QUICK
from tests.factories import make_model

FIELDS = {
    "run",
    "task",
    "method",
    "seed",
    "model",
    "params",
    "trainable",
    "sparsity",
    "mean_targets",
    "gap",
    "by_type",
}


def result(tmp_path, name):
    return json.loads((tmp_path / name / "result.json").read_text())


@pytest.mark.parametrize("task", ["xgqa", "xvnli", "marvl", "xflickrco"])
def test_finetune_run_writes_documented_files(finetune, tmp_path, task):
    code, printed = finetune(f"scenes_{task}", "name=first")
    assert code == 0 and "| en |" in printed and "mean of the targets" in printed
    found = result(tmp_path, "first")
    assert set(found) >= FIELDS
    scores = found.get("accuracy") or {c: f["mean_recall"] for c, f in found["retrieval"].items()}
    assert set(scores) == {"en", "ru"} and found["gap"] == pytest.approx(scores["en"] - scores["ru"])
    assert 0 < found["trainable"] <= found["params"] and found["sparsity"] == 0
    if task == "xgqa":
        assert set(found["by_type"]["ru"]) == {"verify", "query", "choose", "logical", "compare", "count"}
    assert all((tmp_path / "first" / name).stat().st_size > 5000 for name in ("result.png", "curve.png"))
    recorded = {key for line in read_metrics(tmp_path / "first") for key in line}
    assert {
        "loss/itm" if task == "xflickrco" else "loss/task",
        "eval/score",
    } <= recorded  # what the curve shows
    assert "is complete" in finetune(f"scenes_{task}", "name=first")[1]
    before = scores
    assert main(["evaluate", str(tmp_path / "first")]) == 0
    again = result(tmp_path, "first")
    assert (again.get("accuracy") or {c: f["mean_recall"] for c, f in again["retrieval"].items()}) == before


def test_finetune_run_without_its_curve_is_not_complete(finetune, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(report, "save_figure", fail_at_curve)
        assert finetune("scenes_xvnli", "name=killed")[0] == 1
    assert not (tmp_path / "killed" / "result.json").exists()
    assert finetune("scenes_xvnli", "name=killed")[0] == 0
    assert {"result.json", "curve.png"} <= {path.name for path in (tmp_path / "killed").iterdir()}


def fail_at_curve(figure, path):
    if path.name == "curve.png":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_finetune_average_is_mean_of_epochs_and_start_of_other_runs(finetune, tmp_path):
    settings = ("select=average", "epochs=3", "fit.keep=2")
    finetune("scenes_xvnli", "name=whole", *settings, "fit.stop_after=7")
    assert not (tmp_path / "whole" / "average").exists(), "it goes on after an interruption"
    assert finetune("scenes_xvnli", "name=whole", *settings)[0] == 0
    kept = sorted((tmp_path / "whole" / "checkpoints").glob("step_*"))
    assert [folder.name for folder in kept] == ["step_000006", "step_000009"]
    first, last, mean = (
        load_file(folder / "model.safetensors") for folder in (*kept, tmp_path / "whole" / "average")
    )
    assert any(not first[name].equal(last[name]) for name in mean)
    for name, value in mean.items():
        expected = (first[name].double() + last[name].double()) / 2
        assert value.equal(expected.to(value.dtype)), name
    before = result(tmp_path, "whole")
    assert main(["evaluate", str(tmp_path / "whole")]) == 0
    assert result(tmp_path, "whole")["accuracy"] == before["accuracy"]
    assert find_evaluated(tmp_path / "whole") == tmp_path / "whole" / "average"
    translations = ("setting=translate_test", f"model={tmp_path / 'whole'}")
    assert finetune("scenes_xvnli", "name=translated", *translations)[0] == 0
    assert result(tmp_path, "translated")["accuracy"]["en"] == before["accuracy"]["en"]


def test_finetune_average_is_what_a_stage_leaves_that_selects(finetune, tmp_path):
    first = ("strategies.head_first.epochs=2", "strategies.head_first.lr=1e-2", "select=average")
    assert finetune("scenes_xvnli", "name=run", *first, "epochs=1")[0] == 0
    stage = tmp_path / "run/classifier"
    kept = [load_file(path) for path in sorted(stage.glob("checkpoints/step_*/model.safetensors"))]
    mean = load_file(stage / "average/model.safetensors")
    changed = [name for name in mean if not kept[0][name].equal(kept[1][name])]
    assert len(kept) == 2 and changed
    for name in changed:
        torch.testing.assert_close(mean[name], (kept[0][name] + kept[1][name]) / 2)


def test_finetune_average_is_scored_on_dev_sets_itself(finetune, tmp_path):
    """Of one epoch it is that epoch's score; of two it is not what the newest was judged by."""
    settings = ("run_test=false", "optim.lr=1e-2", "test_limit=40")
    for name, select in (("one", "average"), ("last", "last"), ("two", "average")):
        keep = f"fit.keep={1 + (name == 'two')}"
        finetune("scenes_xflickrco", f"name={name}", f"select={select}", keep, *settings)
    one, last, two = (result(tmp_path, name)["dev"]["en"] for name in ("one", "last", "two"))
    epochs = [line["eval/dev/en"] for line in read_metrics(tmp_path / "two") if "eval/dev/en" in line]
    assert one == last == epochs[-1] != two


def test_finetune_interrupted_run_equals_uninterrupted(finetune, tmp_path):
    finetune("scenes_xvnli", "name=whole", "select=last")
    code, printed = finetune("scenes_xvnli", "name=parts", "select=last", "fit.stop_after=4")
    assert (
        code == 0
        and "stopped before the end" in printed
        and not (tmp_path / "parts" / "result.json").exists()
    )
    finetune("scenes_xvnli", "name=parts", "select=last")
    weights = [
        load_file(tmp_path / name / "checkpoints" / "step_000006" / "model.safetensors")
        for name in ("whole", "parts")
    ]
    assert all(value.equal(weights[1][key]) for key, value in weights[0].items())
    records = [read_metrics(tmp_path / name) for name in ("whole", "parts")]
    losses = [[(r["step"], r["loss/task"]) for r in lines if "loss/task" in r] for lines in records]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert result(tmp_path, "whole")["accuracy"] == result(tmp_path, "parts")["accuracy"]


def test_finetune_few_shot_and_translate_test_go_on_from_english(finetune, tmp_path):
    finetune("scenes_xvnli", "name=english")
    code, printed = finetune(
        "scenes_xvnli",
        "name=few",
        "setting=few_shot",
        "shots=5",
        f"model={tmp_path / 'english'}",
        'languages=["ar","ru"]',
        "batch=4",
    )
    assert code == 0, printed
    assert (
        set(result(tmp_path, "few")["accuracy"]) == {"ar", "ru"}
        and (tmp_path / "few" / "ar" / "part.json").is_file()
    )
    code, printed = finetune(
        "scenes_xvnli", "name=translated", "setting=translate_test", f"model={tmp_path / 'english'}"
    )
    found = result(tmp_path, "translated")
    assert (
        code == 0
        and found["steps"] == 0
        and found["accuracy"]["en"] == result(tmp_path, "english")["accuracy"]["en"]
    )


def test_finetune_frozen_encoder_is_unchanged_and_encodes_once(finetune, tmp_path, model):
    code, printed = finetune("scenes_xgqa", "name=frozen", 'freeze=["embeddings","text","vision"]')
    assert code == 0, printed
    before = load_file(model / "model.safetensors")
    after = load_file(find_best(tmp_path / "frozen") / "model.safetensors")
    for name, value in before.items():
        if name.startswith(("embedding.", "text.", "vision.")):
            assert value.equal(after[f"backbone.{name}"])
    assert any(
        not value.equal(after[f"backbone.{name}"])
        for name, value in before.items()
        if name.startswith("fusion.")
    )
    states = {path: path.stat().st_mtime_ns for path in (tmp_path / "encoded").iterdir()}
    assert len(states) == 2 and not (tmp_path / "frozen" / "encoded").exists()  # of training, and of the test
    code, printed = finetune("scenes_xgqa", "name=other", 'freeze=["vision"]', "fit.seed=1")
    assert code == 0, printed
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "encoded").iterdir()} == states


def test_finetune_compare_groups_seeds(finetune, tmp_path, capsys):
    for seed in (0, 1):
        finetune("scenes_xvnli", f"name=seed{seed}", f"fit.seed={seed}", "epochs=1")
    assert main(["compare", str(tmp_path / "seed0"), str(tmp_path / "seed1")]) == 0
    table = capsys.readouterr().out
    values = [result(tmp_path, f"seed{seed}")["accuracy"]["en"] for seed in (0, 1)]
    half = (
        12.7062 * abs(values[0] - values[1]) / 2
    )  # t of one degree of freedom; the deviation of two is |a - b| / sqrt 2
    assert f"| 2 | {50 * sum(values):.1f} ± {100 * half:.1f} |" in table


def test_finetune_stopped_run_is_evaluated_then_resumed(finetune, tmp_path, capsys):
    finetune("scenes_xvnli", "name=run", "select=last", "fit.stop_after=4")
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert "full fine-tuning (stopped at step 4)" in capsys.readouterr().out
    stopped = result(tmp_path, "run")
    assert (stopped["finished"], stopped["steps"]) == (False, 4) and 0 < stopped["trainable"] <= stopped[
        "params"
    ]
    assert main(["compare", str(tmp_path / "run")]) == 0
    assert "| full fine-tuning (stopped at step 4) |" in capsys.readouterr().out
    code, printed = finetune("scenes_xvnli", "name=run", "select=last")
    assert code == 0 and "is complete" not in printed
    assert result(tmp_path, "run")["finished"] and result(tmp_path, "run")["method"] == "full fine-tuning"
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert result(tmp_path, "run")["finished"] and result(tmp_path, "run")["steps"] == 6


@pytest.mark.parametrize("task", ["xvnli", "xflickrco"])
def test_finetune_every_language_has_an_interval(finetune, tmp_path, task):
    code, printed = finetune(f"scenes_{task}", "name=run", "epochs=2")
    found = result(tmp_path, "run")
    scores = found.get("accuracy") or {c: f["mean_recall"] for c, f in found["retrieval"].items()}
    assert code == 0 and set(found["interval"]) == {"en", "ru"}
    for language, (low, high) in found["interval"].items():
        assert 0 <= low <= scores[language] <= high <= 1 and low < high
        assert (
            f"| {language} | {100 * scores[language]:.1f} | [{100 * low:.1f}, {100 * high:.1f}] |" in printed
        )
    assert (
        main(["evaluate", str(tmp_path / "run")]) == 0
        and result(tmp_path, "run")["interval"] == found["interval"]
    )
    finetune(f"scenes_{task}", "name=untested", "epochs=1", "run_test=false")
    ((language, (low, high)),) = result(tmp_path, "untested")["interval"].items()
    assert language == "en" and low <= result(tmp_path, "untested")["dev"]["en"] <= high


def test_finetune_torchrun_equals_one_process(tmp_path, scenes):
    make_model(vocabulary=12000, positions=64).float().save(
        tmp_path / "model"
    )  # no dropout: it differs between workers
    shutil.copy2(DATA / "tokenizer.model", tmp_path / "model")
    settings = [
        "scenes_marvl",
        f"model={tmp_path / 'model'}",
        f"data={scenes}",
        f"runs={tmp_path}",
        "epochs=1",
        *QUICK,
        "head_dropout=0",
        "select=last",
        'languages=["en"]',
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "3",  # which do not divide a batch of 16
        "-m",
        "finetune",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    completed = subprocess.run(
        [*command, *settings, "name=three"], capture_output=True, text=True, env=environment
    )
    assert completed.returncode == 0, completed.stderr[-2000:]
    assert completed.stdout.count("| en |") == 1  # one process speaks
    assert main([*settings, "name=one"]) == 0
    losses = [
        [line["loss/task"] for line in read_metrics(tmp_path / name) if "loss/task" in line]
        for name in ("one", "three")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 3


@pytest.mark.xdist_group("ray")
def test_finetune_on_ray_with_zero(finetune, tmp_path):
    code, printed = finetune("scenes_xvnli", "name=ray", "runtime=ray", "workers=2", "epochs=1")
    assert code == 0, printed
    assert (
        json.loads((tmp_path / "ray" / "checkpoints" / "step_000003" / "meta.json").read_text())["engine"]
        == "deepspeed"
    )
    assert set(result(tmp_path, "ray")["accuracy"]) == {"en", "ru"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["task=xgpa"], ["unknown task 'xgpa'", "xgqa"]),
        (["data="], ["data= is missing"]),
        (["data=/nowhere"], ["/nowhere/XVNLI/annotations/en/test.jsonl: no such file"]),
        (["model=/nowhere"], ["/nowhere"]),
        (["setting=all_language"], ["training file is English only"]),
        (["setting=few_shot"], ["no fine-tuned model"]),
        (["shots=7", "setting=few_shot"], ["train_7.jsonl: no such file"]),
        (["images=/nowhere.tar"], ["/nowhere.tar: neither a folder nor a .tar"]),
        (['languages=["xx"]'], ["XVNLI/annotations/xx/test.jsonl"]),
        (["epoch=3"], ["did you mean epochs"]),
        (["split=few_shot_test"], ["no split 'few_shot_test'"]),
        (["image_size=20"], ["not a multiple of the model's patch"]),
        (["runtime=ray", "workers=3", "batch=2"], ["batch=2 is smaller than workers=3"]),
    ],
)
def test_finetune_wrong_settings_are_one_line_errors(finetune, settings, words):
    code, printed = finetune("scenes_xvnli", "name=bad", *settings)
    line = printed.strip().splitlines()[-1]
    assert code == 2 and line.startswith("error: "), printed
    assert all(word in line for word in words), line


def test_finetune_local_run_prepares_once(finetune, tmp_path, scenes, monkeypatch):
    """From the check to the last evaluation of all parts, its tar is scanned once; strategies are built for
    the check alone, where the run has no parts; on a new file both begin anew."""
    counts = Counter()
    scan, build = images.TarScan, LinguisticPriorConfig.build
    monkeypatch.setattr(images, "TarScan", lambda *a, **k: counts.update(["scan"]) or scan(*a, **k))
    monkeypatch.setattr(LinguisticPriorConfig, "build", lambda *a: counts.update(["build"]) or build(*a))
    shutil.copyfile(scenes / "images.tar", tmp_path / "images.tar")
    own = ["runtime=local", "epochs=1", f"images={tmp_path / 'images.tar'}", "strategies.prior.k=3"]
    code, printed = finetune("scenes_xgqa", "name=english", *own)
    assert code == 0 and counts == {"scan": 1, "build": 1}, printed
    assert printed.count("labels have no vector") == 1
    shots = [f"model={tmp_path / 'english'}", "setting=few_shot", "shots=5", 'languages=["ru","de"]']
    os.utime(tmp_path / "images.tar")
    assert finetune("scenes_xgqa", "name=few", *own, *shots)[0] == 0
    assert counts == {"scan": 2, "build": 4}  # a part each has its own training texts


def test_finetune_missing_image_is_named(finetune, scenes, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(scenes, folder)
    path = folder / "XVNLI/annotations/ru/test.jsonl"
    path.write_text(path.read_text().replace('"Flikr30kID": "ntest3"', '"Flikr30kID": "gone"'))
    code, printed = finetune("scenes_xvnli", f"data={folder}", "name=gone", "epochs=1")
    line = printed.splitlines()[-1]
    assert code == 2 and f"3 of 60 items of {path} (test, 'ru') have no image in" in line and "'gone'" in line


MODEL_SETTINGS = {  # what `build_model` asks of a config
    *("task", "setting", "shots", "model", "vision", "backbone", "image_size", "freeze"),
    *("head", "decoder", "head_dropout", "use_itm_head", "answers", "languages", "regions"),
}


@pytest.fixture(scope="module")
def built() -> set[str]:
    """Settings of the models that have been built."""
    return set()


@pytest.mark.parametrize("name", RECIPES)
def test_finetune_every_recipe_builds(name, model, scenes, built):
    # which the small model is
    own = ["image_size=16", "backbone=unified"]
    own += [f"backbone_config.{field}=null" for field in ("activation", "eps")]
    config = override(RECIPES[name](), [f"model={model}", f"data={scenes}", *own])
    assert config.task in TASKS and RECIPES[name].__doc__
    if config.task not in ("xgqa", "xvnli", "marvl", "xflickrco"):
        return  # its files are not among the scenes
    # from a run of another recipe
    if config.continues and (config.task != "xflickrco" or config.head == "pairs"):
        config = override(config, ["setting=zero_shot"])
    assert next(iter(read_split(config, "train", "en")))
    expected = {"xgqa": len(("no", "yes", *"0123")) + len(read_labels()), "xvnli": 3, "marvl": 2}
    assert config.task == "xflickrco" or len(find_task(config).label_names(config)) == expected[config.task]
    if (settings := config.model_dump_json(include=MODEL_SETTINGS)) not in built:
        assert build_model(config)
        built.add(settings)


def test_finetune_help_lists_every_recipe(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in RECIPES)


def test_finetune_full_disk_is_one_line_and_run_resumes(finetune, tmp_path, monkeypatch):
    """The second checkpoint finds no space; with space again, the run ends as one that had it."""
    from raylib import checkpoint

    settings = ["epochs=3", "select=last", 'languages=["en"]']
    assert finetune("scenes_marvl", "name=whole", *settings)[0] == 0
    write, calls = checkpoint._write_registry, []

    def full(run, registry):
        calls.append(run)
        if len(calls) > 2:  # of the start, and of the first checkpoint
            raise OSError(errno.ENOSPC, "No space left on device", str(run))
        write(run, registry)

    monkeypatch.setattr(checkpoint, "_write_registry", full)
    code, printed = finetune("scenes_marvl", "name=full", *settings)
    assert code == 1 and ": no space left on the disk" in printed, printed
    monkeypatch.setattr(checkpoint, "_write_registry", write)
    assert finetune("scenes_marvl", "name=full", *settings)[0] == 0
    assert result(tmp_path, "full")["accuracy"] == result(tmp_path, "whole")["accuracy"]


def test_finetune_run_without_optimizers_is_gone_on_from_and_evaluated(finetune, tmp_path):
    """An English run, and one that trains a part for each language from it, keep no optimizer."""
    small = ["epochs=1", "keep_optimizer=false", "train_limit=30", "test_limit=10"]
    for name, settings in (("en", []), ("few", ["setting=few_shot", f"model={tmp_path / 'en'}"])):
        code, printed = finetune("scenes_xvnli", f"name={name}", *settings, *small)
        assert code == 0, printed
        folder = tmp_path / name
        assert list(folder.rglob("model.safetensors")) and not list(folder.rglob("optimizer-*"))
        before = json.loads((folder / "result.json").read_text())["accuracy"]
        assert main(["evaluate", str(folder)]) == 0
        assert json.loads((folder / "result.json").read_text())["accuracy"] == before

"""Tasks that the emoji scenes do not stand for: a run from start to end on a tiny set in each one's official
format."""

import json

import pytest

from finetune.__main__ import main
from finetune.tasks.datasets import TASKS
from tests import official

QUICK = [
    "runtime=local",
    "batch=8",
    "epochs=1",
    "image_size=16",
    "candidates=3",
    "fit.bf16=false",
    "fit.loader_workers=0",
]
SPLIT = official.SPLITS
RUNS = {  # task -> recipe; those that no paper of ours has a row for borrow a like one's
    "multi30k": "p2_multi30k",
    "coco": "p2_coco",
    "xtd": "p2_coco",
    "wit": "p2_wit",
    "vqa_v2": "iglue_xgqa",
    "cvil_vqa": "iglue_xgqa",
    "ja_vqa": "p2_ja_vqa",
    "fm_iqa": "p2_fm_iqa",
    "xnli": "p2_xnli",
    "snli_xvnli": "p2_snli_xvnli",
}


@pytest.fixture
def finetune(tmp_path, model, capsys):
    """`finetune(task, *settings)` -> (result.json or None, what was printed), on that task's tiny set."""

    def run(task, *settings):
        getattr(official, task)(tmp_path / "data")
        own = [f"task={task}", f"model={model}", f"data={tmp_path / 'data'}", f"runs={tmp_path}", "name=run"]
        code = main([RUNS[task], *own, *QUICK, *settings])
        captured = capsys.readouterr()
        path = tmp_path / "run" / "result.json"
        assert (code == 0) == path.is_file(), captured.err
        return json.loads(path.read_text()) if code == 0 else None, captured.out + captured.err

    return run


@pytest.mark.parametrize("task", RUNS)
def test_task_in_official_format_runs_end_to_end(finetune, task):
    found, printed = finetune(task)
    assert found, printed
    languages, retrieval = TASKS[task].languages, "retrieval" in found
    scores = found["retrieval"] if retrieval else found["accuracy"]
    assert tuple(scores) == languages and found["steps"] == (
        4 if task in ("coco", "xtd") else 2
    )  # two captions an image
    if retrieval:
        assert all(figures["n"] == SPLIT["test"] and figures["i2t_r10"] == 1.0 for figures in scores.values())
    else:
        assert all(n["n"] == n["predictions"] == SPLIT["test"] for n in found["counts"].values())
        assert all(n["unknown_answers"] == n["unlabelled"] == 0 for n in found["counts"].values())


@pytest.mark.parametrize(("task", "language"), [("ja_vqa", "ja"), ("fm_iqa", "zh")])
def test_bleu_of_single_reference_answer(finetune, task, language):
    found, _ = finetune(task)
    assert found["accuracy"] == {language: 1.0} and found["bleu"] == {language: pytest.approx(1.0)}


def test_vqa_soft_scores_follow_the_annotators(finetune):
    """Both answers are known; "yes", of seven people, scores 1, and "no", of three, also 1."""
    found, _ = finetune("vqa_v2", "loss=bce")
    assert found["accuracy"] == {"en": 1.0} and found["by_type"] == {"en": {"yes/no": 1.0}}


@pytest.mark.parametrize("setting", ["single_language", "all_language"])
def test_tasks_with_training_files_per_language_run(finetune, setting):
    found, printed = finetune("multi30k", f"setting={setting}", 'languages=["de","cs"]')
    assert found, printed
    assert set(found["retrieval"]) == {"de", "cs"} and found["steps"] == 4


def test_tasks_with_all_languages_in_one_file_train_each_language(finetune):
    """cViL's lines hold all languages: `single_language` takes each one's own column."""
    found, printed = finetune("cvil_vqa", "setting=all_language")
    assert found, printed
    assert found["steps"] == 6

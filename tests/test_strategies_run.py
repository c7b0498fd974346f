"""Strategies from the command line: what they leave, in pairs and resumed, sparse cycles, mistakes."""

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from finetune.__main__ import main
from finetune.build import build_pipeline, build_strategies
from finetune.config import FinetuneConfig
from finetune.strategies import STRATEGIES
from finetune.strategies.pruning import prune_mask, read_mask, sparsity
from raylib.checkpoint import find_newest, read_meta
from raylib.config import load_config
from raylib.models import peft
from raylib.monitoring import read_metrics
from raylib.sample import LANGUAGES

SETTINGS = {
    "prior": ["strategies.prior.k=3"],
    "sparse": ["strategies.sparse.rounds=2", "strategies.sparse.rate=0.2"],
    "code_mixing": ["strategies.code_mixing.stages=both"],
    "head_first": ["strategies.head_first.epochs=1", 'freeze=["vision"]'],
    "unfreezing": ["strategies.unfreezing.layers=2"],
    "layer_decay": ["strategies.layer_decay.factor=0.7"],
    "top_layers": ["strategies.top_layers.layers=3"],
    "lora": ["strategies.lora.rank=2"],
    "adapter": ["strategies.adapter.bottleneck=4"],
    "compacter": ["strategies.compacter.n=2", "strategies.compacter.reduction=4"],
    "soft_prompt": ["strategies.soft_prompt.words=a"],
    "hard_prompt": ["strategies.hard_prompt.words=a photo of"],
}
CALLED = {
    "prior": "prior (vectors, k 3)",
    "sparse": "sparse (rate 0.2, rounds 2)",
    "code_mixing": "code mixing (stages both)",
    "head_first": "head first (epochs 1)",
    "unfreezing": "unfreezing (layers 2)",
    "layer_decay": "layer decay (factor 0.7)",
    "top_layers": "top layers (layers 3)",
    "lora": "lora (rank 2)",
    "adapter": "adapter (bottleneck 4)",
    "compacter": "compacter (n 2, reduction 4)",
    "soft_prompt": "soft prompt (words a)",
    "hard_prompt": "hard prompt (words a photo of)",
}
TUNING = ("lora", "adapter", "compacter", "soft_prompt")
# pruning what stands still, or two bottlenecks in one place, makes no sense, and is refused
REFUSED = {*(("sparse", name) for name in TUNING), ("adapter", "compacter")}


OWN = ("alignment", "distillation")  # they have tests of their own: test_alignment.py, test_distillation.py
ANSWERS = [name for name in STRATEGIES if name not in OWN]


def test_strategies_run_settings_cover_every_strategy():
    assert list(SETTINGS) == list(CALLED) == ANSWERS


def weights(folder, step: int = 6) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step_{step:06d}" / "model.safetensors")


def same_run(finetune, tmp_path, names, recipe="scenes_xgqa", *settings):
    """A run of these strategies, whole and interrupted: the same weights. Of xGQA, a round has 3 steps, the
    training after it 6: stopping at 2 is in the first round, at 4 in the last training, after all rounds."""
    stops = (2, 4) if "sparse" in names else (4,)
    chosen = [*settings, "select=last", *(setting for name in names for setting in SETTINGS[name])]
    code, printed = finetune(recipe, "name=whole", *chosen)
    assert code == 0, printed
    for stop in stops:
        code, printed = finetune(recipe, "name=parts", *chosen, f"fit.stop_after={stop}")
        assert code == 0 and "stopped before the end" in printed
    finetune(recipe, "name=parts", *chosen)
    step = read_meta(find_newest(tmp_path / "whole"))["step"]
    whole, parts = weights(tmp_path / "whole", step), weights(tmp_path / "parts", step)
    assert all(value.equal(parts[key]) for key, value in whole.items())
    found = json.loads((tmp_path / "parts" / "result.json").read_text())
    assert found["method"] == " + ".join(CALLED[name] for name in ANSWERS if name in names)
    return found


def test_strategies_all_at_once_resume(finetune, tmp_path):
    found = same_run(finetune, tmp_path, [name for name in ANSWERS if name not in TUNING])
    for figures in ("accuracy", "synonym_accuracy", "confusions"):
        assert found[figures].keys() == {"en", "ru"}
    assert found["sparsity_prunable"] == pytest.approx(0.36, abs=1e-3) and 0 < found["sparsity"] < 0.36
    assert found["trainable"] < found["params"]
    assert "loss/prior" in {key for line in read_metrics(tmp_path / "whole") for key in line}


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [p for p in itertools.combinations(ANSWERS, 2) if p not in REFUSED], ids="+".join
)
def test_strategies_compose_in_pairs_and_resume(finetune, tmp_path, names):
    same_run(finetune, tmp_path, names)


WITHOUT_LOGITS = {  # of what strategies need logits, and are refused
    "retrieval": ["scenes_xflickrco", "candidates=3", "test_limit=8"],
    "generation": ["scenes_xgqa", "head=decoder", "decoder.candidates=9", "test_limit=8"],
}


@pytest.mark.slow
@pytest.mark.parametrize("task", WITHOUT_LOGITS)
@pytest.mark.parametrize(
    "names",
    [
        pair
        for pair in itertools.combinations(ANSWERS, 2)
        if pair not in REFUSED and not any("logits" in STRATEGIES[name].needs for name in pair)
    ],
    ids="+".join,
)
def test_strategies_compose_in_pairs_on_tasks_without_logits(finetune, tmp_path, names, task):
    same_run(finetune, tmp_path, names, *WITHOUT_LOGITS[task])


def test_tuned_weights_restore_the_run_in_a_fresh_model(finetune, tmp_path):
    """LoRA, resumed in mid-phase of unfreezing; RUN/tuned.safetensors gives a fresh model the run's weights;
    another run goes on from the model."""
    found = same_run(finetune, tmp_path, ["unfreezing", "lora"])
    run = tmp_path / "whole"
    assert 0 < found["share"] < found["share_with_heads"] < 1 and found["trainable"] < 0.5 * found["params"]
    small = run / "tuned.safetensors"
    assert (
        small.stat().st_size
        < 0.3 * (run / "checkpoints" / "step_000006" / "model.safetensors").stat().st_size
    )
    config = load_config(FinetuneConfig, run / "config.json")
    model = build_pipeline(config, build_strategies(config)).model
    peft.load_tuned(model, small)
    trained = weights(run)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, trained[name], rtol=0, atol=0)
    before = (run / "predictions" / "ru.jsonl").read_text()
    assert main(["evaluate", str(run)]) == 0 and (run / "predictions" / "ru.jsonl").read_text() == before
    code, printed = finetune("scenes_xgqa", "name=more", f"model={run}", "strategies.lora.rank=2", "epochs=1")
    assert code == 0, printed
    code, printed = finetune(
        "scenes_xgqa", "name=other", f"model={run}", "strategies.lora.rank=3", "epochs=1"
    )
    assert code == 2 and "give the same settings" in printed


def test_pruning_run_rewinds_and_keeps_pruned_weights_zero(finetune, tmp_path):
    """Two rounds of 20 %; the survivors begin at the pretrained weights, what is gone stays zero; code-mixed
    at the end."""
    settings = ["select=last", *SETTINGS["sparse"], "epochs=1"]
    code, printed = finetune("scenes_xgqa", "name=sparse", *settings)
    assert code == 0
    # lines of progress say which round they are of, and its epoch
    assert all(f"{part} step 3/3 epoch 1.00 | " in printed for part in ("round_1", "round_2", "sparse"))
    first, last = (read_mask(tmp_path / "sparse" / "masks" / f"round_{n}.safetensors") for n in (1, 2))
    assert sparsity(first, 1000)["prunable"] == pytest.approx(0.2, abs=1e-3)
    for name, kept in last.items():
        assert not (kept & ~first[name]).any()  # what is gone does not come back
    trained = weights(tmp_path / "sparse", 3)
    assert json.loads((tmp_path / "sparse" / "result.json").read_text())["steps"] == 3 + 3 + 3
    assert all(not trained[name][~kept].any() for name, kept in last.items())
    # a mask by hand, from the weights that the first round left
    after = weights(tmp_path / "sparse" / "round_1", 3)
    by_hand = prune_mask({name: after[name] for name in first}, None, 0.2)
    assert all(by_hand[name].equal(kept) for name, kept in first.items())
    # the mask serves another run, without rounds; the same seed gives the same run
    mask = f"strategies.sparse.mask={tmp_path}/sparse/masks/round_2.safetensors"
    assert finetune("scenes_xgqa", "name=again", "select=last", "epochs=1", mask)[0] == 0
    assert all(value.equal(trained[name]) for name, value in weights(tmp_path / "again", 3).items())
    assert not (tmp_path / "again" / "round_1").exists()


def test_pruning_without_rewinding_goes_on_from_trained_weights(finetune, tmp_path):
    """The public code's rewinding, which is none: another mask after the second round, the same after the
    first."""
    settings = ["select=last", *SETTINGS["sparse"], "epochs=1"]
    for rewind in ("initial", "none"):
        assert (
            finetune("scenes_xgqa", f"name={rewind}", f"strategies.sparse.rewind={rewind}", *settings)[0] == 0
        )
    found = [
        [read_mask(tmp_path / name / "masks" / f"round_{n}.safetensors") for n in (1, 2)]
        for name in ("initial", "none")
    ]
    assert all(kept.equal(found[1][0][name]) for name, kept in found[0][0].items())
    assert any(not kept.equal(found[1][1][name]) for name, kept in found[0][1].items())
    start = weights(tmp_path / "none" / "round_1", 3)
    gone = [name for name, kept in found[1][0].items() if not kept.all()]
    assert gone and start.keys() >= set(gone)


def test_strategies_without_answers_work_on_retrieval(finetune, tmp_path):
    chosen = SETTINGS["code_mixing"] + SETTINGS["unfreezing"] + SETTINGS["layer_decay"]
    code, printed = finetune("scenes_xflickrco", "name=mixed", *chosen)
    assert (
        code == 0
        and "code mixing (stages both) + unfreezing (layers 2) + layer decay (factor 0.7)" in printed
    )
    code, printed = finetune("scenes_xflickrco", "name=prior", "strategies.prior.k=3")
    assert code == 2 and "strategies.prior needs a task with answers" in printed


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["strategies.prior.k=1000"], "strategies.prior.k=1000, but there are"),
        (["strategies.prior.alfa=1"], "did you mean strategies.prior.alpha"),
        (["strategies.unfreezing.layers=5"], "strategies.unfreezing.layers=5, but the model has 4 layers"),
        (['strategies.code_mixing.languages=["xx"]'], "xx"),
        (["strategies.sparse.mask=none"], "none: no such file; wanted a pruning mask"),
        (
            ["strategies.sparse.epochs=3"],
            "strategies.sparse.epochs=3: a round is cut out of a run of epochs=2",
        ),
        (["strategies.prior.k=3", "setting=translate_test"], "setting=translate_test trains nothing"),
        (
            ["strategies.code_mixing={}", "setting=few_shot"],
            "strategies.code_mixing needs English training texts",
        ),
        (["setting=few_shot", "resume=best"], "resume=newest alone"),
        (["wordnet=none"], "wordnet=none: no such folder"),
        (["backbone=uc2"], "is a model of ours on the backbone unified"),
        (["strategies.prior.vectors=none.txt"], "none.txt: no such file"),
        (
            ["strategies.sparse.rounds=2", "strategies.lora={}"],
            "strategies.sparse needs all weights of the model in training, which strategies.lora takes away",
        ),
        (["strategies.adapter={}", "strategies.compacter={}"], "want the same places"),
        (["strategies.compacter.n=3", "strategies.compacter.reduction=4"], "no multiple of n 3"),
    ],
)
def test_strategies_wrong_settings_are_one_line_errors(finetune, settings, words):
    code, printed = finetune("scenes_xgqa", "name=wrong", *settings)
    assert code == 2 and words in printed and printed.strip().splitlines()[-1].startswith("error: ")


def test_code_mixing_dictionaries_exist_for_every_language(scenes):
    assert {path.name for path in (scenes / "dictionaries").iterdir()} == {
        f"{code}2.txt" for code in LANGUAGES if code != "en"
    }


def test_pruning_moved_run_resumes_mid_cycle(finetune, tmp_path):
    """Stopped in the second round, which has a mask, in a folder that is then called otherwise."""
    chosen = ["select=last", *SETTINGS["sparse"], "name=moved"]
    assert finetune("scenes_xgqa", *chosen, "fit.stop_after=2")[0] == 0
    assert (
        finetune("scenes_xgqa", *chosen, f"runs={tmp_path}", "fit.stop_after=3")[0] == 0
    )  # to the end of both rounds
    shutil.rmtree(tmp_path / "moved" / "checkpoints")
    (tmp_path / "moved" / "round_2" / "part.json").unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "moved").rename(tmp_path / "elsewhere" / "moved")
    code, printed = finetune("scenes_xgqa", *chosen, f"runs={tmp_path / 'elsewhere'}")
    assert code == 0, printed

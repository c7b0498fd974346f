"""A crafted pickle in the place of any file of a run's folder is run by no command."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch

from finetune.__main__ import main as finetune
from pretrain.__main__ import main as pretrain
from raylib import checkpoint
from tests.conftest import QUICK
from tests.test_convert import Evil, seal
from tests.test_stored_runs import folder as stored_folder

stored_runs = stored_folder  # a fixture: the current folder, with stored runs
STEP = "checkpoints/step_000002"
# as earlier versions, DeepSpeed and others name what they pickle
OLD_FILES = ("optimizer.pt", "pytorch_model.bin", "zero/mp_rank_00_model_states.pt", "data.pkl")
OLD_FILES += ("zero/zero_pp_rank_0_mp_rank_00_optim_states.pt",)
FILES = (
    *(
        f"{STEP}/{name}"
        for name in ("optimizer-00000.safetensors", "optimizer-00000.json", "model.safetensors")
    ),
    *(f"{STEP}/{name}" for name in ("config.json", "meta.json", "files-00000.json")),
    "checkpoints/registry.json",
    "config.json",
    "identity.json",
    "metrics.jsonl",
    "tokenizer.model",
)


def call(command, *arguments):
    """Return the exit code of a command, None if it raises: how a broken file is told is not asked here."""
    try:
        return command(*arguments)
    except Exception:
        return None


def use(run, is_finetuned, names=("evaluate", "export", "finetune", "verify", "resume")):
    """Exit codes of what reads a run."""
    main = finetune if is_finetuned else pretrain
    small = [
        "data=scenes",
        "runs=again",
        "epochs=1",
        "train_limit=8",
        "test_limit=4",
        "runtime=local",
        *QUICK,
    ]
    settings = [
        "scenes_xvnli",
        f"model={run}",
        "name=again",
        'languages=["en"]',
        "held_out_languages=[]",
        *small,
    ]
    commands = {
        "evaluate": (main, ["evaluate", run, *([] if is_finetuned else ["images"])]),
        "export": (pretrain, ["export", run, "exported"]),
        "finetune": (finetune, settings),
        "verify": (lambda run: checkpoint.verify(Path(run, STEP)) and 0, run),
        "resume": (main, ["--config", f"{run}/config.json", "fit.stop_after=null"]),
    }
    codes = {name: call(*commands[name]) for name in names}
    for made in ("exported", "again"):
        shutil.rmtree(made, ignore_errors=True)
    return codes


def craft(path, marker, way):
    if way == "pickle":
        path.write_bytes(pickle.dumps(Evil(marker)))
    else:
        torch.save({"state": Evil(marker)}, path)


@pytest.fixture
def runs(stored_runs, retrieval_set):
    (stored_runs / "images").symlink_to(retrieval_set)
    for name in ("pretrained", "stopped"):
        assert pretrain(["convert", f"runs/{name}"]) == 0
    return stored_runs


def test_pickles_beside_a_checkpoint_are_read_by_nothing(runs):
    marker = runs / "executed"
    for name in ("pretrained", "stopped"):
        for file in OLD_FILES:
            path = runs / "runs" / name / STEP / file
            path.parent.mkdir(exist_ok=True)
            craft(path, marker, "torch.save")
        assert set(use(f"runs/{name}", name == "stopped").values()) == {0}
        assert not marker.exists()


def replace_and_use(runs, name, file, way, *commands):
    """Codes of commands that read a copy of a run, with a crafted `file` that its list of files admits."""
    shutil.copytree(runs / "runs" / name, runs / "kept")
    craft(runs / "runs" / name / file, runs / "executed", way)
    seal(runs / "runs" / name / STEP) if "files-" not in file else None
    codes = use(f"runs/{name}", name == "stopped", *commands)
    assert not (runs / "executed").exists(), (name, file, way)
    shutil.rmtree(runs / "runs" / name)
    (runs / "kept").rename(runs / "runs" / name)
    return codes


def test_pickles_in_place_of_states_and_weights_run_nothing(runs):
    states = (f"{STEP}/optimizer-00000.safetensors", f"{STEP}/optimizer-00000.json")
    for file, way in zip(states, ("torch.save", "pickle"), strict=True):
        codes = replace_and_use(runs, "pretrained", file, way, ("verify", "resume"))
        assert codes == {"verify": 0, "resume": 2}
    codes = replace_and_use(runs, "stopped", f"{STEP}/model.safetensors", "torch.save")
    assert codes.pop("verify") == 0 and 0 not in codes.values()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["torch.save", "pickle"])
@pytest.mark.parametrize("file", FILES)
def test_pickles_in_place_of_any_file_run_nothing(runs, file, way):
    for name in ("pretrained", "stopped"):
        replace_and_use(runs, name, file, way)

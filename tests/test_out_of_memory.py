"""What does not fit the memory is one line, which names settings that the stage has."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from finetune.config import FinetuneConfig
from pretrain.evaluate import evaluate_folder
from pretrain.recipes import base
from pretrain.train import advise_on_step
from raylib.api import load
from raylib.config import dump_config
from raylib.errors import UserError
from raylib.models.finetuned import FinetuneModel
from raylib.models.unified import UnifiedModel
from raylib.runtime import advise_on_memory
from tests.factories import make_batch

ROOT = Path(__file__).resolve().parent.parent
LIMITED = """
import resource, sys
from raylib import loop
step = loop._step
def limited(*arguments):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, resource.RLIM_INFINITY))
    return step(*arguments)
loop._step = limited
from pretrain.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def run_out_of_memory(*arguments):
    """Ask for more memory than any machine has."""
    torch.empty(2**50)


def test_pretraining_out_of_memory_names_settings_of_pretraining(mini, tmp_path):
    wide = ("model.feedforward=65536", "runtime=local", "workers=1", "fit.steps=2", "data.dev=false")
    file = tmp_path / "config.json"
    file.write_text(dump_config(mini(*wide, "data.retrieval=null")))
    command = [sys.executable, "-c", LIMITED, "--config", str(file)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2
    assert "step 0: a worker's part of the batch (image_text " in line
    assert "set model.checkpointing=blocks or fit.micro_batches=2, or give it more than workers=1" in line


def test_advice_for_a_gpu_has_figures_of_the_estimate(monkeypatch):
    properties = SimpleNamespace(total_memory=24 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *arguments: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *arguments: (9, 0))
    runtime = SimpleNamespace(world_size=2, device=torch.device("cuda", 0), sharding="none")
    config = base().model_copy(update={"fit": base().fit.model_copy(update={"bf16": True})})
    advice = advise_on_step(config, runtime, make_batch(pairs=512, translations=1024, mono=1024))
    assert advice.startswith("set model.checkpointing=blocks (about 1")
    assert "of 24 GB) or fit.micro_batches=" in advice
    assert "fit.sharding=zero2" in advice


def test_finetuning_out_of_memory_names_settings_of_finetuning(finetune, monkeypatch):
    monkeypatch.setattr(FinetuneModel, "forward", run_out_of_memory)
    code, printed = finetune("scenes_xvnli", "name=large", "runtime=local", "epochs=1")
    (line,) = [line for line in printed.splitlines() if line.startswith("error:")]
    assert code == 2 and "step 0: a worker's part of the batch (examples " in line
    assert "set checkpointing=blocks or fit.micro_batches=2, or give it more than workers=1" in line
    again = FinetuneConfig(task="xvnli", checkpointing="blocks", fit={"micro_batches": 4}).less_memory(3)
    assert again.startswith("set fit.micro_batches=8, or give it more than workers=3")


def test_evaluation_out_of_memory_names_settings_of_evaluation(finetune, monkeypatch):
    forward = FinetuneModel.forward

    def evaluate_too_much(model, batch):
        return forward(model, batch) if model.training else run_out_of_memory()

    monkeypatch.setattr(FinetuneModel, "forward", evaluate_too_much)
    code, printed = finetune("scenes_xvnli", "name=large", "runtime=local", "epochs=1")
    (line,) = [line for line in printed.splitlines() if line.startswith("error:")]
    assert code == 2 and ": the evaluation does not fit the memory of cpu; set fit.bf16=true, or" in line


def test_evaluation_of_an_export_out_of_memory_is_one_line(model, retrieval_set, monkeypatch):
    monkeypatch.setattr(UnifiedModel, "encode_images", run_out_of_memory)
    with pytest.raises(UserError, match="the evaluation does not fit the memory of cpu; run it on a device"):
        evaluate_folder(model, retrieval_set)


def test_interface_out_of_memory_names_its_batch_size(model, monkeypatch):
    loaded = load(model)
    monkeypatch.setattr(UnifiedModel, "encode_text", run_out_of_memory)
    with pytest.raises(UserError, match="encode_text: a batch does not fit the memory of cpu; lower batch_s"):
        loaded.encode_text(["a", "b"])


def test_another_error_is_raised_as_it_is():
    with pytest.raises(RuntimeError, match="shapes"), advise_on_memory("it", torch.device("cpu"), str):
        raise RuntimeError("shapes")

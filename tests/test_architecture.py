"""The ways of docs/architecture.md are those that code takes: each is traced, and compared with its list."""

import ast
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from finetune.worker import FinetuneJob
from pretrain.batches import StepBatches
from pretrain.train import run
from raylib.engine import TorchEngine

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("raylib", "pretrain", "finetune", "tune_spaces", "cluster")
LIMITS = {"The way of a pretraining batch": 26, "The way of a fine-tuning run": 40}


class Tracer:
    """Collects the files of ours whose functions are called between `start` and `stop`."""

    def __init__(self) -> None:
        self.files: set[str] = set()

    def start(self) -> None:
        sys.setprofile(self._on_event)

    def stop(self) -> None:
        sys.setprofile(None)

    def _on_event(self, frame, event, argument) -> None:
        if event == "call":
            path = os.path.relpath(frame.f_code.co_filename, ROOT)
            if path.startswith(PACKAGES) and frame.f_code.co_name not in ("<module>", "<lambda>"):
                self.files.add(path)


def listed_files(section: str) -> list[str]:
    """Files of a section's numbered list, in order: "1. `path` ..."."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    text = page.partition(f"## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\d+\. `([\w/]+\.py)`", text, re.MULTILINE)


def assert_way_is_listed(section: str, files: set[str]) -> None:
    listed = listed_files(section)
    assert len(listed) == len(set(listed)) <= LIMITS[section]
    assert files == set(listed), f"passed {sorted(files - set(listed))}, not {sorted(set(listed) - files)}"


def wrapped(function: Callable, before: Callable, after: Callable) -> Callable:
    def inner(*args):
        before(*args)
        out = function(*args)
        after(*args)
        return out

    return inner


def test_architecture_lists_the_way_of_a_pretraining_batch(mini, monkeypatch):
    """From the first sample that the second step reads to the optimizer's step. What is set up once (shards
    that are opened, caches that fill) has been, by reading the batch twice."""
    tracer, read, nothing = Tracer(), StepBatches.__getitem__, lambda *args: None

    def begin(batches: StepBatches, step: int) -> None:
        if step == 1:
            read(batches, step)
            tracer.start()

    def end(engine: TorchEngine, batch: dict, step: int, lr: float) -> None:
        if step == 1:
            tracer.stop()

    monkeypatch.setattr(StepBatches, "__getitem__", wrapped(read, begin, nothing))
    monkeypatch.setattr(TorchEngine, "step", wrapped(TorchEngine.step, nothing, end))
    try:
        run(
            mini(
                "name=traced",
                "runtime=local",
                "workers=1",
                "fit.steps=2",
                "data.retrieval=null",
                "data.dev=false",
            )
        )
    finally:
        tracer.stop()
    assert_way_is_listed("The way of a pretraining batch", tracer.files)


def test_architecture_lists_the_way_of_a_fine_tuning_run(finetune, monkeypatch):
    """From the call of the job on a worker to its result, but for the files that a step passes."""
    tracer = Tracer()
    call = FinetuneJob.__call__
    monkeypatch.setattr(
        FinetuneJob,
        "__call__",
        wrapped(call, lambda *args: tracer.start(), lambda *args: tracer.stop()),
    )
    try:
        assert finetune("scenes_xvnli", "name=traced", "runtime=local", "epochs=1")[0] == 0
    finally:
        tracer.stop()
    step = set(listed_files("The way of a pretraining batch"))
    assert_way_is_listed("The way of a fine-tuning run", tracer.files - step)


def test_worker_imports_at_most_twelve_modules_of_ours():
    tree = ast.parse((ROOT / "finetune" / "worker.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules = set()
    for module, name in ((node.module, alias.name) for node in imports for alias in node.names):
        if module.startswith(PACKAGES):
            inner = (
                ROOT / module.replace(".", "/") / f"{name}.py"
            ).is_file()  # from raylib.models import peft
            modules.add(f"{module}.{name}" if inner else module)
    assert len(modules) <= 12, sorted(modules)

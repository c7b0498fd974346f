"""An evaluation of 100,000 predictions: its memory does not grow with their number, and workers share it."""

import itertools
import json
from pathlib import Path

import pytest

from finetune.build import Reading
from finetune.formats import answers
from finetune.predict import evaluate
from finetune.tasks.datasets import TASKS
from raylib.text import Tokenizer
from tests.test_finetune import TOKENIZER, pixels, questions, small_model
from tests.workers import run_workers

FEW, MANY = 160 * 64, 100_000  # FEW fills its batches, so that the first FEW of MANY meet the same ones
GROWTH = 8.0  # MB; 90,000 more predictions as Python objects would be 60 at the least


def memory(name: str) -> float:
    """MB that this process has (`VmRSS`) or had at most (`VmHWM`): the kernel's own count, that of this
    program alone."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def write_questions(path: Path, scenes: Path, count: int) -> Path:
    """`count` questions in xGQA's form: those of the scenes, over and over."""
    with open(path, "w", encoding="utf-8") as file:
        for i, example in enumerate(itertools.islice(itertools.cycle(questions(scenes)), count)):
            (answer,) = example.labels
            record = {
                "question": example.texts[0],
                "answer": answer,
                "imageId": example.images[0],
                "types": {"structural": example.kind},
            }
            file.write(("{" if i == 0 else ",\n") + f'"{i}": ' + json.dumps(record))
        file.write("}")
    return path


def evaluate_file(rank, world, scenes, file, folder):
    """(figures, MB by which this worker's peak lies above what it had before)."""
    model = small_model(labels=answers.read_answers(scenes / "gqa/annotations/trainval_label2ans.json"))
    seen, tokenizer = pixels(scenes), Tokenizer.load(TOKENIZER)
    reading = Reading(TASKS["xgqa"], file, "test", "en", None)
    before = memory("VmRSS")
    return evaluate(model, {"en": reading}, seen, tokenizer, 40, folder)["en"], memory("VmHWM") - before


@pytest.mark.slow
def test_evaluation_memory_does_not_grow_with_predictions(scenes, tmp_path):
    few, many = (write_questions(tmp_path / f"{n}.json", scenes, n) for n in (FEW, MANY))
    ((_, small),) = run_workers(evaluate_file, 1, scenes, few, tmp_path / "few")
    ((figures, large),) = run_workers(evaluate_file, 1, scenes, many, tmp_path / "many")
    shared = run_workers(evaluate_file, 2, scenes, many, tmp_path / "shared")
    print(
        f"above the start: {small:.1f} MB for {FEW}, {large:.1f} for {MANY}, "
        f"{[round(m, 1) for _, m in shared]} for two"
    )
    assert figures["n"] == figures["predictions"] == MANY
    assert large - small < GROWTH and all(peak - small < GROWTH for _, peak in shared)
    assert all(found == figures for found, _ in shared)
    assert (tmp_path / "shared" / "en.jsonl").read_bytes() == (tmp_path / "many" / "en.jsonl").read_bytes()
    with open(tmp_path / "few" / "en.jsonl") as some, open(tmp_path / "many" / "en.jsonl") as all_:
        assert all(line == other for line, other in zip(some, itertools.islice(all_, FEW), strict=True))

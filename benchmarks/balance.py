"""The accuracy that emoji scenes allow without looking at both image and text: a model of the text alone, and
one of the image alone.

    python -m benchmarks.balance FOLDER      FOLDER: emoji scenes (python -m raylib.sample.scenes FOLDER)

Both are multinomial logistic regressions, trained on the English training set and scored on the English test
set: over the words and word pairs of the text, or over what is known of the image, namely which things are
in it, where and how large (better than any image encoder could know it).
"""

import argparse
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from finetune.formats import Example
from finetune.tasks.datasets import TASKS
from raylib.display import markdown_table, percent

STEPS, RATE, DECAY = 400, 0.05, 1e-3


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """{task: {"majority", "text", "picture"}}: accuracy of the majority class, of the text alone, of the
    image alone."""
    scenes = {
        s["id"]: s
        for s in map(json.loads, (folder / "scenes.jsonl").read_text(encoding="utf-8").splitlines())
    }
    accuracies = {}
    for name in ("xgqa", "xvnli", "marvl"):
        task = TASKS[name]
        train, test = (
            list(task.read(task.path(folder, split, "en"), split, "en")) for split in ("train", "test")
        )
        answers = [max(e.labels, key=e.labels.get) for e in train]
        best = Counter(answers).most_common(1)[0][0]
        accuracies[name] = {
            "majority": sum(best in e.labels for e in test) / len(test),
            "text": _accuracy(train, test, lambda e: _words(e.texts[-1])),
            "picture": _accuracy(train, test, lambda e: _facts([scenes[i] for i in e.images])),
        }
    return accuracies


def table(measured: dict[str, dict[str, float]]) -> str:
    """Markdown of what `measure` returns, in %, by task."""
    rows = [["task", "majority", "text alone", "image alone"]]
    rows += [[task, *map(percent, figures.values())] for task, figures in measured.items()]
    return markdown_table(rows)


def _words(text: str) -> list[str]:
    words = text.lower().rstrip("?.").split()
    return words + [f"{a} {b}" for a, b in itertools.pairwise(words)]


def _facts(scenes: Sequence[dict]) -> list[str]:
    facts = []
    for side, scene in enumerate(scenes):
        for o in scene["objects"]:
            name = f"{side} {o['label']}"
            facts += [name, f"{name} {o['quadrant']}", f"{name} {o['large']}"]
    return facts


def _accuracy(train: Sequence[Example], test: Sequence[Example], features) -> float:
    known = {f: i for i, f in enumerate(sorted({f for e in train for f in features(e)}))}
    answers = {a: i for i, a in enumerate(sorted({a for e in train for a in e.labels}))}

    def matrix(examples: Sequence[Example]) -> torch.Tensor:
        x = torch.zeros(len(examples), len(known) + 1)
        x[:, -1] = 1
        for row, e in enumerate(examples):
            x[row, [known[f] for f in features(e) if f in known]] = 1
        return x

    x, y = matrix(train), torch.tensor([answers[max(e.labels, key=e.labels.get)] for e in train])
    weight = torch.zeros(x.shape[1], len(answers), requires_grad=True)
    optimizer = torch.optim.Adam([weight], RATE, weight_decay=DECAY)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(x @ weight, y).backward()
        optimizer.step()
    names = list(answers)
    predicted = (matrix(test) @ weight).argmax(1).tolist()
    return sum(e.labels.get(names[c], 0.0) for e, c in zip(test, predicted, strict=True)) / len(test)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a folder of emoji scenes")
    print(table(measure(parser.parse_args(arguments).folder)))


if __name__ == "__main__":
    main()

"""The accuracy that emoji scenes allow without looking at both image and text: a model of the text alone, and
one of the image alone.

    python -m benchmarks.balance FOLDER      FOLDER: emoji scenes (python -m raylib.sample.scenes FOLDER)

Both are multinomial logistic regressions, trained on the English training set, their weight decay chosen on
the English dev set: over the words and word pairs of the text, or over what is known of the image, namely
which things are in it, where and how large (better than any image encoder could know it).

The tests of all languages, and those in the other style, are the same questions with the same answers about
the same scenes: what the text alone or the image alone gives is the same in each, for a model to which the
language is as good as English. `text_zero_shot` is what the English regression makes of the targets' words.
"""

import argparse
import itertools
import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.results import commit
from finetune.formats import Example
from finetune.recipes import SCENES_LANGUAGES
from finetune.tasks.datasets import TASKS
from raylib.display import markdown_table, percent
from raylib.errors import UserError
from raylib.fileio import write_atomically
from raylib.sample.scenes import DATA
from raylib.sample.scenes.frozen import check_frozen
from raylib.sample.scenes.writer import read_baselines

EPOCHS, BATCH, RATE = 4, 512, 0.05
DECAYS = (1e-4, 1e-3)  # a step
RECALLS = (1, 5, 10)
KINDS = "xGQA/annotations/few_shot/en/test.json"

Features = Callable[[Example], list[str]]


def measure(folder: Path) -> dict[str, Any]:
    """Measure every task of the benchmark in `folder`.

    Returns:
        {"benchmark": frozen or not, "git": commit, "sizes": {"train", "dev", "test"}: items of xgqa,
        "kinds": {type of question: {"share", "majority", "text"}},
        "baselines": {task: {"en" or "targets": {"majority", "text", "image": accuracies}}}, of the targets
        "text_zero_shot" too (their mean); of retrieval {"chance": mean recall}}.
    """
    lines = (folder / "scenes.jsonl").read_text(encoding="utf-8").splitlines()
    scenes = {scene["id"]: scene for scene in map(json.loads, lines)}
    baselines: dict[str, dict[str, dict[str, float]]] = {}
    try:
        check_frozen(folder)
        tests = "frozen"
    except UserError:
        tests = "others than the frozen ones"
    measured: dict[str, Any] = {"benchmark": tests, "git": commit(), "baselines": baselines}
    for name in ("xgqa", "xvnli", "marvl"):
        train, dev, test = (_read(folder, name, split, "en") for split in ("train", "dev", "test"))
        best = Counter(map(_answer, train)).most_common(1)[0][0]
        text = Regression(train, dev, lambda e: _words(e.texts[-1]))
        image = Regression(train, dev, lambda e: _facts([scenes[i] for i in e.images]))
        text_scores = text.scores(test)
        shared = {
            "majority": statistics.fmean(best in e.labels for e in test),
            "text": statistics.fmean(text_scores),
            "image": statistics.fmean(image.scores(test)),
        }
        targets = [code for code in SCENES_LANGUAGES[name] if code != "en"]
        zero_shot = [statistics.fmean(text.scores(_read(folder, name, "test", code))) for code in targets]
        baselines[name] = {"en": shared, "targets": {**shared, "text_zero_shot": statistics.fmean(zero_shot)}}
        if name == "xgqa":
            measured["sizes"] = {"train": len(train), "dev": len(dev), "test": len(test)}
            measured["kinds"] = _kinds(folder, test, text_scores)
    images = len(_read(folder, "xflickrco", "test", "en"))
    chance = {"chance": statistics.fmean(min(k / images, 1.0) for k in RECALLS)}
    baselines["xflickrco"] = {"en": chance, "targets": chance}
    return measured


def table(measured: dict[str, Any]) -> str:
    """Markdown of the baselines of classifications that `measure` returns, in %, by task."""
    rows = [["task", "majority", "text alone", "text alone, zero-shot", "image alone"]]
    for task, groups in measured["baselines"].items():
        if "text" in groups["en"]:
            targets = groups["targets"]
            names = ("majority", "text", "text_zero_shot", "image")
            rows.append([task, *(percent(targets[name]) for name in names)])
    return markdown_table(rows)


def kinds_table(measured: dict[str, Any], before: dict[str, dict[str, float]]) -> str:
    """Markdown of the types of xgqa's questions, in %; `before`: the "kinds" of an older benchmark."""
    rows = [["questions", "share before", "share", "majority", "text alone"]]
    for kind, figures in measured["kinds"].items():
        old = percent(before[kind]["share"]) if kind in before else ""
        rows.append([kind, old, *(percent(figures[name]) for name in ("share", "majority", "text"))])
    return markdown_table(rows)


class Regression:
    """Multinomial logistic regression from the features of an example to its answer."""

    def __init__(self, train: Sequence[Example], dev: Sequence[Example], features: Features):
        """Train once for each weight decay; the best on the dev set is kept."""
        self.features = features
        self.known = {f: i for i, f in enumerate(sorted({f for e in train for f in features(e)}), 1)}
        self.answers = {a: i for i, a in enumerate(sorted({_answer(e) for e in train}))}
        rows, y = self._rows(train), torch.tensor([self.answers[_answer(e)] for e in train])
        weights = [self._fit(rows, y, decay) for decay in DECAYS]
        self.weight = max(weights, key=lambda weight: statistics.fmean(self.scores(dev, weight)))

    def scores(self, examples: Sequence[Example], weight: torch.Tensor | None = None) -> list[float]:
        """Score of the answer to each example."""
        names = list(self.answers)
        logits = F.embedding_bag(self._rows(examples), self.weight if weight is None else weight, mode="sum")
        return [e.labels.get(names[c], 0.0) for e, c in zip(examples, logits.argmax(1).tolist(), strict=True)]

    def _rows(self, examples: Sequence[Example]) -> torch.Tensor:
        """Numbers of each example's features, padded with the one that all have."""
        rows = [[0, *{self.known[f] for f in self.features(e) if f in self.known}] for e in examples]
        longest = max(map(len, rows))
        return torch.tensor([row + [len(self.known) + 1] * (longest - len(row)) for row in rows])

    def _fit(self, rows: torch.Tensor, y: torch.Tensor, decay: float) -> torch.Tensor:
        # the last row of the weights stands for padding and stays zero
        weight = torch.zeros(len(self.known) + 2, len(self.answers), requires_grad=True)
        optimizer = torch.optim.AdamW([weight], RATE, weight_decay=decay / RATE)
        steps = EPOCHS * -(-len(rows) // BATCH)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        generator = torch.Generator().manual_seed(0)
        for _ in range(EPOCHS):
            for part in torch.randperm(len(rows), generator=generator).split(BATCH):
                optimizer.zero_grad()
                logits = F.embedding_bag(rows[part], weight, mode="sum", padding_idx=len(self.known) + 1)
                F.cross_entropy(logits, y[part]).backward()
                optimizer.step()
                schedule.step()
        return weight.detach()


def _read(folder: Path, name: str, split: str, language: str) -> list[Example]:
    task = TASKS[name]
    return list(task.read(task.path(folder, split, language), split, language))


def _answer(example: Example) -> str:
    return max(example.labels, key=example.labels.get)  # type: ignore[arg-type]  # of a dict that is not empty


def _kinds(folder: Path, test: Sequence[Example], scores: Sequence[float]) -> dict[str, dict[str, float]]:
    """{type of question: its share, the accuracies of its most frequent answer and of the text alone}."""
    items = json.loads((folder / KINDS).read_text(encoding="utf-8"))
    groups: dict[str, list[tuple[str, float]]] = {}
    for example, score in zip(test, scores, strict=True):
        types = items[example.id]["types"]
        kind = types["structural"]
        # GQA's types, and what is special of ours
        if types["detailed"] != kind:
            kind += f": {types['detailed']}"
        groups.setdefault(kind, []).append((_answer(example), score))
    return {
        kind: {
            "share": len(group) / len(test),
            "majority": Counter(answer for answer, _ in group).most_common(1)[0][1] / len(group),
            "text": statistics.fmean(score for _, score in group),
        }
        for kind, group in sorted(groups.items())
    }


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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a folder of emoji scenes")
    parser.add_argument("--write", action="store_true", help="into every folder made with these settings")
    options = parser.parse_args(arguments)
    measured = measure(options.folder)
    if options.write:
        check_frozen(options.folder)
        settings = (options.folder / "settings.json").read_text(encoding="utf-8").strip()
        found = read_baselines() | {settings: measured["baselines"]}
        write_atomically(DATA / "baselines.json", json.dumps(found, indent=1) + "\n")
    print(table(measured), kinds_table(measured, {}), sep="\n\n")


if __name__ == "__main__":
    main()

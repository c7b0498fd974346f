"""Readers of a task's annotations, and of lexicons, dictionaries, translations and predictions."""

import json
from pathlib import Path
from typing import Any

from tests.fuzz.oracles import load_jsonl
from tests.fuzz.reader import Reader

XVNLI = [
    {
        "gold_label": label,
        "sentence1": "A man.",
        "sentence2": f"Ein Mann {number}.",
        "pairID": f"1.jpg#0r{number}n",
        "Flikr30kID": str(number),
    }
    for number, label in enumerate(("neutral", "entailment", "contradiction"))
]


def example_xvnli(folder: Path) -> Path:
    path = folder / "test.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in XVNLI), encoding="utf-8")
    return path


def read_xvnli(path: Path) -> Any:
    from finetune.formats.answers import read_xvnli

    return list(read_xvnli(path))


def load_xvnli(path: Path) -> Any:
    examples = []
    for record in load_jsonl(path):
        texts, images, label = (record["sentence2"],), (record["Flikr30kID"],), record["gold_label"]
        assert all(isinstance(text, str) for text in (*texts, *images, record["pairID"]))
        assert label in ("neutral", "entailment", "contradiction")
        examples.append([record["pairID"], texts, images, {label: 1.0}, "", (), "", (), ()])
    return examples


READERS = [
    Reader(
        name="xvnli",
        example=example_xvnli,
        read=read_xvnli,
        oracle=load_xvnli,
        covers=("finetune.formats.answers:read_xvnli", "raylib.textfile:open_text"),
    ),
]

"""Readers of what a run, a search and their configs are stored in."""

import json
from pathlib import Path
from typing import Any

from tests.fuzz.oracles import load_json
from tests.fuzz.reader import Reader


def example_meta(folder: Path) -> Path:
    path = folder / "meta.json"
    path.write_text(json.dumps({"step": 12, "workers": 1, "score": 0.5, "evaluation": {"loss": 1.25}}))
    return path


def read_object(path: Path) -> Any:
    from raylib.fileio import read_json_object

    return read_json_object(path, ("step", "workers"))


def load_object(path: Path) -> Any:
    values = load_json(path)
    assert isinstance(values, dict) and {"step", "workers"} <= values.keys()
    return values


READERS = [
    Reader(
        name="json_object",
        example=example_meta,
        read=read_object,
        oracle=load_object,
        covers=("raylib.fileio:read_json", "raylib.fileio:read_json_object"),
    ),
]

"""GQA and xGQA, in the official form and in LXMERT's, which VQA v2 uses too."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

from finetune.examples import Example
from finetune.formats.stream import field, first_character, read_items, score_of
from raylib.errors import UserError


def read_gqa(path: Path) -> Iterator[Example]:
    """{question id: {question, answer, imageId, types: {structural}}}, or [{question_id, sent, img_id, label:
    {answer: score}}]."""
    listed = first_character(path) == "["
    for key, record in read_items(path):
        where = f"{path}, {'item' if listed else 'question'} {key}"
        if not isinstance(record, dict):
            raise UserError(f"{where}: wanted an object, found {type(record).__name__}")
        if listed:
            labels = field(record, "label", dict, where) if "label" in record else {}
            text, image = field(record, "sent", str, where), field(record, "img_id", str, where)
            number = field(record, "question_id", (str, int), where)
            yield Example(str(number), (text,), (image,), {k: score_of(v, where) for k, v in labels.items()})
        else:
            text, image = field(record, "question", str, where), field(record, "imageId", str, where)
            answer = field(record, "answer", str, where)
            kind = record.get("types", {}).get("structural") or ""
            yield Example(key, (text,), (image,), {answer: 1.0}, kind)


def read_answers(path: Path) -> tuple[str, ...]:
    """The answer set in its order, from a JSON list, a JSON object {answer: number}, or the official pickles
    of either.

    Raises:
        UserError: none of these; numbers that are not 0 ... n - 1; a pickle that holds more than plain
            values.
    """
    try:
        with open(path, "rb") as file:
            values = _Plain(file).load() if path.suffix == ".pkl" else json.load(file)
    except (ValueError, pickle.UnpicklingError, EOFError) as e:
        raise UserError(f"{path}: no answer list ({e})") from None
    if isinstance(values, dict):
        if sorted(values.values()) != list(range(len(values))):
            raise UserError(f"{path}: the answers' numbers are not 0 ... {len(values) - 1}")
        values = sorted(values, key=values.get)
    if (
        not isinstance(values, list)
        or not all(isinstance(v, str) for v in values)
        or len(set(values)) < len(values)
    ):
        raise UserError(f"{path}: wanted a list of different answers, or an object of answers and numbers")
    return tuple(values)


class _Plain(pickle.Unpickler):
    """Admits lists, dicts, strings and numbers: nothing that could run."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it wants {module}.{name}, and only plain values are read")

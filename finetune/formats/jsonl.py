"""Any file of JSON lines: a record's options name its fields (docs/extending.md).

Split("shapes/{language}.jsonl", jsonl.read_examples, {"text": "question_{language}", "image": "file"})
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.formats import Captioned, Example
from finetune.formats.stream import get_field, parse_score, stream_jsonl
from raylib.errors import UserError


def read_examples(
    path: Path,
    text: str = "text",
    label: str = "label",
    image: str = "",
    premise: str = "",
    id: str = "",
    kind: str = "",
) -> Iterator[Example]:
    """Examples of a classification, a line each.

    Args:
        text, label: fields of the text and of its answer: one, a list of right ones, or {answer: score}. A
            line without the label has no answer.
        image: field of the image's name, or of a list of names; or two fields, "left|right". "": the texts
            are about no image.
        premise: field of the text that `text` is about.
        id: field that tells items apart and is the same in all languages; "": the number of the line.
        kind: field that results are broken down by.
    """
    for number, (where, record) in enumerate(stream_jsonl(path), 1):
        texts = [get_field(record, name, str, where) for name in (premise, text) if name]
        images: list[str] = []
        for name in image.split("|") if image else ():
            value = get_field(record, name, (str, int, list), where)
            images += map(str, value if isinstance(value, list) else [value])
        labels = _labels(record[label], f"{where}: field '{label}'") if label in record else {}
        item_id = str(get_field(record, id, (str, int), where)) if id else str(number)
        item_kind = str(get_field(record, kind, (str, int), where)) if kind else ""
        yield Example(item_id, tuple(texts), tuple(images), labels, item_kind)


def read_captions(path: Path, image: str = "image", text: str = "caption") -> Iterator[Captioned]:
    """Images of a retrieval task with their captions, a line each; lines about one image belong together.

    Args:
        image, text: fields of the image's name, and of its caption or a list of captions.
    """
    for where, record in stream_jsonl(path):
        captions = get_field(record, text, (str, list), where)
        captions = captions if isinstance(captions, list) else [captions]
        if not captions or not all(isinstance(c, str) and c.strip() for c in captions):
            raise UserError(f"{where}: field '{text}' wants a caption, or a list of them")
        yield Captioned(str(get_field(record, image, (str, int), where)), tuple(captions))


def _labels(value: Any, where: str) -> dict[str, float]:
    if isinstance(value, dict):
        return {str(answer): parse_score(score, where) for answer, score in value.items()}
    answers = value if isinstance(value, list) else [value]
    invalid = next((a for a in answers if not isinstance(a, str | int)), None)
    if invalid is not None:
        raise UserError(f"{where} is {invalid!r:.60}; wanted an answer, a list of them, or {{answer: score}}")
    return {str(answer): 1.0 for answer in answers}

"""Statements about two pictures: NLVR2 and MaRVL."""

from collections.abc import Iterator
from pathlib import Path

from finetune.examples import Example
from finetune.formats.stream import field, read_jsonl
from raylib.errors import UserError


def read_nlvr2(path: Path) -> Iterator[Example]:
    """JSON lines {sentence, identifier, label, left_url, right_url}; identifier "dev-12-0-1" has the pictures
    dev-12-0-img0 and -img1. The addresses tell which of these are one picture, and may be missing."""
    for where, record in read_jsonl(path):
        sentence, identifier = field(record, "sentence", str, where), field(record, "identifier", str, where)
        if identifier.count("-") != 3:
            raise UserError(f"{where}: identifier {identifier!r} is not split-set-pair-sentence")
        stem = identifier.rsplit("-", 1)[0]
        label = _label(field(record, "label", (str, bool), where), where)
        urls = tuple(field(record, side, str, where) for side in ("left_url", "right_url") if side in record)
        yield Example(
            identifier,
            (sentence,),
            (f"{stem}-img0", f"{stem}-img1"),
            label,
            sources=urls if len(urls) == 2 else (),
        )


def read_marvl(path: Path, language: str = "") -> Iterator[Example]:
    """JSON lines {caption, left_img, right_img, id, chapter, label}; broken down by chapter. Pictures of
    several languages have the same names: with `language`, each is looked for in the folder of this
    language."""
    for where, record in read_jsonl(path):
        names = (field(record, side, str, where) for side in ("left_img", "right_img"))
        images = tuple(f"{language}/{name}" if language else name for name in names)
        caption, number = field(record, "caption", str, where), field(record, "id", (str, int), where)
        label = _label(field(record, "label", (str, bool), where), where)
        yield Example(str(number), (caption,), images, label, record.get("chapter") or "")


def _label(label: str | bool, where: str) -> dict[str, float]:
    name = str(label).capitalize()
    if name not in ("True", "False"):
        raise UserError(f"{where}: label {label!r} is neither True nor False")
    return {name: 1.0}

"""Retrieval sets: pictures with captions in several languages, from shards or from a folder with `captions.json`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from raylib.data.source import Source
from raylib.errors import UserError


class Item(NamedTuple):
    """A picture: its name, its bytes, {language: captions}, and whether its concept was held out of training."""

    name: str
    picture: bytes
    captions: dict[str, list[str]]
    heldout: bool


def read_retrieval(folder: Path | str) -> Iterator[Item]:
    """Every picture of a retrieval set, in order.

    Raises:
        UserError: neither shards nor `captions.json`; a record without picture or captions (it is named).
    """
    folder = Path(folder)
    if (folder / "captions.json").is_file():
        return _from_folder(folder)
    if (folder / "manifest.json").is_file():
        return _from_shards(folder)
    raise UserError(f"{folder}: no retrieval set; give a folder with captions.json, or shards with manifest.json")


def _from_folder(folder: Path) -> Iterator[Item]:
    try:
        records = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{folder}/captions.json: not UTF-8 JSON ({e})") from None
    for i, record in enumerate(records):
        where = f"{folder}/captions.json, record {i}"
        if not isinstance(record, dict) or not isinstance(record.get("image"), str):
            raise UserError(f'{where}: wanted {{"image": PATH, "captions": {{LANGUAGE: TEXT}}}}')
        path = folder / record["image"]
        if not path.is_file():
            raise UserError(f"{where}: no picture {record['image']}")
        yield Item(record["image"], path.read_bytes(), _captions(record.get("captions"), where), bool(record.get("heldout")))


def _from_shards(folder: Path) -> Iterator[Item]:
    source = Source(folder, kind="image_text")
    for language in source.groups:
        for number in range(source.size(language)):
            sample = source.sample(language, number)
            where = f"{folder}, sample {sample.key}"
            pictures = [name for name in sample.members if name not in ("json", "txt")]
            if not pictures or "json" not in sample.members:
                raise UserError(f"{where}: wanted a picture and a .json with its captions")
            record = json.loads(sample.read("json"))
            captions = _captions(record.get("captions"), where)
            yield Item(sample.key, sample.read(pictures[0]), captions, bool(record.get("heldout")))


def _captions(captions, where: str) -> dict[str, list[str]]:
    if not isinstance(captions, dict) or not captions:
        raise UserError(f"{where}: no captions")
    out = {}
    for language, texts in captions.items():
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise UserError(f"{where}: an empty caption in '{language}'; leave the language out instead")
        out[language] = texts
    return out

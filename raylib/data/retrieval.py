"""Retrieval sets: pictures with captions in several languages, from shards or from a folder with
`captions.json`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from raylib.data.shards import index_command
from raylib.data.sources import Source
from raylib.errors import UserError
from raylib.fileio import find_file
from raylib.text import BadCaption, EmptyCaption, clean_captions, is_language_code, parse_captions


class Item(NamedTuple):
    """A picture (of several drawings the first, by extension): its name, its bytes, {language: captions}, and
    whether its concept was held out of training."""

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
    raise UserError(
        f"{folder}: no retrieval set; give a folder with captions.json, or shards with manifest.json "
        f"(`{index_command(folder, 'image_text')}` makes one for tars)"
    )


def _from_folder(folder: Path) -> Iterator[Item]:
    try:
        records = json.loads((folder / "captions.json").read_text(encoding="utf-8-sig"))
    except ValueError as e:
        raise UserError(f"{folder}/captions.json: not UTF-8 JSON ({e})") from None
    for i, record in enumerate(records):
        where = f"{folder}/captions.json, record {i}"
        if not isinstance(record, dict) or not isinstance(record.get("image"), str):
            raise UserError(f'{where}: wanted {{"image": PATH, "captions": {{LANGUAGE: TEXT}}}}')
        path = find_file(folder, record["image"])
        if path is None:
            raise UserError(f"{where}: no picture {record['image']}")
        try:
            captions = parse_captions(record, None)
        except BadCaption as error:
            raise UserError(f"{where}: {error}") from error
        if not captions:
            raise UserError(f"{where}: no captions")
        yield Item(record["image"], path.read_bytes(), _clean(captions, where), bool(record.get("heldout")))


def _from_shards(folder: Path) -> Iterator[Item]:
    source = Source(folder, kind="image_text")
    for language in source.groups:
        for number in range(source.size(language)):
            sample = source.sample(language, number)
            if not sample.images:
                raise UserError(sample.describe("no image"))
            try:
                captions = _clean(sample.captions(), sample.name)
                held_out = bool(sample.record().get("heldout"))
            except BadCaption as error:
                raise UserError(sample.describe(error)) from error
            yield Item(sample.key, sample.read(sample.images[0]), captions, held_out)


def _clean(captions: dict[str, Any], where: str) -> dict[str, list[str]]:
    """Captions of an item in every language; no blank is left out here, since each caption is a query."""
    out = {}
    for language, texts in captions.items():
        if not is_language_code(language):
            raise UserError(
                f"{where}: captions in {language!r}, which is no language code such as 'de' or 'zh-Hans'"
            )
        try:
            out[language] = clean_captions(texts)
            if not isinstance(texts, str) and len(out[language]) < len(texts):
                raise EmptyCaption
        except EmptyCaption:
            raise UserError(
                f"{where}: an empty caption in {language!r}; leave the language out instead"
            ) from None
        except BadCaption as error:
            raise UserError(f"{where}: {error} in {language!r}") from error
    return out

"""Test items that are translations of each other: the same id and pictures in every language."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from finetune.build import read_split, test_split
from finetune.config import FinetuneConfig
from finetune.formats.examples import Captioned, Example
from raylib.randomness import string_key


class Parallel(NamedTuple):
    """`items`: a few, each in every one of `languages`; `found`: how many there are; `left_out`: of each
    language, how many of its items are not in all."""

    languages: tuple[str, ...]
    items: list[tuple[Example, ...]]
    found: int
    left_out: dict[str, int]


def read_parallel(
    config: FinetuneConfig, languages: Sequence[str], limit: int, wanted: str | None = None
) -> Parallel:
    """Up to `limit` of the test items that are in all `languages`, drawn by a hash of their ids: the same
    each time.

    Of retrieval, an item is a picture with its first caption in each language, and its id is the picture's.
    `wanted`: the id of the only item that counts. Memory grows with `limit`, and by an integer an item.
    """
    counts, common = {}, None
    for code in languages:
        keys = {_key(example) for example in _read(config, code) if wanted in (None, example.id)}
        counts[code] = len(keys)
        common = keys if common is None else common & keys
    chosen = {key: i for i, key in enumerate(sorted(common or ())[:limit])}
    rows: list[dict[str, Example]] = [{} for _ in chosen]
    for code in languages:
        for example in _read(config, code):
            if (place := chosen.get(_key(example))) is not None:
                rows[place].setdefault(code, example)
    items = [tuple(row[code] for code in languages) for row in rows]
    found = len(common or ())
    return Parallel(tuple(languages), items, found, {code: n - found for code, n in counts.items()})


def _read(config: FinetuneConfig, language: str) -> Iterator[Example]:
    for item in read_split(config, test_split(config, language), language, config.test_limit):
        if isinstance(item, Captioned):
            yield Example(item.image, (item.captions[0],), (item.image,), {})
        else:
            yield item


def _key(example: Example) -> int:
    return string_key("\t".join((example.id, *example.images)))

"""Corpora -> the sources that training reads. `formats` has the formats of the files.

    python -m pretrain.corpora OUT --tokenizer FILE --image-text FILE ... --parallel de=FILE ...
                               --text de=FILE ...

Everything streams. Each file's good and bad samples are counted, one log line a file.
"""

import argparse
import itertools
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from pretrain.formats import LIMIT, Tally, read_image_text, read_pairs, read_text
from raylib.command import entry_point
from raylib.data.shards import ShardWriter
from raylib.errors import UserError
from raylib.text import Tokenizer, is_language_code

BATCH = 4096  # sentences tokenised at a time


class ImageText(NamedTuple):
    """A picture in one or more drawings, {extension: bytes}, with {language: captions} and what else its JSON
    tells."""

    key: str
    pictures: dict[str, bytes]
    captions: dict[str, list[str]]
    facts: Mapping = MappingProxyType({})


def write_image_text(folder: Path, samples: Iterable[ImageText], language: str = "en", **limits) -> None:
    """Write an image_text source; `limits` as in ShardWriter."""
    with ShardWriter(folder, "image_text", **limits) as writer:
        for sample in samples:
            record = {"captions": sample.captions, **sample.facts}
            members = {"json": json.dumps(record, ensure_ascii=False).encode(), **sample.pictures}
            writer.write(sample.key, members, language)
            writer.images.update(sample.pictures)


def write_packed(folder: Path, kind: str, tokenizer: Tokenizer, rows: Mapping[str, Iterable]) -> None:
    """Write a text or parallel source of {language: rows of ids}, as `encode` makes them."""
    with ShardWriter(folder, kind, tokenizer) as writer:
        for language, encoded in rows.items():
            writer.write_rows(language, encoded if kind == "parallel" else (ids for (ids,) in encoded))


def encode(
    texts: Iterable[tuple[str, ...]], tokenizer: Tokenizer, tally: Tally
) -> Iterator[tuple[np.ndarray, ...]]:
    """Ids of (sentence,) or (English, other). A side without any token (zero-width characters alone) is a bad
    sample."""
    texts = iter(texts)
    while batch := list(itertools.islice(texts, BATCH)):
        for row in zip(*(tokenizer.encode(side) for side in zip(*batch, strict=True)), strict=True):
            if all(ids.size for ids in row):
                tally.good += 1
                yield row
            else:
                tally.skip("sentences without a token")


def prepare(
    out: Path | str,
    tokenizer: Path | str,
    image_text: Iterable[Path | str] = (),
    parallel: Mapping[str, Iterable[Path | str]] | None = None,
    text: Mapping[str, Iterable[Path | str]] | None = None,
    image_size: int | None = None,
    limit: float = LIMIT,
) -> None:
    """Write `out`/image_text, `out`/parallel, `out`/text (those that are asked for) and a copy of the
    tokenizer.

    Args:
        parallel, text: {language: files}.
        image_size: pictures whose shorter side is longer (pixels) are shrunk to it; None keeps the files'
        bytes. limit: share of bad samples in a file that is still normal.

    Raises UserError: unreadable or cut file, unknown format, too many bad samples, no samples; nothing to
    read; a language that cannot name a shard.
    """
    _check_languages(parallel or {}, text or {})
    image_text = list(image_text)
    if not (image_text or parallel or text):
        raise UserError(f"nothing to write to {out}: give image-text, parallel or text files")
    out, model = Path(out), Tokenizer.load(tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    copy = out / model.path.name
    if copy.resolve() != model.path.resolve():
        shutil.copyfile(model.path, copy)
    if image_text:
        found = _samples(image_text, limit, lambda path, tally: read_image_text(path, tally, image_size))
        items = (
            ImageText(f"{row:09d}", pictures, {"en": texts}) for row, (pictures, texts) in enumerate(found)
        )
        write_image_text(out / "image_text", items)
    for kind, files, read in (("parallel", parallel, read_pairs), ("text", text, read_text)):
        if files:
            rows = {language: _rows(paths, limit, read, language, model) for language, paths in files.items()}
            write_packed(out / kind, kind, model, rows)


def _check_languages(parallel: Mapping, text: Mapping) -> None:
    for language in (*parallel, *text):
        if not is_language_code(language):
            raise UserError(
                f"language {language!r}: wanted a code like 'de' or 'zh-Hans', it names the shards"
            )
    if "en" in parallel:
        raise UserError("parallel files are English and another language: name the other one, not 'en'")


def _samples(files: Iterable[Path | str], limit: float, read: Callable[[Path, Tally], Iterator]) -> Iterator:
    for path in map(Path, files):
        tally = Tally(path, limit)
        yield from read(path, tally)
        tally.close()


def _rows(
    files: Iterable[Path | str], limit: float, read: Callable, language: str, tokenizer: Tokenizer
) -> Iterator:
    return _samples(files, limit, lambda path, tally: encode(read(path, tally, language), tokenizer, tally))


@entry_point()
def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.corpora", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--tokenizer", required=True, help="SentencePiece model or tokenizer.json, or its folder"
    )
    parser.add_argument("--image-text", nargs="+", action="extend", default=[], metavar="FILE")
    for stream in ("--parallel", "--text"):
        parser.add_argument(stream, nargs="+", action="extend", default=[], metavar="LANGUAGE=FILE")
    parser.add_argument("--image-size", type=int, help="shrink pictures to this shorter side, in pixels")
    parser.add_argument(
        "--limit", type=float, default=LIMIT, help="share of bad samples that is still normal"
    )
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    streams: dict[str, dict[str, list[str]]] = {"parallel": {}, "text": {}}
    for stream, files in streams.items():
        for pair in getattr(given, stream):
            language, found, path = pair.partition("=")
            if not found:
                parser.error(f"--{stream} {pair}: wanted LANGUAGE=FILE")
            files.setdefault(language, []).append(path)
    prepare(
        given.out,
        given.tokenizer,
        given.image_text,
        **streams,
        image_size=given.image_size,
        limit=given.limit,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

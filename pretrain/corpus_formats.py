"""The field's formats, read as streams: images with captions, sentence pairs, text.

  image-text   .json   ALBEF's list [{"image": path, "caption": text or list}, ...]
               .jsonl  CCLM's lines {"binary": base64 or path, "caption": text, list or {language: text or
                       list}}
               Images lie below a folder, the file's where none is given (a link may lead there); paths are
               relative to it, or absolute. Captions are English; of a {language: ...} only "en" is read.
               They may be called otherwise: see `raylib.data.sources`.
  parallel     WikiMatrix's lines margin<TAB>source<TAB>target, those below the margin left out; or plain
               lines English<TAB>other. A name like "WikiMatrix.de-en.tsv.gz" says which column is English,
               else the first is.
  text         CC-100's: a paragraph a line (one sample each), blank lines between documents.

Text files may end in .gz or .xz. A bad sample (an image that is missing or does not decode, an empty
caption, text that is not UTF-8) is skipped and counted by a `Tally`: one in a hundred is normal in millions,
more is an error.
"""

import itertools
import json
import logging
import os
import re
from codecs import EncodedFile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2

from raylib.data.images import BadImage, decode_image, read_image_file
from raylib.display import file_progress
from raylib.errors import UserError
from raylib.fileio import decode_base64, find_file
from raylib.settings import MAX_PIXELS
from raylib.text import BadCaption, clean_captions, parse_captions
from raylib.textfile import open_bytes, stream_json

MARGIN = 1.04  # WikiMatrix's usual threshold
PEEK = 100  # lines that tell the number of columns
LIMIT = 0.01  # share of bad samples that is still normal
IMAGE_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp"}  # first bytes -> extension

OUTSIDE = "images outside of the folder that they are looked for in (give another: --images FOLDER)"

log = logging.getLogger(__name__)


class BadSample(Exception):
    """One sample of many is unusable; the message, a plural noun, is what the log counts."""


class Tally:
    """Counts the good and the bad samples of one file. `close` raises UserError when more than `limit` were
    bad."""

    def __init__(self, path: Path | str, limit: float = LIMIT):
        self.path, self.limit, self.good = path, limit, 0
        self.bad: Counter[str] = Counter()

    def skip(self, reason: str) -> None:
        self.bad[reason] += 1
        if self.bad.total() > max(10_000, 2 * self.good):  # mostly bad: no need to read it to its end
            self.close()

    def close(self) -> None:
        bad, total = self.bad.total(), self.good + self.bad.total()
        counts = "".join(f", {count} {reason}" for reason, count in self.bad.items())
        line = f"{self.path}: {self.good} samples, {bad} skipped{counts}"
        if bad > self.limit * total:
            raise UserError(f"{line}; that is more than {self.limit:.1%}: mend the file or raise the limit")
        if not total:
            raise UserError(f"{self.path}: no sample in it")
        log.info(line)


def read_image_text(
    path: Path,
    tally: Tally,
    size: int | None = None,
    images: Path | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[tuple[dict[str, bytes], list[str]]]:
    """({extension: image}, English captions) of every good record of an ALBEF list or a CCLM file. images:
    the folder below which images lie; else the file's."""
    readers = {".json": (read_json_list, "image"), ".jsonl": (read_json_lines, "binary")}
    if path.suffix not in readers:
        raise UserError(
            f"{path}: not an image-text file; .json (ALBEF's list) and .jsonl (CCLM's lines) are read"
        )
    read, field = readers[path.suffix]
    for record in read(path, tally):
        try:
            captions = _english(record)
            image = _shrink(_load(record.get(field), images or path.parent), size, max_pixels)
        except BadSample as error:
            tally.skip(str(error))
        else:
            tally.good += 1
            yield image, captions


def read_pairs(path: Path, tally: Tally, language: str, margin: float = MARGIN) -> Iterator[tuple[str, str]]:
    """(English, `language`) of every good line. The rule is the number of columns, three (with a margin) or
    two, that most of the first `PEEK` lines have."""
    named = re.search(r"(?:^|[._])([a-z]{2,3})-([a-z]{2,3})\.tsv(?:\.gz|\.xz)?$", path.name)
    codes = named.groups() if named and "en" in named.groups() else ("en", language)
    if set(codes) != {"en", language}:
        raise UserError(f"{path}: named for {'-'.join(codes)} but given as the file of {language!r}")
    lines = read_lines(path, tally)
    head = list(itertools.islice(lines, PEEK))
    counts = Counter(count for line in head if (count := line.count("\t") + 1) in (2, 3))
    num_columns = max(counts, key=counts.__getitem__, default=2)
    for line in itertools.chain(head, lines):
        columns = [column.strip() for column in line.split("\t")]
        if len(columns) != num_columns:
            tally.skip(f"lines without {num_columns} columns")
            continue
        try:
            if num_columns == 3 and not float(columns.pop(0)) >= margin:
                continue
        except ValueError:
            tally.skip("lines whose margin is no number")
            continue
        if all(columns):
            yield (columns[0], columns[1]) if codes[0] == "en" else (columns[1], columns[0])
        else:
            tally.skip("empty sentences")


def read_text(path: Path, tally: Tally, language: str = "") -> Iterator[tuple[str]]:
    """Every paragraph."""
    for line in read_lines(path, tally):
        if paragraph := line.strip():
            yield (paragraph,)


def read_lines(path: Path, tally: Tally) -> Iterator[str]:
    """Lines of a UTF-8 file, also .gz and .xz, without their ends and a byte order mark."""
    with open_bytes(path, has_lines=True) as (file, stored):
        for number, line in enumerate(file_progress(stored, file, f"read {path.name}")):
            try:
                text = line.decode("utf-8" if number else "utf-8-sig").rstrip("\r\n")
            except UnicodeDecodeError:
                tally.skip("lines that are not UTF-8")
                continue
            if "\0" in text:
                tally.skip("lines with zero bytes")
            else:
                yield text


def read_json_lines(path: Path, tally: Tally) -> Iterator[dict]:
    """Records of a file with one JSON object a line."""
    for line in read_lines(path, tally):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            yield record
        elif line.strip():
            tally.skip("lines that are no JSON object")


def read_json_list(path: Path, tally: Tally) -> Iterator[dict]:
    """Records of a JSON list of objects, a chunk of the file in memory at a time."""
    with open_bytes(path, is_text=True) as (content, stored):
        # bytes that are not UTF-8 become U+FFFD, and so spoil their own record only
        records = stream_json(path, EncodedFile(content, "utf-8", errors="replace"), "")
        for _, record in file_progress(stored, records, f"read {path.name}"):
            if not isinstance(record, dict):
                tally.skip("records that are no JSON object")
            elif _is_damaged(record):
                tally.skip("captions that are not UTF-8")
            else:
                yield record


def _is_damaged(record: dict) -> bool:
    try:
        return "\ufffd" in str(record)
    except RecursionError:
        return True


def _english(record: dict) -> list[str]:
    try:
        captions = parse_captions(record, "en")
        if "en" not in captions:
            raise BadSample("records without an English caption")
        return clean_captions(captions["en"])
    except BadCaption as error:
        raise BadSample(str(error)) from error


def _load(image: Any, folder: Path) -> bytes:
    """The bytes of an image that is a path below `folder` or base64."""
    if not isinstance(image, str):
        raise BadSample("images that are missing")
    if file := find_file(folder, image):
        try:
            return read_image_file(file)
        except BadImage:
            raise BadSample("images that are too large") from None
    try:
        return decode_base64(image)
    except ValueError:
        is_outside = os.path.isabs(image) or image.startswith("..")
        raise BadSample(OUTSIDE if is_outside else "images that are missing") from None


def _shrink(data: bytes, size: int | None, max_pixels: int) -> dict[str, bytes]:
    """{extension: bytes} of an image that decodes; as JPEG where it is too large, or no JPEG, PNG or
    WebP."""
    try:
        image = decode_image(data, max_pixels=max_pixels)
    except BadImage:
        raise BadSample("images that do not decode") from None
    extension = next((name for start, name in IMAGE_MAGIC.items() if data.startswith(start)), None)
    scale = size / min(image.shape[:2]) if size else 1.0
    if scale < 1:
        width, height = (round(side * scale) for side in image.shape[1::-1])
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    elif extension:
        return {extension: data}
    jpeg = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
    return {"jpg": jpeg.tobytes()}

"""JSON files an item at a time: memory does not grow with the file. Names ending in .gz are decompressed; of
a .zip, its one JSON file is read as it lies."""

import gzip
import io
import json
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from raylib.errors import UserError
from raylib.fileio import CHUNK, stream_json
from raylib.finite import is_finite


def open_text(path: Path) -> TextIO:
    """A UTF-8 text file.

    Raises:
        UserError: a .zip that holds no JSON file, or several.
    """
    if path.suffix == ".zip":
        return _open_member(path)
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8")


def _open_member(path: Path) -> TextIO:
    """The one JSON file in a zip; what macOS adds (`__MACOSX/._NAME`) is no member."""
    with zipfile.ZipFile(path) as archive:  # a member that is open keeps the file open
        members = [name for name in archive.namelist() if name.lower().endswith((".json", ".jsonl"))]
        members = [
            name
            for name in members
            if not any(p == "__MACOSX" or p.startswith(".") for p in PurePosixPath(name).parts)
        ]
        if len(members) != 1:
            found = f"{len(members)} JSON files ({', '.join(members[:4])})" if members else "no JSON file"
            raise UserError(f"{path}: {found} in it; one is wanted: unzip it beside, or leave one in")
        try:
            return io.TextIOWrapper(archive.open(members[0]), encoding="utf-8")
        except (RuntimeError, NotImplementedError) as e:  # a password, a way of compression that Python lacks
            raise UserError(f"{path}: not to be decompressed ({e}); unzip it beside") from None


@contextmanager
def opened(path: Path) -> Iterator[TextIO]:
    """`open_text`, and what is wrong with the file, now or while it is read, as a `UserError` that names
    it."""
    try:
        with open_text(path) as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text ({e})") from None
    except (gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as e:
        raise UserError(f"{path}: not to be decompressed ({e}); is it whole?") from None
    except OSError as e:  # a folder, no right to read it, a fault of the disk
        raise UserError(f"{path}: not to be read ({e.strerror or e})") from None


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """("path:line", text) of every line that is not empty.

    Raises:
        UserError: no such file, not UTF-8, not to be decompressed.
    """
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", line.rstrip("\r\n")


def read_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    """("path:line", record) of a file with a JSON object a line."""
    for where, line in read_lines(path):
        try:
            record = json.loads(line)
        except ValueError as e:
            raise UserError(f"{where}: no JSON ({e})") from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: wanted a JSON object, found {type(record).__name__}")
        yield where, record


def read_items(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, value) of each member of the one JSON object or array in a file, as it is read; `where` names
    the key, or the place in the array.

    Raises:
        UserError: neither, or broken; says after which member.
    """
    with opened(path) as file:
        yield from stream_json(path, file)


def read_listed(path: Path, name: str) -> Iterator[tuple[str, dict]]:
    """(where, record) of the list `name` in the JSON object of a file, as it is read.

    Raises:
        UserError: no such list, or broken; says after which member.
    """
    with opened(path) as file:
        for number, record in stream_json(path, file, name):
            yield f"{path}, {name}[{number}]", record


def first_character(path: Path) -> str:
    """The first character that is no white space: "{" or "[" tells an object from an array."""
    with opened(path) as file:
        while chunk := file.read(CHUNK):
            if chunk.strip():
                return chunk.strip()[0]
    return ""


def field(record: dict, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """`record[name]`.

    Raises:
        UserError: missing, or of another type; names file, line or key, and field.
    """
    if name not in record:
        raise UserError(f"{where}: no field '{name}'; it has {', '.join(sorted(record))}")
    if not isinstance(record[name], kind):
        raise UserError(f"{where}: field '{name}' is {type(record[name]).__name__}, {record[name]!r:.60}")
    return record[name]


def score_of(value: Any, where: str) -> float:
    """Return an answer's score as a float.

    Raises:
        UserError: no number, or none that is finite; Python's JSON reads NaN and Infinity too.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not is_finite(value):
        raise UserError(f"{where}: the score {value!r:.60} of an answer is no finite number")
    return float(value)

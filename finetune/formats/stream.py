"""Read annotation files an item at a time: memory does not grow with the file. Each item comes with where it
stands, for errors."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raylib.errors import UserError
from raylib.fileio import CHUNK, open_text, stream_json
from raylib.finite import is_finite


def stream_lines(path: Path) -> Iterator[tuple[str, str]]:
    """("path:line", text) of every line that is not empty.

    Raises:
        UserError: no such file, not UTF-8, not to be decompressed.
    """
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", line.rstrip("\r\n")


def stream_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    """("path:line", record) of a file with a JSON object a line."""
    for where, line in stream_lines(path):
        try:
            record = json.loads(line)
        except ValueError as e:
            raise UserError(f"{where}: no JSON ({e})") from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: wanted a JSON object, found {type(record).__name__}")
        yield where, record


def stream_members(path: Path) -> Iterator[tuple[str, str, Any]]:
    """("path, member KEY", key, value) of each member of the one JSON object in a file, as it is read; of an
    array, a key is the place.

    Raises:
        UserError: neither, or broken; says after which member.
    """
    with open_text(path) as file:
        for key, value in stream_json(path, file):
            yield f"{path}, member {key}", key, value


def stream_list(path: Path, name: str = "") -> Iterator[tuple[str, dict]]:
    """("path, name[place]", record) of the list `name` in the JSON object of a file, or of the one array that
    a file is, as it is read.

    Raises:
        UserError: no such list, or broken (says after which member); a member that is no object.
    """
    with open_text(path) as file:
        for number, record in stream_json(path, file, name or None):
            where = f"{path}, {name}[{number}]" if name else f"{path}, item {number}"
            if not isinstance(record, dict):
                raise UserError(f"{where}: wanted a JSON object, found {type(record).__name__}")
            yield where, record


def first_character(path: Path) -> str:
    """The first character that is no white space: "{" or "[" tells an object from an array."""
    with open_text(path) as file:
        while chunk := file.read(CHUNK):
            if chunk.strip():
                return chunk.strip()[0]
    return ""


def get_field(record: dict, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """`record[name]`.

    Raises:
        UserError: missing, or of another type; names file, line or key, and field.
    """
    if name not in record:
        raise UserError(f"{where}: no field '{name}'; it has {', '.join(sorted(record))}")
    if not isinstance(record[name], kind):
        raise UserError(f"{where}: field '{name}' is {type(record[name]).__name__}, {record[name]!r:.60}")
    return record[name]


def parse_score(value: Any, where: str) -> float:
    """Return an answer's score as a float.

    Raises:
        UserError: no number, or none that is finite; Python's JSON reads NaN and Infinity too.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not is_finite(value):
        raise UserError(f"{where}: the score {value!r:.60} of an answer is no finite number")
    return float(value)

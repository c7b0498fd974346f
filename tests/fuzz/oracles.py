"""Readings that several records share, by other means than the product's; and how they write examples."""

import gzip
import io
import json
import lzma
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def load_json(data: Path | bytes, finite: bool = True) -> Any:
    """JSON in UTF-8, -16 or -32, as the standard library reads it; a key twice in an object with
    different values, and, where it must be `finite`, a number that is not, are refused, as the product
    refuses them."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        assert all(repr(found[key]) == repr(value) for key, value in pairs), "a key twice"
        return found

    def number(text: str) -> float:
        value = float(text)
        assert not finite or abs(value) < float("inf"), f"{text} is not finite"
        return value

    raw = data if isinstance(data, bytes) else data.read_bytes()
    return json.loads(raw, object_pairs_hook=once, parse_float=number, parse_constant=number)


def write_files(files: Mapping[str, str | bytes]) -> Callable[[Path], Path]:
    """An `example` of these files: of one, it is what is read; of several, their folder, `data`."""

    def example(folder: Path) -> Path:
        (folder / "data").mkdir()
        for name, content in files.items():
            path = folder / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return folder / "data" / next(iter(files)) if len(files) == 1 else folder / "data"

    return example


def dump_lines(*records: Any) -> str:
    """JSON lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def zip_of(name: str, content: str) -> bytes:
    """A zip of one file."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


def load_text(path: Path) -> str:
    """UTF-8 with or without its mark, out of a .gz, an .xz, or the one JSON file of a .zip."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    elif path.suffix == ".xz":
        data = lzma.decompress(data)
    elif path.suffix == ".zip":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            (name,) = [name for name in archive.namelist() if name.lower().endswith((".json", ".jsonl"))]
            data = archive.read(name)
    return data.decode("utf-8-sig")


def load_lines(path: Path) -> list[str]:
    """Lines of a text that are not blank, without their ends; a line ends as in Python's text files."""
    return [line.rstrip("\r\n") for line in io.StringIO(load_text(path), newline=None) if line.strip()]


def load_records(path: Path) -> list[dict[str, Any]]:
    """The objects of JSON lines; of a key twice the last counts."""
    records = [json.loads(line) for line in load_lines(path)]
    assert all(type(record) is dict for record in records)
    return records


def load_pairs(path: Path) -> list[tuple[str, Any]]:
    """The members of a JSON object; a key may come twice."""
    pairs: list = []

    def keep(found: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal pairs
        pairs = found  # the outermost object comes last
        return dict(found)

    assert type(json.loads(load_text(path), object_pairs_hook=keep)) is dict
    return pairs


def typed(record: dict[str, Any], key: str, *kinds: type) -> Any:
    """`record[key]`, which is exactly of one of these types."""
    assert type(record[key]) in kinds, f"{key}: {record[key]!r}"
    return record[key]


def has_shape(value: Any, shape: Any) -> bool:
    """Tell whether a JSON value has the types of `shape`: a type, or several in a tuple; [shape] a list of
    such, {str: shape} an object of such, {"name": shape, "name?": shape} one with, and perhaps with, these. A
    float may be an int; a bool is none."""
    if isinstance(shape, tuple):
        return any(has_shape(value, one) for one in shape)
    if isinstance(shape, list):
        return type(value) is list and all(has_shape(one, shape[0]) for one in value)
    if isinstance(shape, dict):
        if type(value) is not dict:
            return False
        if str in shape:
            return all(has_shape(one, shape[str]) for one in value.values())
        return all(
            has_shape(value[name.rstrip("?")], inner) if name.rstrip("?") in value else name.endswith("?")
            for name, inner in shape.items()
        )
    if shape is None or shape is Any:
        return value is None or shape is Any
    return type(value) is shape or (shape is float and type(value) is int)


def is_plain_name(name: Any) -> bool:
    """Tell whether a name can only be that of something in its folder."""
    return type(name) is str and name not in ("", ".", "..") and not {"/", "\0"} & set(name)


def open_picture(data: bytes) -> Any:
    """Decode an image by Pillow, whole. Texts in a PNG, which may fill the memory, are none of its pixels:
    they are renamed to what is no text, and their checksum set right."""
    from PIL import Image

    start = 8
    while data[:4] == b"\x89PNG" and start + 12 <= len(data):
        end = start + 8 + int.from_bytes(data[start : start + 4])
        if data[start + 4 : start + 8] in (b"zTXt", b"iTXt", b"iCCP") and end + 4 <= len(data):
            body = b"prVt" + data[start + 8 : end]
            data = data[: start + 4] + body + zlib.crc32(body).to_bytes(4) + data[end + 4 :]
        start = end + 4
    if data.startswith(b"RIFF"):  # a WebP ends where it says; Pillow stumbles over bytes behind it
        data = data[: 8 + int.from_bytes(data[4:8], "little")]
    image = Image.open(io.BytesIO(data))
    image.load()
    return image

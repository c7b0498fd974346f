"""Damage that keeps a file's form: other values in headers; where the parts of a file end."""

import contextlib
import json
import pickletools
import re
import struct
import zlib
from collections.abc import Callable
from random import Random

from tests.fuzz import bombs
from tests.fuzz.archives import ZIP, h5_datasets, is_tar, lmdb_value, tar_members, zip_members
from tests.fuzz.texts import is_text, json_tree, text_lines, text_words, yaml_tags

NPY, PNG = b"\x93NUMPY", b"\x89PNG"
SHAPES = (
    "()",
    "(0,)",
    "(-1,)",
    "(1, 0)",
    "(10000000000,)",
    "(4611686018427387904, 4)",
    "(3,)",
    "(2, 2)",
    "x",
    "(1.5,)",
)
TYPES = (
    "<f4",
    "<f8",
    "<f2",
    ">f4",
    "|O",
    "|b1",
    "<i8",
    "<u4",
    "<U1000000",
    "|V0",
    "|S0",
    "<M8[ns]",
    "<c16",
    "x",
)


def is_safetensors(data: bytes) -> bool:
    return data[8:9] == b"{" and len(data) >= 8 + int.from_bytes(data[:8], "little")


def is_pickle(data: bytes) -> bool:
    return data[:1] == b"\x80" and data[-1:] == b"." and data[1:2] in b"\2\3\4\5"


def boundaries(data: bytes) -> list[int]:
    """Where parts of a file begin and end: what a writer that stops leaves."""
    places = {0, 1, 2, 4, 8, 16, 64, len(data) - 1, len(data) - 2, len(data) // 2}
    places |= {1 << power for power in range(len(data).bit_length())}
    if is_tar(data):
        places |= {*range(0, len(data), 512)}
    if data[:4] == ZIP:
        places |= {found.start() for found in re.finditer(rb"PK(\x01\x02|\x03\x04|\x05\x06)", data)}
    if is_safetensors(data):
        places.add(8 + int.from_bytes(data[:8], "little"))
    if data[:6] == NPY:
        places.add(10 + int.from_bytes(data[8:10], "little"))
    if is_pickle(data):
        with contextlib.suppress(Exception):
            places |= {position for _, _, position in pickletools.genops(data) if position is not None}
    if is_text(data):
        places |= {found.end() for found in re.finditer(rb"[\n\t{}\[\]:,\"]", data[:50_000])}
    return sorted(places)


def npy_header(data: bytes, rng: Random) -> bytes | None:
    """Another shape, type or order in a .npy."""
    if data[:6] != NPY:
        return None
    end = 10 + int.from_bytes(data[8:10], "little")
    header, act = data[10:end].decode("latin-1"), rng.randrange(6)
    if act < 2:
        header = re.sub(r"\(.*\)", rng.choice(SHAPES), header)
    elif act < 4:
        header = re.sub(r"'descr': '[^']*'", f"'descr': '{rng.choice(TYPES)}'", header)
    elif act == 4:
        header = header.replace("False", rng.choice(("True", "None", "[]")))
    else:
        header = rng.choice(
            ("[" * 3000, "{" + "'a': 1, " * 2000 + "}", "__import__('os')", "{}", header * 20)
        )
    raw = header.rstrip().encode() + b"\n"
    return data[:8] + (len(raw) & 0xFFFF).to_bytes(2, "little") + raw + data[end:]


def safetensors_header(data: bytes, rng: Random) -> bytes | None:
    """Other names, types, shapes and offsets in the header of a .safetensors."""
    if not is_safetensors(data):
        return None
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    names = [name for name in header if name != "__metadata__"]
    act = rng.randrange(8)
    entry = header[rng.choice(names)] if names else {}
    if act == 0:
        entry["dtype"] = rng.choice(("F16", "BF16", "F64", "I64", "I8", "BOOL", "U8", "F8_E4M3", "x"))
    elif act == 1:
        entry["shape"] = rng.choice(
            ([], [0], [1], [2**40], [-1], [entry.get("shape", [])], entry.get("shape", [])[::-1])
        )
    elif act == 2:
        entry["data_offsets"] = rng.choice(([0, 0], [0, 2**62], [8, 0], [0, len(data) - end], [1, 5]))
    elif act == 3 and names:
        del header[rng.choice(names)]
    elif act == 4:
        header["__metadata__"] = rng.choice(
            (None, {}, {"a": 1}, {"a": "b"}, [], {"shapes": "[", "unknown": "{"})
        )
    elif act == 5 and names:
        name = rng.choice(names)
        header[rng.choice(("", "x", "../a", name.upper(), "a" * 5000, "a\nb"))] = header.pop(name)
    else:
        return json_head(data, rng)
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + data[end:]


def json_head(data: bytes, rng: Random) -> bytes | None:
    """Another tree in a header of JSON behind its size."""
    end = 8 + int.from_bytes(data[:8], "little")
    raw = json_tree(data[8:end], rng)
    return None if raw is None else len(raw).to_bytes(8, "little") + raw + data[end:]


def pickle_opcodes(data: bytes, rng: Random) -> bytes | None:
    """Opcodes of a pickle that are left out, repeated, swapped, or lead elsewhere."""
    if not is_pickle(data):
        return None
    try:
        places = [position for _, _, position in pickletools.genops(data) if position is not None]
    except Exception:
        return None
    one, other = sorted((rng.randrange(len(places)), rng.randrange(len(places))))
    start, end = places[one], places[min(one + 1, len(places) - 1)]
    act = rng.randrange(5)
    if act == 0:
        return data[:start] + data[end:]
    if act == 1:
        return data[:end] + data[start:end] * rng.choice((1, 1, 1000)) + data[end:]
    if act == 2:
        return (
            data[:start]
            + rng.choice((b"N", b"]", b"}", b"(", b"0", b"2", b"R", b"b", b"\x81", b"\x93", b"K\0"))
            + data[end:]
        )
    if act == 3:
        hostile = rng.choice(bombs.pickles())
        return data[:start] + hostile[2 if hostile[:1] == b"\x80" else 0 : -1] + data[start:]
    return data[:start] + data[places[other] :]


def image_header(data: bytes, rng: Random) -> bytes | None:
    """Other sizes in the header of an image."""
    sides = rng.choice(((60000, 60000), (65500, 65500), (0, 0), (1, 2**31 - 1), (30000, 30000), (1, 1)))
    if data[:4] == PNG:
        head = struct.pack(">II", *sides) + data[24:29]
        return data[:16] + head + struct.pack(">I", zlib.crc32(b"IHDR" + head)) + data[33:]
    if data[:2] == b"\xff\xd8" and (found := re.search(rb"\xff[\xc0-\xc2]..\x08", data, re.S)):
        place = found.end()
        return data[:place] + struct.pack(">HH", *(side & 0xFFFF for side in sides)) + data[place + 4 :]
    if data[:4] == b"RIFF" and data[12:16] in (b"VP8L", b"VP8X"):
        return data[:21] + rng.randbytes(5) + data[26:]
    return None


STRUCTURES: dict[str, Callable[[bytes, Random], bytes | None]] = {
    function.__name__: function
    for function in (
        json_tree,
        text_words,
        text_lines,
        npy_header,
        safetensors_header,
        zip_members,
        tar_members,
        h5_datasets,
        pickle_opcodes,
        lmdb_value,
        image_header,
        yaml_tags,
    )
}

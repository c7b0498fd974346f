"""Damage that keeps a file's form: other values in JSON, tables, headers and members of archives."""

import contextlib
import gzip
import io
import json
import lzma
import pickletools
import re
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz import bombs

WORD = re.compile(rb"[^\s,:;\"'\[\]{}()]+")
GZIP, XZ, ZIP, NPY, H5, PNG = b"\x1f\x8b", b"\xfd7zXZ", b"PK\x03\x04", b"\x93NUMPY", b"\x89HDF", b"\x89PNG"


def is_tar(data: bytes) -> bool:
    return data[257:262] == b"ustar"


def is_text(data: bytes) -> bool:
    try:
        return bool(data) and "\0" not in data.decode()
    except UnicodeDecodeError:
        return False


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


def repack(data: bytes, rng: Random, change: Callable[[bytes], bytes]) -> bytes | None:
    """Change what a file packs, and pack it again, whole: gzip, xz, a member of a zip or tar, a value of an
    LMDB, the bytes of a dataset."""
    if data[:2] == GZIP:
        return gzip.compress(change(gzip.decompress(data)), 1, mtime=0)
    if data[:5] == XZ:
        return lzma.compress(change(lzma.decompress(data)), preset=0)
    if data[:4] == ZIP:
        return _rewrite_zip(data, rng, lambda member, body: [(member, change(body))])
    if is_tar(data):
        return _rewrite_tar(data, rng, lambda member, body: [(member, change(body))])
    return lmdb_value(data, rng, change)


def _rewrite_zip(data: bytes, rng: Random, change: Callable[[zipfile.ZipInfo, bytes], list]) -> bytes | None:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(out, "w") as written:
        members = archive.infolist()
        chosen = rng.randrange(len(members)) if members else -1
        for number, member in enumerate(members):
            body = archive.read(member)
            for info, new in change(member, body) if number == chosen else [(member, body)]:
                written.writestr(info, new)
    return out.getvalue()


def _rewrite_tar(data: bytes, rng: Random, change: Callable[[tarfile.TarInfo, bytes], list]) -> bytes | None:
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar, tarfile.open(fileobj=out, mode="w") as written:
        members = tar.getmembers()
        chosen = rng.randrange(len(members)) if members else -1
        for number, member in enumerate(members):
            file = tar.extractfile(member) if member.isreg() else None
            body = file.read() if file else b""
            for info, new in change(member, body) if number == chosen else [(member, body)]:
                if info.isreg():
                    info.size = len(new)
                written.addfile(info, io.BytesIO(new))
    return out.getvalue()


def json_tree(data: bytes, rng: Random) -> bytes | None:
    """Other types and values in the place of one to three, in a file or a line of JSON."""
    lines = data.split(b"\n")
    chosen, whole = rng.randrange(len(lines)), False
    try:
        tree = json.loads(data)
        whole = True
    except (ValueError, RecursionError):
        try:
            tree = json.loads(lines[chosen])
        except (ValueError, RecursionError):
            return None
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        tree = _change_node(tree, rng)
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
    if rng.random() < 0.1:  # a key that comes twice: parsers disagree on which counts
        text = re.sub(rb'("[^"\\]+"): ("[^"\\]*"|\d+)', rb"\1: null, \1: \2", text, count=1)
    return text + b"\n" if whole else b"\n".join([*lines[:chosen], text, *lines[chosen + 1 :]])


def _change_node(tree: Any, rng: Random) -> Any:
    """A tree with one of its nodes changed, which is the root at times."""
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.05:
        return _other_value(tree, rng)
    tree = dict(tree) if isinstance(tree, dict) else list(tree)
    key = rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
    act = rng.random()
    if act < 0.1:
        del tree[key]
    elif act < 0.17 and isinstance(tree, dict):
        tree[rng.choice(bombs.strings())] = tree.pop(key) if rng.random() < 0.5 else 0
    elif act < 0.2 and isinstance(tree, list):
        tree += tree[: rng.choice((1, 2, 200))]
    elif (act < 0.5 and isinstance(tree[key], dict | list)) or (
        isinstance(tree[key], dict | list) and rng.random() < 0.8
    ):
        tree[key] = _change_node(tree[key], rng)
    else:
        tree[key] = _other_value(tree[key], rng)
    return tree


def _other_value(value: Any, rng: Random) -> Any:
    near: list[Any] = [[value], {"a": value}, str(value)]
    if isinstance(value, int | float):
        near += [value + 1, -value, float(value), value * 1000]
    if isinstance(value, str):
        near += [list(value), value + "x", value.upper(), value + "\n", "../" + value, value.encode().hex()]
    if isinstance(value, list):
        near += [value[::-1], value[:-1], dict(enumerate(map(str, value)))]
    return rng.choice(near) if rng.random() < 0.4 else rng.choice(bombs.json_values())


def text_words(data: bytes, rng: Random) -> bytes | None:
    """Other words and numbers in a text, table or config."""
    words = list(WORD.finditer(data, 0, 200_000)) if is_text(data) else []
    if not words:
        return None
    word = rng.choice(words)
    new = rng.choice((*bombs.strings(), "0", "-1", "1e400", "nan", "null", "true", "4294967296", "[", "*a"))
    return data[: word.start()] + new.encode(errors="surrogatepass") + data[word.end() :]


def text_lines(data: bytes, rng: Random) -> bytes | None:
    """Lines and cells of a text that are missing, twice there, in other order, longer, or of other width."""
    if not is_text(data) or b"\n" not in data:
        return None
    lines = data.split(b"\n")
    number = rng.randrange(len(lines))
    act, line = rng.randrange(9), lines[number]
    cells = line.split(b"\t")
    if act == 0:
        del lines[number]
    elif act == 1:
        lines.insert(number, line)
    elif act == 2:
        lines.insert(rng.randrange(len(lines)), lines.pop(number))
    elif act == 3:
        lines[number] = line[: rng.randrange(len(line) + 1)]
    elif act == 4:
        lines[number] = line + rng.choice((b"\t", b"\tx", b" ", b",", b"\r", b"\0", line))
    elif act == 5:
        lines[number] = rng.choice(
            (b"", b" ", b"\t", b"\t" * 20, b"#", b"a" * 100_000, b"\xff\xfe", b"{}", b"[]")
        )
    elif act == 6:
        lines[number] = line.replace(b"\t", b" ") if b"\t" in line else line.replace(b" ", b"\t")
    elif act == 7:
        cells[rng.randrange(len(cells))] = rng.choice(bombs.strings()).encode(errors="surrogatepass")
        lines[number] = b"\t".join(cells)
    else:
        rng.shuffle(cells)
        lines[number] = b"\t".join(cells[: rng.randrange(1, len(cells) + 1)])
    return b"\n".join(lines)


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


def zip_members(data: bytes, rng: Random) -> bytes | None:
    """Names, number, compression and content of a zip's members."""
    if data[:4] != ZIP:
        return None
    act = rng.randrange(7)

    def change(member: zipfile.ZipInfo, body: bytes) -> list[tuple[zipfile.ZipInfo, bytes]]:
        if act == 0:
            name = rng.choice(bombs.strings()).encode(errors="replace").decode()[:60000]
            return [(zipfile.ZipInfo(name or "x"), body)]
        if act == 1:
            return []
        if act == 2:
            return [(member, body), (zipfile.ZipInfo(rng.choice((member.filename, "b.json", "c.npy"))), body)]
        member.compress_type = rng.choice((0, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        return [
            (member, rng.choice((b"", bytes(1 << 20), body[: len(body) // 2], body)) if act < 5 else body)
        ]

    out = _rewrite_zip(data, rng, change)
    if act == 5 and out:  # encrypted, it says, or compressed in a way of its own
        place = rng.choice([found.start() for found in re.finditer(rb"PK\x01\x02", out)] or [0])
        out = out[: place + 8] + rng.choice((b"\1\0\0\0", b"\0\0\x63\0")) + out[place + 12 :]
    return out


def tar_members(data: bytes, rng: Random) -> bytes | None:
    """Names, kinds, sizes and number of a tar's members."""
    if not is_tar(data):
        return None
    act = rng.randrange(6)

    def change(member: tarfile.TarInfo, body: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
        if act == 0:
            member.name = rng.choice(bombs.strings()).replace("\0", "0").encode(errors="replace").decode()
        elif act == 1:
            kinds = (
                tarfile.SYMTYPE,
                tarfile.LNKTYPE,
                tarfile.FIFOTYPE,
                tarfile.CHRTYPE,
                tarfile.DIRTYPE,
                b"Z",
            )
            member.type, member.linkname = rng.choice(kinds), rng.choice(bombs.OUTSIDE)
            member.size = 0
        elif act == 2:
            return []
        elif act == 3:
            other = tarfile.TarInfo(member.name)
            return [(member, body), (other, body)]
        elif act == 4:
            member.pax_headers = {
                rng.choice(("size", "mtime", "uid", "path", "linkpath", "GNU.sparse.map")): rng.choice(
                    ("-1", "nan", "1e99", str(2**60), "", "../x", "1,2,3", "é")
                )
            }
        return [(member, body)]

    out = _rewrite_tar(data, rng, change)
    if act == 5 and out:  # a header that says another size, and whose checksum is right
        place = rng.randrange(len(out) // 512) * 512
        size = rng.choice(
            (b"77777777777\0", b"00000000000\0", b"-0000000001\0", b"\xff" * 12, b"\x80" + b"\xff" * 11)
        )
        head = bytearray(out[place : place + 512])
        head[124:136], head[148:156] = size, b" " * 8
        head[148:156] = f"{sum(head):06o}\0 ".encode()
        out = out[:place] + bytes(head) + out[place + 512 :]
    return out


def h5_datasets(data: bytes, rng: Random) -> bytes | None:
    """Other types, shapes, links and values in the place of a dataset."""
    if data[:4] != H5:
        return None
    import h5py
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.h5"
        path.write_bytes(data)
        with h5py.File(path, "r+") as file:
            found: list[str] = []
            file.visititems(lambda name, item: found.append(name))
            name = rng.choice(found or ["a"])
            value = file[name][()] if isinstance(file.get(name), h5py.Dataset) else np.zeros(3, np.float32)
            if name in file:
                del file[name]
            bad = (
                np.array(value, np.float32, ndmin=1) if np.asarray(value).dtype.kind in "fiu" else np.zeros(2)
            )
            bad.ravel()[rng.randrange(max(1, bad.size)) :][:1] = rng.choice(
                (np.nan, np.inf, -1e30, 1e30, -1, 0)
            )
            act = rng.randrange(11)
            if act < 3 and bad.size:
                file[name] = bad
            elif act == 3:
                file.create_group(name)
            elif act == 4:
                file[name] = h5py.SoftLink(rng.choice(("/nothing", f"/{name}", "/")))
            elif act == 5:
                file[name] = h5py.ExternalLink(rng.choice(("/etc/passwd", "../a.h5", "")), "/a")
            elif act == 6:
                file.create_dataset(name, (10**9, 2048), np.float32, chunks=(1, 2048))
            elif act == 7:
                file[name] = rng.choice(
                    ("text", ["a", "b"], np.zeros(0, np.float32), np.bytes_(b"x"), 1 + 2j, 2**63)
                )
            elif act == 8:
                file[name] = np.asarray(value)[..., :1] if np.ndim(value) else np.zeros((2, 2), np.float32)
            elif act == 9:
                file[name] = (
                    np.asarray(value).astype(rng.choice(("f2", "f8", ">f4", "i1", "u8")), casting="unsafe")
                    if (np.asarray(value).dtype.kind in "fiu")
                    else h5py.Empty("f4")
                )
        return path.read_bytes()


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


def lmdb_value(data: bytes, rng: Random, change: Callable[[bytes], bytes] | None = None) -> bytes | None:
    """Another value, or key, in an LMDB."""
    if data[16:20] != b"\xde\xc0\xef\xbe":
        return None
    import lmdb

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data.mdb").write_bytes(data)
        with lmdb.open(folder, map_size=1 << 26) as environment, environment.begin(write=True) as transaction:
            found = list(transaction.cursor())
            key, value = rng.choice(found or [(b"1", b"")])
            value = bytes(value)
            if change:
                value = change(value)
            elif rng.random() < 0.3:
                transaction.delete(key)
                key = rng.choice((b"\xff", b"a" * 500, b"x", b"1.jpg", b"\0"))
            else:
                value = rng.choice(bombs.pickles())
            transaction.put(bytes(key), value[: 1 << 24])
        return (Path(folder) / "data.mdb").read_bytes()


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


def yaml_tags(data: bytes, rng: Random) -> bytes | None:
    """A text with YAML's tags, anchors and aliases in it."""
    if not is_text(data) or b":" not in data:
        return None
    return data.rstrip() + b"\n" + rng.choice(bombs.yaml_texts())


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

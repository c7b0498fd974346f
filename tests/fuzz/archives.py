"""Damage within archives and databases, which are whole again after it: zip, tar, HDF5, LMDB."""

import gzip
import io
import lzma
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.fuzz import bombs

GZIP, XZ, ZIP, H5 = b"\x1f\x8b", b"\xfd7zXZ", b"PK\x03\x04", b"\x89HDF"


def is_tar(data: bytes) -> bool:
    return data[257:262] == b"ustar"


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
                file[name] = h5py.ExternalLink(rng.choice(("/etc/passwd", "../a.h5", "nothing")), "/a")
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

"""The index of a shard, which says where the members of its samples lie. It is read in place: opening it
costs microseconds, and all processes of a machine share the system's copy of it.

    en-000000.index.json   {"format": 3, "bytes": of the shard, "samples": [[KEY, {extension: [offset, bytes,
                           hash of an image's bytes]}, rows], ...], "crc32": of these}; format 1 has no
                           hashes, format 2 no checksum
    en-000000.index.bin    the same, made of it, or of the tar where there is none, little-endian:
        header        HEADER: magic, format, CRC-32 of the rest, time of change of what it was made of, bytes
                      of the shard, samples n, members m, rows, bytes of the extensions, bytes of the keys
        members       int64 (m, 4): number of the extension, offset, bytes, hash of an image's bytes or -1
        samples       uint32 (n + 1, 3): each sample's first member, first byte of its key, first row
        extensions    UTF-8, a zero byte between two
        keys          UTF-8, end to end

The JSON is part of the data, and of their identity (`raylib.provenance`). The other file is a copy: the first
process that opens a shard without one makes it, and it is made anew where what it was made of has changed.
"""

import errno
import hashlib
import io
import itertools
import json
import math
import mmap
import os
import re
import struct
import tarfile
import weakref
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from raylib.data.tars import BLOCK, TarScan
from raylib.errors import UserError, describe_error, reading
from raylib.fileio import MAX_JSON, file_lock, read_json_object, write_atomically, write_json

MAGIC, FORMAT = b"PGLANCE\n", 2
HEAD_OF_3 = re.compile(rb'\A\{"format":3,("bytes":\d+),"crc32":\d+')
HEADER = struct.Struct("<8sIIqQQQQQQ")
SAMPLES, MEMBER = struct.Struct("<6I"), struct.Struct("<4q")  # a sample and the next one; a member
SAMPLE_BYTES, CHUNK = 12, 1 << 20
CHECKED = 16  # bytes of the header before those that its CRC-32 is of
JSON_ENDING = ".index.json"
JSON_FORMATS = (1, 2, 3)  # the first has no hashes of images, the last a checksum
NPY_HEADER = 4096  # bytes that surely hold an .npy header of ours
NPY_VERSIONS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
    # differs in the names of a record's fields alone, and none is read
    (3, 0): np.lib.format.read_array_header_2_0,
}
LARGE = 8**11  # bytes that a tar's header has no digits for
# a folder that others write: a data set that many read
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


class FileBytes:
    """The content of a file, read where it is sliced. A mapped file reads as well, but ends the process
    without a word (SIGBUS) where it has become shorter; here an error names it. May be forked, not pickled.

    Raises UserError (whatever reads): the file has become shorter, since it was opened or before.
    """

    def __init__(self, path: Path):
        self.path = path
        self.file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.file)
        self.stamp = self.find_stamp()

    def __len__(self) -> int:
        return self.stamp[0]

    def __getitem__(self, place: slice) -> bytes:
        start, end, _ = place.indices(len(self))
        return self.read(max(0, end - start), start)

    def find_stamp(self) -> tuple[int, int]:
        """(size, time of change) of the file as it is now."""
        status = os.fstat(self.file)
        return status.st_size, status.st_mtime_ns

    def map(self) -> mmap.mmap | bytes:
        """Return the content mapped into memory, of which nothing may be read but after
        `require_whole`."""
        return mmap.mmap(self.file, 0, access=mmap.ACCESS_READ) if len(self) else b""

    def require_whole(self) -> None:
        """Raise UserError where the file has become shorter."""
        # a third of the time of `fstat`; nothing reads at the position that this moves
        if os.lseek(self.file, 0, os.SEEK_END) < self.stamp[0]:
            raise self._cut_off(self.stamp[0])

    def _cut_off(self, before: int) -> UserError:
        return UserError(
            f"{self.path}: cut off: it has {self.find_stamp()[0]:,} bytes, and had {before:,} at least; "
            "restore it, and start again"
        )

    def read(self, size: int, offset: int) -> bytes:
        """Read so many bytes."""
        try:
            data = os.pread(self.file, size, offset)
        except OSError as e:
            e.filename = str(self.path)
            raise
        if len(data) < size:  # a system call reads 2 GB at most
            whole = bytearray(size)
            self.read_into(memoryview(whole), offset)
            return bytes(whole)
        return data

    def read_each(self, places: Iterable[tuple[int, int]]) -> list[bytes]:
        """Read at several places, (bytes, offset) each."""
        places = list(places)
        try:
            data = [os.pread(self.file, size, offset) for size, offset in places]
        except OSError as e:
            e.filename = str(self.path)
            raise
        for part, (size, offset) in zip(data, places, strict=True):
            if len(part) < size:
                raise self._cut_off(max(len(self), offset + size))
        return data

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer`, of bytes."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self.file, [buffer[done:]], offset + done)
            if not count:
                raise self._cut_off(max(len(self), offset + len(buffer)))
            done += count


class IndexedSample(NamedTuple):
    """members: {extension: [offset, bytes, hash of an image, where it is known]}. rows: that training
    draws: 1, or the sentences of a block."""

    key: str
    members: Mapping[str, Sequence[int]]
    rows: int


class ShardIndex:
    """An index: of `content`, an index file's.

    Attributes:
        shard_bytes, rows: of the shard. source_time: see the header.

    Raises:
        ValueError: not whole, or of another format.
    """

    def __init__(self, content: "FileBytes | bytes", path: Path):
        self.path = path
        self._file = None if isinstance(content, bytes) else content
        head = content[: HEADER.size]
        if len(head) < HEADER.size:
            raise ValueError("truncated in the header")
        _, form, crc, *fields = HEADER.unpack(head)
        self.source_time, self.shard_bytes, samples, members, self.rows, extensions, keys = fields
        # Python's integers: sizes of the header may be any of 64 bits, and sums of them none that NumPy holds
        sizes = (HEADER.size, MEMBER.size * members, SAMPLE_BYTES * (samples + 1), extensions, keys)
        self._starts = list(itertools.accumulate(sizes))
        if form != FORMAT or self._starts[-1] != len(content):
            raise ValueError(f"format {form}, {len(content)} bytes")
        if _checksum(content) != crc:
            raise ValueError("its checksum is another")
        self.extensions = content[self._starts[2] : self._starts[3]].decode().split("\0")
        self._count, self._members, self._keys = samples, members, keys
        # mapped: a sample is looked up in the time of one system call, which asks whether the file is whole
        self._data = content if isinstance(content, bytes) else content.map()

    def __len__(self) -> int:
        return self._count

    def first_rows(self) -> np.ndarray:
        """(n + 1,) int64: the first row of each sample, and how many there are.

        Raises:
            UserError: they do not rise, or more than the index says.
        """
        self._require_whole()
        table = self._data[self._starts[1] : self._starts[2]]
        rows = np.frombuffer(table, "<u4").reshape(-1, 3)[:, 2].astype(np.int64)
        if rows[0] or rows[-1] != self.rows or (rows[1:] < rows[:-1]).any():
            raise self._damaged("rows that do not rise")
        return rows

    def read(self, number: int) -> IndexedSample:
        """Return a sample; each member has a hash, or -1.

        Raises:
            UserError: it lies outside the tables, or a member of it outside the shard.
        """
        self._require_whole()
        members_at, samples_at, _, keys_at, _ = self._starts
        # the checksum tells of damage, not of intent: whatever is read here may be any number
        first, key, row, last, end, next_row = SAMPLES.unpack_from(
            self._data, samples_at + SAMPLE_BYTES * number
        )
        if not (first <= last <= self._members and key <= end <= self._keys and row <= next_row <= self.rows):
            raise self._damaged(f"sample {number} outside its tables")
        table = self._data[members_at + MEMBER.size * first : members_at + MEMBER.size * last]
        members, names = {}, self.extensions
        for code, offset, size, known in MEMBER.iter_unpack(table):
            if not (0 <= code < len(names) and 0 <= offset and 0 <= size <= self.shard_bytes - offset):
                raise self._damaged(f"a member of sample {number} outside the shard")
            members[names[code]] = offset, size, known
        name = self._data[keys_at + key : keys_at + end].decode(errors="backslashreplace")
        return IndexedSample(name, members, next_row - row)

    def _require_whole(self) -> None:
        if self._file is not None:
            self._file.require_whole()

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.path}: a damaged index ({what}); delete it, and index the folder anew")


def _checksum(content: "FileBytes | bytes") -> int:
    """Return the CRC-32 of an index file, but for the part of its header that holds it."""
    crc = 0
    for start in range(CHECKED, len(content), CHUNK):
        crc = zlib.crc32(content[start : start + CHUNK], crc)
    return crc


def index_path(shard: Path) -> Path:
    """Return where the index of a shard lies that is mapped."""
    return shard.with_name(shard.name.removesuffix(".tar") + ".index.bin")


def json_path(shard: Path) -> Path:
    """Return where the index of a shard lies that is part of the data."""
    return shard.with_name(shard.name.removesuffix(".tar") + JSON_ENDING)


def encode_index(shard_bytes: int, samples: Sequence[IndexedSample], source_time: int) -> bytes:
    """Return the content of an index file."""
    keys = [key.encode() for key, _, _ in samples]
    names = sorted({extension for _, members, _ in samples for extension in members})
    codes = {extension: code for code, extension in enumerate(names)}
    places = [(codes[name], *place, -1)[:4] for _, of, _ in samples for name, place in of.items()]
    sizes = [(len(of), len(key), rows) for key, (_, of, rows) in zip(keys, samples, strict=True)]
    table = np.cumsum([(0, 0, 0), *sizes], axis=0, dtype=np.int64)
    if table[-1].max() >= 1 << 32:
        raise UserError(f"an index of {len(samples)} samples: too many for one shard; write several")
    extensions = "\0".join(names).encode()
    counts = (len(samples), len(places), int(table[-1, 2]), len(extensions), int(table[-1, 1]))
    header = HEADER.pack(MAGIC, FORMAT, 0, source_time, shard_bytes, *counts)
    members = np.array(places, "<i8").reshape(-1, 4)
    content = b"".join((header, members.tobytes(), table.astype("<u4").tobytes(), extensions, *keys))
    return (
        HEADER.pack(MAGIC, FORMAT, _checksum(content), source_time, shard_bytes, *counts)
        + content[HEADER.size :]
    )


def list_samples(scan: TarScan) -> list[IndexedSample]:
    """Return the samples of a tar; of packed text with the rows that their blocks have.

    Raises:
        UserError: the ends of a block are no array.
    """
    samples = []
    with open(scan.path, "rb") as file:
        for key, members in scan.samples.items():
            rows = 1
            if "ends.npy" in members:
                offset, size = members["ends.npy"][:2]
                file.seek(offset)
                with reading(f"{scan.path}: sample {key}", "ends.npy", "pack it anew"):
                    rows = read_npy_header(file.read(min(size, NPY_HEADER)), size)[1][0]
            samples.append(IndexedSample(key, members, rows))
    return samples


class NpyHeader(NamedTuple):
    """The header of a .npy file; start: its bytes, behind which the values lie."""

    start: int
    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype


def parse_npy_header(data: bytes) -> NpyHeader:
    """Parse the header of the .npy file that `data` begin.

    Raises:
        ValueError: it is none.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        if version not in NPY_VERSIONS:
            raise ValueError(f"format {version[0]}.{version[1]} of arrays")
        shape, is_fortran, dtype = NPY_VERSIONS[version](file)
    except Exception as error:  # the header is a Python literal, at which its parser raises much
        raise ValueError(describe_error(error)) from error
    return NpyHeader(file.tell(), shape, is_fortran, dtype)


def read_npy_header(data: bytes, size: int, kinds: str = "ui") -> tuple[int, tuple[int, ...], np.dtype]:
    """Return (bytes of the header, shape, dtype) of a .npy file of `size` bytes, of which `data` are the
    first. kinds: of numbers that it may hold, by NumPy's letters.

    Raises:
        ValueError: it is none, or not of such numbers in C order, or has other than these bytes.
    """
    start, shape, is_fortran, dtype = parse_npy_header(data)
    if (is_fortran and len(shape) > 1) or dtype.kind not in kinds:
        raise ValueError(f"{dtype}{' in Fortran order' * is_fortran}: other numbers are wanted, in C order")
    # whoever reads the elements trusts the shape: it must be that of the bytes that are there
    if min(shape, default=0) < 0 or start + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{size:,} bytes do not hold {shape} of {dtype}")
    return start, shape, dtype


def write_index(shard: Path, shard_bytes: int, samples: Sequence[IndexedSample]) -> None:
    """Write both indices of a shard."""
    path = json_path(shard)
    stored = {"format": JSON_FORMATS[-1], "bytes": shard_bytes, "crc32": _samples_checksum(samples)}
    write_json(path, {**stored, "samples": samples}, compact=True)
    write_atomically(index_path(shard), encode_index(shard_bytes, samples, path.stat().st_mtime_ns))


def hash_index(path: Path) -> str:
    """Return the SHA-256 of an index in JSON as format 2 would have it, which was without a checksum: runs of
    before have recorded that."""
    return hashlib.sha256(HEAD_OF_3.sub(rb'{"format":2,\1', path.read_bytes(), count=1)).hexdigest()


def open_index(shard: Path, cache: Path) -> ShardIndex:
    """Open the index of a shard. Where there is none to be mapped, it is made once for all processes: beside
    the shard, or, where nothing can be written, in the folder `cache`.

    Raises:
        UserError: another program's file has its name; JSON of another format; as of `TarScan`.
    """
    beside, elsewhere = index_path(shard), cache / index_path(shard).name
    if index := _open_current(beside, shard) or _open_current(elsewhere, shard):
        return index
    content = b""
    for path in (beside, elsewhere):
        lock = path.with_name(f".{path.name}.lock")
        try:
            with file_lock(lock):
                index = _open_current(path, shard)  # another process may have made it meanwhile
                if not index:
                    content = content or _convert(shard)
                    write_atomically(path, content)
                lock.unlink(missing_ok=True)  # whoever waits for it finds the index
            return index or ShardIndex(FileBytes(path), path)
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise
    return ShardIndex(content or _convert(shard), _source(shard))  # of this process alone


def is_younger(shard: Path, index: ShardIndex) -> bool:
    """Return whether a shard was written after its index: by a copy, or because another one of the same size
    took its place."""
    return shard.stat().st_mtime_ns >= index.source_time


def _source(shard: Path) -> Path:
    """Return what an index is made of: the JSON beside the shard, or the shard, where there is none."""
    return path if (path := json_path(shard)).is_file() else shard


def _open_current(path: Path, shard: Path) -> ShardIndex | None:
    """Open an index file; None if there is none, it is not whole, or what it was made of has changed since.

    Raises:
        UserError: it is no index, and not ours to overwrite.
    """
    if not path.is_file():
        return None
    data = FileBytes(path)
    if data[: len(MAGIC)] != MAGIC:
        raise UserError(f"{path}: no index of a shard, whose name it has; move it, or delete it")
    try:
        index = ShardIndex(data, path)
    except ValueError:  # it is a copy: nothing is lost with it
        return None
    return index if index.source_time == _source(shard).stat().st_mtime_ns else None


def _convert(shard: Path) -> bytes:
    """Return the content of an index made of a shard's JSON, else of its headers."""
    path = _source(shard)
    time = path.stat().st_mtime_ns
    if path == shard:
        scan = TarScan(shard, hashes=False)
        return encode_index(scan.bytes, list_samples(scan), time)
    what, advice = "the index of a shard", "delete it, and index the folder anew"
    stored = read_json_object(path, ("bytes", "samples"), what, advice, most=MAX_JSON)
    with reading(path, what, advice):
        samples = _parse_samples(stored)
        if stored.get("format") != JSON_FORMATS[-1]:
            _compare_places(samples, shard)
        return encode_index(stored["bytes"], samples, time)


def _samples_checksum(samples: Sequence[IndexedSample | list]) -> int:
    """Return the CRC-32 of samples as the JSON has them."""
    return zlib.crc32(json.dumps(samples, ensure_ascii=False, separators=(",", ":")).encode())


def _parse_samples(stored: dict[str, Any]) -> list[IndexedSample]:
    """Return the samples of an index's JSON.

    Raises:
        ValueError: of another format, damaged, or with places that lie outside the shard or in one another.
    """
    if stored.get("format", 1) not in JSON_FORMATS:
        raise ValueError(f"format {stored['format']!r}")
    shard_bytes, samples = stored["bytes"], stored["samples"]
    if not _is_count(shard_bytes) or not isinstance(samples, list):
        raise ValueError(f"bytes {shard_bytes!r}, {type(samples).__name__} of samples")
    if stored.get("format") == JSON_FORMATS[-1] and _samples_checksum(samples) != stored.get("crc32"):
        raise ValueError("its checksum is another")
    for number, sample in enumerate(samples):
        match sample:
            case [str(), dict() as members, int() as rows] if _is_count(rows) and rows < 1 << 32:
                for name, place in members.items():
                    if not _is_place(place, shard_bytes) or "\0" in name:
                        raise ValueError(f"sample {number}, {name!r}: {place!a:.60}")
            case _:
                raise ValueError(f"sample {number}: {sample!a:.60}")
    places = [place[:2] for _, members, _ in samples for place in members.values()]
    table = np.unique(np.array(places, np.int64).reshape(-1, 2), axis=0)  # links stand for one place
    if (table[1:, 0] < table[:-1].sum(1)).any():
        raise ValueError("members that overlap")
    return [IndexedSample(*sample) for sample in samples]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is_place(value: Any, shard_bytes: int) -> bool:
    """Return whether `value` is [offset, bytes] or [offset, bytes, hash] of a member in a shard."""
    return (
        isinstance(value, list)
        and len(value) in (2, 3)
        and all(type(part) is int and 0 <= part < 1 << 63 for part in value)
        and value[0] + value[1] <= shard_bytes
    )


def _compare_places(samples: Sequence[IndexedSample], shard: Path) -> None:
    """Raise ValueError where samples of an index without a checksum are not those of the tar."""
    listed = list_samples(TarScan(shard, hashes=False))
    found = [(key, {k: list(v[:2]) for k, v in members.items()}, rows) for key, members, rows in samples]
    if found != [tuple(sample) for sample in listed]:
        raise ValueError("its places are not those of the tar beside it")


def find_stale_member(index: ShardIndex, content: FileBytes) -> str | None:
    """Return the name of a member that does not lie where `index` says, of the first, the middle and the last
    sample; None: they all do. An index of another tar of as many bytes and samples would give one sample the
    bytes of others."""
    for number in sorted({0, len(index) // 2, len(index) - 1}) if len(index) else ():
        key, members, _ = index.read(number)
        for extension, (offset, size, *_) in members.items():
            # a link has its target's place, so that the name in the header may be another: the size is not
            try:
                header = tarfile.TarInfo.frombuf(content.read(BLOCK, offset - BLOCK), "utf-8", "replace")
            except (tarfile.HeaderError, ValueError, OSError):
                return f"{key}.{extension}"
            if header.size != size < LARGE:
                return f"{key}.{extension}"
    return None

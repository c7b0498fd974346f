"""Arrays of numbers or strings out of the bytes of .npy and .npz files: nothing is unpickled, and nothing
that a header announces is believed before it is compared with what is there."""

import io
import math
import os
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

MAX_BYTES = 1 << 28  # of one image's file, and of what it holds: a hundred times what detectors write
MAX_MEMBERS = 1000  # of a zip
HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
    # differs in the names of a record's fields alone, and none is read
    (3, 0): np.lib.format.read_array_header_2_0,
}


def read_file(path: Path) -> bytes:
    """Read a file of one image's features.

    Raises:
        ValueError: it is larger than such a file may be.
    """
    with open(path, "rb", buffering=0) as file:
        if (size := os.fstat(file.fileno()).st_size) > MAX_BYTES:
            raise ValueError(f"{size:,} bytes, of which an image's may have {MAX_BYTES:,}")
        return file.read(size)


def read_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Return (shape, whether it is in Fortran's order, dtype, where its values begin) of an array in a .npy
    file.

    Raises:
        ValueError: no such header.
    """
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version not in HEADERS:
        raise ValueError(f"format {version[0]}.{version[1]} of arrays")
    return *HEADERS[version](stream), stream.tell()


def parse_array(data: bytes) -> np.ndarray:
    """Return the array, of numbers or strings, that the bytes of a .npy file hold.

    Raises:
        ValueError: they hold none, or more or less than it.
    """
    shape, is_fortran, dtype, start = read_header(data)
    if dtype.kind not in "biufSU" or not dtype.itemsize:
        raise ValueError(f"an array of {dtype}, and numbers and strings are read")
    if (size := math.prod(shape) * dtype.itemsize) != len(data) - start or min(shape, default=0) < 0:
        raise ValueError(f"{len(data) - start:,} bytes for an array of {dtype} {shape}, which takes {size:,}")
    if not size:
        return np.empty(0, dtype)
    return np.frombuffer(data, dtype, offset=start).reshape(shape, order="F" if is_fortran else "C")


def parse_archive(data: bytes, wanted: Collection[str]) -> dict[str, Any]:
    """Return {name: array} of a .npz file's bytes; None in the place of those that are not `wanted`.

    Raises:
        ValueError, zipfile.BadZipFile and others: no archive of such arrays, or a larger one than may be.
    """
    # the list of members is read whole, and takes ten times the memory of its bytes
    if len(data) > 1 << 20 and data.count(b"PK\1\2") > MAX_MEMBERS:
        raise ValueError(f"more than {MAX_MEMBERS:,} members")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise ValueError("two members of one name")
        arrays: dict[str, Any] = dict.fromkeys(members)
        total = 0
        for name in members.keys() & wanted:
            info = members[name]
            total += info.file_size
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{name} is compressed in a way that is not read")
            if total > MAX_BYTES:
                raise ValueError(f"arrays of more than {MAX_BYTES:,} bytes")
            with archive.open(info) as member:
                # with its size it reads no more than that, also of what would decompress to more
                arrays[name] = parse_array(member.read(info.file_size + 1))
    return arrays

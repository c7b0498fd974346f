"""Arrays of numbers or strings out of the bytes of .npy and .npz files: nothing is unpickled, and nothing
that a header announces is believed before it is compared with what is there."""

import io
import math
import zipfile
from collections.abc import Collection
from typing import Any

import numpy as np

from raylib.data.index import parse_npy_header

MAX_BYTES = 1 << 28  # of one image's file, and of what it holds: a hundred times what detectors write
MAX_MEMBERS = 1000  # of a zip


def parse_array(data: bytes) -> np.ndarray:
    """Return the array, of numbers or strings, that the bytes of a .npy file hold.

    Raises:
        ValueError: they hold none, or more or less than it.
    """
    start, shape, is_fortran, dtype = parse_npy_header(data)
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

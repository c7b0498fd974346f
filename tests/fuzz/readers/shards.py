"""Readers of tars, their indexes, manifests and shards, and of caches."""

import io
import tarfile
from pathlib import Path
from typing import Any

from tests.fuzz.reader import Reader


def example_tar(folder: Path) -> Path:
    path = folder / "images.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(3):
            for extension, data in (("json", b'{"captions": {"en": ["one"]}}'), ("png", b"x" * (number + 1))):
                member = tarfile.TarInfo(f"sub/k{number}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def read_tar(path: Path) -> Any:
    from raylib.data.tars import TarScan

    scan, data = TarScan(path), path.read_bytes()
    return {name: data[place[0] : place[0] + place[1]] for name, place in scan.files.items()}


def load_tar(path: Path) -> Any:
    with tarfile.open(path, "r:", ignore_zeros=True) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isreg()}


READERS = [
    Reader(
        name="tar_scan",
        example=example_tar,
        read=read_tar,
        oracle=load_tar,
        covers=("raylib.data.tars:TarScan.__init__", "raylib.data.tars:TarScan._read_tar"),
        compares="the bytes of the files in the tar",
    ),
]

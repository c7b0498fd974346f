"""Pictures by id, in a folder or a tar."""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from raylib.data.images import decode
from raylib.data.tars import TarScan
from raylib.errors import UserError
from raylib.fileio import nfc
from raylib.randomness import string_key

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# what MSCOCO's names of 2014 have before the number that they share with those of 2017
COCO = re.compile(r"^COCO_[a-z]+\d{4}_(?=\d{12}$)", re.IGNORECASE)
MARVL = {"id", "sw", "ta", "tr", "zh"}  # languages whose pictures have the same names

Place = tuple[str, str, int, int]  # (path in the store, file, offset, bytes); bytes -1 for a whole file


class PictureStore:
    """Pictures by id. An id may end like a file name or not, and MSCOCO's may be a name or its number.
    Folders in an id count where pictures of several folders have one name, as MaRVL's of several languages
    do. May be sent to, and forked into, other processes."""

    def __init__(self, path: Path, places: dict[str, list[Place]]):
        """places: {id without folder and ending: where pictures of this name are}."""
        self.path, self.places = path, places
        self._opened: tuple[int, int] | None = None  # (process, descriptor) of the tar
        self._identities: dict[str, int] = {}

    def has(self, name: str) -> bool:
        """Whether there is a picture of this id."""
        return bool(self._find(name))

    def read(self, name: str) -> np.ndarray:
        """The picture, uint8 RGB (H, W, 3).

        Raises:
            UserError: no such id, or several (they are named); a file that does not decode.
        """
        return decode(self._bytes(name), f"{self.path}, {name}")

    def identity(self, name: str) -> int:
        """63-bit hash of the encoded bytes, as of a sample in shards: one image may have several ids, and lie
        in several files.

        Raises:
            UserError: no such id, or several.
        """
        if name not in self._identities:
            self._identities[name] = string_key(self._bytes(name))
        return self._identities[name]

    def _bytes(self, name: str) -> bytes:
        there = self._find(name)
        if not there:
            raise UserError(f"{self.path}: no picture '{name}'; check images=")
        if len(there) > 1:
            raise UserError(
                f"{self.path}: {len(there)} pictures called '{name}': {', '.join(p for p, *_ in there)}; "
                "leave one"
            )
        ((_, file, offset, size),) = there
        return Path(file).read_bytes() if size < 0 else os.pread(self._tar(file), size, offset)

    def _find(self, name: str) -> list[Place]:
        there, folders = self.places.get(stem(name), []), folders_of(name)
        if len(there) > 1:
            return [place for place in there if folders <= folders_of(place[0])]
        return [place for place in there if may_hold(name, folders_of(place[0]))]

    def _tar(self, file: str) -> int:
        if (
            self._opened is None or self._opened[0] != os.getpid()
        ):  # a descriptor shared with a parent would be closed by it
            self._opened = (os.getpid(), os.open(file, os.O_RDONLY))
        return self._opened[1]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_opened": None}


def open_pictures(path: Path | str) -> PictureStore:
    """The pictures of a folder and all that is below it, or of a tar.

    Raises:
        UserError: neither; a tar that is damaged, or compressed; no picture in it; two pictures of one id in
            one folder (both are named).
    """
    path = Path(path)
    if path.is_dir():
        found = _walk(path)
    elif path.suffix == ".tar" and path.is_file():
        found = _list(path)
    else:
        raise UserError(f"{path}: neither a folder nor a .tar of pictures; give it with images=")
    places: dict[str, list[Place]] = {}
    for place in found:
        if place[0].lower().endswith(SUFFIXES):
            others = places.setdefault(stem(place[0]), [])
            for other, *_ in others:
                if nfc(os.path.dirname(other)) == nfc(os.path.dirname(place[0])):
                    names = sorted((other, place[0]))
                    raise UserError(
                        f"{path}: two pictures called '{stem(other)}': {' and '.join(names)}; leave one"
                    )
            others.append(place)
    if not places:
        raise UserError(f"{path}: no pictures ({', '.join(SUFFIXES)}) in it")
    return PictureStore(path, places)


def _walk(path: Path) -> Iterator[Place]:
    """Every file below `path`."""
    for folder, _, files in os.walk(path, followlinks=True):
        for file in files:
            whole = os.path.join(folder, file)
            yield os.path.relpath(whole, path), whole, 0, -1


def _list(path: Path) -> Iterator[Place]:
    """Every file in the tar `path`."""
    for name, (offset, size) in TarScan(path, hashes=False).files.items():
        yield name, str(path), offset, size


def folders_of(name: str) -> set[str]:
    """The folders that an id, or a path, names."""
    return {*PurePosixPath(nfc(name)).parts[:-1]}


def may_hold(name: str, words: set[str]) -> bool:
    """Whether a picture may be where `words` are in the path: MaRVL's pictures have the same names in each
    language, and the one that is there must not be another language's."""
    return not folders_of(name) & MARVL or words & MARVL <= folders_of(name)


def stem(name: str) -> str:
    """A picture's name without folder, picture ending and what MSCOCO's names of 2014 begin with, in NFC:
    macOS stores names in NFD, annotations have them in either."""
    base = os.path.basename(nfc(name))
    stripped, suffix = os.path.splitext(base)
    return COCO.sub("", stripped if suffix.lower() in SUFFIXES else base)

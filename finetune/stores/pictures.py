"""Pictures by id, in a folder or a tar."""

import os
import tarfile
from pathlib import Path

import numpy as np

from raylib.data.images import decode
from raylib.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class PictureStore:
    """Pictures by id; an id may end like a file name or not. May be sent to, and forked into, other processes."""

    def __init__(self, path: Path, places: dict[str, tuple[str, int, int]]):
        """places: {id without ending: (file, offset, bytes); bytes -1 for a whole file}."""
        self.path, self.places = path, places
        self._opened: tuple[int, int] | None = None  # (process, descriptor) of the tar

    def has(self, name: str) -> bool:
        """Whether there is a picture of this id."""
        return _stem(name) in self.places

    def read(self, name: str) -> np.ndarray:
        """The picture, uint8 RGB (H, W, 3).

        Raises:
            UserError: no such id; a file that does not decode.
        """
        place = self.places.get(_stem(name))
        if place is None:
            raise UserError(f"{self.path}: no picture '{name}'; check images=")
        file, offset, size = place
        data = Path(file).read_bytes() if size < 0 else os.pread(self._tar(file), size, offset)
        return decode(data, f"{self.path}, {name}")

    def _tar(self, file: str) -> int:
        if self._opened is None or self._opened[0] != os.getpid():  # a descriptor shared with a parent would be closed by it
            self._opened = (os.getpid(), os.open(file, os.O_RDONLY))
        return self._opened[1]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_opened": None}


def open_pictures(path: Path | str) -> PictureStore:
    """The pictures of a folder, its subfolders of one level included, or of a tar.

    Raises:
        UserError: neither; no picture in it; two pictures of one id (both are named).
    """
    path = Path(path)
    if path.is_dir():
        folders = [path, *sorted(p for p in path.iterdir() if p.is_dir())]
        found = [(entry.name, (entry.path, 0, -1)) for folder in folders for entry in os.scandir(folder) if entry.is_file()]
    elif path.suffix == ".tar" and path.is_file():
        with tarfile.open(path) as tar:
            found = [(member.name, (str(path), member.offset_data, member.size)) for member in tar if member.isfile()]
    else:
        raise UserError(f"{path}: neither a folder nor a .tar of pictures; give it with images=")
    places: dict[str, tuple[str, int, int]] = {}
    names: dict[str, str] = {}
    for name, place in found:
        if name.lower().endswith(SUFFIXES):
            stem = _stem(name)
            if stem in places:
                raise UserError(f"{path}: two pictures called '{stem}': {names[stem]} and {name}; leave one")
            places[stem], names[stem] = place, name
    if not places:
        raise UserError(f"{path}: no pictures ({', '.join(SUFFIXES)}) in it")
    return PictureStore(path, places)


def _stem(name: str) -> str:
    base = os.path.basename(name)
    stem, suffix = os.path.splitext(base)
    return stem if suffix.lower() in SUFFIXES else base

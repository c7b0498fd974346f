"""Features of detected regions by picture id: VOLTA's LMDB, H5, LXMERT's TSV, or a folder of .npz files.

Values are never unpickled plainly: LMDB's are read by an unpickler that admits plain values and arrays only.
"""

import base64
import csv
import io
import os
import pickle
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from raylib.errors import UserError

csv.field_size_limit(1 << 30)


class Regions(NamedTuple):
    """One picture's regions: features (R, f), boxes (R, 4) as x1, y1, x2, y2 in pixels, and the picture's size."""

    features: np.ndarray
    boxes: np.ndarray
    height: float
    width: float


class RegionStore(Protocol):
    """Regions by picture id."""

    def read(self, name: str) -> Regions: ...


def locations(boxes: np.ndarray, height: float, width: float, numbers: int) -> np.ndarray:
    """(R, 5): x1, y1, x2, y2 and area, as shares of the picture; (R, 7), UC2's: x1, y1, x2, y2, width, height, area."""
    x1, y1, x2, y2 = (boxes / [width, height, width, height]).T
    wide, high = x2 - x1, y2 - y1
    columns = [x1, y1, x2, y2, wide * high] if numbers == 5 else [x1, y1, x2, y2, wide, high, wide * high]
    return np.stack(columns, 1).astype(np.float32)


def open_regions(path: Path | str) -> RegionStore:
    """The regions at `path`: an LMDB folder, a .h5, a .tsv, or a folder of .npz files.

    Raises:
        UserError: none of these.
    """
    path = Path(path)
    if (path / "data.mdb").is_file():
        return _Lmdb(path)
    if path.suffix in (".h5", ".hdf5") and path.is_file():
        return _H5(path)
    if path.suffix == ".tsv" and path.is_file():
        return _Tsv(path)
    if path.is_dir() and any(path.glob("*.npz")):
        return _Npz(path)
    raise UserError(f"{path}: no region features; an LMDB folder, .h5, .tsv or a folder of .npz files is read")


class _Opened:
    """Holds one open file a process: neither LMDB nor H5 survives a fork."""

    def __init__(self, path: Path):
        self.path = path
        self._handle: tuple[int, Any] | None = None

    def handle(self) -> Any:
        if self._handle is None or self._handle[0] != os.getpid():
            self._handle = (os.getpid(), self._open())
        return self._handle[1]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handle": None}

    def _missing(self, name: str) -> UserError:
        return UserError(f"{self.path}: no regions of picture '{name}'; check regions=")


class _Lmdb(_Opened):
    """VOLTA's: key, the picture's id; value, a pickled dict {features, boxes, img_h, img_w, num_boxes}."""

    def _open(self):
        import lmdb

        return lmdb.open(str(self.path), readonly=True, lock=False, readahead=False)

    def read(self, name: str) -> Regions:
        with self.handle().begin() as transaction:
            value = transaction.get(name.encode())
        if value is None:
            raise self._missing(name)
        try:
            record = _Arrays(io.BytesIO(value)).load()
        except (pickle.UnpicklingError, EOFError) as e:
            raise UserError(f"{self.path}, {name}: not read ({e})") from None
        return _regions(record, f"{self.path}, {name}")


class _H5(_Opened):
    """A group a picture, with the datasets features, boxes, img_h, img_w."""

    def _open(self):
        import h5py

        return h5py.File(self.path, "r")

    def read(self, name: str) -> Regions:
        if name not in self.handle():
            raise self._missing(name)
        group = self.handle()[name]
        record = {key: group[key][()] for key in ("features", "boxes", "img_h", "img_w") if key in group}
        return _regions(record, f"{self.path}, {name}")


class _Npz:
    """ID.npz with the arrays features, boxes, img_h, img_w."""

    def __init__(self, path: Path):
        self.path = path

    def read(self, name: str) -> Regions:
        file = self.path / f"{name}.npz"
        if not file.is_file():
            raise UserError(f"{file}: no such file")
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return _regions(dict(arrays), str(file))
        except ValueError as e:
            raise UserError(f"{file}: not read ({e})") from None


class _Tsv:
    """LXMERT's: a line a picture; columns are found by number, arrays are base64 of float32."""

    COLUMNS = ("img_id", "img_h", "img_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf", "num_boxes", "boxes",
               "features")  # fmt: skip

    def __init__(self, path: Path):
        self.path, self.offsets = path, {}
        with open(path, "rb") as file:
            offset = 0
            for line in file:
                self.offsets[line.split(b"\t", 1)[0].decode()] = offset
                offset += len(line)

    def read(self, name: str) -> Regions:
        if name not in self.offsets:
            raise UserError(f"{self.path}: no regions of picture '{name}'; check regions=")
        with open(self.path, "rb") as file:
            file.seek(self.offsets[name])
            cells = file.readline().decode().rstrip("\n").split("\t")
        if len(cells) != len(self.COLUMNS):
            raise UserError(f"{self.path}, {name}: {len(cells)} columns, wanted {len(self.COLUMNS)}")
        return _regions(dict(zip(self.COLUMNS, cells, strict=True)), f"{self.path}, {name}")


def _regions(record: dict, where: str) -> Regions:
    missing = [key for key in ("features", "boxes", "img_h", "img_w") if key not in record]
    if missing:
        raise UserError(f"{where}: no {', '.join(missing)}; it has {', '.join(sorted(map(str, record)))}")
    boxes = _array(record["boxes"]).reshape(-1, 4)
    features = _array(record["features"])
    if features.size % max(1, len(boxes)) or not len(boxes):
        raise UserError(f"{where}: {features.size} feature values for {len(boxes)} boxes")
    return Regions(features.reshape(len(boxes), -1), boxes, float(record["img_h"]), float(record["img_w"]))


def _array(value) -> np.ndarray:
    """An array, or base64 of float32."""
    if isinstance(value, str | bytes):
        value = np.frombuffer(base64.b64decode(value), np.float32)
    return np.asarray(value, np.float32)


class _Arrays(pickle.Unpickler):
    """Admits plain values and NumPy arrays, nothing else that could run."""

    ADMITTED = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")} | {
        (f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, and only plain values and arrays are read")
        return super().find_class(module, name)

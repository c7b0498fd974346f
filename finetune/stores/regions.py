"""Features of detected regions by image id: VOLTA's LMDB, H5 (a group an image, or M3P's flat arrays),
LXMERT's or OSCAR's TSV, or a folder of .npz (UC2's too) or of X101's .npy files.

An id is looked for as it is, then without folder and image ending, in each normal form of Unicode: files
disagree on whether ".jpg" belongs to it.
"""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from finetune.stores import Regions, decode_floats, folders_of, may_hold, reading_record, stem, to_regions
from finetune.stores.arrays import MAX_BYTES, parse_archive, parse_array
from finetune.stores.lmdb_pages import LmdbPages
from raylib.cache import open_once
from raylib.data.images import BadImage
from raylib.data.index import parse_npy_header
from raylib.errors import UserError, reading
from raylib.fileio import read_bytes, unicode_forms
from raylib.pickles import load_plain

OSCAR_BOX_DIM = 6  # x1, y1, x2, y2, width, height behind each region's features
X101 = {"bbox": "boxes", "image_height": "img_h", "image_width": "img_w"}  # its names -> those of the others
# what is read of an image's record; what else there is are detections that no model reads
FIELDS = frozenset(("features", "boxes", "norm_bb", "img_h", "img_w", "num_boxes", "tags"))
H5, COPY = "region features (HDF5)", "is it whole? Copy it anew"


class RegionStore(ABC):
    """Regions by image id."""

    def __init__(self, path: Path):
        self.path = path
        self.words = _words(path)
        self.width: int | None = None  # of the features that a model reads; None: any

    @abstractmethod
    def has(self, name: str) -> bool:
        """Return whether there are regions of the image `name`; they are not read."""

    @abstractmethod
    def find(self, name: str) -> Regions | None:
        """Return the regions of the image `name`; None if there are none.

        Raises:
            BadImage: they are broken; names file and image. UserError: the file became shorter.
        """

    def read(self, name: str) -> Regions:
        """Return the regions of the image `name`.

        Raises:
            BadImage: there are none, or they are broken. UserError: the file became shorter.
        """
        regions = self.find(name)
        if regions is None:
            raise BadImage(f"{self.path}: no regions of image '{name}'; check regions=")
        if self.width not in (None, found := regions.features.shape[1]):
            raise BadImage(f"{self.path}, {name}: {found} features a region, and {self.width} are expected")
        return regions


def open_regions(path: Path | str) -> RegionStore:
    """The regions at `path`: an LMDB folder, a .h5, a .tsv, a folder of .npz files or of .npy files with
    _info.npy, or a folder of several of these.

    Raises:
        UserError: none of these; a flat .h5 whose arrays do not fit each other.
    """
    return open_once(Path(path), _open_regions)


def _open_regions(path: Path) -> RegionStore:
    if store := _open(path):
        return store
    stores = [store for child in sorted(path.iterdir()) if (store := _open(child))] if path.is_dir() else []
    if stores:
        return _Several(path, stores)
    raise UserError(
        f"{path}: no region features; an LMDB folder, .h5, .tsv, a folder of .npz or _info.npy files is "
        "read, or a folder of these"
    )


def _open(path: Path) -> RegionStore | None:
    if (path / "data.mdb").is_file():
        return _Lmdb(path)
    if path.suffix in (".h5", ".hdf5") and path.is_file():
        return _FlatH5(path) if _is_flat(path) else _H5(path)
    if path.suffix == ".tsv" and path.is_file():
        return _Tsv(path)
    for kind, files in ((_Npz, "*.npz"), (_Npy, "*_info.npy")):
        if path.is_dir() and any(path.glob(files)):
            return kind(path)
    return None


class _KeyedStore(RegionStore):
    """Looks an image up under the names that it may have. Formats differ in `locate` and `load`."""

    @abstractmethod
    def locate(self, key: str) -> Any:
        """Return where the record of exactly this name lies; None: there is none."""

    @abstractmethod
    def load(self, key: str, place: Any) -> Any:
        """Return the record of this name, which `locate` found at `place`."""

    def _locate_image(self, name: str) -> tuple[str, Any]:
        if may_hold(name, self.words):
            for key in dict.fromkeys((*unicode_forms(name), *unicode_forms(stem(name)))):
                if (place := self.locate(key)) is not None:
                    return key, place
        return name, None

    def has(self, name: str) -> bool:
        return self._locate_image(name)[1] is not None

    def find(self, name: str) -> Regions | None:
        key, place = self._locate_image(name)
        return None if place is None else to_regions(self.load(key, place), f"{self.path}, {key}")


class _Several(RegionStore):
    """Stores side by side, as VOLTA has one for NLVR2 and one for each language of MaRVL. Where several know
    an image's name, the one that is called like the language in the image's folder has it."""

    def __init__(self, path: Path, stores: list[RegionStore]):
        super().__init__(path)
        self.stores = stores

    def has(self, name: str) -> bool:
        return any(store.has(name) for store in self.stores)

    def find(self, name: str) -> Regions | None:
        found = [(store.path, regions) for store in self.stores if (regions := store.find(name)) is not None]
        if len(found) > 1:
            found = [(path, regions) for path, regions in found if folders_of(name) & _words(path)] or found
        if len(found) > 1:
            raise UserError(
                f"{self.path}: regions of '{name}' in {' and in '.join(path.name for path, _ in found)}; "
                "leave one"
            )
        return found[0][1] if found else None


def _words(path: Path) -> set[str]:
    """{"marvl", "id", "boxes36"} of marvl-id_boxes36.lmdb."""
    return {*re.split(r"[^a-z0-9]+", path.stem)}


class _Lmdb(_KeyedStore):
    """VOLTA's: key, the image's id; value, a pickled dict {features, boxes, img_h, img_w, num_boxes}."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._pages: LmdbPages | None = LmdbPages(path / "data.mdb")

    def pages(self) -> LmdbPages:
        if self._pages is None:  # in a process that this was sent to
            self._pages = LmdbPages(self.path / "data.mdb")
        return self._pages

    def locate(self, key: str) -> tuple[int, int] | None:
        return self.pages().find(key.encode(errors="surrogateescape"))

    def load(self, key: str, place: tuple[int, int]) -> dict:
        data, where = self.pages().read(place), f"{self.path}, {key}"
        with reading_record(where):
            return load_plain(data, where)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_pages": None}


class _H5(_KeyedStore):
    """A group an image, with the datasets features, boxes, img_h, img_w."""

    def __init__(self, path: Path):
        super().__init__(path)
        # (process, open file): an H5 file does not survive a fork
        self._handle: tuple[int, Any] | None = None

    def handle(self) -> Any:
        if self._handle is None or self._handle[0] != os.getpid():
            self._handle = (os.getpid(), _open_h5(self.path))
            self.size = self.path.stat().st_size
        return self._handle[1]

    @contextmanager
    def reading(self, key: str) -> Iterator[None]:
        """As `reading_record`, of the image `key`.

        Raises:
            UserError: the file has become shorter.
        """
        try:
            with reading_record(f"{self.path}, {key}"):
                yield
        except BadImage:
            if (now := self.path.stat().st_size) < self.size:
                raise UserError(
                    f"{self.path}: {now:,} bytes, {self.size:,} before; restore it, and start again"
                ) from None
            raise

    def locate(self, key: str) -> Any:
        from finetune.stores.hdf5 import find_member

        file = self.handle()
        with self.reading(key):
            return find_member(file, key)

    def load(self, key: str, place: Any) -> dict:
        from finetune.stores.hdf5 import find_member, read_dataset

        file = self.handle()
        with self.reading(key):
            record: dict[str, Any] = dict.fromkeys(place)
            for name in record.keys() & FIELDS:
                record[name] = read_dataset(file, find_member(place, name), name)
            return record

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handle": None}


class _FlatH5(_H5):
    """M3P's: row i of the datasets image_id, features (N, R, f), bbox (or boxes), wh and, where images have
    fewer than R regions, num_boxes is image i.

    M3P reads `wh` as height and width. Here the file's own boxes decide, which must lie inside their
    images; where they fit both ways the name is believed.
    """

    CHECKED = 1000  # images whose boxes decide

    def __init__(self, path: Path):
        from finetune.stores.hdf5 import check_flat

        super().__init__(path)
        file = self.handle()
        with reading(path, H5, COPY):
            self.boxes, ids = check_flat(file)
            self.rows = {stem(name): row for row, name in enumerate(ids)}
            if len(self.rows) < len(ids):
                raise ValueError(
                    f"{len(ids):,} values of image_id, of which {len(self.rows):,} are different"
                )
            # the right and bottom ends of the boxes tell which of `wh` is the width
            reach = file[self.boxes][: self.CHECKED][..., 2:].max(1)
            sizes = file["wh"][: self.CHECKED]
        orders = ((0, 1), (1, 0))
        fitting = [int((reach <= sizes[:, order] + 1).all(1).sum()) for order in orders]
        if not any(fitting):
            raise UserError(
                f"{path}: boxes lie outside their images, whether wh is width and height or the other way "
                "round"
            )
        self.order = orders[int(fitting[1] > fitting[0])]

    def locate(self, key: str) -> int | None:
        return self.rows.get(key)

    def load(self, key: str, place: int) -> dict:
        file = self.handle()
        with self.reading(key):
            width, height = file["wh"][place][list(self.order)]
            record = {"features": file["features"][place], "boxes": file[self.boxes][place]}
            record |= {"img_h": height, "img_w": width}
            if "num_boxes" in file:
                count = int(np.ravel(file["num_boxes"][place])[0])
                rows = slice(max(0, count))  # a negative one would cut off the last
                record |= {"features": record["features"][rows], "boxes": record["boxes"][rows]}
                record["num_boxes"] = count
            return record


class _Folder(_KeyedStore):
    """Files called ID and one of `endings` each. The folder is listed once: to ask for each file takes a
    thousand times as long on a network's disk."""

    endings: ClassVar[tuple[str, ...]]

    def __init__(self, path: Path):
        super().__init__(path)
        self._names: list[np.ndarray] | None = None  # sorted, of each ending

    def locate(self, key: str) -> str | None:
        if self._names is None:
            found: list[list[bytes]] = [[] for _ in self.endings]
            with os.scandir(self.path) as entries:
                for entry in entries:
                    for names, ending in zip(found, self.endings, strict=True):
                        if entry.name.endswith(ending) and entry.is_file():
                            names.append(os.fsencode(entry.name.removesuffix(ending)))
            # as arrays, which all processes share
            self._names = [np.array(sorted(names), np.bytes_) for names in found]
        name = os.fsencode(key)
        is_there = all(name in names[names.searchsorted(name) :][:1] for names in self._names)
        return key if is_there else None


class _Npz(_Folder):
    """ID.npz with the arrays features, boxes, img_h, img_w; UC2's have norm_bb, whose first four columns are
    shares of the image."""

    endings = (".npz",)

    def load(self, key: str, place: str) -> dict:
        file = self.path / f"{key}.npz"
        with reading_record(str(file), "region features (npz)"):
            record = parse_archive(read_bytes(file, MAX_BYTES), FIELDS)
            if "norm_bb" in record:
                record |= {"boxes": record["norm_bb"][:, :4], "img_h": 1.0, "img_w": 1.0}
        return record


class _Npy(_Folder):
    """X101's: ID.npy, the features; ID_info.npy, a pickled dict {bbox, image_height, image_width, num_boxes,
    ...}."""

    endings = (".npy", "_info.npy")

    def load(self, key: str, place: str) -> dict:
        file, info = self.path / f"{key}.npy", self.path / f"{key}_info.npy"
        with reading_record(str(file), "region features (npy)"):
            features = parse_array(read_bytes(file, MAX_BYTES))
        with reading_record(str(info), "what is known of regions (npy)"):
            data = read_bytes(info, MAX_BYTES)
            start, shape, _, dtype = parse_npy_header(data)
            if shape or not dtype.hasobject:  # what follows is an array of one object, pickled
                raise ValueError(f"an array of {dtype} {shape} in place of a dict")
            record = load_plain(data[start:], str(info))
            if not isinstance(record, dict):
                raise ValueError(f"{type(record).__name__} in place of a dict")
        return {"features": features, **{X101.get(name, name): value for name, value in record.items()}}


class _Tsv(_KeyedStore):
    """LXMERT's: a line an image; columns are found by number, arrays are base64 of float32. OSCAR's (VinVL)
    have three: id, number of regions, and for each its features, box, width and height, the last six as
    shares of the image."""

    COLUMNS = (
        "img_id",
        "img_h",
        "img_w",
        "objects_id",
        "objects_conf",
        "attrs_id",
        "attrs_conf",
        "num_boxes",
        "boxes",
        "features",
    )
    OSCAR = 3
    MAX_ID = 1000  # bytes

    def __init__(self, path: Path):
        super().__init__(path)
        self.offsets: dict[str, int] = {}
        with reading(path, "region features (TSV of LXMERT or OSCAR)", COPY), open(path, "rb") as file:
            offset = number = 0
            while line := file.readline(MAX_BYTES):
                number += 1
                key, tab, _ = line[: self.MAX_ID].partition(b"\t")
                if tab:
                    first = self.offsets.setdefault(stem(key.decode("utf-8-sig")), offset)
                    if first != offset and not self._is_same_line(first, line):
                        raise ValueError(f"line {number:,} is of {key.decode()} again, with others")
                elif line.strip():
                    raise ValueError(f"line {number:,} does not begin with an id and a tab")
                if len(line) == MAX_BYTES:
                    raise ValueError(f"line {number:,} has {MAX_BYTES:,} bytes or more")
                offset += len(line)
            if not self.offsets:
                raise ValueError("no line in it")

    def _is_same_line(self, offset: int, line: bytes) -> bool:
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.readline(MAX_BYTES).rstrip() == line.rstrip()

    def locate(self, key: str) -> int | None:
        return self.offsets.get(key)

    def load(self, key: str, place: int) -> dict:
        with open(self.path, "rb") as file:
            file.seek(place)
            line = file.readline(MAX_BYTES).decode("utf-8-sig", errors="replace")
        cells = line.rstrip("\r\n").split("\t")
        if stem(cells[0]) != key:
            raise UserError(f"{self.path}: ends before '{key}', which was in it; restore it, and start again")
        if len(cells) == self.OSCAR:
            return _of_oscar(cells, f"{self.path}, {key}")
        if len(cells) != len(self.COLUMNS):
            raise BadImage(
                f"{self.path}, {key}: {len(cells)} columns, wanted {len(self.COLUMNS)}, or OSCAR's "
                f"{self.OSCAR}"
            )
        return dict(zip(self.COLUMNS, cells, strict=True))


def _of_oscar(cells: list[str], where: str) -> dict:
    """A line of OSCAR's, as `to_regions` takes it."""
    values = decode_floats(cells[2], where)
    with reading_record(where):
        count = int(cells[1])
    if count < 1 or len(values) % count or len(values) // count <= OSCAR_BOX_DIM:
        raise BadImage(f"{where}: {len(values)} values for {count} regions")
    rows = values.reshape(count, -1)
    return {
        "features": rows[:, :-OSCAR_BOX_DIM],
        "boxes": rows[:, -OSCAR_BOX_DIM:][:, :4],
        "img_h": 1.0,
        "img_w": 1.0,
    }


def _open_h5(path: Path) -> Any:
    import h5py

    with reading(path, H5, COPY):
        return h5py.File(path, "r")


def _is_flat(path: Path) -> bool:
    """Tell whether an H5 file holds M3P's arrays over all images, and not a group for each."""
    import h5py

    from finetune.stores.hdf5 import find_member

    with _open_h5(path) as file, reading(path, H5, COPY):
        return isinstance(find_member(file, "image_id"), h5py.Dataset)

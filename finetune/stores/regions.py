"""Features of detected regions by image id: VOLTA's LMDB, H5 (a group an image, or M3P's flat arrays),
LXMERT's or OSCAR's TSV, or a folder of .npz (UC2's too) or of X101's .npy files.

An id is looked for as it is, then without folder and image ending, in each normal form of Unicode: files
disagree on whether ".jpg" belongs to it.
"""

import os
import re
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from finetune.stores import Regions, decode_floats, folders_of, may_hold, stem, to_regions
from finetune.stores.pickles import load_plain
from raylib.cache import open_once
from raylib.data.images import BadImage
from raylib.errors import UserError
from raylib.fileio import unicode_forms

OSCAR_BOX_DIM = 6  # x1, y1, x2, y2, width, height behind each region's features
X101 = {"bbox": "boxes", "image_height": "img_h", "image_width": "img_w"}  # its names -> those of the others
_ENVIRONMENTS: dict[Path, tuple[int, Any]] = {}  # LMDB folder -> (process that opened it, environment)


class RegionStore(ABC):
    """Regions by image id."""

    def __init__(self, path: Path):
        self.path = path

    @abstractmethod
    def has(self, name: str) -> bool:
        """Return whether there are regions of the image `name`; they are not read."""

    @abstractmethod
    def find(self, name: str) -> Regions | None:
        """Return the regions of the image `name`; None if there are none.

        Raises:
            BadImage: they are broken; names file and image. UserError: the file became shorter.
        """

    def find_changed_file(self) -> str | None:
        """Say which file, that is mapped into memory, became shorter; None: none."""
        return None

    def read(self, name: str) -> Regions:
        """Return the regions of the image `name`.

        Raises:
            BadImage: there are none, or they are broken. UserError: the file became shorter.
        """
        regions = self.find(name)
        if regions is None:
            raise BadImage(f"{self.path}: no regions of image '{name}'; check regions=")
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
    """Looks an image up under the names that it may have. Formats differ in `has_key` and `lookup`."""

    @abstractmethod
    def has_key(self, key: str) -> bool:
        """Return whether there is a record of exactly this name."""

    @abstractmethod
    def lookup(self, key: str) -> dict[str, Any]:
        """Return the record of exactly this name."""

    def _find_key(self, name: str) -> str | None:
        keys = dict.fromkeys((*unicode_forms(name), *unicode_forms(stem(name))))
        return next(filter(self.has_key, keys), None) if may_hold(name, _words(self.path)) else None

    def has(self, name: str) -> bool:
        return self._find_key(name) is not None

    def find(self, name: str) -> Regions | None:
        key = self._find_key(name)
        return None if key is None else to_regions(self.lookup(key), f"{self.path}, {key}")


class _Several(RegionStore):
    """Stores side by side, as VOLTA has one for NLVR2 and one for each language of MaRVL. Where several know
    an image's name, the one that is called like the language in the image's folder has it."""

    def __init__(self, path: Path, stores: list[RegionStore]):
        super().__init__(path)
        self.stores = stores

    def has(self, name: str) -> bool:
        return any(store.has(name) for store in self.stores)

    def find_changed_file(self) -> str | None:
        return next(filter(None, (store.find_changed_file() for store in self.stores)), None)

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
        self.folder = path.resolve()
        self.size = (self.folder / "data.mdb").stat().st_size

    def has_key(self, key: str) -> bool:
        self._require_whole()
        with _environment(self.folder).begin() as transaction:
            return transaction.cursor().set_key(key.encode())

    def lookup(self, key: str) -> dict:
        self._require_whole()
        with _environment(self.folder).begin() as transaction:
            return load_plain(transaction.get(key.encode()), f"{self.path}, {key}")

    def find_changed_file(self) -> str | None:
        now = (self.folder / "data.mdb").stat().st_size
        return f"{self.path}/data.mdb: {now:,} bytes, {self.size:,} before" if now < self.size else None

    def _require_whole(self) -> None:
        # LMDB maps its file: what is read beyond its end ends the process (SIGBUS)
        if fault := self.find_changed_file():
            raise UserError(f"{fault}; restore it, and start again")


class _H5(_KeyedStore):
    """A group an image, with the datasets features, boxes, img_h, img_w."""

    def __init__(self, path: Path):
        super().__init__(path)
        # (process, open file): an H5 file does not survive a fork
        self._handle: tuple[int, Any] | None = None

    def handle(self) -> Any:
        import h5py

        if self._handle is None or self._handle[0] != os.getpid():
            try:
                self._handle = (os.getpid(), h5py.File(self.path, "r"))
            except OSError as e:
                raise UserError(f"{self.path}: not read ({e}); is it whole?") from None
            self.size = self.path.stat().st_size
        return self._handle[1]

    def lookup(self, key: str) -> dict:
        with self._named_errors(key):
            return self.read_record(key)

    @contextmanager
    def _named_errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, KeyError) as e:
            now = self.path.stat().st_size
            if now < self.size:
                raise UserError(
                    f"{self.path}: {now:,} bytes, {self.size:,} before; restore it, and start again"
                ) from None
            raise BadImage(f"{self.path}, {key}: not read ({e})") from None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handle": None}

    def has_key(self, key: str) -> bool:
        file = self.handle()
        with self._named_errors(key):
            return key in file

    def read_record(self, key: str) -> dict:
        """As of `lookup`; raises whatever h5py does."""
        group = self.handle()[key]
        return {name: group[name][()] for name in group}


class _FlatH5(_H5):
    """M3P's: row i of the datasets image_id, features (N, R, f), bbox (or boxes), wh and, where images have
    fewer than R regions, num_boxes is image i.

    M3P reads `wh` as height and width. Here the file's own boxes decide, which must lie inside their
    images; where they fit both ways the name is believed.
    """

    CHECKED = 1000  # images whose boxes decide

    def __init__(self, path: Path):
        super().__init__(path)
        file = self.handle()
        boxes = "bbox" if "bbox" in file else "boxes"
        missing = [name for name in ("features", boxes, "wh") if name not in file]
        if missing:
            raise UserError(f"{path}: no {', '.join(missing)}; it has {', '.join(sorted(file))}")
        ids = [i.decode() if isinstance(i, bytes) else str(i) for i in file["image_id"][()]]
        if any(len(file[name]) != len(ids) for name in ("features", boxes, "wh")):
            raise UserError(
                f"{path}: {len(ids)} values of image_id, but other datasets have more or fewer rows"
            )
        self.rows, self.boxes = {stem(name): row for row, name in enumerate(ids)}, boxes
        # the right and bottom ends of the boxes tell which of `wh` is the width
        reach = file[boxes][: self.CHECKED].reshape(-1, file[boxes].shape[1], 4)[..., 2:].max(1)
        sizes = file["wh"][: self.CHECKED].reshape(-1, 2)
        finite = np.isfinite(reach).all(1) & np.isfinite(sizes).all(1)
        if not finite.all():
            raise UserError(
                f"{path}, {ids[int(np.argmin(finite))]}: {boxes} or wh not finite (NaN or infinite)"
            )
        orders = [order for order in ((0, 1), (1, 0)) if (reach <= sizes[:, order] + 1).all()]
        if not orders:
            raise UserError(
                f"{path}: boxes lie outside their images, whether wh is width and height or the other way "
                "round"
            )
        self.order = orders[0]

    def has_key(self, key: str) -> bool:
        return key in self.rows

    def read_record(self, key: str) -> dict:
        row, file = self.rows[key], self.handle()
        count = int(np.ravel(file["num_boxes"][row])[0]) if "num_boxes" in file else None
        width, height = np.ravel(file["wh"][row])[list(self.order)]
        return {
            "features": file["features"][row][:count],
            "boxes": file[self.boxes][row][:count],
            "img_h": height,
            "img_w": width,
        }


class _Folder(_KeyedStore):
    """Files called ID and one of `endings` each. The folder is listed once: to ask for each file takes a
    thousand times as long on a network's disk."""

    endings: ClassVar[tuple[str, ...]]

    def __init__(self, path: Path):
        super().__init__(path)
        self._names: list[np.ndarray] | None = None  # sorted, of each ending

    def has_key(self, key: str) -> bool:
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
        return all(name in names[names.searchsorted(name) :][:1] for names in self._names)


class _Npz(_Folder):
    """ID.npz with the arrays features, boxes, img_h, img_w; UC2's have norm_bb, whose first four columns are
    shares of the image."""

    endings = (".npz",)

    def lookup(self, key: str) -> dict:
        file = self.path / f"{key}.npz"
        try:
            with np.load(file, allow_pickle=False) as arrays:
                record = dict(arrays)
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as e:
            raise BadImage(f"{file}: not read ({e})") from None
        if "norm_bb" in record:
            record |= {"boxes": record["norm_bb"][:, :4], "img_h": 1.0, "img_w": 1.0}
        return record


class _Npy(_Folder):
    """X101's: ID.npy, the features; ID_info.npy, a pickled dict {bbox, image_height, image_width, num_boxes,
    ...}."""

    endings = (".npy", "_info.npy")

    def lookup(self, key: str) -> dict:
        file, info = self.path / f"{key}.npy", self.path / f"{key}_info.npy"
        try:
            features = np.load(file, allow_pickle=False)
            with open(info, "rb") as stream:
                np.lib.format.read_magic(stream)
                np.lib.format.read_array_header_1_0(stream)  # what follows is an array of one object, pickled
                record = dict(load_plain(stream.read(), str(info)))
        except (ValueError, TypeError, EOFError) as e:
            raise BadImage(f"{info}: not read ({e})") from None
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

    def __init__(self, path: Path):
        super().__init__(path)
        self.offsets: dict[str, int] = {}
        with open(path, "rb") as file:
            offset = 0
            for line in file:
                self.offsets[stem(line.split(b"\t", 1)[0].decode())] = offset
                offset += len(line)

    def has_key(self, key: str) -> bool:
        return key in self.offsets

    def lookup(self, key: str) -> dict:
        with open(self.path, "rb") as file:
            file.seek(self.offsets[key])
            cells = file.readline().decode(errors="replace").rstrip("\n").split("\t")
        if not any(cells):
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
    values, count = decode_floats(cells[2], where), int(cells[1])
    if count < 1 or len(values) % count or len(values) // count <= OSCAR_BOX_DIM:
        raise BadImage(f"{where}: {len(values)} values for {count} regions")
    rows = values.reshape(count, -1)
    return {
        "features": rows[:, :-OSCAR_BOX_DIM],
        "boxes": rows[:, -OSCAR_BOX_DIM:][:, :4],
        "img_h": 1.0,
        "img_w": 1.0,
    }


def _environment(path: Path) -> Any:
    """The one LMDB environment of a process and a folder: LMDB refuses a second, and one that was open before
    a fork."""
    import lmdb

    # opened again in each process: workers fork after the first has opened it
    process, environment = _ENVIRONMENTS.get(path, (None, None))
    if process != os.getpid():
        if environment is not None:
            environment.close()  # the parent keeps its own
        try:
            environment = lmdb.open(str(path), readonly=True, lock=False, readahead=False)
        except lmdb.Error as e:
            raise UserError(f"{path}: not read ({e}); is it whole?") from None
        # before anything is read: beyond the end of a mapped file lies the end of the process
        whole = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        size = (path / "data.mdb").stat().st_size
        if size < whole:
            environment.close()
            raise UserError(f"{path}/data.mdb: {size:,} of {whole:,} bytes: it is cut off; copy it anew")
        _ENVIRONMENTS[path] = (os.getpid(), environment)
    return environment


def _is_flat(path: Path) -> bool:
    """Tell whether an H5 file holds M3P's arrays over all images, and not a group for each."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return isinstance(file.get("image_id"), h5py.Dataset)
    except OSError as e:
        raise UserError(f"{path}: not read ({e}); is it whole?") from None

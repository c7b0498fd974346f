"""Readers of images and of region features."""

import base64
import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz.oracles import open_picture, write_files
from tests.fuzz.reader import MIB, Reader
from tests.fuzz.readers.corpora import picture, tar_of_images

NAMES = ("1", "2")
COLUMNS = [
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
]


def arrays(number: int) -> dict[str, Any]:
    """The region features of an image."""
    import numpy as np

    return {
        "features": np.arange(6, dtype=np.float32).reshape(2, 3) + number,
        "boxes": np.array([[0, 0, 10, 20], [10, 5, 40, 20]], np.float32),
        "img_h": 20,
        "img_w": 40,
    }


def regions(record: dict[str, Any]) -> dict[str, Any]:
    """What a record of region features comes to, if it is right."""
    import numpy as np

    def floats(value: Any) -> Any:
        if isinstance(value, str | bytes):
            text = value.encode() if isinstance(value, str) else value
            text = b"".join(text.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
            value = np.frombuffer(base64.b64decode(text + b"=" * (-len(text) % 4), validate=True), "<f4")
        array = np.asarray(value)
        assert array.dtype.kind in "iuf"
        with np.errstate(over="ignore"):
            return array.astype(np.float32)

    boxes, features = floats(record["boxes"]), floats(record["features"])
    boxes = boxes.reshape(-1, 4)
    features = features.reshape(len(boxes), -1)
    height, width = (float(np.asarray(record[name]).reshape(()).item()) for name in ("img_h", "img_w"))
    assert np.isfinite(features).all() and np.isfinite(boxes).all() and features.size
    assert 0 < height < np.inf and 0 < width < np.inf
    slack = np.array([1 if side > 1 else 0.01 for side in (width, height)])
    assert (boxes[:, :2] >= -slack).all() and (boxes[:, 2:] <= np.array([width, height]) + slack).all()
    assert (boxes[:, 2:] >= boxes[:, :2]).all()
    if "num_boxes" in record:
        assert float(np.asarray(record["num_boxes"]).reshape(()).item()) == len(boxes)
    tags = tuple(tag.decode() if isinstance(tag, bytes) else tag for tag in record.get("tags", ()))
    return {"features": features, "boxes": boxes, "height": height, "width": width, "tags": tags}


def read_regions(path: Path) -> Any:
    from finetune.stores.regions import open_regions

    store = open_regions(path)
    return {name: store.read(name)._asdict() for name in NAMES}


def each(load: Callable[[Path, str], dict[str, Any]]) -> Callable[[Path], Any]:
    """An oracle that reads the record of each image."""
    return lambda path: {name: regions(load(path, name)) for name in NAMES}


def example_npz(folder: Path) -> Path:
    return write_npz(folder, arrays)


def example_uc2(folder: Path) -> Path:
    def record(number: int) -> dict[str, Any]:
        import numpy as np

        boxes = np.array([[0, 0, 0.25, 1, 0.25, 1], [0.25, 0.5, 1, 1, 0.75, 0.5]], np.float32)
        return {"features": arrays(number)["features"], "norm_bb": boxes}

    return write_npz(folder, record)


def write_npz(folder: Path, record: Callable[[int], dict[str, Any]]) -> Path:
    """Files as `np.savez` writes them, of the same bytes each time."""
    import numpy as np

    (folder / "regions").mkdir()
    for number, name in enumerate(NAMES):
        with zipfile.ZipFile(folder / "regions" / f"{name}.npz", "w") as archive:
            for key, value in record(number).items():
                stream = io.BytesIO()
                np.lib.format.write_array(stream, np.asarray(value))
                archive.writestr(zipfile.ZipInfo(f"{key}.npy"), stream.getvalue())
    return folder / "regions"


def load_npz(path: Path, name: str) -> dict[str, Any]:
    import numpy as np

    record, fields = {}, (*arrays(0), "num_boxes", "norm_bb", "tags")
    with zipfile.ZipFile(path / f"{name}.npz") as archive:
        for member in archive.namelist():
            if member.removesuffix(".npy") in fields:
                stream = io.BytesIO(archive.read(member))
                record[member.removesuffix(".npy")] = np.lib.format.read_array(stream, allow_pickle=False)
                assert not stream.read(1)
    if "norm_bb" in record:
        record |= {"boxes": record["norm_bb"][:, :4], "img_h": 1.0, "img_w": 1.0}
    return record


class Arrays(pickle.Unpickler):
    """The standard library's, which builds arrays of NumPy and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        import numpy as np

        found = {"_reconstruct": np._core.multiarray._reconstruct, "ndarray": np.ndarray, "dtype": np.dtype}
        found["scalar"] = np._core.multiarray.scalar
        found["_frombuffer"] = np._core.numeric._frombuffer
        if module == "_codecs" and name == "encode":
            return lambda text, codec: text.encode(codec)
        if not module.startswith("numpy"):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return found[name]


def example_npy(folder: Path) -> Path:
    import numpy as np

    (folder / "regions").mkdir()
    for number, name in enumerate(NAMES):
        record = arrays(number)
        np.save(folder / "regions" / f"{name}.npy", record["features"])
        info = {"bbox": record["boxes"], "image_height": 20, "image_width": 40, "num_boxes": 2}
        np.save(folder / "regions" / f"{name}_info.npy", np.array(info, object), allow_pickle=True)
    return folder / "regions"


def load_npy(path: Path, name: str) -> dict[str, Any]:
    import numpy as np

    features = np.load(io.BytesIO((path / f"{name}.npy").read_bytes()), allow_pickle=False)
    with open(path / f"{name}_info.npy", "rb") as file:
        version = np.lib.format.read_magic(file)
        header = getattr(np.lib.format, f"read_array_header_{version[0]}_{version[1]}")(file)
        assert header[0] == () and header[2].kind == "O"
        info = Arrays(file).load()
    info = info.item() if isinstance(info, np.ndarray) else info
    names = {"bbox": "boxes", "image_height": "img_h", "image_width": "img_w"}
    return {"features": features, **{names.get(key, key): value for key, value in info.items()}}


def cells_of(number: int) -> list[str]:
    """A line of LXMERT's table."""
    record = {**arrays(number), "num_boxes": 2, "img_id": NAMES[number]}
    encoded = {key: base64.b64encode(record[key].tobytes()).decode() for key in ("boxes", "features")}
    return [str({**record, **encoded}.get(column, "")) for column in COLUMNS]


def oscar_cells(number: int) -> list[str]:
    import numpy as np

    record = arrays(number)
    boxes = record["boxes"] / np.array([40, 20, 40, 20], np.float32)
    sizes = boxes[:, 2:] - boxes[:, :2]
    rows = np.concatenate([record["features"], boxes, sizes], 1).astype(np.float32)
    return [NAMES[number], "2", base64.b64encode(rows.tobytes()).decode()]


def example_table(cells: Callable[[int], list[str]]) -> Callable[[Path], Path]:
    """A table of the images, the first of which stands there twice."""
    return lambda folder: write_files(
        {"regions.tsv": "".join("\t".join(cells(number)) + "\n" for number in (0, 1, 0))}
    )(folder)


def load_table(path: Path, name: str) -> dict[str, Any]:
    """A line of three columns is OSCAR's, of ten LXMERT's."""
    import numpy as np

    rows = [line.rstrip("\r\n").split("\t") for line in io.StringIO(path.read_bytes().decode(), newline="\n")]
    cells, *others = [row for row in rows if row[0].rsplit("/", 1)[-1].removesuffix(".jpg") == name]
    # an image that comes twice is one image if it is the same
    assert all(other == cells for other in others)
    if len(cells) != 3:
        assert len(cells) == len(COLUMNS)
        record = dict(zip(COLUMNS, cells, strict=True))
        return {**record, **{key: float(record[key]) for key in ("img_h", "img_w", "num_boxes")}}
    text = cells[2].translate(str.maketrans("-_", "+/")).rstrip("=")
    data = base64.b64decode("".join(text.split()) + "=" * (-len(text) % 4), validate=True)
    values = np.frombuffer(data, "<f4").reshape(int(cells[1]), -1)
    return {"features": values[:, :-6], "boxes": values[:, -6:-2], "img_h": 1.0, "img_w": 1.0}


def example_h5(folder: Path) -> Path:
    import h5py

    with h5py.File(folder / "regions.h5", "w") as file:
        for number, name in enumerate(NAMES):
            for key, value in arrays(number).items():
                file.create_dataset(f"{name}/{key}", data=value)
    return folder / "regions.h5"


def load_h5(path: Path, name: str) -> dict[str, Any]:
    """A group an image, or M3P's arrays over all of them."""
    import h5py

    with h5py.File(path, "r") as file:
        if isinstance(file.get("image_id"), h5py.Dataset):
            return load_flat_h5(file, name)
        fields = (*arrays(0), "num_boxes", "tags")
        return {key: file[name][key][()] for key in file[name] if key in fields}


def example_flat_h5(folder: Path) -> Path:
    import h5py
    import numpy as np

    with h5py.File(folder / "regions.h5", "w") as file:
        records = [arrays(number) for number in range(len(NAMES))]
        file["image_id"] = np.array(NAMES, "S8")
        file["features"] = np.stack([record["features"] for record in records])
        file["bbox"] = np.stack([record["boxes"] for record in records])
        file["wh"] = np.array([[40, 20]] * 2, np.float32)
    return folder / "regions.h5"


def load_flat_h5(file: Any, name: str) -> dict[str, Any]:
    """`wh` is read in the order in which more boxes fit."""
    import numpy as np

    ids = [i.decode() if isinstance(i, bytes) else str(i) for i in file["image_id"][()]]
    boxes, sizes = file["bbox" if "bbox" in file else "boxes"][()], np.asarray(file["wh"][()])
    reach = boxes[..., 2:].max(1)
    fits = [int((reach <= sizes[:, order] + 1).all(1).sum()) for order in ([0, 1], [1, 0])]
    row = ids.index(name)
    width, height = sizes[row] if fits[0] >= fits[1] else sizes[row][::-1]
    count = int(np.ravel(file["num_boxes"][row])[0]) if "num_boxes" in file else None
    record = {"features": file["features"][row][:count], "boxes": boxes[row][:count]}
    return {**record, "img_h": height, "img_w": width}


def example_lmdb(folder: Path) -> Path:
    """An LMDB of one value a page and of one that takes several, with a branch above the leaves."""
    import lmdb

    with lmdb.open(str(folder / "regions.lmdb"), map_size=4 * MIB) as environment:
        for name in NAMES:
            with environment.begin(write=True) as transaction:
                value = pickle.dumps({**arrays(NAMES.index(name)), "num_boxes": 2}, 4)
                transaction.put(name.encode(), value)
                transaction.put(f"x{name}".encode(), value * 20)
    (folder / "regions.lmdb" / "lock.mdb").unlink()
    return folder / "regions.lmdb"


def load_lmdb(path: Path, name: str) -> dict[str, Any]:
    import lmdb

    with lmdb.open(str(path), readonly=True, lock=False) as environment, environment.begin() as transaction:
        return Arrays(io.BytesIO(transaction.get(name.encode()))).load()


def read_pictures(path: Path) -> Any:
    from finetune.stores.images import open_images

    store = open_images(path)
    return {name: store.read(name) for name in ("0", "1", "2")}


def pixels(data: bytes) -> Any:
    """An image's pixels as Pillow decodes them: over white, and turned as EXIF says."""
    import numpy as np
    from PIL import Image, ImageOps

    with open_picture(data) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, -1)
        if "A" in image.mode or "transparency" in image.info:
            image = image.convert("RGBA")
            over = Image.new("RGBA", image.size, (255, 255, 255, 255))
            over.alpha_composite(image)
            image = over
        return np.asarray(image.convert("RGB"))


def load_pictures(path: Path) -> Any:
    if path.is_dir():
        files = {file.name: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    else:
        with tarfile.open(path, "r:", ignore_zeros=True) as tar:
            files = {
                member.name.rsplit("/", 1)[-1]: tar.extractfile(member).read()
                for member in tar
                if member.isreg()
            }
    return {name.split(".")[0]: pixels(data) for name, data in files.items() if name.split(".")[0] in "012"}


def same_pixels(values: Any, expected: Any) -> bool:
    """Equal, but for what decoders of lossy images round."""
    import numpy as np

    return values.keys() == expected.keys() and all(
        image.shape == expected[name].shape
        and int(np.abs(image.astype(int) - expected[name].astype(int)).max()) <= 4
        for name, image in values.items()
    )


def example_pictures(folder: Path) -> Path:
    kinds = ("png", "jpg", "webp")
    return write_files({f"a/{n}.{kind}": picture(n, kind) for n, kind in enumerate(kinds)})(folder)


def read_picture(path: Path) -> Any:
    from raylib.data.images import load_image

    return {"0": load_image(path)}


STORE = "finetune.stores.regions"
READERS = [
    Reader(
        "regions_npz",
        example_npz,
        read_regions,
        each(load_npz),
        (f"{STORE}:_Npz.load", "finetune.stores.arrays:parse_archive"),
        targets=("1.npz",),
    ),
    Reader("regions_uc2", example_uc2, read_regions, each(load_npz), (f"{STORE}:_Npz.load",)),
    Reader(
        "regions_npy",
        example_npy,
        read_regions,
        each(load_npy),
        (f"{STORE}:_Npy.load",),
    ),
    Reader(
        "regions_lxmert",
        example_table(cells_of),
        read_regions,
        each(load_table),
        (f"{STORE}:_Tsv.__init__", f"{STORE}:_Tsv.load", f"{STORE}:_Tsv._is_same_line"),
    ),
    Reader(
        "regions_oscar",
        example_table(oscar_cells),
        read_regions,
        each(load_table),
        (f"{STORE}:_Tsv.__init__", f"{STORE}:_Tsv.load"),
    ),
    Reader("regions_h5", example_h5, read_regions, each(load_h5), (f"{STORE}:_open_h5",)),
    Reader("regions_flat_h5", example_flat_h5, read_regions, each(load_h5), (f"{STORE}:_open_h5",)),
    Reader(
        "regions_lmdb",
        example_lmdb,
        read_regions,
        each(load_lmdb),
        (f"{STORE}:_Lmdb.load",),
        targets=("data.mdb",),
    ),
    Reader(
        "image_store_folder",
        example_pictures,
        read_pictures,
        load_pictures,
        ("finetune.stores.images:ImageStore._bytes", "raylib.data.images:decode_image"),
        agree=same_pixels,
        compares="pixels, to within 4 of 255",
    ),
    Reader(
        "image_store_tar",
        lambda folder: write_files({"images.tar": tar_of_images()})(folder),
        read_pictures,
        load_pictures,
        (
            "finetune.stores.images:_open_images",
            "finetune.stores.images:ImageStore._bytes",
            "raylib.data.images:decode_image",
        ),
        agree=same_pixels,
        compares="pixels, to within 4 of 255",
    ),
    *(
        Reader(
            f"image_{kind}",
            lambda folder, kind=kind: write_files({f"0.{kind}": picture(0, kind)})(folder),
            read_picture,
            lambda path: {"0": pixels(path.read_bytes())},
            tuple(
                f"raylib.data.images:{name}" for name in ("_read_bytes", "read_image_file", "decode_image")
            ),
            agree=same_pixels,
            compares="pixels, to within 4 of 255",
        )
        for kind in ("png", "jpg", "webp", "bmp", "gif", "avif")
    ),
]

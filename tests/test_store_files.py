"""Files of region features that are damaged, cut off, foreign or hostile: one line, little memory."""

import base64
import io
import random
import resource
import zipfile

import h5py
import numpy as np
import pytest

from finetune.stores.arrays import parse_array
from finetune.stores.lmdb_pages import LmdbPages
from finetune.stores.regions import open_regions
from raylib.data.images import BadImage
from raylib.errors import UserError
from tests.test_stores import BOXES, FEATURES, write_flat_h5, write_lmdb, write_store


def read_both(path):
    store = open_regions(path)
    return [store.read(name) for name in ("7", "8")]


# ---- LMDB


def example_lmdb(tmp_path, count=400):
    """A tree of three levels, with values in pages of their own; return (folder, values)."""
    rng = random.Random(0)
    values = {
        f"image {rng.randrange(10**9)}": rng.randbytes(rng.choice((10, 300, 5000))) for _ in range(count)
    }
    import lmdb

    with lmdb.open(str(tmp_path / "l"), map_size=1 << 24) as environment:
        for half in (list(values)[::2], list(values)[1::2]):
            with environment.begin(write=True) as transaction:
                for key in half:
                    transaction.put(key.encode(), values[key])
        with environment.begin(write=True) as transaction:
            for key in list(values)[::7]:
                transaction.delete(key.encode())
                del values[key]
    return tmp_path / "l", values


def test_lmdb_pages_find_what_lmdb_wrote(tmp_path):
    folder, values = example_lmdb(tmp_path)
    pages, rng = LmdbPages(folder / "data.mdb"), random.Random(1)
    assert {key: pages.read(pages.find(key.encode())) for key in values} == values
    for _ in range(500):
        key = rng.choice((rng.randbytes(3), rng.choice([*values]).encode() + b"0"))
        assert pages.find(key) is None
    with pytest.raises(UserError, match=r"data.mdb: no such file"):
        LmdbPages(tmp_path / "data.mdb")
    assert LmdbPages(write_lmdb(tmp_path / "empty", {}) / "data.mdb").find(b"7") is None


def test_damaged_lmdb_never_ends_the_process(tmp_path):
    """Flips in its heads and pages: a value is found, or none, or one line says why not."""
    folder, values = example_lmdb(tmp_path, 60)
    data, rng, lines = (folder / "data.mdb").read_bytes(), random.Random(2), set()
    keys = [key.encode() for key in values]
    for _ in range(600):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 3, 20))):
            # the heads of pages and the nodes in them, more often than values
            place = (
                rng.randrange(len(data)) if rng.random() < 0.3 else rng.randrange(len(data) // 4096) * 4096
            )
            place = min(place + rng.randrange(160), len(data) - 9)
            size = rng.choice((1, 2, 8))
            damaged[place : place + size] = rng.choice((rng.randbytes(size), b"\xff" * size, bytes(size)))
        (tmp_path / "data.mdb").write_bytes(damaged)
        try:
            pages = LmdbPages(tmp_path / "data.mdb")
            for key in keys:
                if place := pages.find(key):
                    assert len(pages.read(place)) <= len(data)
        except UserError as error:
            lines.add(str(error))
    assert len(lines) > 5
    assert all(line.startswith(f"{tmp_path}/data.mdb: ") and "\n" not in line for line in lines)


def test_lmdb_of_other_kinds_is_refused(tmp_path):
    import lmdb

    folder = write_lmdb(tmp_path / "d", {"7": b"x"})
    data = bytearray((folder / "data.mdb").read_bytes())
    for head in (0, 4096):
        data[head + 92 : head + 94] = b"\x08\0"  # flags of the tree of values: keys that are numbers
    (folder / "data.mdb").write_bytes(data)
    with pytest.raises(UserError, match="keys or values are of another kind"):
        open_regions(tmp_path / "d")
    with lmdb.open(str(tmp_path / "n"), map_size=1 << 20, max_dbs=2) as environment:
        environment.open_db(b"7")
    with pytest.raises(BadImage, match="a value that is a tree"):
        open_regions(tmp_path / "n").read("7")


def test_lmdb_that_is_cut_off_while_it_is_read_is_named(tmp_path):
    store = open_regions(write_store("lmdb", tmp_path))
    assert store.has("7")
    with open(tmp_path / "lmdb" / "data.mdb", "r+b") as file:
        file.truncate(5000)
    for call in (store.has, store.read):
        with pytest.raises(UserError, match="data.mdb: cut off") as error:
            call("7")
        assert not isinstance(error.value, BadImage)  # the run ends: it is not this image's fault


# ---- npz


def write_npz(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_npz_that_decompresses_to_more_than_it_says_is_refused(tmp_path):
    """A member of 100 bytes, whose data are 64 MB."""
    (tmp_path / "r").mkdir()
    path = tmp_path / "r" / "7.npz"
    write_npz(path, {"features.npy": bytes(1 << 26)})
    data = path.read_bytes()
    data = data.replace((1 << 26).to_bytes(4, "little"), (100).to_bytes(4, "little"))
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadImage, match="r/7.npz: not to be read"):
        open_regions(tmp_path / "r").read("7")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # KB


def test_files_of_an_image_are_limited_in_size(tmp_path):
    (tmp_path / "r").mkdir()
    with open(tmp_path / "r" / "7.npz", "wb") as file:
        file.write(b"PK\3\4")
        file.truncate((1 << 28) + 1)
    with pytest.raises(BadImage, match="268,435,457 bytes, of which"):
        open_regions(tmp_path / "r").read("7")


# ---- HDF5


@pytest.mark.parametrize("chunks", [None, (1,), (2,)])
def test_flat_h5_ids_of_any_length_are_read(tmp_path, chunks):
    path = write_flat_h5(tmp_path / "flat.h5", wh=[[40, 20], [40, 20]])
    with h5py.File(path, "a") as file:
        del file["image_id"]
        names = ["7.jpg", "\u00e9" * 50]
        file.create_dataset("image_id", data=names, dtype=h5py.string_dtype(), chunks=chunks)
    store = open_regions(path)
    assert (store.read("7").features == FEATURES).all() and store.has("\u00e9" * 50)


def test_flat_h5_whose_strings_never_end_is_refused(tmp_path):
    """Of such, flipped in a block of strings, HDF5 reads for ever, or dies."""
    path = write_flat_h5(tmp_path / "flat.h5", ids=("7", "8"), wh=[[40, 20], [40, 20]])
    data, rng, lines = path.read_bytes(), random.Random(0), set()
    block = data.index(b"GCOL")
    read = 0
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 3))):
            damaged[block + rng.randrange(80)] = rng.choice((0, 1, 255, rng.randrange(256)))
        path.write_bytes(damaged)
        try:
            read += bool(open_regions(path).rows)
        except UserError as error:
            lines.add(str(error))
    assert read and lines and all(f"{path}: not to be read as" in line for line in lines)


def test_flat_h5_counts_and_order(tmp_path):
    wh = [[40, 20], [40, 20]]
    for number, count in enumerate((-1, 0, 9)):
        path = write_flat_h5(tmp_path / f"{number}.h5", wh=wh, num_boxes=[2, count])
        store = open_regions(path)
        assert len(store.read("7").boxes) == 2
        words = "num_boxes 9, and 3 boxes" if count == 9 else "0 feature values for 0 boxes"
        with pytest.raises(BadImage, match=f"{number}.h5, 8: {words}"):
            store.read("8")
    # one image whose size is wrong does not decide for the others
    store = open_regions(write_flat_h5(tmp_path / "f.h5", wh=[[40, 20], [4, 2]]))
    assert store.read("7").width == 40
    with pytest.raises(BadImage, match="f.h5, 8: box 0 .* is not inside the image, 4 x 2"):
        store.read("8")


# ---- TSV


def test_tsv_that_is_none_is_one_line(tmp_path):
    path = write_store("tsv", tmp_path)
    whole = path.read_text()
    first, second = whole.splitlines()
    for text, words in (
        ("just words\n", "line 1 does not begin with an id and a tab"),
        (whole + '{"json": 1}\n', "line 3 does not begin"),
        ("x" * 2000 + "\t1\n", "line 1 does not begin"),
        ("\n\n", "no line in it"),
        (whole + first.replace("40", "50") + "\n", "line 3 is of 7 again"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=f"r.tsv: not to be read as region features .*{words}"):
            open_regions(path)
    path.write_text(whole + first + "\n\n")  # again, but the same
    assert len(read_both(path)) == 2
    path.write_text("7\tx\tAAAA\n8\t0\tAAAA\n")
    for name in ("7", "8"):
        with pytest.raises(BadImage, match=f"r.tsv, {name}: "):
            open_regions(path).read(name)
    path.write_text("\t".join(second.split("\t")[:5]))
    with pytest.raises(BadImage, match="r.tsv, 8: 5 columns, wanted 10"):
        open_regions(path).read("8")


def test_h5_with_strings_of_python_is_read(tmp_path):
    """h5py stores `str` and `bytes` with lengths of their own."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        group = file.create_group("7")
        group["features"], group["boxes"] = (base64.b64encode(x.tobytes()) for x in (FEATURES, BOXES))
        group["img_h"], group["img_w"], group["tags"] = 20, 40, ["Hund", "süß"]
    regions = open_regions(tmp_path / "x.h5").read("7")
    assert (regions.features == FEATURES).all() and (regions.boxes == BOXES).all()
    assert regions.tags == ("Hund", "süß")


@pytest.mark.parametrize("options", [{"shuffle": True}, {"chunks": (1,)}])
def test_flat_h5_with_compressed_ids_is_read(tmp_path, options):
    write_flat_h5(tmp_path / "x.h5", wh=[[40, 20]] * 2)
    with h5py.File(tmp_path / "x.h5", "a") as file:
        del file["image_id"]
        strings = h5py.string_dtype()
        file.create_dataset("image_id", data=["7", "8"], dtype=strings, compression="gzip", **options)
    store = open_regions(tmp_path / "x.h5")
    assert all((store.read(name).features == FEATURES).all() for name in ("7", "8")) and not store.has("9")


def test_npy_of_each_version_is_read(tmp_path):
    for version in ((1, 0), (2, 0), (3, 0)):
        stream = io.BytesIO()
        np.lib.format.write_array(stream, np.asfortranarray(FEATURES), version=version)
        assert (parse_array(stream.getvalue()) == FEATURES).all()

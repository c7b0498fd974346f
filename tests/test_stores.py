"""Pictures and region features by id, from every kind of store."""

import base64
import multiprocessing
import pickle
import tarfile

import cv2
import numpy as np
import pytest

from finetune.stores import locations, open_pictures, open_regions
from raylib.errors import UserError

PICTURE = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
FEATURES = np.arange(6, dtype=np.float32).reshape(2, 3)
BOXES = np.array([[0, 0, 10, 20], [10, 5, 40, 20]], np.float32)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "p" / "sub").mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "p" / "a.png"), PICTURE[..., ::-1])
    cv2.imwrite(str(tmp_path / "p" / "sub" / "b.1.png"), PICTURE[..., ::-1])
    (tmp_path / "p" / "notes.txt").write_text("no picture")
    return tmp_path / "p"


def packed(folder, to):
    with tarfile.open(to, "w") as tar:
        tar.add(folder, arcname="pictures")
    return to


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_pictures_by_id(folder, tmp_path, kind):
    store = open_pictures(folder if kind == "folder" else packed(folder, tmp_path / "p.tar"))
    for name in ("a", "a.png", "b.1", "b.1.png", "images/a.jpg"):
        assert store.has(name) and (store.read(name) == PICTURE).all()
    assert not store.has("c")
    with pytest.raises(UserError, match=r"no picture 'c.jpg'"):
        store.read("c.jpg")
    again = pickle.loads(pickle.dumps(store))
    assert (again.read("a") == PICTURE).all()
    with multiprocessing.get_context("fork").Pool(2) as pool:  # after the parent has opened it
        assert all((p == PICTURE).all() for p in pool.map(store.read, ["a", "b.1"] * 8))


def test_bad_picture_stores_are_named(folder, tmp_path):
    (folder / "sub" / "a.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match=r"two pictures called 'a': a.png and a.jpg"):
        open_pictures(folder)
    (folder / "sub" / "a.jpg").rename(folder / "z.jpg")
    with pytest.raises(UserError, match=r"z: does not decode"):
        open_pictures(folder).read("z")
    with pytest.raises(UserError, match="neither a folder nor a .tar"):
        open_pictures(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures"):
        open_pictures(tmp_path / "empty")


def b64(array):
    return base64.b64encode(np.ascontiguousarray(array, np.float32).tobytes())


def record(**changes):
    return {"features": b64(FEATURES), "boxes": BOXES, "img_h": 20, "img_w": 40, "num_boxes": 2, **changes}


def write_lmdb(path, values):
    import lmdb

    with lmdb.open(str(path), map_size=1 << 20) as env, env.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key.encode(), value)
    return path


def write_store(kind, tmp_path):
    if kind == "lmdb":
        values = {"7": pickle.dumps(record()), "8": pickle.dumps(record(boxes=b64(BOXES), img_h=np.int64(20)))}
        return write_lmdb(tmp_path / "lmdb", {**values, "keys": pickle.dumps([b"7", b"8"])})
    if kind == "h5":
        import h5py

        with h5py.File(tmp_path / "r.h5", "w") as file:
            for name in ("7", "8"):
                group = file.create_group(name)
                group["features"], group["boxes"], group["img_h"], group["img_w"] = FEATURES, BOXES, 20, 40
        return tmp_path / "r.h5"
    if kind == "tsv":
        row = [20, 40, "x", "x", "x", "x", 2, b64(BOXES).decode(), b64(FEATURES).decode()]
        (tmp_path / "r.tsv").write_text("".join("\t".join(map(str, [name, *row])) + "\n" for name in ("7", "8")))
        return tmp_path / "r.tsv"
    (tmp_path / "npz").mkdir()
    for name in ("7", "8"):
        np.savez(tmp_path / "npz" / f"{name}.npz", features=FEATURES, boxes=BOXES, img_h=20, img_w=40)
    return tmp_path / "npz"


@pytest.mark.parametrize("kind", ["lmdb", "h5", "tsv", "npz"])
def test_regions_by_id(tmp_path, kind):
    store = open_regions(write_store(kind, tmp_path))
    for name in ("7", "8"):
        regions = pickle.loads(pickle.dumps(store)).read(name)
        assert (regions.features == FEATURES).all() and (regions.boxes == BOXES).all()
        assert (regions.height, regions.width) == (20, 40)
    with pytest.raises(UserError, match="9"):
        store.read("9")


def test_locations_by_hand():
    assert np.allclose(locations(BOXES, 20, 40, 5), [[0, 0, 0.25, 1, 0.25], [0.25, 0.25, 1, 1, 0.5625]])
    assert np.allclose(locations(BOXES, 20, 40, 7)[1], [0.25, 0.25, 1, 1, 0.75, 0.75, 0.5625])


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch evil",)


def test_bad_regions_are_named_and_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {"evil": pickle.dumps({"features": Evil()}), "odd": pickle.dumps(record(features=b64(FEATURES[0][:1]))),
              "less": pickle.dumps({"features": 1})}  # fmt: skip
    store = open_regions(write_lmdb(tmp_path / "lmdb", values))
    with pytest.raises(UserError, match="evil: not read .*posix.system"):
        store.read("evil")
    assert not (tmp_path / "evil").exists()
    with pytest.raises(UserError, match="odd: 1 feature values for 2 boxes"):
        store.read("odd")
    with pytest.raises(UserError, match="less: no boxes, img_h, img_w"):
        store.read("less")
    with pytest.raises(UserError, match="no region features"):
        open_regions(tmp_path / "nothing")

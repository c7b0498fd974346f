"""Images and region features by id, from every kind of store."""

import base64
import gzip
import multiprocessing
import os
import pickle
import tarfile
import time
import unicodedata

import cv2
import numpy as np
import pytest
import torch

from finetune.stores import normalise_boxes, to_regions
from finetune.stores.images import open_images
from finetune.stores.regions import open_regions
from raylib.cache import write_encoder_states
from raylib.data.images import BadImage
from raylib.errors import UserError
from raylib.packed import Ragged

IMAGE = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
FEATURES = np.arange(6, dtype=np.float32).reshape(2, 3)
BOXES = np.array([[0, 0, 10, 20], [10, 5, 40, 20]], np.float32)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "p" / "sub").mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "p" / "a.png"), IMAGE[..., ::-1])
    cv2.imwrite(str(tmp_path / "p" / "sub" / "b.1.png"), IMAGE[..., ::-1])
    (tmp_path / "p" / "notes.txt").write_text("no picture")
    return tmp_path / "p"


def packed(folder, to):
    with tarfile.open(to, "w") as tar:
        tar.add(folder, arcname="pictures")
    return to


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_image_store_finds_images_by_id(folder, tmp_path, kind):
    store = open_images(folder if kind == "folder" else packed(folder, tmp_path / "p.tar"))
    for name in ("a", "a.png", "b.1", "b.1.png", "images/a.jpg"):
        assert store.has(name) and (store.read(name) == IMAGE).all()
    assert not store.has("c")
    with pytest.raises(UserError, match=r"no image 'c.jpg'"):
        store.read("c.jpg")
    again = pickle.loads(pickle.dumps(store))
    assert (again.read("a") == IMAGE).all()
    with multiprocessing.get_context("fork").Pool(2) as pool:  # after the parent has opened it
        assert all((p == IMAGE).all() for p in pool.map(store.read, ["a", "b.1"] * 8))


def test_image_store_bad_files_are_named(folder, tmp_path):
    (folder / "a.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match=r"two images called 'a': a.jpg and a.png"):
        open_images(folder)
    (folder / "a.jpg").rename(folder / "z.jpg")
    with pytest.raises(UserError, match=r"z: does not decode"):
        open_images(folder).read("z")
    with pytest.raises(UserError, match="neither a folder nor a .tar"):
        open_images(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images"):
        open_images(tmp_path / "empty")


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_image_store_reads_official_layouts(tmp_path, kind):
    """MaRVL's names come again in each language, NLVR2's lie two folders deep, MSCOCO's are names or
    numbers."""
    files = {
        "id/images/1-Angsa/1-5.jpg": 1,
        "zh/images/1-Tian/1-5.jpg": 2,
        "zh/images/1-Tian/1-6.jpg": 3,
        "images/train/12/train-7-0-img0.png": 4,
        "val2014/COCO_val2014_000000000042.jpg": 5,
    }
    for name, shade in files.items():
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / "p" / name), np.full((4, 4, 3), shade * 10, np.uint8))
    store = open_images(tmp_path / "p" if kind == "folder" else packed(tmp_path / "p", tmp_path / "p.tar"))
    expected = {
        "id/1-5.jpg": 1,
        "zh/1-5.jpg": 2,
        "zh/1-6.jpg": 3,
        "train-7-0-img0": 4,
        "000000000042": 5,
        "COCO_val2014_000000000042.jpg": 5,
    }
    assert {name: round(store.read(name).mean() / 10) for name in expected} == expected
    with pytest.raises(
        UserError, match=r"2 images called '1-5.jpg': .*1-(Angsa|Tian)/1-5.jpg, .*; leave one"
    ):
        store.read("1-5.jpg")
    for missing in ("id/1-6.jpg", "sw/1-5.jpg"):  # another language's are not these
        with pytest.raises(UserError, match=f"no image '{missing}'"):
            store.read(missing)


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_image_store_matches_any_unicode_form(tmp_path, kind, stored):
    """macOS stores names in NFD, annotations have them in either form."""
    names = [f"{folder}/\u00e9t\u00e9 \ud55c.png" for folder in ("K\u00f6ln", "K\u00f6niz")]
    for shade, name in enumerate(names):
        path = tmp_path / "p" / unicodedata.normalize(stored, name)
        path.parent.mkdir(parents=True)
        cv2.imwrite(str(path), np.full((4, 4, 3), shade, np.uint8))
    store = open_images(tmp_path / "p" if kind == "folder" else packed(tmp_path / "p", tmp_path / "p.tar"))
    for form in ("NFC", "NFD"):
        asked = [unicodedata.normalize(form, name) for name in names]
        assert [int(store.read(name).mean()) for name in asked] == [0, 1]
        assert not store.has(asked[0].replace("t", "d"))


def test_image_store_tells_names_of_one_hash_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.stores.images.string_key", len)
    for number in range(20):
        path = tmp_path / "p" / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(cv2.imencode(".png", np.full((4, 4, 3), number, np.uint8))[1].tobytes())
    store = pickle.loads(pickle.dumps(open_images(tmp_path / "p")))
    assert [int(store.read(f"{number:02d}")[0, 0, 0]) for number in range(20)] == list(range(20))
    assert not store.has("99") and not store.has("1") and not store.has("\ud83d.png")


def test_image_store_follows_links_in_a_tar(folder, tmp_path):
    os.link(folder / "a.png", folder / "b.png")
    (folder / "c.png").symlink_to("a.png")
    store = open_images(packed(folder, tmp_path / "p.tar"))
    assert all((store.read(name) == IMAGE).all() for name in "abc")


def test_image_store_damaged_or_compressed_tar_is_refused(folder, tmp_path):
    data = packed(folder, tmp_path / "p.tar").read_bytes()
    with tarfile.open(tmp_path / "p.tar") as tar:
        last = tar.getmembers()[-1].offset
    faults = {
        "damaged": data[:last] + b"?" * 512 + data[last + 512 :],
        "damaged or truncated": data[: last + 600],
        "no uncompressed tar": gzip.compress(data),
    }
    for words, content in faults.items():
        (tmp_path / "p.tar").write_bytes(content)
        with pytest.raises(UserError, match=f"p.tar: {words}"):
            open_images(tmp_path / "p.tar")


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
        values = {
            "7": pickle.dumps(record()),
            "8": pickle.dumps(record(boxes=b64(BOXES), img_h=np.int64(20))),
        }
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
        (tmp_path / "r.tsv").write_text(
            "".join("\t".join(map(str, [name, *row])) + "\n" for name in ("7", "8"))
        )
        return tmp_path / "r.tsv"
    if kind == "flat.h5":
        return write_flat_h5(tmp_path / "flat.h5", wh=[[40, 20], [40, 20]])
    (tmp_path / kind).mkdir()
    for name in ("7", "8"):
        if kind == "npz":
            np.savez(tmp_path / kind / f"{name}.npz", features=FEATURES, boxes=BOXES, img_h=20, img_w=40)
        elif kind == "npy":
            info = {
                "bbox": BOXES,
                "num_boxes": 2,
                "objects": np.zeros(2, np.int64),
                "image_width": 40,
                "image_height": 20,
                "cls_prob": np.ones((2, 5), np.float32),
            }
            np.save(tmp_path / kind / f"{name}.npy", FEATURES)
            np.save(tmp_path / kind / f"{name}_info.npy", info)
    return tmp_path / kind


@pytest.mark.parametrize("kind", ["lmdb", "h5", "tsv", "npz", "flat.h5"])
@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_region_store_matches_any_unicode_form(tmp_path, kind, stored):
    name = unicodedata.normalize(stored, "\u00e9t\u00e9 \ud55c")
    path = tmp_path / {"h5": "r.h5", "tsv": "r.tsv"}.get(kind, kind)
    if kind == "lmdb":
        write_lmdb(path, {name: pickle.dumps(record())})
    elif kind == "h5":
        import h5py

        with h5py.File(path, "w") as file:
            for key, value in {"features": FEATURES, "boxes": BOXES, "img_h": 20, "img_w": 40}.items():
                file[f"{name}/{key}"] = value
    elif kind == "tsv":
        path.write_text(
            "\t".join(map(str, [name, 20, 40, *"xxxx", 2, b64(BOXES).decode(), b64(FEATURES).decode()]))
        )
    elif kind == "npz":
        path.mkdir()
        np.savez(path / f"{name}.npz", features=FEATURES, boxes=BOXES, img_h=20, img_w=40)
    else:
        write_flat_h5(path, ids=(name.encode(), b"8.jpg"), wh=[[40, 20], [40, 20]])
    store = open_regions(path)
    for form in ("NFC", "NFD"):
        assert (store.read(unicodedata.normalize(form, f"{name}.jpg")).boxes == BOXES).all()


@pytest.mark.parametrize("encode", [base64.encodebytes, base64.urlsafe_b64encode])
def test_region_store_reads_base64_variants(tmp_path, encode):
    features = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    text = encode(features.tobytes())
    assert text.strip() != b64(features)
    store = open_regions(write_lmdb(tmp_path / "lmdb", {"7": pickle.dumps(record(features=text))}))
    assert (store.read("7").features == features).all()
    (tmp_path / "r.tsv").write_text(
        "\t".join(
            map(
                str,
                [
                    "7",
                    20,
                    40,
                    *"xxxx",
                    2,
                    b64(BOXES).decode(),
                    encode(features.tobytes()).decode().replace("\n", ""),
                ],
            )
        )
    )
    assert (open_regions(tmp_path / "r.tsv").read("7").features == features).all()
    oscar = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    oscar[:, 2:] = (0.25, 0.5, 0.75, 1, 0.5, 0.5)
    (tmp_path / "o.tsv").write_text(f"7\t2\t{encode(oscar.tobytes()).decode().replace(chr(10), '')}")
    assert (open_regions(tmp_path / "o.tsv").read("7").features == oscar[:, :2]).all()


def test_region_store_broken_base64_is_named(tmp_path):
    store = open_regions(
        write_lmdb(tmp_path / "lmdb", {"7": pickle.dumps(record(features=b64(FEATURES)[:-3] + b"!"))})
    )
    with pytest.raises(UserError, match="lmdb, 7, features: no base64 of float32"):
        store.read("7")


def write_flat_h5(path, boxes="bbox", ids=(b"7.jpg", b"8.jpg"), **changes):
    """M3P's: arrays over all images, here three regions each, of which two are real."""
    import h5py

    padded = {"features": np.pad(FEATURES, ((0, 1), (0, 0))), boxes: np.pad(BOXES, ((0, 1), (0, 0)))}
    with h5py.File(path, "w") as file:
        for name, value in padded.items():
            file[name] = np.stack([value, value])
        for name, value in {"image_id": list(ids), "num_boxes": [2, 2], **changes}.items():
            file[name] = value
    return path


@pytest.mark.parametrize("kind", ["lmdb", "h5", "flat.h5", "tsv", "npz", "npy"])
def test_region_store_finds_regions_by_id(tmp_path, kind):
    store = open_regions(write_store(kind, tmp_path))
    for name in ("7", "8"):
        regions = pickle.loads(pickle.dumps(store)).read(name)
        assert (regions.features == FEATURES).all() and (regions.boxes == BOXES).all()
        assert (regions.height, regions.width) == (20, 40)
        assert store.read(f"{name}.jpg").boxes.shape == (2, 4)  # as other files call it
        assert store.has(name) and store.has(f"{name}.jpg") and not store.has("9")
    with pytest.raises(UserError, match="no regions of image '9'"):
        store.read("9")
    with multiprocessing.get_context("fork").Pool(2) as pool:  # after the parent has opened it
        assert all((r.features == FEATURES).all() for r in pool.map(store.read, ["7", "8"] * 8))


@pytest.mark.parametrize("wh", [[[40, 20], [40, 20]], [[20, 40], [20, 40]]])
def test_region_store_flat_h5_boxes_tell_width_from_height(tmp_path, wh):
    """M3P's reader takes `wh` as height and width; the boxes reach 40 to the right and 20 down."""
    regions = open_regions(write_flat_h5(tmp_path / "flat.h5", "boxes", wh=wh)).read("8")
    assert (regions.height, regions.width) == (20, 40) and (regions.boxes == BOXES).all()


def test_region_store_flat_h5_that_does_not_fit_is_named(tmp_path):
    for changes, words in (
        ({"wh": [[30, 10], [30, 10]]}, "boxes lie outside their images"),
        ({"wh": [[40, 20]]}, "2 values of image_id"),
        ({"sizes": [[40, 20]]}, "no wh; it has bbox, features, image_id"),
    ):
        with pytest.raises(UserError, match=f"flat.h5: .*{words}"):
            open_regions(write_flat_h5(tmp_path / "flat.h5", **changes))


def test_region_store_folder_joins_its_stores(tmp_path):
    """VOLTA's for MaRVL: names come again in every language; NLVR2's are of no language."""
    shades = {
        "marvl-id_boxes36.lmdb": {"1-5": 1},
        "marvl-zh_boxes36.lmdb": {"1-5": 2, "1-6": 3},
        "nlvr2_boxes36.lmdb": {"t": 4},
    }
    (tmp_path / "r").mkdir()
    for folder, names in shades.items():
        values = {name: pickle.dumps(record(features=FEATURES * 0 + shade)) for name, shade in names.items()}
        write_lmdb(tmp_path / "r" / folder, values)
    store = open_regions(tmp_path / "r")
    expected = {"id/1-5.jpg": 1, "zh/1-5.jpg": 2, "zh/1-6.jpg": 3, "t": 4}
    assert {name: int(store.read(name).features[0, 0]) for name in expected} == expected
    with pytest.raises(
        UserError, match="regions of '1-5.jpg' in marvl-id_boxes36.lmdb and in marvl-zh_boxes36.lmdb"
    ):
        store.read("1-5.jpg")
    for other in ("id/1-6.jpg", "sw/1-5.jpg"):  # another language's are not these
        with pytest.raises(UserError, match=f"no regions of image '{other}'"):
            store.read(other)
    with pytest.raises(UserError, match="no regions of image 'id/1-6.jpg'"):
        open_regions(tmp_path / "r" / "marvl-zh_boxes36.lmdb").read("id/1-6.jpg")


def test_region_store_uc2_npz_boxes_are_relative(tmp_path):
    (tmp_path / "npz").mkdir()
    shares = np.concatenate([BOXES / [40, 20, 40, 20], np.zeros((2, 3))], 1).astype(
        np.float16
    )  # width, height, area: not read
    np.savez(
        tmp_path / "npz" / "7.npz", features=FEATURES.astype(np.float16), norm_bb=shares, conf=np.ones(2)
    )
    regions = open_regions(tmp_path / "npz").read("7")
    where = normalise_boxes(regions.boxes, regions.height, regions.width)
    assert (regions.features == FEATURES).all() and np.allclose(
        where, normalise_boxes(BOXES, 20, 40), atol=1e-3
    )


def test_region_locations_equal_worked_example():
    assert np.allclose(normalise_boxes(BOXES, 20, 40)[1], [0.25, 0.25, 1, 1, 0.75, 0.75, 0.5625])


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch evil",)


def test_region_store_bad_records_are_named_and_no_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {
        "evil": pickle.dumps({"features": Evil()}),
        "odd": pickle.dumps(record(features=b64(FEATURES[0][:1]))),
        "less": pickle.dumps({"features": 1}),
    }
    store = open_regions(write_lmdb(tmp_path / "lmdb", values))
    with pytest.raises(UserError, match="evil: not to be read as .*posix.system"):
        store.read("evil")
    assert not (tmp_path / "evil").exists()
    with pytest.raises(UserError, match="odd: 1 feature values for 2 boxes"):
        store.read("odd")
    with pytest.raises(UserError, match="less: no boxes, img_h, img_w"):
        store.read("less")
    with pytest.raises(UserError, match="no region features"):
        open_regions(tmp_path / "nothing")
    (tmp_path / "npy").mkdir()
    np.save(tmp_path / "npy" / "7.npy", FEATURES)
    np.save(tmp_path / "npy" / "7_info.npy", {"bbox": Evil()})
    np.save(tmp_path / "npy" / "8.npy", FEATURES)
    np.save(tmp_path / "npy" / "8_info.npy", {"bbox": BOXES, "num_boxes": 2})
    store = open_regions(tmp_path / "npy")
    with pytest.raises(UserError, match="7_info.npy: not to be read as .*posix.system"):
        store.read("7")
    assert not (tmp_path / "evil").exists()
    with pytest.raises(UserError, match="npy, 8: no img_h, img_w; it has boxes, features, num_boxes"):
        store.read("8")
    (tmp_path / "npy" / "8_info.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match="8_info.npy: not to be read as .*magic string"):
        store.read("8")


def _encode_once(folder, out):
    """A process of its own: asks for the states, and says whether it made them."""
    made = []

    def encode(names):
        made.append(names)
        time.sleep(0.2)
        return Ragged(torch.ones(len(names), 3), torch.ones(len(names), dtype=torch.int64))

    states = write_encoder_states(folder, ["a", "b"], list, encode, 1)
    out.put((len(made), states.read(["b"]).values.tolist()))


def test_image_states_are_encoded_by_one_process_while_another_waits(tmp_path):
    """As two trials of a search."""
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    both = [context.Process(target=_encode_once, args=(tmp_path / "states", out)) for _ in range(2)]
    for process in both:
        process.start()
    found = sorted(out.get(timeout=60) for _ in both)
    for process in both:
        process.join()
    assert found == [(0, [[1.0, 1.0, 1.0]]), (2, [[1.0, 1.0, 1.0]])]
    assert [path.name for path in tmp_path.iterdir()] == ["states"]  # no lock, nothing half done


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"boxes": np.array([[0, 0, 10, 20], [10, 5, 42, 20]])},
            r"box 1 \(10, 5, 42, 20\) is not inside .*40 x",
        ),
        ({"boxes": np.array([[-2, 0, 10, 20], [10, 5, 40, 20]])}, r"box 0 \(-2, 0, 10, 20\) is not inside"),
        ({"boxes": np.array([[0, 0, 10, 20], [10, 15, 40, 5]])}, r"box 1 \(10, 15, 40, 5\) is not inside"),
        ({"boxes": np.array([[0, 0, np.inf, 20], [10, 5, 40, 20]])}, "boxes not finite"),
        ({"boxes": BOXES.T}, "8 values of boxes, which have four each"),
        ({"boxes": BOXES[:1]}, "6 feature values for 1 boxes|2 boxes"),
        ({"boxes": [[1, 2, 3, 4], [1]]}, "boxes: not to be read as numbers"),
        ({"boxes": np.array([["a"] * 4] * 2)}, "boxes: not to be read as numbers .dtype <U1"),
        ({"boxes": np.ones((2, 4), bool)}, "boxes: not to be read as numbers .dtype bool"),
        ({"features": FEATURES.reshape(3, 2)}, "6 feature values for 2 boxes"),
        ({"features": np.full((2, 3), 1e300)}, "features not finite"),
        ({"features": np.zeros((2, 0))}, "0 feature values for 2 boxes"),
        ({"num_boxes": 3}, "num_boxes 3, and 2 boxes"),
        ({"num_boxes": "x"}, "not to be read as a number"),
        ({"num_boxes": -2}, "num_boxes -2, and 2 boxes"),
        ({"img_h": 0}, "img_h 0, img_w 40: an image has a size"),
        ({"img_w": -40}, "img_h 20, img_w -40: an image has a size"),
        ({"img_w": float("inf")}, "img_w not finite"),
        ({"img_w": [40, 40]}, "img_w: not to be read as a number .list of 2 values"),
        ({"img_w": None}, "img_w: not to be read as a number"),
        ({"img_w": 10**400}, "img_w: not to be read as a number"),
        ({"tags": 5}, "tags: not to be read as a list of names"),
        ({"tags": [5]}, "tags: not to be read as a list of names .int"),
    ],
)
def test_region_record_that_cannot_be_is_refused_by_its_image(changes, words):
    values = {
        "features": FEATURES,
        "boxes": BOXES,
        "img_h": 20,
        "img_w": 40,
        "num_boxes": 2,
        "tags": ["a", b"b"],
    }
    assert to_regions(values, "/r, 7").tags == ("a", "b")
    with pytest.raises(BadImage, match=f"^/r, 7.*({words})"):
        to_regions(values | changes, "/r, 7")
    for value in ([1], "x", None):
        with pytest.raises(BadImage, match="/r, 7: .* in place of a dict"):
            to_regions(value, "/r, 7")


def test_region_boxes_may_round_over_the_edge():
    """By a pixel, or by a hundredth where they are shares."""
    record = {"features": FEATURES, "boxes": BOXES + [[-1, -1, 1, 1]], "img_h": 20, "img_w": 40}
    assert len(to_regions(record, "x").boxes) == 2
    shares = {**record, "boxes": BOXES / [40, 20, 40, 20] + [-0.009, 0, 0.009, 0], "img_h": 1.0, "img_w": 1.0}
    assert len(to_regions(shares, "x").boxes) == 2
    with pytest.raises(BadImage, match="not inside the image, 1 x 1"):
        to_regions({**shares, "boxes": BOXES}, "x")


@pytest.mark.parametrize("kind", ["lmdb", "h5", "flat.h5", "tsv", "npz", "npy"])
def test_region_features_of_another_width_are_refused(tmp_path, kind):
    store = open_regions(write_store(kind, tmp_path))
    store.width = 3
    assert len(store.read("7").features) == 2
    store.width = 4
    with pytest.raises(BadImage, match=f"{kind.split('.')[-1]}, 7: 3 features a region, and 4 are expected"):
        store.read("7")

"""Test images that are in a pretraining corpus are counted, by bytes and by perceptual hash."""

import io
import json
import tarfile

import cv2
import numpy as np
import pytest
from scipy.fft import dctn

from pretrain.__main__ import main
from pretrain.image_overlap import ImageHashes, count_overlap, perceptual_hash, read_names
from raylib.data.shards import main as index
from raylib.errors import UserError


def photo(seed: int, size: int = 96) -> np.ndarray:
    """Smooth random colours, as photographs are: uint8 RGB."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def encode(image: np.ndarray, kind: str = ".png", *options: int) -> bytes:
    return cv2.imencode(kind, image[..., ::-1], list(options))[1].tobytes()


def test_perceptual_hash_equals_slow_reference():
    for seed in range(5):
        image = photo(seed)
        grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (32, 32), interpolation=cv2.INTER_AREA)
        low = dctn(grey.astype(float), norm="ortho")[:8, :8]
        bits = [low[i, j] > np.median(low) for i in range(8) for j in range(8)]
        assert perceptual_hash(image) == (int("".join("01"[int(bit)] for bit in bits), 2), False)


def test_perceptual_hash_survives_resizing_and_encoding_and_separates_images():
    hashes = np.array([perceptual_hash(photo(seed))[0] for seed in range(60)], np.uint64)
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None])[np.triu_indices(60, 1)]
    assert apart.min() > 6
    for seed in range(60):
        small = cv2.resize(photo(seed), (50, 50), interpolation=cv2.INTER_AREA)
        coarse = cv2.imdecode(
            np.frombuffer(encode(small, ".jpg", cv2.IMWRITE_JPEG_QUALITY, 50), np.uint8), 1
        )[..., ::-1]
        assert (
            int(hashes[seed] ^ np.uint64(perceptual_hash(np.ascontiguousarray(coarse))[0])).bit_count() <= 6
        )
    assert perceptual_hash(np.full((9, 9, 3), 200, np.uint8))[1]


def test_count_overlap_equals_loop_over_all_pairs():
    rng = np.random.default_rng(0)
    some = rng.integers(0, 2**63, 40, dtype=np.uint64)

    def hashes(n, prefix):
        near = some[rng.integers(0, 40, n)] ^ np.uint64(1) << rng.integers(0, 63, n, dtype=np.uint64)
        return ImageHashes(
            [f"{prefix}{i}" for i in range(n)],
            rng.integers(0, 30, n).astype(np.uint64),
            near,
            rng.random(n) < 0.2,
        )

    corpus, test = hashes(50, "c"), hashes(30, "t")
    result = count_overlap(corpus, test, 2)
    expected = {0: 0, 1: 0, 2: 0}
    for i in range(30):
        best = 99
        for j in range(50):
            if test.content[i] == corpus.content[j]:
                best = 0
            elif not (test.flat[i] or corpus.flat[j]):
                best = min(best, int(test.perceptual[i] ^ corpus.perceptual[j]).bit_count())
        if best <= 2:
            expected[best] += 1
    assert result["by_distance"] == expected and sum(expected.values()) == len(result["pairs"])
    assert result["same_bytes"] == sum(c in corpus.content for c in test.content)


@pytest.fixture
def corpus(tmp_path):
    """A tar as img2dataset writes it, indexed: images 0 to 9."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    with tarfile.open(folder / "en-00000.tar", "w") as tar:
        for seed in range(10):
            for extension, data in (("jpg", encode(photo(seed), ".jpg")), ("txt", b"a caption")):
                info = tarfile.TarInfo(f"{seed:09d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    assert index([str(folder), "image_text"]) == 0
    return folder


def test_overlap_command_counts_bytes_and_hashes(corpus, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    (data / "same.jpg").write_bytes(encode(photo(3), ".jpg"))
    (data / "smaller.png").write_bytes(encode(cv2.resize(photo(4), (48, 48), interpolation=cv2.INTER_AREA)))
    (data / "other.png").write_bytes(encode(photo(50)))
    (data / "blank.png").write_bytes(encode(np.full((20, 20, 3), 255, np.uint8)))
    (data / "broken.png").write_bytes(b"\x89PNG none")
    (data / "notes.txt").write_text("no image")
    assert main(["overlap", str(corpus), str(data), "--json", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["images"], result["corpus_images"], result["same_bytes"], result["flat"]) == (4, 10, 1, 1)
    assert sum(result["by_distance"].values()) == 2 and result["undecodable"] == {"corpus": 0, "data": 1}
    assert {p["test"]: p["corpus"].split()[-1] for p in result["pairs"]} == {
        "same.jpg": "000000003.jpg",
        "smaller.png": "000000004.jpg",
    }
    assert "| the same bytes | 1 | 25.0 |" in capsys.readouterr().out


def test_overlap_command_keeps_images_named_by_annotations(corpus, tmp_path, capsys):
    data = tmp_path / "data.tar"
    with tarfile.open(data, "w") as tar:
        for seed in (1, 2, 70):
            content = encode(photo(seed), ".jpg")
            info = tarfile.TarInfo(f"images/{seed}.jpg")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    names = tmp_path / "test.jsonl"
    names.write_text(
        '{"id": "1", "img_path": "1.jpg", "sentences": ["a"]}\n{"id": "70", "img_path": "70.jpg"}\n'
    )
    assert main(["overlap", str(corpus), str(data), "--names", str(names)]) == 0
    printed = capsys.readouterr().out
    assert "2 test images, 10 of the corpus" in printed and "are not in" not in printed


def test_overlap_command_reports_names_without_an_image(corpus, tmp_path, capsys):
    """A share of the images that are there would pass for a share of the test set."""
    data, names = tmp_path / "data", tmp_path / "names.txt"
    data.mkdir()
    (data / "COCO_val2014_000000000003.JPG").write_bytes(encode(photo(3), ".jpg"))
    names.write_text("000000000003\ncoco_val2014_000000000004.jpg\nCafé\n")
    assert (
        main(["overlap", str(corpus), str(data), "--names", str(names), "--json", str(tmp_path / "out.json")])
        == 0
    )
    printed, result = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert "1 test images" in printed and "2 of 3 images that --names names are not in" in printed
    assert result["missing"] == ["000000000004", "café"] and result["same_bytes"] == 1


@pytest.mark.parametrize(
    ("name", "text", "names"),
    [
        ("test.json", '{"201": {"imageId": "n1.jpg", "question": "?"}, "2": {"imageId": 7}}', {"n1", "7"}),
        ("test.jsonl", '{"left_img": "zh/a-1.jpg", "right_img": "zh/b.jpg"}\n', {"a-1", "b"}),
        ("names.txt", "COCO_val2014_000000391895.jpg\n\n77.PNG\n", {"000000391895", "77"}),
        (
            "nlvr2.jsonl",
            '{"identifier": "test1-0-1-0", "left_url": "http://a/1.jpg"}\n',
            {"test1-0-1-img0", "test1-0-1-img1"},
        ),
        ("wit.jsonl", '{"wit_ix": 12, "image_url": "http://a/1.jpg"}\n', {"12"}),
    ],
)
def test_read_names_reads_annotation_files(tmp_path, name, text, names):
    (tmp_path / name).write_text(text)
    assert read_names(tmp_path / name) == names


def test_overlap_command_wrong_arguments_are_one_line_errors(corpus, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"none")
    for arguments, words in (
        ([tmp_path / "empty", tmp_path], "manifest.json"),
        ([corpus, tmp_path / "none"], "neither a folder nor a .tar of images"),
        ([corpus, tmp_path / "empty"], "no image in it"),
        ([corpus, tmp_path / "broken"], "none of its 1 images decodes"),
        ([corpus, corpus, "--json", tmp_path / "none" / "out.json"], "No such file or directory"),
        (
            [corpus, corpus, "--names", tmp_path / "bad.jsonl"],
            "bad.jsonl:1: not to be read as a line of JSON that names images",
        ),
        ([corpus, corpus, "--distance", 64], "give a number from 0 to 32"),
    ):
        assert main(["overlap", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_read_names_refuses_file_without_names(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="no names of images"):
        read_names(tmp_path / "empty.txt")

"""Identity, image and captions of a sample: tars as img2dataset, CLIP_benchmark and others write them."""

import base64
import hashlib
import json
import logging
import re
import unicodedata

import cv2
import numpy as np
import pytest

from pretrain.__main__ import main as pretrain
from pretrain.batches import DataConfig, StepBatches, StreamConfig
from pretrain.corpus_formats import Tally, read_image_text
from pretrain.evaluate import read_retrieval_set
from pretrain.train import run
from raylib.data.images import find_images
from raylib.data.index import index_path, json_path
from raylib.data.shards import ShardWriter, index_folder, main
from raylib.data.sources import Source
from raylib.data.tars import FolderSummary
from raylib.errors import UserError
from raylib.fileio import decode_base64, find_file
from raylib.sample import DATA
from tests.factories import forget_hashes
from tests.test_tars import pack

TOKENIZER = str(DATA / "tokenizer.model")


def image(number, extension="jpg"):
    pixels = np.full((8, 8, 3), (7 * number % 256, 11 * number % 256, 5), np.uint8)
    return cv2.imencode(f".{extension}", pixels)[1].tobytes()


def img2dataset(folder, numbers, name="00000.tar"):
    """A shard of img2dataset: KEY.jpg, KEY.json, KEY.txt, and keys that begin anew in every shard."""
    members = []
    for key, number in enumerate(numbers):
        data, caption = image(number), f"a photograph of thing {number}"
        facts = {
            "url": f"https://example.org/{number}.jpg",
            "caption": caption,
            "key": f"{key:09d}",
            "status": "success",
            "error_message": None,
            "width": 8,
            "height": 8,
            "exif": "{}",
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        for extension, content in (
            ("jpg", data),
            ("json", json.dumps(facts, indent=4).encode()),
            ("txt", caption.encode()),
        ):
            members.append((f"{key:09d}.{extension}", content))
    folder.mkdir(exist_ok=True)
    return pack(folder / name, members)


def read_batch(folder, batch=8, **changes):
    stream = StreamConfig(folder=str(folder), batch=batch, lanes=1, length=16)
    return StepBatches(DataConfig(tokenizer=TOKENIZER, image_text=stream, **changes), 16, 1)[0]["image_text"]


def samples_of(folder, language="en"):
    source = Source(folder)
    return [source.sample(language, number) for number in range(source.size(language))]


def test_samples_with_equal_keys_in_several_shards_are_different_images(tmp_path):
    img2dataset(tmp_path, range(4), "00000.tar")
    img2dataset(tmp_path, range(4, 8), "00001.tar")
    index_folder(tmp_path, "image_text")
    assert len(set(read_batch(tmp_path)["image_id"].tolist())) == 8


def test_samples_of_one_image_under_several_keys_share_identity(tmp_path):
    img2dataset(tmp_path, [1, 2, 1], "00000.tar")
    img2dataset(tmp_path, [3, 1, 4], "00001.tar")
    index_folder(tmp_path, "image_text")
    ids = read_batch(tmp_path, batch=6)["image_id"].tolist()
    assert sorted(map(ids.count, set(ids))) == [1, 1, 1, 3]


def test_samples_identity_is_independent_of_index(tmp_path):
    img2dataset(tmp_path, range(3))
    with ShardWriter(tmp_path / "drawings", "image_text") as writer:
        for number in range(3):
            writer.write(
                f"k{number}", {"txt": b"x", "a.png": image(number, "png"), "b.png": image(number + 9, "png")}
            )
    for folder in (tmp_path, tmp_path / "drawings"):
        if folder == tmp_path:
            index_folder(folder, "image_text")
        identities = [sample.identity for sample in samples_of(folder)]
        assert len(set(identities)) == 3 and min(identities) >= 0
        (shard,) = folder.glob("*.tar")
        index_path(shard).unlink()
        assert [sample.identity for sample in samples_of(folder)] == identities
        forget_hashes(shard)
        assert [sample.identity for sample in samples_of(folder)] == identities
        json_path(shard).unlink()
        assert [sample.identity for sample in samples_of(folder)] == identities
    remote = Source(f"file://{tmp_path}/drawings", cache=tmp_path / "cache")
    assert [remote.sample("en", number).identity for number in range(3)] == identities


def test_samples_two_drawings_share_identity(tmp_path):
    with ShardWriter(tmp_path, "image_text") as writer:
        for key, drawings in {"k": (1, 2), "same": (2, 1), "other": (1, 3), "alone": (1,)}.items():
            members = {f"{'ab'[i]}.png": image(number, "png") for i, number in enumerate(drawings)}
            writer.write(key, {"txt": b"a thing", **members})
    k, same, other, alone = (sample.identity for sample in samples_of(tmp_path))
    assert k == same and len({k, other, alone}) == 3
    ids = {read_batch(tmp_path, batch=4, mask_probability=0.0)["image_id"].tolist()[i] for i in range(4)}
    assert ids == {k, other, alone}


def test_samples_reindexed_shard_of_same_size_is_refused(tmp_path):
    img2dataset(tmp_path, range(4))
    index_folder(tmp_path, "image_text")
    size = (tmp_path / "00000.tar").stat().st_size
    img2dataset(tmp_path, range(4, 8))
    assert (tmp_path / "00000.tar").stat().st_size == size
    for read in (lambda: read_batch(tmp_path), lambda: list(read_retrieval_set(tmp_path))):
        with pytest.raises(
            UserError, match=r"00000.tar: its member 0+[0-3]\..* does not lie where its index"
        ):
            read()
    index_folder(tmp_path, "image_text")
    assert len(set(read_batch(tmp_path)["image_id"].tolist())) == 4


def test_samples_changed_image_of_same_size_is_refused(tmp_path):
    img2dataset(tmp_path, range(4))
    index_folder(tmp_path, "image_text")
    offset, size, _ = Source(tmp_path).sample("en", 2).members["jpg"]
    with open(tmp_path / "00000.tar", "r+b") as file:
        file.seek(offset + size // 2)
        file.write(b"????")
    with pytest.raises(
        UserError, match="00000.tar: sample 0+2: its jpg is not what was indexed; fetch the shard anew"
    ):
        read_batch(tmp_path)
    with pytest.raises(UserError, match="is not what was indexed"):
        list(read_retrieval_set(tmp_path))


CAPTIONS = [
    ({"txt": b"a dog"}, ["a dog"]),
    ({"txt": "\ufeffa dog\r\n".encode()}, ["a dog"]),
    ({"txt": b"a dog\n\nan  animal\n"}, ["a dog", "an animal"]),  # CLIP_benchmark's, a caption a line
    ({"json": b'{"caption": "a dog"}'}, ["a dog"]),
    ({"json": b'{"caption": ["a dog", " ", "an animal"]}'}, ["a dog", "an animal"]),
    ({"json": b'{"captions": "a dog"}'}, ["a dog"]),
    ({"json": b'{"captions": ["a dog", "an animal"]}'}, ["a dog", "an animal"]),
    ({"json": b'{"captions": {"en": "a dog", "de": ""}}'}, ["a dog"]),
    ({"json": b'{"captions": {"de": ["ein Hund"], "en": ["a dog", "an animal"]}}'}, ["a dog", "an animal"]),
    ({"json": b'{"text": "a dog", "caption": null}'}, ["a dog"]),
    ({"json": b'{"captions": {"en": "a dog", "de": null}}'}, ["a dog"]),
    ({"json": b'{"text": {"en": "a dog"}}'}, ["a dog"]),
    (
        {"json": '\ufeff{"caption": "a\\ndog"}'.encode(), "txt": b"a\ndog"},
        ["a dog"],
    ),  # img2dataset's, of two lines
    ({"json": b'{"url": "https://example.org/1.jpg"}', "txt": b"a dog"}, ["a dog"]),
    ({"json": b'["no", "record"]', "txt": b"a dog"}, ["a dog"]),
    ({"outputs.txt": b"a dog\nan animal"}, ["a dog", "an animal"]),
]


def write_sample(folder, members):
    """A source with one sample, by tarfile."""
    pack(folder / "0.tar", [(f"key.{extension}", content) for extension, content in members.items()])
    index_folder(folder, "image_text")
    return samples_of(folder)[0]


@pytest.mark.parametrize(("members", "captions"), CAPTIONS)
def test_samples_captions_agree_in_training_evaluation_and_corpora(tmp_path, members, captions):
    sample = write_sample(tmp_path, {**members, "jpg": image(1)})
    assert sample.captions_in("en") == captions
    if b'""' in members.get("json", b"") or b'" "' in members.get("json", b""):
        with pytest.raises(UserError, match="an empty caption in '(de|en)'"):  # each is a query
            list(read_retrieval_set(tmp_path))
    else:
        (item,) = read_retrieval_set(tmp_path)
        assert (item.captions["en"], item.image) == (captions, image(1))
    if b"{" in members.get("json", b"") and b"url" not in members["json"]:
        record = json.loads(members["json"].decode("utf-8-sig")) | {"image": "a.jpg"}
        (tmp_path / "albef.json").write_text(json.dumps([record]))
        (tmp_path / "a.jpg").write_bytes(image(1))
        path = tmp_path / "albef.json"
        assert list(read_image_text(path, Tally(path))) == [({"jpg": image(1)}, captions)]


@pytest.mark.parametrize(
    ("members", "fault"),
    [
        ({}, "no captions; its members: jpg"),
        ({"cls": b"7"}, "no captions; its members: cls, jpg"),
        ({"txt": b" \n"}, "empty captions"),
        ({"txt": "caf\xe9".encode("latin-1")}, "a .txt that is not UTF-8"),
        ({"txt": "a dog".encode("utf-16")}, "a .txt that is not UTF-8"),
        ({"json": b"{"}, "a .json that is no UTF-8 JSON"),
        ({"json": b'{"caption": NaN}'}, "captions that are no text"),
        ({"json": b'{"captions": {"de": "ein Hund"}}'}, "no 'en' captions, but de"),
        ({"json": b'{"caption": "a \\ud800"}'}, "captions that are not UTF-8"),
    ],
)
def test_samples_missing_caption_names_the_members(tmp_path, members, fault, caplog):
    write_sample(tmp_path, {**members, "jpg": image(1)})
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="20 unusable samples"):
        read_batch(tmp_path, batch=1, bad_limit=1.0)
    line = caplog.records[0].getMessage()
    assert fault in line and "0.tar: sample key has" in line and re.search("its members: .*jpg", line)


IMAGES = [
    ({"jpg": 1, "seg.png": 2}, None, ["jpg"]),
    ({"JPEG": 1}, None, ["jpeg"]),
    ({"bmp": 1, "depth.png": 2, "seg.png": 3}, None, ["bmp"]),
    ({"input.jpg": 1, "target.jpg": 2}, None, ["input.jpg"]),
    ({"photo.png": 1}, None, ["photo.png"]),
    ({"noto.png": 1, "fluent.png": 2}, ["fluent.png", ".noto.png"], ["fluent.png", "noto.png"]),
    ({"jpg": 1, "seg.png": 2}, ["seg.png"], ["seg.png"]),
    ({"jpg": 1, "png": 2}, ["png"], ["png"]),
]


@pytest.mark.parametrize(("members", "listed", "images"), IMAGES)
def test_samples_images_are_default_or_requested_members(tmp_path, members, listed, images):
    files = [(f"k.{name}", image(n, name.rpartition(".")[2])) for name, n in members.items()]
    pack(tmp_path / "0.tar", [*files, ("k.txt", b"x")])
    manifest = index_folder(tmp_path, "image_text", summary=FolderSummary(listed))
    (sample,) = samples_of(tmp_path)
    assert manifest["images"] == list(sample.images) == images
    assert read_batch(tmp_path, batch=1)["image_id"].tolist() == [sample.identity]


@pytest.mark.parametrize(
    ("members", "listed", "words"),
    [
        (("jpg", "png"), None, "sample k has several images, jpg, png; .*--images jpg"),
        (("jpg", "input.jpg"), None, "several images"),
        (
            ("a.png", "b.png"),
            None,
            r"no member is plainly the image; .*--images a.png b.png \(a key ends at the first dot",
        ),
        (("jpg",), ["png"], "no member ends in .png; there are: jpg, txt"),
    ],
)
def test_samples_ambiguous_images_must_be_requested(tmp_path, members, listed, words):
    pack(tmp_path / "0.tar", [*((f"k.{name}", b"x") for name in members), ("k.txt", b"x")])
    with pytest.raises(UserError, match=words):
        index_folder(tmp_path, "image_text", summary=FolderSummary(listed))


def test_samples_manifest_without_image_list_is_read():
    assert find_images(("json", "noto.png", "fluent.png"), None) == ("fluent.png", "noto.png")
    assert find_images(("jpg", "json", "seg.png"), None) == ("jpg",)
    assert find_images(("jpg", "json"), ("png",)) == ()


def test_samples_missing_image_names_the_members(tmp_path):
    pack(
        tmp_path / "0.tar",
        [("1.jpg", image(1)), ("1.txt", b"x"), ("2.json", b'{"caption": "x"}'), ("2.seg.png", b"x")],
    )
    index_folder(tmp_path, "image_text")
    with pytest.raises(UserError, match="sample 2 has no image; its members: json, seg.png"):
        list(read_retrieval_set(tmp_path))


LANGUAGES = [
    ("00000.tar", None, "en"),
    ("cc3m-train-0000.tar", None, "en"),
    ("0.tar", None, "en"),
    ("wit-000.tar", None, "en"),
    ("my-data-000.tar", None, "en"),
    ("de-000017.tar", None, "de"),
    ("zh-Hans-3.tar", None, "zh-Hans"),
    ("00000.tar", "de", "de"),
    ("en-0.tar", "ru", "ru"),
]


@pytest.mark.parametrize(("name", "given", "language"), LANGUAGES)
def test_samples_image_language_is_given_or_english_or_a_code(tmp_path, name, given, language):
    img2dataset(tmp_path, range(8), name)
    assert index_folder(tmp_path, "image_text", language=given)["shards"][0]["language"] == language
    assert len(read_batch(tmp_path, caption_language=language)["image_id"]) == 8
    with pytest.raises(UserError, match="language 'German': wanted a code"):
        index_folder(tmp_path, "image_text", language="German")


def test_samples_text_language_is_never_guessed(tmp_path):
    with ShardWriter(tmp_path, "text", type("Ids", (), {"sha256": "x", "vocabulary": 60})) as writer:
        writer.write_rows("de", [[5, 6]])
    shard = tmp_path / "de-000000.tar"
    for name, language in (
        ("de-000000.tar", "de"),
        ("de-wiki-0.tar", "de"),
        ("ceb-1.tar", "ceb"),
        ("de.tar", "de"),
    ):
        shard = shard.rename(tmp_path / name)
        assert index_folder(tmp_path, "text")["shards"][0]["language"] == language
    for name in ("00000.tar", "cc100-de-0.tar", "train-000.tar", "wiki-de.tar"):
        shard = shard.rename(tmp_path / name)
        with pytest.raises(
            UserError, match=f"{name}: its name begins with no language code; .*--language CODE"
        ):
            index_folder(tmp_path, "text")
    assert index_folder(tmp_path, "text", language="de")["shards"][0]["language"] == "de"


def test_samples_manifest_with_invalid_languages_is_refused(tmp_path):
    img2dataset(tmp_path, range(8))
    with pytest.raises(UserError, match=f"raylib.data.shards {tmp_path} image_text` makes one"):
        read_batch(tmp_path)
    index_folder(tmp_path, "image_text")
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"en"', '"00000.tar"'))  # as it was written before
    with pytest.raises(
        UserError, match="takes '00000.tar' for languages, .*raylib.data.shards .* image_text --language"
    ):
        read_batch(tmp_path)


def test_samples_foreign_text_is_not_packed_text(tmp_path):
    pack(tmp_path / "de-0.tar", [("1.txt", b"ein Hund")])
    with pytest.raises(UserError, match="sample 1 holds txt, .*pretrain.corpora"):
        index_folder(tmp_path, "text")


def test_index_command_prints_what_it_found(tmp_path, capsys):
    img2dataset(tmp_path, range(5))
    extra = [
        ("d", b""),
        ("._000.jpg", b"x"),
        ("9.json", b'{"status": "failed_to_download"}'),
        ("8.jpg", image(1)),
        ("7.seg.png", b"x"),
        ("8.txt", b"x"),
    ]
    pack(tmp_path / "00001.tar", extra)
    assert main([str(tmp_path), "image_text"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}: 2 shards, 8 samples; by language: 8 en",
        "  images: 6 jpg",
        "  other members: 6 json, 1 seg.png, 6 txt",
        "  skipped: 1 files without an extension, 1 hidden files",
        "  note: 1 samples whose members lie apart, joined by their key, 2 samples without an image, "
        "1 samples without captions",
    ]
    assert main([str(tmp_path), "image_text", "--language", "de", "--images", "jpg"]) == 0
    assert "8 de" in capsys.readouterr().out
    assert main([str(tmp_path), "text"]) == 2
    assert "--language CODE" in capsys.readouterr().err


def test_index_of_img2dataset_tars_trains_and_evaluates(mini, tmp_path, capsys):
    img2dataset(tmp_path / "laion", range(12), "00000.tar")
    img2dataset(tmp_path / "laion", range(12, 24), "00001.tar")
    assert main([str(tmp_path / "laion"), "image_text"]) == 0
    run(
        mini(
            "name=run",
            "runtime=local",
            "workers=1",
            f"data.image_text.folder={tmp_path}/laion",
            "fit.steps=2",
        )
    )
    assert (
        pretrain(
            ["evaluate", str(tmp_path / "run"), str(tmp_path / "laion"), "--json", str(tmp_path / "e.json")]
        )
        == 0
    )
    result = json.loads((tmp_path / "e.json").read_text())["retrieval"]
    assert list(result) == ["en"] and result["en"]["n"] == 24
    capsys.readouterr()


def test_base64_variants_are_all_read():
    data = bytes(range(256)) + b"\xfb\xff\xfe"
    plain = base64.b64encode(data)
    for text in (
        plain,
        plain.decode(),
        base64.encodebytes(data),
        base64.urlsafe_b64encode(data),
        plain.rstrip(b"="),
        plain.replace(b"A", b"\r\nA", 3),
        b" " + plain,
    ):
        assert decode_base64(text) == data
    for text in ("images/none.jpg", "a b!", "abcde", "ü", "QQ==QQ=="):
        with pytest.raises(ValueError, match="base64|Excess|padd|character"):
            decode_base64(text)


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
def test_find_file_matches_any_unicode_form(tmp_path, on_disk):
    folder, name = (unicodedata.normalize(on_disk, text) for text in ("Bücher", "한국-é.jpg"))
    (tmp_path / folder).mkdir()
    (tmp_path / folder / name).write_bytes(image(1))
    for form in ("NFC", "NFD"):
        asked = unicodedata.normalize(form, f"{folder}/{name}")
        assert find_file(tmp_path, asked).read_bytes() == image(1)
        (tmp_path / "albef.json").write_text(json.dumps([{"image": asked, "caption": "x"}]))
        assert len(list(read_image_text(tmp_path / "albef.json", Tally("x")))) == 1
        (tmp_path / "captions.json").write_text(json.dumps([{"image": asked, "captions": {"en": "x"}}]))
        assert next(read_retrieval_set(tmp_path)).image == image(1)
    assert find_file(tmp_path, "Bücher/none.jpg") is None


@pytest.mark.parametrize("encode", [base64.encodebytes, base64.urlsafe_b64encode])
def test_corpora_images_in_base64_variants_are_read(tmp_path, encode):
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    data = cv2.imencode(".png", noise)[1].tobytes()
    assert encode(data) != base64.b64encode(data)
    path = tmp_path / "cclm.jsonl"
    path.write_text(json.dumps({"binary": encode(data).decode(), "caption": "noise"}))
    assert list(read_image_text(path, Tally(path))) == [({"png": data}, ["noise"])]

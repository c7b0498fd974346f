import base64
import gzip
import json
import logging
import lzma

import cv2
import numpy as np
import pytest

from pretrain.corpora import main, prepare
from pretrain.corpus_formats import OUTSIDE, Tally, read_image_text, read_json_list, read_pairs, read_text
from raylib.data.images import decode_image
from raylib.data.sources import Source
from raylib.errors import UserError
from raylib.fileio import CHUNK
from raylib.sample import DATA
from raylib.text import Tokenizer

TOKENIZER = DATA / "tokenizer.model"


def image(extension: str = "png", height: int = 20, width: int = 30) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.imencode(f".{extension}", pixels)[1].tobytes()


def loose(path) -> Tally:
    return Tally(path, limit=1.0)


def texts(source: Source, language: str) -> list[tuple[str, ...]]:
    """The rows of a packed source as text."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))
    return [
        tuple(model.decode(side.tolist()) for side in source.row(language, n))
        for n in range(source.size(language))
    ]


def test_albef_list_is_read_and_bad_records_counted(tmp_path):
    (tmp_path / "images").mkdir()
    for name, data in {
        "a.png": image(),
        "b.jpg": image("jpg"),
        "cut.jpg": b"\xff\xd8\xff\xe0 no jpeg",
    }.items():
        (tmp_path / "images" / name).write_bytes(data)
    records = [
        {"image": "images/a.png", "caption": "a  dog\n"},
        {"image": str(tmp_path / "images" / "b.jpg"), "caption": ["a cat", " ", "two cats"], "image_id": 7},
        {"image": "images/cut.jpg", "caption": "a bird"},
        {"image": "images/none.jpg", "caption": "a fish"},
        {"image": "images/a.png", "caption": "  "},
        {"image": "images/a.png"},
        "no record",
        {"caption": "no picture"},
        {"image": ["images/a.png"], "caption": "a list"},
        {"image": "../outside.png", "caption": "an image that lies elsewhere"},
        {"image": str(tmp_path.parent / "outside.png"), "caption": "another"},
    ]
    (tmp_path.parent / "outside.png").write_bytes(image())
    path = tmp_path / "coco.json"
    text = json.dumps(records, indent=1)[:-2] + ', {"image": "images/a.png", "caption": "caf\xe9"}\n]\n'
    path.write_bytes(text.encode("latin-1"))
    tally = loose(path)
    found = list(read_image_text(path, tally))
    assert found == [({"png": image()}, ["a dog"]), ({"jpg": image("jpg")}, ["a cat", "two cats"])]
    assert tally.good == 2 and tally.bad == {
        "images that do not decode": 1,
        "images that are missing": 3,
        OUTSIDE: 2,
        "empty captions": 1,
        "records without an English caption": 1,
        "records that are no JSON object": 1,
        "captions that are not UTF-8": 1,
    }


def test_published_list_names_images_of_another_folder(tmp_path):
    """ALBEF's lists have absolute paths, or such from the folder of all data sets."""
    (tmp_path / "data" / "cc3m").mkdir(parents=True)
    (tmp_path / "data" / "cc3m" / "1.png").write_bytes(image())
    (tmp_path / "lists").mkdir()
    path = tmp_path / "lists" / "cc3m.json"
    names = [str(tmp_path / "data" / "cc3m" / "1.png"), "cc3m/1.png"]
    path.write_text(json.dumps([{"image": name, "caption": "a dog"} for name in names]))
    found = list(read_image_text(path, Tally(path), images=tmp_path / "data"))
    assert found == [({"png": image()}, ["a dog"])] * 2
    tally = Tally(path)
    assert not list(read_image_text(path, tally))
    with pytest.raises(
        UserError, match=r"1 images outside of the folder .*\(give another: --images FOLDER\)"
    ):
        tally.close()


def test_albef_list_is_streamed_in_chunks(tmp_path):
    records = [{"image": f"{n}.jpg", "caption": "x" * 997} for n in range(3 * CHUNK // 1000)]
    path = tmp_path / "cc3m.json"
    path.write_text(json.dumps(records))
    assert list(read_json_list(path, loose(path))) == records
    path.write_text(json.dumps(records)[:-500])
    with pytest.raises(UserError, match="broken JSON after item .*premature EOF"):
        list(read_json_list(path, loose(path)))
    path.write_text('{"images": []}')
    with pytest.raises(UserError, match=r"not to be read as JSON \(no list\)"):
        list(read_json_list(path, loose(path)))


def test_cclm_lines_are_read_and_bad_lines_counted(tmp_path):
    (tmp_path / "a.png").write_bytes(image())
    encoded = base64.b64encode(image("webp")).decode()
    path = tmp_path / "cc.jsonl"
    lines = [
        json.dumps({"binary": encoded, "caption": {"en": "a dog", "de": "ein Hund"}}),
        json.dumps({"binary": "a.png", "caption": ["a cat"]}),
        json.dumps({"binary": encoded, "caption": {"de": "eine Katze"}}),
        json.dumps({"binary": encoded[:40], "caption": "cut"}),
        "{not json",
        "",
    ]
    path.write_bytes("\n".join(lines).encode() + b'\n{"binary": "a.png", "caption": "caf\xe9"}\n')
    tally = loose(path)
    found = list(read_image_text(path, tally))
    assert [captions for _, captions in found] == [["a dog"], ["a cat"]]  # no German caption, ever
    assert [list(images) for images, _ in found] == [["webp"], ["png"]]
    assert tally.bad == {
        "records without an English caption": 1,
        "images that do not decode": 1,
        "lines that are no JSON object": 1,
        "lines that are not UTF-8": 1,
    }
    with pytest.raises(UserError, match="not an image-text file"):
        list(read_image_text(tmp_path / "a.png", tally))


def test_corpora_images_are_shrunk_only_if_large(tmp_path):
    (tmp_path / "large.png").write_bytes(image(height=40, width=100))
    (tmp_path / "small.png").write_bytes(image(height=20, width=30))
    (tmp_path / "other.bmp").write_bytes(image("bmp"))
    path = tmp_path / "x.json"
    path.write_text(
        json.dumps([{"image": n, "caption": "x"} for n in ("large.png", "small.png", "other.bmp")])
    )
    large, small, other = (images for images, _ in read_image_text(path, loose(path), size=20))
    assert decode_image(large["jpg"]).shape == (20, 50, 3)
    assert small == {"png": image(height=20, width=30)}
    assert decode_image(other["jpg"]).shape == (20, 30, 3)


def test_wikimatrix_pairs_are_filtered_by_score(tmp_path):
    path = tmp_path / "WikiMatrix.de-en.tsv.gz"
    lines = [
        "1.2\tein Hund\ta dog",
        "1.04\teine Katze\ta cat",
        "1.0399\tein Fisch\ta bird",
        "high\tein\ta",
        "1.3\tnur",
    ]
    path.write_bytes(gzip.compress("\n".join([*lines, "1.1\t\tempty"]).encode() + b"\n1.1\t\xff\tx\n"))
    tally = loose(path)
    assert list(read_pairs(path, tally, "de")) == [("a dog", "ein Hund"), ("a cat", "eine Katze")]
    assert sum(tally.bad.values()) == 4
    english_first = path.rename(tmp_path / "WikiMatrix.en-ru.tsv.gz")
    assert next(read_pairs(english_first, loose(path), "ru")) == ("ein Hund", "a dog")
    with pytest.raises(UserError, match="named for en-ru"):
        list(read_pairs(english_first, loose(path), "de"))


def test_plain_pairs_and_paragraphs_are_read(tmp_path):
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("a dog\tein Hund\nalone\na\tb\tc\td\n", encoding="utf-8")
    tally = loose(pairs)
    assert list(read_pairs(pairs, tally, "de")) == [("a dog", "ein Hund")]
    assert tally.bad == {"lines without 2 columns": 2}
    text = "erster Absatz\r\nzweiter Absatz\n\ndritter Absatz, neues Dokument"
    for name, data in {
        "a.txt": text.encode(),
        "a.gz": gzip.compress(text.encode()),
        "a.xz": lzma.compress(text.encode()),
    }.items():
        (tmp_path / name).write_bytes(data)
        found = [paragraph for (paragraph,) in read_text(tmp_path / name, loose(name))]
        assert found == ["erster Absatz", "zweiter Absatz", "dritter Absatz, neues Dokument"]
    for name, data in {
        "cut.gz": gzip.compress(text.encode())[:-12],
        "cut.xz": lzma.compress(text.encode())[:-30],
        "no.gz": b"x" * 50,
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name}: not to be read as "):
            list(read_text(tmp_path / name, loose(name)))
    with pytest.raises(UserError, match="missing.txt: no such file"):
        list(read_text(tmp_path / "missing.txt", loose("missing.txt")))


def test_corpora_byte_order_mark_is_ignored(tmp_path):
    """Windows writes one before UTF-8."""
    (tmp_path / "a.png").write_bytes(image())
    (tmp_path / "de.txt").write_text("ein Hund\n", encoding="utf-8-sig")
    (tmp_path / "de.tsv").write_text("a dog\tein Hund\n", encoding="utf-8-sig")
    (tmp_path / "a.json").write_text('[{"image": "a.png", "caption": "a dog"}]', encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_text('{"binary": "a.png", "caption": "a dog"}', encoding="utf-8-sig")
    assert list(read_text(tmp_path / "de.txt", loose("x"))) == [("ein Hund",)]
    assert list(read_pairs(tmp_path / "de.tsv", loose("x"), "de")) == [("a dog", "ein Hund")]
    for name in ("a.json", "a.jsonl"):
        assert [captions for _, captions in read_image_text(tmp_path / name, Tally(name))] == [["a dog"]]


def corpus(tmp_path):
    (tmp_path / "a.png").write_bytes(image())
    (tmp_path / "albef.json").write_text(
        json.dumps([{"image": "a.png", "caption": ["a dog", "an animal"]}] * 2)
    )
    (tmp_path / "cclm.jsonl").write_text(json.dumps({"binary": "a.png", "caption": "a cat"}))
    (tmp_path / "de.tsv").write_text("a dog\tein Hund\na cat\teine Katze\n")
    (tmp_path / "bn.tsv").write_text("bicycle\tবাইসাইকেল\n", encoding="utf-8")
    (tmp_path / "de.txt").write_text("ein Hund\n\neine Katze\n")
    (tmp_path / "more.txt").write_text("ein Haus\n")


def test_corpora_command_writes_sources_that_training_reads(tmp_path, caplog):
    corpus(tmp_path)
    out, at = tmp_path / "out", str(tmp_path)
    caplog.set_level(logging.INFO)
    arguments = ["--tokenizer", str(TOKENIZER), "--image-text", f"{at}/albef.json", f"{at}/cclm.jsonl"]
    arguments += ["--parallel", f"de={at}/de.tsv", "--parallel", f"bn={at}/bn.tsv"]
    arguments += ["--text", f"de={at}/de.txt", f"de={at}/more.txt"]
    assert main([str(out), *arguments]) == 0
    sha256 = Tokenizer.load(out).sha256
    pairs = Source(out / "parallel", "parallel", sha256)
    assert texts(pairs, "de") == [("a dog", "ein Hund"), ("a cat", "eine Katze")]
    assert texts(pairs, "bn") == [("bicycle", "বাইসাইকেল")]
    assert texts(Source(out / "text", "text", sha256), "de") == [
        ("ein Hund",),
        ("eine Katze",),
        ("ein Haus",),
    ]
    images = Source(out / "image_text", "image_text")
    samples = [images.sample("en", n) for n in range(3)]
    assert list(images.groups) == ["en"] and len({sample.key for sample in samples}) == 3
    captions = [json.loads(sample.read("json"))["captions"] for sample in samples]
    assert captions == [{"en": ["a dog", "an animal"]}] * 2 + [{"en": ["a cat"]}]
    assert samples[2].read("png") == image()
    assert [record.message.split(": ", 1)[1] for record in caplog.records if "albef" in record.message] == [
        "2 samples, 0 skipped"
    ]
    assert main([str(out), "--tokenizer", str(out / "tokenizer.model"), "--text", f"de={at}/de.txt"]) == 0


def test_corpora_text_without_tokens_is_a_bad_sample(tmp_path):
    (tmp_path / "de.txt").write_text("ein Hund\n\u200b\n", encoding="utf-8")
    prepare(tmp_path / "out", TOKENIZER, text={"de": [tmp_path / "de.txt"]}, limit=0.5)
    assert texts(Source(tmp_path / "out" / "text"), "de") == [("ein Hund",)]


def test_corpora_too_many_bad_samples_is_an_error_and_leaves_nothing(tmp_path, capsys):
    lines = ["a dog\tein Hund"] * 99 + ["a cat\t"]
    path, out = tmp_path / "pairs.tsv", tmp_path / "out"
    path.write_text("\n".join(lines))
    prepare(out, TOKENIZER, parallel={"de": [path]})  # one in a hundred is the limit
    path.write_text("\n".join(lines[1:]))
    assert main([str(tmp_path / "no"), "--tokenizer", str(TOKENIZER), "--parallel", f"de={path}"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        error.startswith("error: ")
        and "98 samples, 1 skipped, 1 empty sentences; that is more than 1.0%" in error
    )
    assert not list((tmp_path / "no" / "parallel").iterdir())
    path.write_text("\n")
    with pytest.raises(UserError, match="no sample in it"):
        prepare(out, TOKENIZER, text={"de": [path]})


def test_corpora_mostly_bad_input_stops_early():
    tally = Tally("wrong.tsv")
    with pytest.raises(UserError, match="10001 skipped"):
        for _ in range(20_000):
            tally.skip("empty sentences")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to write"),
        (["--text", "../de=x.txt"], r"language '../de'"),
        (["--text", "=x.txt"], "language ''"),
        (["--text", "cc100=x.txt"], "language 'cc100'"),
        (["--parallel", "en=x.tsv"], "name the other one"),
    ],
)
def test_corpora_wrong_requests_are_one_line_errors(tmp_path, capsys, arguments, message):
    assert main([str(tmp_path / "out"), "--tokenizer", str(TOKENIZER), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("first", "lines", "expected", "bad"),
    [
        # a margin that was lost; half a line of a file that was cut; a blank line; a column too many
        ("a dog\tein Hund", ["1.1\ta cat\teine Katze", "1.2\ta bus\tein Bus"], 2, 1),
        ("1.1\ta dog\tein Hund", ["a cat\teine Katze", "a bus\tein Bus"], 2, 1),
        ("ein Hu", ["1.1\ta cat\teine Katze", "1.2\ta bus\tein Bus"], 2, 1),
        ("", ["1.1\ta cat\teine Katze", "1.2\ta bus\tein Bus"], 2, 1),
        ("1.1\t\ta dog\tein Hund", ["1.1\ta cat\teine Katze"] * 3, 3, 1),
        ("a cat\teine Katze", ["1.1\ta cat\teine Katze"] * 60 + ["a dog\tein Hund"] * 59, 60, 60),
    ],
)
def test_read_pairs_broken_first_line_does_not_decide_the_columns(first, lines, expected, bad, tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("\n".join([first, *lines]) + "\n")
    tally = loose(path)
    pairs = list(read_pairs(path, tally, "de"))
    assert len(pairs) == expected and tally.bad.total() == bad
    assert all(english.startswith("a ") and german.startswith("ein") for english, german in pairs)

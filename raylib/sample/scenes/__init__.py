"""The miniature IGLUE: emoji scenes with questions, entailment, captions and two-image statements in twelve
languages. `statements` makes them, `translators` words them, `writer` writes them in the official formats of
xGQA, XVNLI, xFlickrCO and MaRVL, so that one reader serves both; `subset` made the WordNet and the word
vectors that come along.

Here: labels, their WordNet relations, their names in each language, the sentences that they go into.

`data/labels.json`: a label with its emoji, its WordNet 3.0 synset (checked by hand), English synonyms from
that synset, direct hypernyms and all ancestors among the labels. `data/categories.json`: what labels are,
translated by hand. `data/templates.json`: sentences into which names go in citation form.
"""

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from raylib.fileio import read_json
from raylib.sample import read_concept_captions

DATA = Path(__file__).parent / "data"
LANGUAGES = ("en", "ar", "bn", "de", "es", "fr", "id", "ko", "pt", "ru", "sw", "zh")
ANSWERS = ("no", "yes", "0", "1", "2", "3")  # besides labels
FOODS = ("fruit", "vegetable")  # categories that are food too


class Label(NamedTuple):
    """A thing that images show and answers name (`name`, English)."""

    name: str
    key: str
    synset: str
    category: str
    synonyms: tuple[str, ...]
    hypernyms: tuple[str, ...]
    ancestors: tuple[str, ...]

    @property
    def categories(self) -> tuple[str, ...]:
        """Categories of the label, most special first; none of a "thing"."""
        if self.category == "thing":
            return ()
        return (self.category, "food") if self.category in FOODS else (self.category,)


@cache
def read_labels() -> dict[str, Label]:
    """Name -> label."""
    lists = ("synonyms", "hypernyms", "ancestors")
    records = read_json(DATA / "labels.json")
    return {r["name"]: Label(**r | {name: tuple(r[name]) for name in lists}) for r in records}


@cache
def related_labels(name: str) -> frozenset[str]:
    """Labels that must not be called absent from an image with `name`: itself, synonyms, hypernyms and
    hyponyms among the labels, and those that some language calls by the same name."""
    synset, related = read_labels()[name].synset, {name, *read_labels()[name].ancestors}
    for other in read_labels().values():
        same_name = any(
            translate_name(other.name, language) == translate_name(name, language) for language in LANGUAGES
        )
        if same_name or name in other.ancestors or other.synset == synset:
            related.add(other.name)
    return frozenset(related)


def unrelated_to(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Those of `names` that are related to none of `others`."""
    related = frozenset().union(*map(related_labels, others))
    return [name for name in names if name not in related]


@cache
def hyponyms(name: str) -> tuple[str, ...]:
    """Labels below `name`."""
    return tuple(other.name for other in read_labels().values() if name in other.ancestors)


@cache
def read_templates() -> dict:
    """{"templates": {name: {language: text}}, "positions": {language: four phrases}}."""
    return read_json(DATA / "templates.json")


@cache
def read_categories() -> dict[str, dict[str, str]]:
    """Category -> {language: word}."""
    return read_json(DATA / "categories.json")


def translate_name(name: str, language: str) -> str:
    """A label's or category's name (English) in `language`: CLDR's name of the emoji."""
    if name in read_categories():
        return read_categories()[name][language]
    return read_concept_captions(language)[read_labels()[name].key].name


def fill_template(
    template: str,
    language: str,
    slots: Mapping[str, str],
    position: int | None = None,
    number: int | None = None,
) -> str:
    """Fill the template in `language`; `slots`: {"A": word, "B": word}, words already in that language;
    `position`: quadrant."""
    filled = dict(slots)
    if position is not None:
        filled["P"] = read_templates()["positions"][language][position]
    if number is not None:
        filled["N"] = str(number)
    # Korean particles depend on the word before, and "or" in Spanish on the word behind
    if language == "ko":
        filled |= {
            slot + suffix: _particle(word, suffix) for slot, word in slots.items() for suffix in PARTICLES
        }
    if language == "es" and "B" in slots:
        filled["o"] = "u" if slots["B"].lower().startswith(("o", "ho", "ó", "hó")) else "o"
    return read_templates()["templates"][template][language].format(**filled)


PARTICLES = {"i": "이가", "n": "은는", "wa": "과와", "na": ("이나", "나")}  # after a consonant, after a vowel


def _particle(word: str, kind: str) -> str:
    """A Korean word with its particle, which depends on whether its last syllable ends in a consonant."""
    after_consonant, after_vowel = PARTICLES[kind]
    code = ord(word[-1]) - 0xAC00
    closed = 0 <= code < 11172 and code % 28 > 0
    return word + (after_consonant if closed else after_vowel)

"""Labels, their relations and their names; sentences from templates in eleven languages.

`data/labels.json`: a label with its emoji, its WordNet 3.0 synset (checked by hand), English synonyms from
that synset, direct hypernyms and all ancestors among the labels. `data/categories.json`: what labels are,
translated by hand. `data/templates.json`: sentences into which names go in citation form.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from raylib.fileio import read_json
from raylib.sample.concepts import read_captions

DATA = Path(__file__).parent / "data"
LANGUAGES = ("en", "ar", "bn", "de", "es", "fr", "id", "ko", "pt", "ru", "zh")
FOODS = ("fruit", "vegetable")  # which are food too


class Label(NamedTuple):
    """A thing that pictures show and answers name (`name`, English)."""

    name: str
    key: str
    synset: str
    category: str
    synonyms: tuple[str, ...]
    hypernyms: tuple[str, ...]
    ancestors: tuple[str, ...]

    @property
    def categories(self) -> tuple[str, ...]:
        """What it is, most special first; nothing for a "thing"."""
        if self.category == "thing":
            return ()
        return (self.category, "food") if self.category in FOODS else (self.category,)


@cache
def labels() -> dict[str, Label]:
    """Name -> label."""
    records = read_json(DATA / "labels.json")
    return {
        r["name"]: Label(**{k: tuple(v) if isinstance(v, list) else v for k, v in r.items()}) for r in records
    }


@cache
def related(name: str) -> frozenset[str]:
    """Labels that must not be called absent from a picture with `name`: itself, synonyms, hypernyms and
    hyponyms among the labels, and those that some language calls by the same name."""
    own, found = labels()[name], {name, *labels()[name].ancestors}
    for other in labels().values():
        same = any(say(other.name, language) == say(name, language) for language in LANGUAGES)
        if same or name in other.ancestors or other.synset == own.synset:
            found.add(other.name)
    return frozenset(found)


@cache
def hyponyms(name: str) -> tuple[str, ...]:
    """Labels below `name`."""
    return tuple(other.name for other in labels().values() if name in other.ancestors)


@cache
def templates() -> dict:
    """{"templates": {name: {language: text}}, "positions": {language: four phrases}}."""
    return read_json(DATA / "templates.json")


@cache
def categories() -> dict[str, dict[str, str]]:
    """Category -> {language: word}."""
    return read_json(DATA / "categories.json")


def say(name: str, language: str) -> str:
    """A label's or category's name (English) in `language`: CLDR's name of the emoji."""
    if name in categories():
        return categories()[name][language]
    return read_captions(language)[labels()[name].key].name


def sentence(
    template: str, language: str, slots: Mapping[str, str] | None = None, position: int | None = None
) -> str:
    """The template in `language`; `slots`: {"A": word, "B": word}, words already in that language;
    `position`: quadrant."""
    slots = dict(slots or {})
    filled = dict(slots)
    if position is not None:
        filled["P"] = templates()["positions"][language][position]
    if language == "ko":
        filled |= {
            slot + suffix: _particle(word, suffix) for slot, word in slots.items() for suffix in PARTICLES
        }
    if language == "es" and "B" in slots:
        filled["o"] = "u" if slots["B"].lower().startswith(("o", "ho", "ó", "hó")) else "o"
    return templates()["templates"][template][language].format(**filled)


PARTICLES = {"i": "이가", "n": "은는", "wa": "과와", "na": ("이나", "나")}  # after a consonant, after a vowel


def _particle(word: str, kind: str) -> str:
    """A Korean word with its particle, which depends on whether its last syllable ends in a consonant."""
    after_consonant, after_vowel = PARTICLES[kind]
    code = ord(word[-1]) - 0xAC00
    closed = 0 <= code < 11172 and code % 28 > 0
    return word + (after_consonant if closed else after_vowel)

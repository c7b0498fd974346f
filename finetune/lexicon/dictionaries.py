"""Bilingual dictionaries from English as MUSE publishes them: a file a language, a pair of words a line.

`word<tab>translation` or `word translation`, both in one file too. In a line with a tab, both may be of
several words, and further fields are further translations; in one without, the first word is the source and
the rest its translation. A word that comes in several lines has several translations.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from raylib.errors import UserError

NAMES = ("{}2.txt", "en-{}.txt")  # paper 0's public code, MUSE itself
MOST_ODD = 0.1  # of the lines: above that, the file is something else


class Dictionary(NamedTuple):
    """`entries`: {English in lower case, words one space apart: its translations, each once, in the file's
    order}."""

    language: str
    entries: dict[str, tuple[str, ...]]
    longest: int  # words of the longest source
    lines: int
    odd: int  # lines without a translation, empty or not UTF-8: left out


def open_dictionaries(folder: Path, languages: Sequence[str]) -> tuple[dict[str, Dictionary], str]:
    """({language: its dictionary}, a line to print: words of each, lines left out), from
    `folder`/LANGUAGE2.txt or en-LANGUAGE.txt.

    Raises:
        UserError: no language, a language has no file (lists those that have), or as `read_dictionary`.
    """
    if not languages:
        raise UserError(f"{folder}: no language to open a dictionary of; name at least one")
    folder, found = Path(folder), {}
    for language in languages:
        files = [folder / name.format(language) for name in NAMES]
        file = next(filter(Path.is_file, files), None)
        if file is None:
            there = sorted(
                {p.name.removesuffix("2.txt") for p in folder.glob("*2.txt")}
                | {p.stem.removeprefix("en-") for p in folder.glob("en-*.txt")}
            )
            raise UserError(
                f"{folder}: no dictionary '{files[0].name}'; there are: {', '.join(there) or 'none'}"
            )
        found[language] = read_dictionary(file, language)
    words = ", ".join(f"{language} {len(dictionary.entries)}" for language, dictionary in found.items())
    odd, lines = (sum(column) for column in zip(*((d.odd, d.lines) for d in found.values()), strict=True))
    return found, f"English words with translations: {words}; {odd} of {lines} lines left out"


def read_dictionary(path: Path, language: str) -> Dictionary:
    """One file.

    Raises:
        UserError: more than a tenth of the lines are odd (names the first), or no line holds a pair.
    """
    entries: dict[str, dict[str, None]] = {}
    number = odd = first_odd = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            source, translations = _pair(line)
            if not translations:
                odd += 1
                first_odd = first_odd or number
                continue
            entries.setdefault(source, {}).update(dict.fromkeys(translations))
    if odd > MOST_ODD * number or not entries:
        where = f"line {first_odd} is the first of {odd} (of {number}) that are" if odd else "not one line is"
        raise UserError(f"{path}: {where} no 'word translation'; give a dictionary like MUSE's")
    longest = max(source.count(" ") + 1 for source in entries)
    return Dictionary(
        language, {source: tuple(found) for source, found in entries.items()}, longest, number, odd
    )


def _pair(line: bytes) -> tuple[str, list[str]]:
    """(source, its translations); no translations: an odd line."""
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "", []
    fields = text.split("\t") if "\t" in text.strip() else text.split(None, 1)
    source, *translations = (" ".join(field.split()) for field in fields) if fields else ("",)
    return source.lower(), [translation for translation in translations if translation] if source else []

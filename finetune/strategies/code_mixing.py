"""Code-mixing (CoSDA, Qin et al. 2020; paper 0): words of English training texts become translations into
languages drawn per word.

Dictionaries are bilingual, from English, as MUSE publishes them: a file a language, a pair of words a line,
`word<tab>translation` or `word translation`, both in one file too. In a line with a tab, both may be of
several words, and further fields are further translations; in one without, the first word is the source and
the rest its translation. A word that comes in several lines has several translations.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from finetune.strategies.base import Context, Need, Purpose, Strategy, StrategyConfig
from raylib.errors import UserError
from raylib.randomness import Key, uniform
from raylib.textfile import open_bytes

MOST_ODD = 0.1  # of the lines: above that, the file is something else
DICTIONARY_FILES = ("{}2.txt", "en-{}.txt")  # paper 0's public code, MUSE itself
SENTENCE, REPLACE, LANGUAGE, TRANSLATION = range(4)  # what is drawn


class CodeMixingConfig(StrategyConfig):
    """Words of English training texts are replaced by translations (paper 0)."""

    needs = frozenset({"english_texts"})
    file_fields = ("dictionaries",)
    mutable_fields = ("ratio", "probability")

    stages: Literal["last", "rounds", "both"] = "last"
    """With sparse fine-tuning: in the rounds that find the mask, in the training after them, or in both
    (paper 0 found the rounds harmful)."""
    dictionaries: str | None = None
    """Folder of MUSE dictionaries; null: `dictionaries` in the data folder."""
    languages: tuple[str, ...] = ()
    """Languages of the words; empty: the targets."""
    ratio: float = Field(1.0, ge=0, le=1)
    """Probability that a text is mixed (the public code: 1)."""
    probability: float = Field(0.9, ge=0, le=1)
    """Probability that a word of such a text is replaced (the public code: 0.9)."""

    def required(self) -> frozenset[Need]:
        return self.needs | ({"pruning_rounds"} if self.stages == "rounds" else set())

    def during(self, purpose: Purpose) -> "CodeMixingConfig | None":
        excluded_stages = "last" if purpose == "pruning" else "rounds"
        return None if self.stages == excluded_stages else self

    def files(self, data: Path) -> tuple[Path, ...]:
        return (Path(self.dictionaries or data / "dictionaries"),)

    def build(self, context: Context) -> "CodeMixing":
        """Read the dictionaries; logs how many lines of them were odd.

        Raises:
            UserError: a language without a dictionary, a file that is no dictionary.
        """
        from raylib.cache import cached, file_fingerprint

        languages = self.languages or tuple(code for code in context.languages if code != "en")
        (folder,) = self.files(context.data)
        dictionaries, report = cached(
            "dictionaries",
            (file_fingerprint(folder), languages),
            lambda: open_dictionaries(folder, languages),
        )
        context.log(f"strategies.code_mixing: {report}")
        return CodeMixing(dictionaries, self.ratio, self.probability)


class CodeMixing(Strategy):
    """Texts mixed by `dictionaries`, with these probabilities of a text and of a word."""

    def __init__(self, dictionaries: "Mapping[str, Dictionary]", ratio: float, probability: float):
        self.dictionaries, self.ratio, self.probability = dictionaries, ratio, probability

    def example(self, example: Any, *key: Key) -> Any:
        """Every text of the example, each from draws of its own."""
        return example.map_texts(
            lambda text, i: mix_text(text, self.dictionaries, self.ratio, self.probability, *key, "mix", i)
        )


class Dictionary(NamedTuple):
    """`entries`: {English in lower case, words one space apart: its translations, each once, in the file's
    order}."""

    language: str
    entries: dict[str, tuple[str, ...]]
    max_words: int  # of a source
    num_lines: int
    num_odd: int  # lines without a translation, empty or not UTF-8: left out


def open_dictionaries(folder: Path, languages: Sequence[str]) -> tuple[dict[str, Dictionary], str]:
    """({language: its dictionary}, a line to print: words of each, lines left out), from
    `folder`/LANGUAGE2.txt or en-LANGUAGE.txt.

    Raises:
        UserError: no language, a language has no file (lists those that have), or as `read_dictionary`.
    """
    if not languages:
        raise UserError(f"{folder}: no language to open a dictionary of; name at least one")
    folder, dictionaries = Path(folder), {}
    for language in languages:
        files = [folder / name.format(language) for name in DICTIONARY_FILES]
        file = next(filter(Path.is_file, files), None)
        if file is None:
            known = sorted(
                {p.name.removesuffix("2.txt") for p in folder.glob("*2.txt")}
                | {p.stem.removeprefix("en-") for p in folder.glob("en-*.txt")}
            )
            raise UserError(
                f"{folder}: no dictionary '{files[0].name}'; there are: {', '.join(known) or 'none'}"
            )
        dictionaries[language] = read_dictionary(file, language)
    words = ", ".join(f"{language} {len(each.entries)}" for language, each in dictionaries.items())
    odd = sum(each.num_odd for each in dictionaries.values())
    lines = sum(each.num_lines for each in dictionaries.values())
    return dictionaries, f"English words with translations: {words}; {odd} of {lines} lines left out"


def read_dictionary(path: Path, language: str) -> Dictionary:
    """One file.

    Raises:
        UserError: more than a tenth of the lines are odd (names the first), or no line holds a pair.
    """
    entries: dict[str, dict[str, None]] = {}
    number = odd = first_odd = 0
    # as bytes: some of MUSE's files have lines that are no UTF-8, and one of them is no reason to refuse it
    with open_bytes(path, has_lines=True) as (file, _):
        for number, line in enumerate(file, 1):
            source, translations = _read_pair(line)
            if not translations:
                odd += 1
                first_odd = first_odd or number
                continue
            entries.setdefault(source, {}).update(dict.fromkeys(translations))
    if odd > MOST_ODD * number or not entries:
        where = f"line {first_odd} is the first of {odd} (of {number}) that are" if odd else "not one line is"
        raise UserError(f"{path}: {where} no 'word translation'; give a dictionary like MUSE's")
    max_words = max(source.count(" ") + 1 for source in entries)
    translations_of = {source: tuple(each) for source, each in entries.items()}
    return Dictionary(language, translations_of, max_words, number, odd)


def _read_pair(line: bytes) -> tuple[str, list[str]]:
    """(source, its translations); no translations: an odd line."""
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "", []
    fields = text.split("\t") if "\t" in text.strip() else text.split(None, 1)
    source, *translations = (" ".join(field.split()) for field in fields) if fields else ("",)
    return source.lower(), [translation for translation in translations if translation] if source else []


def mix_text(
    text: str, dictionaries: Mapping[str, Dictionary], ratio: float, probability: float, *keys: Key
) -> str:
    """`text` with words replaced, as the keys draw it: with (seed, epoch, example), each epoch mixes anew.

    With probability `ratio` the sentence is mixed at all. Then, from left to right: a language is drawn
    first, and the word is looked up in its dictionary, in any case and without the punctuation around it;
    where an entry of several words starts here, the longest counts as the word. With `probability` it is
    replaced, by one of its translations; a word that the drawn language lacks stays (paper 0's public code
    does so too). Punctuation stays where it is, spaces become single ones.

    Args:
        dictionaries: at least one.
        ratio, probability: 1 and 0.9 in paper 0's public code.
    """
    words = text.split()
    # every word has draws of its own, used or not: what one word becomes does not hang on the words before it
    draws = uniform(*keys, np.arange(4)[:, None], np.arange(max(len(words), 1))).tolist()
    if not words or draws[SENTENCE][0] >= ratio:
        return text
    languages = sorted(dictionaries)  # whatever the order of the setting
    mixed: list[str] = []
    i = 0
    while i < len(words):
        dictionary = dictionaries[languages[int(draws[LANGUAGE][i] * len(languages))]]
        count, translations = _longest_entry(words, i, dictionary)
        if translations and draws[REPLACE][i] < probability:
            before, after = _strip_marks(words[i])[0], _strip_marks(words[i + count - 1])[2]
            mixed.append(before + translations[int(draws[TRANSLATION][i] * len(translations))] + after)
        else:
            mixed += words[i : i + count]
        i += count
    return " ".join(mixed)


def _longest_entry(words: list[str], start: int, dictionary: Dictionary) -> tuple[int, tuple[str, ...]]:
    """(how many words the longest entry at `start` has, its translations); (1, ()) where there is none."""
    source = ""
    best: tuple[int, tuple[str, ...]] = (1, ())
    for count in range(1, min(dictionary.max_words, len(words) - start) + 1):
        before, word, after = _strip_marks(words[start + count - 1])
        if count > 1 and before:
            break  # "polar, bear" and "polar (bear)" are not the polar bear
        source = f"{source} {word}" if count > 1 else word
        if source in dictionary.entries:
            best = count, dictionary.entries[source]
        if after:
            break
    return best


@lru_cache(2**16)
def _strip_marks(word: str) -> tuple[str, str, str]:
    """(punctuation before, the word in lower case, punctuation after)."""
    marks = [unicodedata.category(character)[0] in "PS" for character in word]
    if all(marks):
        return word, "", ""
    start, end = marks.index(False), len(word) - marks[::-1].index(False)
    return word[:start], word[start:end].lower(), word[end:]

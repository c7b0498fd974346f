"""Code-mixing (CoSDA, Qin et al. 2020; paper 0): words of a sentence become translations into languages drawn
per word."""

import unicodedata
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from finetune.lexicon.dictionaries import Dictionary
from raylib.randomness import Key, uniform

SENTENCE, REPLACE, LANGUAGE, TRANSLATION = range(4)  # what is drawn


def mix(
    text: str, dictionaries: Mapping[str, Dictionary], ratio: float, probability: float, *keys: Key
) -> str:
    """`text` with words replaced, as the keys draw it: with (seed, epoch, example), each epoch mixes anew.

    With probability `ratio` the sentence is mixed at all. Then, from left to right: a language is drawn
    first, and the word is looked up in its dictionary, in any case and without the punctuation around it;
    where an entry of several words starts here, the longest counts as the word. With `probability` it is
    replaced, by one of its translations; a word that the drawn language lacks stays (paper 0's public code
    does so too). Punctuation stays where it is, spaces become single ones.

    Args:
        dictionaries: at least one. ratio, probability: 1 and 0.9 in paper 0's public code.
    """
    words = text.split()
    draws = uniform(*keys, np.arange(4)[:, None], np.arange(max(len(words), 1))).tolist()
    if not words or draws[SENTENCE][0] >= ratio:
        return text
    languages = sorted(dictionaries)
    mixed, i = [], 0
    while i < len(words):
        dictionary = dictionaries[languages[int(draws[LANGUAGE][i] * len(languages))]]
        count, translations = _find(words, i, dictionary)
        if translations and draws[REPLACE][i] < probability:
            before, after = _parts(words[i])[0], _parts(words[i + count - 1])[2]
            mixed.append(before + translations[int(draws[TRANSLATION][i] * len(translations))] + after)
        else:
            mixed += words[i : i + count]
        i += count
    return " ".join(mixed)


def _find(words: list[str], start: int, dictionary: Dictionary) -> tuple[int, tuple[str, ...]]:
    """(how many words the longest entry at `start` has, its translations); (1, ()) where there is none."""
    source, best = "", (1, ())
    for count in range(1, min(dictionary.longest, len(words) - start) + 1):
        before, word, after = _parts(words[start + count - 1])
        if count > 1 and before:
            break  # "polar, bear" and "polar (bear)" are not the polar bear
        source = f"{source} {word}" if count > 1 else word
        if source in dictionary.entries:
            best = count, dictionary.entries[source]
        if after:
            break
    return best


@lru_cache(2**16)
def _parts(word: str) -> tuple[str, str, str]:
    """(punctuation before, the word in lower case, punctuation after)."""
    marks = [unicodedata.category(character)[0] in "PS" for character in word]
    if all(marks):
        return word, "", ""
    start, end = marks.index(False), len(word) - marks[::-1].index(False)
    return word[:start], word[start:end].lower(), word[end:]

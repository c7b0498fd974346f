"""Words of texts, of languages that write no spaces between them too; texts as published code changes them
before a tokenizer reads them (`NORMALIZATIONS`).

| languages | cut into words by |
| --- | --- |
| Japanese | MeCab with UniDic (`fugashi`, `unidic-lite`) |
| Chinese, Cantonese; Thai, Lao, Khmer, Burmese | ICU's dictionaries (`icu4py`) |
| others | spaces, signs; an ideograph is a word by itself |
"""

import hashlib
import logging
import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache

from raylib.errors import require
from raylib.text import Tokenizer

ICU = ("zh", "yue", "wuu", "th", "lo", "km", "my")
JAPANESE = ("ja", "jp")  # XTD's files are called jp
# the same by three letters (ISO 639), and the other Chinese languages
THREE_LETTERS = {
    "jpn": "ja",
    **dict.fromkeys(("zho", "chi", "cmn", "nan", "hak", "gan", "hsn", "cdo", "lzh"), "zh"),
    "tha": "th",
    "lao": "lo",
    "khm": "km",
    **dict.fromkeys(("mya", "bur"), "my"),
    **dict.fromkeys(("bod", "tib"), "bo"),
    "dzo": "dz",
    "iii": "ii",
}
# no segmenter is known for Tibetan, Dzongkha, Shan, Mon, Tai Lue, Northern Thai, Yi
UNCUT = ("bo", "dz", "shn", "mnw", "khb", "nod", "ii")
IDEOGRAPHS = ("CJK", "HIRAGANA", "KATAKANA")  # how the names of letters begin that are words by themselves

log = logging.getLogger(__name__)

MARKS = str.maketrans(dict.fromkeys(",.'!?\"()*#:;~-/", " "))
BLANKS = re.compile(r"\s{2,}")


def normalize_question(text: str) -> str:
    """Return a question in lower case, with blanks in the place of ASCII punctuation: CCLM's `pre_question`
    (dataset/utils.py; ALBEF's of this name puts nothing in its place)."""
    return text.lower().translate(MARKS).rstrip(" ")


def normalize_caption(text: str) -> str:
    """Return a caption in lower case, with single blanks in the place of ASCII punctuation: CCLM's
    `pre_caption`, which stops at a caption of nothing else; here it becomes empty."""
    text = text.lower().translate(MARKS).replace("<person>", "person")
    return BLANKS.sub(" ", text).rstrip("\n").strip(" ")


NORMALIZATIONS: dict[str, Callable[[str], str]] = {
    "question": normalize_question,
    "caption": normalize_caption,
}


class NormalizedTokenizer(Tokenizer):
    """A tokenizer that changes every text first, by one of `NORMALIZATIONS`.

    max_words: of a text in training, between blanks; two next to each other have an empty one between them.
    """

    def __init__(self, tokenizer: Tokenizer, name: str, max_words: int | None = None, training: bool = False):
        self.__dict__.update(tokenizer.__dict__)
        self.plain, self.name, self.max_words, self.training = tokenizer, name, max_words, training
        self._known = {}
        self._encode = lambda texts: tokenizer.encode([self.normalize(text) for text in texts])
        kept = f"{tokenizer.sha256} {name} {max_words if training else None}"
        self.sha256 = hashlib.sha256(kept.encode()).hexdigest()

    def normalize(self, text: str) -> str:
        """Return a text as the plain tokenizer reads it."""
        text = NORMALIZATIONS[self.name](text)
        words = text.split(" ") if self.training and self.max_words else []
        return " ".join(words[: self.max_words]) if len(words) > (self.max_words or 0) else text

    @property
    def for_training(self) -> Tokenizer:
        return NormalizedTokenizer(self.plain, self.name, self.max_words, training=True)

    def __reduce__(self):
        return NormalizedTokenizer, (self.plain, self.name, self.max_words, self.training)


@cache
def _segmenter(language: str) -> Callable[[str], list[str]] | None:
    """Return the function that cuts a text without white space into the words that make it up; None where
    spaces do."""
    code = re.split("[-_]", language.lower())[0]
    code = THREE_LETTERS.get(code, code)
    if code in JAPANESE:
        tagger = require("fugashi", "finetune").Tagger()
        return lambda text: [word.surface for word in tagger(text)]
    if code in ICU:
        breaker = require("icu4py.breakers", "finetune").WordBreaker
        return lambda text: list(map(str, breaker(text, code)))
    if code in UNCUT:
        log.warning("%s: no segmenter is known: what stands between spaces counts as one word", language)
    return None


def has_segmenter(language: str) -> bool:
    """Return whether texts in a language are cut into words by a segmenter."""
    return _segmenter(language) is not None


def split_words(text: str, language: str = "") -> list[str]:
    """The words of a text: letters with their marks, numbers; each sign by itself. In a language that writes
    no spaces they are those of a segmenter, in another each ideograph is one."""
    segment = _segmenter(language) if language else None
    words: list[str] = []
    for part in text.split():
        for piece in segment(part) if segment else [part]:
            words += _split_signs(piece, segment is None)
    return words


def _split_signs(text: str, ideographs: bool) -> Iterator[str]:
    """The words of a text without spaces: each sign is one, and with `ideographs` each of these."""
    word = ""
    for character in text:
        is_sign = unicodedata.category(character)[0] in "PS"
        if is_sign or (ideographs and unicodedata.name(character, "").startswith(IDEOGRAPHS)):
            yield from filter(None, (word, character))
            word = ""
        else:
            word += character
    if word:
        yield word


def count_words(text: str, language: str = "") -> int:
    """The number of words of a text: between spaces, or of a segmenter where a language writes none, signs
    apart."""
    if not language or not has_segmenter(language):
        return len(text.split())
    return sum(any(map(str.isalnum, word)) for word in split_words(text, language))

"""Texts as published code changes them before a tokenizer reads them: `NORMALIZATIONS`."""

import hashlib
import re
from collections.abc import Callable

from raylib.text import Tokenizer

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

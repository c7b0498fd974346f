"""Words in sentences: the tokens that a word is cut into, and what to look for where nothing is said.

A word is found by its letters. `spans` says which letters each token stands for; both kinds of tokenizer
files tell.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from finetune.formats.examples import Example
from raylib.errors import UserError
from raylib.sample.scenes.labels import read_labels, say
from raylib.text import Tokenizer


class Thing(NamedTuple):
    """Something in a picture of the emoji scenes: its English name and its quadrant (0 top left ... 3 bottom
    right)."""

    label: str
    quadrant: int


def spans(tokenizer: Tokenizer, text: str) -> list[tuple[int, int]]:
    """(first letter, behind the last) of each token of `tokenizer.encode`, places in `text`."""
    model = _load(tokenizer.path)
    if tokenizer.path.suffix == ".json":
        return model.encode(text, add_special_tokens=False).offsets
    pieces = model.encode(text, return_type="proto").pieces
    place = [0]  # of each byte; the library counts these
    for i, letter in enumerate(text):
        place += [i] * (len(letter.encode()) - 1) + [i + 1]
    return [(place[piece.begin], place[piece.end]) for piece in pieces]


@cache
def _load(path: Path):
    if path.suffix == ".json":
        import tokenizers

        return tokenizers.Tokenizer.from_file(str(path))
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def find_tokens(tokenizer: Tokenizer, text: str, span: tuple[int, int], length: int) -> list[int]:
    """Tokens, counted with <s> as `add_specials` puts it and a prompt before the text, that stand for any
    letter of text[span]; those cut off by `length` are not among them."""
    start, end = span
    plain = getattr(tokenizer, "plain", tokenizer)
    prompt = len(tokenizer.encode([text])[0]) - len(plain.encode([text])[0])
    found = [prompt + i for i, (a, b) in enumerate(spans(tokenizer, text)) if a < end and b > start]
    return [i + 1 for i in found if i < length - 2]


def find_word(word: str, text: str) -> tuple[int, int] | None:
    """Where the word first is in the text, in any case: as a word of its own, or else as part of one
    (Korean's particles)."""
    bounds = (rf"(?<!\w){re.escape(word)}(?!\w)", re.escape(word))
    return next((found.span() for bound in bounds if (found := re.search(bound, text, re.IGNORECASE))), None)


def read_scenes(path: Path, images: set[str]) -> dict[str, list[Thing]]:
    """{picture: what stands in it} of `images`, from the scenes.jsonl of emoji scenes.

    Raises:
        UserError: a line that is not as `raylib.sample.scenes` writes it.
    """
    found = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                if record["id"] in images:
                    found[record["id"]] = [Thing(o["label"], o["quadrant"]) for o in record["objects"]]
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{path}, line {number}: no scene; write the folder again with raylib.sample.scenes"
                ) from None
    return found


def name_in(
    row: Sequence[Example], languages: Sequence[str], things: Sequence[Thing]
) -> tuple[Thing, dict[str, str]] | None:
    """(the first of `things` that the item names in every language, its name in each); None where there is
    none.

    A name must come once: what is cut out of another name (Chinese has the cat in the panda) does not count.
    """
    english = row[languages.index("en")].texts[-1] if "en" in languages else None
    for thing in things:
        words = {code: say(thing.label, code) for code in languages}
        once = all(
            e.texts[-1].casefold().count(words[code].casefold()) == 1
            for code, e in zip(languages, row, strict=True)
        )
        if once and (english is None or _is_whole(thing.label, english)):
            return thing, words
    return None


def _is_whole(label: str, text: str) -> bool:
    """Whether the English text means the label itself, and not a longer one that holds its name (a hot dog is
    no dog)."""
    longer = (other for other in read_labels() if label in other and other != label)
    whole = rf"(?<!\w){re.escape(label)}(?!\w)"
    return bool(re.search(whole, text, re.IGNORECASE)) and not any(other in text for other in longer)


def parse_words(given: Sequence[str]) -> Mapping[str, str]:
    """{language: word} of "en=dog" "de=Hund".

    Raises:
        UserError: not of this form.
    """
    words = dict(item.partition("=")[::2] for item in given)
    if len(words) < len(given) or not all(code and word for code, word in words.items()):
        raise UserError(
            f"--words {' '.join(given)}: give each language once with its word, as in --words en=dog de=Hund"
        )
    return words

"""Word alignments between training texts and their English ones, from files as aligners read and write them.

FOLDER/LANGUAGE.text     a line an example, in the order of the training file: words ||| English words
FOLDER/LANGUAGE.align    a line each, in Pharaoh's format: 0-0 1-2 3-1, word i of the first, word j of the
                         second, from 0
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from finetune.distillation.matching import Span
from finetune.formats.stream import read_lines
from raylib.errors import UserError
from raylib.text import Tokenizer

PARTED = " ||| "
Link = tuple[Span, Span]  # characters of a word in the text, and of the one in the English text
Alignments = dict[tuple[str, str], tuple[Link, ...]]  # (id, text) -> words that may take each other's place


def read_alignments(
    folder: Path,
    language: str,
    examples: Iterable[tuple[str, str, str]],
    tokenizers: tuple[Tokenizer, Tokenizer],
) -> Alignments:
    """What the files of a language say about the training examples (id, text, English text): links of one
    word to one, whose English word both tokenizers, the student's and the teacher's, cut into the same
    sub-words (paper 3, section IV-C).

    Raises:
        UserError: no such files, more or fewer lines than examples, words that are not the example's, links
            that are no numbers or out of range; names file and line.
    """
    files = [folder / f"{language}.{kind}" for kind in ("text", "align")]
    lines = [list(_read(file)) for file in files]
    examples, same = list(examples), _same_pieces(tokenizers)
    for file, found in zip(files, lines, strict=True):
        if len(found) != len(examples):
            raise UserError(
                f"{file}: {len(found)} lines for {len(examples)} training examples in '{language}'"
            )
    found: Alignments = {}
    for number, ((key, text, english), words, links) in enumerate(zip(examples, *lines, strict=True), 1):
        sides = words.split(PARTED)
        if len(sides) != 2:
            raise UserError(f"{files[0]}:{number}: wanted words{PARTED}English words")
        spans = [
            locate(side.split(), whole, f"{files[0]}:{number}")
            for side, whole in zip(sides, (text, english), strict=True)
        ]
        pairs = read_links(links, *map(len, spans), f"{files[1]}:{number}")
        found[key, text] = tuple(
            (spans[0][i], spans[1][j]) for i, j in one_to_one(pairs) if same(english[slice(*spans[1][j])])
        )
    return found


def _read(file: Path) -> Iterable[str]:
    """All lines: one without a link is empty."""
    if not file.is_file():
        raise UserError(
            f"{file}: no such file; word alignments are made with `python -m finetune.distillation`"
        )
    next(iter(read_lines(file)), None)  # says so if it is no text
    return file.read_text(encoding="utf-8").splitlines()


def read_links(line: str, words: int, others: int, where: str) -> list[tuple[int, int]]:
    """The pairs of a line in Pharaoh's format, between so many words and so many others.

    Raises:
        UserError: no pair of numbers, or no such word.
    """
    pairs = []
    for link in line.split():
        first, dash, second = link.partition("-")
        if not (dash and first.isdecimal() and second.isdecimal()):
            raise UserError(f"{where}: '{link}' is no link of two words, such as 0-1")
        pairs.append((int(first), int(second)))
        if pairs[-1][0] >= words or pairs[-1][1] >= others:
            raise UserError(
                f"{where}: link {link} is out of range: there are {words} words and {others} English ones"
            )
    return pairs


def one_to_one(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pairs of words that are in no other pair."""
    firsts, seconds = Counter(i for i, _ in set(pairs)), Counter(j for _, j in set(pairs))
    return sorted((i, j) for i, j in set(pairs) if firsts[i] == seconds[j] == 1)


def locate(words: Sequence[str], text: str, where: str) -> list[Span]:
    """Where the words are in the text, which they make up in this order, white space aside.

    Raises:
        UserError: they do not.
    """
    if "".join(words) != "".join(text.split()):
        raise UserError(f"{where}: the words '{' '.join(words)}' are not those of the example, '{text}'")
    spans, at = [], 0
    for word in words:
        first = at = at + len(text[at:]) - len(text[at:].lstrip())
        for character in word:  # a word may have white space within in the text
            at += len(text[at:]) - len(text[at:].lstrip())
            at += len(character)
        spans.append((first, at))
    return spans


def _same_pieces(tokenizers: tuple[Tokenizer, Tokenizer]) -> Callable[[str], bool]:
    """Whether both tokenizers cut a word into the same sub-words."""

    @functools.cache
    def same(word: str) -> bool:
        mine, theirs = (tokenizer.pieces(tokenizer.encode([word])[0]) for tokenizer in tokenizers)
        return mine == theirs

    return same

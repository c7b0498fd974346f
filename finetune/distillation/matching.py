"""Which tokens of two tokenizers stand for the same sub-words of a text."""

from collections.abc import Sequence

import numpy as np

from raylib.text import Tokenizer

Span = tuple[int, int]  # first, end


def token_spans(text: str, words: Sequence[Span], tokenizer: Tokenizer) -> list[Span | None]:
    """The tokens of the words that lie at these characters of `text`; None where a word does not begin and
    end as tokens do."""
    ends = sorted({place for word in words for place in word} | {len(text)})
    rows = dict(zip(ends, tokenizer.encode([text[:end].rstrip() for end in ends]), strict=True))
    whole = rows[len(text)]
    counts = {end: len(row) if np.array_equal(row, whole[: len(row)]) else None for end, row in rows.items()}
    spans = [(counts[first], counts[end]) for first, end in words]
    return [None if None in span or span[0] >= span[1] else span for span in spans]


def words_at(text: str) -> list[Span]:
    """Where the words of a text are that white space parts."""
    found, at = [], 0
    for word in text.split():
        first = text.index(word, at)
        at = first + len(word)
        found.append((first, at))
    return found


def matching_tokens(
    student: tuple[str, Sequence[Span], Tokenizer],
    teacher: tuple[str, Sequence[Span], Tokenizer],
    whole: bool = False,
) -> list[Span]:
    """Pairs of tokens, of the student's text and of the teacher's, that are equal sub-words of words that
    belong together: word by word, each with the next equal one of the other.

    Args:
        student, teacher: text, its words (word i of one belongs to word i of the other), tokenizer.
        whole: a word counts only if all its sub-words match.
    """
    pairs = []
    ids = [tokenizer.encode([text])[0] for text, _, tokenizer in (student, teacher)]
    spans = [token_spans(*side) for side in (student, teacher)]
    for mine, theirs in zip(*spans, strict=True):
        if mine and theirs:
            parts = [student[2].pieces(ids[0][slice(*mine)]), teacher[2].pieces(ids[1][slice(*theirs)])]
            if parts[0] == parts[1] or not whole:
                pairs += [(mine[0] + i, theirs[0] + j) for i, j in _greedy(*parts)]
    return pairs


def _greedy(left: Sequence[str], right: Sequence[str]) -> list[Span]:
    """Places of equal parts, from left to right, none of them twice."""
    pairs, first = [], 0
    for i, part in enumerate(left):
        if part in right[first:]:
            first = right.index(part, first) + 1
            pairs.append((i, first - 1))
    return pairs

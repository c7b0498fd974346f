"""Contextual code-mixing (paper 3, section IV-C): English words take the place of the words that translate
them here."""

from collections.abc import Sequence

import numpy as np

from finetune.distillation.alignments import Link
from raylib.randomness import Key, uniform


def mix(
    text: str, english: str, links: Sequence[Link], share: float, *keys: Key
) -> tuple[str, tuple[Link, ...]]:
    """`text` with some words replaced by the English ones that they are linked to, as the keys draw it.

    Args:
        links: the words that may be replaced, each once, from left to right.
        share: of the words between white space in the text; but at least one, and no more than there are
        links (as in cViL's
            code, which counts sub-words).
    Returns:
        (the text, where the English words are in it and in `english`). They stand between spaces, also where
        the language writes none.
    """
    count = min(max(1, round(share * len(text.split()))), len(links))
    order = np.argsort(uniform(*keys, np.arange(len(links))), kind="stable")
    mixed, at, placed = "", 0, []
    for i in sorted(order[:count].tolist()):
        (first, end), there = links[i]
        mixed += text[at:first]
        if mixed and not mixed[-1].isspace():
            mixed += " "
        start = len(mixed)
        mixed += english[slice(*there)]
        placed.append(((start, len(mixed)), there))
        if end < len(text) and not text[end].isspace():
            mixed += " "
        at = end
    return mixed + text[at:], tuple(placed)

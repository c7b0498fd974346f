"""The terms of distillation (paper 3, equations 2 to 6) as pairs of tokens, each with what it counts.

Every term is the sum of weight x MSE(state of the student, state of the teacher) over its pairs, divided by
the number of examples of the global batch:

| term | pairs | weight (`public`: 1) |
| --- | --- | --- |
| cls (equation 2) | both CLS | 1 |
| image (3) | each region | 1 / p, p regions |
| tags (4) | sub-words of tags that match | 1 / (t t') of tokens; the paper's t^2, where tokenizers agree |
| mixed (5) | sub-words of aligned words that match | 1 / (n n'), n and n' tokens of words |

With `public` (cViL's code) they are one mean over the pairs of all terms and examples: regions outweigh
everything else.

Shape legend: P pairs; T, T' tokens of student and teacher; n rows; d width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from raylib.models.base import TokenSegments
from raylib.packed import Ragged

TERMS = ("cls", "image", "tags", "mixed")


class Pairs(NamedTuple):
    """Flat positions of tokens (P,) in the student's and in the teacher's rows, and what each pair counts
    (P,)."""

    student: Tensor
    teacher: Tensor
    weights: Tensor


def distance(student: Tensor, teacher: Tensor, pairs: Pairs) -> Tensor:
    """Sum over the pairs of weight x mean squared error, in float32.

    Args:
        student: (T, d). teacher: (T', d), which gets no gradient.
    """
    mine = student.index_select(0, pairs.student).float()
    theirs = teacher.detach().index_select(0, pairs.teacher).float()
    return ((mine - theirs).square().mean(1) * pairs.weights).sum()


def cls_pairs(student: TokenSegments, teacher: TokenSegments) -> Pairs:
    """One pair a row, which counts 1."""
    return Pairs(student.cls, teacher.cls, torch.ones(len(student.cls)))


def image_pairs(
    student: TokenSegments, teacher: TokenSegments, slots: int = 0, public: bool = False
) -> Pairs:
    """The regions of each picture.

    Args:
        slots: 0, padding is masked; else pictures are padded to so many slots, and the empty ones are
            averaged in, as in cViL's code: those of a row all come to one state (`TokenSegments.empty`),
            which counts as often as there are.
    """
    counts = student.regions.lengths
    shares = torch.ones(len(counts)) if public else 1 / counts.clamp(min=slots or 1).float()
    pairs = Pairs(student.regions.values, teacher.regions.values, shares.repeat_interleave(counts))
    if not slots:
        return pairs
    empty = Pairs(student.empty, teacher.empty, shares * (slots - counts).clamp(min=0))
    return Pairs(*(torch.cat(both) for both in zip(pairs, empty, strict=True)))


def matched_pairs(
    student: Ragged,
    teacher: Ragged,
    matches: Sequence[Sequence[tuple[int, int]]],
    public: bool = False,
    specials: int = 0,
) -> Pairs:
    """Tokens that match: the ones of A in equation 4, of B in equation 5.

    Args:
        student, teacher: places of n rows of tags, or of texts. matches: of each row, pairs of places in the
        row. specials: tokens of a row that are no words, and do not count in n.
    """
    rows = torch.tensor([i for i, row in enumerate(matches) for _ in row], dtype=torch.int64)
    mine, theirs = (
        torch.tensor([pair for row in matches for pair in row], dtype=torch.int64).view(-1, 2).unbind(1)
    )
    sizes = (student.lengths - specials) * (teacher.lengths - specials)
    weights = torch.ones(len(rows)) if public else 1 / sizes[rows].float()
    return Pairs(
        student.values[student.starts[rows] + mine], teacher.values[teacher.starts[rows] + theirs], weights
    )

"""Pairs of tokens of student and teacher that are compared, with the weight of each (paper 3, equations 2 to
6); what a batch holds for that, made where batches are read.

Every term is the sum of weight x MSE(state of the student, state of the teacher) over its pairs, divided by
the number of examples of the global batch:

| term | pairs | weight (`public`: 1) |
| --- | --- | --- |
| cls (equation 2) | both CLS | 1 |
| image (3) | each region | 1 / p, p regions |
| tags (4) | sub-words of tags that match | 1 / (t t') of tokens; the paper's t^2, where tokenizers agree |
| mixed (5) | sub-words of aligned words that match | 1 / (n n'), n and n' tokens of words |

With `public` (cViL's code) they are one mean over the pairs of all terms and examples, so that regions
outweigh everything else; and more tokens are pairs:

| term | pairs, with `public` |
| --- | --- |
| image | as many slots in every image, those without a region too (`slots`) |
| tags | the SEP after the question; words of tags one by one, their sub-words that are equal at one place |
| mixed | every word of the student's text that is in the English one, at its last place there |

Shape legend: P pairs; T, T' tokens of student and teacher; n rows; d width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from finetune.batches import encode_inputs, tags_of
from finetune.formats import Example
from finetune.strategies.distillation.teacher import StoredStates
from finetune.strategies.distillation.word_alignments import Span
from raylib.packed import Ragged, TokenSegments, find_segments
from raylib.text import Tokenizer


def word_token_spans(text: str, words: Sequence[Span], tokenizer: Tokenizer) -> list[Span | None]:
    """The tokens of the words that lie at these characters of `text`; None where a word does not begin and
    end as tokens do."""
    # a tokenizer says nothing of characters: a word ends where a token does if the text up to there has the
    # first tokens of the whole text
    ends = sorted({end for word in words for end in word} | {len(text)})
    prefixes = dict(zip(ends, tokenizer.encode([text[:end].rstrip() for end in ends]), strict=True))
    whole = prefixes[len(text)]
    counts = {end: len(row) for end, row in prefixes.items() if np.array_equal(row, whole[: len(row)])}
    spans: list[Span | None] = []
    for first, end in words:
        span = (counts[first], counts[end]) if first in counts and end in counts else (0, 0)
        spans.append(span if span[0] < span[1] else None)
    return spans


def word_spans(text: str) -> list[Span]:
    """Spans of the words of a text that white space parts."""
    spans, end = [], 0
    for word in text.split():
        first = text.index(word, end)
        end = first + len(word)
        spans.append((first, end))
    return spans


def matching_tokens(
    student: tuple[str, Sequence[Span], Tokenizer],
    teacher: tuple[str, Sequence[Span], Tokenizer],
    whole: bool = False,
) -> list[Span]:
    """Pairs of tokens, of the student's text and of the teacher's, that are equal sub-words of words
    that belong together: word by word, each with the next equal one of the other.

    Args:
        student, teacher: text, its words (word i of one belongs to word i of the other), tokenizer.
        whole: a word counts only if all its sub-words match.
    """
    pairs = []
    ids = [tokenizer.encode([text])[0].tolist() for text, _, tokenizer in (student, teacher)]
    spans = zip(word_token_spans(*student), word_token_spans(*teacher), strict=True)
    for left, right in spans:
        if left and right:
            pieces = student[2].pieces(ids[0][slice(*left)]), teacher[2].pieces(ids[1][slice(*right)])
            if pieces[0] == pieces[1] or not whole:
                pairs += [(left[0] + i, right[0] + j) for i, j in _equal_pieces(*pieces)]
    return pairs


def _equal_pieces(left: Sequence[str], right: Sequence[str]) -> list[Span]:
    """Pairs of places of equal pieces, from left to right, none of them twice."""
    pairs, first = [], 0
    for i, piece in enumerate(left):
        if piece in right[first:]:
            first = right.index(piece, first) + 1
            pairs.append((i, first - 1))
    return pairs


WORD_START = "▁"  # how `Tokenizer.pieces` begins those that begin a word
SEP_PIECE = f"{WORD_START}[SEP]"


def public_tag_matches(student: Sequence[str], teacher: Sequence[str]) -> list[Span]:
    """Pairs of places of the sub-words of tags, as cViL's code finds them: word after word of both, sub-words
    that are equal at the same place of their word."""
    pairs, i, j = [], 0, 0
    while i < len(student) and j < len(teacher):
        size = 1 + _continued(student, i)
        # it looks on behind a shorter word of the teacher's
        pairs += [
            (i + k, j + k) for k in range(min(size, len(teacher) - j)) if student[i + k] == teacher[j + k]
        ]
        i, j = i + size, j + 1 + _continued(teacher, j)
    return pairs


def public_word_matches(student: Sequence[str], teacher: Sequence[str]) -> list[Span]:
    """Pairs of places of the sub-words of words that both texts have, as cViL's code finds them: all of the
    student's, not those alone that were mixed in, each with the last such word of the English text."""
    places = {tuple(teacher[j : j + 1 + _continued(teacher, j)]): j for j in _word_starts(teacher)}
    pairs = []
    for i in _word_starts(student):
        word = tuple(student[i : i + 1 + _continued(student, i)])
        pairs += [(i + k, places[word] + k) for k in range(len(word)) if word in places]
    return pairs


def _word_starts(pieces: Sequence[str]) -> list[int]:
    return [i for i, piece in enumerate(pieces) if piece.startswith(WORD_START)]


def _continued(pieces: Sequence[str], start: int) -> int:
    """Count the sub-words behind `start` that belong to the same word."""
    following = (i for i in range(start + 1, len(pieces)) if pieces[i].startswith(WORD_START))
    return next(following, len(pieces)) - start - 1


TOKEN_KINDS = ("cls", "image", "tags", "mixed")


class TokenPairs(NamedTuple):
    """Flat positions of tokens (P,) in the student's and in the teacher's rows, and what each pair counts
    (P,)."""

    student: Tensor
    teacher: Tensor
    weights: Tensor


def pair_distance(student: Tensor, teacher: Tensor, pairs: TokenPairs) -> Tensor:
    """Sum over the pairs of weight x mean squared error, in float32.

    Args:
        student: (T, d).
        teacher: (T', d), which gets no gradient.
    """
    learned = student.index_select(0, pairs.student).float()
    taught = teacher.detach().index_select(0, pairs.teacher).float()
    return ((learned - taught).square().mean(1) * pairs.weights).sum()


def cls_pairs(student: TokenSegments, teacher: TokenSegments) -> TokenPairs:
    """One pair a row, which counts 1."""
    return TokenPairs(student.cls, teacher.cls, torch.ones(len(student.cls)))


def image_pairs(
    student: TokenSegments, teacher: TokenSegments, slots: int = 0, public: bool = False
) -> TokenPairs:
    """The regions of each image.

    Args:
        slots: 0, padding is masked; else images are padded to so many slots, and the empty ones are
            averaged in, as in cViL's code: those of a row all come to one state (`TokenSegments.empty`),
            which counts as often as there are.
    """
    counts = student.regions.lengths
    shares = torch.ones(len(counts)) if public else 1 / counts.clamp(min=slots or 1).float()
    pairs = TokenPairs(student.regions.values, teacher.regions.values, shares.repeat_interleave(counts))
    if not slots:
        return pairs
    empty = TokenPairs(student.empty, teacher.empty, shares * (slots - counts).clamp(min=0))
    return TokenPairs(*(torch.cat(both) for both in zip(pairs, empty, strict=True)))


def matched_pairs(
    student: Ragged,
    teacher: Ragged,
    matches: Sequence[Sequence[tuple[int, int]]],
    public: bool = False,
    specials: int = 0,
) -> TokenPairs:
    """Tokens that match: the ones of A in equation 4, of B in equation 5.

    Args:
        student, teacher: places of n rows of tags, or of texts.
        matches: of each row, pairs of places in the row.
        specials: tokens of a row that are no words, and do not count in n.
    """
    rows = torch.tensor([i for i, row in enumerate(matches) for _ in row], dtype=torch.int64)
    flat = torch.tensor([pair for row in matches for pair in row], dtype=torch.int64)
    left, right = flat.view(-1, 2).unbind(1)
    sizes = (student.lengths - specials) * (teacher.lengths - specials)
    weights = torch.ones(len(rows)) if public else 1 / sizes[rows].float()
    return TokenPairs(
        student.values[student.starts[rows] + left], teacher.values[teacher.starts[rows] + right], weights
    )


class RowTokenizer:
    """The reading side of a student or a teacher: its tokenizer, and of what its rows are made
    (`raylib.models`)."""

    def __init__(self, tokenizer: Tokenizer, parts: Sequence[str]):
        self.tokenizer, self.parts = tokenizer, tuple(parts)
        self.plain = tokenizer.without_prompt  # without a prompt

    def prompt_length(self, text: str) -> int:
        """Number of tokens that a prompt puts before `text`."""
        return len(self.tokenizer.encode([text])[0]) - len(self.plain.encode([text])[0])

    def segments(self, inputs: dict, empty: bool) -> TokenSegments:
        """The segments of the rows of `inputs`."""

        def lengths(part: str) -> Tensor:
            present = part in self.parts and part in inputs
            return inputs[part].lengths if present else torch.zeros_like(inputs["text"].lengths)

        return find_segments(lengths("text"), lengths("tags"), lengths("regions"), empty)


class TeacherInputs:
    """`inputs(examples, visual, batch)` -> {"teacher": its "text" and "tags", or the "stored" states of both
    (L, T', d), "pairs": {term: `TokenPairs`}}, of examples that have a `pivot`."""

    def __init__(
        self,
        student: RowTokenizer,
        teacher: RowTokenizer,
        length: int,
        kinds: Sequence[str],
        slots: int = 0,
        public: bool = False,
        stored: StoredStates | None = None,
    ):
        """kinds: of `TOKEN_KINDS`. slots, public: of `image_pairs`."""
        self.student, self.teacher, self.length, self.kinds = student, teacher, length, tuple(kinds)
        self.slots, self.public, self.stored = slots, public, stored

    def __call__(
        self, examples: Sequence[Example], visual: dict[str, Any], batch: dict[str, Any]
    ) -> dict[str, Any]:
        """visual: of the images of `examples` (`finetune.batches.load_visual`). batch: what the student
        reads."""
        pivots = [e._replace(texts=(e.pivot,)) for e in examples]
        reads = encode_inputs(pivots, visual, self.teacher.tokenizer, self.length)
        student = self.student.segments(batch, self.slots > 0)
        teacher = self.teacher.segments({**visual, **reads}, self.slots > 0)
        makers = {
            "cls": lambda: cls_pairs(student, teacher),
            "image": lambda: image_pairs(student, teacher, self.slots, self.public),
            "tags": lambda: self._tag_pairs(tags_of(examples, visual["tags"]), student, teacher),
            "mixed": lambda: self._word_pairs(examples, student, teacher),
        }
        pairs = {kind: makers[kind]() for kind in self.kinds}
        if self.stored:
            return {"teacher": {"stored": self.stored.read([e.id for e in examples])}, "pairs": pairs}
        # the images are the student's
        return {"teacher": {name: reads[name] for name in ("text", "tags") if name in reads}, "pairs": pairs}

    def _tag_pairs(self, tags: Sequence[str], student: TokenSegments, teacher: TokenSegments) -> TokenPairs:
        """Both read the same words; the SEP after them matches too, as in cViL's code."""
        matches = []
        if self.public:
            return self._public_tag_pairs(tags, student, teacher)
        for i, text in enumerate(tags):
            sizes = [int(side.tags.lengths[i]) for side in (student, teacher)]
            words = word_spans(text)
            tokens = matching_tokens((text, words, self.student.plain), (text, words, self.teacher.plain))
            # behind `length` tokens a row is cut
            tokens = [(a, b) for a, b in tokens if a < sizes[0] - 1 and b < sizes[1] - 1]
            matches.append([*tokens, (sizes[0] - 1, sizes[1] - 1)] if text else [])
        return matched_pairs(student.tags, teacher.tags, matches, self.public)

    def _public_tag_pairs(
        self, tags: Sequence[str], student: TokenSegments, teacher: TokenSegments
    ) -> TokenPairs:
        """With the SEP after each question, whether tags follow it or not."""
        matches = []
        for i, text in enumerate(tags):
            rows = []
            for side, segments in ((self.student, student), (self.teacher, teacher)):
                size = int(segments.tags.lengths[i])
                ids = side.plain.encode([text])[0][: max(0, size - 1)].tolist()
                rows.append([*side.plain.pieces(ids), *([SEP_PIECE] if size else [])])
            matches.append(public_tag_matches(*rows))
        of_tags = matched_pairs(student.tags, teacher.tags, matches, public=True)
        left, right = (
            side.text.values[side.text.starts + side.text.lengths - 1] for side in (student, teacher)
        )
        of_questions = TokenPairs(left, right, torch.ones(len(left)))
        return TokenPairs(*(torch.cat(both) for both in zip(of_questions, of_tags, strict=True)))

    def _word_pairs(
        self, examples: Sequence[Example], student: TokenSegments, teacher: TokenSegments
    ) -> TokenPairs:
        """English words that stand in the student's text, and the same in the teacher's."""
        matches = []
        for i, e in enumerate(examples):
            mixed = e.texts[-1], [word for word, _ in e.aligned], self.student.plain
            english = e.pivot, [word for _, word in e.aligned], self.teacher.plain
            if self.public:
                rows = [side[2].pieces(side[2].encode([side[0]])[0].tolist()) for side in (mixed, english)]
                tokens = public_word_matches(*rows)
            else:
                tokens = matching_tokens(mixed, english, whole=True)
            # words lie behind the CLS and a prompt, and before the SEP
            shifts = 1 + self.student.prompt_length(e.texts[-1]), 1 + self.teacher.prompt_length(e.pivot)
            sizes = [int(side.text.lengths[i]) - 1 for side in (student, teacher)]
            tokens = [(a + shifts[0], b + shifts[1]) for a, b in tokens]
            matches.append([(a, b) for a, b in tokens if a < sizes[0] and b < sizes[1]])
        return matched_pairs(student.text, teacher.text, matches, self.public, specials=2)


def pair_weight(pairs: dict[str, TokenPairs]) -> Tensor:
    """Sum of what all pairs of a batch count."""
    return torch.stack([each.weights.sum() for each in pairs.values()]).sum()

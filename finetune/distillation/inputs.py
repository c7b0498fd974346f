"""What a batch holds for distillation, made where batches are read: the teacher's texts, and the tokens that
go together."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.batches import encode_inputs, tags_of
from finetune.distillation.matching import matching_tokens, words_at
from finetune.distillation.stored import Stored
from finetune.distillation.terms import Pairs, cls_pairs, image_pairs, matched_pairs
from finetune.examples import Example
from raylib.models.base import TokenSegments, find_segments
from raylib.text import Tokenizer


class Side:
    """How a student or a teacher reads: its tokenizer, and of what its rows are made
    (`raylib.models`)."""

    def __init__(self, tokenizer: Tokenizer, parts: Sequence[str]):
        self.tokenizer, self.parts = tokenizer, tuple(parts)
        self.plain = getattr(tokenizer, "plain", tokenizer)  # without a prompt

    def prompt(self, text: str) -> int:
        """How many tokens a prompt puts before `text`."""
        return len(self.tokenizer.encode([text])[0]) - len(self.plain.encode([text])[0])

    def places(self, inputs: dict, empty: bool) -> TokenSegments:
        """Where everything is in rows of `inputs`."""
        lengths = [
            inputs[part].lengths
            if part in self.parts and part in inputs
            else torch.zeros_like(inputs["text"].lengths)
            for part in ("text", "tags", "regions")
        ]
        return find_segments(*lengths, empty)


class Inputs:
    """`inputs(examples, seen, part)` -> {"teacher": its "text" and "tags", or the "stored" states of both (L,
    T', d), "pairs": {term: `Pairs`}}, of examples that have a `pivot`."""

    def __init__(
        self,
        student: Side,
        teacher: Side,
        length: int,
        terms: Sequence[str],
        slots: int = 0,
        public: bool = False,
        stored: Stored | None = None,
    ):
        self.student, self.teacher, self.length, self.terms = student, teacher, length, tuple(terms)
        self.slots, self.public, self.stored = slots, public, stored

    def __call__(
        self, examples: Sequence[Example], seen: dict[str, Any], part: dict[str, Any]
    ) -> dict[str, Any]:
        """seen: of the pictures of `examples` (`finetune.batches.see`). part: what the student reads."""
        pivots = [e._replace(texts=(e.pivot,)) for e in examples]
        theirs = encode_inputs(pivots, seen, self.teacher.tokenizer, self.length)
        places = (
            self.student.places(part, self.slots > 0),
            self.teacher.places({**seen, **theirs}, self.slots > 0),
        )
        pairs = {term: getattr(self, f"_{term}")(examples, seen, *places) for term in self.terms}
        if self.stored:
            return {"teacher": {"stored": self.stored.read([e.id for e in examples])}, "pairs": pairs}
        return {
            "teacher": {name: theirs[name] for name in ("text", "tags") if name in theirs},
            "pairs": pairs,
        }

    def _cls(self, examples, seen, student: TokenSegments, teacher: TokenSegments) -> Pairs:
        return cls_pairs(student, teacher)

    def _image(self, examples, seen, student: TokenSegments, teacher: TokenSegments) -> Pairs:
        return image_pairs(student, teacher, self.slots, self.public)

    def _tags(self, examples, seen, student: TokenSegments, teacher: TokenSegments) -> Pairs:
        """Both read the same words; the SEP after them matches too, as in cViL's code."""
        matches = []
        for i, text in enumerate(tags_of(examples, seen["tags"])):
            sizes = [int(side.tags.lengths[i]) for side in (student, teacher)]
            words = words_at(text)
            found = matching_tokens(*((text, words, side.plain) for side in (self.student, self.teacher)))
            found = [(a, b) for a, b in found if a < sizes[0] - 1 and b < sizes[1] - 1]
            matches.append([*found, (sizes[0] - 1, sizes[1] - 1)] if text else [])
        return matched_pairs(student.tags, teacher.tags, matches, self.public)

    def _mixed(self, examples, seen, student: TokenSegments, teacher: TokenSegments) -> Pairs:
        matches = []
        for i, e in enumerate(examples):
            words = ([word for word, _ in e.aligned], [word for _, word in e.aligned])
            sides = [(e.texts[-1], words[0], self.student.plain), (e.pivot, words[1], self.teacher.plain)]
            shifts = [
                1 + self.student.prompt(e.texts[-1]),
                1 + self.teacher.prompt(e.pivot),
            ]  # behind the CLS
            sizes = [int(side.text.lengths[i]) - 1 for side in (student, teacher)]  # before the SEP
            found = [(a + shifts[0], b + shifts[1]) for a, b in matching_tokens(*sides, whole=True)]
            matches.append([(a, b) for a, b in found if a < sizes[0] and b < sizes[1]])
        return matched_pairs(student.text, teacher.text, matches, self.public, specials=2)


def count(pairs: dict[str, Pairs]) -> Tensor:
    """What all pairs of a batch count together."""
    return torch.stack([each.weights.sum() for each in pairs.values()]).sum()

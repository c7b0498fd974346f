"""Readers of annotation files, generators that stream; and what each of them yields, whatever the task."""

from collections.abc import Callable, Mapping
from typing import NamedTuple


class Example(NamedTuple):
    """One item of a classification task.

    `texts`: (question,), (hypothesis,), (statement,), or (premise, hypothesis) where the premise is a
    sentence. `images`: ids in the image store; none (sentence pairs), one, or two (left, right). `labels`:
    {answer: score in (0, 1]}; a prediction scores what it finds here, else 0. Empty: the file has no answer.
    `kind`: what results are broken down by ("verify", "query", ...), or "". `tags`: what a detector calls the
    objects of the image, in English. `pivot`: what a teacher of another language reads in the text's place;
    `aligned`: words that both have, as (first character, end) in the text and in the pivot
    (`finetune.strategies.distillation`). `sources`: the addresses of the images, where the file has them: two
    ids may be one image (`finetune.overlap`).
    """

    id: str
    texts: tuple[str, ...]
    images: tuple[str, ...]
    labels: Mapping[str, float]
    kind: str = ""
    tags: tuple[str, ...] = ()
    pivot: str = ""
    aligned: tuple[tuple[tuple[int, int], tuple[int, int]], ...] = ()
    sources: tuple[str, ...] = ()

    def readings(self) -> list[tuple[tuple[str, ...], str]]:
        """[(texts that are read together, the number by which files have it)]."""
        return [(self.texts, self.id)]

    def map_texts(self, change: Callable[[str, int], str]) -> "Example":
        """With `change(text, its place)` of every text."""
        return self._replace(texts=tuple(change(text, i) for i, text in enumerate(self.texts)))


class Captioned(NamedTuple):
    """One image of a retrieval task with its captions in one language; `pivots`: what each of these is to
    be aligned with; `source`: the image's address, where the file has it."""

    image: str
    captions: tuple[str, ...]
    pivots: tuple[str, ...] = ()
    source: str = ""

    @property
    def images(self) -> tuple[str, ...]:
        """The one image."""
        return (self.image,)

    @property
    def id(self) -> str:
        """Key of the draws for the pair of an image and a caption."""
        return "\t".join((self.image, *self.captions))

    @property
    def texts(self) -> tuple[str, ...]:
        """All of its texts."""
        return self.captions + self.pivots

    @property
    def sources(self) -> tuple[str, ...]:
        """The address of the one image, where the file has it."""
        return (self.source,) if self.source else ()

    def readings(self) -> list[tuple[tuple[str, ...], str]]:
        """[(a caption, no number)] of each."""
        return [((caption,), "") for caption in self.captions]

    def map_texts(self, change: Callable[[str, int], str]) -> "Captioned":
        """With `change(caption, its place)` of every caption."""
        return self._replace(captions=tuple(change(caption, i) for i, caption in enumerate(self.captions)))

"""Training batches: `batches[step]` is one worker's part of the global batch, a pure function of (seed,
step).

An epoch is a permutation of the examples drawn from (seed, epoch); what does not fill a last batch waits for
the next epoch, or is a smaller batch (`keep_last`). What is drawn for an example is drawn from (seed, epoch,
its number).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from finetune.examples import Captioned, Example
from finetune.pictures import Encoded, Pictures, Pixels
from raylib.errors import UserError
from raylib.packed import Ragged, Sentences
from raylib.randomness import permutation, uniform
from raylib.text import Tokenizer, add_specials, text_ids

# change(example, seed, epoch, id): a training example as methods show it (`finetune.strategies`)
Change = Callable[..., Example | Captioned]
# more(examples, what `see` returns, the batch so far): what else the batch is to hold
More = Callable[[Sequence[Example], dict[str, Any], dict[str, Any]], dict[str, Any]]


class _Epochs(Dataset):
    """Which examples a step takes."""

    def __init__(
        self,
        examples: Sequence,
        batch: int,
        seed: int,
        rank: int,
        world: int,
        change: Change | None,
        keep_last: bool,
    ):
        if not examples:
            raise UserError("no examples to train on; check data= and the counts above")
        self.examples, self.seed, self.rank, self.world, self.change = examples, seed, rank, world, change
        self.batch = min(batch, len(examples))
        if self.batch < world:
            raise UserError(
                f"{len(examples)} examples are fewer than workers={world}; set workers={len(examples)}"
            )
        left = len(examples) % self.batch if keep_last else 0
        if 0 < left < world:
            raise UserError(
                f"the last batch of an epoch has {left} examples, fewer than workers={world}; set "
                f"workers={left}, or last_batch=drop"
            )
        self.steps = len(examples) // self.batch + (left > 0)  # of an epoch
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def places(self, step: int) -> tuple[int, np.ndarray, np.ndarray]:
        """(epoch, index in the global batch of this worker's rows, the examples that fill them)."""
        epoch, place = divmod(step, self.steps)
        if self._order[0] != epoch:
            self._order = (epoch, permutation(len(self.examples), self.seed, "order", epoch))
        size = min(self.batch, len(self.examples) - place * self.batch)
        index = np.arange(self.rank, size, self.world)
        return epoch, index, self._order[1][place * self.batch + index]

    def chosen(self, epoch: int, numbers: np.ndarray) -> list:
        """The examples `numbers`, as methods change them in this epoch: drawn from (seed, epoch, the
        example's id)."""
        examples = [self.examples[i] for i in numbers]
        return [self.change(e, self.seed, epoch, e.id) for e in examples] if self.change else examples


class ExampleBatches(_Epochs):
    """Batches of a classification task: {"step", "samples", "examples": {"index", "text": Ragged ids, what
    grounds it (`FinetuneModel.forward`), "answer" (b,) class with the highest score, "scores" (b, labels) if
    `soft`}}."""

    def __init__(
        self,
        examples: Sequence[Example],
        labels: Sequence[str],
        pictures: Pictures | None,
        tokenizer: Tokenizer,
        length: int,
        soft: bool,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        change: Change | None = None,
        more: More | None = None,
        keep_last: bool = False,
    ):
        super().__init__(examples, batch, seed, rank, world, change, keep_last)
        self.more = more
        self.pictures, self.tokenizer, self.length, self.soft = pictures, tokenizer, length, soft
        self.classes = {label: i for i, label in enumerate(labels)}

    def __getitem__(self, step: int) -> dict[str, Any]:
        epoch, index, numbers = self.places(step)
        chosen = self.chosen(epoch, numbers)
        draws = None
        if self.pictures and self.pictures.draws:
            each = np.arange(len(chosen[0].images))
            keys = (numbers[:, None, None], each[:, None], np.arange(self.pictures.draws))
            draws = uniform(self.seed, epoch, "augment", *keys).reshape(-1, self.pictures.draws)
        seen = see(chosen, self.pictures, draws)
        part = {"index": torch.from_numpy(index), **encode_inputs(chosen, seen, self.tokenizer, self.length)}
        if self.more:
            part |= self.more(chosen, seen, part)
        scores = torch.zeros(len(chosen), len(self.classes))
        for row, example in enumerate(chosen):
            for label, score in example.labels.items():
                if label in self.classes:
                    scores[row, self.classes[label]] = score
        part["answer"] = scores.argmax(1)
        if self.soft:
            part["scores"] = scores
        return {"step": step, "samples": self.batch, "examples": part}


def read_inputs(
    examples: Sequence[Example],
    pictures: Pictures | None,
    tokenizer: Tokenizer,
    length: int,
    draws: np.ndarray | None = None,
) -> dict[str, Any]:
    """The model's inputs: {"text": Ragged ids, and "premise", "images", "states" or "regions", with "tags" if
    it reads them}."""
    return encode_inputs(examples, see(examples, pictures, draws), tokenizer, length)


def see(
    examples: Sequence[Example], pictures: Pictures | None, draws: np.ndarray | None = None
) -> dict[str, Any]:
    """What grounds the texts, as `pictures` read it; nothing where that is a premise."""
    names = [name for e in examples for name in e.images]
    if not names:
        return {}
    return pictures.read(names) if draws is None else pictures.read(names, draws)


def encode_inputs(
    examples: Sequence[Example], seen: dict[str, Any], tokenizer: Tokenizer, length: int
) -> dict[str, Any]:
    """The model's inputs, from what `see` returns; the names of objects become tokens."""
    texts = [e.texts[-1] for e in examples]
    if not seen:
        premises = [e.texts[0] for e in examples]
        return {
            part: encode_texts(rows, tokenizer, length)
            for part, rows in (("text", texts), ("premise", premises))
        }
    if "tags" not in seen:
        return {"text": encode_texts(texts, tokenizer, length), **seen}
    return seen | encode_tagged(texts, tags_of(examples, seen["tags"]), tokenizer, length)


def tags_of(examples: Sequence[Example], kept: Sequence[tuple[str, ...]]) -> list[str]:
    """Of each picture of the examples, the tags as one text: those of the annotations, or else the store's
    (`kept`)."""
    own = [e.tags for e in examples for _ in e.images]
    return [" ".join(tags or stored) for tags, stored in zip(own, kept, strict=True)]


def encode_tagged(
    texts: Sequence[str], tags: Sequence[str], tokenizer: Tokenizer, length: int
) -> dict[str, Ragged]:
    """{"text", "tags"}: rows CLS words SEP and tags SEP. Both together have `length` tokens at most: the
    longer one is cut, the tags where they are equal (BERT's sentence pairs, and so OSCAR's). A picture
    without tags has none, no SEP either.

    texts: n. tags: c times as many, those of text i at i c ... ; of two pictures (c = 2) the longest tags
    count.
    """
    words, names = tokenizer.encode(texts), getattr(tokenizer, "plain", tokenizer).encode(tags)
    each = len(tags) // len(texts)
    for i, row in enumerate(words):
        mine = range(i * each, (i + 1) * each)
        most = max(len(names[j]) for j in mine)
        if most:
            kept, most = _cut(len(row), most, length - 3)
            words[i] = row[:kept]
            for j in mine:
                names[j] = names[j][:most]
    named = [np.append(row, tokenizer.sep) if len(row) else row for row in names]
    lengths = torch.tensor([len(row) for row in named])
    values = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *named]))
    text = Ragged(*map(torch.from_numpy, add_specials(words, tokenizer, length)))
    return {"text": text, "tags": Ragged(values, lengths)}


def _cut(first: int, second: int, room: int) -> tuple[int, int]:
    """What is left of two lengths where there is room for so many, one taken off the longer at a time."""
    while first + second > room:
        first, second = (first - 1, second) if first > second else (first, second - 1)
    return first, second


def encode_texts(texts: Sequence[str], tokenizer: Tokenizer, length: int) -> Ragged:
    """Ids with specials, cut to `length` tokens."""
    return Ragged(*map(torch.from_numpy, add_specials(tokenizer.encode(texts), tokenizer, length)))


class CaptionBatches(_Epochs):
    """Batches of a retrieval task, an example being a picture and one of its captions, as `UnifiedObjective`
    takes them: {"step", "samples", "image_text": {"index", "images" or "states", "image_id", "text", "draws",
    "pivot" if any}}."""

    def __init__(
        self,
        examples: Sequence[Captioned],
        pictures: Pixels | Encoded,
        tokenizer: Tokenizer,
        length: int,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        change: Change | None = None,
        keep_last: bool = False,
    ):
        pairs = [Captioned(e.image, (caption,)) for e in examples for caption in e.captions]
        super().__init__(pairs, batch, seed, rank, world, change, keep_last)
        self.pictures, self.tokenizer, self.length = pictures, tokenizer, length

    def __getitem__(self, step: int) -> dict[str, Any]:
        epoch, index, numbers = self.places(step)
        chosen = self.chosen(epoch, numbers)
        draws = None
        if self.pictures.draws:
            draws = uniform(self.seed, epoch, "augment", numbers[:, None], np.arange(self.pictures.draws))
        names = [c.image for c in chosen]
        seen = self.pictures.read(names) if draws is None else self.pictures.read(names, draws)
        negatives = uniform(self.seed, epoch, "negative", numbers[:, None], np.arange(2))
        part = {
            "index": torch.from_numpy(index),
            **seen,
            # annotations may name one image in several ways: 42.jpg, COCO_val2014_000000000042
            "image_id": torch.tensor([self.pictures.store.identity(name) for name in names]),
            "text": _unmasked([c.captions[0] for c in chosen], self.tokenizer, self.length),
            "draws": torch.from_numpy((np.floor(negatives * 2**24) * 2**-24).astype(np.float32)),
        }
        if chosen[0].pivots:
            part["pivot"] = encode_texts([c.pivots[0] for c in chosen], self.tokenizer, self.length)
        return {"step": step, "samples": self.batch, "image_text": part}


def _unmasked(texts: Sequence[str], tokenizer: Tokenizer, length: int) -> Sentences:
    tokens = add_specials(tokenizer.encode(texts), tokenizer, length)
    ids, lengths = map(torch.from_numpy, tokens)
    nothing = torch.zeros(0, dtype=torch.int64)
    return Sentences(ids, ids, lengths, nothing, nothing, torch.from_numpy(text_ids(tokens)))

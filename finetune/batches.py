"""Training batches: `batches[step]` is one worker's part of the global batch, a pure function of (seed, step).

An epoch is a permutation of the examples drawn from (seed, epoch); what does not fill a last batch waits for the next
epoch. What is drawn for an example is drawn from (seed, epoch, its number).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from finetune.examples import Captioned, Example
from finetune.pictures import Pictures
from raylib.errors import UserError
from raylib.ragged import Ragged, Sentences
from raylib.randomness import permutation, string_key, uniform
from raylib.text import Tokenizer, add_specials, text_ids

# change(example, seed, epoch, id): a training example as methods show it (`finetune.strategies`)
Change = Callable[..., Example | Captioned]


class _Epochs(Dataset):
    """Which examples a step takes."""

    def __init__(self, examples: Sequence, batch: int, seed: int, rank: int, world: int, change: Change | None):
        if not examples:
            raise UserError("no examples to train on; check data= and the counts above")
        self.examples, self.seed, self.rank, self.world, self.change = examples, seed, rank, world, change
        self.batch = min(batch, len(examples))
        if self.batch < world:
            raise UserError(f"{len(examples)} examples are fewer than workers={world}; set workers={len(examples)}")
        self.steps = len(examples) // self.batch  # of an epoch
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def places(self, step: int) -> tuple[int, np.ndarray, np.ndarray]:
        """(epoch, index in the global batch of this worker's rows, the examples that fill them)."""
        epoch, place = divmod(step, self.steps)
        if self._order[0] != epoch:
            self._order = (epoch, permutation(len(self.examples), self.seed, "order", epoch))
        index = np.arange(self.rank, self.batch, self.world)
        return epoch, index, self._order[1][place * self.batch + index]

    def chosen(self, epoch: int, numbers: np.ndarray) -> list:
        """The examples `numbers`, as methods change them in this epoch: drawn from (seed, epoch, the example's id)."""
        examples = [self.examples[i] for i in numbers]
        return [self.change(e, self.seed, epoch, e.id) for e in examples] if self.change else examples


class ExampleBatches(_Epochs):
    """Batches of a classification task: {"step", "samples", "examples": {"index", "text": Ragged ids, what grounds it
    (`FinetuneModel.forward`), "answer" (b,) class with the highest score, "scores" (b, labels) if `soft`}}."""

    def __init__(
        self, examples: Sequence[Example], labels: Sequence[str], pictures: Pictures | None, tokenizer: Tokenizer, length: int,
        soft: bool, batch: int, seed: int, rank: int = 0, world: int = 1, change: Change | None = None,
    ):  # fmt: skip
        super().__init__(examples, batch, seed, rank, world, change)
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
        part = {"index": torch.from_numpy(index), **read_inputs(chosen, self.pictures, self.tokenizer, self.length, draws)}
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
    examples: Sequence[Example], pictures: Pictures | None, tokenizer: Tokenizer, length: int, draws: np.ndarray | None = None
) -> dict[str, Any]:
    """The model's inputs: {"text": Ragged ids, and "premise", "images", "states" or "regions"}."""
    inputs: dict[str, Any] = {"text": encode_texts([e.texts[-1] for e in examples], tokenizer, length)}
    if examples[0].images:
        names = [name for e in examples for name in e.images]
        return inputs | (pictures.read(names) if draws is None else pictures.read(names, draws))
    return inputs | {"premise": encode_texts([e.texts[0] for e in examples], tokenizer, length)}


def encode_texts(texts: Sequence[str], tokenizer: Tokenizer, length: int) -> Ragged:
    """Ids with specials, cut to `length` tokens."""
    return Ragged(*map(torch.from_numpy, add_specials(tokenizer.encode(texts), tokenizer, length)))


class CaptionBatches(_Epochs):
    """Batches of a retrieval task, an example being a picture and one of its captions, as `UnifiedObjective` takes them:
    {"step", "samples", "image_text": {"index", "images" or "states", "image_id", "text", "draws", "pivot" if any}}."""

    def __init__(
        self, examples: Sequence[Captioned], pictures: Pictures, tokenizer: Tokenizer, length: int, batch: int, seed: int,
        rank: int = 0, world: int = 1, change: Change | None = None,
    ):  # fmt: skip
        pairs = [Captioned(e.image, (caption,)) for e in examples for caption in e.captions]
        super().__init__(pairs, batch, seed, rank, world, change)
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
            "image_id": torch.tensor([string_key(name) for name in names]),
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

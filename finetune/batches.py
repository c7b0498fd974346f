"""Training batches: `batches[step]` is one worker's part of the global batch, a pure function of (seed,
step).

An epoch is a permutation of the examples drawn from (seed, epoch); what does not fill a last batch waits for
the next epoch, or is a smaller batch (`keep_last`). What is drawn for an example is drawn from (seed, epoch,
its number).

An example whose image cannot be read gives its place to another one, drawn from (seed, epoch, its number)
too: which one follows from the data, and not from the worker, the process or the start that met it. It is
counted in the first epoch that comes to it, so that the sum over a training is the number of examples left
out.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from finetune.formats import Captioned, Example
from finetune.stores.images import ImageSource, PrecomputedFeatures, VisualSource
from raylib.data.augmentation import forbid_flips
from raylib.data.images import BadImage
from raylib.data.loading import StepDataset
from raylib.distributed import worker_rows
from raylib.errors import UserError
from raylib.packed import Ragged, Sentences
from raylib.randomness import integers, permutation, uniform, uniform_float32
from raylib.text import Tokenizer, add_specials, text_ids

# change(example, seed, epoch, id): a training example as strategies show it (`finetune.strategies`)
Change = Callable[..., Example | Captioned]
VisualInputs = dict[str, Any]  # what grounds the texts of a batch, as `load_visual` reads it
# more(examples, visual inputs, the batch so far): what else the batch is to hold
ExtraInputs = Callable[[Sequence[Example], VisualInputs, dict[str, Any]], dict[str, Any]]


ATTEMPTS = 20  # examples in a row without a usable image, after which none is looked for any more
log = logging.getLogger(__name__)


class BatchOrder(NamedTuple):
    """The examples that make a batch, and those of them that are one worker's.

    size: of the global batch. keep_last: what is left of an epoch is a smaller batch, not left out.
    change: what strategies make of each example. bad_limit: share of them that may have no usable image.
    """

    size: int
    seed: int
    rank: int = 0
    world: int = 1
    change: Change | None = None
    keep_last: bool = False
    bad_limit: float = 0.01


class EpochBatches(StepDataset):
    """The examples that each step takes."""

    def __init__(self, examples: Sequence[Any], order: BatchOrder):
        """Raises UserError: no examples, or fewer than workers in a batch."""
        if not examples:
            raise UserError("no examples to train on; check data=")
        self.examples, self.order, world = examples, order, order.world
        self.size = min(order.size, len(examples))
        if self.size < world:
            raise UserError(
                f"a batch of {self.size} examples is smaller than workers={world}; set workers={self.size}"
            )
        last = len(examples) % self.size if order.keep_last else 0
        if 0 < last < world:
            raise UserError(
                f"the last batch of an epoch has {last} examples, fewer than workers={world}; set "
                f"workers={last}, or last_batch=drop"
            )
        self.epoch_steps = len(examples) // self.size + (last > 0)
        self._permutation: tuple[int, np.ndarray] = (-1, np.empty(0))  # of the epoch that was read last
        self.faults: dict[int, str] = {}  # number of an example that this process could not read -> why
        self._visited: dict[int, np.ndarray] = {}  # epoch -> (n,) bool: which examples it comes to

    def epoch(self, steps: int) -> float:
        """Return the epochs that so many steps are."""
        return steps / self.epoch_steps

    def rows(self, step: int) -> tuple[int, dict[str, Any], np.ndarray]:
        """(epoch, {"size": of the global batch, "index": this worker's rows in it}, the examples that fill
        them)."""
        epoch, place = divmod(step, self.epoch_steps)
        if self._permutation[0] != epoch:
            self._permutation = epoch, permutation(len(self.examples), self.order.seed, "order", epoch)
        size = min(self.size, len(self.examples) - place * self.size)
        rows = worker_rows(size, self.order.rank, self.order.world)
        places = {"size": size, "index": torch.arange(rows.start, rows.stop)}
        return epoch, places, self._permutation[1][place * self.size :][rows.start : rows.stop]

    def changed_examples(self, epoch: int, numbers: np.ndarray) -> list[Any]:
        """The examples `numbers`, as strategies change them in this epoch: drawn from (seed, epoch, the
        example's id)."""
        examples, change = [self.examples[i] for i in numbers], self.order.change
        return [change(e, self.order.seed, epoch, e.id) for e in examples] if change else examples

    def read_usable(
        self, epoch: int, numbers: np.ndarray, read: Callable[[Sequence[Any], np.ndarray], VisualInputs]
    ) -> tuple[np.ndarray, list[Any], VisualInputs, int]:
        """(numbers of the examples, the examples, what grounds them, how many gave place to others and are to
        be counted). read: of examples and their numbers what grounds them, or raises BadImage."""
        drawn, numbers, attempts = numbers, numbers.copy(), np.zeros(len(numbers), np.int64)
        while True:
            # a draw for each place: two may fall to the same example, as two epochs do
            while broken := [row for row, number in enumerate(numbers.tolist()) if number in self.faults]:
                attempts[broken] += 1
                if attempts.max() > ATTEMPTS:
                    raise UserError(
                        f"{ATTEMPTS} training examples in a row have images that cannot be read, such as "
                        f"{self.faults[int(numbers[broken[0]])]}"
                    )
                keys = (self.order.seed, epoch, "replace", drawn[broken], attempts[broken])
                numbers[broken] = integers(len(self.examples), *keys)
            examples = self.changed_examples(epoch, numbers)
            try:
                visual = read(examples, numbers)
            except BadImage:
                if not self._find_faults(examples, numbers, read):
                    raise
                continue
            counted = sum(n in self.faults and self._is_new(epoch, n) for n in drawn.tolist())
            return numbers, examples, visual, counted

    def _find_faults(self, examples: Sequence[Any], numbers: np.ndarray, read: Callable) -> bool:
        """Find those that cannot be read; return whether there are any."""
        before = len(self.faults)
        for row, (example, number) in enumerate(zip(examples, numbers.tolist(), strict=True)):
            if number in self.faults:
                continue
            try:
                read([example], numbers[row : row + 1])
            except BadImage as error:
                self.faults[number] = str(error)
                log.warning("%s; another example takes its place", error)
        self.check_replaced(len(self.faults), 0)
        return len(self.faults) > before

    def _is_new(self, epoch: int, number: int) -> bool:
        """Tell whether no epoch before this one comes to an example."""
        for before in range(epoch):
            if before not in self._visited:
                self._visited[before] = np.zeros(len(self.examples), bool)
                order = permutation(len(self.examples), self.order.seed, "order", before)
                self._visited[before][order[: self.epoch_steps * self.size]] = True
            if self._visited[before][number]:
                return False
        return True

    def check_replaced(self, count: int, steps: int) -> None:
        """Raise UserError where so many examples, each of which counts once, are too many to be left out."""
        limit = self.order.bad_limit
        if count > limit * len(self.examples):
            such = next(iter(self.faults.values()), "those in the warnings above")
            raise UserError(
                f"{count:,} of {len(self.examples):,} training examples have an image that cannot be read "
                f"(bad_limit={limit:g} of them may), such as {such}; mend them, or give a higher bad_limit= "
                "(a run with a checkpoint goes on with the images that it began with)"
            )

    def augmentation(
        self, visual: VisualSource | None, epoch: int, numbers: np.ndarray, *keys: np.ndarray
    ) -> np.ndarray | None:
        """Uniform draws (n, d) for n images, which `keys` number; None where images are read as they are.
        numbers (n,): of the example that each image is of."""
        if not isinstance(visual, ImageSource) or visual.config is None:
            return None
        draws = uniform(self.order.seed, epoch, "augment", *keys, np.arange(visual.num_draws))
        draws = draws.reshape(-1, visual.num_draws)
        if visual.config.flip_unless:
            # as the annotations have them, whatever strategies make of them
            examples = [self.examples[i] for i in numbers]
            said = [[*e.texts, *e.labels] if isinstance(e, Example) else e.texts for e in examples]
            forbid_flips(visual.config, draws, said)
        return draws


class ExampleBatches(EpochBatches):
    """Batches of a classification task: {"step", "samples", "examples": {"size", "index", "text": Ragged
    ids, what grounds it (`FinetuneModel.forward`), "answer" (b,) class with the highest score, "scores" (b,
    labels) if `soft`}}."""

    def __init__(
        self,
        examples: Sequence[Example],
        labels: Sequence[str],
        visual: VisualSource | None,
        tokenizer: Tokenizer,
        length: int,
        soft: bool,
        order: BatchOrder,
        extra: ExtraInputs | None = None,
    ):
        super().__init__(examples, order)
        self.visual, self.tokenizer, self.length, self.soft, self.extra = (
            visual,
            tokenizer,
            length,
            soft,
            extra,
        )
        self.classes = {label: i for i, label in enumerate(labels)}

    def __getitem__(self, step: int) -> dict[str, Any]:
        epoch, places, numbers = self.rows(step)

        def read(examples: Sequence[Any], numbers: np.ndarray) -> VisualInputs:
            images = np.arange(len(examples[0].images))
            keys = numbers[:, None, None], images[:, None]
            of_images = numbers.repeat(len(images))
            return load_visual(examples, self.visual, self.augmentation(self.visual, epoch, of_images, *keys))

        numbers, examples, visual, bad = self.read_usable(epoch, numbers, read)
        part = {
            **places,
            **encode_inputs(examples, visual, self.tokenizer, self.length),
        }
        if self.extra:
            part |= self.extra(examples, visual, part)
        # answers that are no class score nothing: an example has at least one that is (`training_items`)
        scores = torch.zeros(len(examples), len(self.classes))
        for row, example in enumerate(examples):
            for label, score in example.labels.items():
                if label in self.classes:
                    scores[row, self.classes[label]] = score
        part["answer"] = scores.argmax(1)
        if self.soft:
            part["scores"] = scores
        return {
            "step": step,
            "samples": places["size"],
            "tokens": self.count_tokens(part),
            "bad": bad,
            "examples": part,
        }


def read_inputs(
    examples: Sequence[Example],
    visual: VisualSource | None,
    tokenizer: Tokenizer,
    length: int,
) -> dict[str, Any]:
    """The model's inputs: {"text": Ragged ids, and what grounds it: "premise", "images", "states" or
    "regions", with "tags" if it reads them; nothing with one text about no image}."""
    return encode_inputs(examples, load_visual(examples, visual), tokenizer, length)


def read_usable_inputs(
    examples: Sequence[Example], visual: VisualSource | None, tokenizer: Tokenizer, length: int
) -> tuple[dict[str, Any] | None, dict[int, str]]:
    """(`read_inputs` of the examples whose images can be read, None where there are none; {place of another:
    why})."""
    try:
        return read_inputs(examples, visual, tokenizer, length), {}
    except BadImage:
        faults = find_faults(examples, visual)
    usable = [example for place, example in enumerate(examples) if place not in faults]
    return (read_inputs(usable, visual, tokenizer, length) if usable else None), faults


def find_faults(examples: Sequence[Example], visual: VisualSource | None) -> dict[int, str]:
    """{place of an example whose images cannot be read: why}."""
    faults = {}
    for place, example in enumerate(examples):
        try:
            load_visual([example], visual)
        except BadImage as error:
            faults[place] = str(error)
    return faults


def load_visual(
    examples: Sequence[Example], visual: VisualSource | None, draws: np.ndarray | None = None
) -> VisualInputs:
    """Read what grounds the texts; nothing where they are about no image."""
    names = [name for e in examples for name in e.images]
    if not names:
        return {}
    assert visual is not None, "texts about images, and no images"
    return visual.read(names, draws)


def encode_inputs(
    examples: Sequence[Example], visual: VisualInputs, tokenizer: Tokenizer, length: int
) -> dict[str, Any]:
    """The model's inputs, from what `load_visual` returns; the names of objects become tokens."""
    texts = [e.texts[-1] for e in examples]
    if "tags" in visual:
        return visual | encode_tagged(texts, tags_of(examples, visual["tags"]), tokenizer, length)
    inputs = {"text": encode_texts(texts, tokenizer, length), **visual}
    # of two texts about no image the first is what the second is about; one text alone is about nothing
    if not visual and len(examples[0].texts) > 1:
        inputs["premise"] = encode_texts([e.texts[0] for e in examples], tokenizer, length)
    return inputs


def tags_of(examples: Sequence[Example], stored: Sequence[tuple[str, ...]]) -> list[str]:
    """Of each image of the examples, the tags as one text: those of the annotations, or else the store's."""
    annotated = [e.tags for e in examples for _ in e.images]
    return [" ".join(tags or others) for tags, others in zip(annotated, stored, strict=True)]


def encode_tagged(
    texts: Sequence[str], tags: Sequence[str], tokenizer: Tokenizer, length: int
) -> dict[str, Ragged]:
    """{"text", "tags"}: rows CLS words SEP and tags SEP. Both together have `length` tokens at most: the
    longer one is cut, the tags where they are equal (BERT's sentence pairs, and so OSCAR's). An image
    without tags has none, no SEP either.

    texts: n. tags: c times as many, those of text i at i c ... ; of two images (c = 2) the longest tags
    count.
    """
    words, names = tokenizer.encode(texts), tokenizer.without_prompt.encode(tags)
    each = len(tags) // len(texts)
    for i, row in enumerate(words):
        image_rows = range(i * each, (i + 1) * each)
        tag_limit = max(len(names[j]) for j in image_rows)
        if tag_limit:
            word_limit, tag_limit = _cut(len(row), tag_limit, length - 3)
            words[i] = row[:word_limit]
            for j in image_rows:
                names[j] = names[j][:tag_limit]
    tag_rows = [np.append(row, tokenizer.sep) if len(row) else row for row in names]
    lengths = torch.tensor([len(row) for row in tag_rows])
    values = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *tag_rows]))
    text = Ragged(*map(torch.from_numpy, add_specials(words, tokenizer, length)))
    return {"text": text, "tags": Ragged(values, lengths)}


def _cut(first: int, second: int, room: int) -> tuple[int, int]:
    """Return two lengths shortened to `room` together, one taken off the longer at a time."""
    while first + second > room:
        first, second = (first - 1, second) if first > second else (first, second - 1)
    return first, second


def encode_texts(texts: Sequence[str], tokenizer: Tokenizer, length: int) -> Ragged:
    """Ids with specials, cut to `length` tokens."""
    return Ragged(*map(torch.from_numpy, add_specials(tokenizer.encode(texts), tokenizer, length)))


class CaptionBatches(EpochBatches):
    """Batches of a retrieval task, an example being an image and one of its captions, as `UnifiedObjective`
    takes them: {"step", "samples", "image_text": {"size", "index", "images" or "states", "image_id",
    "text", "draws", "pivot" if any}}."""

    def __init__(
        self,
        examples: Sequence[Captioned],
        visual: ImageSource | PrecomputedFeatures,
        tokenizer: Tokenizer,
        length: int,
        order: BatchOrder,
        extra: ExtraInputs | None = None,
    ):
        super().__init__(CaptionPairs(examples), order)
        self.visual, self.tokenizer, self.length, self.extra = visual, tokenizer, length, extra

    def __getitem__(self, step: int) -> dict[str, Any]:
        epoch, places, numbers = self.rows(step)

        def read(pairs: Sequence[Any], numbers: np.ndarray) -> VisualInputs:
            draws = self.augmentation(self.visual, epoch, numbers, numbers[:, None])
            return self.visual.read([pair.image for pair in pairs], draws)

        numbers, pairs, visual, bad = self.read_usable(epoch, numbers, read)
        names = [pair.image for pair in pairs]
        negatives = uniform_float32(self.order.seed, epoch, "negative", numbers[:, None], np.arange(2))
        part = {
            **places,
            **visual,
            # annotations may name one image in several ways: 42.jpg, COCO_val2014_000000000042
            "image_id": torch.tensor([self.visual.store.identity(name) for name in names]),
            "text": _unmasked([pair.captions[0] for pair in pairs], self.tokenizer, self.length),
            "negative_uniforms": torch.from_numpy(negatives),
        }
        if pairs[0].pivots:
            part["pivot"] = encode_texts([pair.pivots[0] for pair in pairs], self.tokenizer, self.length)
        if self.extra:
            part |= self.extra(pairs, visual, part)
        return {
            "step": step,
            "samples": places["size"],
            "tokens": self.count_tokens(part),
            "bad": bad,
            "image_text": part,
        }


class CaptionPairs(Sequence[Captioned]):
    """An image and one of its captions each, of all captions of `items`; numbers alone are kept of them."""

    def __init__(self, items: Sequence[Captioned]):
        self.items = items
        counts = np.array([len(item.captions) for item in items], np.int64)
        self.owners = np.repeat(np.arange(len(counts)), counts)
        self.firsts = np.cumsum(counts) - counts

    def __len__(self) -> int:
        return len(self.owners)

    def __getitem__(self, number: Any) -> Any:
        owner = self.owners[number]
        item = self.items[owner]
        return Captioned(item.image, (item.captions[number - self.firsts[owner]],))


def _unmasked(texts: Sequence[str], tokenizer: Tokenizer, length: int) -> Sentences:
    tokens = add_specials(tokenizer.encode(texts), tokenizer, length)
    ids, lengths = map(torch.from_numpy, tokens)
    nothing = torch.zeros(0, dtype=torch.int64)
    return Sentences(ids, ids, lengths, nothing, nothing, torch.from_numpy(text_ids(tokens)))

"""The data of a step: `StepBatches(...)[step]` is one worker's part of the global batch, a pure function of
(seed, step) whatever the number of workers, loader processes or restarts.

    1. `Lanes` says which samples a step takes; this worker serves its run of lanes (`list_step_draws`).
    2. `Source` reads them: images and captions, or packed ids.
    3. Images are decoded and augmented, captions tokenised, sentences get specials and masks. Whatever is
       drawn is drawn from (seed, step, index in the global batch).

A sample that cannot be used (an image that does not decode, a caption that is empty or not UTF-8) is
replaced by another one of its lane, drawn from the same keys; it is counted and logged, and too many of them
are an error.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.config import DataConfig, StreamConfig
from raylib.cache import EncoderStates, fingerprint_module, precompute_features
from raylib.data.augmentation import augment_image, count_uniforms, forbid_flips
from raylib.data.images import BadImage, decode_image, preprocess_image
from raylib.data.lanes import Lanes, list_step_draws
from raylib.data.loading import StepDataset
from raylib.data.sources import Sample, Source
from raylib.errors import UserError
from raylib.facts import encode_facts
from raylib.fileio import sha256_file
from raylib.models.unified import UnifiedModel
from raylib.packed import Sentences
from raylib.provenance import DataFile
from raylib.randomness import integers, uniform, uniform_float32
from raylib.settings import SQUEEZED, PreprocessConfig
from raylib.text import BadCaption, Tokenizer, add_specials, mask_tokens

ATTEMPTS = 20  # replacements in a row, after which the source is called unusable
log = logging.getLogger(__name__)


class StepBatches(StepDataset):
    """Map-style dataset of steps; give it to a DataLoader with `batch_size=None` and `sampler=range(first,
    last)`.

    `image_id` is a sample's identity, the hash of its images (`raylib.data.sources`): pairs of one are no
    negatives.

    A batch is {"step", "samples": of all streams and workers, "tokens", "bad": samples replaced here,
    "image_text": {"size": of the global batch, "index" (b,) in it, "images" uint8 (b, H, W, 3), "image_id"
    (b,), "text": Sentences, "negative_uniforms" (b, 2), with `facts` "truths" of the images and "claims" of
    the captions (b, WORDS)}, in place of "images" their "states", b rows, where
    these were made before (`cache_image_states`), "parallel": {"size", "index", "source": Sentences
    (English), "target": Sentences}, "text": {"size", "index", "text": Sentences}}.

    preprocess: preparation of images where nothing augments them.

    Raises UserError: what `Source`, `Lanes` and `Tokenizer` find wrong, a stream without a folder, a language
    without data, lanes that do not divide the batch, no stream at all.
    """

    def __init__(
        self,
        config: DataConfig,
        image_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        preprocess: PreprocessConfig = SQUEEZED,
    ):
        tokenizer = Tokenizer.load(config.tokenizer)
        self.streams: dict[str, _ImageTextStream | _PackedStream] = {}
        self.samples = self.batch_bytes = 0
        for name, stream_config in config.streams.items():
            if not stream_config.batch:
                continue
            if not stream_config.folder:
                raise UserError(
                    f"data.{name}: batch is {stream_config.batch} but there is no folder; set "
                    f"data.{name}.folder"
                )
            parts = (name, config, stream_config, tokenizer, seed, rank, world)
            stream: _ImageTextStream | _PackedStream = (
                _ImageTextStream(image_size, preprocess, *parts)
                if name == "image_text"
                else _PackedStream(*parts)
            )
            self.streams[name] = stream
            self.samples += stream_config.batch
            self.batch_bytes += stream.sample_bytes * len(stream.global_index)
        if not self.streams:
            raise UserError("data: every stream has batch 0; set data.image_text.batch or another one")

    def epoch(self, steps: int) -> float:
        """Return how often the first stream, images if there are any, has been gone through."""
        stream = next(iter(self.streams.values()))
        return steps * stream.stream.batch / stream.num_samples

    def files(self) -> list[DataFile]:
        """Return the files that are part of a run's identity: of all streams."""
        return [file for stream in self.streams.values() for file in stream.source.files()]

    def find_changed_file(self) -> str | None:
        return next(filter(None, (s.source.find_changed_shard() for s in self.streams.values())), None)

    def check_replaced(self, count: int, steps: int) -> None:
        """Raise UserError where more than `bad_limit` of the image-text samples that were read, of a hundred
        at least, could not be used."""
        stream = self.streams.get("image_text")
        if not isinstance(stream, _ImageTextStream):
            return
        num_read, limit = steps * stream.stream.batch + count, stream.config.bad_limit
        if count > limit * max(num_read, 100):
            such = next(iter(stream.warnings), "those in the warnings above")  # of loader processes
            raise UserError(
                f"{count / num_read:.1%} of the samples read are unusable (data.bad_limit={limit:g}), such "
                f"as {such}; mend the data, or give a higher data.bad_limit="
            )

    def cache_image_states(self, model: UnifiedModel, folder: Path, bf16: bool) -> None:
        """All workers together: encode every image that may be drawn, once, by `model`'s image encoder, which
        never changes; batches have the states in the images' place. They are kept in `folder`, for other runs
        with the same encoder and images."""
        stream = self.streams.get("image_text")
        if not isinstance(stream, _ImageTextStream):
            return
        before = stream.sample_bytes
        stream.cache_states(model, folder, bf16)
        self.batch_bytes += (stream.sample_bytes - before) * len(stream.global_index)

    def __getitem__(self, step: int) -> dict[str, Any]:
        batch: dict[str, Any] = {"step": step, "samples": self.samples, "bad": 0}
        for name, stream in self.streams.items():
            batch[name] = stream.read(step)
            batch["bad"] += batch[name].pop("bad", 0)
        return batch | {"tokens": self.count_tokens(batch)}


class _Stream:
    """A source, its order, and the places of the global batch that this worker fills."""

    def __init__(
        self,
        name: str,
        config: DataConfig,
        stream: StreamConfig,
        tokenizer: Tokenizer,
        seed: int,
        rank: int,
        world: int,
    ):
        assert stream.folder is not None
        self.name, self.config, self.stream, self.tokenizer, self.seed = name, config, stream, tokenizer, seed
        self.source = Source(stream.folder, name, tokenizer.sha256, config.cache)
        sizes = self.source.sizes()
        languages = [config.caption_language] if name == "image_text" else stream.languages or sorted(sizes)
        for language in languages:
            if language not in sizes:
                has = ", ".join(sorted(sizes))
                raise UserError(
                    f"{stream.folder}: no data in language {language!r} for data.{name}; it has: {has}"
                )
        self.num_samples = sum(sum(sizes[code]) for code in languages)
        self.lanes = Lanes(
            {code: sizes[code] for code in languages}, name, seed, stream.lanes, stream.alpha, stream.block
        )
        self.draws = list_step_draws(stream.lanes, stream.batch, rank, world)
        self.draws_per_lane = stream.batch // stream.lanes
        self.global_index = np.array([draw.global_index for draw in self.draws])
        self.places = {"size": stream.batch, "index": torch.from_numpy(self.global_index)}
        # at most: clean and masked ids, positions, labels, and room for the rest, in int64
        self.sample_bytes = stream.length * self.source.sides * 5 * 8

    def mask_sentences(self, rows: Sequence[np.ndarray], step: int, side: str = "text") -> Sentences:
        """Sentences with specials, cut and masked."""
        tokens = add_specials(rows, self.tokenizer, self.stream.length)
        if (last := int(tokens.values.max(initial=0))) >= self.tokenizer.vocabulary:
            raise UserError(
                f"{self.stream.folder}: id {last} in step {step}, of a vocabulary of "
                f"{self.tokenizer.vocabulary}: a shard is damaged; data.verify=true says which"
            )
        return mask_tokens(
            tokens,
            self.global_index,
            self.tokenizer,
            (self.seed, step, self.name, side),
            self.config.mask_probability,
            self.config.mask_separator,
        )


class _PackedStream(_Stream):
    """Pre-tokenised sentences (text) or sentence pairs (parallel)."""

    def read(self, step: int) -> dict[str, Any]:
        start = step * self.draws_per_lane
        rows = self.source.rows(self.lanes.draw(d.lane, start + d.draw) for d in self.draws)
        names = ("text",) if self.source.sides == 1 else ("source", "target")
        sides = zip(names, zip(*rows, strict=True), strict=True)
        masked = {name: self.mask_sentences(side, step, name) for name, side in sides}
        return self.places | masked


class _Pair(NamedTuple):
    """Parts of a sample that enter a batch: its identity; an image (H, W, 3), or the name of its states; a
    caption; facts that are true of the image, and those that the caption claims."""

    identity: int
    image: np.ndarray | str
    caption: str
    truths: list[str]
    claims: list[str]


class _ImageTextStream(_Stream):
    """Images with captions. Samples that cannot be used are counted, and told once each."""

    def __init__(self, size: int, preprocess: PreprocessConfig, *parts):
        """preprocess: preparation of images where nothing augments them."""
        super().__init__(*parts)
        self.size, self.preprocess = size, preprocess
        self.states: EncoderStates | None = None  # of all images, where they were encoded before
        self.sample_bytes += 3 * size**2
        self.num_bad = 0  # met by this process
        self.warnings: set[str] = set()
        if self.config.facts:
            self._require_facts()

    def _require_facts(self) -> None:
        """Raise UserError where the first sample says nothing of facts: others would be as silent."""
        sample = self.source.sample(self.lanes.languages[0], 0)
        try:
            sample.facts("")
        except BadCaption as error:
            raise UserError(f"{sample.describe(error)}; set data.facts=false") from error

    def cache_states(self, model: UnifiedModel, folder: Path, bf16: bool) -> None:
        """As `StepBatches.cache_image_states`."""
        (language,) = self.lanes.languages
        manifest = self.source.files()[0].path
        read_as = (model.describe_preprocessing(), self.config.max_pixels, language, bf16)
        name = fingerprint_module(model.vision, sha256_file(manifest), *read_as)
        self.states = precompute_features(model, self, self._list_images(language), folder / name, bf16)
        values = self.states.read([next(iter(self.states.rows))]).values
        self.sample_bytes += values.nbytes - 3 * self.size**2

    def _list_images(self, language: str) -> Iterator[str]:
        """Name every image of every sample."""
        for number in range(self.source.size(language)):
            for extension in self.source.sample(language, number).images:
                yield _image_name(number, extension)

    def read_usable(self, names: Sequence[str]) -> tuple[Tensor, dict[str, str]]:
        """Images as `raylib.cache.ImageReader` has them."""
        images, faults = np.zeros((len(names), self.size, self.size, 3), np.uint8), {}
        (language,) = self.lanes.languages
        for image, name in zip(images, names, strict=True):
            number, _, extension = name.partition(".")
            try:
                decoded = self._decode_image(self.source.sample(language, int(number)), extension)
                image[:] = preprocess_image(decoded, self.size, self.preprocess)
            except BadImage as error:
                faults[name] = str(error)
        return torch.from_numpy(images), faults

    def read(self, step: int) -> dict[str, Any]:
        keys, rows = (self.seed, step, self.name), self.global_index[:, None]
        # one call for the whole batch; a replacement draws anew, from the same keys and its attempt
        picks = uniform(*keys, "pick", rows, 0, np.arange(2))
        augment = self.config.augment
        draws = uniform(*keys, "augment", rows, np.arange(count_uniforms(augment) if augment else 0))
        images = np.empty((0 if self.states else len(rows), self.size, self.size, 3), np.uint8)
        identities, names, captions, bad_before = [], [], [], self.num_bad
        start = step * self.draws_per_lane
        numbers = [self.lanes.draw(d.lane, start + d.draw) for d in self.draws]
        facts: list[tuple[list[str], list[str]]] = []
        for i, sample in enumerate(self.source.samples(numbers)):
            chosen = self._read_sample(step, i, picks[i], sample, numbers[i][1])
            identity, image, caption = chosen.identity, chosen.image, chosen.caption
            if isinstance(image, str):
                names.append(image)
            elif augment:
                forbid_flips(augment, draws[i : i + 1], [[caption]])
                images[i] = augment_image(image, self.size, augment, draws[i])
            else:
                images[i] = preprocess_image(image, self.size, self.preprocess)
            identities.append(identity)
            captions.append(caption)
            facts.append((chosen.truths, chosen.claims))
        negatives = uniform_float32(*keys, "negative", rows, np.arange(2))
        visual: dict[str, Any] = {"images": torch.from_numpy(images)}
        if self.states:
            visual = {"states": self.states.read(names)}
        if self.config.facts:
            truths, claims = zip(*facts, strict=True)
            visual |= {"truths": encode_facts(truths), "claims": encode_facts(claims)}
        return (
            self.places
            | visual
            | {
                "image_id": torch.tensor(identities),
                "text": self.mask_sentences(self.tokenizer.encode(captions), step),
                "negative_uniforms": torch.from_numpy(negatives),
                "bad": self.num_bad - bad_before,
            }
        )

    def _read_sample(self, step: int, row: int, pick: np.ndarray, sample: Sample, number: int) -> "_Pair":
        """Fill one place in the batch: with `sample`, or with the first usable one that takes its place."""
        draw, keys, language = self.draws[row], (self.seed, step, self.name), sample.language
        for attempt in range(ATTEMPTS):
            if attempt:
                # of the same lane, whose shards this worker reads in any case
                first, last = self.lanes.span(draw.lane, language)
                number = first + int(integers(last - first, *keys, "replace", draw.global_index, attempt))
                pick = uniform(*keys, "pick", draw.global_index, attempt, np.arange(2))
                sample = self.source.sample(language, number)
            try:
                return self._choose(sample, number, *pick)
            except (BadImage, BadCaption) as error:
                self._count_bad(str(error))
        raise UserError(
            f"{self.stream.folder}: {ATTEMPTS} unusable samples one after another, the last: {sample.key}"
        )

    def _choose(self, sample: Sample, number: int, image_pick: float, caption_pick: float) -> "_Pair":
        """Choose one of a sample's images, and one of its captions."""
        if not sample.images:
            raise BadImage(sample.describe("no image"))
        try:
            captions = sample.captions_in(self.config.caption_language)
            caption = captions[int(caption_pick * len(captions))]
            facts = sample.facts(caption) if self.config.facts else ([], [])
        except BadCaption as error:
            raise BadCaption(sample.describe(error)) from error
        # encoding one by one costs 20 times a batch: asked only of what may be nothing but invisible
        # characters
        if not any(map(str.isalnum, caption)) and not len(self.tokenizer.encode([caption])[0]):
            raise BadCaption(sample.describe(f"a caption without a token, {caption!r}"))
        extension = sample.images[int(image_pick * len(sample.images))]
        if self.states is None:
            return _Pair(sample.identity, self._decode_image(sample, extension), caption, *facts)
        name = _image_name(number, extension)
        if fault := self.states.faults.get(name):
            raise BadImage(fault)
        return _Pair(sample.identity, name, caption, *facts)

    def _decode_image(self, sample: Sample, extension: str) -> np.ndarray:
        """(H, W, 3) of one of a sample's images."""
        data = sample.read(extension)
        try:
            return decode_image(data, max_pixels=self.config.max_pixels)
        except BadImage:  # a name for every image would cost as much as finding it
            return decode_image(data, f"{sample.name}, {extension}", self.config.max_pixels)

    def _count_bad(self, message: str) -> None:
        self.num_bad += 1
        if message not in self.warnings:
            self.warnings.add(message)
            log.warning("%s; another sample takes its place", message)


def _image_name(number: int, extension: str) -> str:
    """Name of an image's states; names are in the order of samples, as their shards are."""
    return f"{number:010d}.{extension}"

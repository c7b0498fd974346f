"""`Model`: a trained model of any kind, and what it can do. All that it computes is what evaluation computes,
by the same functions: `pretrain.embeddings` for vectors, `finetune.tasks.ranking` for pairs,
`finetune.predict` for classes.

Shape legend: n images or texts, e width of embeddings.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import wraps
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from finetune.batches import encode_inputs, encode_texts
from finetune.config import FinetuneConfig
from finetune.formats import Example
from finetune.predict import class_scores, not_finite_scores
from finetune.stores import Regions, to_regions
from finetune.stores.images import join_regions
from finetune.tasks.ranking import match_pairs
from pretrain.embeddings import image_vectors, sentence_vectors
from raylib.data.images import load_image, preprocess_image
from raylib.data.loading import batched, prefetch, to_device
from raylib.display import progress
from raylib.errors import NotFinite, UserError
from raylib.finite import require_finite
from raylib.models.base import Backbone, RetrievalBackbone
from raylib.models.finetuned import FinetuneModel
from raylib.models.layers import Memory
from raylib.packed import Ragged
from raylib.precision import autocast
from raylib.runtime import advise_on_memory
from raylib.settings import MAX_PIXELS
from raylib.text import SURROGATE, Tokenizer

T = TypeVar("T")
ImageInput = Any  # a path, a URL, bytes, a PIL image, an array; of a model on region features, these
BATCH = 64


class Answer(NamedTuple):
    """A class, or a generated answer, and its probability."""

    text: str
    probability: float


class Match(NamedTuple):
    """A text, the log of the odds that it belongs to the image, and its place in the list that was given."""

    text: str
    score: float
    position: int


@dataclass(frozen=True)
class PreparedImage:
    """An image as `Model.prepare` makes it: uint8 (size, size, 3)."""

    pixels: np.ndarray


def _advise_on_memory(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method say what to do where its batches do not fit the memory."""

    @wraps(method)
    def advised(self: "Model", *args: Any, **named: Any) -> Any:
        with advise_on_memory(f"{method.__name__}: a batch", self.device, lambda: self.less_memory):
            return method(self, *args, **named)

    return advised


class Model:
    """A model that `polyglance.load` has loaded.

    capabilities: the names of the methods that it has the weights for; others raise a `UserError` that says
        so. labels: the classes of a fine-tuned model, else ().
    network: the module itself, in evaluation mode. tokenizer, length: how it reads texts, of so many tokens
        at most.
    show_progress: a bar on stderr for what takes longer than a second. max_pixels: of an image; a larger one
        is not decoded.
    """

    show_progress = True
    max_pixels = MAX_PIXELS
    less_memory = "lower batch_size="  # what to do where a batch does not fit

    def __init__(
        self,
        path: Path,
        network: Backbone | FinetuneModel,
        tokenizer: Tokenizer,
        config: FinetuneConfig | None,
        capabilities: frozenset[str],
        bf16: bool,
    ):
        self.path, self.network, self.tokenizer, self.bf16 = path, network, tokenizer, bf16
        self.capabilities = capabilities
        self.backbone = network.backbone
        self.task = config.task if config else None
        self.labels = network.labels if isinstance(network, FinetuneModel) else ()
        self.region_dim = network.description["regions"] if isinstance(network, FinetuneModel) else None
        self.max_regions = config.max_regions if config else None
        self.sigmoid = config is not None and config.loss.startswith("bce")
        if config:
            self.length = config.length
        elif isinstance(network, RetrievalBackbone):
            self.length = network.max_length
        else:
            self.length = FinetuneConfig.model_fields["length"].default

    def __repr__(self) -> str:
        return f"<polyglance.Model {self.path}: {self.backbone.kind}, {', '.join(sorted(self.capabilities))}>"

    @property
    def device(self) -> torch.device:
        """The device that it computes on."""
        return next(self.network.parameters()).device

    # ---- images and texts apart

    @_advise_on_memory
    def encode_image(
        self, images: Iterable[ImageInput] | ImageInput, *, batch_size: int = BATCH, as_tensor: bool = False
    ) -> Any:
        """Unit vectors (n, e) of images; (e,) of one that comes alone. A NumPy array, or a tensor on the CPU.

        images: paths, URLs, binary files or their bytes, PIL images or arrays of uint8 (height, width, 3),
            in a list or any iterable, which is gone through batch by batch.
        Raises:
            UserError: the model has no such vectors, an image does not decode (it is named).
        """
        self.require("encode_image")
        if _is_one_image(images):
            return self.encode_image([images], as_tensor=as_tensor)[0]
        model = cast(RetrievalBackbone, self.network)

        def encode(pixels: Tensor) -> Tensor:
            return image_vectors(model, pixels, self.bf16, batch_size)

        chunks = _numbered(self._progress(images, batch_size, "encode images", "images"), "image")
        return self._encode(prefetch(starmap(self._pixels, chunks)), encode, as_tensor)

    @_advise_on_memory
    def encode_text(
        self, texts: Iterable[str] | str, *, batch_size: int = 4 * BATCH, as_tensor: bool = False
    ) -> Any:
        """Unit vectors (n, e) of texts in any language; (e,) of one that comes alone."""
        self.require("encode_text")
        if isinstance(texts, str):
            return self.encode_text([texts], as_tensor=as_tensor)[0]
        model = cast(RetrievalBackbone, self.network)

        def encode(chunk: tuple[list[str], list[str]]) -> Tensor:
            ids = encode_texts(_checked(*chunk), self.tokenizer, self.length)
            return sentence_vectors(model, ids, self.bf16, batch_size)

        chunks = self._progress(_listed_texts(texts), batch_size, "encode texts", "texts")
        return self._encode(_numbered(chunks, "text"), encode, as_tensor)

    def similarity(self, images: Any, texts: Any, *, batch_size: int = BATCH, as_tensor: bool = False) -> Any:
        """Cosines (images, texts). Either may be vectors that were encoded before: (n, e), or a list of
        (e,)."""
        self.require("similarity")
        left, right = _vectors(images), _vectors(texts)
        if left is None:
            one = [images] if _is_one_image(images) else images
            left = self.encode_image(one, batch_size=batch_size, as_tensor=True)
        if right is None:
            one = [texts] if isinstance(texts, str) else texts
            right = self.encode_text(one, batch_size=4 * batch_size, as_tensor=True)
        if left.shape[1] != right.shape[1]:
            raise UserError(
                f"similarity: vectors of {left.shape[1]} and of {right.shape[1]} numbers; both must be this "
                "model's"
            )
        cosines = left @ right.T
        return cosines if as_tensor else cosines.numpy()

    @_advise_on_memory
    def rerank(
        self, image: ImageInput, texts: Iterable[str], *, top: int | None = None, batch_size: int = BATCH
    ) -> list[Match]:
        """The texts by how well the image-text matching head, which reads each together with the image, finds
        that they belong to it: the best first, `top` of them."""
        self.require("rerank")
        _require_count("batch_size", batch_size)
        if top is not None:
            _require_count("top", top)
        texts = _checked([texts] if isinstance(texts, str) else texts)
        model: Any = self.network
        with torch.no_grad():
            states = self._encode_pixels(self._pixels([image], ["the image"]))
            scores = [self._match(model, chunk, states) for chunk in batched(texts, batch_size)]
        found = torch.cat(scores).cpu() if scores else torch.zeros(0)
        require_finite("scores of the match head", found)
        order = found.argsort(descending=True, stable=True).tolist()[:top]
        return [Match(texts[i], float(found[i]), i) for i in order]

    def _match(self, model: Any, texts: list[str], image: Ragged) -> Tensor:
        ids = encode_texts(texts, self.tokenizer, self.length)
        ids = to_device(ids, self.device)
        with autocast(self.device, self.bf16):
            states = model.encode_text(ids)
        rows = torch.zeros(len(texts), dtype=torch.int64)
        return match_pairs(model, ids.with_values(states.float()), Memory(image, rows), self.bf16)

    # ---- classes

    def answer(self, image: Any, question: Any, *, top: int = 3, batch_size: int = BATCH) -> Any:
        """The `top` likeliest answers to a question about an image, or about two, (left, right), of a model
        of such a task: a list of `Answer`. Lists of images and questions, or one image and many questions,
        give a list of these."""
        self.require("answer")
        return self.classify(question, image, top=top, batch_size=batch_size)

    def entails(self, image: Any, premise: Any, hypothesis: Any, *, batch_size: int = BATCH) -> Any:
        """{"entailment", "neutral", "contradiction": probability} of a hypothesis about an image, or about a
        premise, a sentence; the other is None. Lists give a list of these."""
        self.require("entails")
        if (image is None) == (premise is None):
            raise UserError(
                "entails: a hypothesis is about an image or about a premise; give one, and None for the other"
            )
        found = self.classify(hypothesis, image, premise=premise, top=len(self.labels), batch_size=batch_size)
        return [dict(answers) for answers in found] if not isinstance(hypothesis, str) else dict(found)

    @_advise_on_memory
    def classify(
        self, text: Any, image: Any = None, *, premise: Any = None, top: int = 3, batch_size: int = BATCH
    ) -> Any:
        """The `top` likeliest classes of a text about an image, or two, or about a premise: a list of
        `Answer`, of lists a list of these."""
        self.require("classify")
        if isinstance(text, str):
            premise = None if premise is None else [premise]
            return self.classify([text], image, premise=premise, top=top, batch_size=batch_size)[0]
        _require_count("top", top)
        if image is None and premise is None:
            raise UserError(f"{self.path} reads a text about an image or a premise: give one of them")
        texts = _checked(text)
        about = self._about(image, len(texts))
        pairs: list[tuple[str, ...]] = [(one,) for one in texts]
        if premise is not None:
            premises = [premise] * len(texts) if isinstance(premise, str) else _checked(premise)
            _require_equal(len(texts), len(premises), "premises")
            pairs = list(zip(premises, texts, strict=True))
        rows = list(zip(pairs, about, range(len(texts)), strict=True))
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        with torch.no_grad():
            chunks = self._progress(rows, batch_size, "classify", "texts")
            for chunk, visual in prefetch(map(self._visual, chunks)):
                found.append(self._classes(chunk, visual, top))
        if not found:
            return []
        # a GPU works through all batches before the host asks for what it found
        finite, labels, chances = (torch.cat(parts).tolist() for parts in zip(*found, strict=True))
        if not all(finite):
            raise NotFinite(not_finite_scores(texts[finite.index(False)]))
        return [self._answers(*both) for both in zip(labels, chances, strict=True)]

    def _about(self, image: Any, count: int) -> list[tuple[ImageInput, ...]]:
        """The images of each of `count` texts."""
        model = cast(FinetuneModel, self.network)
        if image is None and model.num_images == 1:
            return [()] * count
        if model.num_images == 1:
            images = [image] * count if _is_one_image(image) else list(image)
            if any(isinstance(each, tuple | list) and not isinstance(each, Regions) for each in images):
                raise UserError(f"{self.path} reads a text with one image, not with several")
            _require_equal(count, len(images), "images")
            return [(each,) for each in images]
        one = isinstance(image, tuple) or _is_one_image(image)
        sets = [image] * count if one or image is None else list(image)
        if not all(isinstance(each, tuple | list) and len(each) == model.num_images for each in sets):
            raise UserError(
                f"{self.path} reads a text with {model.num_images} images: give them as (left, right)"
            )
        _require_equal(count, len(sets), "pairs of images")
        return list(map(tuple, sets))

    def _visual(self, chunk: list) -> tuple[list, dict[str, Any]]:
        """The rows of a batch, with their images as pixels or regions, each once, and which row has which."""
        images = [image for _, about, _ in chunk for image in about]
        if not images:
            return chunk, {}
        if self.region_dim:
            regions = [self._regions(image) for image in images]
            return chunk, join_regions(regions, "tags" in self.backbone.row_parts, self.max_regions)
        keys = [str(image) if isinstance(image, str | Path) else id(image) for image in images]
        names = [f"image of text {i}" for _, about, i in chunk for _ in about]
        unique = dict(zip(keys, zip(images, names, strict=True), strict=True))
        place = {key: i for i, key in enumerate(unique)}
        rows = torch.tensor([place[key] for key in keys])
        return chunk, {"pixels": self._pixels(*zip(*unique.values(), strict=True)), "rows": rows}

    def _classes(self, chunk: list, visual: dict[str, Any], top: int) -> tuple[Tensor, Tensor, Tensor]:
        """(b,) whether the scores of a text are finite; (b, top) the likeliest classes and their
        probabilities."""
        model = cast(FinetuneModel, self.network)
        examples = [Example(texts[-1], texts, ("",) * len(about), {}) for texts, about, _ in chunk]
        if "pixels" in visual:
            visual = {"states": self._encode_pixels(visual["pixels"]), "state_rows": visual["rows"]}
        inputs = encode_inputs(examples, visual, self.tokenizer, self.length)
        scores, finite = class_scores(model, inputs, self.bf16)
        scores = scores.float()
        if model.is_generative:
            probabilities = scores.exp()
        else:
            probabilities = scores.sigmoid() if self.sigmoid else scores.softmax(1)
        # by score: where probabilities round to 1, scores still differ
        best = scores.topk(min(top, len(self.labels)), dim=1).indices
        return finite, best, probabilities.gather(1, best)

    def _answers(self, labels: list[int], chances: list[float]) -> list[Answer]:
        generates = cast(FinetuneModel, self.network).is_generative
        pairs = zip(labels, chances, strict=True)
        return [Answer(self.labels[i], p) for i, p in pairs if p > 0 or not generates]

    def _regions(self, image: Any) -> Regions:
        """The region features of an image.

        Raises:
            UserError: not these; of another width than the model reads.
        """
        if isinstance(image, Regions | dict):
            regions = to_regions(image, "regions") if isinstance(image, dict) else image
            if (found := regions.features.shape[1]) != self.region_dim:
                raise UserError(
                    f"{self.path} reads regions of {self.region_dim} features each, and these have {found}"
                )
            return regions
        raise UserError(
            f"{self.path}: {self.backbone.kind} reads region features of a detector, not images: give each "
            'image as {"features": (R, f), "boxes": (R, 4) in pixels, "img_h", "img_w"}'
            + (', "tags": names of the objects' if "tags" in self.backbone.row_parts else "")
        )

    # ---- shared

    def _progress(self, items: Iterable[T], batch_size: int, what: str, unit: str) -> Iterator[list[T]]:
        _require_count("batch_size", batch_size)
        chunks = batched(items, batch_size)
        total = len(items) if isinstance(items, Sized) else None
        return progress(chunks, what, total, unit, len) if self.show_progress else chunks

    def prepare(self, image: np.ndarray) -> PreparedImage:
        """Make an image, uint8 (height, width, 3), as small as the model takes it: in the place of it other
        methods take what this returns."""
        return PreparedImage(preprocess_image(image, self.backbone.image_size, self.backbone.preprocess))

    def _pixels(self, images: Sequence[ImageInput], names: Sequence[str]) -> Tensor:
        """uint8 (n, size, size, 3) of images as evaluation resizes them, decoded by threads. names: of those
        that have none themselves."""
        size = self.backbone.image_size

        def read(image: ImageInput, name: str) -> np.ndarray:
            if isinstance(image, PreparedImage):
                return image.pixels
            return preprocess_image(load_image(image, name, self.max_pixels), size, self.backbone.preprocess)

        with ThreadPoolExecutor() as threads:
            return torch.from_numpy(np.stack(list(threads.map(read, images, names))))

    def _encode_pixels(self, pixels: Tensor) -> Ragged:
        """States of images in float32, as evaluation keeps them."""
        with autocast(self.device, self.bf16):
            states = self.backbone.encode_images(to_device(pixels, self.device))
        return states.with_values(states.values.float())

    def _encode(self, chunks: Iterable[T], encode: Callable[[T], Tensor], as_tensor: bool) -> Any:
        parts = []
        with torch.no_grad():
            for chunk in chunks:
                vectors = encode(chunk)
                require_finite("embeddings", vectors)
                parts.append(vectors)
        found = torch.cat(parts) if parts else torch.zeros(0, self._embedding())
        return found if as_tensor else found.numpy()

    def _embedding(self) -> int:
        return len(self.encode_text("."))

    def require(self, method: str) -> None:
        """Raises UserError: the model has no weights for `method`; says what it can do."""
        if method in self.capabilities:
            return
        if not self.capabilities:
            raise UserError(
                f"{self.path}: published weights for {self.backbone.kind} without what {method} needs; "
                "pretrain or fine-tune from them first, then load the run"
            )
        what = f"fine-tuned on {self.task}" if self.task else f"a pretrained {self.backbone.kind}"
        can = ", ".join(sorted(self.capabilities))
        raise UserError(f"{self.path}: this model, {what}, cannot {method}; it can {can}")


def _is_one_image(value: Any) -> bool:
    files = io.RawIOBase | io.BufferedIOBase
    if isinstance(value, str | Path | bytes | bytearray | memoryview | dict | Regions | files):
        return True
    if isinstance(value, np.ndarray | Tensor):
        return value.ndim == 3
    return not isinstance(value, Iterable)  # a PIL image


def _vectors(value: Any) -> Tensor | None:
    """The vectors (n, e), float32, that `value` is, or a list of vectors (e,); None: it is no such thing."""
    if isinstance(value, list | tuple) and value and all(map(_is_vector, value)):
        return torch.stack([torch.as_tensor(each).float().cpu() for each in value])
    if isinstance(value, np.ndarray | Tensor) and value.ndim == 2:
        return torch.as_tensor(value).float().cpu()
    return torch.as_tensor(value).float().cpu()[None] if _is_vector(value) else None


def _is_vector(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 1
    return isinstance(value, np.ndarray) and value.ndim == 1 and np.issubdtype(value.dtype, np.floating)


def _numbered(chunks: Iterable[list[T]], what: str) -> Iterator[tuple[list[T], list[str]]]:
    """Each chunk with a name of each of its items: `what`, and its place among all."""
    start = 0
    for chunk in chunks:
        yield chunk, [f"{what} {start + i}" for i in range(len(chunk))]
        start += len(chunk)


def _listed_texts(value: Any) -> Iterable[Any]:
    if isinstance(value, Iterable) and not isinstance(value, bytes):
        return value
    raise UserError(f"{type(value).__name__} is no text; give a str, or a list of these")


def _checked(texts: Any, names: Sequence[str] = ()) -> list[str]:
    """The texts, in a list. names: of them."""
    texts = list(_listed_texts(texts))
    for i, text in enumerate(texts):
        name = names[i] if names else f"text {i}"
        if not isinstance(text, str):
            raise UserError(f"{name} is no str but {type(text).__name__}: {text!r:.60}")
        if SURROGATE.search(text):
            raise UserError(f"{name} is no Unicode, it has half of a surrogate pair: {text!a:.60}")
    return texts


def _require_count(name: str, value: Any) -> None:
    if not isinstance(value, int | np.integer) or value < 1:
        raise UserError(f"{name}={value!r}: give a whole number, 1 or more")


def _require_equal(texts: int, others: int, what: str) -> None:
    if texts != others:
        raise UserError(f"{texts} texts and {others} {what}: give one for each text, or one for all")

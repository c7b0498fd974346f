"""Unit vectors of images and sentences, as retrieval compares them: of evaluation and `polyglance.Model`.

Encoders and projections run under autocast where training does; vectors are made of length 1 in float32, and
stay on the device until the last is computed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raylib.data.loading import to_device
from raylib.display import progress
from raylib.models.base import RetrievalBackbone
from raylib.models.unified import UnifiedModel
from raylib.packed import Ragged, first_tokens
from raylib.precision import autocast

T = TypeVar("T")
IMAGES, SENTENCES = 64, 1024  # encoded at a time


def image_vectors(model: RetrievalBackbone, images: Tensor, bf16: bool, batch: int = IMAGES) -> Tensor:
    """uint8 (n, H, W, 3) -> unit vectors (n, e), float32 on the CPU. `bf16`: of the encoder alone."""
    device, vectors = next(model.parameters()).device, []
    for part in _image_batches(images, batch):
        with autocast(device, bf16):
            states = model.encode_images(to_device(part, device))
            vectors.append(model.embed_images(states, normalize=False))
    return _unit_vectors(vectors)


def sentence_vectors(model: RetrievalBackbone, ids: Ragged, bf16: bool, batch: int = SENTENCES) -> Tensor:
    """Sentences with specials -> unit vectors (n, e), float32 on the CPU. `bf16`: of the encoder alone."""
    device, vectors = next(model.parameters()).device, []
    for rows in _sentence_batches(ids, batch):
        with autocast(device, bf16):
            vectors.append(model.embed_text(to_device(rows, device), normalize=False))
    return _unit_vectors(vectors)


class FrozenStates:
    """CLS states of images and sentences after encoders that never change: computed in the first evaluation
    of a run alone. No more than `LIMIT` bytes, on the model's device."""

    LIMIT = 2**28

    def __init__(self) -> None:
        # states by name, with the model and the state of the weights that they were made by
        self.states: dict[str, tuple[Tensor, tuple]] = {}

    def image_vectors(self, model: UnifiedModel, images: Tensor, bf16: bool) -> Tensor:
        """As the function of this name; the images are always the same."""

        def encode(part: Tensor) -> Tensor:
            return model.encode_images(part).first()

        cls = self._cls("images", model, [model.vision], _image_batches(images), encode, bf16)
        if cls is None:
            return image_vectors(model, images, bf16)
        rows = Ragged(cls, torch.ones(len(cls), dtype=torch.int64))
        with autocast(cls.device, bf16):
            return _unit_vectors([model.embed_images(rows, normalize=False)])

    def sentence_vectors(self, model: UnifiedModel, language: str, ids: Ragged, bf16: bool) -> Tensor:
        """As the function of this name; the sentences of a language are always the same."""

        def encode(rows: Ragged) -> Tensor:
            return model.encode_text(rows, first_tokens(rows.lengths))

        parts = [model.embedding, model.text]
        cls = self._cls(f"sentences {language}", model, parts, _sentence_batches(ids), encode, bf16)
        if cls is None:
            return sentence_vectors(model, ids, bf16)
        with autocast(cls.device, bf16):
            return _unit_vectors([model.embed_text_states(cls, normalize=False)])

    def _cls(
        self,
        name: str,
        model: UnifiedModel,
        parts: Sequence[nn.Module],
        batches: Iterable[T],
        encode: Callable[[T], Tensor],
        bf16: bool,
    ) -> Tensor | None:
        """(n, d) states that are called `name`, of `batches`, which `parts` of the model encode; None where
        these train."""
        weights = [p for part in parts for p in part.parameters()]
        if model.training or any(p.requires_grad for p in weights):
            return None
        key = (model, bf16, [p._version for p in weights])  # loading other weights counts up
        if name in self.states and self.states[name][1] == key:
            return self.states[name][0]
        self.states.pop(name, None)
        device = weights[0].device
        with autocast(device, bf16):
            found = torch.cat([encode(to_device(batch, device)) for batch in batches])
        if found.nbytes + sum(states.nbytes for states, _ in self.states.values()) <= self.LIMIT:
            self.states[name] = found, key
        return found


def _image_batches(images: Tensor, batch: int = IMAGES) -> Iterable[Tensor]:
    return progress(images.split(batch), "encode images", len(images), "images", len)


def _sentence_batches(ids: Ragged, batch: int = SENTENCES) -> Iterator[Ragged]:
    lengths = ids.lengths.split(batch)
    values = ids.values.split([int(of_batch.sum()) for of_batch in lengths])
    batches = [Ragged(*rows) for rows in zip(values, lengths, strict=True)]
    return progress(
        batches, "encode sentences", len(ids.lengths), "sentences", lambda rows: len(rows.lengths)
    )


def _unit_vectors(vectors: list[Tensor]) -> Tensor:
    """The vectors of all batches, which stay on the device until the last is computed."""
    return F.normalize(torch.cat(vectors).float(), dim=-1).cpu()

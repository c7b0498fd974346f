"""Image-text contrast of a model that encodes texts and pictures apart (paper 4, section 3.1), and what
methods add to it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from finetune.strategies.base import Term
from raylib.distributed import gather, total, world_size
from raylib.objectives.contrastive import contrastive
from raylib.objectives.pretraining import UnifiedObjective
from raylib.packed import Ragged, concatenate

Contrast = Callable[[Tensor, Tensor], Tensor]


class Vectors(NamedTuple):
    """What a batch came to: vectors (b, e) of pictures, texts and, where there are any, the texts' pivots, of
    any length; and `contrast(queries (b, e), keys (b, e))`, InfoNCE of cosines summed over the rows, with the
    keys of all workers."""

    picture: Tensor
    text: Tensor
    pivot: Tensor | None
    contrast: Contrast


class ContrastObjective(nn.Module):
    """`forward(batch)` -> (this worker's share of L_i2t + L_t2i + sum of weighted terms (equation 9), {"i2t",
    "t2i" and terms by name: means over the global batch, unweighted}). The public code halves the first two.

    Pairs of one picture are no negatives of each other, nor are equal texts.
    """

    partial = True  # heads of pretraining have no part in it

    def __init__(self, model: nn.Module, temperature: float, terms: dict[str, Term] | None = None):
        super().__init__()
        self.model, self.temperature, self.terms = model, temperature, terms or {}

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        part = batch["image_text"]
        vectors = encode_vectors(
            self.model, part, torch.tensor([self.temperature], device=part["image_id"].device)
        )
        sums = [
            vectors.contrast(vectors.picture, vectors.text),
            vectors.contrast(vectors.text, vectors.picture),
        ]
        sums = torch.stack([*sums, *(term.values(vectors, part).sum() for term in self.terms.values())])
        shares = sums / total(torch.tensor(float(len(vectors.text)), device=sums.device))
        weights = torch.tensor([1.0, 1.0, *(term.weight for term in self.terms.values())], device=sums.device)
        names = ("i2t", "t2i", *self.terms)
        return (weights * shares).sum() * world_size(), dict(zip(names, total(shares).unbind(), strict=True))


class MatchingObjective(nn.Module):
    """As `UnifiedObjective`, which it holds, of contrast and matching, and terms of methods beside:
    `forward(batch)` -> (this worker's share of the sum, {its terms, and the methods' by name: means over the
    global batch, unweighted}).

    Images are encoded once for both. Texts are encoded again, with their pivots: what `UnifiedObjective`
    makes of them are unit vectors, and terms are about vectors of any length.
    """

    def __init__(self, unified: UnifiedObjective, terms: dict[str, Term]):
        super().__init__()
        self.model, self.unified, self.terms = unified.model, unified, terms

    @property
    def partial(self) -> bool:
        return self.unified.partial

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        part = batch["image_text"]
        if "states" not in part:
            with torch.set_grad_enabled(self.unified.config.train_vision and torch.is_grad_enabled()):
                part = {**part, "states": self.model.encode_images(part["images"])}
        loss, values = self.unified({**batch, "image_text": part})
        # without gradient: what clamps the temperature asks all terms together, once a step
        # (`raylib.distributed.clamp`)
        temperature = self.model.temperature.detach().clamp(*self.unified.config.temperature)
        vectors = encode_vectors(self.model, part, temperature)
        sums = torch.stack([term.values(vectors, part).sum() for term in self.terms.values()])
        shares = sums / total(torch.tensor(float(len(vectors.text)), device=sums.device))
        weights = torch.tensor([term.weight for term in self.terms.values()], device=sums.device)
        added = dict(zip(self.terms, total(shares).unbind(), strict=True))
        return loss + (weights * shares).sum() * world_size(), {**values, **added}


def encode_vectors(model: nn.Module, part: dict, temperature: Tensor) -> Vectors:
    """Return the vectors of a batch. temperature: (1,), of `Vectors.contrast`."""
    texts = [Ragged(part["text"].clean, part["text"].lengths), *([part["pivot"]] if "pivot" in part else [])]
    if "states" in part:  # of a frozen image encoder that ran before, or of this step's
        dtype = next(model.parameters()).dtype
        states = part["states"].with_values(part["states"].values.to(dtype))
    else:
        states = model.encode_images(part["images"])
    picture = model.embed_pictures(states).float()
    text, *pivot = model.embed_sentences(concatenate(texts)).float().split([len(t.lengths) for t in texts])
    return Vectors(picture, text, pivot[0] if pivot else None, _contrast(part, temperature))


def _contrast(part: dict, temperature: Tensor) -> Contrast:
    """Rows of the global batch in one order on any number of workers."""
    index = part["index"].to(part["image_id"].device)
    everywhere, pictures, texts = gather(
        torch.stack([index, part["image_id"], part["text"].text_id], 1)
    ).unbind(1)
    everywhere, order = everywhere.sort()
    positive = torch.searchsorted(everywhere, index.contiguous())
    same = (part["image_id"][:, None] == pictures[order]) | (part["text"].text_id[:, None] == texts[order])
    excluded = torch.zeros(same.shape, device=same.device).masked_fill_(same, -torch.inf)
    excluded = excluded.scatter(1, positive[:, None], 0.0)

    def contrast(queries: Tensor, keys: Tensor) -> Tensor:
        queries, keys = (nn.functional.normalize(x, dim=1) for x in (queries, keys))
        keys = gather(keys).index_select(0, order)
        return contrastive(queries, keys, positive, excluded.to(queries.dtype), temperature.to(queries))[0]

    return contrast

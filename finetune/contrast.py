"""Image-text contrast of a model that encodes texts and pictures apart (paper 4, section 3.1), and what methods add to it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from finetune.strategies.base import Term
from raylib.collective import gather, total, world_size
from raylib.losses import contrastive
from raylib.ragged import Ragged, concatenate

Contrast = Callable[[Tensor, Tensor], Tensor]


class Vectors(NamedTuple):
    """What a batch came to: vectors (b, e) of pictures, texts and, where there are any, the texts' pivots, of any length; and
    `contrast(queries (b, e), keys (b, e))`, InfoNCE of cosines summed over the rows, with the keys of all workers."""

    picture: Tensor
    text: Tensor
    pivot: Tensor | None
    contrast: Contrast


class ContrastObjective(nn.Module):
    """`forward(batch)` -> (this worker's share of L_i2t + L_t2i + sum of weighted terms (equation 9), {"i2t", "t2i" and terms by
    name: means over the global batch, unweighted}). The public code halves the first two.

    Pairs of one picture are no negatives of each other, nor are equal texts.
    """

    partial = True  # heads of pretraining have no part in it

    def __init__(self, model: nn.Module, temperature: float, terms: dict[str, Term] | None = None):
        super().__init__()
        self.model, self.temperature, self.terms = model, temperature, terms or {}

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        part = batch["image_text"]
        vectors = self._vectors(part)
        sums = [vectors.contrast(vectors.picture, vectors.text), vectors.contrast(vectors.text, vectors.picture)]
        sums = torch.stack([*sums, *(term.values(vectors, part).sum() for term in self.terms.values())])
        shares = sums / total(torch.tensor(float(len(vectors.text)), device=sums.device))
        weights = torch.tensor([1.0, 1.0, *(term.weight for term in self.terms.values())], device=sums.device)
        names = ("i2t", "t2i", *self.terms)
        return (weights * shares).sum() * world_size(), dict(zip(names, total(shares).unbind(), strict=True))

    def _vectors(self, part: dict) -> Vectors:
        texts = [Ragged(part["text"].clean, part["text"].lengths), *([part["pivot"]] if "pivot" in part else [])]
        if "states" in part:  # of a frozen image encoder that ran before
            dtype = next(self.model.parameters()).dtype
            states = part["states"].with_values(part["states"].values.to(dtype))
        else:
            states = self.model.encode_images(part["images"])
        picture = self.model.embed_pictures(states).float()
        text, *pivot = self.model.embed_sentences(concatenate(texts)).float().split([len(t.lengths) for t in texts])
        return Vectors(picture, text, pivot[0] if pivot else None, self._contrast(part))

    def _contrast(self, part: dict) -> Contrast:
        """Rows of the global batch in one order on any number of workers."""
        index = part["index"].to(part["image_id"].device)
        everywhere, pictures, texts = gather(torch.stack([index, part["image_id"], part["text"].text_id], 1)).unbind(1)
        everywhere, order = everywhere.sort()
        positive = torch.searchsorted(everywhere, index.contiguous())
        same = (part["image_id"][:, None] == pictures[order]) | (part["text"].text_id[:, None] == texts[order])
        excluded = torch.zeros(same.shape, device=same.device).masked_fill_(same, -torch.inf)
        excluded = excluded.scatter(1, positive[:, None], 0.0)

        def contrast(queries: Tensor, keys: Tensor) -> Tensor:
            queries, keys = (nn.functional.normalize(x, dim=1) for x in (queries, keys))
            keys = gather(keys).index_select(0, order)
            return contrastive(queries, keys, positive, excluded.to(queries.dtype), queries.new_tensor([self.temperature]))[0]

        return contrast

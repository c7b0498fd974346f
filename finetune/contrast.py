"""Image-text contrast of a model that encodes texts and pictures apart (paper 4, section 3.1), and what
methods add to it."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from finetune.strategies.base import Outputs, Term, term_shares
from raylib.distributed import all_reduce, world_size
from raylib.objectives.contrastive import align_pairs, info_nce
from raylib.objectives.pretraining import UnifiedObjective
from raylib.packed import Ragged, concatenate


class ContrastObjective(nn.Module):
    """`forward(batch)` -> (this worker's share of L_i2t + L_t2i + sum of weighted terms (equation 9), {"i2t",
    "t2i" and terms by name: means over the global batch, unweighted}). The public code halves the first two.

    Pairs of one picture are no negatives of each other, nor are equal texts.
    """

    has_unused_parameters = True  # heads of pretraining have no part in it

    def __init__(self, model: nn.Module, temperature: float, terms: Mapping[str, Term] | None = None):
        super().__init__()
        self.model, self.temperature, self.terms = model, temperature, terms or {}

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        part = batch["image_text"]
        device = part["image_id"].device
        outputs = embed(self.model, part, torch.tensor([self.temperature], device=device))
        examples = all_reduce(torch.tensor(float(len(part["image_id"])), device=device))
        image, text = outputs.image_embeddings, outputs.text_embeddings
        ways = [outputs.contrast(image, text) / examples, outputs.contrast(text, image) / examples]
        shares = torch.stack([*ways, *term_shares(self.terms.values(), outputs, part, examples)])
        weights = torch.tensor([1.0, 1.0, *(term.weight for term in self.terms.values())], device=device)
        names = ("i2t", "t2i", *self.terms)
        return (weights * shares).sum() * world_size(), dict(
            zip(names, all_reduce(shares).unbind(), strict=True)
        )


class MatchingObjective(nn.Module):
    """As `UnifiedObjective`, which it holds, of contrast and matching, and terms of methods beside:
    `forward(batch)` -> (this worker's share of the sum, {its terms, and the methods' by name: means over the
    global batch, unweighted}).

    Images are encoded once for both. Texts are encoded again, with their pivots: what `UnifiedObjective`
    makes of them are unit vectors, and terms are about vectors of any length.
    """

    def __init__(self, unified: UnifiedObjective, terms: Mapping[str, Term]):
        super().__init__()
        self.model, self.unified, self.terms = unified.model, unified, terms

    @property
    def has_unused_parameters(self) -> bool:
        return self.unified.has_unused_parameters

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        part = batch["image_text"]
        if "states" not in part:
            with torch.set_grad_enabled(self.unified.config.train_vision and torch.is_grad_enabled()):
                part = {**part, "states": self.model.encode_images(part["images"])}
        loss, values = self.unified({**batch, "image_text": part})
        # without gradient: what clamps the temperature asks all terms together, once a step
        # (`raylib.distributed.clamp_parameter`)
        temperature = self.model.temperature.detach().clamp(*self.unified.config.temperature)
        outputs = embed(self.model, part, temperature)
        examples = all_reduce(torch.tensor(float(len(part["image_id"])), device=loss.device))
        shares = torch.stack(term_shares(self.terms.values(), outputs, part, examples))
        weights = torch.tensor([term.weight for term in self.terms.values()], device=loss.device)
        added = dict(zip(self.terms, all_reduce(shares).unbind(), strict=True))
        return loss + (weights * shares).sum() * world_size(), {**values, **added}


def embed(model: nn.Module, part: dict, temperature: Tensor) -> Outputs:
    """Embeddings of a batch's images, texts and, where there are any, the texts' pivots; temperature: (1,),
    of `Outputs.contrast`."""
    texts = [Ragged(part["text"].clean, part["text"].lengths), *([part["pivot"]] if "pivot" in part else [])]
    if "states" in part:  # of a frozen image encoder that ran before, or of this step's
        dtype = next(model.parameters()).dtype
        states = part["states"].with_values(part["states"].values.to(dtype))
    else:
        states = model.encode_images(part["images"])
    image = model.embed_images(states, normalize=False).float()
    text, *pivot = (
        model.embed_text(concatenate(texts), normalize=False).float().split([len(t.lengths) for t in texts])
    )
    return Outputs(
        image_embeddings=image,
        text_embeddings=text,
        pivot_embeddings=pivot[0] if pivot else None,
        contrast=_contrast(part, temperature),
    )


def _contrast(part: dict, temperature: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Rows of the global batch in one order on any number of workers."""
    pairs = align_pairs(part["index"], part["image_id"], part["text"].text_id)

    def contrast(queries: Tensor, keys: Tensor) -> Tensor:
        queries, keys = (nn.functional.normalize(x, dim=1) for x in (queries, keys))
        mask = pairs.logit_mask(queries.dtype)
        return info_nce(queries, pairs.gather(keys), pairs.positive, mask, temperature.to(queries))[0]

    return contrast

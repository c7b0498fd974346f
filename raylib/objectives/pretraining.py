"""The four terms of paper 2 over one batch: L = UCL + MLM + ITM, in one forward of one module.

The step's journey:
1. every sentence of every stream goes through the text encoder in one call, every picture through the ViT;
2. CLS states become unit vectors; those of all workers are the candidates of UCL and of the hard negatives;
3. image-text rows (masked captions with their picture, with a wrong picture, wrong captions with the picture)
   go through the unified encoder in one call: the first third serves both VLM and the positives of ITM;
4. translation pairs, each side grounded in the other, go through it in a second call (TLM), mono text in a
   third (xMLM);
5. the masked positions of all of them go through the vocabulary head in one call.

Terms are sums over local rows, divided by counts over all workers and multiplied by the number of workers
(see `raylib.distributed`): a mean over the global batch, never a mean of means.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from raylib.config import Config
from raylib.distributed import clamp, gather, gather_ragged, total, world_size
from raylib.models.layers import Condition
from raylib.models.unified import UnifiedModel
from raylib.objectives.contrastive import contrastive, hard_negatives, masked_language
from raylib.objectives.language import KnownTexts, Side
from raylib.packed import Ragged, concatenate, first_tokens


class Weights(Config):
    """Weight of each term; 0 leaves it, and what only it needs, out."""

    ucl_image: NonNegativeFloat = 1.0
    ucl_translation: NonNegativeFloat = 1.0
    vlm: NonNegativeFloat = 1.0
    tlm: NonNegativeFloat = 1.0
    xmlm: NonNegativeFloat = 1.0
    itm: NonNegativeFloat = 1.0


STREAM_TERMS = {
    "image_text": ("ucl_image", "vlm", "itm"),
    "parallel": ("ucl_translation", "tlm"),
    "text": ("xmlm",),
}


class ObjectiveConfig(Config):
    """Defaults follow the paper's equations; the other value of each choice is what its public code does."""

    weights: Weights = Weights()
    ucl_text: Literal["clean", "masked"] = "clean"
    itm_text: Literal["masked", "clean"] = "masked"
    tlm_source: Literal["clean", "masked"] = "clean"
    directions: Literal["sum", "mean"] = "sum"
    train_vision: bool = True
    train_embeddings: bool = (
        True  # those of words, which a small corpus would pull away from all words that it lacks
    )
    frozen_text_layers: NonNegativeInt = 0  # the lowest ones of the text encoder, for the same reason
    temperature: tuple[float, float] = (0.001, 0.5)
    fuse_every: PositiveInt = (
        1  # VLM, ITM and TLM see the pairs whose index is a multiple of it; UCL sees them all
    )

    def on(self, streams: Iterable[str]) -> "ObjectiveConfig":
        """The same objective where only these streams are: the terms of the others weigh 0."""
        absent = [term for name, terms in STREAM_TERMS.items() if name not in streams for term in terms]
        return self.model_copy(update={"weights": self.weights.model_copy(update=dict.fromkeys(absent, 0.0))})


class UnifiedObjective(nn.Module):
    """`forward(batch)` -> (total loss of this worker to call backward on, {term: its mean over the global
    batch})."""

    def __init__(self, model: UnifiedModel, config: ObjectiveConfig, caption_length: int = 35):
        """`caption_length`: no caption of any worker is longer, in tokens."""
        super().__init__()
        self.model, self.config, self.caption_length = model, config, caption_length
        if not config.train_vision:
            model.vision.requires_grad_(False)
        if not config.train_embeddings:
            model.embedding.requires_grad_(False)
        model.text.blocks[: config.frozen_text_layers].requires_grad_(False)
        frozen = not any(p.requires_grad for part in (model.embedding, model.text) for p in part.parameters())
        self.known = KnownTexts() if frozen and model.config.dropout == 0 else None

    @property
    def partial(self) -> bool:
        """Whether some parameters get no gradient, because a term that alone uses them is left out."""
        return 0 in self.config.weights.model_dump().values()

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        c, w = self.config, self.config.weights
        caption, pair, mono = None, [], None
        if (image_text := batch.get("image_text")) and (w.ucl_image or w.vlm or w.itm):
            caption = Side(image_text["text"], image_text["index"], c.fuse_every)
            fuse = ({"masked"} if w.vlm else set()) | ({c.itm_text} if w.itm else set())
            caption.plan(c.ucl_text if w.ucl_image or w.itm else None, fuse)
        if (parallel := batch.get("parallel")) and (w.ucl_translation or w.tlm):
            pair = [Side(parallel[name], parallel["index"], c.fuse_every) for name in ("source", "target")]
            for side in pair:
                side.plan(
                    c.ucl_text if w.ucl_translation else None, {"masked", c.tlm_source} if w.tlm else set()
                )
        if "text" in batch and w.xmlm:
            mono = Side(batch["text"]["text"], batch["text"]["index"], 1)
            mono.plan(None, {"masked"})
        self._encode([side for side in (caption, *pair, mono) if side])
        exact = torch.promote_types(self.model.temperature.dtype, torch.float32)
        temperature = clamp(self.model.temperature.to(exact), *c.temperature)
        parts: list[_Part] = []
        if caption:
            parts += self._image_text(image_text, caption, temperature)
        if pair:
            parts += self._translation(parallel, pair, temperature)
        if mono:
            states = self.model.fuse(mono.rows("masked"), mono.few.predicted())
            parts.append(_Part("xmlm", states, len(states), mono.few.labels))
        return self._weigh(parts)

    def _encode(self, sides: list[Side]) -> None:
        """All sentences through the text encoder at once; its last layer only where it is read."""
        passes = []
        for side in sides:
            for name, p in side.passes.items():
                if self.known and name == "clean" and p.only_cls:
                    p.states = self.known.cls(side.all.text_id, lambda rows, p=p: self._cls(p.ids.take(rows)))
                else:
                    passes.append(p)
        if not passes:
            return
        states = self.model.encode_text(
            concatenate([p.ids for p in passes]), torch.cat([p.read for p in passes])
        )
        for p, part in zip(passes, states.split([int(p.read.sum()) for p in passes]), strict=True):
            p.states = part

    @torch.no_grad()
    def _cls(self, ids: Ragged) -> Tensor:
        """CLS states (n, d) of an encoder that never changes."""
        return self.model.encode_text(ids, first_tokens(ids.lengths))

    def _image_text(self, batch: dict, caption: Side, temperature: Tensor) -> list:
        c, w = self.config, self.config.weights
        if "states" in batch:  # of a frozen image encoder that ran before
            images = batch["states"].with_values(
                batch["states"].values.to(self.model.match_head.weight.dtype)
            )
        else:
            with torch.set_grad_enabled(c.train_vision and torch.is_grad_enabled()):
                images = self.model.encode_images(batch["images"])
        parts, drawn = [], None
        if w.ucl_image or w.itm:
            cls = images.values.index_select(0, images.starts.to(images.values.device))
            vectors = self.model.embed_images(cls), self.model.embed_text(caption.passes[c.ucl_text].cls())
            ids = batch["image_id"], caption.all.text_id
            terms, drawn = self._contrastive("ucl_image", temperature, *vectors, batch["index"], *ids)
            parts += terms if w.ucl_image else []
        if w.vlm or w.itm:
            parts += self._grounded(batch["draws"], caption, images, drawn)
        return parts

    def _contrastive(self, name, temperature, left, right, index, left_id, right_id) -> tuple[list, "_Drawn"]:
        """UCL both ways; and what hard negatives are drawn by."""
        # the global batch in one order on any number of workers; few calls, since each waits for the slowest
        # worker
        everywhere, left_ids, right_ids = gather(
            torch.stack([index.to(left.device), left_id, right_id], 1)
        ).unbind(1)
        everywhere, order = everywhere.sort()
        both = gather(torch.cat([left, right], 1)).index_select(0, order)
        all_left, all_right = both.split([left.shape[1], right.shape[1]], 1)
        index = index.to(
            left.device
        ).contiguous()  # a worker's share is every W-th row: searchsorted would warn
        positive = torch.searchsorted(everywhere, index)
        same = (left_id[:, None] == left_ids[order]) | (right_id[:, None] == right_ids[order])
        own = torch.zeros_like(same).scatter_(1, positive[:, None], True)
        excluded = torch.zeros(same.shape, dtype=temperature.dtype, device=same.device).masked_fill_(
            same & ~own, -torch.inf
        )
        left_loss, by_left = contrastive(left, all_right, positive, excluded, temperature)
        right_loss, by_right = contrastive(right, all_left, positive, excluded, temperature)
        parts = [_Part(name, left_loss, len(left)), _Part(name, right_loss, len(left))]
        return parts, _Drawn(by_left, by_right, same | own, index, everywhere)

    def _grounded(self, draws: Tensor, caption: Side, images: Ragged, drawn: "_Drawn | None") -> list:
        """VLM and ITM: the fused captions through the unified encoder, grounded in pictures."""
        c, w, b = self.config, self.config.weights, len(caption.fused)
        own, seen = torch.arange(b), images.take(caption.fused)
        shared = w.itm > 0 and c.itm_text == "masked"  # the VLM pass is then the positive pass of ITM
        cls = first_tokens(caption.few.lengths)
        texts, reads, rows = [], [], []
        if w.itm:
            positive = caption.rows(c.itm_text)
            seen, own, wrong_image, wrong_text, exists = self._negatives(
                draws, positive, caption, seen, drawn
            )
        if w.vlm or shared:
            read = caption.few.predicted() if w.vlm else torch.zeros_like(cls)
            texts, reads, rows = [caption.rows("masked")], [read | cls if shared else read], [own]
        if w.itm:
            if not shared:
                texts, reads, rows = [*texts, positive], [*reads, cls], [*rows, own]
            texts, rows = [*texts, positive, wrong_text], [*rows, wrong_image, own]
            reads = [*reads, cls, first_tokens(wrong_text.lengths)]
        states = self.model.fuse(concatenate(texts), torch.cat(reads), Condition(seen, torch.cat(rows)))
        parts, device = [], states.device
        if w.itm:
            is_cls = first_tokens(torch.cat([t.lengths for t in texts]))[torch.cat(reads)]
            heads = states.index_select(0, is_cls.nonzero().squeeze(1).to(device))[-3 * b :]
            logits = F.log_softmax(self.model.match_head(heads).float(), -1)
            wrong = -(logits[b:, 0].view(2, b) * exists).sum()
            parts += [_Part("itm", -logits[:b, 1].sum(), b), _Part("itm", wrong, exists.sum())]
        if w.vlm:
            here = caption.few.predicted()[reads[0]].nonzero().squeeze(1).to(device)
            parts.append(_Part("vlm", states.index_select(0, here), len(here), caption.few.labels))
        return parts

    def _negatives(self, draws: Tensor, positive: Ragged, caption: Side, images: Ragged, drawn: "_Drawn"):
        """Hard negatives among the fused pairs of the global batch, both ways.

        Returns: the pictures that this worker needs, once each; for its b rows the picture of their own and a
        wrong one (rows among those pictures), a wrong caption each; and (2, b) whether [wrong picture, wrong
        caption] exists.
        """
        device, tokens = positive.values.device, int(images.lengths[0])
        by_image, by_text, forbidden, index, everywhere = drawn.among(
            caption.fused.to(device), self.config.fuse_every
        )
        draws = draws.index_select(0, caption.fused.to(device))
        wrong_text, text_exists = hard_negatives(by_image, forbidden, draws[:, 0])
        wrong_image, image_exists = hard_negatives(by_text, forbidden, draws[:, 1])
        place, order = torch.searchsorted(everywhere, index), gather(index).argsort()
        # the one wait for the device in a step: the wrong captions' lengths decide how attention runs
        *chosen, order = (
            torch.cat([wrong_text, wrong_image, place, order]).cpu().split([len(place)] * 3 + [len(order)])
        )
        wrong_text, wrong_image, place = chosen
        every_text = gather_ragged(positive, self.caption_length)
        every_image = Ragged(gather(images.values), torch.full((len(order),), tokens))
        needed, rows = torch.cat([place, wrong_image]).unique(return_inverse=True)
        own, wrong = rows.split(len(place))
        exists = torch.stack([image_exists, text_exists])
        return every_image.take(order[needed]), own, wrong, every_text.take(order[wrong_text]), exists

    def _translation(self, batch: dict, pair: list[Side], temperature: Tensor) -> list:
        c, w, parts = self.config, self.config.weights, []
        source, target = pair
        if w.ucl_translation:
            vectors = [self.model.embed_text(side.passes[c.ucl_text].cls()) for side in pair]
            ids = [side.all.text_id for side in pair]
            parts += self._contrastive("ucl_translation", temperature, *vectors, batch["index"], *ids)[0]
        if w.tlm:
            rows = concatenate([source.rows("masked"), target.rows("masked")])
            seen = concatenate([target.rows(c.tlm_source), source.rows(c.tlm_source)])
            read = torch.cat([side.few.predicted() for side in pair])
            states = self.model.fuse(rows, read, Condition(seen, torch.arange(len(seen.lengths))))
            for side, part in zip(pair, states.split([len(s.few.labels) for s in pair]), strict=True):
                parts.append(_Part("tlm", part, len(part), side.few.labels))
        return parts

    def _weigh(self, parts: list["_Part"]) -> tuple[Tensor, dict[str, Tensor]]:
        """Local parts -> this worker's share of the loss, and the terms of the global batch."""
        weights, device = self.config.weights.model_dump(), self.model.temperature.device
        averaged = ("ucl_image", "ucl_translation", "tlm") if self.config.directions == "mean" else ()
        counts = total(
            torch.stack([torch.as_tensor(part.count, dtype=torch.float32, device=device) for part in parts])
        )
        scales = [
            (0.5 if part.term in averaged else 1.0) / n
            for part, n in zip(parts, counts.clamp(min=1), strict=True)
        ]
        shares = {part.term: 0.0 for part in parts}
        for part, scale in zip(parts, scales, strict=True):
            if part.labels is None:
                shares[part.term] = shares[part.term] + scale * part.value
        masked = [
            (part, scale.expand(part.count))
            for part, scale in zip(parts, scales, strict=True)
            if part.labels is not None
        ]
        loss = sum(weights[term] * share for term, share in shares.items())
        if (
            masked
        ):  # all of them at once: the vocabulary is the largest matrix to read, and to write a gradient for
            head, word = self.model.masked_head, self.model.embedding.word
            states, labels = (
                torch.cat([getattr(part, name) for part, _ in masked]) for name in ("value", "labels")
            )
            scale = torch.cat([weights[part.term] * scale for part, scale in masked])
            value, losses = masked_language(head(states), word.weight, head.bias, labels, scale)
            loss = loss + value
            for (part, scale), each in zip(
                masked, losses.split([part.count for part, _ in masked]), strict=True
            ):
                shares[part.term] = shares[part.term] + (scale * each).sum()
        terms = total(torch.stack([share.detach().float() for share in shares.values()]))
        return loss * world_size(), dict(zip(shares, terms.unbind(), strict=True))


class _Part(NamedTuple):
    """A part of a term: the sum over `count` local rows; or, with `labels` (m,), the states (m, d) of masked
    positions, of which the vocabulary head makes the sum. Several parts of one term add up."""

    term: str
    value: Tensor
    count: Tensor | int
    labels: Tensor | None = None


class _Drawn(NamedTuple):
    """What hard negatives are drawn by: similarities (b, B) of local pictures to all captions and of local
    captions to all pictures, over the temperature; `forbidden` (b, B); index in the global batch of the rows
    (b,), columns (B,)."""

    by_image: Tensor
    by_text: Tensor
    forbidden: Tensor
    index: Tensor
    everywhere: Tensor

    def among(self, rows: Tensor, every: int) -> "_Drawn":
        """The same for local `rows` and the columns whose index is a multiple of `every`."""
        if every == 1:
            return self
        columns = (self.everywhere % every == 0).nonzero().squeeze(1)
        tables = [
            t.index_select(0, rows).index_select(1, columns)
            for t in (self.by_image, self.by_text, self.forbidden)
        ]
        return _Drawn(*tables, self.index[rows], self.everywhere[columns])

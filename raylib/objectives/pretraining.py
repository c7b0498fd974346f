"""The objective of paper 2 over one batch: L = UCL + MLM + ITM, in one forward of one module.

A batch's journey, as the file reads:

1. encode: every sentence of every stream goes through the text encoder in one call (`_encode_texts`), every
   image through the image encoder;
2. contrast: CLS states become unit vectors; those of all workers are the candidates of UCL and of the
   negatives;
3. negatives: each fused pair gets a wrong image and a wrong caption, hard ones of the global batch;
4. fuse: image-text rows (masked captions with their image, captions with a wrong image, wrong captions with
   the image) go through the unified encoder in one call, translation pairs, each side grounded in the other,
   in a second, mono text in a third;
5. heads: each term (`TERMS` is the table of them) takes its part of these states;
6. weigh: the masked positions of all terms go through the vocabulary head in one call, and sums are divided.

Terms are sums over local rows, divided by counts over all workers and multiplied by the number of workers
(see `raylib.distributed`): a mean over the global batch, never a mean of means. Steps are lazy: what no term
asks for is not computed.

Shape legend: b local rows, n rows of a stream, d width, e embedding width, m masked positions.
"""

from collections.abc import Collection, Sequence, Set
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raylib.config import lookup
from raylib.distributed import all_reduce, clamp_parameter, world_size
from raylib.engine import Objective
from raylib.errors import UserError
from raylib.models.layers import Memory
from raylib.models.unified import UnifiedModel
from raylib.models.vocabulary import vocabulary_loss
from raylib.objectives import (
    FrozenTextCache,
    LossPart,
    MaskedPart,
    Negatives,
    PairContrast,
    Parts,
    PretrainingTerm,
    Reads,
    Stream,
    align_pairs,
    contrast_pairs,
    find_negatives,
    score_pairs,
    term,
)
from raylib.objectives.sigmoid import sigmoid_contrast
from raylib.packed import (
    EncoderRows,
    Ragged,
    Sentences,
    StreamEncoding,
    Version,
    concatenate,
    encode_together,
    first_tokens,
)
from raylib.precision import exact_linear
from raylib.settings import ObjectiveConfig, TermWeights

# ---- encode, contrast, negatives, fuse: a step of each stream


class StreamStep:
    """A stream's part of a batch, on its way to the terms; `reads`: what these want of it."""

    def __init__(self, objective: "UnifiedObjective", batch: dict, reads: Set[Reads], temperature: Tensor):
        self.model, self.config = objective.model, objective.config
        self.batch, self.reads, self.temperature = batch, reads, temperature
        self.encodings: list[StreamEncoding] = []

    def plan(self, sentences: Sentences, fused: Set[Version], every: int) -> StreamEncoding:
        """Sentences for the text encoder, in the versions that the terms read."""
        # ITM reads embeddings too: similarities choose its negatives
        embedded = self.config.ucl_text if {"embeddings", "matches"} & self.reads else None
        self.encodings.append(StreamEncoding(sentences, self.batch["index"], every, embedded, fused))
        return self.encodings[-1]

    def contrast_sides(self, left: Tensor, right: Tensor, left_id: Tensor, right_id: Tensor) -> PairContrast:
        """Contrast unit vectors (b, e) of both sides, by ids (b,) of their content."""
        index, bias = self.batch["index"], self.model.contrast_bias
        if bias is None or self.config.contrast == "softmax":
            return contrast_pairs(left, right, align_pairs(index, left_id, right_id), self.temperature)
        # a sum over pairs is the same from either side
        loss = sigmoid_contrast(left, right, torch.stack([left_id, right_id], 1), self.temperature, bias)
        scores = None
        if "matches" in self.reads:
            scores = score_pairs(left, right, align_pairs(index, left_id, right_id), self.temperature)
        return PairContrast(loss, loss, len(left), scores)

    def fuse(self, groups: dict[str, EncoderRows], memory: Memory) -> dict[str, EncoderRows]:
        """Groups of rows through the unified encoder in one call, grounded in `memory`."""
        encode_together(list(groups.values()), lambda rows, mask: self.model.fuse(rows, mask, memory))
        return groups


class ImageTextStep(StreamStep):
    """Images with captions."""

    def __init__(self, *parts) -> None:
        super().__init__(*parts)
        fused: set[Version] = {"masked"} if "masked" in self.reads else set()
        if "matches" in self.reads:
            fused.add(self.config.itm_text)
        self.captions = self.plan(self.batch["text"], fused, self.config.fuse_every)

    @cached_property
    def images(self) -> Ragged:
        """States of the images, CLS first."""
        if "states" in self.batch:  # of a frozen image encoder that ran before
            states = self.batch["states"]
            return states.with_values(states.values.to(self.model.match_head.weight.dtype))
        with torch.set_grad_enabled(self.config.train_vision and torch.is_grad_enabled()):
            return self.model.encode_images(self.batch["images"])

    @cached_property
    def contrast(self) -> PairContrast:
        """Images against captions."""
        return self.contrast_sides(
            self.model.embed_images(self.images, normalize=True),
            self.model.embed_text_states(self.captions.cls(), normalize=True),
            self.batch["image_id"],
            self.captions.full.text_id,
        )

    @cached_property
    def negatives(self) -> Negatives:
        captions = self.captions.subset_states(self.config.itm_text)
        rows, scores = self.captions.subset_rows.to(captions.values.device), self.contrast.scores
        assert scores is not None, "matches are read"
        return find_negatives(
            self.images.select_rows(self.captions.subset_rows),
            captions,
            scores.subset(rows, self.config.fuse_every),
            self.batch["negative_uniforms"].index_select(0, rows),
        )

    @cached_property
    def cls_tokens(self) -> Tensor:
        """(T,) CLS of the fused captions."""
        return first_tokens(self.captions.subset.lengths)

    @cached_property
    def fused(self) -> dict[str, EncoderRows]:
        """Captions grounded in images: "masked" and "clean" in their own, "wrong_image", "wrong_caption"."""
        captions, positive = self.captions, self.config.itm_text
        outputs: dict[Version, Tensor] = {}
        if "masked" in self.reads:
            outputs["masked"] = captions.subset.predicted()
        if "matches" in self.reads:
            negatives = self.negatives
            images, positive_image = negatives.images, negatives.positive_image
            # where ITM reads masked captions too, the pass that predicts their words is its positive pass
            outputs[positive] = outputs.get(positive, torch.zeros_like(self.cls_tokens)) | self.cls_tokens
        else:
            images = self.images.select_rows(captions.subset_rows)
            positive_image = torch.arange(len(captions.subset_rows))
        groups: dict[str, EncoderRows] = {}
        image_rows = []  # which of `images` each row of the groups attends to
        for version, mask in outputs.items():
            text = negatives.captions if version == "clean" else captions.subset_states(version)
            groups[version] = EncoderRows(text, mask)
            image_rows.append(positive_image)
        if "matches" in self.reads:
            groups["wrong_image"] = EncoderRows(negatives.captions, self.cls_tokens)
            wrong = negatives.wrong_captions
            groups["wrong_caption"] = EncoderRows(wrong, first_tokens(wrong.lengths))
            image_rows += [negatives.wrong_image, positive_image]
        return self.fuse(groups, Memory(images, torch.cat(image_rows)))


class TranslationStep(StreamStep):
    """Sentences with their translations."""

    def __init__(self, *parts) -> None:
        super().__init__(*parts)
        fused: set[Version] = {"masked", self.config.tlm_source} if "masked" in self.reads else set()
        self.source = self.plan(self.batch["source"], fused, self.config.fuse_every)
        self.target = self.plan(self.batch["target"], fused, self.config.fuse_every)

    @cached_property
    def contrast(self) -> PairContrast:
        """Sentences against translations."""
        return self.contrast_sides(
            self.model.embed_text_states(self.source.cls(), normalize=True),
            self.model.embed_text_states(self.target.cls(), normalize=True),
            self.source.full.text_id,
            self.target.full.text_id,
        )

    @cached_property
    def fused(self) -> dict[str, EncoderRows]:
        """Masked "source" sentences grounded in target sentences, masked "target" in source sentences."""
        source, target, context = self.source, self.target, self.config.tlm_source
        groups = {
            "source": EncoderRows(source.subset_states("masked"), source.subset.predicted()),
            "target": EncoderRows(target.subset_states("masked"), target.subset.predicted()),
        }
        # what the source sentences attend to, then what the target sentences do, in the order of `groups`
        contexts = concatenate([target.subset_states(context), source.subset_states(context)])
        return self.fuse(groups, Memory(contexts, torch.arange(len(contexts.lengths))))


class TextStep(StreamStep):
    """Sentences of one language each."""

    def __init__(self, *parts) -> None:
        super().__init__(*parts)
        self.sentences = self.plan(self.batch["text"], {"masked"} if "masked" in self.reads else set(), 1)

    @cached_property
    def fused(self) -> Tensor:
        """(m, d) of the masked positions after the unified encoder, which sees nothing else."""
        return self.model.fuse(self.sentences.subset_states("masked"), self.sentences.subset.predicted())


STEPS: dict[Stream, type[StreamStep]] = {
    "image_text": ImageTextStep,
    "parallel": TranslationStep,
    "text": TextStep,
}


# ---- heads: the terms


IMAGES, SENTENCES = ("vision", "image_projection"), ("text_projection", "temperature", "contrast_bias")


@term("image_text", reads=("embeddings",), trains=(*IMAGES, *SENTENCES), two_way=True)
def image_contrast(step: ImageTextStep) -> Parts:
    """UCL of images and captions: each finds the other among all (equation 1)."""
    return _both_ways(step.contrast)


@term("image_text", reads=("matches",), trains=("vision", "fusion", "cross", "match_head"))
def image_text_matching(step: ImageTextStep) -> Parts:
    """ITM: does a caption belong to an image? One right pair, two hard wrong ones (equation 3)."""
    right, wrong, has_wrong = match_log_chances(step)
    return [
        LossPart(-right[:, 1].sum(), len(right)),
        LossPart(-(wrong[..., 0] * has_wrong).sum(), has_wrong.sum()),
    ]


def match_log_chances(step: ImageTextStep) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities of (no match, match) for the right pairs (b, 2), and for those with a wrong
    image and with a wrong caption (2, b, 2); whether these have one (2, b)."""
    fused, negatives = step.fused, step.negatives
    groups = [fused[name] for name in (step.config.itm_text, "wrong_image", "wrong_caption")]
    states = torch.cat([group.states_at(group.rows.starts) for group in groups])
    # a trained head's logits are large, where bf16 is 1/16 apart
    logits = exact_linear(step.model.match_head, states).float()
    log_chances = F.log_softmax(logits, -1).view(len(groups), -1, 2)
    return log_chances[0], log_chances[1:], torch.stack([negatives.has_image, negatives.has_caption])


@term("image_text", reads=("masked",), trains=("vision", "fusion", "cross", "masked_head"))
def masked_captions(step: ImageTextStep) -> Parts:
    """VLM: masked words of captions, in the light of their image (equation 2)."""
    captions = step.captions.subset
    return [MaskedPart(step.fused["masked"].states_at(captions.positions), captions.labels)]


@term("parallel", reads=("embeddings",), trains=SENTENCES, two_way=True)
def translation_contrast(step: TranslationStep) -> Parts:
    """UCL of sentences and translations."""
    return _both_ways(step.contrast)


@term("parallel", reads=("masked",), trains=("fusion", "cross", "masked_head"), two_way=True)
def masked_translations(step: TranslationStep) -> Parts:
    """TLM: masked words of either side, in the light of the other."""
    sides = {"source": step.source.subset, "target": step.target.subset}
    return [
        MaskedPart(step.fused[name].states_at(sentences.positions), sentences.labels)
        for name, sentences in sides.items()
    ]


@term("text", reads=("masked",), trains=("fusion", "masked_head"))
def masked_text(step: TextStep) -> Parts:
    """xMLM: masked words of plain text."""
    return [MaskedPart(step.fused, step.sentences.subset.labels)]


def _both_ways(contrast: PairContrast) -> Parts:
    return [LossPart(loss, contrast.count) for loss in (contrast.left_to_right, contrast.right_to_left)]


TERMS: dict[
    str, PretrainingTerm
] = {  # by their weights in `TermWeights`; in its order they are computed and added
    "ucl_image": image_contrast,
    "itm": image_text_matching,
    "vlm": masked_captions,
    "ucl_translation": translation_contrast,
    "tlm": masked_translations,
    "xmlm": masked_text,
}
assert list(TERMS) == list(TermWeights.model_fields)


class UnifiedObjective(Objective):
    """`forward(batch)` -> (total loss of this worker to call backward on, {term: its mean over the global
    batch})."""

    model: UnifiedModel

    def __init__(
        self,
        model: UnifiedModel,
        config: ObjectiveConfig,
        streams: Collection[str] = tuple(STEPS),
    ):
        """`streams`: those that batches have; terms of the others are left out."""
        super().__init__()
        self.model, self.config = model, config
        self.weights = {name: weight for name, weight in config.all_weights().items() if weight}
        terms = {**TERMS, **{name: term.load() for name, term in config.terms.items()}}
        self.terms = {name: terms[name] for name in self.weights if terms[name].stream in streams}
        self.users = frozenset(name for name, _ in config.terms.items())
        groups = dict.fromkeys(module_group(name) for name, _ in model.named_parameters())
        for name in self.users:
            for part in terms[name].trains:
                lookup(part, groups, f"part of the model that objective.terms.{name} trains:")
        if config.contrast == "sigmoid":
            model.add_contrast_bias()
        elif model.contrast_bias is not None:
            model.contrast_bias.requires_grad_(False)
        if not config.train_vision:
            model.vision.requires_grad_(False)
        if not config.train_embeddings:
            model.embedding.requires_grad_(False)
        model.text.blocks[: config.frozen_text_layers].requires_grad_(False)
        text_parameters = (*model.embedding.parameters(), *model.text.parameters())
        frozen = not any(p.requires_grad for p in text_parameters) and model.config.dropout == 0
        self.frozen_texts = FrozenTextCache() if frozen else None

    @property
    def has_unused_parameters(self) -> bool:
        """True if some parameters get no gradient, because no term that uses them is on."""
        trained = {"embedding", "text", *(part for term in self.terms.values() for part in term.trains)}
        return any(
            p.requires_grad and module_group(name) not in trained for name, p in self.model.named_parameters()
        )

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        exact = torch.promote_types(self.model.temperature.dtype, torch.float32)
        temperature = clamp_parameter(self.model.temperature.to(exact), *self.config.temperature)
        on = {name: entry for name, entry in self.terms.items() if entry.stream in batch}
        steps = {}
        for stream, make_step in STEPS.items():
            if reads := {read for entry in on.values() if entry.stream == stream for read in entry.reads}:
                steps[stream] = make_step(self, batch[stream], reads, temperature)
        self._encode_texts([encoding for step in steps.values() for encoding in step.encodings])
        parts = {name: entry.loss(steps[entry.stream]) for name, entry in on.items()}
        for name in self.users & parts.keys():
            check_parts(name, parts[name])
        return self._weigh(parts)

    def _encode_texts(self, encodings: list[StreamEncoding]) -> None:
        """All sentences through the text encoder at once; its last layer only where its output is used."""
        calls = []
        for encoding in encodings:
            for version, call in encoding.calls.items():
                if self.frozen_texts and version == "clean" and encoding.only_cls:
                    encode = partial(self._encode_cls, call.rows)
                    call.states = self.frozen_texts.cls(encoding.full.text_id, encode)
                else:
                    calls.append(call)
        if calls:
            encode_together(calls, self.model.encode_text)

    @torch.no_grad()
    def _encode_cls(self, sentences: Ragged, rows: Tensor) -> Tensor:
        """CLS states (n, d) of some sentences, of an encoder that never changes."""
        ids = sentences.select_rows(rows)
        return self.model.encode_text(ids, first_tokens(ids.lengths))

    # ---- weigh

    def _weigh(self, parts: dict[str, Parts]) -> tuple[Tensor, dict[str, Tensor]]:
        """Local parts -> this worker's share of the loss, and the terms of the global batch."""
        device = self.model.temperature.device
        flat = [(name, part) for name, several in parts.items() for part in several]
        counts = [part.count if isinstance(part, LossPart) else len(part.labels) for _, part in flat]
        # one reduction for the counts of all parts
        local = torch.stack([torch.as_tensor(n, dtype=torch.float32, device=device) for n in counts])
        # a two-way term is a sum over both directions; its mean is half of that
        halved = {name for name in parts if self.terms[name].two_way and self.config.directions == "mean"}
        shares: dict[str, Any] = dict.fromkeys(parts, 0.0)
        masked: list[tuple[str, MaskedPart, Tensor]] = []
        for (name, part), divisor in zip(flat, all_reduce(local).clamp(min=1), strict=True):
            scale = (0.5 if name in halved else 1.0) / divisor
            if isinstance(part, LossPart):
                shares[name] = shares[name] + scale * part.value
            else:
                masked.append((name, part, scale.expand(len(part.labels))))
        loss = sum(self.weights[name] * share for name, share in shares.items())
        if masked:
            # all of them at once: the vocabulary is the largest matrix to read, and to write a gradient for
            head, word = self.model.masked_head, self.model.embedding.word
            states = torch.cat([part.states for _, part, _ in masked])
            labels = torch.cat([part.labels for _, part, _ in masked])
            scale = torch.cat([self.weights[name] * scale for name, _, scale in masked])
            value, losses = vocabulary_loss(head(states), word.weight, head.bias, labels, scale)
            loss = loss + value
            each = losses.split([len(part.labels) for _, part, _ in masked])
            for (name, _, scale), part_losses in zip(masked, each, strict=True):
                shares[name] = shares[name] + (scale * part_losses).sum()
        terms = all_reduce(torch.stack([share.detach().float() for share in shares.values()]))
        return loss * world_size(), dict(zip(shares, terms.unbind(), strict=True))


def check_parts(name: str, parts: Any) -> None:
    """Raise UserError unless a user's term has returned parts of a loss."""
    known = isinstance(parts, Sequence) and all(isinstance(part, LossPart | MaskedPart) for part in parts)
    if not known:
        raise UserError(
            f"objective.terms.{name} returned {type(parts).__name__}; wanted a list of LossPart or MaskedPart"
        )
    # rows that are not summed would be broadcast against the other parts, or fail far from the user's file
    for part in parts:
        if isinstance(part, LossPart) and part.value.ndim:
            raise UserError(
                f"objective.terms.{name}: a LossPart has a value of shape {tuple(part.value.shape)}; wanted "
                "a sum, (), and beside it the count of what it is a sum over"
            )


def module_group(parameter: str) -> str:
    """The part of a `UnifiedModel` that a parameter belongs to: its first name, or "cross", which only rows
    that are grounded in something pass."""
    return "cross" if ".cross_" in parameter else parameter.partition(".")[0]

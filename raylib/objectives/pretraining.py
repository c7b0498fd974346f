"""The objective of paper 2 over one batch: L = UCL + MLM + ITM, in one forward of one module.

A batch's journey, as the file reads:

1. plan: lengths and positions, which are on the CPU, say which token goes where and how attention runs; all
   that follows from them travels to the device in one copy (`raylib.packed.Uploads`), and a step waits for
   the device once, for the choice of negatives;
2. encode: every sentence of every stream goes through the text encoder in one call (`_encode_texts`), every
   image through the image encoder;
3. contrast: CLS states become unit vectors; those of all workers are the candidates of UCL and of the
   negatives;
4. negatives: each fused pair gets a wrong image and a wrong caption, hard ones of the global batch;
5. fuse: image-text rows (masked captions with their image, captions with a wrong image, wrong captions with
   the image) go through the unified encoder in one call, translation pairs, each side grounded in the other,
   in a second, mono text in a third;
6. heads: each term (`TERMS` is the table of them) takes its part of these states;
7. weigh: the masked positions of all terms go through the vocabulary head in one call, and sums are divided.

Terms are sums over local rows, divided by counts over all workers and multiplied by the number of workers
(see `raylib.distributed`): a mean over the global batch, never a mean of means. Steps are lazy: what no term
asks for is not computed.

Shape legend: b local rows, n rows of a stream, d width, e embedding width, m masked positions.
"""

from collections.abc import Collection, Mapping, Sequence, Set
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raylib.config import lookup
from raylib.distributed import all_reduce, clamp_parameter, count_rows, world_size
from raylib.engine import Objective
from raylib.errors import UserError
from raylib.models.heads import vocabulary_loss
from raylib.models.layers import MemoryLayout
from raylib.models.unified import UnifiedModel
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
from raylib.objectives.encoding import EncoderCall, EncoderRows, StreamEncoding
from raylib.objectives.sigmoid import sigmoid_contrast
from raylib.packed import Ragged, Sentences, Upload, Uploads, first_tokens, row_starts, upload
from raylib.settings import ObjectiveConfig, TermWeights, Version

FROZEN_TOKENS = 512  # that a GPU encodes together of a frozen encoder

# ---- plan, encode, contrast, negatives, fuse: a step of each stream


class StreamStep:
    """A stream's part of a batch, on its way to the terms; `reads`: what these want of it. Planned when it is
    made, run when something of it is asked for."""

    def __init__(
        self,
        objective: "UnifiedObjective",
        batch: dict,
        reads: Set[Reads],
        temperature: Tensor,
        uploads: Uploads,
    ):
        self.model, self.config = objective.model, objective.config
        self.batch, self.reads, self.temperature, self.uploads = batch, reads, temperature, uploads
        self.encodings: list[StreamEncoding] = []

    def plan_texts(self, sentences: Sentences, fused: Set[Version], every: int) -> StreamEncoding:
        """Sentences for the text encoder, in the versions that the terms read."""
        # ITM reads embeddings too: similarities choose its negatives
        embedded = self.config.ucl_text if {"embeddings", "matches"} & self.reads else None
        encoding = StreamEncoding(sentences, self.batch["index"], every, embedded, fused, self.uploads)
        self.encodings.append(encoding)
        return encoding

    def contrast_sides(self, left: Tensor, right: Tensor, pairs: Tensor) -> PairContrast:
        """Contrast unit vectors (b, e) of both sides; `pairs`: as of `align_pairs`."""
        bias = self.model.contrast_bias
        if bias is None or self.config.contrast == "softmax":
            aligned = align_pairs(pairs, self.batch["size"], self.config.contrast_groups)
            return contrast_pairs(left, right, aligned, self.temperature)
        # a sum over pairs is the same from either side
        counts, scores = count_rows(self.batch["size"]), None
        loss = sigmoid_contrast(left, right, pairs[:, 1:], counts, self.temperature, bias)
        if "matches" in self.reads:
            scores = score_pairs(left, right, align_pairs(pairs, self.batch["size"]), self.temperature)
        return PairContrast(loss, loss, len(left), scores)

    def plan_pairs(self, left_id: Tensor, right_id: Tensor) -> Upload:
        """Pairs for the contrast, as `align_pairs` takes them."""
        pairs = torch.stack([self.batch["index"], left_id, right_id], 1)
        if "truths" in self.batch:
            pairs = torch.cat([pairs, self.batch["truths"], self.batch["claims"]], 1)
        return self.uploads.add(pairs)

    def plan_fusion(
        self, groups: Mapping[str, EncoderRows], memory: MemoryLayout | None = None
    ) -> EncoderCall:
        """Groups of rows for the unified encoder in one call, grounded in `memory`."""
        return EncoderCall(self.model.fusion, list(groups.values()), self.uploads, memory)


class ImageTextStep(StreamStep):
    """Images with captions."""

    def __init__(self, *parts) -> None:
        super().__init__(*parts)
        fused: set[Version] = {"masked"} if "masked" in self.reads else set()
        if "matches" in self.reads:
            fused.add(self.config.itm_text)
        self.captions = self.plan_texts(self.batch["text"], fused, self.config.fuse_every)
        self._pairs = self.plan_pairs(self.batch["image_id"], self.captions.full.text_id)
        self._fused_captions = self.uploads.add((self.captions.subset_rows, self.captions.lengths))

    @cached_property
    def images(self) -> Ragged:
        """States of the images, CLS first."""
        if "states" in self.batch:  # of a frozen image encoder that ran before
            states = self.batch["states"]
            return states.with_values(states.values.to(self.model.text_projection.weight.dtype))
        with torch.set_grad_enabled(self.config.train_vision and torch.is_grad_enabled()):
            return self.model.encode_images(self.batch["images"])

    @cached_property
    def fused_images(self) -> Ragged:
        """Those of `images` whose captions are fused."""
        if self.config.fuse_every == 1:
            return self.images
        # equally long rows, so that numbers of rows, which have been planned, serve for tokens too
        states = self.images.values.unflatten(0, (len(self.images.lengths), -1))
        chosen = states.index_select(0, self._fused_captions.value[0]).flatten(0, 1)
        return Ragged(chosen, self.images.lengths[self.captions.subset_rows])

    @cached_property
    def contrast(self) -> PairContrast:
        """Images against captions."""
        return self.contrast_sides(
            self.model.embed_images(self.images, normalize=True),
            self.model.embed_text_states(self.captions.cls(), normalize=True),
            self._pairs.value,
        )

    @cached_property
    def negatives(self) -> Negatives:
        (rows, lengths), scores = self._fused_captions.value, self.contrast.scores
        assert scores is not None, "matches are read"
        return find_negatives(
            self.fused_images,
            Ragged(self.captions.states(self.config.itm_text), self.captions.lengths),
            lengths,
            scores.subset(rows, self.config.fuse_every),
            self.batch["negative_uniforms"].index_select(0, rows),
        )

    @cached_property
    def fused(self) -> dict[str, EncoderRows]:
        """Captions grounded in images: "masked" and "clean" in their own, "wrong_image", "wrong_caption". ITM
        reads the output "cls" of these, VLM the output "masked" of the masked ones."""
        captions, positive = self.captions, self.config.itm_text
        outputs: dict[Version, dict[str, Tensor]] = {}
        if "masked" in self.reads:
            outputs["masked"] = {"masked": captions.positions}
        images, own_image, negatives = self.fused_images, torch.arange(len(captions.lengths)), None
        if "matches" in self.reads:
            negatives = self.negatives
            images = negatives.images
            # where ITM reads masked captions too, the pass that predicts their words is its positive pass
            outputs[positive] = outputs.get(positive, {}) | {"cls": row_starts(captions.lengths)}
        groups: dict[str, EncoderRows] = {
            version: EncoderRows(captions.lengths, names, self.uploads) for version, names in outputs.items()
        }
        image_rows = [own_image] * len(groups)  # which of `images` each row of the groups attends to
        texts = [
            negatives.captions.values if negatives and version == "clean" else captions.states(version)
            for version in outputs
        ]
        if negatives:
            every, rows = negatives.all_captions, negatives.wrong_caption
            wrong, tokens = every.lengths[rows], self.uploads.add(every.token_index(rows))
            for name, lengths in (("wrong_image", captions.lengths), ("wrong_caption", wrong)):
                groups[name] = EncoderRows(lengths, {"cls": row_starts(lengths)}, self.uploads)
            image_rows += [negatives.wrong_image, own_image]
        call = self.plan_fusion(groups, MemoryLayout(images.lengths, torch.cat(image_rows)))
        if negatives:
            texts += [negatives.captions.values, every.values.index_select(0, tokens.value)]
        call.run(torch.cat(texts), images.values)
        return groups

    @cached_property
    def match_log_chances(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of (no match, match) for the right pairs (b, 2), and for those with a wrong image
        and with a wrong caption (2, b, 2); whether these have one (2, b)."""
        groups = [self.fused[name] for name in (self.config.itm_text, "wrong_image", "wrong_caption")]
        states = torch.cat([group.output("cls") for group in groups])
        logits = self.model.match_logits(states).float()
        log_chances = F.log_softmax(logits, -1).view(len(groups), -1, 2)
        has_wrong = torch.stack([self.negatives.has_image, self.negatives.has_caption])
        return log_chances[0], log_chances[1:], has_wrong


class TranslationStep(StreamStep):
    """Sentences with their translations."""

    def __init__(self, *parts) -> None:
        super().__init__(*parts)
        fused: set[Version] = {"masked", self.config.tlm_source} if "masked" in self.reads else set()
        self.source, self.target = (
            self.plan_texts(self.batch[name], fused, self.config.fuse_every) for name in ("source", "target")
        )
        self._pairs = self.plan_pairs(self.source.full.text_id, self.target.full.text_id)
        if "masked" in self.reads:
            sides = {"source": self.source, "target": self.target}
            self._groups = {
                name: EncoderRows(side.lengths, {"masked": side.positions}, self.uploads)
                for name, side in sides.items()
            }
            # what the source sentences attend to, then what the target sentences do
            lengths = torch.cat([self.target.lengths, self.source.lengths])
            self._fusion = self.plan_fusion(self._groups, MemoryLayout(lengths, torch.arange(len(lengths))))

    @cached_property
    def contrast(self) -> PairContrast:
        """Sentences against translations."""
        return self.contrast_sides(
            self.model.embed_text_states(self.source.cls(), normalize=True),
            self.model.embed_text_states(self.target.cls(), normalize=True),
            self._pairs.value,
        )

    @cached_property
    def fused(self) -> dict[str, EncoderRows]:
        """Masked "source" sentences grounded in target sentences, masked "target" in source sentences: the
        output "masked" of either."""
        context = self.config.tlm_source
        texts = torch.cat([side.states("masked") for side in (self.source, self.target)])
        contexts = torch.cat([side.states(context) for side in (self.target, self.source)])
        self._fusion.run(texts, contexts)
        return self._groups


class TextStep(StreamStep):
    """Sentences of one language each."""

    def __init__(self, *parts) -> None:
        super().__init__(*parts)
        self.sentences = self.plan_texts(
            self.batch["text"], {"masked"} if "masked" in self.reads else set(), 1
        )
        if "masked" in self.reads:
            outputs = {"masked": self.sentences.positions}
            self._rows = EncoderRows(self.sentences.lengths, outputs, self.uploads)
            self._fusion = self.plan_fusion({"text": self._rows})

    @cached_property
    def fused(self) -> Tensor:
        """(m, d) of the masked positions after the unified encoder, which sees nothing else."""
        self._fusion.run(self.sentences.states("masked"))
        return self._rows.output("masked")


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
    right, wrong, has_wrong = step.match_log_chances
    if step.config.itm_weighting == "pairs":
        losses = right[:, 1].sum() + (wrong[..., 0] * has_wrong).sum()
        return [LossPart(-losses, len(right) + has_wrong.sum())]
    return [
        LossPart(-right[:, 1].sum(), len(right)),
        LossPart(-(wrong[..., 0] * has_wrong).sum(), has_wrong.sum()),
    ]


def matching_accuracy(step: ImageTextStep) -> Parts:
    """Accuracy of ITM, no term: half of it of right pairs, half of the hard wrong ones, so that guessing
    gives 0.5."""
    right, wrong, has_wrong = step.match_log_chances
    is_right, is_wrong = right.argmax(-1) == 1, (wrong.argmax(-1) == 0) & has_wrong
    return [LossPart(0.5 * is_right.sum(), len(right)), LossPart(0.5 * is_wrong.sum(), has_wrong.sum())]


@term("image_text", reads=("masked",), trains=("vision", "fusion", "cross", "masked_head"))
def masked_captions(step: ImageTextStep) -> Parts:
    """VLM: masked words of captions, in the light of their image (equation 2)."""
    return [MaskedPart(step.fused["masked"].output("masked"), step.captions.subset.labels)]


@term("parallel", reads=("embeddings",), trains=SENTENCES, two_way=True)
def translation_contrast(step: TranslationStep) -> Parts:
    """UCL of sentences and translations."""
    return _both_ways(step.contrast)


@term("parallel", reads=("masked",), trains=("fusion", "cross", "masked_head"), two_way=True)
def masked_translations(step: TranslationStep) -> Parts:
    """TLM: masked words of either side, in the light of the other."""
    sides = {"source": step.source.subset, "target": step.target.subset}
    return [
        MaskedPart(step.fused[name].output("masked"), sentences.labels) for name, sentences in sides.items()
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
    batch}); beside ITM its accuracy, "itm_accuracy"."""

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
        if not config.train_image_projection:
            model.image_projection.requires_grad_(False)
        if not config.train_embeddings:
            model.embedding.requires_grad_(False)
        model.text.blocks[: config.frozen_text_layers].requires_grad_(False)
        text_parameters = (*model.embedding.parameters(), *model.text.parameters())
        frozen = not any(p.requires_grad for p in text_parameters)
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
        uploads, steps = Uploads(self.model.temperature.device), dict[str, Any]()
        for stream, make_step in STEPS.items():
            if reads := {read for entry in on.values() if entry.stream == stream for read in entry.reads}:
                steps[stream] = make_step(self, batch[stream], reads, temperature, uploads)
        self._encode_texts([encoding for step in steps.values() for encoding in step.encodings], uploads)
        parts = {name: entry.loss(steps[entry.stream]) for name, entry in on.items()}
        for name in self.users & parts.keys():
            check_parts(name, parts[name])
        if "itm" in parts:
            parts["itm_accuracy"] = matching_accuracy(steps["image_text"])
        return self._weigh(parts, uploads)

    def _encode_texts(self, encodings: list[StreamEncoding], uploads: Uploads) -> None:
        """All sentences through the text encoder at once; its last layer only where its output is used."""
        texts: list[tuple[StreamEncoding, Version]] = []
        for encoding in encodings:
            for version, rows in encoding.calls.items():
                if self.frozen_texts and version == "clean" and encoding.only_cls:
                    encode = partial(self._encode_cls, Ragged(encoding.full.clean, encoding.full.lengths))
                    rows.states = self.frozen_texts.cls(encoding.full.text_id, encode)
                else:
                    texts.append((encoding, version))
        if texts:
            groups = [encoding.calls[version] for encoding, version in texts]
            call = EncoderCall(self.model.text, groups, uploads)
            positions = uploads.add(self.model.embedding.plan(call.lengths))
            # here all is planned, and what has been goes to the device
            ids = torch.cat([encoding.ids(version) for encoding, version in texts])
            call.run(self.model.embedding(Ragged(ids, call.lengths), positions.value))

    @torch.no_grad()
    def _encode_cls(self, sentences: Ragged, rows: Tensor) -> Tensor:
        """CLS states (n, d) of some sentences, of an encoder that never changes. Each follows from its own
        tokens alone, to the bit, whatever it is computed with."""
        # A product rounds by its shape, not by what else is in it. On a CPU a sentence is computed alone; on
        # a GPU, which a single one would leave idle, among equally long ones, as many each time.
        lengths, on_cpu = sentences.lengths[rows], sentences.values.device.type == "cpu"
        states: Tensor | None = None
        for length in lengths.unique().tolist():
            size = 1 if on_cpu else max(1, FROZEN_TOKENS // length)
            for places in (lengths == length).nonzero().squeeze(1).split(size):
                filled = torch.cat([places, places[:1].expand(size - len(places))])
                ids = sentences.select_rows(rows[filled])
                found = self.model.encode_text(ids, first_tokens(ids.lengths))[: len(places)]
                states = found.new_empty(len(rows), found.shape[1]) if states is None else states
                states.index_copy_(0, upload(places, found.device), found)
        assert states is not None, "the cache asks for new sentences alone"
        return states

    # ---- weigh

    def _weigh(self, parts: dict[str, Parts], uploads: Uploads) -> tuple[Tensor, dict[str, Tensor]]:
        """Local parts -> this worker's share of the loss, and the terms of the global batch."""
        flat = [(name, part) for name, several in parts.items() for part in several]
        counts = [part.count if isinstance(part, LossPart) else len(part.labels) for _, part in flat]
        # one copy for the counts that the host knows, one reduction for those of all parts
        on_host = torch.tensor([0.0 if isinstance(n, Tensor) else float(n) for n in counts])
        local = uploads.add(on_host).value
        for i, n in enumerate(counts):
            if isinstance(n, Tensor):
                local[i] = n
        # a two-way term is a sum over both directions; its mean is half of that
        directions = {"tlm": self.config.tlm_directions}
        halved = {
            name
            for name in parts
            if name in self.terms
            and self.terms[name].two_way
            and directions.get(name, self.config.directions) == "mean"
        }
        shares: dict[str, Any] = dict.fromkeys(parts, 0.0)
        masked: list[tuple[str, MaskedPart, Tensor]] = []
        for (name, part), divisor in zip(flat, all_reduce(local).clamp(min=1), strict=True):
            scale = (0.5 if name in halved else 1.0) / divisor
            if isinstance(part, LossPart):
                shares[name] = shares[name] + scale * part.value
            else:
                masked.append((name, part, scale.expand(len(part.labels))))
        loss = sum(self.weights[name] * share for name, share in shares.items() if name in self.terms)
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

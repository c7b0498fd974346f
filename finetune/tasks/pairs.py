"""Retrieval by a model that reads a caption together with an image (`head=pairs`): a score for each pair of
them, as IGLUE's mUNITER, xUNITER, UC2 and M3P have it in VOLTA.

1. Training: `PairBatches` makes four options of each caption: with its image, another caption with that
   image, it with another image, one more caption with its image. The first has to score highest
   (`PairObjective`).
2. Dev sets are such options too, of fixed draws: the share of captions whose right one scores highest.
3. Test sets: all images with all captions.

VOLTA draws the last option among the captions of similar images where a file says which
(Flickr30K's hard_negative.pkl), and, by an oversight, always among those of the first image: here any other
image's caption is drawn. Its scores of more pairs than fit the memory are computed some at a time.

Shape legend: b captions of a worker's batch, n images, c captions of a test set.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.batches import (
    BatchOrder,
    CaptionPairs,
    EpochBatches,
    ExtraInputs,
    VisualInputs,
    encode_texts,
)
from finetune.formats import Captioned
from finetune.stores.images import VisualSource, encoded_images
from finetune.strategies.base import Captions, LossTerms, Need, Outputs, term_shares
from finetune.tasks.base import Pipeline, Score
from finetune.tasks.classification import load_finetuned, load_pretrained
from finetune.tasks.ranking import summarise_hits
from finetune.tasks.retrieval import Retrieval, merge_captions
from raylib.data.images import BadImage
from raylib.data.loading import to_device
from raylib.display import progress
from raylib.distributed import all_reduce, rank, world_size
from raylib.engine import Objective
from raylib.errors import UserError
from raylib.finite import require_finite
from raylib.metrics import hit_chances
from raylib.models.base import FusionBackbone, RegionBackbone
from raylib.models.finetuned import FinetuneModel
from raylib.packed import upload
from raylib.precision import autocast
from raylib.randomness import integers
from raylib.text import Tokenizer

if TYPE_CHECKING:
    from finetune.config import FinetuneConfig

LABELS = ("match",)
OPTIONS = 4  # of a caption, the right one first
MARGIN = 0.2  # of the triplet loss
PAIRS = 256  # scored at a time


@dataclass(frozen=True, kw_only=True, eq=False)
class PairRetrieval(Retrieval):
    """Retrieval whose pairs a cross-encoder scores."""

    provides: ClassVar[frozenset[Need]] = frozenset()

    @property
    def heads(self) -> Mapping[str, "PairRetrieval"]:  # type: ignore[override]
        return {"pairs": self}

    def check(self, config: "FinetuneConfig") -> None:
        if config.loss not in ("ce", "triplet"):
            raise UserError(f"head=pairs: loss={config.loss} is of classes; set loss=ce or loss=triplet")

    def training_captions(self, config: "FinetuneConfig") -> Captions | None:
        return None

    def build_model(self, config: "FinetuneConfig") -> FinetuneModel:  # type: ignore[override]
        if config.continues:
            return load_finetuned(config.model, LABELS, config.backbone)
        backbone = load_pretrained(config)
        if not isinstance(backbone, FusionBackbone):
            raise UserError(
                f"head=pairs: {backbone.kind} reads texts and images apart; leave head= out, and set "
                "use_itm_head=false"
            )
        if isinstance(backbone, RegionBackbone) and "tags" in backbone.row_parts:
            raise UserError(f"head=pairs: {backbone.kind} reads tags too, of classes alone; set backbone=")
        region_dim, classifier = self.region_dim(config), config.classifier
        return FinetuneModel(backbone, LABELS, 1, config.head_dropout, region_dim, classifier=classifier)

    def batches(
        self, pipeline: Pipeline, items: Sequence[Any], order: BatchOrder, extra: ExtraInputs | None = None
    ) -> EpochBatches:
        assert pipeline.visual is not None
        return PairBatches(items, pipeline.visual, pipeline.tokenizer, pipeline.config.length, order)

    def objective(self, config: "FinetuneConfig", model: Any, added: LossTerms) -> Objective:
        return PairObjective(model, config.loss, added)

    def evaluate(
        self, pipeline: Pipeline, sets: Mapping[str, Iterable[Any]], folder: Path
    ) -> dict[str, dict[str, Any]]:
        found = {}
        for code, language_items in sets.items():
            items = merge_captions(language_items)
            names = partial(iter, [item.image for item in items])
            backbone, states = pipeline.model.backbone, folder / f".{code}"
            with encoded_images(backbone, pipeline.visual, names, states, pipeline.bf16) as visual:
                scores, faults = score_pairs(pipeline._replace(visual=visual), code, items)
            owner = torch.tensor([i for i, item in enumerate(items) for _ in item.captions])
            relevant = owner == torch.arange(len(items))[:, None]
            i2t, t2i = hit_chances(scores, relevant), hit_chances(scores.T, relevant.T)
            # an image that cannot be read finds nothing, and its captions do not either
            usable = (scores > -torch.inf).any(1, keepdim=True)
            i2t, t2i = i2t * usable, t2i * usable[owner]
            key = (pipeline.config.fit.seed, code)
            found[code] = summarise_hits(owner, i2t, t2i, faults, 2 * scores.numel(), key)
        return found

    def evaluate_dev(
        self, pipeline: Pipeline, sets: Mapping[str, Iterable[Any]], folder: Path
    ) -> dict[str, dict[str, Any]]:
        """{language: {"accuracy": share of captions whose right option scores highest}}."""
        config, model, tokenizer, visual = pipeline
        assert visual is not None
        device, found = next(model.parameters()).device, {}
        for code, language_items in sets.items():
            items = merge_captions(language_items)
            order = BatchOrder(PAIRS // OPTIONS, config.fit.seed, keep_last=True, bad_limit=config.bad_limit)
            batches = PairBatches(items, visual, tokenizer.for_language(code), config.length, order)
            hits = torch.zeros(2, dtype=torch.float64, device=device)
            model.eval()
            for step in range(rank(), batches.epoch_steps, world_size()):
                with torch.inference_mode(), autocast(device, pipeline.bf16):
                    logits = option_logits(model, to_device(batches[step]["pairs"], device))
                require_finite("scores of pairs", logits)
                right = torch.arange(OPTIONS, device=device).expand_as(logits) == 0
                hits += torch.stack([hit_chances(logits, right)[:, 0].sum(), hits.new_tensor(len(logits))])
            hit, count = all_reduce(hits).tolist()
            found[code] = {"accuracy": hit / count, "n": len(items)}
        return found

    def dev_score(self, config: "FinetuneConfig", figures: dict[str, Any]) -> Score:
        return Score(figures["accuracy"], None)

    def dev_score_name(self, config: "FinetuneConfig") -> str:
        return "accuracy among four pairs"


class PairBatches(EpochBatches):
    """Batches of options: {"step", "samples", "pairs": {"size", "index", "text" 4 b rows, the inputs of 2 b
    images, "state_rows" (4 b,): the image of each text}}."""

    def __init__(
        self,
        items: Sequence[Captioned],
        visual: VisualSource,
        tokenizer: Tokenizer,
        length: int,
        order: BatchOrder,
    ):
        """Raises UserError: one image alone has no wrong captions."""
        pairs = CaptionPairs(items)
        super().__init__(pairs, order)
        self.owners = pairs.owners  # (captions,) place of each one's image
        self.items, self.visual, self.tokenizer, self.length = items, visual, tokenizer, length
        if len(items) < 2:
            raise UserError("head=pairs: captions of at least two images are needed; check data=")

    def __getitem__(self, step: int) -> dict[str, Any]:
        epoch, places, numbers = self.rows(step)

        def read(pairs: Sequence[Any], numbers: np.ndarray) -> VisualInputs:
            others = [self.items[i].image for i in self._others(epoch, numbers, "image")]
            names = [name for pair, other in zip(pairs, others, strict=True) for name in (pair.image, other)]
            draws = self.augmentation(self.visual, epoch, np.repeat(numbers, 2)[:, None])
            return self.visual.read(names, draws)

        numbers, pairs, visual, bad = self.read_usable(epoch, numbers, read)
        texts = [
            text
            for pair, one, more in zip(
                pairs, *(self._captions(epoch, numbers, name) for name in ("caption", "more")), strict=True
            )
            for text in (pair.captions[0], one, pair.captions[0], more)
        ]
        rows = torch.arange(2 * len(pairs)).view(-1, 2)[:, [0, 0, 1, 0]].flatten()
        ids = encode_texts(texts, self.tokenizer, self.length)
        part = {**places, "text": ids, **visual, "state_rows": rows}
        return {
            "step": step,
            "samples": places["size"],
            "tokens": self.count_tokens(part),
            "bad": bad,
            "pairs": part,
        }

    def _others(self, epoch: int, numbers: np.ndarray, name: str) -> np.ndarray:
        """(b,) another image for each example, drawn from (seed, epoch, its number)."""
        own = self.owners[numbers]
        drawn = integers(len(self.items) - 1, self.order.seed, epoch, name, numbers)
        return drawn + (drawn >= own)

    def _captions(self, epoch: int, numbers: np.ndarray, name: str) -> Iterator[str]:
        """A caption of another image for each example."""
        others = self._others(epoch, numbers, name)
        counts = np.array([len(self.items[i].captions) for i in others])
        places = integers(counts, self.order.seed, epoch, name, numbers, 1)
        return (self.items[i].captions[place] for i, place in zip(others, places, strict=True))


def option_logits(model: FinetuneModel, part: dict) -> Tensor:
    """(b, 4) scores of the options of each caption."""
    return model(part).float().view(-1, OPTIONS)


class PairObjective(Objective):
    """`forward(batch)` -> (this worker's share of the loss, {"task", and by name the terms of strategies:
    means over the global batch, unweighted}): the right option among four by cross-entropy ("ce"), or ahead
    of each wrong one by a margin of sigmoids ("triplet", UC2's in IGLUE). The terms read nothing of the
    model's (`PairRetrieval.provides`)."""

    has_unused_parameters = True  # heads of pretraining have no part in it
    model: FinetuneModel

    def __init__(self, model: FinetuneModel, loss: str, added: LossTerms | None = None):
        super().__init__()
        self.model, self.loss, self.added = model, loss, added or LossTerms()

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        logits = option_logits(self.model, batch["pairs"])
        examples = all_reduce(torch.full((), float(len(logits)), device=logits.device))
        if self.loss == "triplet":
            scores = logits.sigmoid()
            value = (MARGIN + scores[:, 1:] - scores[:, :1]).clamp(min=0).mean(1).sum()
        else:
            first = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
            value = F.cross_entropy(logits, first, reduction="sum")
        terms, _, task_weight = self.added
        rows = examples * OPTIONS  # what a term sees of the batch
        shares = torch.stack([value / examples, *term_shares(terms, Outputs(), batch["pairs"], rows)])
        weights = torch.tensor([task_weight, *(term.weight for term in terms.values())])
        loss = (upload(weights, logits.device) * shares).sum()
        return loss * world_size(), dict(zip(["task", *terms], all_reduce(shares).unbind(), strict=True))


@torch.inference_mode()
def score_pairs(pipeline: Pipeline, language: str, items: Sequence[Captioned]) -> tuple[Tensor, list[str]]:
    """((n, c) scores of all images with all captions, on the CPU; what is wrong with images that cannot be
    read, whose scores are -inf). Workers share the images.

    Raises:
        NotFinite: a score is not finite.
    """
    config, model, tokenizer, visual = pipeline
    assert visual is not None
    spoken, device = tokenizer.for_language(language), next(model.parameters()).device
    model.eval()
    texts = [caption for item in items for caption in item.captions]
    scores = torch.zeros(len(items), len(texts), device=device)
    faults = {}
    for i in progress(range(rank(), len(items), world_size()), f"score {language}", unit="images"):
        try:
            image = visual.read([items[i].image])
        except BadImage as error:
            faults[i] = str(error)
            continue
        for start in range(0, len(texts), PAIRS):
            some = texts[start : start + PAIRS]
            ids = encode_texts(some, spoken, config.length)
            inputs = {"text": ids, **image, "state_rows": torch.zeros(len(some), dtype=torch.int64)}
            with autocast(device, pipeline.bf16):
                scores[i, start : start + len(some)] = model(to_device(inputs, device))[:, 0].float()
    require_finite("scores of pairs", scores)
    bad = torch.zeros(len(items), device=device)
    bad[list(faults)] = 1.0
    scores, bad = all_reduce(scores), all_reduce(bad).bool()  # each row is one worker's, and 0 on the others
    scores[bad] = -torch.inf
    found = [
        faults.get(i, f"{items[i].image}: another worker could not read it")
        for i in bad.nonzero().flatten().tolist()
    ]
    return scores.cpu(), found

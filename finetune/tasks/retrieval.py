"""Tasks that find the texts of an image, and the image of a text, among all others."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from finetune.batches import BatchOrder, CaptionBatches, EpochBatches, ExtraInputs
from finetune.formats import Captioned
from finetune.stores.images import ImageSource, PrecomputedFeatures, encoded_images
from finetune.strategies.base import AddedTerm, Captions, LossTerms, Need, Outputs, term_shares
from finetune.tasks.base import TRAINING_SPLITS, Pipeline, Score, Task
from finetune.tasks.classification import load_pretrained
from finetune.tasks.ranking import retrieve
from raylib.distributed import all_reduce, world_size
from raylib.engine import Objective
from raylib.errors import UserError
from raylib.metrics import disparity, mean_recall_at_1
from raylib.models.base import RetrievalBackbone
from raylib.models.unified import UnifiedModel
from raylib.objectives import align_pairs, info_nce
from raylib.objectives.pretraining import ObjectiveConfig, TermWeights, UnifiedObjective
from raylib.packed import Ragged, concatenate, upload

if TYPE_CHECKING:
    from finetune.config import FinetuneConfig

Comparison = Callable[..., Tensor]
CONTRAST_AND_ITM = ObjectiveConfig(  # image-text contrast and matching, on whole sentences
    weights=TermWeights(ucl_translation=0, vlm=0, tlm=0, xmlm=0),
    ucl_text="clean",
    itm_text="clean",
    temperature=(0.001, 10.0),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Retrieval(Task):
    """Image-text retrieval by the backbone alone, and by its image-text matching head (`use_itm_head`)."""

    provides: ClassVar[frozenset[Need]] = frozenset({"captions", "embeddings"})

    @cached_property
    def heads(self) -> Mapping[str, Task]:
        from finetune.tasks.pairs import PairRetrieval  # it is a Retrieval itself

        pairs = PairRetrieval(**{field.name: getattr(self, field.name) for field in fields(PairRetrieval)})
        return {"classifier": self, "pairs": pairs}

    def check(self, config: "FinetuneConfig") -> None:
        if config.regions:
            raise UserError(
                "retrieval wants images: the model's image encoder makes the vectors that are compared"
            )

    def needs_images(self, config: "FinetuneConfig") -> bool:
        return True

    def training_captions(self, config: "FinetuneConfig") -> Captions | None:
        split = TRAINING_SPLITS.get(config.setting)
        if split is None:
            return None
        limit = config.train_limit if split == "train" else None

        def read(translation: str, language: str) -> dict[str, tuple[str, ...]]:
            items = self.read_split(config, f"{split}{translation}", language, limit)
            return {item.image: item.captions for item in merge_captions(items.load())}

        return read

    def build_model(self, config: "FinetuneConfig") -> RetrievalBackbone:
        model = load_pretrained(config)
        if not isinstance(model, RetrievalBackbone):
            raise UserError(
                f"task={config.task}: retrieval encodes texts and images apart; {model.kind} reads them "
                "together: set head=pairs (what encodes them apart derives from RetrievalBackbone)"
            )
        if config.use_itm_head and not model.has_match_head:
            raise UserError(
                f"task={config.task}: {model.kind} has no head that matches pairs; set use_itm_head=false"
            )
        model.freeze_unused("matching" if config.use_itm_head else "contrast")
        return model

    def training_items(
        self, items: Sequence[Captioned], model: Any
    ) -> tuple[Sequence[Captioned], Sequence[Captioned]]:
        return items, []

    def batches(
        self, pipeline: Pipeline, items: Sequence[Any], order: BatchOrder, extra: ExtraInputs | None = None
    ) -> EpochBatches:
        visual = cast(ImageSource | PrecomputedFeatures, pipeline.visual)
        tokenizer = pipeline.tokenizer.for_training
        return CaptionBatches(items, visual, tokenizer, pipeline.config.length, order, extra)

    def objective(self, config: "FinetuneConfig", model: Any, added: LossTerms) -> Objective:
        if not config.use_itm_head:
            return ContrastObjective(model, config.temperature, added.terms, config.contrast == "mean")
        pretraining = CONTRAST_AND_ITM.model_copy(update={"train_vision": "vision" not in config.freeze})
        objective = UnifiedObjective(model, pretraining)
        return MatchingObjective(objective, added.terms) if added.terms else objective

    def evaluate(
        self, pipeline: Pipeline, sets: Mapping[str, Iterable[Any]], folder: Path
    ) -> dict[str, dict[str, Any]]:
        config, model, tokenizer, _ = pipeline
        items = {code: merge_captions(language_items) for code, language_items in sets.items()}

        def names() -> Iterator[str]:  # the same images often have captions in every language
            return (item.image for language_items in items.values() for item in language_items)

        with encoded_images(model, pipeline.visual, names, folder / ".images", pipeline.bf16) as visual:
            return {
                code: retrieve(
                    model,
                    language_items,
                    cast(PrecomputedFeatures, visual),
                    tokenizer.for_language(code),
                    config.length,
                    config.candidates if config.use_itm_head else None,
                    folder / f".{code}",
                    pipeline.bf16,
                    (config.fit.seed, code),
                )
                for code, language_items in items.items()
            }

    def dev_score(self, config: "FinetuneConfig", figures: dict[str, Any]) -> Score:
        if config.select_metric == "recall_at_1":
            return Score(mean_recall_at_1(figures), figures["recall_at_1_interval"])
        return Score(figures["mean_recall"], figures["interval"])

    def dev_score_name(self, config: "FinetuneConfig") -> str:
        return config.select_metric.replace("_", " ")

    def test_score(self, figures: dict[str, Any]) -> float:
        return figures["mean_recall"]

    def summarise(self, figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
        recall = {code: mean_recall_at_1(values) for code, values in figures.items()}
        return {"retrieval": figures, "recall_at_1": recall, "disparity": disparity(recall.values())}


def merge_captions(items: Iterable[Captioned]) -> list[Captioned]:
    """One item an image: lines about the same one come together."""
    captions: dict[str, tuple[str, ...]] = {}
    for item in items:
        captions[item.image] = captions.get(item.image, ()) + item.captions
    return [Captioned(image, texts) for image, texts in captions.items()]


class ContrastObjective(Objective):
    """`forward(batch)` -> (this worker's share of L_i2t + L_t2i + sum of weighted terms (equation 9), {"i2t",
    "t2i" and terms by name: means over the global batch, unweighted}).

    is_mean: the first two are halved, as the public code has them.
    Pairs of one image are no negatives of each other, nor are equal texts.
    """

    has_unused_parameters = True  # heads of pretraining have no part in it
    model: RetrievalBackbone

    def __init__(
        self,
        model: RetrievalBackbone,
        temperature: float,
        terms: Mapping[str, AddedTerm] | None = None,
        is_mean: bool = False,
    ):
        super().__init__()
        self.model, self.temperature, self.terms = model, temperature, terms or {}
        self.way_weight = 0.5 if is_mean else 1.0

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        part = batch["image_text"]
        device = part["text"].clean.device
        outputs = embed(self.model, part, torch.full((1,), self.temperature, device=device))
        examples = all_reduce(torch.full((), float(len(part["image_id"])), device=device))
        image, text = outputs.image_embeddings, outputs.text_embeddings
        ways = [outputs.contrast(image, text) / examples, outputs.contrast(text, image) / examples]
        shares = torch.stack([*ways, *term_shares(self.terms, outputs, part, examples)])
        weighted = [self.way_weight, self.way_weight, *(term.weight for term in self.terms.values())]
        weights = upload(torch.tensor(weighted), device)
        names = ("i2t", "t2i", *self.terms)
        return (weights * shares).sum() * world_size(), dict(
            zip(names, all_reduce(shares).unbind(), strict=True)
        )


class MatchingObjective(Objective):
    """As `UnifiedObjective`, which it holds, of contrast and matching, and terms of strategies beside:
    `forward(batch)` -> (this worker's share of the sum, {its terms, and the strategies' by name: means over
    the global batch, unweighted}).

    Images are encoded once for both. Texts are encoded again, with their pivots: what `UnifiedObjective`
    makes of them are unit vectors, and terms are about vectors of any length.
    """

    model: UnifiedModel

    def __init__(self, unified: UnifiedObjective, terms: Mapping[str, AddedTerm]):
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
        # (`raylib.runtime.clamp_parameter`)
        temperature = self.model.temperature.detach().clamp(*self.unified.config.temperature)
        # terms of the model alone need no second pass of the texts
        embeds = any("embeddings" in term.reads for term in self.terms.values())
        outputs = embed(self.model, part, temperature) if embeds else Outputs()
        examples = all_reduce(torch.full((), float(len(part["image_id"])), device=loss.device))
        shares = torch.stack(term_shares(self.terms, outputs, part, examples))
        weights = upload(torch.tensor([term.weight for term in self.terms.values()]), loss.device)
        added = dict(zip(self.terms, all_reduce(shares).unbind(), strict=True))
        return loss + (weights * shares).sum() * world_size(), {**values, **added}


def embed(model: RetrievalBackbone, part: dict, temperature: Tensor) -> Outputs:
    """Embeddings of a batch's images, texts and, where there are any, the texts' pivots; temperature: (1,),
    of `Outputs.scores` and `contrast`."""
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
    scores, contrast = _comparisons(part, temperature)
    return Outputs(
        image_embeddings=image,
        text_embeddings=text,
        pivot_embeddings=pivot[0] if pivot else None,
        scores=scores,
        contrast=contrast,
        rerun=partial(embed, model, part, temperature),
    )


def _comparisons(part: dict, temperature: Tensor) -> tuple[Comparison, Comparison]:
    """`Outputs.scores` and `contrast`: rows of the global batch in one order on any number of workers."""
    text = part["text"]
    ids = torch.stack([part["index"], part["image_id"], text.text_id], 1)
    pairs = align_pairs(upload(ids, text.clean.device), part["size"])

    def unit_vectors(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        queries, keys = (nn.functional.normalize(x, dim=1) for x in (queries, keys))
        return queries, pairs.gather(keys)

    def scores(queries: Tensor, keys: Tensor) -> Tensor:
        # as InfoNCE, in float32 also under autocast
        with torch.autocast(queries.device.type, enabled=False):
            queries, keys = unit_vectors(queries, keys)
            return queries / temperature.to(queries) @ keys.T

    def contrast(queries: Tensor, keys: Tensor, rows: Tensor | None = None) -> Tensor:
        queries, keys = unit_vectors(queries, keys)
        index, mask = pairs.index, pairs.logit_mask(queries.dtype)
        if rows is not None:  # of the queries; the others stay negatives of these
            queries, index, mask = queries[rows], index[rows], mask[rows]
        return info_nce(queries, keys, index, mask, temperature.to(queries))[0]

    return scores, contrast

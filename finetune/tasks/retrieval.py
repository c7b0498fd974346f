"""Tasks that find the texts of an image, and the image of a text, among all others."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from finetune.batches import BatchOrder, CaptionBatches, EpochBatches, MoreInputs
from finetune.contrast import ContrastObjective, MatchingObjective
from finetune.examples import Captioned
from finetune.model import load_backbone
from finetune.retrieval import retrieve
from finetune.strategies.base import LossTerms
from finetune.tasks.base import TRAINING_SPLITS, Captions, Pipeline, Score, Task
from raylib.errors import UserError
from raylib.metrics import disparity, mean_recall_at_1
from raylib.objectives.pretraining import ObjectiveConfig, TermWeights, UnifiedObjective

if TYPE_CHECKING:
    from finetune.config import FinetuneConfig

CONTRAST_AND_ITM = ObjectiveConfig(  # image-text contrast and matching, on whole sentences
    weights=TermWeights(ucl_translation=0, vlm=0, tlm=0, xmlm=0),
    ucl_text="clean",
    itm_text="clean",
    temperature=(0.001, 10.0),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Retrieval(Task):
    """Image-text retrieval by the backbone alone, and by its image-text matching head (`use_itm_head`)."""

    provides: ClassVar[frozenset[str]] = frozenset({"captions", "embeddings"})

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

    def build_model(self, config: "FinetuneConfig") -> nn.Module:
        model = load_backbone(config.model, config.backbone, config.vision)
        if hasattr(model, "set_region_dim"):
            raise UserError(
                f"task={config.task}: retrieval encodes texts and images apart; {model.kind} reads them "
                "together"
            )
        if config.use_itm_head and not hasattr(model, "match_head"):
            raise UserError(
                f"task={config.task}: {model.kind} has no head that matches pairs; set use_itm_head=false"
            )
        if not config.use_itm_head:
            # what the match head alone uses would decay all the same under ZeRO
            for part in ("fusion", "match_head", "masked_head", "temperature"):
                if hasattr(model, part):
                    getattr(model, part).requires_grad_(False)
        return model

    def backbone_of(self, model: nn.Module) -> nn.Module:
        return model

    def training_items(self, items: list[Captioned], model: nn.Module) -> tuple[list[Captioned], int]:
        return items, 0

    def batches(
        self, pipeline: Pipeline, items: list[Any], order: BatchOrder, extra: MoreInputs | None = None
    ) -> EpochBatches:
        return CaptionBatches(
            items, pipeline.visual, pipeline.tokenizer, pipeline.config.length, order, extra
        )

    def objective(self, config: "FinetuneConfig", model: nn.Module, added: LossTerms) -> nn.Module:
        if not config.use_itm_head:
            return ContrastObjective(model, config.temperature, added.terms)
        pretraining = CONTRAST_AND_ITM.model_copy(update={"train_vision": "vision" not in config.freeze})
        objective = UnifiedObjective(model, pretraining, config.length)
        return MatchingObjective(objective, added.terms) if added.terms else objective

    def evaluate(
        self, pipeline: Pipeline, sets: Mapping[str, Iterable[Any]], folder: Path
    ) -> dict[str, dict[str, Any]]:
        config, model, tokenizer, visual = pipeline
        return {
            code: retrieve(
                model,
                merge_captions(items),
                visual,
                tokenizer,
                config.length,
                config.candidates if config.use_itm_head else None,
                folder / f".{code}",
                pipeline.bf16,
                (config.fit.seed, code),
            )
            for code, items in sets.items()
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

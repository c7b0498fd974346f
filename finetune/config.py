"""Everything that a fine-tuning run depends on."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from raylib.data.images import AugmentConfig
from raylib.launch import LaunchConfig
from raylib.loop import FitConfig
from raylib.optim import OptimConfig

Setting = Literal["zero_shot", "few_shot", "single_language", "all_language", "translate_test"]
Part = Literal["embeddings", "text", "vision", "fusion"]


class FinetuneConfig(LaunchConfig):
    """One task, one setting.

    model: an export, a run, or an XLM-R or BERT folder; for few-shot and translate-test the run of an English fine-tuning.
    vision: a ViT folder, with a text-only `model`.
    data: the folder that holds the official annotation files as IGLUE's repository does.
    images, regions: where the pictures, or region features in their place, lie; default: `data`/images.tar or /images.
    setting: zero_shot trains on English; few_shot goes on from `model` with each language's shots; single_language and
        all_language train on the languages' own files, one by one or together; translate_test evaluates `model`, untrained,
        on translations into English.
    split: "test", or "few_shot_test", IGLUE's smaller one of xGQA. shots: which few-shot file.
    languages: what is evaluated; () is all of the task's.
    answers: keep so many most frequent answers of the training file; None: the task's answer file, or all there are.
    freeze: parts that never train. encoded: with a frozen image encoder and no augmentation, encode every picture once.
    candidates: K of two-stage retrieval; 0 ranks every pair.
    select: which checkpoint is evaluated: the best on the English dev set, or the last.
    train_limit, test_limit: use the first so many items; None: all.
    """

    task: str
    model: str = ""
    vision: str | None = None
    data: str = ""
    images: str | None = None
    regions: str | None = None
    setting: Setting = "zero_shot"
    split: Literal["test", "few_shot_test"] = "test"
    shots: int | str = 5
    languages: tuple[str, ...] = ()
    method: str = "full fine-tuning"
    answers: PositiveInt | None = None
    freeze: tuple[Part, ...] = ()
    encoded: bool = True
    image_size: PositiveInt | None = None
    augment: AugmentConfig | None = None
    batch: PositiveInt = 64
    epochs: PositiveInt = 10
    length: int = Field(40, ge=3)
    head_dropout: float = Field(0.1, ge=0, lt=1)
    loss: Literal["ce", "bce"] = "ce"
    candidates: NonNegativeInt = 16
    select: Literal["best", "last"] = "best"
    train_limit: PositiveInt | None = None
    test_limit: PositiveInt | None = None
    optim: OptimConfig = OptimConfig(warmup=0.0)
    fit: FitConfig = FitConfig()

    @model_validator(mode="after")
    def _fits(self) -> "FinetuneConfig":
        if self.augment and self.encoded and "vision" in self.freeze:
            raise ValueError("augment needs encoded=false: pictures that are encoded once cannot change")
        return self

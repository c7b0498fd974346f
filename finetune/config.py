"""Everything that a fine-tuning run depends on."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from finetune.strategies import StrategiesConfig
from raylib.config import NameOrFile
from raylib.data.images import AugmentConfig
from raylib.engine import OptimConfig
from raylib.launch import LaunchConfig
from raylib.loop import FitConfig
from raylib.models.decoder import DecoderConfig

TransferSetting = Literal[
    "zero_shot", "few_shot", "single_language", "all_language", "translate_test", "untrained"
]
Part = Literal["embeddings", "text", "vision", "fusion"]
UNIMODAL: tuple[Part, ...] = ("embeddings", "text", "vision")  # everything before text and image meet


class FinetuneConfig(LaunchConfig):
    """One task, one setting.

    model: an export, a run, or an XLM-R or BERT folder; for few-shot and translate-test the run of an English
        fine-tuning. vision: a ViT folder, with a text-only `model`.
    data: the folder that holds the official annotation files as IGLUE's repository does. images, regions:
        where the images, or region features in their place, lie; default: `data`/images.tar or /images.
    wordnet: a folder like nltk_data/corpora/wordnet, for synonyms among answers and the linguistic prior;
        default: `data`/wordnet. Without one, results have no "synonym_accuracy" and "confusions".
    setting: zero_shot trains on English; few_shot goes on from `model` with each language's shots;
        single_language and all_language train on the languages' own files, one by one or together;
        translate_test evaluates `model`, untrained, on translations into English; untrained evaluates it as
        it is.
    split: "test". Of xGQA there is "testdev" too, all 12,578 questions of GQA's testdev, for runs that see
        none of the 2,912 that are in few-shot files; "test" are the other 9,666, which every paper reports,
        and "few_shot_test" is another name for them (runs of before meant the testdev by "test").
    shots: which few-shot file.
    languages: those that are evaluated; () is all of the task's.
    answers: keep so many most frequent answers of the training file; None: the task's answer file, or all
        there are.
    strategies: fine-tuning strategies (`finetune.strategies`); `strategies.prior.alpha=4` turns one on.
    method: the name of the run in tables; "": that of its strategies.
    backbone: what a `model` that is not ours becomes (`raylib.models`).
    head: a classifier, or a decoder that generates the answers of an open set and ranks them as `decoder`
        says (CCLM).
    freeze: parts that never train. cache_image_states: with a frozen image encoder and no augmentation,
        encode every image once.
    use_itm_head: retrieval trains and ranks pairs by the image-text matching head too, and `candidates` is
        the K of its two stages (0 ranks every pair). Without, by image-text contrast alone, at `temperature`
        (paper 4's tau).
    last_batch: "keep" trains on what is left of an epoch as a smaller batch (IGLUE); "drop" leaves it to
        another epoch.
    select: which checkpoint is evaluated: the best on the English dev set (few-shot: the language's own,
        where the task has one), or the last. select_metric: by which score of retrieval; select_ties: which
        of checkpoints that score alike.
    eval_each_epoch: evaluate the test set in every language after every epoch too; it chooses nothing
        (`analyse` draws it).
    run_test: evaluate the test sets at the end. A trial of a search does not: its result is what the dev
        sets say.
    dev_languages: whose own dev sets are scored after each epoch too; they choose nothing within the run.
    train_limit, test_limit: use the first so many items; None: all.
    verify: hash all of the run's files at every start; otherwise sizes and times of change come first, and
        the content of images and region features is not looked at (`raylib.provenance`).
    """

    stored_as = "finetune"

    task: NameOrFile
    model: str = ""
    vision: str | None = None
    data: str = ""
    images: str | None = None
    regions: str | None = None
    wordnet: str | None = None
    setting: TransferSetting = "zero_shot"
    split: Literal["test", "few_shot_test", "testdev"] = "test"
    shots: int | str = 5
    languages: tuple[str, ...] = ()
    method: str = ""
    strategies: StrategiesConfig = StrategiesConfig()
    backbone: str = "unified"
    head: Literal["classifier", "decoder"] = "classifier"
    decoder: DecoderConfig = DecoderConfig()
    answers: PositiveInt | None = None
    freeze: tuple[Part, ...] = ()
    cache_image_states: bool = True
    image_size: PositiveInt | None = None
    augment: AugmentConfig | None = None
    batch: PositiveInt = 64
    epochs: PositiveInt = 10
    length: int = Field(40, ge=3)
    head_dropout: float = Field(0.1, ge=0, lt=1)
    loss: Literal["ce", "bce"] = "ce"
    use_itm_head: bool = True
    candidates: NonNegativeInt = 16
    temperature: PositiveFloat = 0.01
    last_batch: Literal["drop", "keep"] = "drop"
    select: Literal["best", "last"] = "best"
    select_metric: Literal["mean_recall", "recall_at_1"] = "mean_recall"
    select_ties: Literal["first", "last"] = "first"
    eval_each_epoch: bool = False
    run_test: bool = True
    dev_languages: tuple[str, ...] = ()
    train_limit: PositiveInt | None = None
    test_limit: PositiveInt | None = None
    verify: bool = False
    optim: OptimConfig = OptimConfig(warmup=0.0)
    fit: FitConfig = FitConfig()

    @model_validator(mode="after")
    def _check_settings(self) -> "FinetuneConfig":
        if self.augment and self.cache_image_states and "vision" in self.freeze:
            raise ValueError(
                "augment needs cache_image_states=false: images that are encoded once cannot change"
            )
        return self

    @property
    def trains(self) -> bool:
        """Return whether the setting trains anything."""
        return self.setting not in ("translate_test", "untrained")

    @property
    def trains_apart(self) -> bool:
        """Return whether each language is trained apart."""
        return self.setting in ("few_shot", "single_language")

    @property
    def continues(self) -> bool:
        """Return whether the run goes on from a fine-tuned `model`: or its own (`trained_config`)."""
        return not self.trains or self.setting == "few_shot" or Path(self.model) == Path(self.runs, self.name)

    @property
    def wordnet_folder(self) -> Path:
        """The WordNet folder: where relations between answers come from."""
        return Path(self.wordnet or Path(self.data) / "wordnet")

    @property
    def images_path(self) -> Path:
        """The images: `images`, else images.tar or images in the data folder."""
        default = Path(self.data) / "images.tar"
        return Path(self.images) if self.images else default if default.is_file() else default.with_suffix("")

    @property
    def display_name(self) -> str:
        """Name the method for tables. An image encoder that is frozen alone is not named: it knows no
        language. What trains nothing is "as it is", whatever it would freeze."""
        parts = () if self.freeze == ("vision",) or not self.trains else self.freeze
        frozen = "frozen unimodal encoders" if parts == UNIMODAL else f"frozen {', '.join(parts)}"
        names = [
            "" if self.trains else "as it is",
            frozen if parts else "",
            self.strategies.display_name(),
        ]
        return self.method or " + ".join(filter(None, names)) or "full fine-tuning"

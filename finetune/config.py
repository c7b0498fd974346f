"""Everything that a fine-tuning run depends on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from finetune.strategies import StrategiesConfig
from raylib.config import Config, FolderName, NameOrFile
from raylib.memory import next_settings
from raylib.settings import (
    MAX_PIXELS,
    AugmentConfig,
    BackboneConfig,
    Checkpointing,
    ClassifierConfig,
    DecoderConfig,
    FitConfig,
    LaunchConfig,
    MaxPixels,
    OptimConfig,
)

TransferSetting = Literal[
    "zero_shot", "few_shot", "single_language", "all_language", "translate_test", "untrained"
]
Part = Literal["embeddings", "text", "vision", "image_projection", "fusion"]
UNIMODAL: tuple[Part, ...] = ("embeddings", "text", "vision")  # everything before text and image meet

# Heads of public code, which `classifier.follow=code` chooses, and those of tasks and backbones that differ.
# volta: e-bug/volta, volta/encoders.py (`BertForVLTasks`), config/*.json, IGLUE's config_tasks/*.yml.
# mvlp: FudanDISC/weakly-supervised-mVLP, albef/modeling/model_vqa.py. cclm: zengyan-97/X2-VLM and CCLM,
# models/model_classification.py.
HEAD = ClassifierConfig().model_dump(exclude={"follow", "code"})
LINEAR_FOR_ENTAILMENT = {task: {"layers": 1} for task in ("xvnli", "xnli", "snli_xvnli")}
PUBLIC_HEADS: dict[str, dict[str, Any]] = {
    "volta": HEAD | {"eps": 1e-12, "init": "normal", "pooled_dropout": 0.1},
    "mvlp": HEAD | {"hidden_ratio": 1.0, "eps": 1e-12, "init": "uniform"},
    "cclm": HEAD | {"norm": "before", "init": "uniform"},
}
PUBLIC_TASK_HEADS: dict[str, dict[str, dict[str, Any]]] = {
    "volta": {**LINEAR_FOR_ENTAILMENT, "xflickrco": {"layers": 1}, "wit": {"layers": 1}},  # VL-logit
    "mvlp": {**LINEAR_FOR_ENTAILMENT, "marvl": {"activation": "relu", "norm": "none"}},
    "cclm": {"marvl": {"hidden_ratio": 4.0}},
}
VOLTA_HEADS: dict[str, dict[str, Any]] = {
    "uc2": {"hidden_ratio": 1.0, "eps": 1e-5},
    "m3p": {},
    "muniter": {"hidden_ratio": 1.5},  # 1,536; their pooled states are 1,024 wide
    "xuniter": {"hidden_ratio": 1.5},
}
PUBLIC_CODE = {
    **dict.fromkeys(VOLTA_HEADS, "volta"),
    "unified": "mvlp",
    "cclm": "cclm",
    "cclm_swin": "cclm",
}

SHUFFLED_IMAGES = "shuffled_images"  # the name of that evaluation among those of `extra_tests`
SCORE_COLUMNS = ("accuracy", "mean_recall")  # of the test sets, in tables where an extra test has a column


def public_head(code: str, backbone: str, task: str) -> dict[str, Any]:
    """Return the settings of a classifier in public `code` ("": the backbone's) for a backbone and a task; of
    one that no public code has, the default ones."""
    code = code or PUBLIC_CODE.get(backbone, "")
    of_backbone = VOLTA_HEADS.get(backbone, {}) if code == "volta" else {}
    return PUBLIC_HEADS.get(code, HEAD) | of_backbone | PUBLIC_TASK_HEADS.get(code, {}).get(task, {})


def _part(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the settings of a part that may be off, not given, or an object."""
    part = values.get(name)
    if isinstance(part, Config):
        return part.model_dump()
    return part if isinstance(part, Mapping) else {}


class FinetuneConfig(LaunchConfig):
    """A task, a model, a transfer setting, and how the model is trained."""

    stored_as = "finetune"

    task: NameOrFile
    """Task by its name, such as xvnli, or a task in a file of your own: my_task.py, my_task.py:CLASS."""
    model: str = ""
    """Export, run, or XLM-R or BERT folder to start from; for few_shot and translate_test the run of an
    English fine-tuning."""
    vision: str | None = None
    """ViT folder that goes with a text-only `model`."""
    backbone_config: BackboneConfig = BackboneConfig()
    """Fields that other people's weights leave open."""
    data: str = ""
    """Folder that holds the official annotation files as IGLUE's repository does."""
    images: str | None = None
    """Folder or tar of the images; null: `data`/images.tar, or `data`/images."""
    regions: str | None = None
    """Folder or file of region features, in the place of images."""
    max_regions: PositiveInt | None = None
    """Regions of an image that are read, the first ones of its features (paper 3: 50); null: all."""
    wordnet: str | None = None
    """Folder like nltk_data/corpora/wordnet, for synonyms among answers and the linguistic prior; null:
    `data`/wordnet. Without one, results have no "synonym_accuracy" and "confusions"."""
    setting: TransferSetting = "zero_shot"
    """Transfer: zero_shot trains on English; few_shot goes on from `model` with each language's shots;
    single_language and all_language train on the languages' own files, one by one or together; translate_test
    evaluates `model`, untrained, on translations into English; untrained evaluates it as it is."""
    direction: Literal["to_en", "from_en"] = "to_en"
    """Translations that setting=translate_test evaluates: of the language's test set into English, or of the
    English test set into the language (from_en; paper 4's "M-CLIP (en to tgt)")."""
    split: Literal["test", "few_shot_test", "testdev"] = "test"
    """Test set. Of xGQA, testdev is all 12,578 questions of GQA's testdev, for runs that see none of the
    2,912 that are in few-shot files; test are the other 9,666, which every paper reports; few_shot_test is
    another name for these."""
    shots: int | str = 5
    """Number of shots, as few-shot files are called: 5, 48, 10x2."""
    languages: tuple[FolderName, ...] = ()
    """Languages that are evaluated; empty: all of the task's."""
    held_out_languages: tuple[str, ...] = ()
    """Languages that no text of the model's pretraining is in: evaluated like the others, and left out of the
    mean of the targets, of the gap and of the disparity."""
    method: str = ""
    """Name of the run in tables; empty: that of its strategies."""
    strategies: StrategiesConfig = StrategiesConfig()
    """Fine-tuning strategies."""
    backbone: str = "unified"
    """Architecture that a `model` which is not ours becomes: unified, cclm, uc2, m3p, oscar, mclip, ..."""
    head: Literal["classifier", "decoder", "pairs"] = "classifier"
    """Classifier; a decoder that generates the answers of an open set and ranks them (CCLM); or, of
    retrieval, a score for each pair of image and caption, read together (pairs; IGLUE)."""
    decoder: DecoderConfig = DecoderConfig()
    """Ranking of answers by a decoder."""
    answers: PositiveInt | None = None
    """Keep so many most frequent answers of the training file; null: the task's answer file, or all that
    there are."""
    freeze: tuple[Part, ...] = ()
    """Parts that never train, and are in evaluation mode, without dropout."""
    cache_image_states: bool = True
    """Encode every image once, where the image encoder is frozen and nothing augments."""
    image_size: PositiveInt | None = None
    """Side of an image in pixels; null: the model's."""
    preprocessing: Literal["model", "opencv"] = "model"
    """Preparation of images: as the model's own (its `preprocessor_config.json`; `model.preprocess` of one
    that was pretrained here), or each squeezed whole into a square by OpenCV, as runs before this setting."""
    max_pixels: MaxPixels = MAX_PIXELS
    """Most pixels of an image; a larger one is not decoded, and cannot be used (as Pillow's limit)."""
    augment: AugmentConfig | None = None
    """Augmentation of training images; null: none."""
    checkpointing: Checkpointing = "none"
    """Activations that backward computes again in place of keeping them, which changes no number: none; each
    block's (a third more time); all, an encoder at a time (two thirds more)."""
    batch: PositiveInt = 64
    """Examples of a step, over all workers."""
    epochs: PositiveInt = 10
    """Passes over the training set."""
    length: int = Field(40, ge=3)
    """Longest text, in tokens with the specials; longer ones are cut."""
    text_normalization: Literal["none", "question", "caption"] = "none"
    """Texts in lower case without ASCII punctuation, as CCLM's code reads questions or captions; none: as
    they are."""
    training_words: PositiveInt | None = None
    """Longest normalised text in training, in words between blanks; null: as long as `length` allows."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout of embeddings and hidden states in training, the image encoder's apart; null: the model's."""
    attention_dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout of attention in the same layers; null: the model's."""
    head_dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout of the classifier."""
    classifier: ClassifierConfig = ClassifierConfig()
    """Classifier where `head` is one."""
    loss: Literal["ce", "ce_labels", "bce", "bce_mean", "triplet"] = "ce"
    """Cross-entropy over classes, or this, and terms of strategies beside it, times their number (ce_labels;
    paper 0's public code, before it clips); or binary cross-entropy of each class, summed (IGLUE, xGQA), or
    their mean (IGLUE, XVNLI and NLVR2). Of head=pairs ce, over four pairs, or triplet, a margin between
    them (IGLUE's UC2)."""
    use_itm_head: bool = True
    """Train and rank pairs of a retrieval by the image-text matching head too; without, by contrast alone."""
    candidates: NonNegativeInt = 16
    """Candidates that the matching head ranks after the contrast (paper 2, appendix B.2.3); 0 ranks every
    pair."""
    contrast: Literal["sum", "mean"] = "sum"
    """Contrasts of images with texts and of texts with images, where `use_itm_head` is false: their sum
    (paper 4, equation 9), or their mean (its public code)."""
    temperature: PositiveFloat = 0.01
    """Temperature of the contrast where `use_itm_head` is false (paper 4's tau)."""
    last_batch: Literal["drop", "keep"] = "drop"
    """Train on what is left of an epoch as a smaller batch (keep; IGLUE), or leave it to another epoch
    (drop)."""
    select: Literal["best", "last", "average"] = "best"
    """Checkpoint that is evaluated: best on the English dev set (few_shot: the language's own, where the task
    has one); last; or the average of the newest `fit.keep` ones, weight by weight, of which there is one an
    epoch."""
    select_metric: Literal["mean_recall", "recall_at_1"] = "mean_recall"
    """Score of retrieval by which the best is chosen."""
    select_ties: Literal["first", "last"] = "first"
    """Choice among checkpoints that score alike."""
    eval_each_epoch: bool = False
    """Evaluate the test set in every language after every epoch too; it chooses nothing (`analyse` draws
    it)."""
    similarity_items: NonNegativeInt = 0
    """Test items in all languages whose states, as the head reads them, are compared after every epoch too
    (paper 1's CLS similarity), with eval_each_epoch; 0: none."""
    extra_tests: Mapping[FolderName, str] = {}
    """Further test sets, by name: folders laid out as `data`, and relative to it, whose test files the final
    model is evaluated on too, in the languages that are there. Their images: images.tar or images in the
    folder itself, or else those of `data`."""
    shuffled_images: bool = False
    """Evaluate the test sets once more, each item with the images of another one: what is right then is read
    in the texts."""
    run_test: bool = True
    """Evaluate the test sets at the end; trials of a search do not."""
    dev_languages: tuple[str, ...] = ()
    """Languages whose own dev sets are scored after each epoch too; they choose nothing within the run."""
    train_limit: PositiveInt | None = None
    """Train on the first so many items; null: all."""
    test_limit: PositiveInt | None = None
    """Evaluate the first so many items of each set; null: all."""
    bad_limit: float = Field(0.01, ge=0, le=1)
    """Share of the items of a set whose image is missing or cannot be read that is still normal; more end the
    run. In training another example takes the place of one; a test item counts as wrong."""
    verify: bool = False
    """Read every image, and hash all of the run's files, at every start; otherwise images are looked for by
    name, and sizes and times of change come first (`raylib.provenance`)."""
    optim: OptimConfig = OptimConfig(warmup=0.0)
    """Optimizer and learning rate."""
    fit: FitConfig = FitConfig()
    """Intervals of the training, and what it runs on."""

    @classmethod
    def derived_defaults(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what `follow` of the classifier and of strategies sets for the whole run: the head; the loss
        (prior); the contrast (alignment)."""
        head, dropout = HEAD, cls.model_fields["head_dropout"].default
        classifier = _part(values, "classifier")
        if classifier.get("follow") == "code":
            backbone = values.get("backbone", cls.model_fields["backbone"].default)
            head, dropout = public_head(classifier.get("code", ""), backbone, values.get("task", "")), 0.0
        follows = {
            name: _part(_part(values, "strategies"), name).get("follow") == "code"
            for name in ("prior", "alignment")
        }
        return {
            "classifier": head,
            "head_dropout": dropout,
            "loss": "ce_labels" if follows["prior"] else "ce",
            "contrast": "mean" if follows["alignment"] else "sum",
        }

    @model_validator(mode="after")
    def _check_settings(self) -> "FinetuneConfig":
        if self.augment and self.cache_image_states and "vision" in self.freeze:
            raise ValueError(
                "augment needs cache_image_states=false: images that are encoded once cannot change"
            )
        for name in self.extra_tests:
            if name in (SHUFFLED_IMAGES, *SCORE_COLUMNS) or name.startswith("."):
                raise ValueError(f"extra_tests: '{name}' is a name of the run's own; give another")
        if self.direction != "to_en" and self.setting != "translate_test":
            raise ValueError(f"direction={self.direction} is of setting=translate_test alone; leave it out")
        return self

    def less_memory(self, workers: int) -> str:
        """Settings that take less memory in a step, with so many workers."""
        settings = next_settings("checkpointing", self.checkpointing, self.fit.micro_batches)
        return (
            f"set {settings}, or give it more than workers={workers}; a lower batch={self.batch} changes the "
            "results"
        )

    @property
    def less_evaluation_memory(self) -> str:
        """Settings that take less memory in an evaluation."""
        return (
            f"set fit.bf16=true, or lower length={self.length}, candidates={self.candidates} or "
            f"decoder.candidates={self.decoder.candidates}, or run it on a device that nothing else uses"
        )

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
        """Name the method for tables. An image encoder that is frozen alone is not named, nor is its
        projection: they know no language. What trains nothing is "as it is", whatever it would freeze."""
        is_named = self.trains and not {"vision", "image_projection"}.issuperset(self.freeze)
        parts = self.freeze if is_named else ()
        frozen = "frozen unimodal encoders" if parts == UNIMODAL else f"frozen {', '.join(parts)}"
        names = [
            "" if self.trains else "as it is",
            frozen if parts else "",
            self.strategies.display_name(),
        ]
        return self.method or " + ".join(filter(None, names)) or "full fine-tuning"

"""Everything that a pretraining run depends on. It is read without importing PyTorch (`raylib.settings`)."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from raylib.config import Config
from raylib.errors import UserError
from raylib.settings import (
    MAX_PIXELS,
    AugmentConfig,
    FitConfig,
    LaunchConfig,
    MaxPixels,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
)


class StreamConfig(Config):
    """One stream of the data."""

    takes_urls = ("folder",)
    folder: str | None = None
    """Folder, or URL (`raylib.data.fetch`), of the stream's shards; null: the corpus's."""
    batch: NonNegativeInt = 0
    """Samples of the stream in a step, over all workers; 0 leaves the stream out."""
    length: int = Field(64, ge=3)
    """Longest sentence, in tokens with the two specials; longer ones are cut."""
    languages: tuple[str, ...] = ()
    """Languages to use; empty: all that there are."""
    alpha: float = Field(0.3, ge=0)
    """Exponent of language sampling, q ~ p^alpha: 1 as often as in the data, 0 all alike (paper 2: CC-100
    0.3, WikiMatrix 1)."""
    lanes: PositiveInt = 8
    """Parallel walks over the shards, of which a step takes equal shares. Where the workers divide them, each
    reads the shards of its own lanes alone."""
    block: PositiveInt = 4096
    """Samples that a lane shuffles at a time."""


class DataConfig(Config):
    """Data that a run reads."""

    tokenizer: str
    """SentencePiece model, tokenizer.json or vocab.txt; empty: the corpus's."""
    image_text: StreamConfig = StreamConfig(length=35)
    """Images with English captions."""
    parallel: StreamConfig = StreamConfig(length=50)
    """English sentences with their translations."""
    text: StreamConfig = StreamConfig(length=64)
    """Plain sentences in all languages."""
    augment: AugmentConfig | None = AugmentConfig()
    """Augmentation of training images; null: none, they are prepared as in evaluation."""
    cache_image_states: bool = True
    """Encode every training image once, where the image encoder is frozen and nothing augments; the states
    lie in `runs`/encoded, for all runs with this encoder and these images."""
    max_pixels: MaxPixels = MAX_PIXELS
    """Most pixels of an image; a larger one is not decoded, and cannot be used (as Pillow's limit)."""
    caption_language: str = "en"
    """Language of the captions that are trained on."""
    facts: bool = False
    """Read what is true of each image and what each caption claims, which the corpus must tell: a caption
    that is true of another image is no negative of it in contrast and matching."""
    mask_probability: float = Field(0.15, ge=0, le=1)
    """Share of the words that are masked (BERT: 15 %; of these 80 % become the mask, 10 % another word)."""
    mask_separator: bool = False
    """Let `</s>` be masked too, as paper 2's public code does."""
    bad_limit: float = Field(0.01, ge=0, le=1)
    """Share of the image-text samples read, by all workers since the run's first start, that may be unusable;
    more end the run at its next line of progress."""
    retrieval: str | None = None
    """Retrieval set that each evaluation scores; null: the corpus's, if it has one."""
    test_sets: dict[str, str] | None = None
    """Retrieval sets {name: folder} that the end of the run scores once; null: those of the corpus, in its
    folder `test_sets`."""
    dev: str | Literal[False] | None = None
    """Folder of held-out samples, whose losses each evaluation computes; null: the corpus's, if it has one;
    false: none."""
    cache: str | None = None
    """Folder of copies of remote shards."""
    verify: bool = False
    """Compare the content of every shard with its manifest, and with what the run began with, at every start;
    otherwise sizes and times of change come first (`raylib.provenance`)."""

    @property
    def streams(self) -> dict[str, StreamConfig]:
        return {"image_text": self.image_text, "parallel": self.parallel, "text": self.text}


Start = Literal["text", "vision", "model"]
START_FOLDERS: dict[Start, str] = {
    "text": "an XLM-R or BERT",
    "vision": "a ViT",
    "model": "an export or a run",
}


class InitConfig(Config):
    """Weights to start from; what none are given for starts from random ones. `init=scratch`: all of it."""

    required: tuple[Start, ...] = ()
    """Weights that must be given: a recipe's, whose results random ones would not be."""
    text: str | None = None
    """Folder of an XLM-R or BERT in Hugging Face format."""
    layers: tuple[NonNegativeInt, ...] | None = None
    """Layers of `text`, or of `model`, that become the text encoder's, then the unified ones; one may serve
    twice. null: of `text` its first, then its last; of `model` all."""
    vision: str | None = None
    """Folder of a ViT in Hugging Face format."""
    model: str | None = None
    """Export or run of ours, all of whose weights are taken, for a further stage with a schedule of its
    own."""

    @model_validator(mode="before")
    @classmethod
    def _read_scratch(cls, values: Any) -> Any:
        if values == "scratch":
            return {}
        # "init=scratch init.vision=FOLDER", of which the first is no file (`change_settings`)
        if isinstance(values, dict) and values.get("file") == "scratch":
            return {name: value for name, value in values.items() if name != "file"}
        return values

    def require_given(self, recipe: str) -> None:
        """Raises UserError: weights that the recipe starts from are not given."""
        given = {"text": self.text or self.model, "vision": self.vision or self.model, "model": self.model}
        if missing := [name for name in self.required if not given[name]]:
            wanted = " ".join(f"init.{name}=FOLDER ({START_FOLDERS[name]})" for name in missing)
            raise UserError(
                f"{recipe} starts from weights that are given, not from random ones: give {wanted}; "
                "or insist: init=scratch, before any other init."
            )

    @model_validator(mode="after")
    def _one(self) -> "InitConfig":
        if self.model and (self.text or self.vision):
            raise ValueError("init.model has all weights; leave init.text and init.vision out")
        return self


class PretrainConfig(LaunchConfig):
    """Everything that a pretraining run depends on."""

    stored_as = "pretrain"

    @classmethod
    def derived_defaults(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the defaults outside of the objective that `objective.follow` names."""
        objective = values.get("objective")
        if isinstance(objective, ObjectiveConfig):
            objective = objective.model_dump()
        follows_code = isinstance(objective, Mapping) and objective.get("follow") == "code"
        return {
            "optim": {"weight_decay": 0.02 if follows_code else 0.2},
            "data": {"mask_separator": follows_code},
        }

    corpus: str = "sample"
    """Folder with image_text, parallel, text, retrieval, dev and a tokenizer; or "sample", the embedded one,
    or "scenes" of it."""
    model: ModelConfig
    """Sizes of the model."""
    init: InitConfig = InitConfig()
    """Weights to start from."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """Losses."""
    data: DataConfig
    """Data that the run reads."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and learning rate."""
    fit: FitConfig
    """Length and intervals of the training."""

    @model_validator(mode="after")
    def _fits(self) -> "PretrainConfig":
        longest = max(stream.length for stream in self.data.streams.values())
        if longest > self.model.positions:
            raise ValueError(
                f"model.positions={self.model.positions} is less than the longest data length {longest}"
            )
        for name, every in self._fused_share().items():
            if every > (batch := self.data.streams[name].batch):
                raise ValueError(
                    f"objective.fuse_every={every} is more than data.{name}.batch={batch}; set it to "
                    f"{batch} or less"
                )
        return self

    def _fused_share(self) -> dict[str, int]:
        """By each stream in use, of how many samples in a row one reaches the unified encoder."""
        streams = {name: stream for name, stream in self.data.streams.items() if stream.batch}
        return {name: 1 if name == "text" else self.objective.fuse_every for name in streams}

    def check_workers(self, workers: int) -> None:
        """Raises UserError: one of so many workers would have no sample of a stream, or none that is
        fused."""
        most = {name: self.data.streams[name].batch // every for name, every in self._fused_share().items()}
        name = min(most, key=most.__getitem__, default="")
        if name and most[name] < workers:
            every = self._fused_share()[name]
            fused = f", of which one in {every} is fused (objective.fuse_every)" if every > 1 else ""
            raise UserError(
                f"{workers} workers and data.{name}.batch={self.data.streams[name].batch}{fused}: a worker "
                f"would have none; set workers={most[name]} or fewer"
            )

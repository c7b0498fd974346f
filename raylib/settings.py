"""Settings that the stages share: of a model, its objective, optimizer and training, of images, of a run.

They stand here, apart from the code that each configures and that imports them (`raylib.engine.OptimConfig`),
for that code needs PyTorch, which takes seconds to import: help, errors of a command line and
`--print-config` need settings alone (tests/test_help.py).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from raylib.config import (
    Config,
    Folder,
    FolderName,
    NameOrFile,
    Size,
    SizeOrZero,
    UserFile,
    load_user_file,
    lookup,
    validate,
)
from raylib.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from raylib.objectives import PretrainingTerm

LaunchConfigT = TypeVar("LaunchConfigT", bound="LaunchConfig")

# ---- a run, its training, its optimizer


class LaunchConfig(Config):
    """Folder and resources of a run."""

    recipe: str = ""
    """The recipe that the config began as; set by the command line."""
    name: FolderName = "run"
    """Name of the run: its folder is `runs`/`name`."""
    runs: Folder = "runs"
    """Folder of all runs; the environment variable POLYGLANCE_RUNS gives another one."""
    runtime: Literal["ray", "local"] = "ray"
    """Train on the workers of a Ray cluster, or in this process (under torchrun, in each of its
    processes)."""
    workers: PositiveInt = 2
    """Processes that train together, one a GPU; only on Ray."""
    gpu: bool | None = None
    """Give each worker a GPU; null: if the cluster has any."""
    max_failures: NonNegativeInt = 3
    """Times that a run on Ray goes on by itself after a worker, a node or a connection was lost."""
    max_preemptions: int = Field(default=-1, ge=-1)
    """Times that it goes on elsewhere after Ray took a node away (spot instances); -1: without limit."""
    resume: str = "newest"
    """Checkpoint to go on from: newest, best, or step_NNNNNN; newer ones are set aside, never deleted."""
    keep_optimizer: bool = True
    """Keep optimizer states in the checkpoints of a run that has ended; without, they have weights alone."""
    allow_pipe: bool = False
    """Run shell commands (`pipe:...`) that a config file, a stored run's too, or a search space has for a
    folder of data; counts only on the command line, of each start."""
    allow_code: bool = False
    """Run Python files that a config file names (`task=my.py`, `strategies.my=my.py`, ...) and the command
    line does not; counts only on the command line, of each start."""
    deviations: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings of a paper's recipe that are not as published: each path with the value here (`ours`), the
    paper's (`published`), and the reason."""


def deviates(published: Any, reason: str) -> dict[str, Any]:
    """Return the entry of a recipe's `deviations` for a setting that its paper publishes as `published`."""
    return {"published": published, "reason": reason}


def update_deviations(config: LaunchConfigT) -> LaunchConfigT:
    """Return `config` with the values that it has now among its `deviations`, without those that changes of
    its settings have ended."""
    if not config.deviations:
        return config
    values, found = config.model_dump(mode="json"), {}
    for path, entry in config.deviations.items():
        ours = setting_value(values, path)
        if not same_value(ours, entry["published"]):
            found[path] = {"ours": ours, "published": entry["published"], "reason": entry["reason"]}
    return config.model_copy(update={"deviations": found})


def setting_value(values: Mapping[str, Any], path: str) -> Any:
    """Return the value at a dotted path of plain settings; None in a part that is off."""
    node: Any = values
    for name in path.split("."):
        node = node[name] if isinstance(node, Mapping) else None
    return node


def same_value(ours: Any, published: Any) -> bool:
    """Return whether a plain value is the published one, or one of several: {"one_of": [...]}."""
    if isinstance(published, Mapping) and "one_of" in published:
        return any(same_value(ours, each) for each in published["one_of"])
    return json.dumps(ours) == json.dumps(published) or (  # true is not 1, but 1 is 1.0
        isinstance(ours, float) and type(published) in (int, float) and ours == published
    )


# settings that may change when a run goes on: no number depends on them
MUTABLE_SETTINGS = (
    "recipe",
    "runs",
    "runtime",
    "workers",
    "gpu",
    "max_failures",
    "max_preemptions",
    "resume",
    "keep_optimizer",
    "allow_pipe",
    "allow_code",
    "deviations",
    "fit.stop_after",
    "fit.log_every",
    "fit.eval_every",
    "fit.save_every",
    "fit.keep",
    "fit.async_save",
    "fit.loader_workers",
    "fit.track",
    "fit.sharding",
    "fit.max_skipped",
    "fit.micro_batches",
    "fit.compile",
    "model.checkpointing",
    "checkpointing",
    "data.cache",
    "bad_limit",
    "data.bad_limit",
    "data.verify",
    "verify",
)

Backend = Literal["tensorboard", "wandb", "mlflow"]  # of a tracker (`raylib.trackers`)
PRECISION = ("bf16", "residual", "tf32")  # settings of `FitConfig` that say in what a model computes
Residual = Literal["float32", "bfloat16"]  # the residual stream and layer norms
Checkpointing = Literal["none", "blocks", "all"]  # activations that backward computes again
Sharding = Literal["none", "zero2"]  # of optimizer states and gradients over the workers


class FitConfig(Config):
    """Length of a training, and its intervals, in steps; 0 means only at the end."""

    steps: NonNegativeInt = 0
    """Optimizer steps of a training; fine-tuning sets them from its epochs."""
    seed: int = 0
    """Seed of everything that is drawn: weights, order of the data, augmentation, dropout."""
    log_every: PositiveInt = 10
    """Steps between two lines of metrics."""
    eval_every: NonNegativeInt = 0
    """Steps between two evaluations; 0: only at the end, in fine-tuning after each epoch. The best checkpoint
    is chosen among those of steps that are evaluated: let it be a multiple of `save_every`, or the reverse
    (fine-tuning saves whenever it evaluates)."""
    save_every: NonNegativeInt = 0
    """Steps between two checkpoints; 0: only at the end."""
    keep: PositiveInt = 2
    """Number of newest checkpoints that stay, beside the best one, and one that a notice to stop has left."""
    async_save: bool = True
    """Write checkpoints while training goes on, from a copy in the host's memory (12 bytes a parameter, over
    all workers together); false: training waits."""
    max_skipped: NonNegativeInt = 10
    """Steps in a row whose loss or gradient may be not finite: they change nothing; one more ends the run."""
    bf16: bool | None = None
    """Compute in bfloat16 under autocast; null: where the hardware multiplies it."""
    residual: Residual | None = None
    """Format of the residual stream and of layer norms where steps are in bf16; null: bfloat16 on a GPU,
    float32 elsewhere. Weights, optimizer and losses are float32."""
    tf32: bool = True
    """Multiply what stays float32 in TF32 on a GPU; scores of contrast and matching never are."""
    compile: bool | None = None
    """Let torch.compile fuse norms, residuals, feed-forward layers and the head's softmax into fewer kernels;
    null: no, until it is measured on a GPU."""
    sharding: Sharding | None = None
    """Optimizer states and gradients: none (all on each worker; PyTorch's DDP), zero2 (each worker keeps a
    share; DeepSpeed ZeRO-2); null: zero2 on Ray, else none."""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format in which gradients travel between workers; bfloat16 halves their traffic, and rounds."""
    deterministic: bool = False
    """Take kernels that add in one order on a GPU, so that equal runs are equal to the bit; slower. On a CPU
    they are in any case."""
    micro_batches: PositiveInt = 1
    """Pieces in which a worker's part of the batch passes the encoders, each computed again in backward: the
    memory of one piece, a third more time, the loss of the whole batch (cached gradients)."""
    loader_workers: NonNegativeInt | None = None
    """Processes of a worker that prepare batches; 0: the worker itself; null: as many as its first steps show
    to be needed, and its CPUs allow."""
    track: tuple[Backend, ...] = ()
    """Trackers that metrics go to, beside metrics.jsonl."""
    stop_after: PositiveInt | None = None
    """Stop at this step, as an interruption would; the run stays unfinished, and goes on later."""

    def uses_bf16(self, device: "torch.device") -> bool:
        """Return whether steps on `device` are in bf16."""
        from raylib.runtime import has_bf16

        return has_bf16(device) if self.bf16 is None else self.bf16

    def describe_precision(self, device: "torch.device") -> str:
        """Return the format in which models compute on `device`, in training and in evaluation."""
        return "bfloat16" if self.uses_bf16(device) else "float32"

    def set_precision(self, model: "nn.Module", device: "torch.device") -> str:
        """Set the formats of numbers of `model` on `device`, and return a line about them; "" on a CPU."""
        from raylib.precision import set_compiler, set_residual, set_tf32
        from raylib.runtime import describe_precision

        set_residual(model, self.residual)
        set_compiler("inductor" if self.compile else None)
        if device.type != "cuda":
            return ""
        set_tf32(self.tf32)
        line = describe_precision(device, self.uses_bf16(device), self.residual, self.tf32)
        return f"{line}, compiled" if self.compile else line

    def due_after(self, done: int, last: int) -> tuple[bool, bool, bool]:
        """Return whether to log, to evaluate, to save after `done` steps. The loop ends at `last`, and saves
        there in any case, as for a notice."""

        def is_due(every: int) -> bool:
            return done == self.steps or (every > 0 and done % every == 0)

        is_last = done == last
        return (
            done % self.log_every == 0 or is_last,
            is_due(self.eval_every),
            is_due(self.save_every),
        )


def stored_fit(settings: Mapping[str, Any], folder: Path) -> FitConfig | None:
    """Return what the settings of a run, or an export's part of them, say of the precision of its training;
    None: nothing. folder: that they are of."""
    if "fit" not in settings:
        return None
    values = {name: settings["fit"][name] for name in PRECISION if name in settings["fit"]}
    return validate(FitConfig, values, f"{folder}/config.json: fit")


class PartRates(Config):
    """Highest learning rates of parts of a model, in the place of `optim.lr`; null: that. Schedule, layer
    decay and unfreezing act on them as on it."""

    vision: PositiveFloat | None = None
    """Learning rate of the image encoder."""
    text: PositiveFloat | None = None
    """Learning rate of the text encoder, with its embeddings."""
    fusion: PositiveFloat | None = None
    """Learning rate of the layers in which text meets image."""
    head: PositiveFloat | None = None
    """Learning rate of everything else: heads, projections, temperature."""
    new_factor: PositiveFloat = 1.0
    """Factor of the learning rate of parameters that the weights to start from lack: a new classifier, the
    embedding of region features (CCLM's code: 2)."""

    @property
    def parts(self) -> dict[str, float]:
        """Return the rates of the parts that have one of their own."""
        rates = {"vision": self.vision, "text": self.text, "fusion": self.fusion, "head": self.head}
        return {part: rate for part, rate in rates.items() if rate is not None}

    def scale(self, part: str, is_new: bool, lr: float) -> float:
        """Return what `lr` is multiplied by for parameters of a part."""
        return self.parts.get(part, lr) / lr * (self.new_factor if is_new else 1.0)


class OptimConfig(Config):
    """AdamW and the schedule of its learning rate."""

    lr: PositiveFloat = 1e-4
    """Highest learning rate, at the end of the warm-up."""
    rates: PartRates = PartRates()
    """Learning rates of parts of the model."""
    warmup: float = Field(0.1, ge=0, le=1)
    """Share of the steps in which the learning rate rises from 0 to `lr`."""
    decay: Literal["linear", "cosine"] = "linear"
    """Fall to 0 after the warm-up: linear (paper 2, section 4.1), or along half a cosine (paper 4)."""
    schedule_factor: float = Field(1.0, ge=1)
    """Lay the schedule out for this many times the steps that are trained (IGLUE: 20 epochs, of which xGQA
    trains 5)."""
    weight_decay: NonNegativeFloat = 0.2
    """AdamW's weight decay, of matrices alone: biases, norms and scalars have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the mean of gradients and of their squares."""
    eps: PositiveFloat = 1e-8
    """AdamW's term in the denominator."""
    clip: NonNegativeFloat | None = 1.0
    """Largest norm of the whole gradient; a longer one is scaled down to it. 0 or null: none is scaled."""


# ---- images

# as Pillow, which warns there: a quarter of a GiB as RGB
MAX_PIXELS = 89_478_485
MaxPixels = Annotated[int, Field(ge=1, le=1 << 30)]  # of an image; OpenCV decodes no larger one

# RandAugment's (`raylib.data.augmentation`: `WARPS`, and `TONES` with "identity")
OPERATIONS = (
    {"identity", "rotate", "shear_x", "shear_y", "translate_x", "translate_y"}
    | {"autocontrast", "brightness", "contrast", "equalize", "hue", "posterize", "saturation", "solarize"}
    | {"blur", "sharpness"}
)


Resample = Literal["area", "nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]


class PreprocessConfig(Config):
    """Preparation of an image that nothing augments: resized, its centre cropped to `image_size` on both
    sides. Models bring theirs (`preprocessor_config.json`)."""

    resize: Literal["square", "shortest_edge"] = "square"
    """Squeeze the whole image into a square, or resize its shorter side, and the other in proportion."""
    resize_to: PositiveInt | None = None
    """Pixels of the square's sides, or of the shorter one; null: `image_size`."""
    resample: Resample = "area"
    """Filter: area (OpenCV's: areas where an image shrinks, cubic where it grows), or one of Pillow's."""

    def for_size(self, new: int, old: int) -> "PreprocessConfig":
        """Return the same for images of `new` pixels in the place of `old`."""
        if self.resize_to is None:
            return self
        return self.model_copy(update={"resize_to": round(self.resize_to * new / old)})


SQUEEZED = PreprocessConfig()  # of models that say nothing


class AugmentConfig(Config):
    """Random changes of training images: crop, RandAugment's operations, flip, grey, cutout."""

    randaugment: Literal["fused", "albef", "pil"] = "fused"
    """fused: crop, flip and moves as one warp, all operations applied, at strengths up to `magnitude`; albef:
    ALBEF's public code (CCLM's, mVLP's) to the byte, a bicubic crop, then operations in turn, each on half of
    the images, at `magnitude`; pil: the same, but without that code's overflows."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Share of an image's area that a random crop keeps: least, most. Above 1 (fused) the crop is larger than
    the image, which then stands smaller, at a random place, on white."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect (width over height) of a crop: least, most; drawn log-uniformly."""
    operations: int = Field(2, ge=0)
    """Number of operations of `choices` that are applied to an image (RandAugment's N)."""
    magnitude: float = Field(7.0, ge=0, le=10)
    """Strength of these operations, at most (RandAugment's M, of 10)."""
    choices: tuple[str, ...] = (
        "identity",
        "autocontrast",
        "equalize",
        "brightness",
        "sharpness",
        "shear_x",
        "shear_y",
        "translate_x",
        "translate_y",
        "rotate",
    )
    """Operations to choose from."""
    flip: float = Field(0.0, ge=0, le=1)
    """Probability of a horizontal flip; 0 by default, for captions say left and right."""
    flip_unless: tuple[str, ...] = ()
    """Never flip an image whose text, or an answer, has one of these strings in it (CCLM on GQA: left,
    right)."""
    grayscale: float = Field(0.0, ge=0, le=1)
    """Probability that an image loses its colours."""
    cutout: float = Field(0.0, ge=0, le=1)
    """Probability that a square of an image is painted over."""
    outline: float = Field(0.0, ge=0, le=1)
    """Probability that an image, a drawing on white, becomes its contours, dark on white."""
    silhouette: float = Field(0.0, ge=0, le=1)
    """Probability that a drawing becomes one dark shape, the contours inside it white."""
    color_jitter: float = Field(0.0, ge=0, le=1)
    """Probability that hues turn by a random angle and saturation changes."""
    elastic: float = Field(0.0, ge=0, le=0.5)
    """Largest shift of a smooth random deformation, as a share of the side (`fused` alone)."""

    @field_validator("scale", "ratio")
    @classmethod
    def _ascending(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("must be two positive numbers, the smaller one first")
        return value

    @field_validator("choices")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := set(value) - OPERATIONS or not value:
            raise ValueError(f"unknown operations {unknown}; there are: {', '.join(sorted(OPERATIONS))}")
        return value

    @model_validator(mode="after")
    def _has_operations(self) -> "AugmentConfig":
        if self.randaugment != "fused" and self.scale[1] > 1:
            raise ValueError(
                f"a scale above 1 is of randaugment=fused; with {self.randaugment} set 1 or less"
            )
        if self.randaugment != "fused" and self.elastic:
            raise ValueError(f"elastic is of randaugment=fused; with {self.randaugment} set 0")
        if self.outline + self.silhouette > 1:
            raise ValueError("outline and silhouette exclude each other: their sum must be 1 or less")
        own = set(type(self).model_fields["choices"].default)
        if self.randaugment != "fused" and (others := set(self.choices) - own):
            raise ValueError(
                f"randaugment={self.randaugment} has no {', '.join(sorted(others))}; it has: "
                f"{', '.join(sorted(own))}"
            )
        return self

    @classmethod
    def albef(cls, smallest: float, **settings: Any) -> "AugmentConfig":
        """Augmentation of ALBEF's code, CCLM's and mVLP's, with crops of `smallest` of the area and more."""
        published = {"randaugment": "albef", "scale": (smallest, 1.0), "magnitude": 7.0, "flip": 0.5}
        return cls(**{**published, **settings})


# ---- models


PixelStats = float | tuple[float, float, float]  # of a pixel's 0..255: for all colours, or one each
# what published image encoders were trained with; many ViTs in Hugging Face folders: 127.5 both
CLIP_MEAN = (255 * 0.48145466, 255 * 0.4578275, 255 * 0.40821073)
CLIP_STD = (255 * 0.26862954, 255 * 0.26130258, 255 * 0.27577711)
IMAGENET_MEAN = (255 * 0.485, 255 * 0.456, 255 * 0.406)
IMAGENET_STD = (255 * 0.229, 255 * 0.224, 255 * 0.225)


def check_heads(sizes: Any) -> Any:
    """Return a model's sizes.

    Raises:
        ValueError: their width is not one that their heads divide among themselves.
    """
    if sizes.width % sizes.heads:
        raise ValueError(f"width {sizes.width} is not a multiple of heads {sizes.heads}")
    return sizes


class SwinSizes(Config):
    """Sizes of a Swin Transformer; the defaults are Swin-B."""

    width: Size = 128
    """Width of the first stage's states; it doubles from stage to stage."""
    layers: tuple[Size, ...] = Field((2, 2, 18, 2), max_length=8)
    """Layers of each stage."""
    heads: tuple[Size, ...] = Field((4, 8, 16, 32), max_length=8)
    """Attention heads of each stage."""

    @model_validator(mode="after")
    def _fits(self) -> "SwinSizes":
        if not self.layers or len(self.layers) != len(self.heads):
            raise ValueError(f"layers {self.layers} and heads {self.heads} do not speak of the same stages")
        for stage, heads in enumerate(self.heads):
            if self.width * 2**stage % heads:
                raise ValueError(
                    f"stage {stage} is {self.width * 2**stage} wide, no multiple of its {heads} heads"
                )
        return self

    @property
    def merges(self) -> int:
        """Number of patches, in each direction, that one of the last stage was made of."""
        return 2 ** (len(self.layers) - 1)


class ModelConfig(Config):
    """Sizes of a unified model. The defaults are the paper's `base`: 12 image, 6 text and 6 unified
    layers."""

    vocabulary: SizeOrZero = 250002
    """Pieces of the vocabulary; 0: the tokenizer's."""
    width: Size = 768
    """Width of hidden states of text and fusion."""
    heads: Size = 12
    """Attention heads; `width` is a multiple."""
    feedforward: Size = 3072
    """Width of the feed-forward layers."""
    text_layers: SizeOrZero = 6
    """Layers of the text encoder."""
    fusion_layers: SizeOrZero = 6
    """Unified layers, in which text attends to images, or to another sentence (paper 2, section 3.1)."""
    vision_layers: SizeOrZero = 12
    """Layers of the vision transformer; a Swin has its own."""
    vision_width: Size | None = None
    """Width of the vision transformer; null: that of the text. Its heads are as wide as those of texts, and a
    linear map leads to `width`."""
    vision_window: Size | None = None
    """Side in pixels of windows that never see each other; null: one window."""
    image_size: Size = 256
    """Side of an image in pixels."""
    patch: Size = 16
    """Side of a patch in pixels."""
    positions: Size = 512
    """Longest text in tokens."""
    embedding: Size = 256
    """Width of the embeddings of contrast and retrieval."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout of text and unified layers; stochastic depth of a Swin."""
    vision_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of the vision transformer (ALBEF's and mVLP's public code: none)."""
    eps: PositiveFloat = 1e-12
    """Epsilon of layer norms of text and unified layers."""
    fusion_eps: PositiveFloat | None = None
    """Epsilon of layer norms of the unified layers; null: `eps`."""
    vision_eps: PositiveFloat = 1e-12
    """Epsilon of layer norms of the vision transformer; a Swin's is 1e-5."""
    match_head: Literal["linear", "mlp"] = "linear"
    """Head that tells whether an image and a text belong together: a linear map, or CCLM's of two layers."""
    temperature: PositiveFloat = 0.07
    """Temperature of the contrast at the start; it is trained (paper 2, equation 1)."""
    pixel_mean: PixelStats = 127.5
    """Subtracted from a pixel's 0..255, for all colours or each."""
    pixel_std: PixelStats = 127.5
    """Divisor of pixels afterwards, for all colours or each."""
    preprocess: PreprocessConfig = PreprocessConfig()
    """Preparation of images in evaluation, and in training where nothing augments them."""
    fusion: Literal["cross", "entangled"] = "cross"
    """Cross-attention, or self-attention over text and memory in one row (paper 2's "w/o uni-arch")."""
    swin: SwinSizes | None = None
    """A Swin Transformer in the place of the ViT."""
    checkpointing: Checkpointing = "none"
    """Activations that backward computes again in place of keeping them, which changes no number: none; each
    block's (a third more time); all, an encoder at a time (two thirds more)."""

    @model_validator(mode="after")
    def _divisible(self) -> "ModelConfig":
        check_heads(self)
        if self.vision_width and self.vision_width % (self.width // self.heads):
            raise ValueError(
                f"vision_width {self.vision_width} is not a multiple of a head's {self.width // self.heads}"
            )
        if self.image_size % self.stride:
            raise ValueError(
                f"image_size {self.image_size} is no multiple of the {self.stride} pixels of a last patch or "
                "window"
            )
        if self.vision_window and (self.swin or self.vision_window % self.patch):
            raise ValueError(
                f"vision_window {self.vision_window} is for a ViT, and a multiple of its patch {self.patch}"
            )
        return self

    @property
    def stride(self) -> int:
        """Pixels that a patch is wide, for a Swin one of its last stage, or a window: images are a multiple
        of it."""
        return self.vision_window or self.patch * (self.swin.merges if self.swin else 1)


class ClassifierConfig(Config):
    """The classifier on the state that an image and a text end in.

    `follow=code` sets the others, and `head_dropout`, to what public code has for the run's `backbone` and
    `task` (`finetune.config.public_head`); `paper`, to a head of two layers: papers say no more.
    """

    follow: Literal["paper", "code"] = "paper"
    """Head of public code for the task, or of two layers (paper)."""
    code: Literal["", "volta", "mvlp", "cclm"] = ""
    """Public code whose head it is where `follow` says code; empty: that of the backbone."""
    layers: Literal[1, 2] = 2
    """Linear layers: 1 is a linear map from the state to the classes."""
    hidden_ratio: float = Field(2.0, gt=0, le=64)
    """Width of the hidden layer, over that of the state of one image and its text."""
    activation: Literal["gelu", "relu"] = "gelu"
    """Activation of the hidden layer."""
    norm: Literal["after", "before", "none"] = "after"
    """Layer norm of the hidden layer, after its activation or before it."""
    eps: float = Field(1e-5, gt=0, le=1)
    """Epsilon of this layer norm."""
    init: Literal["scaled", "normal", "uniform"] = "scaled"
    """First weights: of variance 1 / inputs; of deviation 0.02, as BERT's (normal); or PyTorch's own."""
    pooled_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of the state, before the head; that of its hidden layer is `head_dropout`."""


class BackboneConfig(Config):
    """Fields that other people's weights leave open, in place of the backbone's own; null: its own."""

    activation: Literal["tanh", "relu"] | None = None
    """After the pooler: UC2's own is tanh, VOLTA's of UC2 relu."""
    eps: PositiveFloat | None = None
    """Epsilon of layer norms in the stack: UC2's own is 1e-12, VOLTA's of UC2 1e-5."""
    row_mask: Literal["all", "volta"] | None = None
    """Tokens that M3P reads of a row with empty slots: all, or those that VOLTA's mask leaves."""
    region_slots: Size | None = None
    """Slots for regions, behind which M3P's texts begin: 100."""

    @property
    def changes(self) -> dict[str, Any]:
        """Return the fields that are given."""
        return self.model_dump(exclude_none=True)


class DecoderConfig(Config):
    """The ranking of answers."""

    candidates: PositiveInt = 128
    """Answers with the likeliest first token that are scored whole (CCLM: 128)."""
    embeddings: Literal["shared", "own", "random"] = "shared"
    """Embeddings and way to the vocabulary: the text encoder's; copies of them, trained apart (CCLM); or
    random ones (CCLM on X2-VLM)."""
    count_first_twice: bool = False
    """Add the first token's log-probability once more, as CCLM's public code does and its paper does not
    say."""


# ---- the objective of pretraining


Version = Literal["clean", "masked"]  # of a sentence


class TermWeights(Config):
    """Weight of each term (`raylib.objectives.pretraining.TERMS`); 0 leaves it, and what only it needs, out.

    Their order is that in which a step computes and adds them up.
    """

    ucl_image: NonNegativeFloat = 1.0
    """Weight of the contrast of images and captions (UCL; paper 2, equation 1)."""
    itm: NonNegativeFloat = 1.0
    """Weight of image-text matching, with hard negatives (ITM; paper 2, equation 3)."""
    vlm: NonNegativeFloat = 1.0
    """Weight of masked words of captions beside their image (VLM; paper 2, equation 2)."""
    ucl_translation: NonNegativeFloat = 1.0
    """Weight of the contrast of English sentences and their translations (UCL; paper 2, equation 1)."""
    tlm: NonNegativeFloat = 1.0
    """Weight of masked words of a sentence beside its translation (TLM; paper 2, equation 2)."""
    xmlm: NonNegativeFloat = 1.0
    """Weight of masked words of plain text (xMLM; paper 2, equation 2)."""


class UserTerm(Config):
    """A term in a user's own file."""

    file: NameOrFile
    """Python file of yours with the term: my_term.py, or my_term.py:function where it has several."""
    weight: NonNegativeFloat = 1.0
    """Weight of the term in the loss."""

    @property
    def path(self) -> Path:
        """Return where the file lies; of stored settings, where the run keeps its copy."""
        return self.file.path if isinstance(self.file, UserFile) else Path(self.file)

    def load(self) -> "PretrainingTerm":
        """Raises UserError: no such file, no such term in it, several and none is named."""
        from raylib.objectives import PretrainingTerm

        path, name = self.path, self.file.partition(":")[2]
        if isinstance(self.file, UserFile):
            self.file.tell()
        entries = {k: v for k, v in vars(load_user_file(path)).items() if isinstance(v, PretrainingTerm)}
        if not entries:
            raise UserError(f"{path}: no function in it is a term; @term above a function makes it one")
        if not name and len(entries) > 1:
            raise UserError(
                f"{path}: several terms ({', '.join(entries)}); say which: {path}:{next(iter(entries))}"
            )
        return lookup(name, entries, f"term of {path}") if name else next(iter(entries.values()))


class UserTerms(Config):
    """Terms in users' own files, by any name: `my=my_term.py`, `my.weight=0.5`."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[
        str, Annotated[UserTerm, BeforeValidator(lambda v: {"file": v} if isinstance(v, str) else v)]
    ] = Field(init=False)

    def items(self) -> list[tuple[str, UserTerm]]:
        return list(self.__pydantic_extra__.items())


# defaults of `ObjectiveConfig` by its `follow`: the paper's equations, or what its public code does
# (docs/pretraining.md has the table, with the code's places)
FOLLOW: dict[str, dict[str, Any]] = {
    "paper": {
        "ucl_text": "clean",
        "itm_text": "clean",
        "tlm_source": "clean",
        "directions": "sum",
        "tlm_directions": "sum",
        "itm_weighting": "classes",
        "contrast_groups": 1,
        "train_vision": True,
        "train_image_projection": True,
    },
    "code": {
        "ucl_text": "masked",
        "itm_text": "masked",
        "tlm_source": "masked",
        "directions": "mean",
        "tlm_directions": "sum",
        "itm_weighting": "pairs",
        "contrast_groups": 8,
        "train_vision": False,
        "train_image_projection": False,
    },
}


class ObjectiveConfig(Config):
    """Losses of pretraining, and what of the model they train."""

    follow: Literal["paper", "code"] = "paper"
    """Whose losses the defaults of the other settings are: the paper's equations, or its public code's
    (docs/pretraining.md). A setting that is given stays as it is given."""
    weights: TermWeights = TermWeights()
    """Weight of each term; 0 leaves a term out."""
    terms: UserTerms = UserTerms()
    """Terms in files of your own."""
    ucl_text: Version = "clean"
    """Captions that the contrast sees: clean, or masked as the public code's."""
    itm_text: Version = "clean"
    """Captions that image-text matching sees; masked ones, as the public code's, save a pass of the unified
    encoder: that of VLM is then its pass of the right pairs."""
    tlm_source: Version = "clean"
    """Sentences that TLM reads beside the masked ones: clean, or masked as the public code's."""
    contrast: Literal["softmax", "sigmoid"] = "softmax"
    """Loss of the contrasts: softmax over all pairs of a step (InfoNCE; the paper), or a sigmoid of each pair
    (SigLIP), which needs no worker to hold the logits of all."""
    directions: Literal["sum", "mean"] = "sum"
    """Add both directions of a contrast (the paper), or take their mean (its public code)."""
    tlm_directions: Literal["sum", "mean"] = "sum"
    """Add both directions of TLM, or take their mean."""
    itm_weighting: Literal["classes", "pairs"] = "classes"
    """Weights of right and wrong pairs in image-text matching: the mean of either is a half (classes;
    equation 3), or each pair counts as one, two of three being wrong (pairs; the public code)."""
    contrast_groups: PositiveInt = 1
    """Groups that the batch is cut into, in which contrasts and hard negatives stay, on any number of
    workers: 1, the whole batch (the paper), or 8, as those of the public code stay on each of its 8 GPUs."""
    train_vision: bool = True
    """Train the image encoder; frozen, it is in evaluation mode."""
    train_image_projection: bool = True
    """Train the map from an image's state to its embedding."""
    train_embeddings: bool = True
    """Train the word embeddings, which a small corpus would pull away from all words that it lacks."""
    frozen_text_layers: NonNegativeInt = 0
    """Lowest layers of the text encoder that do not train."""
    temperature: tuple[float, float] = (0.001, 0.5)
    """Range that the trained temperature is kept in: least, most."""
    fuse_every: PositiveInt = 1
    """VLM, ITM and TLM see every n-th pair of a step; the contrast sees them all."""

    @classmethod
    def derived_defaults(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the defaults that `follow` names; none of another value, which is refused."""
        return FOLLOW.get(str(values.get("follow", "paper")), {})

    @model_validator(mode="after")
    def _can_group(self) -> "ObjectiveConfig":
        if self.contrast_groups > 1 and self.contrast == "sigmoid":
            raise ValueError("contrast_groups is of contrast=softmax; with sigmoid set contrast_groups=1")
        return self

    @field_validator("terms")
    @classmethod
    def _has_new_names(cls, terms: UserTerms) -> UserTerms:
        if duplicates := [name for name, _ in terms.items() if name in TermWeights.model_fields]:
            raise ValueError(f"{duplicates[0]} is a term already; give yours another name")
        return terms

    def all_weights(self) -> dict[str, float]:
        """The weight of every term, the user's own too."""
        return {**self.weights.model_dump(), **{name: term.weight for name, term in self.terms.items()}}

"""Strategies that decide what of the model is trained, when, and how fast.

1. Layers: scheduled unfreezing, layer-wise decay, top layers only (paper 1), the classifier first (cViL,
   paper 3). All of them spare what is outside of the stack of layers that a text passes: heads and image
   encoder.
2. Parameter-efficient tuning and prompts (paper 4, section 3.2), by the modules of `raylib.models.peft`.
   Those with modules freeze all of the model but these, the layer norms of the blocks and the heads; two of
   them compose. Their weights are few and kept apart, in RUN/tuned.safetensors.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

from pydantic import Field, PositiveFloat, PositiveInt

from finetune.strategies.base import (
    Context,
    Need,
    Purpose,
    Stage,
    StageOutcome,
    StageRun,
    Strategy,
    StrategyConfig,
    TrainingProgress,
)
from raylib.errors import UserError
from raylib.text import PromptedTokenizer, Tokenizer


class UnfreezingConfig(StrategyConfig):
    """`layers` more layers an epoch are trained, top down, beginning with so many; embeddings, head and image
    encoder from the start (paper 1, section 3)."""

    display_fields = ("layers",)

    layers: PositiveInt = 3
    """Layers that thaw at each epoch (paper 1's k)."""

    def build(self, context: Context) -> "ScheduledUnfreezing":
        return ScheduledUnfreezing(self.layers)

    def warmup_epochs(self, depths: int) -> int:
        """Until the lowest layer has thawed."""
        return math.ceil(depths / self.layers)


class ScheduledUnfreezing(Strategy):
    """`layers` more layers an epoch."""

    def __init__(self, layers: int):
        self.layers = layers

    def adapt(self, model: Any) -> None:
        _check_layers(self.layers, model.num_layers, "strategies.unfreezing.layers")

    def lr_scale(self, depth: int | None, depths: int, progress: TrainingProgress) -> float:
        """1 for the top layers (epoch + 1) k, embeddings and what is outside; 0 below."""
        # 0 and not a frozen parameter: what does not require a gradient when the engine starts never trains
        # later; the engine computes no gradient at rate 0, and restarts Adam's moments at the thaw
        frozen = depth is not None and 0 < depth <= depths - self.layers * (progress.epoch + 1)
        return 0.0 if frozen else 1.0


class LayerDecayConfig(StrategyConfig):
    """The rate of layer i of N, bottom up, is lr `factor`^(N - i) (paper 1, section 5.2). The embeddings are
    layer 0."""

    display_fields = ("factor",)
    mutable_fields = ("factor",)

    factor: float = Field(0.88, gt=0, le=1)
    """Factor of the learning rate from a layer to the one below."""

    def build(self, context: Context) -> "LayerDecay":
        return LayerDecay(self.factor)


class LayerDecay(Strategy):
    """A rate that falls by `factor` from layer to layer."""

    def __init__(self, factor: float):
        self.factor = factor

    def lr_scale(self, depth: int | None, depths: int, progress: TrainingProgress) -> float:
        """factor^(depths - depth); 1 outside of the layers."""
        return 1.0 if depth is None else self.factor ** (depths - depth)


class TopLayersConfig(StrategyConfig):
    """Only the top layers, heads and image encoder are trained. Embeddings and lower layers are frozen for
    good, so nothing flows back through them either."""

    layers: PositiveInt | None = None
    """Number of top layers that train; null: those in which text meets image (paper 1, "CM only")."""

    def build(self, context: Context) -> "TopLayers":
        return TopLayers(self.layers)


class TopLayers(Strategy):
    """The top `layers` layers alone."""

    def __init__(self, layers: int | None = None):
        self.layers = layers

    def adapt(self, model: Any) -> None:
        """Take the parameters below out of training.

        Raises:
            UserError: more layers than there are; a backbone in which text meets the image in every layer,
                and no number.
        """
        top = self.layers or model.num_fusion_layers
        if not top:
            raise UserError(
                "strategies.top_layers.layers is missing: this backbone has no layers of text alone; give a "
                "number"
            )
        _check_layers(top, model.num_layers, "strategies.top_layers.layers")
        for name, parameter in model.named_parameters():
            depth = model.depth_of(name)
            if depth is not None and depth <= model.num_layers - top:
                parameter.requires_grad_(False)


class HeadFirstConfig(StrategyConfig):
    """The classifier trains alone for `epochs`, then everything (paper 3, section V-C: 5 epochs at 1e-4, then
    all layers at 5e-5).

    With `lr` these are two trainings, as in the paper and its public code: the classifier's, RUN/classifier,
    of which the best checkpoint goes into the run's. Each has a schedule and an optimizer of its own, and in
    the first all but the classifier is frozen, a pooler too. Without `lr` they are one: its first epochs,
    in which a pooler trains with the classifier, and the others at `factor` times the rate."""

    display_fields = ("epochs",)
    continues_stages = True

    epochs: PositiveInt = 5
    """Epochs in which the classifier alone trains."""
    lr: PositiveFloat | None = None
    """Learning rate of the classifier's epochs, which are then a training of their own, before the run's;
    null: they are the first epochs of the run."""
    factor: float = Field(0.5, gt=0)
    """Factor of the learning rate of everything after them, where `lr` is null."""

    def build(self, context: Context) -> "HeadFirst":
        return HeadFirst(self.epochs, self.factor, alone=self.lr is not None)

    def during(self, purpose: Purpose) -> "HeadFirstConfig | None":
        """A training on states alone has no head that could come first."""
        return None if purpose == "states" or (purpose == "run" and self.lr) else self

    @property
    def stage_epochs(self) -> int:
        return self.epochs if self.lr else 0

    def stages_before(self, run: StageRun) -> StageOutcome:
        """The classifier's training, from what the stages before have left."""
        if not self.lr:
            return StageOutcome()
        optim = run.optim.model_copy(update={"lr": self.lr})
        settings = {"epochs": self.epochs, "optim": optim}
        stage = Stage("classifier", "head", self.epochs, run.start, run_settings=settings, selects=True)
        return StageOutcome(start=run.train(stage))

    def warmup_epochs(self, depths: int) -> int:
        return 0 if self.lr else self.epochs + 1


class HeadFirst(Strategy):
    """The classifier for `epochs`, then all layers at `factor` times the rate. `alone`: in a training of as
    many epochs, in which nothing but the classifier trains."""

    def __init__(self, epochs: int, factor: float, alone: bool = False):
        self.epochs, self.factor, self.alone = epochs, factor, alone

    def adapt(self, model: Any) -> None:
        """Raises UserError: an image encoder would train with the classifier: it is outside of the layers."""
        if self.alone:
            model.backbone.frozen_dropout = True  # as in cViL's code
            for name, parameter in model.named_parameters():
                if not name.startswith("head."):
                    parameter.requires_grad_(False)
            return
        vision = model.backbone.image_encoder
        if vision is not None and any(p.requires_grad for p in vision.parameters()):
            raise UserError(
                "strategies.head_first trains the classifier first, and the image encoder would train with "
                "it; set freeze=vision"
            )

    def lr_scale(self, depth: int | None, depths: int, progress: TrainingProgress) -> float:
        """0 in all layers at first; 1 for what is outside of them, the head; then `factor`."""
        if progress.epoch >= self.epochs:
            return self.factor
        return 1.0 if depth is None else 0.0


def _check_layers(layers: int, depths: int, where: str) -> None:
    if layers > depths:
        raise UserError(f"{where}={layers}, but the model has {depths} layers; give at most {depths}")


class PeftConfig(StrategyConfig):
    """Settings common to those with modules."""

    method: ClassVar[str]  # as `raylib.models.peft` calls it

    follow: Literal["paper", "code"] = "paper"
    """Paper 4, or its public code with OpenDelta, which set `projection`, and of Compacter `activation`,
    `rule` and `gain`."""
    projection: bool = True
    """Also tune the map from a text's state to where it meets images, as the paper does; its public code
    froze it without meaning to."""
    norms: bool = True
    """Also tune the layer norms of the blocks, as the paper does beside LoRA, Adapter and Compacter."""

    @classmethod
    def derived_defaults(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"projection": values.get("follow") != "code"}

    def removes(self) -> Mapping[Need, str]:
        return {"dense_weights": ""}

    def build(self, context: Context) -> "PeftModules":
        settings = self.model_dump(exclude={"follow", "projection", "norms"})
        return PeftModules(self.method, settings, self.projection, self.norms)


class LoraConfig(PeftConfig):
    """Low-rank changes of the query and value maps of self-attention: W + (`alpha` / `rank`) B A (equation
    12)."""

    method = "lora"
    display_fields = ("rank",)

    rank: PositiveInt = 8
    """Rank of the changes (paper 4, equation 12)."""
    alpha: PositiveFloat = 16.0
    """Scale: changes are multiplied by `alpha` / `rank`."""


class AdapterConfig(PeftConfig):
    """A bottleneck after each attention and each feed-forward layer (equation 10)."""

    method = "adapter"
    place = "the same places, behind the outputs of layers"
    display_fields = ("bottleneck",)

    bottleneck: PositiveInt = 24
    """Width of the bottleneck."""


class CompacterConfig(PeftConfig):
    """Adapters whose matrices are sums of `n` Kronecker products of rank `rank` (equation 11); the bottleneck
    is the width over `reduction`."""

    method = "compacter"
    place = AdapterConfig.place

    n: PositiveInt = 4
    """Kronecker products that a matrix is the sum of."""
    reduction: PositiveInt = 16
    """The bottleneck is the width over this."""
    rank: PositiveInt = 1
    """Rank of the factors."""
    activation: Literal["gelu", "relu"] = "gelu"
    """Activation between the two matrices."""
    rule: Literal["shared", "own"] = "shared"
    """First factors of the products: the same of all matrices, or own ones of each."""
    gain: PositiveFloat = 1.0
    """Gain of the Xavier-uniform first weights of the other factors."""

    @classmethod
    def derived_defaults(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        modules = {"activation": "gelu", "rule": "shared", "gain": 1.0}
        if values.get("follow") == "code":
            # opendelta/delta_models/compacter.py, CompacterConfig; layers/init.py
            modules = {"activation": "relu", "rule": "own", "gain": math.sqrt(2)}
        return {**super().derived_defaults(values), **modules}


class SoftPromptConfig(PeftConfig):
    """Trainable tokens after a text's first: as many as `words` has, from whose embeddings they start, or
    `tokens` random ones where it is empty. They count in `length=`."""

    method = "soft_prompt"
    changes_texts = True

    words: str = "a photo of"
    """Words from whose embeddings the tokens start, one for each of theirs; empty: random ones."""
    tokens: PositiveInt = 20
    """Number of tokens where `words` is empty."""

    def build(self, context: Context) -> "SoftPrompt":
        start = Tokenizer.load(context.tokenizer).encode([self.words])[0].tolist() if self.words else []
        settings = {"start": start, "tokens": len(start) or self.tokens}
        return SoftPrompt(self.method, settings, self.projection, self.norms)


class HardPromptConfig(StrategyConfig):
    """`words` before every text, in training and in evaluation, whatever its language (paper 4: English ones
    serve best). They count in `length=`. Nothing is frozen, nothing added: alone with `setting=untrained` it
    is the paper's zero-shot row."""

    acts_untrained = True
    changes_texts = True
    display_fields = ("words",)
    hidden_fields = ("by_language",)

    words: str = "a photo of"
    """Words before every text."""
    by_language: Mapping[str, str] = Field(default_factory=dict)
    """Words before texts in these languages, in the place of `words`: {"de": "ein Foto von", ...} (paper 4,
    table 4, row 2)."""

    def check_run(self, run: Any) -> None:
        """Raises UserError: prompts in languages, and texts that are not in them."""
        has_english = run.setting == "translate_test" and run.direction == "to_en"
        if self.by_language and (has_english or run.setting in ("zero_shot", "all_language")):
            raise UserError(
                f"strategies.hard_prompt.by_language: setting={run.setting} reads texts in other languages "
                "than it evaluates; leave it out, or set setting=untrained, single_language or few_shot"
            )

    def build(self, context: Context) -> "HardPrompt":
        # a training on one language reads its texts alone
        alone = context.languages[0] if len(context.languages) == 1 else ""
        return HardPrompt(self.by_language.get(alone, self.words), self.by_language)

    def display_name(self, name: str) -> str:
        return super().display_name(name) + (" in each language" if self.by_language else "")


class PeftModules(Strategy):
    """Small modules of a `method`, with their `settings`, which are all that trains beside norms and
    heads."""

    def __init__(self, method: str, settings: Mapping[str, Any], projection: bool = True, norms: bool = True):
        self.method, self.settings = method, dict(settings)
        self.projection, self.norms = projection, norms

    def adapt(self, model: Any) -> None:
        """Put the modules in, unless the model has them already, and freeze the rest.

        Raises:
            UserError: sizes that the model's width does not allow; it has such modules of other sizes.
        """
        from raylib.models import peft

        # a run that goes on from a tuned model trains the modules that it has
        existing = model.backbone.tuning.get(self.method)
        if existing is None:
            peft.insert(model, self.method, self.settings)
        elif existing != self.settings:
            raise UserError(
                f"strategies.{self.method}: the model was tuned with {existing}, not {self.settings}; give "
                "the same settings"
            )
        peft.freeze_pretrained(model, self.projection, self.norms)


class SoftPrompt(PeftModules):
    """Trainable tokens, whose ids come after the vocabulary's."""

    def wrap_tokenizer(self, tokenizer: Tokenizer, model: Any) -> Tokenizer:
        from raylib.models import peft

        words = cast(peft.PromptedEmbedding, peft.text_embedding(model).word)
        first = words.num_embeddings
        return PromptedTokenizer(tokenizer, ids=tuple(range(first, first + len(words.prompt))))


class HardPrompt(Strategy):
    """Words before every text, or those of its language."""

    def __init__(self, words: str, by_language: Mapping[str, str] | None = None):
        self.words, self.by_language = words, by_language or {}

    def wrap_tokenizer(self, tokenizer: Tokenizer, model: Any) -> Tokenizer:
        return PromptedTokenizer(tokenizer, self.words, by_language=self.by_language)

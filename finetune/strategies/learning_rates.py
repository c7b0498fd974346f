"""Strategies that decide how fast each layer learns, and when: scheduled unfreezing, layer-wise decay, top
layers only (paper 1), the classifier first (cViL, paper 3).

All of them spare what is outside of the stack of layers that a text passes: heads and image encoder.
"""

import math
from typing import Any

from pydantic import Field, PositiveInt

from finetune.strategies.base import Context, Purpose, Strategy, StrategyConfig, TrainingProgress
from raylib.errors import UserError


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
    """In the first `epochs` the classifier, and with it the pooler of a backbone that has one, is all that
    trains; then everything at `factor` times the rate (paper 3, section V-C: 1e-4, then 5e-5). The schedule
    of the rate goes on through both."""

    display_fields = ("epochs",)

    epochs: PositiveInt = 5
    """Epochs in which the classifier alone trains."""
    factor: float = Field(0.5, gt=0)
    """Factor of the learning rate of everything after them."""

    def build(self, context: Context) -> "HeadFirst":
        return HeadFirst(self.epochs, self.factor)

    def during(self, purpose: Purpose) -> "HeadFirstConfig | None":
        """A training on states alone has no head that could come first."""
        return None if purpose == "states" else self

    def warmup_epochs(self, depths: int) -> int:
        return self.epochs + 1


class HeadFirst(Strategy):
    """The classifier for `epochs`, then all layers at `factor` times the rate."""

    def __init__(self, epochs: int, factor: float):
        self.epochs, self.factor = epochs, factor

    def adapt(self, model: Any) -> None:
        """Raises UserError: an image encoder would train with the classifier: it is outside of the layers."""
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

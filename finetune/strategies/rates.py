"""Methods that decide how fast each layer learns: scheduled unfreezing, layer-wise decay, top layers only
(paper 1).

All of them spare what is outside of the stack of layers that a text passes: heads and image encoder.
"""

from pydantic import Field, PositiveInt
from torch import nn

from finetune.strategies.base import Progress, Strategy
from raylib.errors import UserError


class ScheduledUnfreezing(Strategy):
    """`layers` more layers an epoch are trained, top down, beginning with so many; embeddings, head and image
    encoder from the start (paper 1, section 3)."""

    shown = ("layers",)

    layers: PositiveInt = 3

    def adapt(self, model: nn.Module) -> None:
        _check(self.layers, model.num_layers, "strategies.unfreezing.layers")

    def lr_scale(self, depth: int | None, depths: int, progress: Progress) -> float:
        """1 for the top layers (epoch + 1) k, embeddings and what is outside; 0 below."""
        frozen = depth is not None and 0 < depth <= depths - self.layers * (progress.epoch + 1)
        return 0.0 if frozen else 1.0


class LayerDecay(Strategy):
    """The rate of layer i of N, bottom up, is lr `factor`^(N - i) (paper 1, section 5.2). The embeddings are
    layer 0."""

    shown = ("factor",)

    factor: float = Field(0.88, gt=0, le=1)

    def lr_scale(self, depth: int | None, depths: int, progress: Progress) -> float:
        """factor^(depths - depth); 1 outside of the layers."""
        return 1.0 if depth is None else self.factor ** (depths - depth)


class TopLayers(Strategy):
    """Only the top `layers` layers, heads and image encoder are trained; None: those in which text meets
    picture (paper 1, "CM only"). Embeddings and lower layers are frozen for good, so nothing flows back
    through them either."""

    layers: PositiveInt | None = None

    def adapt(self, model: nn.Module) -> None:
        """Take the parameters below out of training.

        Raises:
            UserError: more layers than there are; a backbone in which text meets the picture in every layer,
                and no number.
        """
        top = self.layers or getattr(model, "num_fusion_layers", 0)
        if not top:
            raise UserError(
                "strategies.top_layers.layers is missing: this backbone has no layers of text alone; give a "
                "number"
            )
        _check(top, model.num_layers, "strategies.top_layers.layers")
        for name, parameter in model.named_parameters():
            depth = model.depth_of(name)
            if depth is not None and depth <= model.num_layers - top:
                parameter.requires_grad_(False)


def _check(layers: int, depths: int, where: str) -> None:
    if layers > depths:
        raise UserError(f"{where}={layers}, but the model has {depths} layers; give at most {depths}")

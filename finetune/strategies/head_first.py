"""Two steps of training (cViL, paper 3, section V-C): the classifier alone, then all layers."""

from pydantic import Field, PositiveInt
from torch import nn

from finetune.strategies.base import Progress, Strategy
from raylib.errors import UserError


class HeadFirst(Strategy):
    """In the first `epochs` the classifier, and with it the pooler of a backbone that has one, is all that
    trains; then everything at `factor` times the rate (the paper: 1e-4, then 5e-5). The schedule of the rate
    goes on through both."""

    shown = ("epochs",)

    epochs: PositiveInt = 5
    factor: float = Field(0.5, gt=0)

    def adapt(self, model: nn.Module) -> None:
        """Raises UserError: an image encoder would train with the classifier: it is outside of the layers."""
        vision = getattr(getattr(model, "backbone", model), "vision", None)
        if vision is not None and any(p.requires_grad for p in vision.parameters()):
            raise UserError(
                "strategies.head_first trains the classifier first, and the image encoder would train with "
                "it; set "
                'freeze=["vision"]'
            )

    def lr_scale(self, depth: int | None, depths: int, progress: Progress) -> float:
        """0 in all layers at first; 1 for what is outside of them, the head; then `factor`."""
        if progress.epoch >= self.epochs:
            return self.factor
        return 1.0 if depth is None else 0.0

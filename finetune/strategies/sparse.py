"""Sparse fine-tuning (paper 0, Algorithm 1): find the weights that a task needs, rewind, train them alone.

The rounds that find the mask are a loop over trainings (`finetune.cycles`); the method itself is the mask.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt
from torch import nn

from finetune import masks
from finetune.strategies.base import Strategy


class SparseFineTuning(Strategy):
    """Defaults are paper 0's. `rate`: share of the weights left that goes after each of `rounds` trainings of
    `epochs`; `rewind`: what the next round starts from, "initial" as the paper says, or "none", the trained
    weights, as its public code does without meaning to; `mask`: a file of masks, and no rounds."""

    hidden = ("mask",)

    rate: float = Field(0.1, gt=0, lt=1)
    rounds: PositiveInt = 5
    epochs: PositiveInt = 1
    rewind: Literal["initial", "none"] = "initial"
    mask: str | None = None

    def files(self, data: Path) -> tuple[Path, ...]:
        return (Path(self.mask),) if self.mask else ()

    def adapt(self, model: nn.Module) -> None:
        """Apply the mask, if there is one yet.

        Raises:
            UserError: no mask in that file, or another model's.
        """
        if self.mask:
            masks.apply(model, masks.read(self.mask), self.mask)

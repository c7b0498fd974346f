"""The English model that a student learns from: read, never trained, and no part of what is saved."""

from pathlib import Path

import torch
from torch import Tensor

from finetune.model import FinetuneModel, find_evaluated, is_foreign, load_backbone, read_description
from raylib.errors import UserError


class Teacher:
    """`model` after `layers`, in evaluation mode and without gradient. No `nn.Module`: nothing may put it
    among the parts of what it teaches."""

    def __init__(self, model: FinetuneModel, layers: tuple[int, ...], empty: bool = False):
        self.model, self.layers, self.empty = model.eval().requires_grad_(False), layers, empty

    @torch.no_grad()
    def states(self, batch: dict) -> Tensor:
        """A batch of `FinetuneModel.forward` -> states of all tokens after each layer (L, T', d), as rows end
        to end."""
        return torch.stack(
            [rows.values for rows in self.model.hidden_states(batch, self.layers, self.empty)[0]]
        )


def load_teacher(path: Path | str, kind: str, labels: tuple[str, ...], regions: int | None) -> FinetuneModel:
    """The model at `path`: a run of fine-tuning, with its head, or else a backbone of `kind`, whose head says
    nothing.

    regions: the width of the region features that it will see.
    Raises:
        UserError: no model there.
    """
    if not Path(path).exists():
        raise UserError(
            f"strategies.distillation.teacher={path}: no such model; give the run of an English fine-tuning"
        )
    if not is_foreign(Path(path)):
        folder = find_evaluated(path)
        if read_description(folder)["model_type"] == "polyglance-finetuned":
            model = FinetuneModel.from_pretrained(folder)
            if model.is_generative:
                raise UserError(
                    f"strategies.distillation.teacher={path}: its head is a decoder; give a run of "
                    "head=classifier"
                )
            return model
    backbone = load_backbone(path, kind)
    if regions and hasattr(backbone, "set_region_dim"):
        backbone.set_region_dim(regions)
    return FinetuneModel(backbone, labels, 1, 0.0, regions)

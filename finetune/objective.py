"""The term of a classification task over one batch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.model import FinetuneModel
from raylib.collective import total, world_size


class ClassificationObjective(nn.Module):
    """`forward(batch)` -> (this worker's share of the loss, {"task": its mean over the global batch}).

    loss: "ce", cross-entropy against the answer with the highest score; "bce", binary cross-entropy against all scores,
    summed over the labels (IGLUE's, which multiplies the mean by their number).
    """

    partial = True  # the unified encoder's cross-attention or the image encoder may have no part in a task

    def __init__(self, model: FinetuneModel, loss: str):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        part = batch["examples"]
        logits = self.model(part).float()
        if self.loss == "bce":
            value = F.binary_cross_entropy_with_logits(logits, part["scores"], reduction="sum")
        else:
            value = F.cross_entropy(logits, part["answer"], reduction="sum")
        count = total(torch.tensor(float(len(logits)), device=logits.device))
        share = value / count
        return share * world_size(), {"task": total(share)}

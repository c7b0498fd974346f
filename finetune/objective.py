"""The term of a classification task over one batch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.model import FinetuneModel
from finetune.strategies.base import Term
from raylib.distributed import total, world_size


def task_loss(logits: Tensor, part: dict, loss: str) -> Tensor:
    """Summed over the batch: "ce" or "bce" (`ClassificationObjective`)."""
    if loss == "bce":
        return F.binary_cross_entropy_with_logits(logits, part["scores"], reduction="sum")
    return F.cross_entropy(logits, part["answer"], reduction="sum")


class ClassificationObjective(nn.Module):
    """`forward(batch)` -> (this worker's share of the loss, {"task", and by name the terms of methods: means
    over the global batch, unweighted}).

    loss: "ce", cross-entropy against the answer with the highest score; "bce", binary cross-entropy against
    all scores, summed over the labels (IGLUE's, which multiplies the mean by their number).
    """

    partial = True  # the unified encoder's cross-attention or the image encoder may have no part in a task

    def __init__(self, model: FinetuneModel, loss: str, terms: dict[str, Term] | None = None):
        super().__init__()
        self.model, self.loss, self.terms = model, loss, terms or {}

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        part = batch["examples"]
        logits = self.model(part).float()
        value = task_loss(logits, part, self.loss)
        sums = torch.stack([value, *(term.values(logits, part).sum() for term in self.terms.values())])
        count = total(torch.tensor(float(len(logits)), device=logits.device))
        shares = sums / count
        weights = torch.tensor([1.0, *(term.weight for term in self.terms.values())], device=logits.device)
        loss = (weights * shares).sum()
        return loss * world_size(), dict(zip(("task", *self.terms), total(shares).unbind(), strict=True))


class AnswerObjective(nn.Module):
    """As `ClassificationObjective`, of a model whose head spells answers: the mean over questions of -log p
    of their answers, each weighted by its score."""

    partial = True

    def __init__(self, model: FinetuneModel):
        super().__init__()
        self.model = model

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        part = batch["examples"]
        value = self.model.answer_loss(part)
        share = value / total(torch.tensor(float(len(part["scores"])), device=value.device))
        return share * world_size(), {"task": total(share)}

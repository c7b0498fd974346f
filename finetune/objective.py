"""The loss of a classification task over one batch, with the terms of strategies."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.model import FinetuneModel
from finetune.strategies.base import LossTerms, Outputs, Term, term_shares
from raylib.distributed import all_reduce, world_size


def task_loss(logits: Tensor, part: dict, loss: str) -> Tensor:
    """Summed over the batch: "ce" or "bce" (`ClassificationObjective`)."""
    if loss == "bce":
        return F.binary_cross_entropy_with_logits(logits, part["scores"], reduction="sum")
    return F.cross_entropy(logits, part["answer"], reduction="sum")


class ClassificationObjective(nn.Module):
    """`forward(batch)` -> (this worker's share of the loss, {"task", and by name the terms of strategies:
    means over the global batch, unweighted}).

        L = sum of weighted terms + task_weight (task + sum of weighted terms that read logits)

    loss: "ce", cross-entropy against the answer with the highest score; "bce", binary cross-entropy against
        all scores, summed over the labels (IGLUE's, which multiplies the mean by their number).
    added: the terms, which of the model's states they read, and the task's weight.
    """

    # the unified encoder's cross-attention or the image encoder may have no part in a task
    has_unused_parameters = True

    def __init__(self, model: FinetuneModel, loss: str, added: LossTerms | None = None):
        super().__init__()
        terms, self.states, self.task_weight = added or LossTerms()
        self.model, self.loss = model, loss
        # what reads no logits comes first: gradients add up in the order in which this is computed
        self.first = {name: term for name, term in terms.items() if not term.reads_logits}
        self.second = {name: term for name, term in terms.items() if term.reads_logits}

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        part = batch["examples"]
        device = next(self.model.parameters()).device
        examples = all_reduce(torch.tensor(float(len(part["text"].lengths)), device=device))
        outputs, last = Outputs(), self.model.num_layers
        if self.states:
            layers = sorted({*self.states.layers, last})
            states, _ = self.model.hidden_states(part, layers, self.states.empty)
            outputs = Outputs(states=dict(zip(layers, states, strict=True)))
        shares = term_shares(self.first.values(), outputs, part, examples)
        names, weights = [*self.first], [term.weight for term in self.first.values()]
        if self.task_weight:
            # one forward pass gives both: the last states are what the head reads
            logits = self.model.answer(outputs.states[last]) if self.states else self.model(part)
            outputs = outputs._replace(logits=logits.float())
            task = task_loss(outputs.logits, part, self.loss) / examples
            shares += [task, *term_shares(self.second.values(), outputs, part, examples)]
            names += ["task", *self.second]
            weights += [self.task_weight * w for w in (1.0, *(t.weight for t in self.second.values()))]
        stacked = torch.stack(shares)
        loss = (torch.tensor(weights, device=device) * stacked).sum()
        return loss * world_size(), dict(zip(names, all_reduce(stacked).unbind(), strict=True))


class AnswerObjective(nn.Module):
    """As `ClassificationObjective`, of a model whose head spells answers: the mean over questions of -log p
    of their answers, each weighted by its score. Terms see no logits: there are none."""

    has_unused_parameters = True

    def __init__(self, model: FinetuneModel, terms: Mapping[str, Term] | None = None):
        super().__init__()
        self.model, self.terms = model, dict(terms or {})

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        part = batch["examples"]
        value = self.model.answer_loss(part)
        examples = all_reduce(torch.tensor(float(len(part["scores"])), device=value.device))
        shares = [value / examples, *term_shares(self.terms.values(), Outputs(), part, examples)]
        stacked = torch.stack(shares)
        weights = torch.tensor([1.0, *(term.weight for term in self.terms.values())], device=value.device)
        loss = (weights * stacked).sum()
        return loss * world_size(), dict(
            zip(("task", *self.terms), all_reduce(stacked).unbind(), strict=True)
        )

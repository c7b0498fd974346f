"""The loss of a student beside its teacher."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from finetune.distillation.inputs import count
from finetune.distillation.teacher import Teacher
from finetune.distillation.terms import distance
from finetune.model import FinetuneModel
from finetune.objective import task_loss
from finetune.strategies.base import Outputs, Term
from raylib.distributed import total, world_size


class DistillationObjective(nn.Module):
    """`forward(batch)` -> (this worker's share of the loss, {by name, its terms: means over the global
    batch}).

        L = sum_m lambda_m (cls + image + tags + mixed) (paper 3, equation 6) + task_weight (task + weighted
        terms of methods)

    One forward of the student gives its states after `layers` and its logits; with task_weight 0, as in the
    paper, its head has no part in it.

    layers: {layer of the student: lambda_m}, rising. The m-th is compared with the m-th of the teacher's
        states, which the batch holds ("stored"), or `teacher` makes. public: one mean over all pairs
        (`finetune.distillation.terms`). empty: rows have a slot without a region.
    """

    has_unused_parameters = True

    def __init__(
        self,
        model: FinetuneModel,
        teacher: Teacher | None,
        layers: Mapping[int, float],
        loss: str,
        task_weight: float,
        terms: dict[str, Term] | None = None,
        public: bool = False,
        empty: bool = False,
    ):
        super().__init__()
        self.model, self.layers, self.loss, self.terms = model, dict(layers), loss, terms or {}
        self.task_weight, self.public, self.empty = task_weight, public, empty
        self._teacher = (teacher,)  # in a tuple: `train`, `parameters` and checkpoints are not to find it

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        part = batch["examples"]
        theirs = self._taught(part)
        last, compared = self.model.num_layers, list(self.layers)
        read = compared if compared[-1] == last else [*compared, last]
        states, _ = self.model.hidden_states(part, read, self.empty)
        rows = total(torch.tensor(float(len(part["text"].lengths)), device=theirs.device))
        size = total(count(part["pairs"])) if self.public else rows
        learned = [
            sum(
                weight * distance(states[m].values, theirs[m], pairs)
                for m, weight in enumerate(self.layers.values())
            )
            for pairs in part["pairs"].values()
        ]
        shares, weights = [torch.stack(learned) / size], [1.0] * len(learned)
        if self.task_weight:
            logits = self.model.answer(states[-1]).float()
            values = [term.values(Outputs(logits=logits), part).sum() for term in self.terms.values()]
            shares.append(torch.stack([task_loss(logits, part, self.loss), *values]) / rows)
            weights += [
                self.task_weight * weight for weight in (1.0, *(term.weight for term in self.terms.values()))
            ]
        shares = torch.cat(shares)
        names = (*part["pairs"], *(("task", *self.terms) if self.task_weight else ()))
        loss = (torch.tensor(weights, device=shares.device) * shares).sum()
        return loss * world_size(), dict(zip(names, total(shares).unbind(), strict=True))

    def _taught(self, part: dict) -> Tensor:
        """The teacher's states (L, T', d), of the same pictures."""
        teacher = part["teacher"]
        return teacher["stored"] if "stored" in teacher else self._teacher[0].states({**part, **teacher})

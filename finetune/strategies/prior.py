"""The linguistic prior (paper 0): answers that are near the right one in meaning cost less.

L = CE + alpha sum_c p(c) d(c, y) over the k most probable labels c; d from WordNet or from word vectors.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from finetune.strategies.base import Context, Outputs, Strategy, StrategyConfig, Term
from finetune.strategies.label_distances import vector_distances, wordnet_distances
from raylib.cache import cached, file_fingerprint
from raylib.errors import UserError


class LinguisticPriorConfig(StrategyConfig):
    """Defaults are paper 0's. `source`: where distances come from, the run's `wordnet=` or `vectors`, a GloVe
    or word2vec file; default: `vectors.txt` in the data folder. `d1`, `d2`: distance of a hyponym, of a
    hypernym of the answer."""

    needs = frozenset({"labels", "logits"})
    display_fields = ("source",)
    hidden_fields = ("vectors",)
    mutable_fields = ("alpha", "k")

    source: Literal["wordnet", "vectors"] = "vectors"
    alpha: NonNegativeFloat = 10.0
    k: PositiveInt = 10
    d1: float = Field(0.8, gt=0, lt=1)
    d2: float = Field(0.8, gt=0, lt=1)
    vectors: str | None = None

    def files(self, data: Path) -> tuple[Path, ...]:
        return (Path(self.vectors or data / "vectors.txt"),) if self.source == "vectors" else ()

    def build(self, context: Context) -> "LinguisticPrior":
        """Make the label x label matrix, or read it from the cache; logs which labels the source lacks.

        Raises:
            UserError: k larger than the number of answers; what the source finds wrong.
        """
        labels = context.labels
        if self.k > len(labels):
            raise UserError(
                f"strategies.prior.k={self.k}, but there are {len(labels)} answers; give at most so many"
            )
        if self.source == "wordnet":
            distances, unknown = wordnet_distances(labels, context.wordnet, self.d1, self.d2, context.cache)
        else:
            (file,) = self.files(context.data)
            distances, unknown = cached(
                "distances",
                (labels, file_fingerprint(file)),
                lambda: vector_distances(labels, file, context.cache),
            )
        context.log(f"strategies.prior: {unknown}")
        return LinguisticPrior(distances, self.alpha, self.k)


class LinguisticPrior(Strategy):
    """distances: (C, C), [c, y] = d(y_c, y*)."""

    def __init__(self, distances: Tensor, alpha: float, k: int):
        self.distances, self.alpha, self.k = distances, alpha, k

    def terms(self, model: Any) -> dict[str, Term]:
        # once on the model's device, not once a step
        distances = self.distances.to(next(model.parameters()).device)

        def values(outputs: Outputs, part: dict) -> Tensor:
            return linguistic_prior(outputs.logits, part["answer"], distances, self.k)

        return {"prior": Term(self.alpha, values)}


def linguistic_prior(logits: Tensor, answer: Tensor, distance: Tensor, k: int) -> Tensor:
    """The expected distance of the prediction from the true answer (paper 0, section 3, L_prior): sum over c
    of p(y_c) d(y_c, y*), where c runs over the k most probable labels only.

    p is the softmax over all C labels; those k are not made to sum to 1. The gradient flows through p alone.

    Args:
        logits: (b, C).
        answer: (b,) int64, the true labels.
        distance: (C, C), [c, y] = d(y_c, y*): the predicted label first; in its precision all is computed,
            also under autocast.
        k: how many labels; all where there are fewer.
    Returns:
        (b,).
    """
    # in bf16 the k-th and the next label tie
    with torch.autocast(logits.device.type, enabled=False):
        probability, label = (
            logits.to(distance.dtype).softmax(1).topk(min(k, logits.shape[1]), sorted=False)
        )  # (b, k) both
        return (probability * distance[label, answer[:, None]]).sum(1)

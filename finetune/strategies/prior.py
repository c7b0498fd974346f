"""The linguistic prior (paper 0): answers that are near the right one in meaning cost less.

L = CE + alpha sum_c p(c) d(c, y) over the k most probable labels c; d from WordNet or from word vectors.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, PrivateAttr
from torch import Tensor, nn

from finetune.lexicon.distances import vector_distances, wordnet_distances
from finetune.losses import linguistic_prior
from finetune.strategies.base import Context, Outputs, Strategy, Term
from raylib.cache import cached, file_fingerprint
from raylib.errors import UserError


class LinguisticPrior(Strategy):
    """Defaults are paper 0's. `source`: where distances come from, the run's `wordnet=` or `vectors`, a GloVe
    or word2vec file; default: `vectors.txt` in the data folder. `d1`, `d2`: distance of a hyponym, of a
    hypernym of the answer."""

    shown = ("source",)
    hidden = ("vectors",)

    source: Literal["wordnet", "vectors"] = "vectors"
    alpha: NonNegativeFloat = 10.0
    k: PositiveInt = 10
    d1: float = Field(0.8, gt=0, lt=1)
    d2: float = Field(0.8, gt=0, lt=1)
    vectors: str | None = None
    _distances: Tensor | None = PrivateAttr(None)

    def files(self, data: Path) -> tuple[Path, ...]:
        return (Path(self.vectors or data / "vectors.txt"),) if self.source == "vectors" else ()

    def prepare(self, context: Context) -> "LinguisticPrior":
        """Build the label x label matrix, or read it from the cache; says which labels have no place in the
        source.

        Raises:
            UserError: a task without answers; k larger than their number; what the source finds wrong.
        """
        if not context.labels:
            raise UserError("strategies.prior: this task has no answers to tell apart; leave it out")
        if self.k > len(context.labels):
            raise UserError(
                f"strategies.prior.k={self.k}, but there are {len(context.labels)} answers; give at most so "
                "many"
            )
        if self.source == "wordnet":
            distances, report = wordnet_distances(
                context.labels, context.wordnet, self.d1, self.d2, context.cache
            )
        else:
            (file,) = self.files(context.data)
            distances, report = cached(
                "distances",
                (context.labels, file_fingerprint(file)),
                lambda: vector_distances(context.labels, file, context.cache),
            )
        context.log(f"strategies.prior: {report}")
        ready = self.model_copy()
        ready._distances = distances
        return ready

    def terms(self, model: nn.Module) -> dict[str, Term]:
        device = next(model.parameters()).device
        distances = self._distances.to(device)

        def values(outputs: Outputs, part: dict) -> Tensor:
            return linguistic_prior(outputs.logits, part["answer"], distances, self.k)

        return {"prior": Term(self.alpha, values, reads_logits=True)}

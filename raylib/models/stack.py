"""What backbones share in which text and picture meet in every layer of one stack."""

from typing import ClassVar

from torch import nn

from raylib.errors import UserError
from raylib.models.attention import initialise


class Stack(nn.Module):
    """Has an `embedding` of texts, `regions` that embeds pictures, or None, an `encoder`, and `poolers` by
    name; `config` has its sizes. `region_embedding`: the class of `regions`, made from a config."""

    kind: str
    fusion_depths = 0
    poolers: ClassVar[tuple[str, ...]] = ("pooler",)
    region_embedding: ClassVar[type[nn.Module]]

    @property
    def depths(self) -> int:
        return self.config.layers

    def depth_of(self, name: str) -> int | None:
        """Of the parameter `name`: 1 ... `depths` bottom up, 0 for the embeddings of text and regions, None
        for poolers."""
        part, _, rest = name.partition(".")
        if part in ("embedding", "regions"):
            return 0
        return int(rest.split(".")[1]) + 1 if part == "encoder" else None

    def prunable(self) -> list[str]:
        """Names of the matrices of the stack and its poolers (paper 0 counts the pooler in)."""
        parts = ("encoder", *self.poolers)
        return [
            name for name, p in self.named_parameters() if name.partition(".")[0] in parts and p.ndim == 2
        ]

    def see_regions(self, features: int) -> None:
        """Make the model take region features so wide; what embeds them is new if it has seen none yet.

        Raises:
            UserError: it has seen others.
        """
        if self.regions is None:
            self.config = self.config.model_copy(update={"features": features})
            self.regions = (
                self.region_embedding(self.config)
                .apply(initialise)
                .to(self.pooler.weight)
                .train(self.training)
            )
        if features != self.config.features:
            raise UserError(
                f"the region features are {features} wide, this {self.kind} was trained on "
                f"{self.config.features}; set regions= to features of its detector"
            )

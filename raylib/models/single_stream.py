"""What backbones share in which text and picture meet in every layer of one stack.

Single-stream models: one stack of self-attention over a text's tokens and a picture's regions, as one row.

UC2 (Zhou et al. 2021), M3P (Ni et al. 2021), and mUNITER and xUNITER (Liu et al. 2021, through VOLTA) differ
in how a row is laid out and embedded, and in what is read from it; each difference is a field of
`SingleStreamConfig`, its values for each of them are in `LAYOUTS`.

    text-first row     CLS, words, SEP, regions      the CLS is read
    regions-first row  regions, CLS, words, SEP      the first region is read (M3P: its pooler takes the row's
                       first token)
    "product"          as text-first, with a region of the whole picture before the others; CLS and it are
                       read

Token types are constants of a text and of a picture. Those of texts are folded into the positions, those of
regions into the layer norm before which they are added (`raylib.models.single_stream_weights`).
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from raylib.config import Config
from raylib.errors import UserError
from raylib.models.layers import Encoder, TextEmbedding, init_weights
from raylib.packed import Ragged, first_tokens, join_rows


class Stack(nn.Module):
    """Has an `embedding` of texts, `regions` that embeds pictures, or None, an `encoder`, and `poolers` by
    name; `config` has its sizes. `region_embedding`: the class of `regions`, made from a config."""

    kind: str
    num_fusion_layers = 0
    poolers: ClassVar[tuple[str, ...]] = ("pooler",)
    region_embedding: ClassVar[type[nn.Module]]

    @property
    def num_layers(self) -> int:
        return self.config.layers

    def depth_of(self, name: str) -> int | None:
        """Of the parameter `name`: 1 ... `num_layers` bottom up, 0 for the embeddings of text and regions,
        None for poolers."""
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

    def set_region_dim(self, features: int) -> None:
        """Make the model take region features so wide; what embeds them is new if it has seen none yet.

        Raises:
            UserError: it has seen others.
        """
        if self.regions is None:
            self.config = self.config.model_copy(update={"features": features})
            self.regions = (
                self.region_embedding(self.config)
                .apply(init_weights)
                .to(self.pooler.weight)
                .train(self.training)
            )
        if features != self.config.features:
            raise UserError(
                f"the region features are {features} wide, this {self.kind} was trained on "
                f"{self.config.features}; set regions= to features of its detector"
            )


# numbers that come with a region's features: x1, y1, x2, y2, width, height, area, as shares of the picture
PLACE = 7
CHOSEN = {5: (0, 1, 2, 3, 6), 7: (0, 1, 2, 3, 4, 5, 6)}  # those that a layout takes
WHOLE = (0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0)  # of the whole picture


class SingleStreamConfig(Config):
    """Sizes and layout. The defaults are `base` as published, and UC2's layout.

    layout: its name, which is the backbone's in `raylib.models`.
    positions: of a text, or of a row with its regions where `number_regions`.
    eps, embedding_eps: of the layer norms in the stack and before it.
    features: width of region features; None: no region has been seen yet (`set_region_dim`).
    locations: 7 numbers say where a region is, or 5, without width and height.
    unit_length: features and locations are scaled to length 1 first.
    first: what a row begins with.
    number_regions: positions number the whole row, and its layer norm covers regions too; else texts alone.
    part_norms: features and locations have a layer norm each before they are added.
    whole_picture: a region of the whole picture, with the mean of the features, comes before the others.
    pooler: from the row's first token, or from the CLS and the first region by a pooler each, multiplied.
    pooled: width of what the poolers make; None: as `width`. activation: after each.
    """

    layout: Literal["uc2", "m3p", "muniter", "xuniter"] = "uc2"
    vocabulary: PositiveInt = 250002
    width: PositiveInt = 768
    heads: PositiveInt = 12
    feedforward: PositiveInt = 3072
    layers: PositiveInt = 12
    positions: PositiveInt = 512
    dropout: float = 0.1
    eps: float = 1e-12
    embedding_eps: float = 1e-12
    features: PositiveInt | None = 2048
    locations: Literal[5, 7] = 7
    unit_length: bool = False
    first: Literal["text", "regions"] = "text"
    number_regions: bool = False
    part_norms: bool = True
    whole_picture: bool = False
    pooler: Literal["first", "product"] = "first"
    pooled: PositiveInt | None = None
    activation: Literal["tanh", "relu"] = "tanh"

    @model_validator(mode="after")
    def _fits(self) -> "SingleStreamConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


_VOLTA = {"locations": 5, "whole_picture": True, "pooler": "product", "pooled": 1024, "activation": "relu"}

LAYOUTS: dict[str, SingleStreamConfig] = {
    "uc2": SingleStreamConfig(embedding_eps=1e-5),
    "m3p": SingleStreamConfig(
        layout="m3p",
        positions=514,
        locations=5,
        unit_length=True,
        first="regions",
        number_regions=True,
        part_norms=False,
    ),
    "muniter": SingleStreamConfig(layout="muniter", vocabulary=119547, **_VOLTA),
    "xuniter": SingleStreamConfig(layout="xuniter", **_VOLTA),
}


def tiny(layout: str) -> SingleStreamConfig:
    """A layout at a size for tests."""
    sizes = dict(vocabulary=12000, width=32, heads=2, feedforward=64, layers=2, positions=64, features=6)
    pooled = LAYOUTS[layout].pooled and 48  # another width than the stack's, where the published one is
    return LAYOUTS[layout].model_copy(update={**sizes, "pooled": pooled})


class RegionEmbedding(nn.Module):
    """Region features and their locations, each by a linear map, added."""

    def __init__(self, config: SingleStreamConfig):
        super().__init__()
        c = self.config = config
        self.feature = nn.Linear(c.features, c.width)
        self.location = nn.Linear(c.locations, c.width)
        if c.part_norms:
            self.feature_norm = nn.LayerNorm(c.width, c.embedding_eps)
            self.location_norm = nn.LayerNorm(c.width, c.embedding_eps)
        self.norm = nn.LayerNorm(c.width, c.embedding_eps)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, features: Tensor, locations: Tensor) -> Tensor:
        """(R, f), (R, 7) -> (R, d)."""
        locations = locations[:, CHOSEN[self.config.locations]]
        if self.config.unit_length:
            features, locations = F.normalize(features, dim=1), F.normalize(locations, dim=1)
        features, locations = self.feature(features), self.location(locations)
        if self.config.part_norms:
            features, locations = self.feature_norm(features), self.location_norm(locations)
        return self.dropout(self.norm(features + locations))


class SingleStream(Stack):
    """Texts and the regions, or the premises, that ground them, in one stack. A backbone of fine-tuning
    (`raylib.models`)."""

    poolers = ("pooler", "region_pooler")
    region_embedding = RegionEmbedding

    def __init__(self, config: SingleStreamConfig):
        super().__init__()
        c = self.config = config
        self.embedding = TextEmbedding(c.vocabulary, c.positions, c.width, c.dropout, c.embedding_eps)
        self.regions = RegionEmbedding(c) if c.features else None
        self.encoder = Encoder(c.layers, c.width, c.heads, c.feedforward, c.dropout, c.eps, cross=False)
        self.pooler = nn.Linear(c.width, self.width)
        if c.pooler == "product":
            self.region_pooler = nn.Linear(c.width, self.width)
        self.apply(init_weights)

    @property
    def kind(self) -> str:
        return self.config.layout

    @property
    def width(self) -> int:
        """Of the pooled states."""
        return self.config.pooled or self.config.width

    def embed_regions(self, regions: Ragged) -> Ragged:
        """Features and locations (R, f + 7) of each picture -> their embeddings (R', d), one more a picture
        if the layout has a region of the whole one."""
        if self.config.whole_picture:
            regions = join_rows(_whole_pictures(regions), regions)
        features, locations = regions.values.split([regions.values.shape[1] - PLACE, PLACE], 1)
        return regions.with_values(self.regions(features, locations))

    def encode_text(self, ids: Ragged, read: Tensor | None = None) -> Tensor:
        """Ids (T,) -> embedded tokens (T, d), or those in `read`: a premise as it enters the row, in the
        place of regions. In this stack a text meets what grounds it in every layer, so nothing of it is
        encoded before."""
        words = self.embedding.word(ids.values)
        states = words if self.config.number_regions else self.embedding.place(ids.with_values(words))
        return states if read is None else states[read.to(states.device)]

    def fused_cls(self, text: Ragged, memory: Ragged | None, times: int = 1) -> Tensor:
        """Pooled states of texts and what grounds them.

        Args:
            text: ids, b rows. memory: embedded regions or premises, b x times rows: row i's are i times
                ... . None: the row holds the text alone.
        Returns:
            (b times, width).
        Raises:
            UserError: a row is longer than there are positions.
        """
        tokens = text.with_values(self.encode_text(text))
        if times > 1:
            tokens = tokens.select_rows(torch.arange(len(text.lengths)).repeat_interleave(times))
        if memory is None:
            self._check_length(tokens.lengths)
            rows = self.embedding.place(tokens) if self.config.number_regions else tokens.values
            return self._activate(
                self.pooler(self.encoder(tokens.with_values(rows), first_tokens(tokens.lengths)))
            )
        parts, read = [tokens, memory], [first_tokens(tokens.lengths), first_tokens(memory.lengths)]
        if self.config.first == "regions":
            parts, read = parts[::-1], read[::-1]
        if self.config.pooler == "first":
            read[1] = torch.zeros_like(read[1])
        rows = join_rows(*parts)
        wanted = join_rows(parts[0].with_values(read[0]), parts[1].with_values(read[1])).values
        self._check_length(rows.lengths if self.config.number_regions else tokens.lengths)
        if self.config.number_regions:
            rows = rows.with_values(self.embedding.place(rows))
        return self._pool(self.encoder(rows, wanted))

    def _pool(self, states: Tensor) -> Tensor:
        """The read states (n, d), or (2n, d), two a row -> (n, width)."""
        if self.config.pooler == "first":
            return self._activate(self.pooler(states))
        return self._activate(self.pooler(states[::2])) * self._activate(self.region_pooler(states[1::2]))

    def _activate(self, states: Tensor) -> Tensor:
        return torch.tanh(states) if self.config.activation == "tanh" else torch.relu(states)

    def _check_length(self, lengths: Tensor) -> None:
        longest = max(lengths.tolist(), default=0)
        if longest > self.config.positions:
            counted = "tokens and regions" if self.config.number_regions else "tokens"
            raise UserError(
                f"a row of {longest} {counted}, but {self.kind} has {self.config.positions} positions; lower "
                "length="
            )


def _whole_pictures(regions: Ragged) -> Ragged:
    """A region for each picture (n, f + 7): the mean of its features, at the location of the whole
    picture."""
    values, lengths = regions
    row = torch.arange(len(lengths)).repeat_interleave(lengths).to(values.device, non_blocking=True)
    sums = values.new_zeros(len(lengths), values.shape[1]).index_add_(0, row, values)
    means = sums / lengths.to(values.device, non_blocking=True)[:, None]
    means[:, -PLACE:] = values.new_tensor(WHOLE)
    return Ragged(means, torch.ones_like(lengths))

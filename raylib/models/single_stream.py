"""Single-stream models: one stack of self-attention over a text's tokens and an image's regions, as one row.

UC2 (Zhou et al. 2021), M3P (Ni et al. 2021), and mUNITER and xUNITER (Liu et al. 2021, through VOLTA) differ
in how a row is laid out and embedded, and in what is read from it; each difference is a field of
`SingleStreamConfig`, its values for each of them are in `LAYOUTS`. OSCAR is in `raylib.models.oscar`.

    text-first row     CLS, words, SEP, regions      the CLS is read
    regions-first row  regions, CLS, words, SEP      the first region is read (M3P: its pooler takes the row's
                                                     first token)
    "product"          as text-first, with a region of the whole image before the others; CLS and it are read

Token types are constants of a text and of an image. Those of texts are folded into the positions, those of
regions into the layer norm before which they are added (`raylib.models.single_stream_weights`).

Shape legend: n texts, W tokens of texts, R regions, T tokens of rows; f features of a region, d width.
"""

import logging
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from raylib.config import Config, Size, validate
from raylib.errors import UserError
from raylib.models.base import RegionBackbone
from raylib.models.layers import Encoder, TextEmbedding, init_weights
from raylib.models.single_stream_weights import read_single_stream
from raylib.packed import Ragged, concatenate, first_tokens, join_rows, row_starts, select_mask, upload
from raylib.precision import LayerNorm
from raylib.settings import check_heads
from raylib.weights import limit_model

log = logging.getLogger(__name__)

# Numbers behind a region's features, as readers give them: x1, y1, x2, y2, width, height, area, as shares of
# the image. A layout takes all, or some of them.
REGION_BOX_DIM = 7
BOX_COLUMNS = {5: (0, 1, 2, 3, 6), 7: (0, 1, 2, 3, 4, 5, 6)}
WHOLE_IMAGE_BOX = (0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0)


class RegionEmbedding(nn.Module):
    """Region features and their boxes, each by a linear map, added (UNITER's image embedding).

    box_dim: how many of the 7 numbers of a box are taken. part_norms: features and boxes have a layer norm
    each before they are added. unit_length: both are scaled to length 1 first.
    """

    def __init__(
        self,
        features: int,
        width: int,
        box_dim: int = REGION_BOX_DIM,
        eps: float = 1e-5,
        part_norms: bool = True,
        unit_length: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.box_dim, self.part_norms, self.unit_length = box_dim, part_norms, unit_length
        self.feature = nn.Linear(features, width)
        self.location = nn.Linear(box_dim, width)
        if part_norms:
            self.feature_norm = LayerNorm(width, eps)
            self.location_norm = LayerNorm(width, eps)
        self.norm = LayerNorm(width, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, regions: Tensor) -> Tensor:
        """Features and boxes side by side (R, f + 7) -> (R, d)."""
        # detectors differ in what they say of a box, so readers give all 7 numbers and a layout takes its own
        features, boxes = regions.split([regions.shape[1] - REGION_BOX_DIM, REGION_BOX_DIM], 1)
        boxes = boxes[:, BOX_COLUMNS[self.box_dim]]
        if self.unit_length:
            features, boxes = F.normalize(features, dim=1), F.normalize(boxes, dim=1)
        features, boxes = self.feature(features), self.location(boxes)
        if self.part_norms:
            features, boxes = self.feature_norm(features), self.location_norm(boxes)
        return self.dropout(self.norm(features + boxes))


class SingleStreamBackbone(RegionBackbone):
    """Text and image meet in every layer of one stack.

    It has an `embedding` of texts, `regions` that embeds regions, or None before it has seen any, an
    `encoder`, and poolers.
    """

    embedding_names = ("embedding", "regions")
    layer_names = ("encoder.blocks",)
    pooler_names: ClassVar[tuple[str, ...]] = ("pooler",)

    embedding: TextEmbedding
    regions: nn.Module | None
    encoder: Encoder
    pooler: nn.Linear

    def __init__(self, config: Any, embedding: TextEmbedding):
        super().__init__(config)
        c = config
        self.embedding = embedding
        self.regions = self.region_embedding() if c.features else None
        self.encoder = Encoder(c.layers, c.width, c.heads, c.feedforward, c.dropout, c.eps, cross=False)
        self.pooler = nn.Linear(c.width, self.width)

    @classmethod
    def check_no_vision(cls, vision: Path | None) -> None:
        """Raises UserError: `vision` is given, and there is no image encoder that it could fill."""
        if vision:
            raise UserError(
                f"vision= is for backbones with an image encoder; {cls.kind} sees region features, set "
                "regions= instead"
            )

    @abstractmethod
    def region_embedding(self) -> nn.Module:
        """Make the module that embeds regions, as the config says."""

    @abstractmethod
    def joint_rows(self, text: Ragged, memory: Any) -> Ragged:
        """Ids (W,) and the memory of each text -> rows as they enter the stack (T, d)."""

    def freezable_parts(self) -> dict[str, nn.Module]:
        return {"embeddings": self.embedding}

    def set_region_dim(self, features: int) -> None:
        """Make the model take region features so wide; what embeds them is new if it has seen none yet.

        Raises:
            UserError: it has seen others.
        """
        # a model that starts from a text encoder learns the width of its regions from the first run's store
        if self.regions is None:
            self.config = self.config.model_copy(update={"features": features})
            regions = self.region_embedding().apply(init_weights)
            self.regions = regions.to(self.pooler.weight).train(self.training)
        if features != self.config.features:
            raise UserError(
                f"the region features are {features} wide, this {self.kind} was trained on "
                f"{self.config.features}; set regions= to features of its detector"
            )

    def joint_states(self, text: Ragged, memory: Any) -> Ragged:
        rows = self.joint_rows(text, memory)
        return rows.with_values(self.encoder(rows))

    def check_positions(self, lengths: Tensor, counted: str) -> None:
        """Raises UserError: a row is longer than there are positions. `counted`: what is numbered."""
        longest = max(lengths.tolist(), default=0)
        if longest > self.config.positions:
            raise UserError(
                f"a row of {longest} {counted}, but {self.kind} has {self.config.positions} positions; lower "
                "length="
            )


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
    region_slots: an image has so many regions, those that are missing with features and boxes of zeros, so
        that texts begin behind them (M3P: 100); None: as many as there are.
    row_mask: what of such a row is read: "all", as in M3P's code; "volta": its first tokens, as many as there
        are true regions and words, as in VOLTA's code, which so hides the last words, or the whole text
        where both together are fewer than the slots (IGLUE's published numbers of M3P come from that).
    part_norms: features and locations have a layer norm each before they are added.
    whole_image: a region of the whole image, with the mean of the features, comes before the others.
    pooler: from the row's first token, or from the CLS and the first region by a pooler each, multiplied.
    pooled: width of what the poolers make; None: as `width`. activation: after each.
    """

    layout: Literal["uc2", "m3p", "muniter", "xuniter"] = "uc2"
    vocabulary: Size = 250002
    width: Size = 768
    heads: Size = 12
    feedforward: Size = 3072
    layers: Size = 12
    positions: Size = 512
    dropout: float = 0.1
    eps: float = 1e-12
    embedding_eps: float = 1e-12
    features: Size | None = 2048
    locations: Literal[5, 7] = 7
    unit_length: bool = False
    first: Literal["text", "regions"] = "text"
    number_regions: bool = False
    region_slots: Size | None = None
    row_mask: Literal["all", "volta"] = "all"
    part_norms: bool = True
    whole_image: bool = False
    pooler: Literal["first", "product"] = "first"
    pooled: Size | None = None
    activation: Literal["tanh", "relu"] = "tanh"

    _fits = model_validator(mode="after")(check_heads)


_VOLTA: dict[str, Any] = dict(locations=5, whole_image=True, pooler="product", pooled=1024, activation="relu")

LAYOUTS: dict[str, SingleStreamConfig] = {
    "uc2": SingleStreamConfig(embedding_eps=1e-5),
    "m3p": SingleStreamConfig(
        layout="m3p",
        positions=514,
        locations=5,
        unit_length=True,
        first="regions",
        number_regions=True,
        region_slots=100,
        part_norms=False,
    ),
    "muniter": SingleStreamConfig(layout="muniter", vocabulary=119547, **_VOLTA),
    "xuniter": SingleStreamConfig(layout="xuniter", **_VOLTA),
}


def _sizes(layout: str) -> dict[str, SingleStreamConfig]:
    """A layout as published, and at a size for tests."""
    tiny: dict[str, Any] = dict(
        vocabulary=12000, width=32, heads=2, feedforward=64, layers=2, positions=64, features=6
    )
    pooled = LAYOUTS[layout].pooled and 48  # another width than the stack's, where the published one is
    tiny["region_slots"] = None  # for rows of that many there are too few positions
    return {
        "base": LAYOUTS[layout],
        "tiny": LAYOUTS[layout].model_copy(update={**tiny, "pooled": pooled}),
    }


class SingleStream(SingleStreamBackbone):
    """Texts and the regions, or the premises, that they are about, in one stack, as a layout says."""

    config_class = SingleStreamConfig
    pooler_names = ("pooler", "region_pooler")

    config: SingleStreamConfig
    regions: RegionEmbedding | None

    def __init__(self, config: SingleStreamConfig):
        c = config
        super().__init__(c, TextEmbedding(c.vocabulary, c.positions, c.width, c.dropout, c.embedding_eps))
        if c.pooler == "product":
            self.region_pooler = nn.Linear(c.width, self.width)
        self.apply(init_weights)

    @classmethod
    def import_weights(cls, path: Path | str, vision: Path | None = None) -> Self:
        """From published weights, or an XLM-R or BERT folder (`raylib.models.single_stream_weights`).

        Raises:
            UserError: no weights there, or of no known format, or not of this layout; tensors missing, left
                over or of another shape (they are listed).
        """
        cls.check_no_vision(vision)
        weights = read_single_stream(cls.kind, Path(path))
        sizes = {**LAYOUTS[cls.kind].model_dump(), **weights.sizes}
        if (slots := sizes["region_slots"]) and sizes["positions"] <= slots:
            log.warning(
                "%s: %d positions, no text would fit behind %d slots for regions: a row has as many slots as "
                "regions",
                weights.where,
                sizes["positions"],
                slots,
            )
            sizes["region_slots"] = None
        with limit_model(weights.where, path):
            model = cls(validate(SingleStreamConfig, sizes, weights.where))
        weights.fill(model)
        return model

    @property
    def open_choice(self) -> str:
        """Line that says so where UC2's own code is followed, and VOLTA's could be."""
        c = self.config
        if (c.layout, c.activation, c.eps) != ("uc2", "tanh", 1e-12):
            return ""
        return (
            "computed as in UC2's own code, tanh after the pooler and eps 1e-12 in the stack; IGLUE's and "
            "the papers' runs have VOLTA's, relu and 1e-5: backbone_config.activation=relu "
            "backbone_config.eps=1e-5"
        )

    @property
    def width(self) -> int:
        """Of the pooled states."""
        return self.config.pooled or self.config.width

    @property
    def is_text_first(self) -> bool:
        return self.config.first == "text"

    def region_embedding(self) -> RegionEmbedding:
        c = self.config
        assert c.features is not None
        return RegionEmbedding(
            c.features, c.width, c.locations, c.embedding_eps, c.part_norms, c.unit_length, c.dropout
        )

    def embed_regions(self, regions: Ragged, tags: Ragged | None = None) -> Ragged:
        """Features and boxes (R, f + 7) of each image -> their embeddings (R', d), one more an image if the
        layout has a region of the whole one."""
        assert self.regions is not None and tags is None
        # VOLTA's models read the image as a whole at this region, as a text at its CLS
        if self.config.whole_image:
            regions = join_rows(_whole_images(regions), regions)
        if self.config.region_slots:
            regions = self._fill_slots(regions, self.config.region_slots)
        return regions.with_values(self.regions(regions.values))

    def _fill_slots(self, regions: Ragged, slots: int) -> Ragged:
        """Regions (R, f + 7) of each image and zeros in its other slots; for VOLTA's mask one of these alone
        (`_lay_out`).

        Raises:
            UserError: an image has more regions than there are slots.
        """
        longest = max(regions.lengths.tolist(), default=0)
        if longest > slots:
            raise UserError(
                f"an image of {longest} regions, {self.kind} has {slots} slots; set max_regions={slots}"
            )
        missing = torch.full_like(regions.lengths, 1) if self._hides_words else slots - regions.lengths
        empty = regions.values.new_zeros(int(missing.sum()), regions.values.shape[1])
        return join_rows(regions, Ragged(empty, missing))

    @property
    def _hides_words(self) -> bool:
        return self.config.row_mask == "volta" and self.config.region_slots is not None

    def encode_text(self, ids: Ragged, output_mask: Tensor | None = None) -> Tensor:
        """Ids (W,) -> embedded tokens (W, d), or those in `output_mask`: a premise as it enters the row, in
        the place of regions. In this stack a text meets its memory in every layer, so nothing of it is
        encoded before."""
        words = self.embedding.word(ids.values)
        # where positions number the whole row, they wait until it is laid out (`joint_rows`)
        if not self.config.number_regions:
            words = self.embedding.add_positions(ids.with_values(words))
        return words if output_mask is None else select_mask(words, output_mask)

    def fused_cls(self, text: Ragged, memory: Ragged | None, per_text: int = 1) -> Tensor:
        """Pooled states of texts and their memory, embedded regions or premises; as in the base class.

        Raises:
            UserError: a row is longer than there are positions.
        """
        # each text is embedded once, whatever the number of images that it is about
        tokens = text.with_values(self.encode_text(text))
        if per_text > 1:
            tokens = tokens.select_rows(torch.arange(len(text.lengths)).repeat_interleave(per_text))
        if memory is None:
            rows = self._add_row_positions(tokens)
            return self._activate(self.pooler(self.encoder(rows, first_tokens(rows.lengths))))
        # what the poolers read: the first token of a row, or the first of each of its two halves
        if self.config.pooler == "first":
            rows = self._lay_out(tokens, memory)
            return self.pool(self.encoder(rows, first_tokens(rows.lengths)))
        masks = [part.with_values(first_tokens(part.lengths)) for part in (tokens, memory)]
        first, second = masks if self.is_text_first else masks[::-1]
        return self.pool(self.encoder(self._lay_out(tokens, memory), join_rows(first, second).values))

    def joint_rows(self, text: Ragged, memory: Ragged) -> Ragged:
        if self._hides_words:
            raise UserError(
                "row_mask=volta hides words, so that states of all are not to be had: row_mask=all"
            )
        return self._lay_out(text.with_values(self.encode_text(text)), memory)

    def _lay_out(self, tokens: Ragged, memory: Ragged) -> Ragged:
        """Embedded tokens and what each text is about -> rows as they enter the stack."""
        if not self.config.number_regions:
            self.check_positions(tokens.lengths, "tokens")
        if self._hides_words:
            return self._add_row_positions(self._keep_first(tokens, memory))
        return self._add_row_positions(
            join_rows(tokens, memory) if self.is_text_first else join_rows(memory, tokens)
        )

    def _keep_first(self, tokens: Ragged, memory: Ragged) -> Ragged:
        """Rows of regions, empty slots and words that VOLTA's mask leaves: the first n + t, of n regions,
        behind which one empty slot stands (`_fill_slots`), and t words."""
        assert self.config.region_slots is not None
        regions, words = memory.lengths - 1, tokens.lengths
        empty = torch.minimum(words, self.config.region_slots - regions)
        both = concatenate([memory, tokens])
        starts = row_starts(both.lengths)
        count, places = len(words), []
        for i, (n, e, t) in enumerate(zip(regions.tolist(), empty.tolist(), words.tolist(), strict=True)):
            image, text = int(starts[i]), int(starts[count + i])
            places += [*range(image, image + n), *[image + n] * e, *range(text, text + t - e)]
        index = upload(torch.tensor(places, dtype=torch.int64), both.values.device)
        return Ragged(both.values.index_select(0, index), regions + words)

    def _add_row_positions(self, rows: Ragged) -> Ragged:
        """Rows with their positions, where these number the whole row."""
        if not self.config.number_regions:
            return rows
        self.check_positions(rows.lengths, "tokens and regions")
        return rows.with_values(self.embedding.add_positions(rows))

    def pool(self, cls: Tensor) -> Tensor:
        """The read states (n, d), or (2n, d), two a row -> (n, width)."""
        # "product": states come in flat order, a row's CLS before its first region
        if self.config.pooler == "first":
            return self._activate(self.pooler(cls))
        return self._activate(self.pooler(cls[::2])) * self._activate(self.region_pooler(cls[1::2]))

    def _activate(self, states: Tensor) -> Tensor:
        return torch.tanh(states) if self.config.activation == "tanh" else torch.relu(states)


class UC2(SingleStream):
    kind = "uc2"
    summary = "XLM-R over text and regions at 7 numbers (UC2)"
    sizes: ClassVar[Mapping[str, SingleStreamConfig]] = _sizes("uc2")


class M3P(SingleStream):
    kind = "m3p"
    summary = "XLM-R over regions and text, numbered together (M3P)"
    sizes: ClassVar[Mapping[str, SingleStreamConfig]] = _sizes("m3p")


class MUniter(SingleStream):
    kind = "muniter"
    summary = "multilingual BERT over text, image and regions (mUNITER)"
    sizes: ClassVar[Mapping[str, SingleStreamConfig]] = _sizes("muniter")


class XUniter(SingleStream):
    kind = "xuniter"
    summary = "XLM-R over text, image and regions (xUNITER)"
    sizes: ClassVar[Mapping[str, SingleStreamConfig]] = _sizes("xuniter")


def _whole_images(regions: Ragged) -> Ragged:
    """A region for each image (n, f + 7): the mean of its features, in the box of the whole image."""
    values, lengths = regions
    row = torch.arange(len(lengths)).repeat_interleave(lengths)
    row, counts, box = upload((row, lengths, torch.tensor(WHOLE_IMAGE_BOX)), values.device)
    sums = values.new_zeros(len(lengths), values.shape[1]).index_add_(0, row, values)
    means = sums / counts[:, None]
    means[:, -REGION_BOX_DIM:] = box
    return Ragged(means, torch.ones_like(lengths))

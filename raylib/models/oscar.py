"""OSCAR (Li et al. 2020) and OSCAR+ (Zhang et al. 2021, VinVL): one stack of self-attention over words,
object tags and regions.

    row    CLS words SEP   tags SEP   regions      the CLS is read, through a pooler with tanh

Tags are what a detector calls the objects that it sees, as text. They go on with the positions of the words
before them, and are of another token type; regions have neither. A picture without tags has none in its row,
no separator either.

Paper 3 (cViL) distils such a model into one that starts from multilingual BERT: `states` and `Places` are for
that.

Shape legend: n rows; W tokens of texts, G of tags, R regions, T of all these; f features of a region; d
width.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from raylib.config import Config
from raylib.errors import UserError
from raylib.models.attention import initialise
from raylib.models.encoder import Encoder, TextEmbedding, check_layers
from raylib.models.stack import Stack
from raylib.models.token_segments import Places, find_places
from raylib.packed import Ragged, first_tokens, join_rows

PLACE = 6  # numbers behind a region's features: x1, y1, x2, y2, width, height, as shares of the picture


class OscarConfig(Config):
    """Sizes. The defaults are OSCAR+ `base` as published.

    positions: of a text and its tags. features: width of region features without their place; None: no region
    has been seen yet (`see_regions`). eps: of the layer norms. region_eps: of the one after the map of
    regions; None: there is none.
    """

    vocabulary: PositiveInt = 30522
    width: PositiveInt = 768
    heads: PositiveInt = 12
    feedforward: PositiveInt = 3072
    layers: PositiveInt = 12
    positions: PositiveInt = 512
    dropout: float = 0.1
    eps: float = 1e-12
    features: PositiveInt | None = 2048
    region_eps: float | None = 1e-12

    @model_validator(mode="after")
    def _fits(self) -> "OscarConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


TINY = OscarConfig(vocabulary=12000, width=32, heads=2, feedforward=64, layers=2, positions=64, features=6)


class Seen(NamedTuple):
    """What grounds n texts: `tags`, their words (G, d) without positions, for these depend on the text, and
    `regions`, embedded (R, d); a row of either may be empty."""

    tags: Ragged
    regions: Ragged


class TaggedEmbedding(TextEmbedding):
    """Of words and tags. The token type of texts is folded into the positions, `tag` is what that of tags
    differs by."""

    def __init__(self, vocabulary: int, positions: int, width: int, dropout: float, eps: float):
        super().__init__(vocabulary, positions, width, dropout, eps)
        self.tag = nn.Parameter(torch.zeros(width))

    def tags(self, ids: Tensor) -> Tensor:
        """(G,) -> words (G, d), which wait for `place`."""
        return self.word(ids) + self.tag


class RegionEmbedding(nn.Module):
    """Region features and their place, as one vector, by a linear map."""

    def __init__(self, config: OscarConfig):
        super().__init__()
        c = config
        self.map = nn.Linear(c.features + PLACE, c.width)
        self.norm = nn.Identity() if c.region_eps is None else nn.LayerNorm(c.width, c.region_eps)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, regions: Tensor) -> Tensor:
        """(R, f + 6) -> (R, d)."""
        return self.dropout(self.norm(self.map(regions)))


class Oscar(Stack):
    """Texts and the tagged pictures, or the premises, that ground them, in one stack. A backbone of
    fine-tuning (`raylib.models.base`)."""

    kind = "oscar"
    region_embedding = RegionEmbedding
    parts = ("text", "tags", "regions")  # of a row

    def __init__(self, config: OscarConfig):
        super().__init__()
        c = self.config = config
        self.embedding = TaggedEmbedding(c.vocabulary, c.positions, c.width, c.dropout, c.eps)
        self.regions = RegionEmbedding(c) if c.features else None
        self.encoder = Encoder(c.layers, c.width, c.heads, c.feedforward, c.dropout, c.eps, cross=False)
        self.pooler = nn.Linear(c.width, c.width)
        self.apply(initialise)

    @property
    def width(self) -> int:
        return self.config.width

    def embed_regions(self, regions: Ragged, tags: Ragged | None = None) -> Seen:
        """What grounds texts, from features and locations (R, f + 7) of each picture, whose last number, the
        area, is left out, and ids (G,) of its tags with the SEP after them, without CLS; None: no picture has
        tags."""
        if tags is None:
            tags = _none_of(regions, regions.values.new_empty(0, dtype=torch.int64))
        return Seen(
            tags.with_values(self.embedding.tags(tags.values)),
            regions.with_values(self.regions(regions.values[:, :-1])),
        )

    def encode_text(self, ids: Ragged, read: Tensor | None = None) -> Tensor:
        """Ids (W,) -> words (W, d), or those in `read`: a premise as it enters the row, in the place of tags.
        In this stack a text meets what grounds it in every layer, so nothing of it is encoded before."""
        words = self.embedding.tags(ids.values)
        return words if read is None else words[read.to(words.device)]

    def ground(self, text: Ragged, condition: Seen | Ragged, times: int = 1) -> Tensor:
        """Pooled states of texts and what grounds them.

        Args:
            text: ids, b rows. condition: b x times rows, row i's are i times ... : of pictures, which must
                keep tags and regions apart (`embed_regions`), or of premises (`encode_text`).
        Returns:
            (b times, d).
        Raises:
            UserError: a text and its tags, or its premise, are longer than there are positions.
        """
        if times > 1:
            text = text.take(torch.arange(len(text.lengths)).repeat_interleave(times))
        rows = self._rows(text, condition)
        return self.pooled(self.encoder(rows, first_tokens(rows.lengths)))

    def pooled(self, cls: Tensor) -> Tensor:
        """CLS states after the last layer (n, d) -> what `ground` makes of them (n, d)."""
        return torch.tanh(self.pooler(cls))

    def states(
        self, text: Ragged, condition: Seen | Ragged, layers: Sequence[int], empty: bool = False
    ) -> tuple[list[Ragged], Places]:
        """States of all tokens after some of the layers, before the pooler.

        Args:
            text: ids, n rows. condition: as of `ground`, n rows. layers: rising, the lowest is 1 (paper 3: 3,
            6, 9, 12). empty: each row ends with what comes of a slot that is padded with a region of zeros,
            and that nothing attends to.
        Returns:
            For each of `layers` n rows (T, d); which of these tokens are what. So
            `rows.values[places.regions.values]` (R, d) are regions in the order of those in `condition`, the
            same in a teacher and a student; on a GPU the index goes there first.
        Raises:
            UserError: no such layers; as `ground`.
        """
        check_layers(layers, self)
        seen, rows = _as_seen(condition), self._rows(text, condition)
        found = self._with_slots(rows, layers) if empty else self.encoder.after(rows, layers)
        return found, find_places(text.lengths, seen.tags.lengths, seen.regions.lengths, empty)

    def _with_slots(self, rows: Ragged, layers: Sequence[int]) -> list[Ragged]:
        """Rows after `layers`, each with a slot without a region behind it. All such slots of a row come to
        the same."""
        every = [rows, *self.encoder.after(rows, range(1, layers[-1] + 1))]
        zeros = torch.zeros(
            len(rows.lengths),
            self.config.features + PLACE,
            device=rows.values.device,
            dtype=rows.values.dtype,
        )
        slots, one, found = self.regions(zeros), torch.ones_like(rows.lengths), []
        for layer, (before, after) in enumerate(pairwise(every), 1):
            slots = self.encoder.blocks[layer - 1].beside(slots, before)
            if layer in layers:
                found.append(join_rows(after, Ragged(slots, one)))
        return found

    def _rows(self, text: Ragged, condition: Seen | Ragged) -> Ragged:
        """Ids (W,) and what grounds them -> rows as they enter the stack (T, d)."""
        seen = _as_seen(condition)
        words = join_rows(text.with_values(self.embedding.word(text.values)), seen.tags)
        longest = max(words.lengths.tolist(), default=0)
        if longest > self.config.positions:
            raise UserError(
                f"a row of {longest} tokens and tags, but {self.kind} has {self.config.positions} positions; "
                "lower length="
            )
        return join_rows(words.with_values(self.embedding.place(words)), seen.regions)


def _as_seen(condition: Seen | Ragged) -> Seen:
    """A premise takes the place of tags, and there are no regions."""
    return (
        condition
        if isinstance(condition, Seen)
        else Seen(condition, _none_of(condition, condition.values[:0]))
    )


def _none_of(rows: Ragged, nothing: Tensor) -> Ragged:
    """As many rows as there are in `rows`, all empty."""
    return Ragged(nothing, torch.zeros_like(rows.lengths))

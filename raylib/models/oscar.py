"""OSCAR (Li et al. 2020) and OSCAR+ (Zhang et al. 2021, VinVL): one stack of self-attention over words,
object tags and regions.

    row    CLS words SEP   tags SEP   regions      the CLS is read, through a pooler with tanh

Tags are what a detector calls the objects that it sees, as text. They go on with the positions of the words
before them, and are of another token type; regions have neither. A picture without tags has none in its row,
no separator either.

Paper 3 (cViL) distils such a model into one that starts from multilingual BERT: `states` and `TokenSegments`
are for that.

Shape legend: n rows; W tokens of texts, G of tags, R regions, T of all these; f features of a region; d
width.


`oscar` from a folder in Hugging Face format. Every tensor is used, or is named as expected to be unused.

    OSCAR, OSCAR+     `bert.img_embedding`, `bert.LayerNorm` where config.json says so, and BERT's names;
                      heads are left out
    BERT, XLM-R, ...  the text's part, and the pooler if there is one; what embeds regions is new, and without
                      a layer norm, as in the public code of paper 3 (cViL), whose student starts from
                      multilingual BERT

The token type of texts becomes part of the positions (`TaggedEmbedding`). XLM-R has one type: tags are then
of the same.
"""

import pickle
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from raylib.config import Config, validate
from raylib.errors import UserError
from raylib.models.base import TokenSegments, find_segments
from raylib.models.hf_weights import SIZES, UNUSED_TEXT, WeightMapper, first_position, read_folder
from raylib.models.layers import Encoder, TextEmbedding, check_layers, init_weights
from raylib.models.single_stream import Stack
from raylib.packed import Ragged, first_tokens, join_rows

PLACE = 6  # numbers behind a region's features: x1, y1, x2, y2, width, height, as shares of the picture


class OscarConfig(Config):
    """Sizes. The defaults are OSCAR+ `base` as published.

    positions: of a text and its tags. features: width of region features without their place; None: no region
    has been seen yet (`set_region_dim`). eps: of the layer norms. region_eps: of the one after the map of
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
    fine-tuning (`raylib.models`)."""

    kind = "oscar"
    region_embedding = RegionEmbedding
    row_parts = ("text", "tags", "regions")  # of a row

    def __init__(self, config: OscarConfig):
        super().__init__()
        c = self.config = config
        self.embedding = TaggedEmbedding(c.vocabulary, c.positions, c.width, c.dropout, c.eps)
        self.regions = RegionEmbedding(c) if c.features else None
        self.encoder = Encoder(c.layers, c.width, c.heads, c.feedforward, c.dropout, c.eps, cross=False)
        self.pooler = nn.Linear(c.width, c.width)
        self.apply(init_weights)

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

    def fused_cls(self, text: Ragged, memory: Seen | Ragged | None, times: int = 1) -> Tensor:
        """Pooled states of texts and what grounds them.

        Args:
            text: ids, b rows. memory: b x times rows, row i's are i times ... : of pictures, which must
                keep tags and regions apart (`embed_regions`), or of premises (`encode_text`). None:
                nothing; the rows hold the texts alone.
        Returns:
            (b times, d).
        Raises:
            UserError: a text and its tags, or its premise, are longer than there are positions.
        """
        if times > 1:
            text = text.select_rows(torch.arange(len(text.lengths)).repeat_interleave(times))
        if memory is None:
            memory = _none_of(text, self.embedding.word(text.values[:0]))
        rows = self._rows(text, memory)
        return self.pool(self.encoder(rows, first_tokens(rows.lengths)))

    def pool(self, cls: Tensor) -> Tensor:
        """CLS states after the last layer (n, d) -> what `fused_cls` makes of them (n, d)."""
        return torch.tanh(self.pooler(cls))

    def hidden_states(
        self, text: Ragged, memory: Seen | Ragged, layers: Sequence[int], empty: bool = False
    ) -> tuple[list[Ragged], TokenSegments]:
        """States of all tokens after some of the layers, before the pooler.

        Args:
            text: ids, n rows. memory: as of `fused_cls`, n rows. layers: rising, the lowest is 1 (paper 3: 3,
            6, 9, 12). empty: each row ends with what comes of a slot that is padded with a region of zeros,
            and that nothing attends to.
        Returns:
            For each of `layers` n rows (T, d); which of these tokens are what. So
            `rows.values[places.regions.values]` (R, d) are regions in the order of those in `memory`, the
            same in a teacher and a student; on a GPU the index goes there first.
        Raises:
            UserError: no such layers; as `fused_cls`.
        """
        check_layers(layers, self)
        seen, rows = _as_seen(memory), self._rows(text, memory)
        found = self._with_slots(rows, layers) if empty else self.encoder.after(rows, layers)
        return found, find_segments(text.lengths, seen.tags.lengths, seen.regions.lengths, empty)

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

    def _rows(self, text: Ragged, memory: Seen | Ragged) -> Ragged:
        """Ids (W,) and what grounds them -> rows as they enter the stack (T, d)."""
        seen = _as_seen(memory)
        words = join_rows(text.with_values(self.embedding.word(text.values)), seen.tags)
        longest = max(words.lengths.tolist(), default=0)
        if longest > self.config.positions:
            raise UserError(
                f"a row of {longest} tokens and tags, but {self.kind} has {self.config.positions} positions; "
                "lower length="
            )
        return join_rows(words.with_values(self.embedding.place(words)), seen.regions)


def _as_seen(memory: Seen | Ragged) -> Seen:
    """A premise takes the place of tags, and there are no regions."""
    return memory if isinstance(memory, Seen) else Seen(memory, _none_of(memory, memory.values[:0]))


def _none_of(rows: Ragged, nothing: Tensor) -> Ragged:
    """As many rows as there are in `rows`, all empty."""
    return Ragged(nothing, torch.zeros_like(rows.lengths))


UNUSED = [*UNUSED_TEXT, r"cls\.", r"lm_head\."]
NAMES = {  # as in older folders, such as those of BERT and its multilingual sibling -> as they are today
    r"^(roberta|bert|model)\.": "",
    r"LayerNorm\.gamma$": "LayerNorm.weight",
    r"LayerNorm\.beta$": "LayerNorm.bias",
}
REGIONS = "img_embedding.weight"
POSITIONS, TYPES = "embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"


def load_oscar(path: Path | str, vision: Path | None = None) -> Oscar:
    """The model from the folder at `path`.

    Raises:
        UserError: no config.json or no weights there, or a file that holds other things than tensors; sizes
            or tensors missing, tensors left over or of another shape (they are listed).
    """
    path = Path(path)
    if vision:
        raise UserError(
            "vision= is for backbones with an image encoder; oscar sees region features, set regions= instead"
        )
    weights, described = _read(path)
    # only old folders, OSCAR's among them, do not say whose they are: BERT's
    first = first_position(described) if "model_type" in described else 0
    model = Oscar(_sizes(weights, described, first, path))
    taken = WeightMapper(weights, path)
    with torch.no_grad():
        _fill(model, taken, first)
    taken.assert_all_used(UNUSED)
    return model


def _read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The folder's tensors, by today's names, and its config.json."""
    try:
        weights, described = read_folder(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as e:
        raise UserError(
            f"{path}: weights not read ({str(e).splitlines()[0]}); only tensors and plain values are"
        ) from None
    for pattern, name in NAMES.items():
        weights = {re.sub(pattern, name, key): value for key, value in weights.items()}
    return weights, described


def _sizes(weights: dict[str, Tensor], described: dict, first: int, path: Path) -> OscarConfig:
    """The sizes of the model in `weights`, whose texts start at row `first` of the position embeddings.

    Raises:
        UserError: config.json does not say them.
    """
    missing = {*SIZES.values(), "num_hidden_layers", "max_position_embeddings"} - described.keys()
    if missing:
        raise UserError(
            f"{path}/config.json: no {', '.join(sorted(missing))}; give an OSCAR, BERT or XLM-R folder"
        )
    sizes = {ours: described[theirs] for ours, theirs in SIZES.items()} | {
        "layers": described["num_hidden_layers"],
        "positions": described["max_position_embeddings"] - first,
        "features": None,
        "region_eps": None,
    }
    if REGIONS in weights:
        sizes["features"] = weights[REGIONS].shape[-1] - PLACE
    if described.get("use_img_layernorm"):
        sizes["region_eps"] = described.get("img_layer_norm_eps", 1e-12)
    return validate(OscarConfig, sizes, f"{path}/config.json")


def _fill(model: Oscar, taken: WeightMapper, first: int) -> None:
    embedding, types = model.embedding, taken(TYPES)
    taken.weights[POSITIONS] = taken(POSITIONS)[first:] + types[0]
    taken.weights[TYPES] = types[-1] - types[0]
    taken.copy(embedding.word.weight, "embeddings.word_embeddings.weight")
    taken.copy(embedding.position.weight, POSITIONS)
    taken.copy(embedding.tag, TYPES)
    taken.copy_layer(embedding.norm, "embeddings.LayerNorm")
    for i, block in enumerate(model.encoder.blocks):
        at = f"encoder.layer.{i}"
        taken.copy_attention(block.attention, f"{at}.attention.self", f"{at}.attention.output.dense")
        taken.copy_layer(block.attention_norm, f"{at}.attention.output.LayerNorm")
        taken.copy_layer(block.intermediate, f"{at}.intermediate.dense")
        taken.copy_layer(block.output, f"{at}.output.dense")
        taken.copy_layer(block.output_norm, f"{at}.output.LayerNorm")
    if model.regions:
        taken.copy_layer(model.regions.map, "img_embedding")
        if model.config.region_eps is not None:
            taken.copy_layer(model.regions.norm, "LayerNorm")
    if model.regions or "pooler.dense.weight" in taken.weights:
        taken.copy_layer(model.pooler, "pooler.dense")

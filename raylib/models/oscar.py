"""OSCAR (Li et al. 2020) and OSCAR+ (Zhang et al. 2021, VinVL): one stack of self-attention over words,
object tags and regions.

    row    CLS words SEP   tags SEP   regions      the CLS is read, through a pooler with tanh

Tags are what a detector calls the objects that it sees, as text. They go on with the positions of the words
before them, and are of another token type; regions have neither. An image without tags has none in its row,
no separator either.

Paper 3 (cViL) distils such a model into one that starts from multilingual BERT: `hidden_states` are for that.

It starts from a folder in Hugging Face format:

    OSCAR, OSCAR+     `bert.img_embedding`, `bert.LayerNorm` where config.json says so, and BERT's names;
                      heads are left out
    BERT, XLM-R, ...  the text's part, and the pooler if there is one; what embeds regions is new, and without
                      a layer norm, as in the public code of paper 3 (cViL)

Shape legend: n rows; W tokens of texts, G of tags, R regions, T of all these; f features of a region; d
width.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from raylib.config import Config, Size, validate
from raylib.models.hf_folders import encoder_sizes, first_position, read_folder
from raylib.models.hf_weights import UNUSED_TEXT, WeightMapper, copy_block
from raylib.models.layers import TextEmbedding, init_weights
from raylib.models.single_stream import SingleStreamBackbone
from raylib.packed import Ragged, TokenSegments, find_segments, first_tokens, join_rows, select_mask
from raylib.precision import LayerNorm
from raylib.settings import check_heads
from raylib.weights import limit_model

# numbers behind a region's features that are taken: x1, y1, x2, y2, width, height, as shares of the image;
# the last that readers give, the area, is left out
REGION_BOX_DIM = 6
UNUSED = [*UNUSED_TEXT, r"cls\.", r"lm_head\."]
# as in older folders, such as those of BERT and its multilingual sibling -> as they are today
RENAMED_TENSORS = {
    r"^(roberta|bert|model)\.": "",
    r"LayerNorm\.gamma$": "LayerNorm.weight",
    r"LayerNorm\.beta$": "LayerNorm.bias",
}
REGIONS = "img_embedding.weight"
POSITIONS, TYPES = "embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"


class OscarConfig(Config):
    """Sizes. The defaults are OSCAR+ `base` as published.

    positions: of a text and its tags. features: width of region features without their box; None: no region
    has been seen yet (`set_region_dim`). eps: of the layer norms. region_eps: of the one after the map of
    regions; None: there is none.
    """

    vocabulary: Size = 30522
    width: Size = 768
    heads: Size = 12
    feedforward: Size = 3072
    layers: Size = 12
    positions: Size = 512
    dropout: float = 0.1
    eps: float = 1e-12
    features: Size | None = 2048
    region_eps: float | None = 1e-12

    _fits = model_validator(mode="after")(check_heads)


TINY = OscarConfig(vocabulary=12000, width=32, heads=2, feedforward=64, layers=2, positions=64, features=6)


class TaggedRegions(NamedTuple):
    """The memory of n texts: `tags`, their words (G, d) without positions, for these depend on the text, and
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
        """(G,) -> words (G, d), which wait for their positions."""
        return self.word(ids) + self.tag


class JointRegionEmbedding(nn.Module):
    """Region features and their box, as one vector, by a linear map."""

    def __init__(self, config: OscarConfig):
        super().__init__()
        c = config
        assert c.features is not None
        self.map = nn.Linear(c.features + REGION_BOX_DIM, c.width)
        self.norm = nn.Identity() if c.region_eps is None else LayerNorm(c.width, c.region_eps)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, regions: Tensor) -> Tensor:
        """(R, f + 6) -> (R, d)."""
        return self.dropout(self.norm(self.map(regions)))


class Oscar(SingleStreamBackbone):
    """Texts and the tagged images, or the premises, that they are about, in one stack."""

    kind = "oscar"
    summary = "BERT, or another encoder, over words, object tags and regions (OSCAR+, paper 3)"
    config_class = OscarConfig
    sizes: ClassVar[Mapping[str, OscarConfig]] = {"base": OscarConfig(), "tiny": TINY}
    row_parts = ("text", "tags", "regions")

    config: OscarConfig
    embedding: TaggedEmbedding
    regions: JointRegionEmbedding | None

    def __init__(self, config: OscarConfig):
        c = config
        super().__init__(c, TaggedEmbedding(c.vocabulary, c.positions, c.width, c.dropout, c.eps))
        self.apply(init_weights)

    @classmethod
    def import_weights(cls, path: Path | str, vision: Path | None = None) -> Self:
        """From a folder in Hugging Face format. Every tensor is used, or is named as expected to be unused.

        Raises:
            UserError: no config.json or no weights there, or a file that holds other things than tensors;
                sizes or tensors missing, tensors left over or of another shape (they are listed).
        """
        path = Path(path)
        cls.check_no_vision(vision)
        weights, description = _read(path)
        # only old folders, OSCAR's among them, do not say whose they are: BERT's
        first = first_position(description) if "model_type" in description else 0
        with limit_model(path / "config.json", path):
            model = cls(_sizes(weights, description, first, path))
        mapper = WeightMapper(weights, path)
        with torch.no_grad():
            _fill(model, mapper, first)
        mapper.assert_all_used(UNUSED)
        return model

    @property
    def width(self) -> int:
        return self.config.width

    def region_embedding(self) -> JointRegionEmbedding:
        return JointRegionEmbedding(self.config)

    def embed_regions(self, regions: Ragged, tags: Ragged | None = None) -> TaggedRegions:
        """The memory of texts, from features and boxes (R, f + 7) of each image, and ids (G,) of its tags
        with the SEP after them, without CLS; None: no image has tags."""
        assert self.regions is not None
        if tags is None:
            tags = _no_rows(regions, regions.values.new_empty(0, dtype=torch.int64))
        return TaggedRegions(
            tags.with_values(self.embedding.tags(tags.values)),
            regions.with_values(self.regions(regions.values[:, :-1])),
        )

    def encode_text(self, ids: Ragged, output_mask: Tensor | None = None) -> Tensor:
        """Ids (W,) -> words (W, d), or those in `output_mask`: a premise as it enters the row, in the place
        of tags. In this stack a text meets its memory in every layer, so nothing of it is encoded before."""
        words = self.embedding.tags(ids.values)
        return words if output_mask is None else select_mask(words, output_mask)

    def fused_cls(self, text: Ragged, memory: TaggedRegions | Ragged | None, per_text: int = 1) -> Tensor:
        """Pooled states of texts and their memory: of images, which must keep tags and regions apart
        (`embed_regions`), or of premises (`encode_text`); as in the base class.

        Raises:
            UserError: a text and its tags, or its premise, are longer than there are positions.
        """
        if per_text > 1:
            text = text.select_rows(torch.arange(len(text.lengths)).repeat_interleave(per_text))
        if memory is None:
            memory = _no_rows(text, self.embedding.word(text.values[:0]))
        rows = self.joint_rows(text, memory)
        return self.pool(self.encoder(rows, first_tokens(rows.lengths)))

    def pool(self, cls: Tensor) -> Tensor:
        return torch.tanh(self.pooler(cls))

    def hidden_states(
        self, text: Ragged, memory: TaggedRegions | Ragged, layers: Sequence[int], empty: bool = False
    ) -> tuple[list[Ragged], TokenSegments]:
        """States of all tokens after some of the layers, before the pooler.

        Args:
            text: ids, n rows.
            memory: as of `fused_cls`, n rows.
            layers: rising, the lowest is 1 (paper 3: 3, 6, 9, 12).
            empty: each row ends with what comes of a slot that is padded with a region of zeros, and that
                nothing attends to.
        Returns:
            For each of `layers` n rows (T, d); which of these tokens are what. So
            `rows.values[segments.regions.values]` (R, d) are regions in the order of those in `memory`, the
            same in a teacher and a student; on a GPU the index goes there first.
        Raises:
            UserError: no such layers; as `fused_cls`.
        """
        self.check_layers(layers)
        # segments come from lengths alone: rows are laid out as words, tags, regions (`joint_rows`)
        tagged, rows = _as_tagged(memory), self.joint_rows(text, memory)
        states = self._with_slots(rows, layers) if empty else self.encoder.layer_states(rows, layers)
        return states, find_segments(text.lengths, tagged.tags.lengths, tagged.regions.lengths, empty)

    def _with_slots(self, rows: Ragged, layers: Sequence[int]) -> list[Ragged]:
        """Rows after `layers`, each with a slot without a region behind it. All such slots of a row come to
        the same."""
        assert self.regions is not None and self.config.features is not None
        every = [rows, *self.encoder.layer_states(rows, range(1, layers[-1] + 1))]
        dim = self.config.features + REGION_BOX_DIM
        slots = self.regions(rows.values.new_zeros(len(rows.lengths), dim))
        one, found = torch.ones_like(rows.lengths), []
        # nothing attends to a slot, so it goes through the layers beside its row, one query a row
        for layer, (before, after) in enumerate(pairwise(every), 1):
            slots = self.encoder.blocks[layer - 1].cross_row(slots, before)
            if layer in layers:
                found.append(join_rows(after, Ragged(slots, one)))
        return found

    def joint_rows(self, text: Ragged, memory: TaggedRegions | Ragged) -> Ragged:
        tagged = _as_tagged(memory)
        # positions run through words and tags: these are one row until they have theirs
        words = join_rows(text.with_values(self.embedding.word(text.values)), tagged.tags)
        self.check_positions(words.lengths, "tokens and tags")
        return join_rows(words.with_values(self.embedding.add_positions(words)), tagged.regions)


def _as_tagged(memory: TaggedRegions | Ragged) -> TaggedRegions:
    """A premise takes the place of tags, and there are no regions."""
    if isinstance(memory, TaggedRegions):
        return memory
    return TaggedRegions(memory, _no_rows(memory, memory.values[:0]))


def _no_rows(rows: Ragged, nothing: Tensor) -> Ragged:
    """As many rows as there are in `rows`, all empty."""
    return Ragged(nothing, torch.zeros_like(rows.lengths))


def _read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The folder's tensors, by today's names, and its config.json."""
    weights, description = read_folder(path)
    for pattern, name in RENAMED_TENSORS.items():
        weights = {re.sub(pattern, name, key): value for key, value in weights.items()}
    return weights, description


def _sizes(weights: dict[str, Tensor], description: dict, first: int, path: Path) -> OscarConfig:
    """The sizes of the model in `weights`, whose texts start at row `first` of the position embeddings.

    Raises:
        UserError: config.json does not say them.
    """
    sizes = encoder_sizes(description, path, "an OSCAR, BERT or XLM-R folder")
    sizes |= {
        "positions": description["max_position_embeddings"] - first,
        "features": None,
        "region_eps": None,
    }
    # a text encoder has seen no regions: what embeds them is made when a run says how wide theirs are
    if REGIONS in weights:
        sizes["features"] = WeightMapper(weights, path)(REGIONS).shape[-1] - REGION_BOX_DIM
    if description.get("use_img_layernorm"):
        sizes["region_eps"] = description.get("img_layer_norm_eps", 1e-12)
    return validate(OscarConfig, sizes, f"{path}/config.json")


def _fill(model: Oscar, mapper: WeightMapper, first: int) -> None:
    # The type of texts becomes part of the positions, and tags are of what their type differs by. XLM-R has
    # one type: tags are then of the same, which a difference of rows 0 and -1 comes to.
    embedding, rows = model.embedding, (None, model.width)
    types = mapper(TYPES, rows)
    mapper.weights[POSITIONS] = mapper(POSITIONS, rows)[first:] + types[0]
    mapper.weights[TYPES] = types[-1] - types[0]
    mapper.copy(embedding.word.weight, "embeddings.word_embeddings.weight")
    mapper.copy(embedding.position.weight, POSITIONS)
    mapper.copy(embedding.tag, TYPES)
    mapper.copy_layer(embedding.norm, "embeddings.LayerNorm")
    for i, block in enumerate(model.encoder.blocks):
        copy_block(mapper, block, i)
    if model.regions is not None:
        mapper.copy_layer(model.regions.map, "img_embedding")
        if isinstance(model.regions.norm, nn.LayerNorm):  # `region_eps` is given
            mapper.copy_layer(model.regions.norm, "LayerNorm")
    if model.regions is not None or "pooler.dense.weight" in mapper.weights:
        mapper.copy_layer(model.pooler, "pooler.dense")

"""The unified model of paper 2 (section 3.2, figure 2): image encoder, text encoder, unified encoder.

Three routes share the unified encoder: unpaired text skips the cross-attention, image-text pairs attend to
the image, translation pairs attend to the other sentence.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raylib.config import validate
from raylib.errors import UserError
from raylib.models.base import FusionBackbone, RetrievalBackbone, Use
from raylib.models.heads import Classifier
from raylib.models.hf_weights import load_text, load_vision, text_sizes
from raylib.models.layers import Encoder, Memory, TextEmbedding, init_weights
from raylib.models.preprocessor import ALBEF_PREPROCESSING, Preprocessing, read_preprocessing
from raylib.models.recompute import RecomputedModule
from raylib.models.swin import SwinEncoder
from raylib.models.vision import VisionEncoder
from raylib.packed import Ragged, TokenSegments, find_segments, first_tokens, join_rows
from raylib.precision import LayerNorm, exact_linear
from raylib.settings import ClassifierConfig, ModelConfig
from raylib.weights import limit_model

TINY = ModelConfig(
    vocabulary=12000,
    width=32,
    heads=2,
    feedforward=64,
    text_layers=2,
    fusion_layers=2,
    vision_layers=1,
    image_size=16,
    patch=8,
    positions=64,
    embedding=16,
)


class MaskedLanguageHead(RecomputedModule):
    """Transform of a masked token's state before the vocabulary; the decoder is the word embedding (XLM-R's
    `lm_head`)."""

    def __init__(self, width: int, vocabulary: int, eps: float):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = LayerNorm(width, eps)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, states: Tensor) -> Tensor:
        """(m, d) -> (m, d), to be multiplied by the word embedding."""
        return self.norm(F.gelu(self.dense(states)))


class UnifiedModel(RetrievalBackbone, FusionBackbone):
    """Image, text and unified encoder with their heads. Every text goes in and comes out packed
    (`raylib.packed`)."""

    kind = "unified"
    summary = "text encoder, then unified layers with pluggable cross-attention; ViT (paper 2)"
    config_class = ModelConfig
    sizes: ClassVar[Mapping[str, ModelConfig]] = {"base": ModelConfig(), "tiny": TINY}
    stored_kinds = (
        "unified",
        "cclm",
        "cclm_swin",
    )  # CCLM's differ in nothing but sizes (`raylib.models.cclm`)
    embedding_names = ("embedding",)
    layer_names = ("text.blocks", "fusion.blocks")
    row_parts = ("text",)  # images are attended to from outside
    has_match_head = True

    config: ModelConfig

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        c, self.preprocess = config, config.preprocess
        self.pixel_mean, self.pixel_std = config.pixel_mean, config.pixel_std
        stack: dict[str, Any] = dict(
            width=c.width, heads=c.heads, feedforward=c.feedforward, dropout=c.dropout
        )
        # heads of images are as wide as those of texts, so a ViT of another width has more or fewer of them
        share = (c.vision_width or c.width) / c.width
        sizes = {name: round(share * stack[name]) for name in ("width", "heads", "feedforward")}
        vision: dict[str, Any] = dict(out=c.width, pixel_mean=c.pixel_mean, pixel_std=c.pixel_std)
        self.vision: VisionEncoder | SwinEncoder
        if c.swin:
            self.vision = SwinEncoder(c.swin, c.image_size, c.patch, dropout=c.dropout, **vision)
        else:
            self.vision = VisionEncoder(
                c.image_size,
                c.patch,
                c.vision_layers,
                **sizes,
                **vision,
                window=c.vision_window,
                eps=c.vision_eps,
                dropout=c.vision_dropout,
            )
        self.embedding = TextEmbedding(c.vocabulary, c.positions, c.width, c.dropout, c.eps)
        self.text = Encoder(c.text_layers, **stack, eps=c.eps, cross=False)
        self.fusion = Encoder(c.fusion_layers, **stack, eps=c.fusion_eps or c.eps, cross=c.fusion == "cross")
        self.image_projection = nn.Linear(c.width, c.embedding)
        self.text_projection = nn.Linear(c.width, c.embedding)
        self.masked_head = MaskedLanguageHead(c.width, c.vocabulary, c.eps)
        self.match_head: nn.Linear | Classifier = nn.Linear(c.width, 2)
        if c.match_head == "mlp":
            self.match_head = Classifier(c.width, c.width, 2, ClassifierConfig(norm="before"))
        # of one element: DeepSpeed broadcasts no 0-d parameter
        self.temperature = nn.Parameter(torch.full((1,), c.temperature))
        self.contrast_bias: nn.Parameter | None = None  # of the sigmoid contrast, where that is trained
        self.apply(init_weights)

    def match_logits(self, states: Tensor) -> Tensor:
        """CLS states (n, d) of texts with their images -> logits (n, 2) of (no match, match), in float32 or
        better on a GPU."""
        # a trained head's logits are large, where bf16 is 1/16 apart
        if isinstance(self.match_head, Classifier):
            return self.match_head(states)
        return exact_linear(self.match_head, states)

    def add_contrast_bias(self) -> None:
        """Add the bias of the sigmoid contrast, unless it is there. It begins at -10, as most pairs are wrong
        ones (SigLIP, section 3.2)."""
        if self.contrast_bias is None:
            self.contrast_bias = nn.Parameter(torch.full_like(self.temperature, -10.0))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}contrast_bias" in state_dict:
            self.add_contrast_bias()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @classmethod
    def import_weights(cls, path: Path, vision: Path | None = None) -> Self:
        """A model as large as the XLM-R or BERT folder at `path`, filled from it: the first half of its
        layers text, the second fusion. `vision`: a ViT folder; None: a random image encoder as deep as the
        text encoder.

        Raises:
            UserError: no such folders, or they do not fit.
        """
        with limit_model(path / "config.json", path, vision):
            model = cls(validate(ModelConfig, text_sizes(path, vision), f"{path}/config.json"))
        load_text(model, path)
        if vision:
            load_vision(model, vision)
        return model

    @classmethod
    def has_embeddings(cls, path: Path) -> bool:
        # they are of a text encoder: what would bring it together with an image encoder is random
        return False

    @property
    def width(self) -> int:
        return self.config.width

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def num_windows(self) -> int:
        return self.vision.num_windows

    @property
    def num_fusion_layers(self) -> int:
        return self.config.fusion_layers

    @property
    def has_cross_attention(self) -> bool:
        return self.fusion.cross

    def freezable_parts(self) -> dict[str, nn.Module]:
        return {
            "embeddings": self.embedding,
            "text": self.text,
            "vision": self.vision,
            "image_projection": self.image_projection,
            "fusion": self.fusion,
        }

    def freeze_unused(self, use: Use) -> None:
        # by what a loss reads: a classifier the fused CLS, a decoder the way to the vocabulary, contrast the
        # projections, matching all of them
        heads = (self.masked_head, self.match_head, self.temperature)
        if self.contrast_bias is not None:
            self.contrast_bias.requires_grad_(False)
        projections = (self.image_projection, self.text_projection)
        unused = {
            "classification": (*heads, *projections),
            "generation": (*heads[1:], *projections),
            "contrast": (self.fusion, *heads),
            "matching": (),
        }[use]
        for part in unused:
            part.requires_grad_(False)
        if use == "generation":  # a backbone that a classifier was trained on has it frozen
            self.masked_head.requires_grad_(True)

    def resize_images(self, size: int) -> None:
        """Give the image encoder another resolution; its position embeddings, or a Swin's biases, are
        interpolated (paper 2, appendix B.2.2).

        Raises:
            UserError: not a multiple of the patch, or of a patch of a Swin's last stage.
        """
        if size % self.config.stride:
            raise UserError(f"image_size={size} is not a multiple of the model's patch, {self.config.stride}")
        if size != self.image_size:
            self.vision.resize(size)
            self.preprocess = self.preprocess.for_size(size, self.image_size)
            self.config = self.config.model_copy(update={"image_size": size, "preprocess": self.preprocess})

    def published_preprocessing(self, path: Path, vision: Path | None) -> Preprocessing | None:
        if vision:
            default = Preprocessing(self.preprocess, self.pixel_mean, self.pixel_std)
            return read_preprocessing(vision, self.image_size, default)
        # a file is CCLM's own; with a text encoder's folder alone the image encoder is random
        return ALBEF_PREPROCESSING if path.is_file() else None

    def set_preprocessing(self, preprocessing: Preprocessing) -> None:
        super().set_preprocessing(preprocessing)
        self.vision.pixel_mean, self.vision.pixel_std = preprocessing.pixel_mean, preprocessing.pixel_std

    def encode_images(self, images: Tensor) -> Ragged:
        """uint8 (b, H, W, 3) -> b rows of states, CLS first."""
        states = self.vision(images)
        return Ragged(states.flatten(0, 1), torch.full((len(states),), states.shape[1]))

    def encode_text(self, ids: Ragged, output_mask: Tensor | None = None) -> Tensor:
        """Ids (T,) -> unimodal states (T, d), or (R, d) of the tokens in `output_mask` (T,)."""
        return self.text(ids.with_values(self.embedding(ids)), output_mask)

    def fuse(self, text: Ragged, output_mask: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        """Unimodal text states (T, d) -> unified states (R, d) of the tokens in `output_mask`, which attend
        to `memory`."""
        return self.fusion(text, output_mask, memory)

    def embed_images(self, states: Ragged, *, normalize: bool) -> Tensor:
        """States of n images, CLS first -> vectors (n, e), of length 1 if `normalize`."""
        vectors = self.image_projection(states.first())
        return F.normalize(vectors, dim=-1) if normalize else vectors

    def embed_text(self, ids: Ragged, *, normalize: bool) -> Tensor:
        cls = self.encode_text(ids, first_tokens(ids.lengths))
        return self.embed_text_states(cls, normalize=normalize)

    def embed_text_states(self, cls: Tensor, *, normalize: bool) -> Tensor:
        """CLS states (n, d) of n texts -> vectors (n, e), of length 1 if `normalize`."""
        vectors = self.text_projection(cls)
        return F.normalize(vectors, dim=-1) if normalize else vectors

    def fused_cls(self, text: Ragged, memory: Ragged | Memory | None, per_text: int = 1) -> Tensor:
        # each text is encoded once, whatever the number of images that it is about
        states = text.with_values(self.encode_text(text))
        if per_text > 1:
            states = states.select_rows(torch.arange(len(text.lengths)).repeat_interleave(per_text))
        return self.fuse(states, first_tokens(states.lengths), _row_by_row(memory))

    def fused_states(self, text: Ragged, memory: Ragged | Memory | None) -> Ragged:
        """As `fused_cls`, with row i of `memory` for row i of `text`, but states of all tokens: rows as
        `text`'s."""
        states = text.with_values(self.encode_text(text))
        return text.with_values(self.fuse(states, memory=_row_by_row(memory)))

    def hidden_states(
        self, text: Ragged, memory: Ragged, layers: Sequence[int], empty: bool = False
    ) -> tuple[list[Ragged], TokenSegments]:
        """States of all tokens after some of the layers: those of the text encoder, then the unified ones.

        Args:
            text: ids, n rows.
            memory: as of `fused_states`.
            layers: rising, the lowest is 1.
        Returns:
            For each of `layers` rows as `text`'s (T, d); which tokens are what: all are of the text.
        Raises:
            UserError: no such layers; a model in which images are part of the rows.
        """
        self.check_layers(layers)
        assert not empty, "there are no regions, so no slots of regions"
        if not self.fusion.cross:
            raise UserError(
                "fusion=entangled puts images into the rows of the top layers alone; states need fusion=cross"
            )
        num_text = self.config.text_layers
        text_layers = [layer for layer in layers if layer <= num_text]
        fusion_layers = [layer - num_text for layer in layers if layer > num_text]
        rows = text.with_values(self.embedding(text))
        # to the caller two stacks are one sequence of layers; the unified ones go on from the last layer of
        # text, whether its states are wanted or not
        states = self.text.layer_states(rows, sorted({*text_layers, num_text}) if num_text else [])
        fused = self.fusion.layer_states(states[-1] if states else rows, fusion_layers, _row_by_row(memory))
        none = torch.zeros_like(text.lengths)
        return [*states[: len(text_layers)], *fused], find_segments(text.lengths, none, none)

    def joint_states(self, text: Ragged, memory: Ragged) -> Ragged:
        if not self.has_cross_attention:
            rows = join_rows(text.with_values(self.encode_text(text)), memory)
            return rows.with_values(self.fusion(rows))
        # an image does not pass the unified layers: in their place stands what the last cross-attention adds
        # to a word that attends to this patch alone
        last = self.fusion.blocks[-1].cross_attention
        values = last.key_value(memory.values).chunk(2, 1)[1]
        return join_rows(self.fused_states(text, memory), memory.with_values(last.output(values)))


def _row_by_row(states: Ragged | Memory | None) -> Memory | None:
    """Row i of texts attends to row i of `states`, or to nothing; of a `Memory`, to what that says."""
    if isinstance(states, Memory):
        return states
    return None if states is None else Memory(states, torch.arange(len(states.lengths)))

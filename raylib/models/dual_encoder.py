"""Backbones that read texts and images apart (paper 4), so that they retrieve (`use_itm_head=false`) and have
no head of any other task to stand under.

    Multilingual-CLIP   (Carlsson et al. 2022) a text encoder's mean state, mapped to where CLIP's image tower
                        puts images
    CLIP                (Radford et al. 2021) both towers from `transformers`, English alone or with
                        translations. Its layers are not ours: small modules do not go in.

Shape legend: n texts, b images, T tokens, d width, e of embeddings.
"""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from raylib.config import Config, Size
from raylib.errors import UserError, reading, require
from raylib.models.base import RetrievalBackbone
from raylib.models.hf_folders import read_folder
from raylib.models.hf_weights import UNUSED_TEXT, WeightMapper, copy_block
from raylib.models.layers import Encoder, TextEmbedding, init_weights
from raylib.models.mclip_weights import read_image_tower, read_text_tower
from raylib.models.preprocessor import CLIP_PREPROCESSING, Preprocessing, read_preprocessing
from raylib.models.recompute import SplitModule, recompute_layers
from raylib.packed import Ragged, upload
from raylib.settings import CLIP_MEAN, CLIP_STD, Checkpointing, PixelStats, PreprocessConfig, check_heads
from raylib.weights import limit_model, load_state


class ClipImageSizes(Config):
    """Of CLIP's image tower. The defaults are ViT-L/14's."""

    hidden_size: Size = 1024
    intermediate_size: Size = 4096
    num_hidden_layers: Size = 24
    num_attention_heads: Size = 16
    patch_size: Size = 14
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


class MClipConfig(Config):
    """The defaults are XLM-R-large and ViT-L/14, paper 4's base model."""

    vocabulary: Size = 250002
    width: Size = 1024
    heads: Size = 16
    feedforward: Size = 4096
    text_layers: Size = 24
    positions: Size = 512
    embedding: Size = 768
    image_size: Size = 224
    image: ClipImageSizes = ClipImageSizes()
    dropout: float = 0.1
    eps: float = 1e-5
    pixel_mean: PixelStats = CLIP_MEAN
    pixel_std: PixelStats = CLIP_STD
    preprocess: PreprocessConfig = PreprocessConfig()

    _fits = model_validator(mode="after")(check_heads)


class ClipConfig(Config):
    """CLIP's own config.json, as its folder has it; `image_size` is in there too."""

    clip: dict[str, Any]
    pixel_mean: PixelStats = CLIP_MEAN
    pixel_std: PixelStats = CLIP_STD
    preprocess: PreprocessConfig = PreprocessConfig()

    @property
    def image_size(self) -> int:
        return self.clip["vision_config"].get("image_size", 224)

    @model_validator(mode="after")
    def _fits(self) -> "ClipConfig":
        tower = self.clip.get("vision_config")
        size = tower.get("image_size", 224) if isinstance(tower, dict) else None
        if type(size) is not int or size <= 0:
            raise ValueError("no vision_config with the image_size of CLIP")
        return self


class DualEncoder(RetrievalBackbone, SplitModule):
    """Shared by both: an image is one vector from the start. Images pass their tower in pieces."""

    config: MClipConfig | ClipConfig

    def __init__(self, config: Any):
        super().__init__(config)
        self.preprocess, self.pixel_mean, self.pixel_std = (
            config.preprocess,
            config.pixel_mean,
            config.pixel_std,
        )

    def published_preprocessing(self, path: Path, vision: Path | None) -> Preprocessing | None:
        return read_preprocessing(vision or path, self.image_size, CLIP_PREPROCESSING)

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @classmethod
    def from_sizes(cls, sizes: dict[str, Any], kind: str, folder: Path) -> Self:
        # `transformers` makes the towers, and raises whatever it likes at sizes that it does not take
        with reading(folder / "config.json", "sizes of CLIP"):
            return super().from_sizes(sizes, kind, folder)

    def embed_images(self, states: Ragged, *, normalize: bool) -> Tensor:
        return F.normalize(states.values, dim=-1) if normalize else states.values

    def embed_text(self, ids: Ragged, *, normalize: bool) -> Tensor:
        vectors = self.project_text(ids)
        return F.normalize(vectors, dim=-1) if normalize else vectors

    def encode_images(self, images: Tensor) -> Ragged:
        """uint8 (b, H, W, 3) -> b rows of one vector each (b, e): the tower's projection of its CLS state."""
        vectors = self.run_pieces(self.project_images, images)
        return Ragged(vectors, torch.ones(len(images), dtype=torch.int64))

    @abstractmethod
    def project_images(self, images: Tensor) -> Tensor:
        """uint8 (b, H, W, 3) -> vectors (b, e), of any length."""

    @abstractmethod
    def project_text(self, ids: Ragged) -> Tensor:
        """Ids of n texts -> vectors (n, e), of any length."""


class MClip(DualEncoder):
    """Text tower and image tower."""

    kind = "mclip"
    summary = "XLM-R's mean state beside CLIP's image tower (Multilingual-CLIP, paper 4); retrieves alone"
    config_class = MClipConfig
    sizes: ClassVar[Mapping[str, MClipConfig]] = {
        "base": MClipConfig(),
        "tiny": MClipConfig(
            vocabulary=12000,
            width=32,
            heads=2,
            feedforward=64,
            text_layers=2,
            positions=64,
            embedding=16,
            image_size=16,
            image=ClipImageSizes(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                patch_size=8,
            ),
        ),
    }
    embedding_names = ("embedding",)
    layer_names = ("text.blocks",)

    config: MClipConfig

    def __init__(self, config: MClipConfig):
        super().__init__(config)
        c = config
        self.embedding = TextEmbedding(c.vocabulary, c.positions, c.width, c.dropout, c.eps)
        self.text = Encoder(c.text_layers, c.width, c.heads, c.feedforward, c.dropout, c.eps, cross=False)
        self.text_projection = nn.Linear(c.width, c.embedding)
        self.apply(init_weights)
        sizes = {**c.image.model_dump(), "image_size": c.image_size, "projection_dim": c.embedding}
        self.vision = _make_tower(sizes)

    @classmethod
    def import_weights(cls, path: Path, vision: Path | None = None) -> Self:
        """From a Multilingual-CLIP folder and, as `vision`, the folder of its CLIP
        (`raylib.models.mclip_weights`).

        Raises:
            UserError: no such folders; towers that map into spaces of different widths; tensors missing or
                left over.
        """
        if vision is None:
            raise UserError(
                f"{path}: its image tower comes from a folder of its own; set vision=FOLDER of the CLIP it "
                "was made for"
            )
        # the checkpoint has no image tower: Multilingual-CLIP trains texts towards CLIP's space
        tower = _load_tower(vision)
        text = read_text_tower(path)
        mapper = WeightMapper(text.weights, path)
        projection = mapper("LinearTransformation.weight")
        tower_sizes = tower.config.to_dict()
        if len(projection) != tower_sizes["projection_dim"]:
            raise UserError(
                f"{path} maps texts to {len(projection)} numbers, {vision} images to "
                f"{tower_sizes['projection_dim']}; give the CLIP that it was made for"
            )
        sizes = {
            ("text_layers" if name == "layers" else name): size for name, size in text.sizes.items()
        } | dict(
            embedding=len(projection),
            image_size=tower_sizes["image_size"],
            image={k: tower_sizes[k] for k in ClipImageSizes.model_fields},
        )
        with limit_model(path, path, vision):
            model = cls.from_sizes(sizes, cls.kind, path)
        with torch.no_grad():
            mapper.copy(model.embedding.word.weight, "embeddings.word_embeddings.weight")
            rows = (model.config.positions + text.first, model.width)
            positions = mapper("embeddings.position_embeddings.weight", rows)[text.first :]
            # all texts are of one type: its vector becomes part of the positions; a DistilBERT has none
            types = "embeddings.token_type_embeddings.weight"
            if types in text.weights:
                positions = positions + mapper(types, (None, model.width))[0]
            model.embedding.position.weight.copy_(positions)
            mapper.copy_layer(model.embedding.norm, "embeddings.LayerNorm")
            for layer, block in enumerate(model.text.blocks):
                copy_block(mapper, block, layer)
            mapper.copy_layer(model.text_projection, "LinearTransformation")
        mapper.assert_all_used([*UNUSED_TEXT, r"cls\.", r"lm_head\."])
        model.vision = tower
        return model

    @property
    def width(self) -> int:
        return self.config.width

    def freezable_parts(self) -> dict[str, nn.Module]:
        return {"embeddings": self.embedding, "text": self.text, "vision": self.vision}

    def set_recomputation(self, checkpointing: Checkpointing, micro_batches: int) -> None:
        super().set_recomputation(checkpointing, micro_batches)
        recompute_layers(cast(Any, self.vision).vision_model.encoder.layers, checkpointing)

    def project_images(self, images: Tensor) -> Tensor:
        return self.vision(pixel_values=self.pixel_values(images)).image_embeds

    def project_text(self, ids: Ragged) -> Tensor:
        """Ids of n texts -> vectors (n, e): the mean over all tokens, specials too, mapped."""
        states = self.text(ids.with_values(self.embedding(ids)))
        # a mean over packed rows: each token is added to the row that it is of
        row = torch.arange(len(ids.lengths)).repeat_interleave(ids.lengths)
        row, lengths = upload((row, ids.lengths), states.device)
        sums = states.new_zeros(len(ids.lengths), states.shape[1]).index_add(0, row, states)
        return self.text_projection(sums / lengths[:, None])


class Clip(DualEncoder):
    """CLIP as `transformers` has it."""

    kind = "clip"
    summary = "CLIP itself, which knows English (paper 4's baseline); retrieves alone"
    config_class = ClipConfig
    sizes: ClassVar[Mapping[str, ClipConfig]] = {
        "base": ClipConfig(
            clip={
                "projection_dim": 768,
                "text_config": dict(
                    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
                ),
                "vision_config": dict(
                    hidden_size=1024,
                    intermediate_size=4096,
                    num_hidden_layers=24,
                    num_attention_heads=16,
                    patch_size=14,
                ),
            }
        ),
        "tiny": ClipConfig(
            clip={
                "projection_dim": 16,
                "text_config": dict(
                    hidden_size=32,
                    intermediate_size=64,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    vocab_size=12000,
                ),
                "vision_config": dict(
                    hidden_size=32,
                    intermediate_size=64,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    image_size=16,
                    patch_size=8,
                ),
            }
        ),
    }
    embedding_names = ("towers.text_model.embeddings",)
    layer_names = ("towers.text_model.encoder.layers",)
    top_names = ("towers.text_model.final_layer_norm",)

    config: ClipConfig

    def __init__(self, config: ClipConfig):
        super().__init__(config)
        transformers = require("transformers", "transfer")
        self.towers = transformers.CLIPModel(transformers.CLIPConfig(**config.clip))

    @classmethod
    def import_weights(cls, path: Path, vision: Path | None = None) -> Self:
        """From a CLIP folder.

        Raises:
            UserError: `vision` is given too; tensors missing or left over.
        """
        if vision is not None:
            raise UserError(f"vision={vision}: CLIP brings its own image tower; leave it out")
        weights, description = read_folder(path)
        if description.get("model_type") != "clip":
            raise UserError(
                f"{path}: its config.json is of '{description.get('model_type')}', not of clip; give a CLIP "
                "folder"
            )
        with limit_model(path / "config.json", path):
            model = cls.from_sizes({"clip": description}, cls.kind, path)
        # an index that older versions stored, and that follows from the sizes
        weights = {name: value for name, value in weights.items() if not name.endswith("position_ids")}
        load_state(model.towers, weights, path)
        return model

    @property
    def max_length(self) -> int:
        return self.towers.config.text_config.max_position_embeddings

    @property
    def width(self) -> int:
        return self.towers.config.text_config.hidden_size

    def freezable_parts(self) -> dict[str, nn.Module]:
        """The image tower and its projection: both make an image's vector."""
        return {"vision": nn.ModuleList([self.towers.vision_model, self.towers.visual_projection])}

    def set_recomputation(self, checkpointing: Checkpointing, micro_batches: int) -> None:
        super().set_recomputation(checkpointing, micro_batches)
        for tower in (self.towers.text_model, self.towers.vision_model):
            recompute_layers(tower.encoder.layers, checkpointing)

    def project_images(self, images: Tensor) -> Tensor:
        pooled = self.towers.vision_model(pixel_values=self.pixel_values(images)).pooler_output
        return self.towers.visual_projection(pooled)

    def project_text(self, ids: Ragged) -> Tensor:
        """Ids of n texts -> vectors (n, e): the state of the last token, mapped."""
        # CLIP's own tower takes padded rows, as it is `transformers`'; ours take packed ones
        padded, _ = ids.padded(int(ids.lengths.max()))
        # attention is causal: a text does not see its padding, so no mask is needed
        states = self.run_pieces(self._text_states, padded)
        rows, columns = upload((torch.arange(len(padded)), ids.lengths - 1), states.device)
        last = states[rows, columns]
        return self.towers.text_projection(last)

    def _text_states(self, padded: Tensor) -> Tensor:
        return self.towers.text_model(input_ids=padded).last_hidden_state


def _make_tower(sizes: dict[str, Any]) -> nn.Module:
    """CLIP's image tower with its projection, as its vision_config says."""
    transformers = require("transformers", "transfer")
    return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**sizes))


def _load_tower(folder: Path) -> Any:
    """The image half of a CLIP folder; what is of its text half is left out."""
    sizes, weights = read_image_tower(folder)
    with limit_model(folder, folder), reading(folder, "sizes of CLIP"):
        tower = _make_tower(sizes)
    load_state(tower, weights, folder)
    return tower

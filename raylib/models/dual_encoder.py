"""Multilingual-CLIP (Carlsson et al. 2022; paper 4): XLM-R's mean state, mapped to where CLIP's image tower
puts pictures.

It reads texts and pictures apart, so it retrieves (`use_itm_head=false`) and has no head of any other task to
stand under.


CLIP (Radford et al. 2021), both towers from `transformers`: what paper 4 compares with, English alone or
with translations.

It reads texts and pictures apart, so it retrieves (`use_itm_head=false`). Its layers are not ours: small
modules do not go in.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raylib.config import Config, validate
from raylib.errors import UserError, require
from raylib.fileio import read_json
from raylib.models.base import fill, save_model
from raylib.models.cclm import CLIP
from raylib.models.hf_weights import WeightMapper, copy_block, read_folder
from raylib.models.layers import Encoder, TextEmbedding, init_weights
from raylib.models.peft import described, restore
from raylib.models.vision import normalise
from raylib.packed import Ragged
from raylib.renames import rename_settings

FIRST = 2  # row of XLM-R's position embeddings that a text starts at
PIXELS = CLIP["pixel_mean"], CLIP["pixel_std"]


class ClipImageSizes(Config):
    """Of CLIP's image tower. The defaults are ViT-L/14's."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    patch_size: int = 14
    hidden_act: str = "quick_gelu"


class MClipConfig(Config):
    """The defaults are XLM-R-large and ViT-L/14, paper 4's base model."""

    vocabulary: int = 250002
    width: int = 1024
    heads: int = 16
    feedforward: int = 4096
    text_layers: int = 24
    positions: int = 512
    embedding: int = 768
    image_size: int = 224
    image: ClipImageSizes = ClipImageSizes()
    dropout: float = 0.1
    eps: float = 1e-5


class MClip(nn.Module):
    """Text tower and image tower. A backbone of fine-tuning (`raylib.models`)."""

    kind = "mclip"
    num_fusion_layers = 0

    def __init__(self, config: MClipConfig):
        super().__init__()
        c = self.config = config
        self.embedding = TextEmbedding(c.vocabulary, c.positions, c.width, c.dropout, c.eps)
        self.text = Encoder(c.text_layers, c.width, c.heads, c.feedforward, c.dropout, c.eps, cross=False)
        self.text_projection = nn.Linear(c.width, c.embedding)
        self.apply(init_weights)
        sizes = {**c.image.model_dump(), "image_size": c.image_size, "projection_dim": c.embedding}
        self.vision = _make_tower(sizes)

    def encode_images(self, images: Tensor) -> Ragged:
        """uint8 (b, H, W, 3) -> b rows of one vector each (b, e): what the tower's projection makes of its
        CLS state."""
        pixels = normalise(images, PIXELS, self.text_projection.weight.dtype).permute(0, 3, 1, 2)
        return Ragged(
            self.vision(pixel_values=pixels).image_embeds, torch.ones(len(images), dtype=torch.int64)
        )

    def embed_images(self, states: Ragged, *, normalize: bool) -> Tensor:
        """What `encode_images` made of n images -> vectors (n, e), of length 1 if `normalize`."""
        return F.normalize(states.values, dim=-1) if normalize else states.values

    def encode_text(self, ids: Ragged, read: Tensor | None = None) -> Tensor:
        """Ids (T,) -> states (T, d), or (R, d) of the tokens in `read` (T,)."""
        return self.text(ids.with_values(self.embedding(ids)), read)

    def embed_text(self, ids: Ragged, *, normalize: bool) -> Tensor:
        """Ids of n texts -> vectors (n, e), of length 1 if `normalize`: the mean over all tokens, specials
        too, mapped."""
        states = self.encode_text(ids)
        row = torch.arange(len(ids.lengths)).repeat_interleave(ids.lengths).to(states.device)
        sums = states.new_zeros(len(ids.lengths), states.shape[1]).index_add(0, row, states)
        vectors = self.text_projection(sums / ids.lengths.to(states.device)[:, None])
        return F.normalize(vectors, dim=-1) if normalize else vectors

    @property
    def width(self) -> int:
        return self.config.width

    @property
    def num_layers(self) -> int:
        return self.config.text_layers

    def depth_of(self, name: str) -> int | None:
        """Of the parameter `name`: 1 ... `num_layers` bottom up, 0 for the embeddings, None outside (image
        tower, projection)."""
        part, _, rest = name.partition(".")
        if part == "embedding":
            return 0
        return int(rest.split(".")[1]) + 1 if part == "text" else None

    def prunable(self) -> list[str]:
        """Names of the matrices of the text layers."""
        return [name for name, p in self.named_parameters() if (self.depth_of(name) or 0) > 0 and p.ndim == 2]

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        description = {
            "model_type": "polyglance-mclip",
            **self.config.model_dump(),
            "tuning": described(self),
        }
        save_model(self, description, folder)

    @classmethod
    def from_pretrained(cls, folder: Path) -> "MClip":
        """The model that `save` wrote into `folder`.

        Raises:
            UserError: weights that do not fit the config.
        """
        values = rename_settings("mclip", read_json(folder / "config.json"))
        del values["model_type"]
        tuned = values.pop("tuning", {})
        model = cls(validate(MClipConfig, values, str(folder / "config.json")))
        restore(model, tuned)
        return fill(model, folder)


def load_mclip(path: Path, vision: Path | None) -> MClip:
    """From a Multilingual-CLIP folder (`transformer.*`, `LinearTransformation`) and, as `vision`, the folder
    of its CLIP.

    Raises:
        UserError: no such folders; towers that map into spaces of different widths; tensors missing or left
            over.
    """
    if vision is None:
        raise UserError(
            f"{path}: its image tower comes from a folder of its own; set vision=FOLDER of the CLIP it was "
            "made for"
        )
    tower = _load_tower(vision)
    weights, _ = read_folder(path)
    weights = {name.removeprefix("transformer."): value for name, value in weights.items()}
    taken = WeightMapper(weights, path)
    words, mapped = taken("embeddings.word_embeddings.weight"), taken("LinearTransformation.weight")
    projection, sizes = tower.config.projection_dim, tower.config.to_dict()
    if mapped.shape[0] != projection:
        raise UserError(
            f"{path} maps texts to {mapped.shape[0]} numbers, {vision} pictures to {projection}; "
            "give the CLIP that it was made for"
        )
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer."))
    positions = taken("embeddings.position_embeddings.weight")[FIRST:]
    config = MClipConfig(
        vocabulary=len(words),
        width=words.shape[1],
        heads=words.shape[1] // 64,
        text_layers=layers,
        positions=len(positions),
        feedforward=len(taken("encoder.layer.0.intermediate.dense.bias")),
        embedding=projection,
        image_size=tower.config.image_size,
        image=ClipImageSizes(**{k: sizes[k] for k in ClipImageSizes.model_fields}),
    )
    model = MClip(config)
    with torch.no_grad():
        taken.copy(model.embedding.word.weight, "embeddings.word_embeddings.weight")
        model.embedding.position.weight.copy_(positions + taken("embeddings.token_type_embeddings.weight")[0])
        taken.copy_layer(model.embedding.norm, "embeddings.LayerNorm")
        for layer, block in enumerate(model.text.blocks):
            copy_block(taken, block, layer)
        taken.copy_layer(model.text_projection, "LinearTransformation")
    taken.assert_all_used([r"pooler\.", r"embeddings\.position_ids"])
    model.vision = tower
    return model


def _make_tower(sizes: dict) -> nn.Module:
    """CLIP's image tower with its projection, as its vision_config says."""
    transformers = require("transformers", "transfer")
    return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**sizes))


def _load_tower(folder: Path) -> nn.Module:
    """The image half of a CLIP folder; what is of its text half is left out."""
    weights, described = read_folder(folder)
    seen = described.get("vision_config", described)
    width = described.get(
        "projection_dim", seen.get("projection_dim", 512)
    )  # 512: CLIP's, if its config.json says nothing
    tower = _make_tower({**seen, "projection_dim": width})
    own = {
        name: value
        for name, value in weights.items()
        if name.startswith(("vision_model.", "visual_projection."))
    }
    own.pop("vision_model.embeddings.position_ids", None)
    try:
        tower.load_state_dict(own)
    except RuntimeError as e:
        raise UserError(f"{folder}: no image tower of CLIP ({' '.join(str(e).split())[:300]})") from None
    return tower


PIXELS = CLIP["pixel_mean"], CLIP["pixel_std"]


class ClipConfig(Config):
    """CLIP's own config.json, as its folder has it; `image_size` is in there too."""

    clip: dict

    @property
    def image_size(self) -> int:
        return self.clip["vision_config"].get("image_size", 224)


class Clip(nn.Module):
    """A backbone of fine-tuning (`raylib.models`) that retrieves."""

    kind = "clip"
    num_fusion_layers = 0

    def __init__(self, config: ClipConfig):
        super().__init__()
        transformers = require("transformers", "transfer")
        self.config = config
        self.towers = transformers.CLIPModel(transformers.CLIPConfig(**config.clip))

    @property
    def vision(self) -> nn.Module:
        """What makes a picture's vector, which `freeze=["vision"]` means: the image tower and its
        projection."""
        return nn.ModuleList([self.towers.vision_model, self.towers.visual_projection])

    def encode_images(self, images: Tensor) -> Ragged:
        """uint8 (b, H, W, 3) -> b rows of one vector each (b, e)."""
        pixels = normalise(images, PIXELS, self.towers.visual_projection.weight.dtype).permute(0, 3, 1, 2)
        seen = self.towers.vision_model(pixel_values=pixels).pooler_output
        return Ragged(self.towers.visual_projection(seen), torch.ones(len(images), dtype=torch.int64))

    def embed_images(self, states: Ragged, *, normalize: bool) -> Tensor:
        """What `encode_images` made of n images -> vectors (n, e), of length 1 if `normalize`."""
        return F.normalize(states.values, dim=-1) if normalize else states.values

    def embed_text(self, ids: Ragged, *, normalize: bool) -> Tensor:
        """Ids of n texts -> vectors (n, e), of length 1 if `normalize`: the state of the last token,
        mapped."""
        rows, columns = len(ids.lengths), torch.arange(int(ids.lengths.max()))
        there = columns < ids.lengths[:, None]
        padded = ids.values.new_zeros(rows, len(columns))
        padded[there.to(padded.device)] = ids.values
        # what comes after a text is not seen by it: attention is causal
        states = self.towers.text_model(input_ids=padded).last_hidden_state
        last = states[torch.arange(rows), (ids.lengths - 1).to(states.device)]
        vectors = self.towers.text_projection(last)
        return F.normalize(vectors, dim=-1) if normalize else vectors

    @property
    def width(self) -> int:
        return self.towers.config.text_config.hidden_size

    @property
    def num_layers(self) -> int:
        return self.towers.config.text_config.num_hidden_layers

    def depth_of(self, name: str) -> int | None:
        """Of the parameter `name`: 1 ... `num_layers` bottom up, 0 for the embeddings, None outside (image
        tower, projections)."""
        parts = name.split(".")
        if parts[:2] != ["towers", "text_model"]:
            return None
        if parts[2] == "embeddings":
            return 0
        return int(parts[4]) + 1 if parts[2] == "encoder" else self.num_layers

    def prunable(self) -> list[str]:
        """Names of the matrices of the text layers."""
        return [name for name, p in self.named_parameters() if (self.depth_of(name) or 0) > 0 and p.ndim == 2]

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        description = {"model_type": "polyglance-clip", **self.config.model_dump()}
        save_model(self, description, folder)

    @classmethod
    def from_pretrained(cls, folder: Path) -> "Clip":
        """The model that `save` wrote into `folder`."""
        values = rename_settings("clip", read_json(folder / "config.json"))
        del values["model_type"]
        model = cls(validate(ClipConfig, values, str(folder / "config.json")))
        return fill(model, folder)


def clip_sizes(tiny: bool = False) -> dict:
    """config.json of ViT-L/14, or of a CLIP for tests."""
    if tiny:
        stack = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
        return {
            "projection_dim": 16,
            "text_config": {**stack, "vocab_size": 12000},
            "vision_config": {**stack, "image_size": 16, "patch_size": 8},
        }
    return {
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


def load_clip(path: Path, vision: Path | None) -> Clip:
    """From a CLIP folder.

    Raises:
        UserError: `vision` is given too; tensors missing or left over.
    """
    if vision is not None:
        raise UserError(f"vision={vision}: CLIP brings its own image tower; leave it out")
    weights, described = read_folder(path)
    if described.get("model_type") != "clip":
        raise UserError(
            f"{path}: its config.json is of '{described.get('model_type')}', not of clip; give a CLIP folder"
        )
    model = Clip(ClipConfig(clip=described))
    own = {name: value for name, value in weights.items() if not name.endswith("position_ids")}
    try:
        model.towers.load_state_dict(own)
    except RuntimeError as e:
        raise UserError(f"{path}: no whole CLIP ({' '.join(str(e).split())[:300]})") from None
    return model

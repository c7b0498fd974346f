"""CLIP (Radford et al. 2021), both towers from `transformers`: what paper 4 compares with, English alone or
with translations.

It reads texts and pictures apart, so it retrieves (`use_itm_head=false`). Its layers are not ours: small
modules do not go in.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from raylib.config import Config, build
from raylib.errors import UserError, needed
from raylib.models.cclm_weights import CLIP
from raylib.models.folder import fill, write_model
from raylib.models.hf_weights import read_folder
from raylib.models.vision import normalise
from raylib.packed import Ragged
from raylib.renames import rename_settings

PIXELS = CLIP["pixel_mean"], CLIP["pixel_std"]


class ClipConfig(Config):
    """CLIP's own config.json, as its folder has it; `image_size` is in there too."""

    clip: dict

    @property
    def image_size(self) -> int:
        return self.clip["vision_config"].get("image_size", 224)


class Clip(nn.Module):
    """A backbone of fine-tuning (`raylib.models.base`) that retrieves."""

    kind = "clip"
    fusion_depths = 0

    def __init__(self, config: ClipConfig):
        super().__init__()
        transformers = needed("transformers", "transfer")
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

    def embed_pictures(self, states: Ragged) -> Tensor:
        """What `encode_images` made of n pictures -> vectors (n, e), of any length."""
        return states.values

    def embed_sentences(self, ids: Ragged) -> Tensor:
        """Ids of n texts -> vectors (n, e), of any length: the state of the last token, mapped."""
        rows, columns = len(ids.lengths), torch.arange(int(ids.lengths.max()))
        there = columns < ids.lengths[:, None]
        padded = ids.values.new_zeros(rows, len(columns))
        padded[there.to(padded.device)] = ids.values
        # what comes after a text is not seen by it: attention is causal
        states = self.towers.text_model(input_ids=padded).last_hidden_state
        last = states[torch.arange(rows), (ids.lengths - 1).to(states.device)]
        return self.towers.text_projection(last)

    @property
    def width(self) -> int:
        return self.towers.config.text_config.hidden_size

    @property
    def depths(self) -> int:
        return self.towers.config.text_config.num_hidden_layers

    def depth_of(self, name: str) -> int | None:
        """Of the parameter `name`: 1 ... `depths` bottom up, 0 for the embeddings, None outside (image tower,
        projections)."""
        parts = name.split(".")
        if parts[:2] != ["towers", "text_model"]:
            return None
        if parts[2] == "embeddings":
            return 0
        return int(parts[4]) + 1 if parts[2] == "encoder" else self.depths

    def prunable(self) -> list[str]:
        """Names of the matrices of the text layers."""
        return [name for name, p in self.named_parameters() if (self.depth_of(name) or 0) > 0 and p.ndim == 2]

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        description = {"model_type": "polyglance-clip", **self.config.model_dump()}
        write_model(self, description, folder)

    @classmethod
    def from_pretrained(cls, folder: Path) -> "Clip":
        """The model that `save` wrote into `folder`."""
        values = rename_settings("clip", json.loads((folder / "config.json").read_text(encoding="utf-8")))
        del values["model_type"]
        model = cls(build(ClipConfig, values, str(folder / "config.json")))
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

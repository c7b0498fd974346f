"""CCLM as a backbone (paper 1 fine-tunes it): the unified model with more layers of text, or with a Swin.

It starts from a published file, one of {"model": {name: tensor}}, or from a text encoder's folder as CCLM
itself did.

    CCLM         `vision_encoder` a Swin; `text_encoder.(bert.)encoder.layer.0-11`, the upper six with
                 `crossattention`; `text_encoder.cls.predictions` (Zeng et al., 2022)
    X2-VLM CCLM  `text_encoder.(roberta.)encoder.layer.0-11`, `cross_encoder.encoder.layer.0-5`,
                 `mlm_head.predictions`; its image encoder is BEiT-2, which our ViT cannot hold: another must
                 take its place

Both have `{vision,text}_proj`, `temp`, and `itm_head`, a matching head of two layers (`match_head`).
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from raylib.config import validate
from raylib.errors import UserError
from raylib.models.heads import Classifier
from raylib.models.hf_folders import read_config, read_sizes
from raylib.models.hf_weights import (
    WeightMapper,
    copy_swin,
    copy_text,
    copy_vision,
    load_text,
    load_vision,
    text_sizes,
)
from raylib.models.swin import SwinSizes
from raylib.models.unified import TINY, ModelConfig, UnifiedModel
from raylib.settings import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from raylib.weights import RANDOM_BYTES, limit_model, read_tensors

PIXELS: dict[str, Any] = {"pixel_mean": CLIP_MEAN, "pixel_std": CLIP_STD}  # that CCLM was trained with
# that Swins in Hugging Face folders were trained with; ViTs there: 127.5, as ours
IMAGENET = {"pixel_mean": IMAGENET_MEAN, "pixel_std": IMAGENET_STD}
VISION_FOLDER = "an image encoder's folder"
TIMM_EPS = 1e-6  # of layer norms of timm's ViT
HEAD_WIDTH = 64  # an attention head of XLM-R and BERT is so wide
UNUSED_CCLM_TEXT = [
    r"bbox_head\.",
    r"embeddings\.position_ids$",
    r"pooler\.",
    r"cls\.predictions\.decoder\.",
]
# these follow from the sizes
UNUSED_SWIN = [r".*\.relative_position_index$", r".*\.attn_mask$"]
# names that tell BEiT-2, which our ViT cannot hold, from a ViT
BEIT = r"gamma_[12]$|[qv]_bias$|relative_position_bias_table$"
VIT_NAMES = {  # timm's ViT -> the one of `transformers`
    r"^cls_token$": "embeddings.cls_token",
    r"^pos_embed$": "embeddings.position_embeddings",
    r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
    r"^norm\.": "layernorm.",
    r"^blocks\.(\d+)\.norm1\.": r"encoder.layer.\1.layernorm_before.",
    r"^blocks\.(\d+)\.norm2\.": r"encoder.layer.\1.layernorm_after.",
    r"^blocks\.(\d+)\.attn\.proj\.": r"encoder.layer.\1.attention.output.dense.",
    r"^blocks\.(\d+)\.attn\.(query|key|value)\.": r"encoder.layer.\1.attention.attention.\2.",
    r"^blocks\.(\d+)\.mlp\.fc1\.": r"encoder.layer.\1.intermediate.dense.",
    r"^blocks\.(\d+)\.mlp\.fc2\.": r"encoder.layer.\1.output.dense.",
}
SWIN_NAMES = {  # Microsoft's Swin -> the one of `transformers`
    r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
    r"^patch_embed\.norm\.": "embeddings.norm.",
    r"^norm\.": "layernorm.",
    r"^layers\.": "encoder.layers.",
    r"\.norm1\.": ".layernorm_before.",
    r"\.norm2\.": ".layernorm_after.",
    r"\.attn\.proj\.": ".attention.o_proj.",
    r"\.attn\.(q|k|v)[a-z]+\.": r".attention.\1_proj.",
    r"\.attn\.relative_position_bias_table$": (
        ".attention.relative_position_bias.relative_position_bias_table"
    ),
}

log = logging.getLogger(__name__)


class Published(NamedTuple):
    """A file's tensors. `text`: names as in Hugging Face folders, the cross layers as the last ones, heads
    and projections too. `vision`: without `vision_encoder.`, attention's `qkv` cut in three. `first`: row of
    the position embeddings that a text starts at."""

    path: Path
    text: dict[str, Tensor]
    vision: dict[str, Tensor]
    first: int

    @property
    def has_cross_encoder(self) -> bool:
        """True of X2-VLM's format."""
        return self.first > 0

    @property
    def is_swin(self) -> bool:
        return any(re.match(r"layers\.\d+\.blocks\.", name) for name in self.vision)


def read_published(path: Path) -> Published:
    """The tensors of a file.

    Raises:
        UserError: no checkpoint of tensors, or not one of CCLM; a tensor that is not finite.
    """
    weights = read_tensors(path)
    # the names of a text encoder's layers are what both formats have and no other file has
    layers = [
        int(m[1])
        for k in weights
        if (m := re.match(r"text_encoder\.(?:\w+\.)?encoder\.layer\.(\d{1,4})\.", k))
    ]
    if not layers:
        raise UserError(
            f"{path}: no text_encoder.encoder.layer; give a published CCLM checkpoint, or an XLM-R or BERT "
            "folder"
        )
    text: dict[str, Tensor] = {}
    vision: dict[str, Tensor] = {}
    above = 1 + max(layers)
    for name, value in weights.items():
        if name.startswith("vision_encoder."):
            name = name.removeprefix("vision_encoder.")
            # timm and Microsoft project queries, keys and values by one map, `transformers` by three
            if ".attn.qkv." in name:
                if not value.dim() or len(value) % 3:
                    raise UserError(
                        f"{path} does not fit the model: vision_encoder.{name} has no three parts"
                    )
                parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
                vision |= {name.replace(".qkv.", f".{part}."): third for part, third in parts}
            else:
                vision[name] = value
            continue
        # both formats by one name: BERT's, with X2-VLM's cross layers counted on from the text layers
        name = re.sub(r"^text_encoder\.(bert\.|roberta\.)?", "", name)
        name = re.sub(r"^mlm_head\.", "cls.", name)
        text[
            re.sub(
                r"^cross_encoder\.encoder\.layer\.(\d{1,4})",
                lambda m: f"encoder.layer.{above + int(m[1])}",
                name,
            )
        ] = value
    # X2-VLM's text encoder is a RoBERTa, whose texts start behind the padding; CCLM's is a BERT with XLM-R's
    # tensors
    return Published(path, text, vision, 2 if any(k.startswith("cross_encoder.") for k in weights) else 0)


def published_sizes(file: Published, vision: dict) -> ModelConfig:
    """Sizes as the shapes of a file's tensors tell them. It says nothing of heads and eps, which are those of
    the public code.

    vision: of the image encoder (`vit_sizes`, `swin_sizes`), or of the one in its place.
    """
    # a layer with cross-attention is of the unified encoder, wherever the file has it
    blocks = {int(m[1]) for k in file.text if (m := re.match(r"encoder\.layer\.(\d{1,4})\.", k))}
    cross = {n for n in blocks if f"encoder.layer.{n}.crossattention.self.query.weight" in file.text}
    mapper = WeightMapper(file.text, file.path)
    vocabulary, width = mapper("embeddings.word_embeddings.weight").shape
    if width % HEAD_WIDTH:
        raise UserError(
            f"{file.path}: {width} wide, no multiple of a head's {HEAD_WIDTH}; "
            "give a published CCLM checkpoint"
        )
    sizes = {
        "vocabulary": vocabulary,
        "width": width,
        "heads": width // HEAD_WIDTH,
        "feedforward": len(mapper("encoder.layer.0.intermediate.dense.weight")),
        "text_layers": len(blocks) - len(cross),
        "fusion_layers": len(cross),
        "positions": len(mapper("embeddings.position_embeddings.weight")) - file.first,
        "embedding": len(mapper("text_proj.weight")),
        "eps": 1e-5,
        # X2-VLM's cross layers are a BERT of their own, with BERT's epsilon
        "fusion_eps": 1e-12 if file.has_cross_encoder else None,
        "match_head": "mlp" if "itm_head.3.weight" in file.text else "linear",
    }
    return validate(ModelConfig, {**sizes, **PIXELS, **vision}, str(file.path))


def vit_sizes(file: Published) -> dict:
    """Of the file's own image encoder.

    Raises:
        UserError: it is BEiT-2 or another that our ViT cannot hold.
    """
    beit = [name for name in file.vision if re.search(BEIT, name)]
    if beit:
        raise UserError(
            f"{file.path}: its image encoder is BEiT-2, whose relative positions and layer scale "
            f"(vision_encoder.{beit[0]}, ...) our ViT does not have; give another in its place: "
            "vision=VIT_FOLDER"
        )
    layers = {m[1] for name in file.vision if (m := re.match(r"blocks\.(\d+)\.", name))}
    if not layers:
        raise UserError(
            f"{file.path}: no vision_encoder.blocks, so no ViT; give one in its place: vision=VIT_FOLDER"
        )
    mapper = WeightMapper(file.vision, file.path)
    width, _, patch, _ = mapper("patch_embed.proj.weight", (None, 3, None, None)).shape
    side = round((mapper("pos_embed", (1, None, width)).shape[1] - 1) ** 0.5)
    sizes = {"vision_layers": len(layers), "vision_width": width, "patch": patch, "image_size": side * patch}
    return {**sizes, "vision_eps": TIMM_EPS}


def swin_sizes(file: Published) -> dict:
    """Of the file's own image encoder; its resolution follows from the width of its windows."""
    stages: dict[int, list[Tensor]] = {}
    for name, value in file.vision.items():
        if m := re.match(r"layers\.(\d+)\.blocks\.\d+\.attn\.relative_position_bias_table$", name):
            stages.setdefault(int(m[1]), []).append(value)
    tables = [stages[number] for number in sorted(stages)]
    mapper = WeightMapper(file.vision, file.path)
    width, _, patch, _ = mapper("patch_embed.proj.weight", (None, 3, None, None)).shape
    swin = validate(
        SwinSizes,
        {"width": width, "layers": [len(t) for t in tables], "heads": [t[0].shape[1] for t in tables]},
        str(file.path),
    )
    # a table has a row for each relative position in a window w wide: (2 w - 1)^2
    window = (round(len(tables[-1][0]) ** 0.5) + 1) // 2
    return {"swin": swin.model_dump(), "patch": patch, "image_size": window * patch * swin.merges}


def fill(model: UnifiedModel, file: Published, with_vision: bool) -> None:
    """All of the file into `model`, or all but its image encoder, if another takes its place.

    Raises:
        UserError: tensors missing, left over or of another shape (they are listed).
    """
    # a number by itself in some files
    text = {name: x.reshape(1) if name == "temp" and x.dim() == 0 else x for name, x in file.text.items()}
    mapper = WeightMapper(text, file.path)
    copy_text(mapper, model, file.first, tuple(range(model.num_layers)))
    with torch.no_grad():
        mapper.copy_layer(model.text_projection, "text_proj")
        mapper.copy_layer(model.image_projection, "vision_proj")
        mapper.copy(model.temperature, "temp")
        if isinstance(model.match_head, Classifier):
            head = model.match_head
            for layer, name in ((head.hidden, 0), (head.norm, 1), (head.output, 3)):
                mapper.copy_layer(layer, f"itm_head.{name}")
    mapper.assert_all_used(UNUSED_CCLM_TEXT)
    if with_vision:
        names = SWIN_NAMES if file.is_swin else VIT_NAMES
        mapper = WeightMapper({_rename(name, names): value for name, value in file.vision.items()}, file.path)
        (copy_swin if file.is_swin else copy_vision)(mapper, model)
        mapper.assert_all_used(UNUSED_SWIN if file.is_swin else [])
    # what could not be taken as it is, and is not an error, is said
    decoder = file.text.get("cls.predictions.decoder.weight")
    if decoder is not None and not torch.equal(decoder, file.text["embeddings.word_embeddings.weight"]):
        log.warning(
            "%s: its masked-language head has a vocabulary of its own; ours is the word embedding", file.path
        )


def _rename(name: str, patterns: dict[str, str]) -> str:
    for pattern, new in patterns.items():
        name = re.sub(pattern, new, name)
    return name


class Cclm(UnifiedModel):
    """12 text layers, 6 layers with cross-attention, a ViT: CCLM on X2-VLM."""

    kind = "cclm"
    summary = "XLM-R's 12 layers, then 6 with cross-attention; ViT (CCLM on X2-VLM, paper 1)"
    sizes: ClassVar[Mapping[str, ModelConfig]] = {
        "base": ModelConfig(
            text_layers=12, fusion_layers=6, image_size=224, eps=1e-5, match_head="mlp", **PIXELS
        ),
        "tiny": TINY.model_copy(update={"text_layers": 12, "fusion_layers": 6}),
    }
    random_vision: ClassVar[dict[str, Any]] = {"vision_layers": 12, "image_size": 224}  # ViT-B/16

    @classmethod
    def has_embeddings(cls, path: Path) -> bool:
        # a file is CCLM's own; a folder is one of a text encoder
        return path.is_file()

    @classmethod
    def import_weights(cls, path: Path, vision: Path | None = None) -> Self:
        """From a published file of this CCLM, or from an XLM-R or BERT folder. `vision`: a folder of the
        image encoder; None: the file's own, or a random one.

        Raises:
            UserError: another number of layers; an image encoder of another kind; tensors missing, left over
                or of another shape.
        """
        vision_sizes = cls.folder_sizes(vision) if vision else None
        if path.is_file():
            file = read_published(path)
            config = published_sizes(file, vision_sizes or cls.file_sizes(file))
            with limit_model(path, path, vision):
                model = cls(config)
            fill(model, file, with_vision=not vision)
        else:
            sizes = text_sizes(path)
            layers = cls.choose_layers(sizes["text_layers"] + sizes["fusion_layers"], path)
            sizes |= {
                "text_layers": len(layers) - 6,
                "fusion_layers": 6,
                "match_head": "mlp",
                **(vision_sizes or cls.random_vision),
            }
            with limit_model(path / "config.json", path, vision, free=RANDOM_BYTES):
                model = cls(validate(ModelConfig, sizes, str(path)))
            load_text(model, path, layers=layers)
        if vision:
            load_vision(model, vision)
        return model

    @staticmethod
    def choose_layers(count: int, path: Path) -> tuple[int, ...]:
        """Choose the layers of a text encoder that serve: its first 12, then its last 6, which serve twice
        where it has fewer than 18."""
        if count < 12:
            raise UserError(
                f"{path}: {count} layers; give a text encoder of 12, or of 18 or more, or a published file"
            )
        return (*range(12), *range(count - 6, count))

    @staticmethod
    def file_sizes(file: Published) -> dict[str, Any]:
        """Of a published file's image encoder."""
        if file.is_swin:
            raise UserError(f"{file.path}: its image encoder is a Swin; set backbone=cclm_swin")
        return vit_sizes(file)

    @staticmethod
    def folder_sizes(folder: Path) -> dict[str, Any]:
        """Of a folder's image encoder."""
        names = ("num_hidden_layers", "hidden_size", "patch_size", "image_size")
        layers, width, patch, size = read_sizes(read_config(folder), folder, names, VISION_FOLDER)
        sizes = {"vision_layers": layers, "vision_width": width, "patch": patch, "image_size": size}
        eps = read_config(folder).get("layer_norm_eps", 1e-12)
        return {**sizes, "vision_eps": eps, "pixel_mean": 127.5, "pixel_std": 127.5}


class CclmSwin(Cclm):
    """6 text layers, 6 layers with cross-attention, a Swin: the first CCLM."""

    kind = "cclm_swin"
    summary = "every other layer of XLM-R-large, 6, then 6 with cross-attention; Swin (the first CCLM)"
    sizes: ClassVar[Mapping[str, ModelConfig]] = {
        "base": ModelConfig(
            width=1024,
            heads=16,
            feedforward=4096,
            text_layers=6,
            fusion_layers=6,
            match_head="mlp",
            positions=514,
            swin=SwinSizes(),
            patch=4,
            image_size=224,
            eps=1e-5,
            **PIXELS,
        ),
        "tiny": TINY.model_copy(
            update={"swin": SwinSizes(width=16, layers=(2, 2), heads=(2, 2)), "patch": 2}
        ),
    }
    random_vision: ClassVar[dict[str, Any]] = {
        "swin": {},
        "patch": 4,
        "image_size": 224,
        **IMAGENET,
    }  # Swin-B

    @staticmethod
    def choose_layers(count: int, path: Path) -> tuple[int, ...]:
        """Every other one of 24 layers, as CCLM did, or all 12."""
        if count not in (12, 24):
            raise UserError(
                f"{path}: {count} layers; give a text encoder of 24, of which every other is taken, or of 12"
            )
        return tuple(range(count // 12 - 1, count, count // 12))

    @staticmethod
    def file_sizes(file: Published) -> dict[str, Any]:
        if not file.is_swin:
            raise UserError(
                f"{file.path}: its image encoder is no Swin; set backbone=cclm, or vision=SWIN_FOLDER"
            )
        return swin_sizes(file)

    @staticmethod
    def folder_sizes(folder: Path) -> dict[str, Any]:
        config, where = read_config(folder), f"{folder}/config.json"
        names = ("embed_dim", "patch_size", "image_size", "window_size")
        width, patch, size, window = read_sizes(config, folder, names, VISION_FOLDER)
        read_sizes(config, folder, (), VISION_FOLDER, "depths", "num_heads")
        sizes = {"width": width, "layers": config["depths"], "heads": config["num_heads"]}
        # `SwinEncoder` has windows as wide as the last stage's grid
        if window != size // (patch * validate(SwinSizes, sizes, where).merges):
            raise UserError(
                f"{folder}/config.json: windows of {window} patches at {size} pixels; give a Swin whose "
                "windows are as wide as its last stage's grid, as 7 at 224 or 12 at 384 pixels"
            )
        return {"swin": sizes, "patch": patch, "image_size": size, **IMAGENET}

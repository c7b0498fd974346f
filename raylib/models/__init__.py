"""Backbones: what a fine-tuning head stands on. `BACKBONES`: name -> how one is built and filled.

Whatever its architecture, a backbone has
    config                         its sizes; `save` writes them, `BACKBONES[kind].build` takes them
    kind                           its key in `BACKBONES`
    width                          of the states that a head gets
    depths                         how many transformer layers a text passes, N
    num_fusion_layers                  how many of them, the top ones, come after layers of text alone; 0:
    there
                                   are none of these
    depth_of(name)                 of a parameter: 1 ... N bottom up, 0 the embeddings, None what is outside
                                   of the stack (image encoder, heads): the one order behind layer decay,
                                   unfreezing and top layers only
    prunable()                     names of the parameters that magnitude pruning may take: matrices of the
                                   stack
    encode_text(ids, read)         states of a text by itself, as a premise
and, unless it retrieves alone
    ground(text, memory, times) CLS states of texts in what grounds them

One that reads texts and pictures apart has in addition
    encode_images(images)          states of pictures
    embed_images(states), embed_text(ids)   vectors that are compared

One with layers of cross-attention has in addition what a head that spells answers builds on
(`finetune.decoder`)
    fused_states(text, memory) as `fused_cls`, but states of all tokens
    embedding, fusion, masked_head of its text; those layers; a token's state on its way to the word embedding

One that sees region features in place of pictures has in addition
    set_region_dim(width)             how wide these will be
    embed_regions(regions)         what grounds texts, from features and locations side by side; `oscar` takes
                                   tags after them

One that can be distilled (paper 3) has in addition
    parts                          of what its rows are made: "text", and perhaps "tags" and "regions"
    states(text, memory, layers)  of all tokens after these layers, and where in the rows the CLS, words,
                                     tags and regions are
    pooled(cls)                    what `fused_cls` makes of the CLS states after the last layer
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import nn

from raylib.config import Config, lookup, validate
from raylib.models.cclm import CLIP, Cclm, CclmSwin, load_cclm, load_cclm_swin
from raylib.models.dual_encoder import (
    Clip,
    ClipConfig,
    ClipImageSizes,
    MClip,
    MClipConfig,
    clip_sizes,
    load_clip,
    load_mclip,
)
from raylib.models.hf_weights import load_encoders
from raylib.models.oscar import TINY, Oscar, OscarConfig, load_oscar
from raylib.models.single_stream import LAYOUTS, SingleStream, tiny
from raylib.models.single_stream_weights import load_single_stream
from raylib.models.unified import ModelConfig, UnifiedModel
from raylib.models.vision import SwinSizes
from raylib.renames import rename_settings


class Backbone(NamedTuple):
    """One architecture.

    sizes: "base" as published, "tiny" for tests. build: from its sizes, with random weights.
    load: from a folder or file of weights (and a folder of the image encoder, where that comes from
    elsewhere).
    """

    summary: str
    sizes: Mapping[str, Config]
    build: Callable[[Config], nn.Module]
    load: Callable[[Path, Path | None], nn.Module]


SINGLE_STREAMS = {
    "uc2": "XLM-R over text and regions at 7 numbers (UC2)",
    "m3p": "XLM-R over regions and text, numbered together (M3P)",
    "muniter": "multilingual BERT over text, picture and regions (mUNITER)",
    "xuniter": "XLM-R over text, picture and regions (xUNITER)",
}

BACKBONES: dict[str, Backbone] = {
    "unified": Backbone(
        summary="text encoder, then unified layers with pluggable cross-attention; ViT (paper 2)",
        sizes={
            "base": ModelConfig(),
            "tiny": ModelConfig(
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
            ),
        },
        build=UnifiedModel,
        load=load_encoders,
    ),
    "cclm": Backbone(
        summary="XLM-R's 12 layers, then 6 with cross-attention; ViT (CCLM on X2-VLM, paper 1)",
        sizes={
            "base": ModelConfig(text_layers=12, fusion_layers=6, image_size=224, eps=1e-5, **CLIP),
            "tiny": ModelConfig(
                vocabulary=12000,
                width=32,
                heads=2,
                feedforward=64,
                text_layers=12,
                fusion_layers=6,
                vision_layers=1,
                image_size=16,
                patch=8,
                positions=64,
                embedding=16,
            ),
        },
        build=Cclm,
        load=load_cclm,
    ),
    "cclm_swin": Backbone(
        summary="every other layer of XLM-R-large, 6, then 6 with cross-attention; Swin (the first CCLM)",
        sizes={
            "base": ModelConfig(
                width=1024,
                heads=16,
                feedforward=4096,
                text_layers=6,
                fusion_layers=6,
                positions=514,
                swin=SwinSizes(),
                patch=4,
                image_size=224,
                eps=1e-5,
                **CLIP,
            ),
            "tiny": ModelConfig(
                vocabulary=12000,
                width=32,
                heads=2,
                feedforward=64,
                text_layers=2,
                fusion_layers=2,
                swin=SwinSizes(width=16, layers=(2, 2), heads=(2, 2)),
                patch=2,
                image_size=16,
                positions=64,
                embedding=16,
            ),
        },
        build=CclmSwin,
        load=load_cclm_swin,
    ),
    **{
        name: Backbone(
            summary,
            {"base": LAYOUTS[name], "tiny": tiny(name)},
            SingleStream,
            partial(load_single_stream, name),
        )
        for name, summary in SINGLE_STREAMS.items()
    },
    "oscar": Backbone(
        summary="BERT, or another encoder, over words, object tags and regions (OSCAR+, paper 3)",
        sizes={"base": OscarConfig(), "tiny": TINY},
        build=Oscar,
        load=load_oscar,
    ),
    "mclip": Backbone(
        summary="XLM-R's mean state beside CLIP's image tower (Multilingual-CLIP, paper 4); retrieves alone",
        sizes={
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
        },
        build=MClip,
        load=load_mclip,
    ),
    "clip": Backbone(
        summary="CLIP itself, which knows English (paper 4's baseline); retrieves alone",
        sizes={"base": ClipConfig(clip=clip_sizes()), "tiny": ClipConfig(clip=clip_sizes(tiny=True))},
        build=Clip,
        load=load_clip,
    ),
}


def rebuild(kind: str, sizes: dict, where: str) -> nn.Module:
    """The backbone `kind` of a stored description, with random weights.

    Raises:
        UserError: no such backbone, or sizes that it does not have; `where` says which file.
    """
    backbone = lookup(kind, BACKBONES, "backbone")
    return backbone.build(validate(type(backbone.sizes["base"]), rename_settings(kind, sizes), where))

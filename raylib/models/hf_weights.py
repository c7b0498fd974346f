"""Weights in Hugging Face format: XLM-R, BERT, ViT or Swin folders into a unified model (paper 2, section
4.1), and the `WeightMapper` by which every published checkpoint is read.

The first N_L text layers become the text encoder, the last N_C the unified encoder (or those that are asked
for); its cross-attention starts as a copy of the self-attention of its layer. The masked-language head comes
from `lm_head` (XLM-R) or `cls.predictions` (BERT), and stays as initialised where a checkpoint has neither.
"""

import logging
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from raylib.errors import UserError
from raylib.finite import require_finite_file
from raylib.models.attention import Attention, Block
from raylib.models.hf_folders import (
    SWIN_COMPUTED,
    TEXT_COMPUTED,
    TEXT_FOLDER,
    VIT_COMPUTED,
    encoder_sizes,
    first_position,
    load_by_library,
    read_config,
    read_folder,
    read_sizes,
    require_computed,
)
from raylib.models.swin import SwinEncoder, interpolate_bias
from raylib.models.vision import VisionBlock, VisionEncoder, interpolate
from raylib.weights import describe_misfit, limit_model, require_no_misfits

if TYPE_CHECKING:  # it imports this file
    from raylib.models.unified import UnifiedModel


class WeightMapper:
    """A checkpoint's tensors on their way into a model. None may be missing, left over or of another shape
    unnoticed: each one asked for counts as used, and `assert_all_used` tells what does not fit, all at
    once."""

    def __init__(self, weights: dict[str, Tensor], folder: Path | str):
        self.weights, self.folder = weights, folder
        self.used: set[str] = set()
        self.misfits: list[str] = []

    def __call__(self, name: str, shape: tuple[int | None, ...] = (None, None)) -> Tensor:
        """Return a tensor of `shape`, where None stands for any size from 1 on.

        Raises:
            UserError: it is missing, or another.
        """
        self.used.add(name)
        if name not in self.weights:
            raise UserError(f"{self.folder}: tensor '{name}' is missing")
        value = self.weights[name]
        fits = len(shape) == value.dim() and all(
            size == wanted or (wanted is None and size)
            for size, wanted in zip(value.shape, shape, strict=True)
        )
        if not fits or not value.is_floating_point():
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            kind = str(value.dtype).removeprefix("torch.")
            raise UserError(
                f"{self.folder} does not fit the model: {name} is {tuple(value.shape)} of {kind}, wanted "
                f"({wanted}) of floating-point numbers"
            )
        return value

    def copy(self, to: Tensor, *names: str) -> None:
        """Copy the tensors `names`, one below the other, into `to`; what is wrong is kept for
        `assert_all_used`."""
        self.used.update(names)
        # what does not fit is noted, not raised: a user who has the wrong file sees all of it at once
        absent = [f"missing {name}" for name in names if name not in self.weights]
        if not absent:
            parts = [self.weights[name] for name in names]
            is_joint = len({part.shape[1:] for part in parts}) == 1 and all(part.dim() for part in parts)
            value = torch.cat(parts) if len(parts) > 1 and is_joint else parts[0]
            misfit = describe_misfit(" + ".join(names), value, to)
            if misfit is None and (is_joint or len(parts) == 1):
                to.copy_(value)
                return
            absent = [misfit or f"{' + '.join(names)} are of different shapes"]
        self.misfits += absent

    def copy_layer(self, layer: nn.Linear | nn.LayerNorm, name: str) -> None:
        """Copy `name`.weight and `name`.bias."""
        self.copy(layer.weight, f"{name}.weight")
        self.copy(layer.bias, f"{name}.bias")

    def copy_attention(self, attention: Attention, query: str, key: str, value: str, output: str) -> None:
        """Copy the four maps of these names."""
        self.copy_layer(attention.query, query)
        # ours projects keys and values at once: the weights of one below those of the other
        joint = cast(nn.Linear, attention.key_value)
        self.copy(joint.weight, f"{key}.weight", f"{value}.weight")
        self.copy(joint.bias, f"{key}.bias", f"{value}.bias")
        self.copy_layer(attention.output, output)

    def assert_all_used(self, unused: list[str]) -> None:
        """Raises UserError: tensors are missing, of another shape, or neither used nor matched by one of the
        regular expressions `unused`; all of them are listed."""
        unexpected = (
            k for k in self.weights if k not in self.used and not any(re.match(p, k) for p in unused)
        )
        require_no_misfits(self.folder, self.misfits + [f"unused {k}" for k in unexpected])


# tensors that a checkpoint may have and a model of ours does not: heads of its pretraining and its tasks
UNUSED_TEXT = [
    r"pooler\.",
    r"embeddings\.position_ids",
    r"cls\.seq_relationship\.",
    r"classifier\.",
    r"qa_outputs\.",
]
# second names of the word embedding and its bias
TIED = [r"lm_head\.decoder\.(weight|bias)", r"cls\.predictions\.decoder\.(weight|bias)"]
UNUSED_VISION = [r"pooler\.", r"classifier\."]
VISION_SIZES = {"vision_layers": "num_hidden_layers", "patch": "patch_size", "image_size": "image_size"}

log = logging.getLogger(__name__)


def text_sizes(folder: Path | str, vision: Path | str | None = None) -> dict:
    """Sizes of a unified model for an XLM-R or BERT folder: the first half of its layers text, the second
    fusion, and an image encoder like the ViT folder `vision`, or, without one, as deep as the text encoder.

    Raises:
        UserError: no config.json, or one without these sizes; a ViT of another width or other heads.
    """
    sizes = encoder_sizes(read_config(Path(folder)), folder)
    layers = sizes.pop("layers")
    sizes |= {
        "text_layers": layers // 2,
        "fusion_layers": layers - layers // 2,
        "vision_layers": layers // 2,
    }
    if vision:
        vit = read_config(Path(vision))
        read_sizes(vit, vision, list(VISION_SIZES.values()), "a ViT folder")
        vit_shape = tuple(read_sizes(vit, vision, ["hidden_size", "num_attention_heads"], "a ViT folder"))
        text_shape = (sizes["width"], sizes["heads"])
        if vit_shape != text_shape:
            raise UserError(
                f"{vision}: width and heads {vit_shape}, those of {folder} are {text_shape}; "
                "give a ViT of the same"
            )
        sizes |= {name: vit[key] for name, key in VISION_SIZES.items()}
        sizes["vision_eps"] = vit.get("layer_norm_eps", 1e-12)
    return sizes


def load_text(model: "UnifiedModel", folder: Path | str, layers: tuple[int, ...] | None = None) -> None:
    """Fill the text path of `model` from an XLM-R- or BERT-like checkpoint folder.

    Args:
        layers: of the checkpoint, from 0: one for each text layer, then one for each layer of the unified
            encoder; a layer may serve twice. None: the first ones, then the last ones.
    Raises:
        UserError: no weights in the folder; tensors missing, left over or of another shape (they are listed).

    A checkpoint without a masked-language head leaves the model's own as it is, and says so.
    """
    weights, config = read_folder(Path(folder))
    require_computed(config, folder, TEXT_COMPUTED)
    _compare_sizes(config, folder, model.config.heads, "model.heads", model.config.eps, "model.eps")
    weights = {re.sub(r"^(roberta|bert|model)\.", "", k): v for k, v in weights.items()}
    words = weights.get("embeddings.word_embeddings.weight")
    for decoder in ("lm_head.decoder.weight", "cls.predictions.decoder.weight"):
        if words is not None and decoder in weights and not torch.equal(weights[decoder], words):
            raise UserError(
                f"{folder}: {decoder} is not its word embedding (tie_word_embeddings), by which our "
                "masked-language head predicts; give a folder that ties them, or one without the head"
            )
    mapper = WeightMapper(weights, folder)
    stored = count_layers(weights, folder)
    text, fusion = len(model.text.blocks), len(model.fusion.blocks)
    blocks = text + fusion
    if layers is None:
        if stored < blocks:
            raise UserError(
                f"{folder}: {stored} layers, the model wants {blocks}; set model.text_layers and "
                "fusion_layers"
            )
        layers = (*range(text), *range(stored - fusion, stored))
    if len(layers) != blocks or not all(0 <= layer < stored for layer in layers):
        raise UserError(
            f"{folder}: layers {list(layers)} of its {stored}; {blocks} from 0 to {stored - 1} are wanted"
        )
    copy_text(mapper, model, first_position(config), layers)
    others = [rf"encoder\.layer\.{layer}\." for layer in range(stored) if layer not in layers]
    mapper.assert_all_used([*UNUSED_TEXT, *others, *TIED])


def _compare_sizes(
    config: dict, folder: Path | str, heads: int, heads_setting: str, eps: float, eps_setting: str
) -> None:
    """Compare what no tensor shows, the number of heads and the epsilon of layer norms.

    Raises:
        UserError: another number of heads.
    """
    if (found := config.get("num_attention_heads", heads)) != heads:
        raise UserError(
            f"{folder}/config.json: num_attention_heads is {found!r:.40}, the model has {heads}; set "
            f"{heads_setting}"
        )
    # a setting of the run's, which mVLP sets otherwise than the weights it starts from (paper 2)
    if (found := config.get("layer_norm_eps", eps)) != eps:
        log.warning("%s: layer_norm_eps is %s, the model's is %s (%s)", folder, found, eps, eps_setting)


def copy_text(mapper: WeightMapper, model: "UnifiedModel", first: int, layers: tuple[int, ...]) -> None:
    """The text path from tensors `embeddings.*`, `encoder.layer.N.*` and those of a masked-language head.

    Args:
        first: row of the position embeddings that a sentence starts at.
        layers: as in `load_text`; where one has a `crossattention`, that of the unified encoder is a copy of
            it, and not of its self-attention.
    """
    with torch.no_grad():
        mapper.copy(model.embedding.word.weight, "embeddings.word_embeddings.weight")
        position_table = model.embedding.position.weight
        rows = (None, position_table.shape[1])
        positions = mapper("embeddings.position_embeddings.weight", rows)[first:]
        token_type = mapper("embeddings.token_type_embeddings.weight", rows)[0]
        if len(positions) < len(position_table):
            raise UserError(
                f"{mapper.folder}: {len(positions)} positions, the model wants {len(position_table)}; "
                f"set model.positions={len(positions)}"
            )
        # every text is of type 0 here, so its vector may as well be part of the positions
        position_table.copy_(positions[: len(position_table)] + token_type)
        mapper.copy_layer(model.embedding.norm, "embeddings.LayerNorm")
        for block, layer in zip([*model.text.blocks, *model.fusion.blocks], layers, strict=True):
            copy_block(mapper, block, layer)
        _copy_masked_head(mapper, model)


def load_vision(model: "UnifiedModel", folder: Path | str) -> None:
    """Fill the image encoder of `model` from a ViT checkpoint folder, or a Swin one; position embeddings are
    interpolated (bicubic) to the model's resolution. Arguments and errors as in `load_text`."""
    # Swins are read by `transformers`, ViTs here: their position embeddings must be resized on the way
    if model.config.swin:
        _load_swin(model, folder)
        return
    weights, config = read_folder(Path(folder))
    require_computed(config, folder, VIT_COMPUTED)
    vision = cast(VisionEncoder, model.vision)
    _compare_sizes(config, folder, vision.heads, "model.heads", model.config.vision_eps, "model.vision_eps")
    if type(config.get("image_size", 0)) is not int:
        raise UserError(f"{folder}/config.json: image_size is {config['image_size']!r:.40}, no square")
    weights = {re.sub(r"^vit\.", "", k): v for k, v in weights.items()}
    patch = vision.patch
    if config.get("patch_size", patch) != patch:
        raise UserError(f"{folder}: patch {config['patch_size']}, the model wants {patch}; set model.patch")
    mapper = WeightMapper(weights, folder)
    copy_vision(mapper, model)
    mapper.assert_all_used(UNUSED_VISION)


def copy_vision(mapper: WeightMapper, model: "UnifiedModel") -> None:
    """The image encoder, a ViT, from tensors named as in `transformers`."""
    vision = cast(VisionEncoder, model.vision)
    with torch.no_grad():
        width = len(vision.cls)
        vision.cls.copy_(mapper("embeddings.cls_token", (1, 1, width)).reshape(-1))
        positions = mapper("embeddings.position_embeddings", (1, None, width))[0]
        if math.isqrt(len(positions) - 1) ** 2 != len(positions) - 1 or len(positions) < 2:
            raise UserError(f"{mapper.folder}: {len(positions)} positions, not those of a square of patches")
        vision.position.copy_(interpolate(positions, len(vision.position) - 1))
        # a convolution's kernel (d, 3, P, P) as a matrix over patches, whose pixels are (P, P, 3)
        shape = (width, 3, vision.patch, vision.patch)
        kernel = mapper("embeddings.patch_embeddings.projection.weight", shape)
        vision.patch_embedding.weight.copy_(kernel.permute(0, 2, 3, 1).reshape(len(kernel), -1))
        mapper.copy(vision.patch_embedding.bias, "embeddings.patch_embeddings.projection.bias")
        for i, block in enumerate(cast(Iterable[VisionBlock], vision.blocks)):
            at = f"encoder.layer.{i}"
            mapper.copy_layer(block.attention_norm, f"{at}.layernorm_before")
            mapper.copy_layer(block.output_norm, f"{at}.layernorm_after")
            query, key, value = (f"{at}.attention.attention.{part}" for part in ("query", "key", "value"))
            mapper.copy_attention(block.attention, query, key, value, f"{at}.attention.output.dense")
            mapper.copy_layer(block.intermediate, f"{at}.intermediate.dense")
            mapper.copy_layer(block.output, f"{at}.output.dense")
        mapper.copy_layer(vision.norm, "layernorm")


def _load_swin(model: "UnifiedModel", folder: Path | str) -> None:
    """`transformers` itself reads the folder, since it knows older names of the tensors."""
    from transformers import SwinConfig, SwinModel

    require_computed(read_config(Path(folder)), folder, SWIN_COMPUTED)
    with limit_model(Path(folder) / "config.json", folder):
        swin, report = load_by_library(
            Path(folder), SwinConfig, SwinModel, "a Swin's folder", add_pooling_layer=False
        )
    weights = {k: v for k, v in swin.state_dict().items() if k not in report["missing_keys"]}
    require_finite_file(folder, weights)
    # for `assert_all_used` to name
    unexpected = {k: torch.empty(0) for k in report["unexpected_keys"]}
    mapper = WeightMapper(weights | unexpected, folder)
    copy_swin(mapper, model)
    mapper.assert_all_used(UNUSED_VISION)


def copy_swin(mapper: WeightMapper, model: "UnifiedModel") -> None:
    """The image encoder, a Swin, from tensors named as in `transformers`; biases of relative positions are
    interpolated to the model's windows."""
    with torch.no_grad():
        for name, value in cast(SwinEncoder, model.vision).swin.state_dict().items():
            if name.endswith("relative_position_bias_table") and name in mapper.weights:
                mapper.weights[name] = interpolate_bias(mapper.weights[name], len(value))
            mapper.copy(value, name)


def copy_block(mapper: WeightMapper, block: Block, layer: int) -> None:
    """A block from the tensors `encoder.layer.LAYER.*`; its cross-attention, where the checkpoint has none,
    from that of self-attention."""
    at = f"encoder.layer.{layer}"
    # paper 2 starts cross-attention as a copy of the layer's self-attention; CCLM's file has its own
    attentions = [(block.attention, block.attention_norm, "attention")]
    if block.cross:
        cross = (
            "crossattention" if f"{at}.crossattention.self.query.weight" in mapper.weights else "attention"
        )
        attentions.append((block.cross_attention, block.cross_norm, cross))
    for attention, norm, name in attentions:
        query, key, value = (f"{at}.{name}.self.{part}" for part in ("query", "key", "value"))
        mapper.copy_attention(attention, query, key, value, f"{at}.{name}.output.dense")
        mapper.copy_layer(norm, f"{at}.{name}.output.LayerNorm")
    mapper.copy_layer(block.intermediate, f"{at}.intermediate.dense")
    mapper.copy_layer(block.output, f"{at}.output.dense")
    mapper.copy_layer(block.output_norm, f"{at}.output.LayerNorm")


def _copy_masked_head(mapper: WeightMapper, model: "UnifiedModel") -> None:
    # one head by two names: XLM-R's and BERT's
    head = model.masked_head
    if any(name.startswith("lm_head.") for name in mapper.weights):
        lm, transform, norm = "lm_head", "lm_head", "layer_norm"
    elif any(name.startswith("cls.predictions.") for name in mapper.weights):
        lm, transform, norm = "cls.predictions", "cls.predictions.transform", "LayerNorm"
    else:
        log.warning(
            "%s: no masked-language head (lm_head or cls.predictions); it stays as initialised", mapper.folder
        )
        return
    mapper.copy_layer(head.dense, f"{transform}.dense")
    mapper.copy_layer(head.norm, f"{transform}.{norm}")
    mapper.copy(head.bias, f"{lm}.bias")


def count_layers(weights: Iterable[str], folder: Path | str) -> int:
    """Return how many layers a text encoder's tensors are of, by their names.

    Raises:
        UserError: there is none.
    """
    layers = [int(m[1]) for name in weights if (m := re.match(r"encoder\.layer\.(\d{1,4})\.", name))]
    if not layers:
        raise UserError(f"{folder}: no encoder.layer.0 among its tensors; give {TEXT_FOLDER}")
    return 1 + max(layers)

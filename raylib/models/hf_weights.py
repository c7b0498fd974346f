"""Weights in Hugging Face format: XLM-R, BERT, ViT or Swin folders into a unified model (paper 2, section
4.1), and the `WeightMapper` by which every published checkpoint is read.

The first N_L text layers become the text encoder, the last N_C the unified encoder (or those that are asked
for); its cross-attention starts as a copy of the self-attention of its layer. The masked-language head comes
from `lm_head` (XLM-R) or `cls.predictions` (BERT), and stays as initialised where a checkpoint has neither.
"""

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from raylib.errors import UserError, hub_hint
from raylib.fileio import read_json_object
from raylib.finite import require_finite_file
from raylib.models.attention import Attention, Block
from raylib.models.swin import SwinEncoder, interpolate_bias
from raylib.models.vision import VisionBlock, VisionEncoder, interpolate
from raylib.weights import read_tensors

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

    def __call__(self, name: str) -> Tensor:
        self.used.add(name)
        if name not in self.weights:
            raise UserError(f"{self.folder}: tensor '{name}' is missing")
        return self.weights[name]

    def copy(self, to: Tensor, *names: str) -> None:
        """Copy the tensors `names`, one below the other, into `to`; what is wrong is kept for
        `assert_all_used`."""
        self.used.update(names)
        # what does not fit is noted, not raised: a user who has the wrong file sees all of it at once
        absent = [f"missing {name}" for name in names if name not in self.weights]
        if not absent:
            value = torch.cat([self.weights[name] for name in names])
            if value.shape == to.shape:
                to.copy_(value)
                return
            absent = [f"{' + '.join(names)} is {tuple(value.shape)}, wanted {tuple(to.shape)}"]
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
        misfits = self.misfits + [f"unused {k}" for k in unexpected]
        if misfits:
            raise UserError(f"{self.folder} does not fit the model: {'; '.join(misfits)}")


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
SIZES = {  # ours -> those of config.json
    "vocabulary": "vocab_size",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "feedforward": "intermediate_size",
    "eps": "layer_norm_eps",
}
TEXT_ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert")  # model types of text encoders
VISION_SIZES = {"vision_layers": "num_hidden_layers", "patch": "patch_size", "image_size": "image_size"}

log = logging.getLogger(__name__)


def encoder_sizes(config: dict, folder: Path | str, accepts: str = "an XLM-R or BERT folder") -> dict:
    """Our names for the sizes of a text encoder's config.json, and its "layers", "positions".

    Raises:
        UserError: it does not say them.
    """
    # other models have the same fields, and tensors by other names
    if (config.get("model_type") or "bert") not in TEXT_ENCODERS:
        raise UserError(
            f"{folder}: model_type {config['model_type']} is none of {', '.join(TEXT_ENCODERS)}; name its "
            "file: backbone=FILE.py"
        )
    if missing := _missing(config, *SIZES.values(), "num_hidden_layers", "max_position_embeddings"):
        raise UserError(f"{folder}/config.json: no {', '.join(sorted(missing))}; give {accepts}")
    return {name: config[key] for name, key in SIZES.items()} | {
        "layers": config["num_hidden_layers"],
        "positions": config["max_position_embeddings"] - first_position(config),
    }


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
        if missing := _missing(vit, *VISION_SIZES.values(), "hidden_size", "num_attention_heads"):
            raise UserError(f"{vision}/config.json: no {', '.join(sorted(missing))}; give a ViT folder")
        vit_shape, text_shape = (
            (vit["hidden_size"], vit["num_attention_heads"]),
            (sizes["width"], sizes["heads"]),
        )
        if vit_shape != text_shape:
            raise UserError(
                f"{vision}: width and heads {vit_shape}, those of {folder} are {text_shape}; "
                "give a ViT of the same"
            )
        sizes |= {name: vit[key] for name, key in VISION_SIZES.items()}
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
    weights = {re.sub(r"^(roberta|bert|model)\.", "", k): v for k, v in weights.items()}
    mapper = WeightMapper(weights, folder)
    stored = 1 + max(int(m[1]) for k in weights if (m := re.match(r"encoder\.layer\.(\d+)\.", k)))
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


def copy_text(mapper: WeightMapper, model: "UnifiedModel", first: int, layers: tuple[int, ...]) -> None:
    """The text path from tensors `embeddings.*`, `encoder.layer.N.*` and those of a masked-language head.

    Args:
        first: row of the position embeddings that a sentence starts at.
        layers: as in `load_text`; where one has a `crossattention`, that of the unified encoder is a copy of
            it, and not of its self-attention.
    """
    with torch.no_grad():
        mapper.copy(model.embedding.word.weight, "embeddings.word_embeddings.weight")
        positions = mapper("embeddings.position_embeddings.weight")[first:]
        token_type = mapper("embeddings.token_type_embeddings.weight")[0]
        position_table = model.embedding.position.weight
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
    weights = {re.sub(r"^vit\.", "", k): v for k, v in weights.items()}
    patch = model.vision.patch
    if config.get("patch_size", patch) != patch:
        raise UserError(f"{folder}: patch {config['patch_size']}, the model wants {patch}; set model.patch")
    mapper = WeightMapper(weights, folder)
    copy_vision(mapper, model)
    mapper.assert_all_used(UNUSED_VISION)


def copy_vision(mapper: WeightMapper, model: "UnifiedModel") -> None:
    """The image encoder, a ViT, from tensors named as in `transformers`."""
    vision = cast(VisionEncoder, model.vision)
    with torch.no_grad():
        vision.cls.copy_(mapper("embeddings.cls_token").view(-1))
        vision.position.copy_(
            interpolate(mapper("embeddings.position_embeddings")[0], len(vision.position) - 1)
        )
        # a convolution's kernel (d, 3, P, P) as a matrix over patches, whose pixels are (P, P, 3)
        kernel = mapper("embeddings.patch_embeddings.projection.weight")
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
    from transformers import SwinModel

    read_config(Path(folder))  # it would download what is not there
    try:
        loaded: Any = SwinModel.from_pretrained(
            folder, add_pooling_layer=False, output_loading_info=True, local_files_only=True
        )
    except (OSError, RuntimeError, ValueError) as e:
        raise UserError(f"{folder}: no Swin is read there ({' '.join(str(e).split())[:200]})") from None
    swin, report = loaded
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


def first_position(config: dict) -> int:
    """Row of the position embeddings that a sentence starts at: RoBERTa numbers positions from pad + 1."""
    if config.get("model_type") == "bert":
        return 0
    # configs of today's `transformers` write null where a number was not given
    padding = config.get("pad_token_id")
    return 2 if padding is None else padding + 1


def _missing(config: dict, *names: str) -> set[str]:
    """Those of a config.json's fields that are not there, or null."""
    return {name for name in names if config.get(name) is None}


def read_config(folder: Path) -> dict:
    """Read the config.json of a folder in Hugging Face format.

    Raises:
        UserError: there is none.
    """
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: no config.json; give a checkpoint folder in Hugging Face format{hub_hint(folder)}"
        )
    return read_json_object(folder / "config.json")


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a folder in Hugging Face format, and its config.json.

    Raises:
        UserError: no config.json, no weights, a file that is none, or a tensor that is not finite (file and
            tensor are named).
    """
    config = read_config(folder)
    # a large checkpoint lies in several files, and an index says in which
    index = next(folder.glob("*.index.json"), None)
    names = sorted(set(read_json_object(index)["weight_map"].values())) if index else None
    weights: dict[str, Tensor] = {}
    for name in names or ["model.safetensors"]:
        file = folder / name
        if not names and not file.is_file() and (folder / "pytorch_model.bin").is_file():
            file = folder / "pytorch_model.bin"
        if not file.is_file():
            raise UserError(f"{folder}: no {name}; give a checkpoint folder in Hugging Face format")
        weights |= read_tensors(file)
    return weights, config

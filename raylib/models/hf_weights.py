"""Which tensors of a checkpoint a model has taken: none may be left over, missing or of another shape
unnoticed.

Initialise a unified model from XLM-R, BERT, ViT or Swin folders in Hugging Face format (paper 2, section
4.1).

The first N_L text layers become the text encoder, the last N_C the unified encoder (or those that are asked
for); its cross-attention starts as a copy of the self-attention of its layer. The masked-language head comes
from `lm_head` (XLM-R) or `cls.predictions` (BERT), and stays as initialised where a checkpoint has neither.
Every tensor of the checkpoint is used, or is named as expected to be unused; anything else is an error that
lists it.
"""

import json
import logging
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from raylib.config import validate
from raylib.errors import UserError
from raylib.fileio import read_json
from raylib.finite import require_finite_file
from raylib.models.unified import ModelConfig, UnifiedModel
from raylib.models.vision import interpolate, interpolate_bias


class WeightMapper:
    """A checkpoint's tensors, and which of them have been used, are missing or do not fit."""

    def __init__(self, weights: dict[str, Tensor], folder):
        self.weights, self.folder = weights, folder
        self.used: set[str] = set()
        self.wrong: list[str] = []

    def __call__(self, name: str) -> Tensor:
        self.used.add(name)
        if name not in self.weights:
            raise UserError(f"{self.folder}: tensor '{name}' is missing")
        return self.weights[name]

    def copy(self, to: Tensor, *names: str) -> None:
        """Copy the tensors `names`, one below the other, into `to`; what is wrong is kept for
        `assert_all_used`."""
        self.used.update(names)
        absent = [f"missing {name}" for name in names if name not in self.weights]
        if not absent:
            value = torch.cat([self.weights[name] for name in names])
            if value.shape == to.shape:
                to.copy_(value)
                return
            absent = [f"{' + '.join(names)} is {tuple(value.shape)}, wanted {tuple(to.shape)}"]
        self.wrong += absent

    def copy_layer(self, layer: nn.Module, name: str) -> None:
        self.copy(layer.weight, f"{name}.weight")
        self.copy(layer.bias, f"{name}.bias")

    def copy_attention(self, attention: nn.Module, heads: str, output: str) -> None:
        self.copy_layer(attention.query, f"{heads}.query")
        for part in ("weight", "bias"):
            self.copy(getattr(attention.key_value, part), f"{heads}.key.{part}", f"{heads}.value.{part}")
        self.copy_layer(attention.output, output)

    def assert_all_used(self, unused: list[str]) -> None:
        left = [k for k in self.weights if k not in self.used and not any(re.match(p, k) for p in unused)]
        wrong = self.wrong + [f"unused {k}" for k in left]
        if wrong:
            raise UserError(f"{self.folder} does not fit the model: {'; '.join(wrong)}")


UNUSED_TEXT = [
    r"pooler\.",
    r"embeddings\.position_ids",
    r"cls\.seq_relationship\.",
    r"classifier\.",
    r"qa_outputs\.",
]
TIED = [r"lm_head\.decoder\.(weight|bias)", r"cls\.predictions\.decoder\.(weight|bias)"]
UNUSED_VISION = [r"pooler\.", r"classifier\."]
SIZES = {  # ours -> those of config.json
    "vocabulary": "vocab_size",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "feedforward": "intermediate_size",
    "eps": "layer_norm_eps",
}
VISION_SIZES = {"vision_layers": "num_hidden_layers", "patch": "patch_size", "image_size": "image_size"}

log = logging.getLogger(__name__)


def text_config(folder: Path | str, vision: Path | str | None = None) -> ModelConfig:
    """Sizes of a unified model for an XLM-R or BERT folder: the first half of its layers text, the second
    fusion, and an image encoder like the ViT folder `vision`, or, without one, as deep as the text encoder.

    Raises:
        UserError: no config.json, or one without these sizes; a ViT of another width or other heads.
    """
    config = _read_config(Path(folder))
    missing = {*SIZES.values(), "num_hidden_layers", "max_position_embeddings"} - config.keys()
    if missing:
        raise UserError(
            f"{folder}/config.json: no {', '.join(sorted(missing))}; give an XLM-R or BERT folder"
        )
    layers = config["num_hidden_layers"]
    sizes = {ours: config[theirs] for ours, theirs in SIZES.items()} | {
        "positions": config["max_position_embeddings"] - first_position(config),
        "text_layers": layers // 2,
        "fusion_layers": layers - layers // 2,
        "vision_layers": layers // 2,
    }
    if vision:
        seen = _read_config(Path(vision))
        if missing := {*VISION_SIZES.values(), "hidden_size", "num_attention_heads"} - seen.keys():
            raise UserError(f"{vision}/config.json: no {', '.join(sorted(missing))}; give a ViT folder")
        theirs, ours = (seen["hidden_size"], seen["num_attention_heads"]), (sizes["width"], sizes["heads"])
        if theirs != ours:
            raise UserError(
                f"{vision}: width and heads {theirs}, those of {folder} are {ours}; give a ViT of the same"
            )
        sizes |= {name: seen[their] for name, their in VISION_SIZES.items()}
    return validate(ModelConfig, sizes, f"{folder}/config.json")


def load_text(
    model: UnifiedModel,
    folder: Path | str,
    unused: tuple[str, ...] = (),
    layers: tuple[int, ...] | None = None,
) -> None:
    """Fill the text path of `model` from an XLM-R- or BERT-like checkpoint folder.

    Args:
        unused: regular expressions of further checkpoint keys that may stay unused.
        layers: of the checkpoint, from 0: one for each text layer, then one for each layer of the unified
        encoder; a layer
            may serve twice. None: the first ones, then the last ones.
    Raises:
        UserError: no weights in the folder; tensors missing, left over or of another shape (they are listed).

    A checkpoint without a masked-language head leaves the model's own as it is, and says so.
    """
    weights, config = read_folder(Path(folder))
    weights = {re.sub(r"^(roberta|bert|model)\.", "", k): v for k, v in weights.items()}
    taken = WeightMapper(weights, folder)
    there = 1 + max(int(m[1]) for k in weights if (m := re.match(r"encoder\.layer\.(\d+)\.", k)))
    layers = _choose_layers(model.config, there, folder) if layers is None else layers
    blocks = len(model.text.blocks) + len(model.fusion.blocks)
    if len(layers) != blocks or not all(0 <= layer < there for layer in layers):
        raise UserError(
            f"{folder}: layers {list(layers)} of its {there}; {blocks} from 0 to {there - 1} are wanted"
        )
    copy_text(taken, model, first_position(config), layers)
    others = [rf"encoder\.layer\.{layer}\." for layer in range(there) if layer not in layers]
    taken.assert_all_used([*UNUSED_TEXT, *others, *TIED, *unused])


def copy_text(taken: WeightMapper, model: UnifiedModel, first: int, layers: tuple[int, ...]) -> None:
    """The text path from tensors `embeddings.*`, `encoder.layer.N.*` and those of a masked-language head.

    Args:
        first: row of the position embeddings that a sentence starts at. layers: as in `load_text`; where one
            has a `crossattention`, that of the unified encoder is a copy of it, and not of its
            self-attention.
    """
    with torch.no_grad():
        taken.copy(model.embedding.word.weight, "embeddings.word_embeddings.weight")
        positions = taken("embeddings.position_embeddings.weight")[first:]
        token_type = taken("embeddings.token_type_embeddings.weight")[0]
        place = model.embedding.position.weight
        if len(positions) < len(place):
            raise UserError(
                f"{taken.folder}: {len(positions)} positions, the model wants {len(place)}; "
                f"set model.positions={len(positions)}"
            )
        place.copy_(positions[: len(place)] + token_type)
        taken.copy_layer(model.embedding.norm, "embeddings.LayerNorm")
        for block, layer in zip([*model.text.blocks, *model.fusion.blocks], layers, strict=True):
            copy_block(taken, block, layer)
        _copy_masked_head(taken, model)


def _choose_layers(config: ModelConfig, there: int, folder: Path | str) -> tuple[int, ...]:
    """The first layers of `there` for the text encoder, the last for the unified one."""
    text, fusion = config.text_layers, config.fusion_layers
    if there < text + fusion:
        raise UserError(
            f"{folder}: {there} layers, the model wants {text + fusion}; set model.text_layers and "
            "fusion_layers"
        )
    return (*range(text), *range(there - fusion, there))


def load_vision(model: UnifiedModel, folder: Path | str, unused: tuple[str, ...] = ()) -> None:
    """Fill the image encoder of `model` from a ViT checkpoint folder, or a Swin one; position embeddings are
    interpolated (bicubic) to the model's resolution. Arguments and errors as in `load_text`."""
    if model.config.swin:
        _load_swin(model, folder, unused)
        return
    weights, config = read_folder(Path(folder))
    weights = {re.sub(r"^vit\.", "", k): v for k, v in weights.items()}
    patch = model.vision.patch
    if config.get("patch_size", patch) != patch:
        raise UserError(f"{folder}: patch {config['patch_size']}, the model wants {patch}; set model.patch")
    taken = WeightMapper(weights, folder)
    copy_vision(taken, model)
    taken.assert_all_used([*UNUSED_VISION, *unused])


def copy_vision(taken: WeightMapper, model: UnifiedModel) -> None:
    """The image encoder, a ViT, from tensors named as in `transformers`."""
    vision = model.vision
    with torch.no_grad():
        vision.cls.copy_(taken("embeddings.cls_token").view(-1))
        vision.position.copy_(
            interpolate(taken("embeddings.position_embeddings")[0], len(vision.position) - 1)
        )
        kernel = taken("embeddings.patch_embeddings.projection.weight")  # (d, 3, P, P) -> (d, P, P, 3)
        vision.patch_embedding.weight.copy_(kernel.permute(0, 2, 3, 1).reshape(len(kernel), -1))
        taken.copy(vision.patch_embedding.bias, "embeddings.patch_embeddings.projection.bias")
        for i, block in enumerate(vision.blocks):
            at = f"encoder.layer.{i}"
            taken.copy_layer(block.attention_norm, f"{at}.layernorm_before")
            taken.copy_layer(block.output_norm, f"{at}.layernorm_after")
            taken.copy_attention(block.attention, f"{at}.attention.attention", f"{at}.attention.output.dense")
            taken.copy_layer(block.intermediate, f"{at}.intermediate.dense")
            taken.copy_layer(block.output, f"{at}.output.dense")
        taken.copy_layer(vision.norm, "layernorm")


def _load_swin(model: UnifiedModel, folder: Path | str, unused: tuple[str, ...]) -> None:
    """`transformers` itself reads the folder, since it knows older names of the tensors."""
    from transformers import SwinModel

    try:
        swin, report = SwinModel.from_pretrained(folder, add_pooling_layer=False, output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as e:
        raise UserError(f"{folder}: no Swin is read there ({' '.join(str(e).split())[:200]})") from None
    weights = {k: v for k, v in swin.state_dict().items() if k not in report["missing_keys"]}
    require_finite_file(folder, weights)
    left = {k: torch.empty(0) for k in report["unexpected_keys"]}  # for `assert_all_used` to name
    taken = WeightMapper(weights | left, folder)
    copy_swin(taken, model)
    taken.assert_all_used([*UNUSED_VISION, *unused])


def copy_swin(taken: WeightMapper, model: UnifiedModel) -> None:
    """The image encoder, a Swin, from tensors named as in `transformers`; biases of relative positions are
    interpolated to the model's windows."""
    with torch.no_grad():
        for name, value in model.vision.swin.state_dict().items():
            if name.endswith("relative_position_bias_table") and name in taken.weights:
                taken.weights[name] = interpolate_bias(taken.weights[name], len(value))
            taken.copy(value, name)


def load_encoders(folder: Path | str, vision: Path | str | None = None) -> UnifiedModel:
    """A unified model as large as the XLM-R or BERT folder, filled from it; its image encoder is `vision`, a
    ViT folder, or random."""
    model = UnifiedModel(text_config(folder, vision))
    load_text(model, folder)
    if vision:
        load_vision(model, vision)
    return model


def copy_block(taken: WeightMapper, block: nn.Module, layer: int) -> None:
    """A block from the tensors `encoder.layer.LAYER.*`; its cross-attention, where the checkpoint has none,
    from that of self- attention."""
    at = f"encoder.layer.{layer}"
    attentions = [(block.attention, block.attention_norm, "attention")]
    if hasattr(block, "cross_attention"):
        cross = "crossattention" if f"{at}.crossattention.self.query.weight" in taken.weights else "attention"
        attentions.append((block.cross_attention, block.cross_norm, cross))
    for attention, norm, name in attentions:
        taken.copy_attention(attention, f"{at}.{name}.self", f"{at}.{name}.output.dense")
        taken.copy_layer(norm, f"{at}.{name}.output.LayerNorm")
    taken.copy_layer(block.intermediate, f"{at}.intermediate.dense")
    taken.copy_layer(block.output, f"{at}.output.dense")
    taken.copy_layer(block.output_norm, f"{at}.output.LayerNorm")


def _copy_masked_head(taken: WeightMapper, model: UnifiedModel) -> None:
    head = model.masked_head
    if any(name.startswith("lm_head.") for name in taken.weights):
        lm, transform, norm = "lm_head", "lm_head", "layer_norm"
    elif any(name.startswith("cls.predictions.") for name in taken.weights):
        lm, transform, norm = "cls.predictions", "cls.predictions.transform", "LayerNorm"
    else:
        log.warning(
            "%s: no masked-language head (lm_head or cls.predictions); it stays as initialised", taken.folder
        )
        return
    taken.copy_layer(head.dense, f"{transform}.dense")
    taken.copy_layer(head.norm, f"{transform}.{norm}")
    taken.copy(head.bias, f"{lm}.bias")


def first_position(config: dict) -> int:
    """Row of the position embeddings that a sentence starts at: RoBERTa numbers positions from pad + 1."""
    return 0 if config.get("model_type") == "bert" else config.get("pad_token_id", 1) + 1


def _read_config(folder: Path) -> dict:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json; give a checkpoint folder in Hugging Face format")
    return read_json(folder / "config.json")


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a folder in Hugging Face format, and its config.json.

    Raises:
        UserError: no config.json, no weights, or a tensor that is not finite (file and tensor are named).
    """
    config = _read_config(folder)
    index = next(folder.glob("*.index.json"), None)
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index else None
    weights: dict[str, Tensor] = {}
    for name in names or ["model.safetensors"]:
        file = folder / name
        if not names and not file.is_file() and (folder / "pytorch_model.bin").is_file():
            file = folder / "pytorch_model.bin"
        if not file.is_file():
            raise UserError(f"{folder}: no {name}; give a checkpoint folder in Hugging Face format")
        safe = file.suffix == ".safetensors"
        part = load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
        require_finite_file(file, part)
        weights |= part
    return weights, config

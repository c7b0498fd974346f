"""Initialise a unified model from XLM-R, BERT or ViT folders in Hugging Face format (paper 2, section 4.1).

The first N_L text layers become the text encoder, the last N_C the unified encoder (or those that are asked for); its
cross-attention starts as a copy of the self-attention of its layer. The masked-language head comes from `lm_head`
(XLM-R) or `cls.predictions` (BERT), and stays as initialised where a checkpoint has neither. Every tensor of the
checkpoint is used, or is named as expected to be unused; anything else is an error that lists it.
"""

import json
import logging
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from raylib.config import build
from raylib.errors import UserError
from raylib.model.unified import ModelConfig, UnifiedModel

UNUSED_TEXT = [r"pooler\.", r"embeddings\.position_ids", r"cls\.seq_relationship\.", r"classifier\.", r"qa_outputs\."]
TIED = [r"lm_head\.decoder\.(weight|bias)", r"cls\.predictions\.decoder\.(weight|bias)"]
UNUSED_VISION = [r"pooler\.", r"classifier\."]
SIZES = {  # ours -> those of config.json
    "vocabulary": "vocab_size",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "feedforward": "intermediate_size",
    "eps": "layer_norm_eps",
}

log = logging.getLogger(__name__)


def text_config(folder: Path | str) -> ModelConfig:
    """Sizes of a unified model for an XLM-R or BERT folder: the first half of its layers text, the second fusion, and an
    image encoder as deep as the text encoder.

    Raises:
        UserError: no config.json, or one without these sizes.
    """
    config = _read_config(Path(folder))
    missing = {*SIZES.values(), "num_hidden_layers", "max_position_embeddings"} - config.keys()
    if missing:
        raise UserError(f"{folder}/config.json: no {', '.join(sorted(missing))}; give an XLM-R or BERT folder")
    layers = config["num_hidden_layers"]
    sizes = {ours: config[theirs] for ours, theirs in SIZES.items()} | {
        "positions": config["max_position_embeddings"] - _first_position(config),
        "text_layers": layers // 2,
        "fusion_layers": layers - layers // 2,
        "vision_layers": layers // 2,
    }
    return build(ModelConfig, sizes, f"{folder}/config.json")


def load_text(
    model: UnifiedModel, folder: Path | str, unused: tuple[str, ...] = (), layers: tuple[int, ...] | None = None
) -> None:
    """Fill the text path of `model` from an XLM-R- or BERT-like checkpoint folder.

    Args:
        unused: regular expressions of further checkpoint keys that may stay unused.
        layers: of the checkpoint, from 0: one for each text layer, then one for each layer of the unified encoder; a layer
            may serve twice. None: the first ones, then the last ones.
    Raises:
        UserError: no weights in the folder; tensors missing, left over or of another shape (they are listed).

    A checkpoint without a masked-language head leaves the model's own as it is, and says so.
    """
    weights, config = _read(Path(folder))
    weights = {re.sub(r"^(roberta|bert|model)\.", "", k): v for k, v in weights.items()}
    taken = _Taken(weights, folder)
    first = _first_position(config)
    with torch.no_grad():
        taken.copy(model.embedding.word.weight, "embeddings.word_embeddings.weight")
        positions = taken("embeddings.position_embeddings.weight")[first:]
        token_type = taken("embeddings.token_type_embeddings.weight")[0]
        if len(positions) < len(model.embedding.position.weight):
            raise UserError(f"{folder}: {len(positions)} positions, the model wants {len(model.embedding.position.weight)}; "
                            f"set model.positions={len(positions)}")  # fmt: skip
        model.embedding.position.weight.copy_(positions[: len(model.embedding.position.weight)] + token_type)
        taken.copy_layer(model.embedding.norm, "embeddings.LayerNorm")
        there = 1 + max(int(m[1]) for k in weights if (m := re.match(r"encoder\.layer\.(\d+)\.", k)))
        layers = _choose_layers(model.config, there, folder) if layers is None else layers
        blocks = [*model.text.blocks, *model.fusion.blocks]
        if len(layers) != len(blocks) or not all(0 <= layer < there for layer in layers):
            raise UserError(f"{folder}: layers {list(layers)} of its {there}; {len(blocks)} from 0 to {there - 1} are wanted")
        for block, layer in zip(blocks, layers, strict=True):
            _copy_block(taken, block, layer)
        _copy_masked_head(taken, model)
    others = [rf"encoder\.layer\.{layer}\." for layer in range(there) if layer not in layers]
    taken.finish([*UNUSED_TEXT, *others, *TIED, *unused])


def _choose_layers(config: ModelConfig, there: int, folder: Path | str) -> tuple[int, ...]:
    """The first layers of `there` for the text encoder, the last for the unified one."""
    text, fusion = config.text_layers, config.fusion_layers
    if there < text + fusion:
        raise UserError(f"{folder}: {there} layers, the model wants {text + fusion}; set model.text_layers and fusion_layers")
    return (*range(text), *range(there - fusion, there))


def load_vision(model: UnifiedModel, folder: Path | str, unused: tuple[str, ...] = ()) -> None:
    """Fill the image encoder of `model` from a ViT checkpoint folder; position embeddings are interpolated
    (bicubic) to the model's resolution. Arguments and errors as in `load_text`."""
    weights, config = _read(Path(folder))
    weights = {re.sub(r"^vit\.", "", k): v for k, v in weights.items()}
    taken, vision = _Taken(weights, folder), model.vision
    if config.get("patch_size", vision.patch) != vision.patch:
        raise UserError(f"{folder}: patch {config['patch_size']}, the model wants {vision.patch}; set model.patch")
    with torch.no_grad():
        vision.cls.copy_(taken("embeddings.cls_token").view(-1))
        vision.position.copy_(interpolate(taken("embeddings.position_embeddings")[0], len(vision.position) - 1))
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
    taken.finish([*UNUSED_VISION, *unused])


def interpolate(positions: Tensor, patches: int) -> Tensor:
    """Position embeddings (1 + M, d), CLS first, on a square grid -> (1 + patches, d)."""
    old, new = math.isqrt(len(positions) - 1), math.isqrt(patches)
    if old == new:
        return positions
    grid = positions[1:].T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], grid.flatten(2)[0].T])


def _copy_block(taken: "_Taken", block: nn.Module, layer: int) -> None:
    at = f"encoder.layer.{layer}"
    attentions = [(block.attention, block.attention_norm)]
    if hasattr(block, "cross_attention"):
        attentions.append((block.cross_attention, block.cross_norm))
    for attention, norm in attentions:
        taken.copy_attention(attention, f"{at}.attention.self", f"{at}.attention.output.dense")
        taken.copy_layer(norm, f"{at}.attention.output.LayerNorm")
    taken.copy_layer(block.intermediate, f"{at}.intermediate.dense")
    taken.copy_layer(block.output, f"{at}.output.dense")
    taken.copy_layer(block.output_norm, f"{at}.output.LayerNorm")


def _copy_masked_head(taken: "_Taken", model: UnifiedModel) -> None:
    head = model.masked_head
    if any(name.startswith("lm_head.") for name in taken.weights):
        lm, transform, norm = "lm_head", "lm_head", "layer_norm"
    elif any(name.startswith("cls.predictions.") for name in taken.weights):
        lm, transform, norm = "cls.predictions", "cls.predictions.transform", "LayerNorm"
    else:
        log.warning("%s: no masked-language head (lm_head or cls.predictions); it stays as initialised", taken.folder)
        return
    taken.copy_layer(head.dense, f"{transform}.dense")
    taken.copy_layer(head.norm, f"{transform}.{norm}")
    taken.copy(head.bias, f"{lm}.bias")


def _first_position(config: dict) -> int:
    """Row of the position embeddings that a sentence starts at: RoBERTa numbers positions from pad + 1."""
    return 0 if config.get("model_type") == "bert" else config.get("pad_token_id", 1) + 1


class _Taken:
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
        """Copy the tensors `names`, one below the other, into `to`; what is wrong is kept for `finish`."""
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

    def finish(self, unused: list[str]) -> None:
        left = [k for k in self.weights if k not in self.used and not any(re.match(p, k) for p in unused)]
        wrong = self.wrong + [f"unused {k}" for k in left]
        if wrong:
            raise UserError(f"{self.folder} does not fit the model: {'; '.join(wrong)}")


def _read_config(folder: Path) -> dict:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json; give a checkpoint folder in Hugging Face format")
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _read(folder: Path) -> tuple[dict[str, Tensor], dict]:
    config = _read_config(folder)
    index = next(folder.glob("*.index.json"), None)
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index else None
    weights: dict[str, Tensor] = {}
    for name in names or ["model.safetensors"]:
        if (folder / name).suffix == ".safetensors" and (folder / name).is_file():
            weights |= load_file(folder / name)
        elif not names and (folder / "pytorch_model.bin").is_file():
            weights |= torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
        elif (folder / name).is_file():
            weights |= torch.load(folder / name, map_location="cpu", weights_only=True)
        else:
            raise UserError(f"{folder}: no {name}; give a checkpoint folder in Hugging Face format")
    return weights, config

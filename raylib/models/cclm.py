"""CCLM as a backbone: the unified model with more layers of text, or with a Swin (paper 1 fine-tunes it).

It starts from a published file (`raylib.models.cclm_weights`), or from a text encoder's folder as CCLM itself
did.
"""

import json
from pathlib import Path

from raylib.config import build
from raylib.errors import UserError
from raylib.models.cclm_weights import fill, published_sizes, read_published, swin_sizes, vit_sizes
from raylib.models.hf_weights import load_text, load_vision, text_config
from raylib.models.unified import ModelConfig, UnifiedModel

IMAGENET = {  # the colours that Swins in Hugging Face folders were trained with; ViTs there: 127.5, as ours
    "pixel_mean": (255 * 0.485, 255 * 0.456, 255 * 0.406),
    "pixel_std": (255 * 0.229, 255 * 0.224, 255 * 0.225),
}


class Cclm(UnifiedModel):
    """12 text layers, 6 layers with cross-attention, a ViT: CCLM on X2-VLM."""

    kind = "cclm"


class CclmSwin(UnifiedModel):
    """6 text layers, 6 layers with cross-attention, a Swin: the first CCLM."""

    kind = "cclm_swin"


def load_cclm(path: Path, vision: Path | None) -> Cclm:
    """From a published X2-VLM CCLM file, or from an XLM-R or BERT folder: its first 12 layers, then its last
    6, which serve twice where it has fewer than 18. `vision`: a ViT folder; None: the file's own image
    encoder, or a random ViT-B/16.

    Raises:
        UserError: fewer than 12 layers; an image encoder that is no ViT; tensors missing, left over or of
            another shape.
    """
    if path.is_file():
        file = read_published(path)
        if file.is_swin and not vision:
            raise UserError(f"{path}: its image encoder is a Swin; set backbone=cclm_swin")
        model = Cclm(published_sizes(file, _vit(vision) if vision else vit_sizes(file)))
        fill(model, file, own_vision=not vision)
    else:
        own = text_config(path)
        layers = own.text_layers + own.fusion_layers
        if layers < 12:
            raise UserError(
                f"{path}: {layers} layers; give a text encoder of 12, or of 18 or more, or a published file"
            )
        seen = _vit(vision) if vision else {"vision_layers": 12, "image_size": 224}
        model = Cclm(_changed(own, path, text_layers=12, fusion_layers=6, **seen))
        load_text(model, path, layers=(*range(12), *range(layers - 6, layers)))
    if vision:
        load_vision(model, vision)
    return model


def load_cclm_swin(path: Path, vision: Path | None) -> CclmSwin:
    """From a published CCLM file, or from an XLM-R or BERT folder: every other one of 24 layers, as CCLM did,
    or all 12. `vision`: a Swin folder; None: the file's own image encoder, or a random Swin-B.

    Raises:
        UserError: another number of layers; an image encoder that is no Swin; tensors missing, left over or
            of another shape.
    """
    if path.is_file():
        file = read_published(path)
        if not file.is_swin and not vision:
            raise UserError(f"{path}: its image encoder is no Swin; set backbone=cclm, or vision=SWIN_FOLDER")
        model = CclmSwin(published_sizes(file, _swin(vision) if vision else swin_sizes(file)))
        fill(model, file, own_vision=not vision)
    else:
        own = text_config(path)
        layers = own.text_layers + own.fusion_layers
        if layers not in (12, 24):
            raise UserError(
                f"{path}: {layers} layers; give a text encoder of 24, of which every other is taken, or of 12"
            )
        seen = _swin(vision) if vision else {"swin": {}, "patch": 4, "image_size": 224, **IMAGENET}
        model = CclmSwin(_changed(own, path, text_layers=6, fusion_layers=6, **seen))
        load_text(model, path, layers=tuple(range(layers // 12 - 1, layers, layers // 12)))
    if vision:
        load_vision(model, vision)
    return model


def _changed(config: ModelConfig, path: Path, **changes) -> ModelConfig:
    return build(ModelConfig, {**config.model_dump(), **changes}, str(path))


def _vit(folder: Path) -> dict:
    """Sizes of a ViT folder."""
    layers, width, patch, size = _description(
        folder, "num_hidden_layers", "hidden_size", "patch_size", "image_size"
    )
    return {
        "vision_layers": layers,
        "vision_width": width,
        "patch": patch,
        "image_size": size,
        "pixel_mean": 127.5,
        "pixel_std": 127.5,
    }


def _swin(folder: Path) -> dict:
    """Sizes of a Swin folder.

    Raises:
        UserError: its windows are not as wide as the last stage's grid.
    """
    names = ("embed_dim", "depths", "num_heads", "patch_size", "image_size", "window_size")
    width, layers, heads, patch, size, window = _description(folder, *names)
    if window != size // (patch * 2 ** (len(layers) - 1)):
        raise UserError(
            f"{folder}/config.json: windows of {window} patches at {size} pixels; give a Swin whose windows "
            "are as wide as its last stage's grid, as 7 at 224 or 12 at 384 pixels"
        )
    return {
        "swin": {"width": width, "layers": layers, "heads": heads},
        "patch": patch,
        "image_size": size,
        **IMAGENET,
    }


def _description(folder: Path, *names: str) -> list:
    """Values of a folder's config.json."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return [config[name] for name in names]
    except (OSError, ValueError, KeyError) as e:
        raise UserError(
            f"{folder}/config.json: no {', '.join(names)} ({e}); give an image encoder's folder"
        ) from None

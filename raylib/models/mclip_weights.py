"""Both towers of Multilingual-CLIP as published, by the names of `transformers`.

    text    `transformer.*`, `LinearTransformation.*`; config.json names the text encoder (`modelBase`), whose
            own is a `base_config.json` beside it, or in the folder that is named, or in `BASES`
            M-BERT-*, Swe-CLIP-*: a BERT or DistilBERT by its own config.json; the map is a pickle beside it
    image   CLIP in Hugging Face format, or open_clip's: `visual.*`, sizes in `open_clip_config.json`

Tensors do not show heads, epsilon, activation, and where positions begin: nothing of these is guessed.
"""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from raylib.errors import UserError, reading
from raylib.fileio import read_bytes, read_json_object
from raylib.models.hf_folders import (
    OPEN_CLIP_COMPUTED,
    TEXT_ENCODERS,
    encoder_sizes,
    first_position,
    read_folder,
    read_sizes,
    require_computed,
)
from raylib.pickles import load_plain
from raylib.weights import ENDINGS, read_tensors

PUBLIC_BASE = "xlm-roberta-large"  # of a config.json without `modelBase`, as in Multilingual-CLIP's code
BASE_CONFIG = "base_config.json"
MAX_MAP = 1 << 28  # bytes of a pickled map
_XLMR = {"model_type": "xlm-roberta", "pad_token_id": 1, "layer_norm_eps": 1e-5}
_BERT = {"model_type": "bert", "layer_norm_eps": 1e-12}
_DISTIL = {"model_type": "distilbert", "activation": "gelu"}
_LARGE = {"hidden_size": 1024, "num_attention_heads": 16}
_BASE = {"hidden_size": 768, "num_attention_heads": 12}
_MINI = {"hidden_size": 384, "num_attention_heads": 12}
# text encoders of the hub, by their names without the owner, in lower case: what their config.json says
BASES: dict[str, dict[str, Any]] = {
    "xlm-roberta-large": _XLMR | _LARGE,
    "xlm-roberta-base": _XLMR | _BASE,
    "labse": _BERT | _BASE,
    "bert-base-multilingual-cased": _BERT | _BASE,
    "bert-base-multilingual-uncased": _BERT | _BASE,
    "bert-base-swedish-cased": _BERT | _BASE,
    "distilbert-base-multilingual-cased": _DISTIL | _BASE,
    "multilingual-minilm-l12-h384": _BERT | _MINI,
    "paraphrase-multilingual-minilm-l12-v2": _BERT | _MINI,
    "paraphrase-multilingual-mpnet-base-v2": _XLMR | _BASE,
}
ENCODER_FIELDS = (
    "num_attention_heads",
    "layer_norm_eps",
    "pad_token_id",
    "hidden_act",
    "position_embedding_type",
)
DISTIL_CONFIG = {  # a DistilBERT's fields -> BERT's
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
    "activation": "hidden_act",
}
DISTIL_NAMES = {  # a DistilBERT's tensors -> BERT's
    r"^transformer\.layer\.": "encoder.layer.",
    r"\.attention\.q_lin\.": ".attention.self.query.",
    r"\.attention\.k_lin\.": ".attention.self.key.",
    r"\.attention\.v_lin\.": ".attention.self.value.",
    r"\.attention\.out_lin\.": ".attention.output.dense.",
    r"\.sa_layer_norm\.": ".attention.output.LayerNorm.",
    r"\.ffn\.lin1\.": ".intermediate.dense.",
    r"\.ffn\.lin2\.": ".output.dense.",
    r"\.output_layer_norm\.": ".output.LayerNorm.",
}
OPEN_CLIP_NAMES = {  # open_clip's image tower -> the one of `transformers`
    r"^conv1\.": "embeddings.patch_embedding.",
    r"^class_embedding$": "embeddings.class_embedding",
    r"^positional_embedding$": "embeddings.position_embedding.weight",
    r"^ln_pre\.": "pre_layrnorm.",
    r"^ln_post\.": "post_layernorm.",
    r"^transformer\.resblocks\.": "encoder.layers.",
    r"\.ln_1\.": ".layer_norm1.",
    r"\.ln_2\.": ".layer_norm2.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
    r"\.attn\.out_proj\.": ".self_attn.out_proj.",
}


class TextTower(NamedTuple):
    """`weights`: BERT's names, and `LinearTransformation`. `sizes`: as of `encoder_sizes`. `first`: row of
    the position embeddings that a text starts at."""

    weights: dict[str, Tensor]
    sizes: dict[str, Any]
    first: int


def read_text_tower(path: Path) -> TextTower:
    """The text tower of a Multilingual-CLIP folder.

    Raises:
        UserError: no such folder; what the tensors do not show is not known, or is not what ours computes.
    """
    weights, described = read_folder(path)
    if "LinearTransformation.weight" in weights:
        weights = {name.removeprefix("transformer."): value for name, value in weights.items()}
        config = _base_config(path, described, weights)
    else:
        config = described
        weights = {re.sub(r"^(bert|distilbert|roberta)\.", "", k): value for k, value in weights.items()}
        weights |= _read_map(path)
    if config.get("model_type") == "distilbert":
        for pattern, name in DISTIL_NAMES.items():
            weights = {re.sub(pattern, name, key): value for key, value in weights.items()}
        known = {DISTIL_CONFIG.get(key, key): value for key, value in config.items()}
        config = {"layer_norm_eps": 1e-12, **known, "model_type": "bert"}
    return TextTower(weights, encoder_sizes(config, path), first_position(config))


def _base_config(path: Path, described: dict, weights: dict[str, Tensor]) -> dict[str, Any]:
    """The config.json of the text encoder that a folder's `modelBase` names, with sizes that tensors show.

    Raises:
        UserError: it is not to be had, or it is of an encoder of another width.
    """
    name = described.get("modelBase", PUBLIC_BASE)
    if not isinstance(name, str) or not name:
        raise UserError(f"{path}/config.json: modelBase is {name!r:.60}, no name of a text encoder")
    places = [path / BASE_CONFIG, path / name / "config.json", Path(name) / "config.json"]
    if described.get("model_type") in (*TEXT_ENCODERS, "distilbert"):
        config = described
    elif file := next((place for place in places if os.path.lexists(place)), None):
        config = read_json_object(file)
    else:
        config = BASES.get(name.rpartition("/")[2].lower(), {})
    own = {key: described[key] for key in ENCODER_FIELDS if described.get(key) is not None}
    words = weights.get("embeddings.word_embeddings.weight")
    width = words.shape[-1] if words is not None else None
    known = config.get("hidden_size", config.get("dim", width))
    if not config or (width != known and "num_attention_heads" not in own):
        few = ", ".join(list(BASES)[:3])
        what = f"is not known here, as {few} are" if not config else f"is {known} wide, this {width}"
        raise UserError(
            f"{path}/config.json: its modelBase {name!r:.60} {what}, and tensors do not show heads, epsilon "
            f"and where positions begin: put that model's config.json beside it, as {BASE_CONFIG}"
        )
    return {**config, **_shown_sizes(weights), **own}


def _shown_sizes(weights: dict[str, Tensor]) -> dict[str, int]:
    """Sizes of an encoder that its tensors show, by BERT's names."""
    shown = {
        "vocab_size": ("embeddings.word_embeddings.weight", 0),
        "hidden_size": ("embeddings.word_embeddings.weight", -1),
        "max_position_embeddings": ("embeddings.position_embeddings.weight", 0),
    }
    layers = {m[1] for k in weights if (m := re.match(r"(?:encoder|transformer)\.layer\.(\d{1,4})\.", k))}
    inner = [k for k in weights if re.search(r"layer\.0\.(intermediate\.dense|ffn\.lin1)\.bias$", k)]
    if inner:
        shown["intermediate_size"] = (inner[0], 0)
    sizes = {
        key: weights[name].shape[at] for key, (name, at) in shown.items() if weights.get(name) is not None
    }
    return sizes | {"num_hidden_layers": len(layers)}


def _read_map(path: Path) -> dict[str, Tensor]:
    """The linear map of an older folder, which a pickle beside it holds: its matrix (width, e), its bias.

    Raises:
        UserError: no pickle, several, or one that holds something else.
    """
    files = sorted(path.glob("*.pkl"))
    if len(files) != 1:
        raise UserError(
            f"{path}: no LinearTransformation among its tensors, and {len(files)} files .pkl beside them; "
            "put the pickle of its linear map there (legacy_get-weights.sh of Multilingual-CLIP)"
        )
    what = f"{files[0]}: a pickled linear map"
    with reading(files[0], "a pickled linear map"):
        data = read_bytes(files[0], MAX_MAP)
    value = load_plain(data, what)
    with reading(what, "a list of a matrix and a vector"):
        matrix, bias = (np.asarray(part, np.float32) for part in value)
        if matrix.ndim != 2 or bias.shape != matrix.shape[1:] or not matrix.size:
            raise ValueError(f"arrays of shapes {matrix.shape} and {bias.shape}")
        if not (np.isfinite(matrix).all() and np.isfinite(bias).all()):
            raise ValueError("numbers that are not finite")
    return {
        "LinearTransformation.weight": torch.from_numpy(matrix.T.copy()),
        "LinearTransformation.bias": torch.from_numpy(bias.copy()),
    }


def read_image_tower(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A CLIP folder's image tower: its sizes, as CLIPVisionConfig has them, and its tensors.

    Raises:
        UserError: no such folder, or an image tower that is no vision transformer of CLIP.
    """
    if os.path.lexists(folder / "open_clip_config.json"):
        return _read_open_clip(folder)
    is_bare = folder.is_dir() and not (folder / "config.json").is_file()
    if is_bare and any(file.name.startswith("open_clip") for file in folder.iterdir()):
        raise UserError(f"{folder}: no open_clip_config.json, which says how many heads; put it there")
    weights, described = read_folder(folder)
    if described.get("model_type") not in ("clip", "clip_vision_model"):
        raise UserError(
            f"{folder}: its config.json is of '{described.get('model_type')}', not of clip; give a CLIP "
            "folder"
        )
    sizes = described.get("vision_config", described)
    with reading(folder / "config.json", "sizes of CLIP"):
        # 512: CLIP's, if its config.json says nothing
        width = described.get("projection_dim", sizes.get("projection_dim", 512))
    # a folder of CLIP holds both towers, one of its image tower alone has the same names
    parts = ("vision_model.", "visual_projection.")
    weights = {name: value for name, value in weights.items() if name.startswith(parts)}
    weights.pop("vision_model.embeddings.position_ids", None)
    return {**sizes, "projection_dim": width}, weights


def _read_open_clip(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The image tower of an open_clip folder; arguments and errors as of `read_image_tower`."""
    name = "open_clip_config.json"
    described = read_json_object(folder / name)
    with reading(folder / name, "a model of open_clip"):
        model = described.get("model_cfg", described)
        vision, activation = model["vision_cfg"], "quick_gelu" if model.get("quick_gelu") else "gelu"
        unknown = {key: vision[key] for key in vision if key not in OPEN_CLIP_SIZES}
    if isinstance(vision.get("layers"), list):
        raise UserError(
            f"{folder}/{name}: its image tower is a ResNet; give a CLIP with a vision transformer"
        )
    require_computed(unknown, folder, {key: OPEN_CLIP_COMPUTED.get(key, ()) for key in unknown}, name)
    fields = {"head_width": 64, "mlp_ratio": 4, **vision}
    accepts = "an open_clip folder with a vision transformer"
    layers, width, head, patch, size = read_sizes(
        fields, folder, ["layers", "width", "head_width", "patch_size", "image_size"], accepts
    )
    sizes = {
        "hidden_size": width,
        "intermediate_size": int(width * fields["mlp_ratio"]),
        "num_hidden_layers": layers,
        "num_attention_heads": width // head,
        "patch_size": patch,
        "image_size": size,
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
        "projection_dim": read_sizes(model, folder, ["embed_dim"], accepts)[0],
    }
    files = sorted(file for file in folder.iterdir() if file.suffix in ENDINGS)
    if len({file.stem for file in files}) != 1:
        raise UserError(
            f"{folder}: {len(files)} files of weights; give a folder with one ({', '.join(ENDINGS)})"
        )
    # the same in two formats: safetensors come last
    weights = {
        name.removeprefix("module.").removeprefix("visual."): value
        for name, value in read_tensors(files[-1]).items()
        if name.removeprefix("module.").startswith("visual.")
    }
    return sizes, _as_transformers(weights, files[-1])


OPEN_CLIP_SIZES = ("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout")


def _as_transformers(weights: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """open_clip's tensors of an image tower, without `visual.`, by the names of `transformers`."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name == "proj":
            found["visual_projection.weight"] = value.T.contiguous()
            continue
        for pattern, new in OPEN_CLIP_NAMES.items():
            name = re.sub(pattern, new, name)
        if m := re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", name):
            if not value.dim() or len(value) % 3:
                raise UserError(f"{file} does not fit the model: visual.{name} has no three parts")
            parts = zip("qkv", value.chunk(3), strict=True)
            found |= {f"vision_model.{m[1]}.self_attn.{part}_proj.{m[2]}": third for part, third in parts}
        else:
            found[f"vision_model.{name}"] = value
    return found

"""`oscar` from a folder in Hugging Face format. Every tensor is used, or is named as expected to be unused.

    OSCAR, OSCAR+     `bert.img_embedding`, `bert.LayerNorm` where config.json says so, and BERT's names;
                      heads are left out
    BERT, XLM-R, ...  the text's part, and the pooler if there is one; what embeds regions is new, and without
                      a layer norm, as in the public code of paper 3 (cViL), whose student starts from
                      multilingual BERT

The token type of texts becomes part of the positions (`TaggedEmbedding`). XLM-R has one type: tags are then
of the same.
"""

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from raylib.config import build
from raylib.errors import UserError
from raylib.models.hf_weights import SIZES, UNUSED_TEXT, first_position, read_folder
from raylib.models.oscar import PLACE, Oscar, OscarConfig
from raylib.models.weight_mapper import Taken

UNUSED = [*UNUSED_TEXT, r"cls\.", r"lm_head\."]
NAMES = {  # as in older folders, such as those of BERT and its multilingual sibling -> as they are today
    r"^(roberta|bert|model)\.": "",
    r"LayerNorm\.gamma$": "LayerNorm.weight",
    r"LayerNorm\.beta$": "LayerNorm.bias",
}
REGIONS = "img_embedding.weight"
POSITIONS, TYPES = "embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"


def load_oscar(path: Path | str, vision: Path | None = None) -> Oscar:
    """The model from the folder at `path`.

    Raises:
        UserError: no config.json or no weights there, or a file that holds other things than tensors; sizes
            or tensors missing, tensors left over or of another shape (they are listed).
    """
    path = Path(path)
    if vision:
        raise UserError(
            "vision= is for backbones with an image encoder; oscar sees region features, set regions= instead"
        )
    weights, described = _read(path)
    # only old folders, OSCAR's among them, do not say whose they are: BERT's
    first = first_position(described) if "model_type" in described else 0
    model = Oscar(_sizes(weights, described, first, path))
    taken = Taken(weights, path)
    with torch.no_grad():
        _fill(model, taken, first)
    taken.finish(UNUSED)
    return model


def _read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The folder's tensors, by today's names, and its config.json."""
    try:
        weights, described = read_folder(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as e:
        raise UserError(
            f"{path}: weights not read ({str(e).splitlines()[0]}); only tensors and plain values are"
        ) from None
    for pattern, name in NAMES.items():
        weights = {re.sub(pattern, name, key): value for key, value in weights.items()}
    return weights, described


def _sizes(weights: dict[str, Tensor], described: dict, first: int, path: Path) -> OscarConfig:
    """The sizes of the model in `weights`, whose texts start at row `first` of the position embeddings.

    Raises:
        UserError: config.json does not say them.
    """
    missing = {*SIZES.values(), "num_hidden_layers", "max_position_embeddings"} - described.keys()
    if missing:
        raise UserError(
            f"{path}/config.json: no {', '.join(sorted(missing))}; give an OSCAR, BERT or XLM-R folder"
        )
    sizes = {ours: described[theirs] for ours, theirs in SIZES.items()} | {
        "layers": described["num_hidden_layers"],
        "positions": described["max_position_embeddings"] - first,
        "features": None,
        "region_eps": None,
    }
    if REGIONS in weights:
        sizes["features"] = weights[REGIONS].shape[-1] - PLACE
    if described.get("use_img_layernorm"):
        sizes["region_eps"] = described.get("img_layer_norm_eps", 1e-12)
    return build(OscarConfig, sizes, f"{path}/config.json")


def _fill(model: Oscar, taken: Taken, first: int) -> None:
    embedding, types = model.embedding, taken(TYPES)
    taken.weights[POSITIONS] = taken(POSITIONS)[first:] + types[0]
    taken.weights[TYPES] = types[-1] - types[0]
    taken.copy(embedding.word.weight, "embeddings.word_embeddings.weight")
    taken.copy(embedding.position.weight, POSITIONS)
    taken.copy(embedding.tag, TYPES)
    taken.copy_layer(embedding.norm, "embeddings.LayerNorm")
    for i, block in enumerate(model.encoder.blocks):
        at = f"encoder.layer.{i}"
        taken.copy_attention(block.attention, f"{at}.attention.self", f"{at}.attention.output.dense")
        taken.copy_layer(block.attention_norm, f"{at}.attention.output.LayerNorm")
        taken.copy_layer(block.intermediate, f"{at}.intermediate.dense")
        taken.copy_layer(block.output, f"{at}.output.dense")
        taken.copy_layer(block.output_norm, f"{at}.output.LayerNorm")
    if model.regions:
        taken.copy_layer(model.regions.map, "img_embedding")
        if model.config.region_eps is not None:
            taken.copy_layer(model.regions.norm, "LayerNorm")
    if model.regions or "pooler.dense.weight" in taken.weights:
        taken.copy_layer(model.pooler, "pooler.dense")

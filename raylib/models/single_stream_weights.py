"""Single-stream models from published weights. Every tensor is used, or is named as expected to be unused.

    UC2's own     `roberta.embeddings...`, `roberta.img_embeddings...`
    M3P's own     `['model']['module.attentions...']`; in VOLTA's M3P `module.` is `bert.encoder.`
    VOLTA's       UC2, mUNITER, xUNITER and M3P's body: layer N is `bert.encoder.layer.{2N}` and `.{2N + 1}`
    XLM-R, BERT   a folder in Hugging Face format: the text's part; embeddings of regions and poolers are new

The first three are a file, or a folder with one file of weights; a `config.json` beside it may say how many
attention heads there are (the tensors do not; without it they are 64 wide, as in every published model).

Token types become part of what they are added to: a text's of its positions, a region's of the norm of its
location.
"""

import pickle
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from raylib.config import validate
from raylib.errors import UserError
from raylib.fileio import read_json
from raylib.finite import require_finite_file
from raylib.models.hf_weights import SIZES, WeightMapper, first_position, read_folder
from raylib.models.single_stream import LAYOUTS, SingleStream, SingleStreamConfig
from raylib.models.single_stream_names import UC2, Names, Type, m3p_names, part_of, text_names, volta_names

HEAD = 64  # width of an attention head in every published model
ENDINGS = (".bin", ".pt", ".pth", ".tar", ".safetensors")
HUGGING_FACE = ("model.safetensors", "pytorch_model.bin", "*.index.json")  # what its folders hold
# VOLTA has one layer norm epsilon for all, and a ReLU after UC2's pooler, which had been trained with tanh
AS_IN_VOLTA = {"uc2": {"eps": 1e-5, "activation": "relu"}}


def load_single_stream(layout: str, path: Path | str, vision: Path | None = None) -> SingleStream:
    """The model `layout` from the weights at `path`.

    Raises:
        UserError: no weights there, or of none of the formats above, or not of this layout; tensors missing,
            left over or of another shape (they are listed).
    """
    path = Path(path)
    if vision:
        raise UserError(
            f"vision= is for backbones with an image encoder; {layout} sees region features, set regions= "
            "instead"
        )
    weights, described = read_weights(path)
    weights, names, changes = _find_format(weights, layout, described, path)
    config = _sizes(weights, names, LAYOUTS[layout].model_copy(update=changes), described, path)
    model = SingleStream(config)
    taken = WeightMapper(weights, path)
    with torch.no_grad():
        _fill(model, taken, names)
    taken.assert_all_used(names.unused)
    return model


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict]:
    """A checkpoint's tensors, and what its config.json says ({} without one).

    Raises:
        UserError: no file of weights there, several, or one that holds other things or what is not finite.
    """
    folder = path if path.is_dir() else path.parent
    described = {}
    if (folder / "config.json").is_file():
        described = read_json(folder / "config.json")
    if path.is_dir() and described and any(next(path.glob(name), None) for name in HUGGING_FACE):
        return read_folder(path)[0], described
    files = [path] if path.is_file() else sorted(f for f in path.glob("*") if f.suffix in ENDINGS)
    if len(files) != 1:
        found = (
            f"{len(files)} files of weights: {', '.join(f.name for f in files)}" if files else "no weights"
        )
        raise UserError(
            f"{path}: {found}; give one file ({', '.join(ENDINGS)}), or an XLM-R or BERT folder with its "
            "config.json"
        )
    weights = _read_file(files[0])
    require_finite_file(files[0], weights)
    return weights, described


def _read_file(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return load_file(file)
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as e:
        raise UserError(
            f"{file}: not read ({str(e).splitlines()[0]}); only tensors and plain values are: if it is a "
            "checkpoint with other objects, save its weights alone"
        ) from None
    for key in ("model", "model_state_dict"):  # M3P's, VOLTA's checkpoints with their optimizer
        if isinstance(weights, dict) and isinstance(weights.get(key), dict):
            weights = weights[key]
    if (
        not isinstance(weights, dict)
        or not weights
        or not all(isinstance(value, Tensor) for value in weights.values())
    ):
        raise UserError(
            f"{file}: no state dict, which has names and tensors alone; save the model's weights alone"
        )
    return weights


def _find_format(
    weights: dict[str, Tensor], layout: str, described: dict, path: Path
) -> tuple[dict[str, Tensor], Names, dict]:
    """(weights, what their format calls things, what of the layout differs in it).

    Raises:
        UserError: no known format; its weights are another layout's.
    """
    if "roberta.img_embeddings.img_linear.weight" in weights:
        found, names, changes = "uc2", UC2, {}
    elif own := next(
        (p for p in ("module.", "bert.encoder.") if f"{p}attentions.0.q_lin.weight" in weights), None
    ):
        found, names, changes = "m3p", m3p_names(own), {}
    elif "bert.embeddings.image_embeddings.weight" in weights:
        found, names, changes = _volta_layout(weights), volta_names(layout), AS_IN_VOLTA.get(layout, {})
    else:
        weights = {re.sub(r"^(roberta|bert|model)\.", "", k): v for k, v in weights.items()}
        if "embeddings.word_embeddings.weight" not in weights:
            raise UserError(
                f"{path}: neither UC2's, M3P's nor VOLTA's names, nor those of an XLM-R or BERT folder "
                f"({', '.join(list(weights)[:3])}, ...)"
            )
        return weights, text_names(first_position(described)), {"features": None}
    if found != layout:
        raise UserError(f"{path}: weights of {found}; set backbone={found}")
    if layout == "m3p" and names.query.startswith("bert.encoder.layer"):
        _mend_m3p(weights)
    return weights, names, changes


def _volta_layout(weights: dict[str, Tensor]) -> str:
    """Which of VOLTA's models this is, by the token types that it has."""
    types = {name: value for name, value in weights.items() if "token_type_embeddings" in name}
    if not types:
        return "m3p"
    if "bert.embeddings.new_token_type_embeddings.weight" in types:
        return "uc2"
    return "xuniter" if len(types.get("bert.embeddings.token_type_embeddings.weight", ())) == 1 else "muniter"


def _mend_m3p(weights: dict[str, Tensor]) -> None:
    """VOLTA's map of M3P (`m3p.json`) sends the last layer's attention output, its weight alone, to
    `layer.11`, not 22."""
    name = "bert.encoder.layer.{}.attention_output.dense.weight"
    last = (
        sum(
            bool(re.fullmatch(r"bert\.encoder\.layer\.\d+\.attention_self\.query\.weight", key))
            for key in weights
        )
        - 1
    )
    if name.format(2 * last) not in weights and name.format(last) in weights:
        weights[name.format(2 * last)] = weights.pop(name.format(last))


def _sizes(
    weights: dict[str, Tensor], names: Names, base: SingleStreamConfig, described: dict, path: Path
) -> SingleStreamConfig:
    """The sizes of the model in `weights`."""
    if not names.feature:
        missing = {*SIZES.values(), "num_hidden_layers", "max_position_embeddings"} - described.keys()
        if missing:
            raise UserError(
                f"{path}/config.json: no {', '.join(sorted(missing))}; give an XLM-R or BERT folder"
            )
        sizes = {ours: described[theirs] for ours, theirs in SIZES.items()} | {
            "layers": described["num_hidden_layers"],
            "positions": described["max_position_embeddings"] - names.first,
            "embedding_eps": described["layer_norm_eps"],
            "pooled": None,
        }
        return validate(SingleStreamConfig, {**base.model_dump(), **sizes}, f"{path}/config.json")

    def shape(name: str) -> tuple[int, ...]:
        if f"{name}.weight" not in weights:
            raise UserError(f"{path} does not fit the model: missing {name}.weight")
        return weights[f"{name}.weight"].shape

    vocabulary, width = shape(names.word)
    pattern = re.escape(names.query).replace(r"\{i\}", r"(\d+)").replace(r"\{a\}", r"(\d+)") + r"\.weight"
    layers = sum(bool(re.fullmatch(pattern, key)) for key in weights)
    heads = described.get("num_attention_heads", described.get("n_heads"))
    if heads is None and width % HEAD:
        raise UserError(
            f"{path}: how many attention heads? put a config.json with num_attention_heads beside it"
        )
    sizes = {
        "vocabulary": vocabulary,
        "width": width,
        "heads": heads or width // HEAD,
        "layers": layers,
        "feedforward": shape(part_of(names.intermediate, 0))[0],
        "features": shape(names.feature)[1],
        "positions": shape(names.position)[0] - names.first,
        "pooled": shape(names.pooler)[0],
    }
    return validate(SingleStreamConfig, {**base.model_dump(), **sizes}, str(path))


def _fill(model: SingleStream, taken: WeightMapper, names: Names) -> None:
    embedding, regions = model.embedding, model.regions
    taken.copy(embedding.word.weight, f"{names.word}.weight")
    positions = taken(f"{names.position}.weight")[names.first :]
    embedding.position.weight.copy_(positions + _type_vector(taken, names.text_type))
    taken.copy_layer(embedding.norm, names.norm)
    for i, block in enumerate(model.encoder.blocks):
        _fill_block(block, taken, names, i)
    if not names.feature:
        return
    taken.copy_layer(regions.feature, names.feature)
    taken.copy_layer(regions.location, names.location)
    if model.config.part_norms:
        taken.copy_layer(regions.feature_norm, names.feature_norm)
        taken.copy_layer(regions.location_norm, names.location_norm)
        regions.location_norm.bias += _type_vector(taken, names.region_type)
    taken.copy_layer(regions.norm, names.region_norm)
    taken.copy_layer(model.pooler, names.pooler)
    if names.region_pooler:
        taken.copy_layer(model.region_pooler, names.region_pooler)


def _fill_block(block: nn.Module, taken: WeightMapper, names: Names, i: int) -> None:
    attention = block.attention
    taken.copy_layer(attention.query, part_of(names.query, i))
    for part in ("weight", "bias"):
        both = [f"{part_of(name, i)}.{part}" for name in (names.key, names.value)]
        taken.copy(getattr(attention.key_value, part), *both)
    taken.copy_layer(attention.output, part_of(names.attended, i))
    taken.copy_layer(block.attention_norm, part_of(names.attention_norm, i))
    taken.copy_layer(block.intermediate, part_of(names.intermediate, i))
    taken.copy_layer(block.output, part_of(names.output, i))
    taken.copy_layer(block.output_norm, part_of(names.output_norm, i))


def _type_vector(taken: WeightMapper, kind: Type | None) -> Tensor | float:
    return taken(f"{kind.name}.weight")[kind.row] if kind else 0.0

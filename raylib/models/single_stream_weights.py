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

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from raylib.errors import UserError, hub_hint
from raylib.fileio import read_json_object
from raylib.models.attention import Block
from raylib.models.hf_folders import (
    EXACT_GELU,
    WEIGHT_FILES,
    encoder_sizes,
    first_position,
    read_folder,
    require_computed,
)
from raylib.models.hf_weights import WeightMapper
from raylib.models.single_stream_names import (
    UC2_NAMES,
    Names,
    Type,
    layer_part_name,
    m3p_names,
    text_names,
    volta_names,
)
from raylib.weights import ENDINGS, read_tensors

if TYPE_CHECKING:  # it imports this file
    from raylib.models.single_stream import SingleStream


HEAD_WIDTH = 64  # width of an attention head in every published model
# VOLTA has one layer norm epsilon for all, and a ReLU after UC2's pooler, which had been trained with tanh
AS_IN_VOLTA: dict[str, dict[str, Any]] = {"uc2": {"eps": 1e-5, "activation": "relu"}}
# fields that change what is computed, of config.json files beside the weights, in VOLTA's spelling too
COMPUTED: dict[str, tuple] = {
    "hidden_act": EXACT_GELU,
    "v_hidden_act": EXACT_GELU,
    "position_embedding_type": ("absolute",),
    "quantization_config": (),
    "gelu_activation": (True,),
    "sinusoidal_embeddings": (False,),
}


class SingleStreamWeights(NamedTuple):
    """A checkpoint of a layout: what its tensors say of the layout's sizes, `where` they come from, and the
    way of the tensors into a model of these sizes."""

    sizes: dict[str, Any]
    where: str
    mapper: WeightMapper
    names: Names

    def fill(self, model: "SingleStream") -> None:
        """Raises UserError: tensors missing, left over or of another shape (they are listed)."""
        with torch.no_grad():
            _fill(model, self.mapper, self.names)
        self.mapper.assert_all_used(self.names.unused)


def read_single_stream(layout: str, path: Path) -> SingleStreamWeights:
    """The weights at `path` for a model of `layout`.

    Raises:
        UserError: no weights there, or of none of the formats above, or not of this layout.
    """
    weights, description = read_checkpoint(path)
    weights, names, changes = _find_format(weights, layout, description, path)
    # a checkpoint of regions says everything by its tensors, a text encoder's by its config.json
    if names.feature:
        require_computed(description, path if path.is_dir() else path.parent, COMPUTED)
        sizes, where = _sizes_of_tensors(weights, names, description, path), str(path)
    else:
        sizes, where = encoder_sizes(description, path), f"{path}/config.json"
        sizes |= {"embedding_eps": sizes["eps"], "pooled": None}
    return SingleStreamWeights({**changes, **sizes}, where, WeightMapper(weights, path), names)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict]:
    """A checkpoint's tensors, and what its config.json says ({} without one).

    Raises:
        UserError: no file of weights there, several, or one that holds other things or what is not finite.
    """
    # a file of weights may have its config.json beside it: heads cannot be read off the tensors
    folder = path if path.is_dir() else path.parent
    description = {}
    if (folder / "config.json").is_file():
        description = read_json_object(folder / "config.json")
    if path.is_dir() and description and any((path / name).is_file() for name in WEIGHT_FILES):
        return read_folder(path)[0], description
    files = [path] if path.is_file() else sorted(f for f in path.glob("*") if f.suffix in ENDINGS)
    if len(files) != 1:
        found = (
            f"{len(files)} files of weights: {', '.join(f.name for f in files)}" if files else "no weights"
        )
        raise UserError(
            f"{path}: {found}; give one file ({', '.join(ENDINGS)}), or an XLM-R or BERT folder with its "
            f"config.json{hub_hint(path)}"
        )
    return read_tensors(files[0]), description


def _find_format(
    weights: dict[str, Tensor], layout: str, description: dict, path: Path
) -> tuple[dict[str, Tensor], Names, dict]:
    """(weights, what their format calls things, what of the layout differs in it).

    Raises:
        UserError: no known format; its weights are another layout's.
    """
    # each format is known by a tensor that no other has
    changes: dict[str, Any] = {}
    # of a config.json beside the weights: in VOLTA's code it is that of all layer norms, in UC2's of those
    # before the stack; M3P's code has constants
    eps = description.get("layer_norm_eps")
    if "roberta.img_embeddings.img_linear.weight" in weights:
        found, names = "uc2", UC2_NAMES
        changes = {"embedding_eps": eps} if eps is not None else {}
    elif prefix := next(
        (p for p in ("module.", "bert.encoder.") if f"{p}attentions.0.q_lin.weight" in weights), None
    ):
        found, names = "m3p", m3p_names(prefix)
    elif "bert.embeddings.image_embeddings.weight" in weights:
        found, names, changes = _volta_layout(weights), volta_names(layout), AS_IN_VOLTA.get(layout, {})
        changes = changes | ({"eps": eps, "embedding_eps": eps} if eps is not None else {})
    else:
        weights = {re.sub(r"^(roberta|bert|model)\.", "", k): v for k, v in weights.items()}
        if "embeddings.word_embeddings.weight" not in weights:
            raise UserError(
                f"{path}: neither UC2's, M3P's nor VOLTA's names, nor those of an XLM-R or BERT folder "
                f"({', '.join(list(weights)[:3])}, ...)"
            )
        return weights, text_names(first_position(description)), {"features": None}
    if found != layout:
        raise UserError(f"{path}: weights of {found}; set backbone={found}")
    if layout == "m3p" and names.query.startswith("bert.encoder.layer"):
        _mend_m3p(weights)
    return weights, names, changes


def _volta_layout(weights: dict[str, Tensor]) -> str:
    """Tell VOLTA's models apart by the token types that they have."""
    # UC2 has types of its own name, M3P has none, and BERT, in mUNITER, two where XLM-R, in xUNITER, has one
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


def _sizes_of_tensors(
    weights: dict[str, Tensor], names: Names, description: dict[str, Any], path: Path
) -> dict[str, Any]:
    """The sizes of the model in `weights`, but for those that a layout says."""

    mapper = WeightMapper(weights, path)

    def shape(name: str) -> tuple[int, ...]:
        return mapper(f"{name}.weight").shape

    vocabulary, width = shape(names.word)
    # layers are counted by their query maps; VOLTA numbers attention and feed-forward apart, so by no number
    pattern = re.escape(names.query).replace(r"\{i\}", r"(\d+)").replace(r"\{a\}", r"(\d+)") + r"\.weight"
    layers = sum(bool(re.fullmatch(pattern, key)) for key in weights)
    heads = description.get("num_attention_heads", description.get("n_heads"))
    if heads is None and width % HEAD_WIDTH:
        raise UserError(
            f"{path}: how many attention heads? put a config.json with num_attention_heads beside it"
        )
    return {
        "vocabulary": vocabulary,
        "width": width,
        "heads": heads or width // HEAD_WIDTH,
        "layers": layers,
        "feedforward": shape(layer_part_name(names.intermediate, 0))[0],
        "features": shape(names.feature)[1],
        "positions": shape(names.position)[0] - names.first,
        "pooled": shape(names.pooler)[0],
    }


def _fill(model: "SingleStream", mapper: WeightMapper, names: Names) -> None:
    embedding, regions = model.embedding, model.regions
    mapper.copy(embedding.word.weight, f"{names.word}.weight")
    # Token types are constants: a text's goes into its positions, a region's into the bias of the norm after
    # which it would be added. Nothing is looked up for them any more.
    width = model.config.width
    rows = (len(embedding.position.weight) + names.first, width)
    positions = mapper(f"{names.position}.weight", rows)[names.first :]
    embedding.position.weight.copy_(positions + _type_vector(mapper, names.text_type, width))
    mapper.copy_layer(embedding.norm, names.norm)
    for i, block in enumerate(model.encoder.blocks):
        _fill_block(block, mapper, names, i)
    if not names.feature:  # a text encoder: regions and poolers stay new
        return
    assert regions is not None
    mapper.copy_layer(regions.feature, names.feature)
    mapper.copy_layer(regions.location, names.location)
    if model.config.part_norms:
        mapper.copy_layer(regions.feature_norm, names.feature_norm)
        mapper.copy_layer(regions.location_norm, names.location_norm)
        regions.location_norm.bias.add_(_type_vector(mapper, names.region_type, width))
    mapper.copy_layer(regions.norm, names.region_norm)
    mapper.copy_layer(model.pooler, names.pooler)
    if names.region_pooler:
        mapper.copy_layer(model.region_pooler, names.region_pooler)


def _fill_block(block: Block, mapper: WeightMapper, names: Names, i: int) -> None:
    parts = (layer_part_name(name, i) for name in (names.query, names.key, names.value, names.attended))
    mapper.copy_attention(block.attention, *parts)
    mapper.copy_layer(block.attention_norm, layer_part_name(names.attention_norm, i))
    mapper.copy_layer(block.intermediate, layer_part_name(names.intermediate, i))
    mapper.copy_layer(block.output, layer_part_name(names.output, i))
    mapper.copy_layer(block.output_norm, layer_part_name(names.output_norm, i))


def _type_vector(mapper: WeightMapper, kind: Type | None, width: int) -> Tensor | float:
    if kind is None:
        return 0.0
    types = mapper(f"{kind.name}.weight", (None, width))
    if not -len(types) <= kind.row < len(types):
        raise UserError(
            f"{mapper.folder}: {kind.name}.weight has {len(types)} rows, row {kind.row} is wanted"
        )
    return types[kind.row]

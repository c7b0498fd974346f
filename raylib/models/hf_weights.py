"""Weights in Hugging Face format: XLM-R, BERT, ViT or Swin folders into a unified model (paper 2, section
4.1), and the `WeightMapper` by which every published checkpoint is read.

The first N_L text layers become the text encoder, the last N_C the unified encoder (or those that are asked
for); its cross-attention starts as a copy of the self-attention of its layer. The masked-language head comes
from `lm_head` (XLM-R) or `cls.predictions` (BERT), and stays as initialised where a checkpoint has neither.
"""

import logging
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from raylib.errors import UserError, hub_hint, reading
from raylib.fileio import read_json_object
from raylib.finite import require_finite_file
from raylib.models.attention import Attention, Block
from raylib.models.swin import SwinEncoder, interpolate_bias
from raylib.models.vision import VisionBlock, VisionEncoder, interpolate
from raylib.weights import describe_misfit, limit_model, read_tensors, require_no_misfits

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
MAX_SIZE = 1 << 24  # of a model, in any dimension
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

TEXT_FOLDER = "an XLM-R or BERT folder"

log = logging.getLogger(__name__)


def read_sizes(
    config: dict, folder: Path | str, names: Sequence[str], accepts: str, *lists: str
) -> list[int]:
    """Return the whole numbers of these names in a folder's config.json, which has `lists` too.

    Raises:
        UserError: it does not say them, or something else; says what to give.
    """
    if missing := _missing(config, *names, *lists):
        raise UserError(f"{folder}/config.json: no {', '.join(sorted(missing))}; give {accepts}")
    for name in names:
        if type(config[name]) is not int or not 0 < config[name] <= MAX_SIZE:
            raise UserError(
                f"{folder}/config.json: {name} is {config[name]!r:.40}, where a whole number from 1 to "
                f"{MAX_SIZE:,} is wanted; give {accepts}"
            )
    return [config[name] for name in names]


def encoder_sizes(config: dict, folder: Path | str, accepts: str = TEXT_FOLDER) -> dict:
    """Our names for the sizes of a text encoder's config.json, and its "layers", "positions".

    Raises:
        UserError: it does not say them.
    """
    # other models have the same fields, and tensors by other names
    if (config.get("model_type") or "bert") not in TEXT_ENCODERS:
        raise UserError(
            f"{folder}: model_type {config['model_type']!r:.40} is none of {', '.join(TEXT_ENCODERS)}; name "
            "its file: backbone=FILE.py"
        )
    counts = [key for name, key in SIZES.items() if name != "eps"]
    read_sizes(config, folder, [*counts, "num_hidden_layers", "max_position_embeddings"], accepts)
    if missing := _missing(config, SIZES["eps"]):
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
        read_sizes(vit, vision, list(VISION_SIZES.values()), "a ViT folder")
        vit_shape = tuple(read_sizes(vit, vision, ["hidden_size", "num_attention_heads"], "a ViT folder"))
        text_shape = (sizes["width"], sizes["heads"])
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


@contextmanager
def library_output_off() -> Iterator[None]:
    """Keep `transformers` in the block from printing: tables of what does not fit, warnings, bars."""
    from transformers.utils import logging as output

    level, has_bars = output.get_verbosity(), output.is_progress_bar_enabled()
    output.set_verbosity(output.CRITICAL)
    output.disable_progress_bar()
    try:
        yield
    finally:
        output.set_verbosity(level)
        if has_bars:
            output.enable_progress_bar()


def load_by_library(
    folder: Path, config_class: Any, model_class: Any, what: str, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Make a model of `transformers` from a folder: its class reads names that earlier versions had.

    Its weights are read here. `transformers` would look in the folder for files of its own: another one's
    weights, an adapter, a checkpoint of several processes, each with readers that are not as careful.

    Args:
        config_class, model_class: `transformers`' own, `Auto...` too. options: of the model.
        what: the folder was expected to be.
    Returns:
        the model, and {"missing_keys", "unexpected_keys", ...}.
    Raises:
        UserError: what is damaged, or no such folder; a tensor of another shape.
    """
    weights, _ = read_folder(folder)
    safe = {
        "local_files_only": True,
        "trust_remote_code": False,
    }  # the folder's code is neither run nor asked about
    with reading(folder, what), library_output_off():
        config = config_class.from_pretrained(folder, **safe)
        for name in ("_attn_implementation", "_experts_implementation"):
            if "/" in str(vars(config).get(f"{name}_internal")):
                raise ValueError("its config.json asks for code of the hub's, as its attention")
        if "Auto" in model_class.__name__:
            with torch.device("meta"):  # for its class alone
                model_class = type(model_class.from_config(config, trust_remote_code=False))
        model, report = model_class.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report
            **safe,
            **options,
        )
    misfits = [
        f"{name} is {tuple(found)}, wanted {tuple(own)}" for name, found, own in report["mismatched_keys"]
    ]
    require_no_misfits(folder, sorted(misfits))
    return model, report


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


def first_position(config: dict) -> int:
    """Row of the position embeddings that a sentence starts at: RoBERTa numbers positions from pad + 1."""
    if config.get("model_type") == "bert":
        return 0
    # configs of today's `transformers` write null where a number was not given
    padding = config.get("pad_token_id")
    if padding is not None and (type(padding) is not int or not 0 <= padding < 100):
        raise UserError(f"config.json: pad_token_id is {padding!r:.40}, where a small number is wanted")
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
    index = min(folder.glob("*.index.json"), default=None)
    shards = _read_index(index) if index else {}
    weights: dict[str, Tensor] = {}
    for name in shards or ["model.safetensors"]:
        file = folder / name
        if not shards and not file.is_file() and (folder / "pytorch_model.bin").is_file():
            file = folder / "pytorch_model.bin"
        if not file.is_file():
            raise UserError(f"{folder}: no {name}; give a checkpoint folder in Hugging Face format")
        shard = read_tensors(file)
        if lacking := sorted(shards.get(name, set()) - shard.keys()):
            raise UserError(
                f"{file}: no tensor {lacking[0]}, which the index says is in it ({len(lacking)} are not); "
                "take both files from the same place"
            )
        weights |= shard
    return weights, config


def _read_index(path: Path) -> dict[str, set[str]]:
    """The files that an index of weights names, in order -> the tensors in each."""
    what = "an index of weights: an object weight_map, a file for each tensor"
    places = read_json_object(path, ("weight_map",), what)["weight_map"]
    shards: dict[str, set[str]] = {}
    with reading(path, what):
        if not isinstance(places, dict) or not places:
            raise ValueError(f"weight_map is {type(places).__name__}")
        for tensor, name in places.items():
            # a file of the folder, whatever a stranger's index says
            is_name = isinstance(name, str) and name.isprintable() and not name.startswith(".")
            if not is_name or PurePath(name).name != name:
                raise ValueError(f"{tensor} in {name!r:.60}, which is no name of a file beside it")
            shards.setdefault(name, set()).add(tensor)
    return dict(sorted(shards.items()))

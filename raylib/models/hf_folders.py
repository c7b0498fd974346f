"""Folders in Hugging Face format: their config.json, their files of weights, and what of both is ours to
compute.

A field of config.json that changes what a model computes is either followed or refused, never left unread
(`require_computed`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from raylib.errors import UserError, hub_hint, reading
from raylib.fileio import read_json_object
from raylib.weights import read_tensors, require_no_misfits

MAX_SIZE = 1 << 24  # of a model, in any dimension
SIZES = {  # ours -> those of config.json
    "vocabulary": "vocab_size",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "feedforward": "intermediate_size",
    "eps": "layer_norm_eps",
}
TEXT_ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert")  # model types of text encoders
TEXT_FOLDER = "an XLM-R or BERT folder"
# Fields that change what a model computes, with the values that ours computes; () where there is none, so
# that the field may not be there at all.
EXACT_GELU = ("gelu", "gelu_python")
TEXT_COMPUTED: dict[str, tuple] = {
    "hidden_act": EXACT_GELU,
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (),
}
VIT_COMPUTED: dict[str, tuple] = {
    "model_type": ("vit",),
    "hidden_act": EXACT_GELU,
    "qkv_bias": (True,),
    "num_channels": (3,),
    "quantization_config": (),
}
SWIN_COMPUTED: dict[str, tuple] = {
    "hidden_act": EXACT_GELU,
    "qkv_bias": (True,),
    "num_channels": (3,),
    "mlp_ratio": (4,),
    "use_absolute_embeddings": (False,),
    "layer_norm_eps": (1e-5,),
    "quantization_config": (),
}
# of open_clip's image towers, beside sizes
OPEN_CLIP_COMPUTED: dict[str, tuple] = {
    "attentional_pool": (False,),
    "no_ln_pre": (False,),
    "pos_embed_type": ("learnable",),
    "final_ln_after_pool": (False,),
    "pool_type": ("tok",),
    "output_tokens": (False,),
    "global_average_pool": (False,),
    "input_patchnorm": (False,),
    "qk_norm": (False,),
    "scaled_cosine_attn": (False,),
    "scale_heads": (False,),
    "scale_attn_inner": (False,),
    "scale_attn": (False,),
    "scale_fc": (False,),
    "timm_model_pretrained": (False,),
}
# Files of weights, in the order in which `transformers` looks for them: a whole file before an index of
# parts, safetensors before PyTorch's own.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# what a folder may hold in their place, which is named: variants, files of other frameworks
OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.ckpt*", "*.index.json")


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


def require_computed(
    config: Mapping[str, Any], folder: Path | str, accepted: Mapping[str, tuple], file: str = "config.json"
) -> None:
    """Require that fields of a folder's config.json, where they are given, have values that ours computes.

    Raises:
        UserError: one has another, so that the model would compute something else.
    """
    for name, values in accepted.items():
        value = config.get(name)
        if value is not None and value not in values:
            known = f"only {' or '.join(map(repr, values))} is" if values else "no such field is"
            raise UserError(
                f"{folder}/{file}: {name:.40} is {value!r:.60}, which changes what the model computes, and "
                f"{known} computed here; give another folder, or a backbone of your own: backbone=FILE.py"
            )


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
    require_computed(config, folder, TEXT_COMPUTED)
    counts = [key for name, key in SIZES.items() if name != "eps"]
    read_sizes(config, folder, [*counts, "num_hidden_layers", "max_position_embeddings"], accepts)
    if missing := _missing(config, SIZES["eps"]):
        raise UserError(f"{folder}/config.json: no {', '.join(sorted(missing))}; give {accepts}")
    return {name: config[key] for name, key in SIZES.items()} | {
        "layers": config["num_hidden_layers"],
        "positions": config["max_position_embeddings"] - first_position(config),
    }


def first_position(config: dict) -> int:
    """Row of the position embeddings that a sentence starts at: RoBERTa numbers positions from pad + 1."""
    # old folders do not say whose they are; BERT has two token types, RoBERTa and XLM-R one
    is_old_bert = config.get("model_type") is None and config.get("type_vocab_size") == 2
    if config.get("model_type") == "bert" or is_old_bert:
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
    file = find_weights(folder, config)
    # a large checkpoint lies in several files, and an index says in which
    shards = _read_index(file) if file.suffix == ".json" else {file.name: set()}
    if absent := [name for name in shards if not (folder / name).is_file()]:
        raise UserError(
            f"{file}: {len(absent)} of the {len(shards)} files that it names are not there: "
            f"{', '.join(absent):.200}; put them beside it{hub_hint(folder)}"
        )
    weights: dict[str, Tensor] = {}
    for name, tensors in shards.items():
        shard = read_tensors(folder / name)
        if lacking := sorted(tensors - shard.keys()):
            raise UserError(
                f"{folder / name}: no tensor {lacking[0]}, which the index says is in it ({len(lacking)} are "
                "not); take both files from the same place"
            )
        weights |= shard
    return weights, config


def find_weights(folder: Path, config: Mapping[str, Any]) -> Path:
    """The file of weights of a folder in Hugging Face format, or their index: the one that config.json names
    (`transformers_weights`), or the first of `WEIGHT_FILES`, as `transformers` chooses.

    Raises:
        UserError: there is none; what else lies there is named.
    """
    named = config.get("transformers_weights")
    if named is not None and not _is_file_name(named):
        raise UserError(f"{folder}/config.json: transformers_weights is {named!r:.60}, no file beside it")
    names = (named,) if named is not None else WEIGHT_FILES
    if found := next((folder / name for name in names if (folder / name).is_file()), None):
        return found
    others = sorted({f.name for pattern in OTHER_WEIGHTS for f in folder.glob(pattern) if f.is_file()})
    there = f"; {', '.join(others):.200} is not read: rename it, or convert it" if others else ""
    raise UserError(
        f"{folder}: no {' or '.join(name for name in names if not name.endswith('.json'))}{there}; give a "
        f"checkpoint folder in Hugging Face format{hub_hint(folder)}"
    )


def _is_file_name(name: Any) -> bool:
    """Return whether `name`, which a stranger's file says, is that of a file of the same folder."""
    is_text = isinstance(name, str) and name.isprintable() and not name.startswith(".")
    return is_text and PurePath(name).name == name


def _read_index(path: Path) -> dict[str, set[str]]:
    """The files that an index of weights names, in order -> the tensors in each."""
    what = "an index of weights: an object weight_map, a file for each tensor"
    places = read_json_object(path, ("weight_map",), what)["weight_map"]
    shards: dict[str, set[str]] = {}
    with reading(path, what):
        if not isinstance(places, dict) or not places:
            raise ValueError(f"weight_map is {type(places).__name__}")
        for tensor, name in places.items():
            if not _is_file_name(name):
                raise ValueError(f"{tensor} in {name!r:.60}, which is no name of a file beside it")
            shards.setdefault(name, set()).add(tensor)
    return dict(sorted(shards.items()))


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

"""Write the model of a run as one folder, which Polyglance reads and `transformers` too.

RUN: a pretraining or fine-tuning run, or one of its checkpoints. Models on region features are written for
Polyglance alone.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from raylib import __version__, checkpoint
from raylib.api.card import RunFacts, without_places, write_card
from raylib.api.loading import load_model
from raylib.api.model import Model
from raylib.api.source import Key, bundle
from raylib.api.tokenizer_json import NotConvertible, write_tokenizer
from raylib.errors import UserError
from raylib.fileio import atomic_folder, read_json_object, write_json
from raylib.models import find_model, stored_code
from raylib.models.base import (
    CODE_KEY,
    DESCRIPTION_KEY,
    RUN_KEY,
    RegionBackbone,
    RetrievalBackbone,
    read_description,
    read_weights,
)
from raylib.models.finetuned import FinetuneModel, find_evaluated, find_run, is_foreign
from raylib.settings import PRECISION
from raylib.text import HIDDEN

WRAPPERS = "raylib.api.huggingface"
CODE = "modeling_polyglance"
# of a run's settings, what a model needs to read texts and images as the run did
READING = (
    "task",
    "setting",
    "length",
    "text_normalization",
    "training_words",
    "max_regions",
    "loss",
    "use_itm_head",
    "languages",
    "max_pixels",
)
PROMPTS = ("soft_prompt", "hard_prompt")


def export_model(
    run: Path | str,
    to: Path | str,
    language: str | None = None,
    license_name: str | None = None,
    float16: bool = False,
) -> str | None:
    """Write the model of `run`, or of one of its checkpoints, into the new folder `to`, whole or not at all.

    float16: store weights in half of the bytes; whoever reads them has float32 again.
    Returns:
        Why `transformers` cannot read it; None: it can.
    Raises:
        UserError: no model there, a damaged one, one with weights that are not finite or too large for
            float16, or `to` is not empty.
    """
    run, to = Path(run), Path(to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to}: not empty; give a new folder")
    if is_foreign(run) or not run.exists():
        find_model(run)  # says what is wrong with it
        raise UserError(f"{run}: no model of ours; give runs/NAME or one of its checkpoints")
    model = load_model(run, "cpu", "float32", language=language)
    source = find_evaluated(model.path)
    if (source / "meta.json").is_file():
        checkpoint.verify(source, ("config.json", "model.safetensors"))
    facts = find_facts(model, source)
    with atomic_folder(to.absolute()) as folder:
        gap, name = find_gap(model), model.tokenizer.path.name.removeprefix(HIDDEN)
        try:
            write_tokenizer(model.tokenizer, model.length, folder)
        except NotConvertible as reason:
            gap = gap or f"its tokenizer has no equal there ({reason})"
        # `AutoTokenizer` reads the one that was written, or none: another of a name that it knows gives other
        # ids
        hidden = (folder / name).exists() or not (folder / "tokenizer.json").exists()
        shutil.copy2(model.tokenizer.path, folder / (f"{HIDDEN}{name}" if hidden else name))
        for code in stored_code(source):
            shutil.copy2(code, folder / code.name)
        metadata = {"format": "pt", "polyglance": __version__, **_identity(model, facts)}
        weights = read_weights(source)
        save_file(halve(weights, source) if float16 else weights, folder / "model.safetensors", metadata)
        (folder / "model.safetensors").chmod(0o644)
        description = describe(model, source)
        if gap is None:
            write_json(folder / "preprocessor_config.json", image_settings(model))
            (folder / f"{CODE}.py").write_text(modeling_code(model, source), encoding="utf-8")
            description = {**hub_config(model), DESCRIPTION_KEY: description}
        write_json(folder / "config.json", {**description, RUN_KEY: reading_settings(facts.settings)})
        write_card(folder, model, facts, gap, license_name)
    return gap


def halve(weights: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Return float32 weights as float16, which has 3 bits more than bfloat16 for what weights are.

    Raises:
        UserError: one is beyond its range.
    """
    halved = {name: x.half() if x.dtype == torch.float32 else x for name, x in weights.items()}
    for name, x in halved.items():
        if not x.isfinite().all():
            raise UserError(f"{source}: {name} is beyond the range of float16; leave out --float16")
    return halved


def find_gap(model: Model) -> str | None:
    """Say why `transformers` cannot read a model; None: it can."""
    network = model.network
    if isinstance(network, FinetuneModel):
        if network.regions is not None or isinstance(network.backbone, RegionBackbone):
            return "it reads region features of a detector, for which there is no processor"
        return None
    if isinstance(network, RegionBackbone):
        return "it reads region features of a detector, for which there is no processor"
    return (
        None
        if isinstance(network, RetrievalBackbone)
        else "it embeds no images and texts, and has no classes"
    )


def find_facts(model: Model, source: Path) -> RunFacts:
    """Read the records of the run that the model in `source` is of."""
    meta = checkpoint.read_meta(source) if os.path.lexists(source / "meta.json") else {}
    parameters = sum(p.numel() for p in model.network.parameters())
    run = find_run(model.path, source)
    if run is None:
        return RunFacts({}, {}, meta.get("step"), parameters)
    part = (run / "part.json").is_file() and not (run / "result.json").is_file()
    path = (run.parent if part else run) / "result.json"
    # a result is that of the checkpoint that was evaluated, and of no other
    result = read_json_object(path) if os.path.lexists(path) and find_evaluated(run) == source else {}
    if result.get("finished") is False or "dev" in result:
        result = {}
    if part and result:
        result = _of_language(result, run.name)
    settings = read_description(run)
    if part:
        settings["name"] = f"{run.parent.name}_{run.name}"
    return RunFacts(without_places(settings), without_places(result), meta.get("step"), parameters)


def _of_language(result: dict[str, Any], code: str) -> dict[str, Any]:
    """The part of a result that is about the model for one language."""
    kept = {k: {c: v for c, v in result[k].items() if c == code} for k in _BY_LANGUAGE if k in result}
    return {**result, **kept, "mean_targets": None, "gap": None}


_BY_LANGUAGE = ("accuracy", "retrieval", "recall_at_1", "interval", "by_type", "counts", "disparity")


def _identity(model: Model, facts: RunFacts) -> dict[str, str]:
    """Metadata of the weights' file: of what run and step they are."""
    found = {"kind": model.backbone.kind, "run": facts.settings.get("name"), "step": facts.step}
    found["config_sha256"] = facts.result.get("config_sha256")
    return {key: str(value) for key, value in found.items() if value is not None}


def describe(model: Model, source: Path) -> dict[str, Any]:
    """Describe a model as its own config.json does, by today's names."""
    description = {k: v for k, v in read_description(source).items() if k != RUN_KEY}
    if not isinstance(model.network, FinetuneModel):  # CCLM's were once stored as unified
        description["model_type"] = f"polyglance-{model.backbone.kind}"
    return description


def reading_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Of a run's settings, what says how its model reads; no place of this machine."""
    strategies = settings.get("strategies") or {}
    prompts = {name: strategies[name] for name in PROMPTS if strategies.get(name)}
    found = {name: settings[name] for name in READING if name in settings}
    if prompts:
        found["strategies"] = prompts
    if "fit" in settings:  # what it was trained, and so is evaluated, in
        found["fit"] = {name: settings["fit"][name] for name in PRECISION if name in settings["fit"]}
    if "objective" in settings:  # whether the match head was trained
        found["objective"] = {"weights": settings["objective"]["weights"]}
    return found


def hub_config(model: Model) -> dict[str, Any]:
    """The keys of config.json that `transformers` reads."""
    network, classifier = model.network, isinstance(model.network, FinetuneModel)
    name, config = ("ForClassification", "ClassifierConfig") if classifier else ("Model", "Config")
    values: dict[str, Any] = {
        "model_type": "polyglance-classifier" if classifier else "polyglance",
        "architectures": [f"Polyglance{name}"],
        "auto_map": {"AutoConfig": f"{CODE}.Polyglance{config}", "AutoModel": f"{CODE}.Polyglance{name}"},
        "dtype": str(next(network.parameters()).dtype).removeprefix("torch."),
        "hidden_size": model.backbone.width,
        "vocab_size": model.tokenizer.vocabulary,
        "pad_token_id": model.tokenizer.pad,
    }
    if isinstance(network, FinetuneModel):
        values["id2label"] = {str(i): label for i, label in enumerate(network.labels)}
        values["label2id"] = {label: i for i, label in enumerate(network.labels)}
    return values


def image_settings(model: Model) -> dict[str, Any]:
    """preprocessor_config.json."""
    backbone = model.backbone
    mean, std = (np.broadcast_to(v, 3) / 255 for v in (backbone.pixel_mean, backbone.pixel_std))
    return {
        "image_processor_type": "PolyglanceImageProcessor",
        "processor_class": "PolyglanceProcessor",
        "auto_map": {
            "AutoImageProcessor": f"{CODE}.PolyglanceImageProcessor",
            "AutoProcessor": f"{CODE}.PolyglanceProcessor",
        },
        "size": {"height": backbone.image_size, "width": backbone.image_size},
        "preparation": backbone.preprocess.model_dump(),
        "image_mean": mean.tolist(),
        "image_std": std.tolist(),
    }


def modeling_code(model: Model, source: Path) -> str:
    """The code of an export: `raylib.api.huggingface`, and what it and the backbone need of ours."""
    kind = type(model.backbone)
    module, files = kind.__module__, {}
    for path in stored_code(source):
        module, files = CODE_KEY, {CODE_KEY: path}
    backbone: Key = (module, kind.__name__)
    text = (
        "def backbone_class(config: PolyglanceConfig) -> type[Backbone]:\n"
        f'    """The class of the backbone."""\n    return {kind.__name__}\n'
    )
    needs = (backbone, (WRAPPERS, "PolyglanceConfig"), ("raylib.models.base", "Backbone"))
    names = ("Model", "ForClassification", "ImageProcessor", "Processor")
    roots = [(WRAPPERS, f"Polyglance{name}") for name in names]
    code = bundle(roots, files, {(WRAPPERS, "backbone_class"): (text, needs)})
    return (
        f'"""Polyglance {__version__}, Apache-2.0: the parts of it that this model needs, put together when '
        f'it was exported.\n\nFor `trust_remote_code=True`, where Polyglance is not installed."""\n\n{code}'
    )

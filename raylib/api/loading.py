"""`polyglance.load`: from a path to a `Model` that reads texts and images as the run did."""

from pathlib import Path
from typing import Any

import torch

from finetune.build import open_tokenizer
from finetune.config import FinetuneConfig
from finetune.formats.answers import LABELS
from finetune.strategies.base import Context
from raylib.api.model import Model
from raylib.config import find_code, load_config, validate
from raylib.errors import UserError
from raylib.launch import no_log
from raylib.models.base import RUN_KEY, Backbone, RetrievalBackbone, read_description, read_run_settings
from raylib.models.finetuned import (
    FinetuneModel,
    find_evaluated,
    find_run,
    hold_model,
    is_foreign,
    load_backbone,
    tokenizer_at,
    trained_languages,
)
from raylib.precision import set_residual
from raylib.settings import MAX_PIXELS, FitConfig, stored_fit
from raylib.text import Tokenizer


def load_model(
    path: Path | str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    language: str | None = None,
    backbone: str = "unified",
    vision: str | None = None,
    max_pixels: int | None = None,
) -> Model:
    """`polyglance.load`."""
    path = hold_model(language_part(Path(path), language))
    stored = read_description(path) if (path / "config.json").is_file() else {}
    if stored.get("setting") in ("untrained", "translate_test"):
        raise UserError(
            f"{path}: this run trained nothing; load the model that it evaluated, {stored['model']}"
        )
    network: Backbone | FinetuneModel
    if is_foreign(path):
        network, run = load_backbone(path, backbone, vision), None
    else:
        folder = find_evaluated(path)
        run = find_run(path, folder)
        if read_description(folder).get("model_type") == "polyglance-finetuned":
            network = FinetuneModel.from_pretrained(folder, "" if backbone == "unified" else backbone)
        else:
            network = load_backbone(path, backbone, vision)
    if run:
        settings = read_description(run)
        config = load_config(FinetuneConfig, run / "config.json") if "task" in settings else None
    else:  # an export has of them what says how it reads
        settings = {} if is_foreign(path) else read_run_settings(path)
        _refuse_code(settings, path / "config.json")
        config = validate(FinetuneConfig, settings, str(path / "config.json")) if "task" in settings else None
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        network.to(device).eval()
    except (RuntimeError, AssertionError) as error:  # no such device, or a PyTorch without it
        raise UserError(f"device={device}: {str(error).strip().partition(chr(10))[0]}") from None
    tokenizer = Tokenizer.load(tokenizer_at(path))
    if config:
        tokenizer = open_tokenizer(config, tokenizer_at(path))
        tokenizer = _with_prompts(config, tokenizer, network)
    capabilities = _capabilities(path, network, config, settings)
    fit = config.fit if config else stored_fit(settings, run or path)
    set_residual(network, fit.residual if fit else None)
    bf16 = _is_bf16(dtype, fit, torch.device(device))
    loaded = Model(path, network, tokenizer, config, capabilities, bf16)
    # as the run read images, a pretraining's too
    data = settings.get("data")
    own_limit = data.get("max_pixels", MAX_PIXELS) if isinstance(data, dict) else MAX_PIXELS
    loaded.max_pixels = max_pixels or (config.max_pixels if config else own_limit)
    return loaded


def language_part(path: Path, language: str | None) -> Path:
    """The folder of the model for `language` in a run that trained one for each.

    Raises:
        UserError: the run has none, or no one said which.
    """
    parts = trained_languages(path)
    if language is None and parts:
        raise UserError(f"{path} has a model for each language: give language=, one of {', '.join(parts)}")
    if language is None:
        return path
    if language not in parts:
        has = f"it has {', '.join(parts)}" if parts else "it has one model for all languages"
        raise UserError(f"{path} has no model for language={language}: {has}")
    return path / language


def _with_prompts(config: FinetuneConfig, tokenizer: Tokenizer, network: Any) -> Tokenizer:
    """The tokenizer with the prompts that the run trained with: strategies of users are asked too, since they
    alone know."""
    labels = network.labels if isinstance(network, FinetuneModel) else ()
    cache = Path(config.runs).absolute() / "cache"
    folders = Path(config.data), config.wordnet_folder
    context = Context(*folders, config.languages, labels, tokenizer.path, cache, no_log)
    for strategy in config.strategies.active().values():
        if strategy.changes_texts or strategy._user_class:
            tokenizer = strategy.build(context).wrap_tokenizer(tokenizer, network)
    return tokenizer


def _refuse_code(settings: dict[str, Any], file: Path) -> None:
    """Refuse strategies, or more, in a user's own file, which an export never has: it may come from a
    stranger, and its settings would run what they name.

    Raises:
        UserError: there is one.
    """
    # a task's name is that of its data set here: nothing loads it
    for path, code in find_code({name: value for name, value in settings.items() if name != "task"}):
        raise UserError(
            f"{file}: {RUN_KEY}.{path} names code ({code[:250]!r}), which no export has; it is not run"
        )


def _is_bf16(dtype: torch.dtype | str | None, fit: FitConfig | None, device: torch.device) -> bool:
    if dtype is None:  # as training was, where that is known
        return fit is not None and fit.uses_bf16(device)
    name = str(dtype).removeprefix("torch.")
    if name not in ("float32", "bfloat16"):
        raise UserError(f"dtype={name}: give float32 or bfloat16, or leave it out")
    return name == "bfloat16"


def _capabilities(
    path: Path, network: Any, config: FinetuneConfig | None, settings: dict[str, Any]
) -> frozenset[str]:
    """The methods of `Model` that `network` has trained weights for."""
    if isinstance(network, FinetuneModel):
        return frozenset({"classify", "entails" if set(network.labels) == set(LABELS) else "answer"})
    if not isinstance(network, RetrievalBackbone) or (is_foreign(path) and not network.has_embeddings(path)):
        return frozenset()
    found = {"encode_image", "encode_text", "similarity"}
    if network.has_match_head and (config is None or config.use_itm_head):
        weights = settings.get("objective", {}).get("weights", {})
        if weights.get("itm", 1):
            found.add("rerank")
    return frozenset(found)

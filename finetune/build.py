"""The model that a run trains, its tokenizer, its strategies."""

from collections.abc import Callable
from pathlib import Path

import torch

from finetune.config import FinetuneConfig
from finetune.data import find_task
from finetune.model import freeze, tokenizer_at
from finetune.stores.images import VisualSource, open_visual
from finetune.strategies import Context, Strategies
from finetune.tasks.base import Pipeline, Task
from raylib.errors import UserError
from raylib.launch import no_log
from raylib.models.base import RegionBackbone
from raylib.randomness import hash64
from raylib.text import Tokenizer


def build_model(config: FinetuneConfig) -> torch.nn.Module:
    """The model that training starts from, without the changes of strategies."""
    torch.manual_seed(int(hash64(config.fit.seed, "head")) >> 1)
    task = find_task(config)
    model = task.build_model(config)
    backbone = model.backbone
    if isinstance(backbone, RegionBackbone):
        _set_region_dim(config, task, backbone)
    elif config.image_size:
        backbone.resize_images(config.image_size)
    freeze(backbone, config.freeze)
    return model


def build_strategies(config: FinetuneConfig, log: Callable[..., None] = print) -> Strategies:
    """The strategies of `config`, built; what they report goes to `log`.

    Raises:
        UserError: a file that one needs is missing or wrong, a setting does not fit the task.
    """
    task = find_task(config)
    context = Context(
        Path(config.data),
        config.wordnet_folder,
        task.languages_of(config),
        task.label_names(config),
        tokenizer_of(config),
        Path(config.runs).absolute() / "cache",  # named by content: other runs read it too
        log,
        task.training_captions(config),
        *task.training_texts(config),
    )
    return Strategies(config.strategies, context)


def build_pipeline(config: FinetuneConfig) -> Pipeline:
    """The model as training changed it, to be filled with what a run of `config` has learnt, and how it reads
    texts and images."""
    model, strategies = build_model(config), build_strategies(config, no_log)
    strategies.adapt(model)
    tokenizer = strategies.wrap_tokenizer(Tokenizer.load(tokenizer_of(config)), model)
    return Pipeline(config, model, tokenizer, open_visual_for(config, model))


def tokenizer_of(config: FinetuneConfig) -> Path:
    """The tokenizer file of `config.model`."""
    return tokenizer_at(config.model)


def open_visual_for(config: FinetuneConfig, model: torch.nn.Module) -> VisualSource | None:
    """What grounds the task's texts, as the model takes it; None where nothing does."""
    task = find_task(config)
    if not task.needs_images(config):
        return None
    backbone = model.backbone
    return open_visual(config, backbone.image_size, "tags" in backbone.row_parts)


def _set_region_dim(config: FinetuneConfig, task: Task, backbone: RegionBackbone) -> None:
    """Make a backbone that reads region features ready for those of the task.

    Raises:
        UserError: the task is about images and there are no regions; they are not as wide as the model's.
    """
    if not task.needs_images(config):
        return
    if not config.regions:
        raise UserError(
            f"regions= is missing: {backbone.kind} sees region features, not images; give an LMDB folder, "
            "a .h5, a .tsv or a folder of .npz or .npy files"
        )
    backbone.set_region_dim(task.region_dim(config))

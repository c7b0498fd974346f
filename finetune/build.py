"""The model that a run trains, its tokenizer, its methods."""

from pathlib import Path

import torch

from finetune.config import FinetuneConfig
from finetune.data import (
    find_task,
    labels_of,
    languages_of,
    open_seen,
    read_split,
    training_captions,
    training_texts,
    wordnet_of,
)
from finetune.decoder import encode_answers
from finetune.model import FinetuneModel, freeze, load_backbone, load_finetuned, resize, tokenizer_at
from finetune.strategies import Context, Methods
from raylib.errors import UserError
from raylib.models.unified import UnifiedModel
from raylib.randomness import hash64
from raylib.text import Tokenizer


def build_model(config: FinetuneConfig) -> FinetuneModel | UnifiedModel:
    """The model that training starts from: pretrained with a new head, which the seed decides, or, where a
    setting goes on from it, fine-tuned."""
    torch.manual_seed(int(hash64(config.fit.seed, "head")) >> 1)
    task = find_task(config)
    if task.kind == "retrieval":
        model = load_backbone(config.model, config.backbone, config.vision)
        _ready_to_retrieve(config, model)
    else:
        labels = labels_of(config)
        if config.continues:
            model = load_finetuned(config.model, labels)
            there = "decoder" if model.spells else "classifier"
            if there != config.head:
                raise UserError(f"{config.model}: its head is a {there}; set head={there}")
        else:
            backbone = load_backbone(config.model, config.backbone, config.vision)
            if not hasattr(backbone, "fused_cls"):
                raise UserError(
                    f"task={config.task}: {backbone.kind} reads texts and pictures apart; it retrieves, no "
                    "more"
                )
            answers = (
                encode_answers(labels, Tokenizer.load(tokenizer_of(config)))
                if config.head == "decoder"
                else None
            )
            more = (_region_width(config), answers, config.decoder)
            model = FinetuneModel(backbone, labels, task.pictures, config.head_dropout, *more)
    backbone = backbone_of(model)
    if hasattr(backbone, "set_region_dim"):
        _see_regions(config, backbone)
    elif config.image_size and config.image_size != backbone.config.image_size:
        if not isinstance(backbone, UnifiedModel):
            raise UserError(
                f"image_size={config.image_size}: {backbone.kind}'s image tower has "
                f"{backbone.config.image_size}"
            )
        resize(backbone, config.image_size)
    freeze(backbone, config.freeze)
    return model


def _ready_to_retrieve(config: FinetuneConfig, model: torch.nn.Module) -> None:
    """Without the match head, what it alone uses is out of training, or would decay all the same under ZeRO.

    Raises:
        UserError: a model without a match head, and matching is asked for.
    """
    if config.use_itm_head and not (hasattr(model, "match_head") or hasattr(model, "set_region_dim")):
        raise UserError(
            f"task={config.task}: {model.kind} has no head that matches pairs; set use_itm_head=false"
        )
    if not config.use_itm_head:
        for part in ("fusion", "match_head", "masked_head", "temperature"):
            if hasattr(model, part):
                getattr(model, part).requires_grad_(False)


def build_methods(config: FinetuneConfig, log=print) -> Methods:
    """The methods of `config`, ready to act; what they report goes to `log`.

    Raises:
        UserError: a file that one needs is missing or wrong, a setting does not fit the task.
    """
    answers = find_task(config).kind != "retrieval"
    labels = labels_of(config) if answers else ()
    cache = Path(config.runs).absolute() / "cache"  # named by content: other runs read it too
    context = Context(
        Path(config.data),
        wordnet_of(config),
        languages_of(config),
        labels,
        tokenizer_of(config),
        cache,
        log,
        training_captions(config),
        *training_texts(config),
    )
    return Methods(config.strategies, context)


def build_adapted(config: FinetuneConfig) -> tuple[FinetuneModel | UnifiedModel, Tokenizer]:
    """The model as training changed it, to be filled with what a run of `config` has learnt, and how it reads
    texts."""
    model, methods = build_model(config), build_methods(config, lambda *_: None)
    methods.adapt(model)
    return model, methods.reads(Tokenizer.load(tokenizer_of(config)), model)


def tokenizer_of(config: FinetuneConfig) -> Path:
    """The tokenizer file of `config.model`."""
    return tokenizer_at(config.model)


def backbone_of(model: FinetuneModel | UnifiedModel) -> torch.nn.Module:
    """The pretrained part of a model."""
    return model.backbone if isinstance(model, FinetuneModel) else model


def needs_pictures(config: FinetuneConfig) -> bool:
    """Whether any text of the task is about a picture."""
    return find_task(config).kind == "retrieval" or any(
        example.images for split in ("train", config.split) for example in read_split(config, split, "en", 1)
    )


def open_pictures_for(config: FinetuneConfig, model: FinetuneModel | UnifiedModel):
    """What grounds the task's texts, as the model takes it; None where nothing does."""
    backbone = backbone_of(model)
    size = getattr(backbone.config, "image_size", 0)
    return (
        open_seen(config, size, "tags" in getattr(backbone, "row_parts", ()))
        if needs_pictures(config)
        else None
    )


def _see_regions(config: FinetuneConfig, backbone: torch.nn.Module) -> None:
    """Make a backbone that sees regions ready for those of the task.

    Raises:
        UserError: the task is retrieval, or about pictures and there are no regions; they are not as wide as
            the model's.
    """
    if find_task(config).kind == "retrieval":
        raise UserError(
            f"task={config.task}: retrieval encodes texts and pictures apart; {backbone.kind} reads them "
            "together"
        )
    if not needs_pictures(config):
        return
    if not config.regions:
        raise UserError(
            f"regions= is missing: {backbone.kind} sees region features, not pictures; give an LMDB folder, "
            "a .h5, a .tsv or a folder of .npz or .npy files"
        )
    backbone.set_region_dim(_region_width(config))


def _region_width(config: FinetuneConfig) -> int | None:
    if not config.regions:
        return None
    firsts = (example for split in ("train", config.split) for example in read_split(config, split, "en", 1))
    image = next(
        (example.images[0] for example in firsts if example.images), None
    )  # SNLI trains on sentences alone
    if image is None:
        raise UserError(f"{config.task}: its texts are about no pictures; leave regions= out")
    return open_seen(config, 0).store.read(image).features.shape[1]

"""Files that a fine-tuning run reads: what its identity is made of (`raylib.provenance`)."""

from collections.abc import Mapping
from pathlib import Path

from finetune.build import tokenizer_of
from finetune.config import FinetuneConfig
from finetune.data import find_task, languages_of, read_split
from finetune.model import weights_of
from finetune.overlap import sets_of
from finetune.tasks.base import TRAINING_SPLITS, Reading
from raylib.provenance import DataFile


def run_files(config: FinetuneConfig, parts: Mapping[str | None, FinetuneConfig]) -> list[DataFile]:
    """Return the annotation files, answers, dictionaries, vectors, weights and tokenizer that a run of these
    parts reads, and its images or region features, which are too large to be hashed at a first start."""
    task, data = find_task(config), Path(config.data)
    files = [file for used in sets_of(parts) for file in _files_of(used.reading)]
    files += task.files(config) + ([Path(config.task)] if config.task.endswith(".py") else [])
    files += config.strategies.files(data)
    files += _translations(config)
    files += [weights_of(config.model), tokenizer_of(config)]
    files += [Path(config.vision)] if config.vision else []
    large = []
    if task.needs_images(config):
        large = [Path(config.regions) if config.regions else config.images_path]
    # what is missing is told by its reader, who knows what it is for
    every = [*map(DataFile, dict.fromkeys(files)), *(DataFile(path, large=True) for path in large)]
    return [file for file in every if file.path.exists()]


def _files_of(reading: Reading) -> list[Path]:
    """The file of a set, and those beside it that its reader is told of."""
    options = reading.task.split(reading.split, reading.language).options.values()
    beside = (reading.path.parent / name for value in options for name in value.split("|") if name)
    return [path for path in (reading.path, *beside) if path.is_file()]


def _translations(config: FinetuneConfig) -> list[Path]:
    """Translations of what is trained on, of a task that has such splits."""
    task = find_task(config)
    trained = TRAINING_SPLITS.get(config.setting)
    ways = dict.fromkeys(way for found in config.strategies.active().values() for way in found.translations)
    splits = [f"{trained}{way}" for way in ways if f"{trained}{way}" in task.splits]
    return [
        read_split(config, name, code).path
        for name in splits
        for code in languages_of(config)
        if code != "en"
    ]

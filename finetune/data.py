"""What a run reads: examples of each language, answer sets, pictures."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from finetune.config import FinetuneConfig
from finetune.examples import Captioned, Example
from finetune.formats.gqa import read_answers
from finetune.pictures import Pixels, RegionFeatures
from finetune.splits import Task
from finetune.stores import open_pictures, open_regions
from finetune.tasks import TASKS
from raylib.cache import cached, file_fingerprint
from raylib.config import lookup
from raylib.errors import UserError


class Reading:
    """The items of a split in a language, read from the file each time they are gone through."""

    def __init__(self, task: Task, path: Path, split: str, language: str, limit: int | None):
        self.task, self.path, self.split, self.language, self.limit = task, path, split, language, limit

    def __iter__(self) -> Iterator[Example] | Iterator[Captioned]:
        return itertools.islice(self.task.read(self.path, self.split, self.language), self.limit)


def read_whole(reading: Reading) -> list[Example] | list[Captioned]:
    """All items of a split; in a search they are parsed once."""
    facts = (reading.split, reading.language, reading.limit, file_fingerprint(reading.path))
    return cached("items", facts, lambda: list(reading))


def find_task(config: FinetuneConfig) -> Task:
    """The record of `config.task`."""
    return lookup(config.task, TASKS, "task")


def read_split(config: FinetuneConfig, split: str, language: str, limit: int | None = None) -> Reading:
    """A split under `config.data`."""
    task = find_task(config)
    return Reading(task, task.path(Path(config.data), split, language, config.shots), split, language, limit)


def languages_of(config: FinetuneConfig) -> tuple[str, ...]:
    """The languages that are evaluated."""
    return config.languages or find_task(config).languages


def test_split(config: FinetuneConfig, language: str) -> str:
    """The split that results in `language` come from; English has no translation."""
    alignment = config.strategies.alignment
    if language == "en" or not (config.setting == "translate_test" or (alignment and alignment.routine == 3)):
        return config.split
    return "translated_testdev" if config.split == "testdev" else "translated"


def split_name(config: FinetuneConfig) -> str:
    """Name the test split for results."""
    return find_task(config).split_names.get(config.split, config.split)


def dev_split(config: FinetuneConfig, language: str) -> str:
    """The split that is the dev set of `language`: one of its own, or, of English, "dev". Where a model is
    tested on translations into English, so is this one.

    Raises:
        UserError: the task has none in that language, or no translation of it.
    """
    task, name = find_task(config), None
    if task.has("dev", language) and (
        language == "en" or task.source("dev", language) != task.source("dev", "en")
    ):
        name = "dev"
    elif language != "en":
        name = next((name for name in ("target_dev", "shots_dev") if name in task.splits), None)
    if name is None:
        raise UserError(f"{config.task} has no development set in '{language}'")
    if test_split(config, language).startswith("translated"):
        name += "_to_en"
        if name not in task.splits:
            raise UserError(
                f"{config.task} has no development set in '{language}' in translation, which routine 3 is "
                "judged by"
            )
    return name


def dev_sets(config: FinetuneConfig, language: str | None) -> dict[str, str]:
    """{language: split} of the dev sets that a part of a run is scored on.

    The first chooses the checkpoint: it is English, but the language's own where there is a training for each
    and the task has one (IGLUE's protocol for few-shot xGQA, paper 4's). With select=last nothing is looked
    at, but in a search, where English says something of all languages, or is all that is looked at. Then
    those of `dev_languages`.
    """
    task, sets = find_task(config), {}
    split = {"few_shot": "shots_dev", "single_language": "dev"}.get(config.setting)
    own = language is not None and split is not None and task.has(split, language)
    if own and split == "dev" and language != "en":
        own = task.source("dev", language) != task.source("dev", "en")
    looked = config.select == "best" or (
        not config.run_test and (language is None or not config.dev_languages)
    )
    if config.trains and looked and (own or task.has("dev", "en")):
        sets = {language: dev_split(config, language)} if own else {"en": "dev"}
    for code in config.dev_languages:
        if language in (None, code):
            sets.setdefault(code, dev_split(config, code))
    return sets


def training_sets(config: FinetuneConfig, language: str | None) -> list[Reading]:
    """Return what a part of a run trains on; `language` where each has a part of its own.

    Raises:
        UserError: the languages have no training files of their own.
    """
    if config.setting == "few_shot":
        return [read_split(config, "shots", language)]
    if config.setting == "zero_shot":
        return [read_split(config, "train", "en", config.train_limit)]
    wanted, task = [language] if language else languages_of(config), find_task(config)
    readings = [read_split(config, "train", code, config.train_limit) for code in wanted]
    own = {task.source("train", code) for code in wanted}
    english = task.source("train", "en") if "en" in task.languages else None
    if len(own) < len(readings) or (language not in (None, "en") and english in own):
        raise UserError(
            f"{config.task}: its training file is English only; setting={config.setting} has nothing to "
            "train on"
        )
    return readings


def training_examples(config: FinetuneConfig, language: str | None) -> list:
    """The items of `training_sets`."""
    return [example for reading in training_sets(config, language) for example in read_whole(reading)]


def training_captions(config: FinetuneConfig) -> Callable[[str, str], dict[str, tuple[str, ...]]] | None:
    """`captions` of a `Context`: reads what a retrieval run trains on, in any language, or translations of
    it; None where English alone is trained on."""
    split = {"few_shot": "shots", "single_language": "train", "all_language": "train"}.get(config.setting)
    if find_task(config).kind != "retrieval" or split is None:
        return None

    def read(made: str, language: str) -> dict[str, tuple[str, ...]]:
        items = read_split(
            config, f"{split}{made}", language, config.train_limit if split == "train" else None
        )
        return {item.image: item.captions for item in merge(read_whole(items))}

    return read


def training_texts(config: FinetuneConfig) -> tuple[dict[str, Reading], Reading | tuple]:
    """`training` and `english` of a `Context`: what a classification run trains on in each language, and the
    same in English."""
    split = {
        "zero_shot": "train",
        "few_shot": "shots",
        "single_language": "train",
        "all_language": "train",
    }.get(config.setting)
    if find_task(config).kind == "retrieval" or split is None:
        return {}, ()
    languages = ("en",) if config.setting == "zero_shot" else languages_of(config)
    limit = config.train_limit if split == "train" else None
    chosen = [code for code in languages if config.setting != "few_shot" or code != "en"]
    return {code: read_split(config, split, code, limit) for code in chosen}, read_split(
        config, split, "en", limit
    )


def wordnet_of(config: FinetuneConfig) -> Path:
    """The WordNet folder: where relations between answers come from."""
    return Path(config.wordnet or Path(config.data) / "wordnet")


@cache
def labels_of(config: FinetuneConfig) -> tuple[str, ...]:
    """The classes: the task's own, its answer file's, or the most frequent answers of the English training
    file.

    Raises:
        UserError: no answer anywhere.
    """
    task = find_task(config)
    if task.labels:
        return task.labels
    files = [Path(config.data) / name for name in task.answers]
    found = next((file for file in files if file.is_file()), None)
    if found and config.answers is None:
        return read_answers(found)
    counts: Counter[str] = Counter()
    for example in read_whole(read_split(config, "train", "en", config.train_limit)):
        counts.update(example.labels)
    if not counts:
        raise UserError(f"{config.data}: no answers in the training file of {config.task}")
    return tuple(
        answer for answer, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[: config.answers]
    )


def with_known_answers(examples: list[Example], labels: tuple[str, ...]) -> tuple[list[Example], int]:
    """(examples of which an answer is among `labels`, how many are not): these train nothing, and are
    counted."""
    known = frozenset(labels)
    kept = [e for e in examples if not known.isdisjoint(e.labels)]
    return kept, len(examples) - len(kept)


def merge(items: list[Captioned]) -> list[Captioned]:
    """One item a picture: lines that speak of the same one come together."""
    captions: dict[str, tuple[str, ...]] = {}
    for item in items:
        captions[item.image] = captions.get(item.image, ()) + item.captions
    return [Captioned(image, texts) for image, texts in captions.items()]


def open_seen(config: FinetuneConfig, size: int, tagged: bool = False) -> Pixels | RegionFeatures:
    """The pictures, or the region features in their place; `tagged`: with the names of the objects."""
    if config.regions:
        return RegionFeatures(open_regions(config.regions), tagged)
    return Pixels(open_pictures(images_of(config)), size, config.augment)


def images_of(config: FinetuneConfig) -> Path:
    """Return where the images of a run lie: `config.images`, else images.tar or images in the data folder."""
    default = Path(config.data) / "images.tar"
    return Path(config.images) if config.images else default if default.is_file() else default.with_suffix("")

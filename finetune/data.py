"""What a run reads: its task, and the split of each use in each language."""

from finetune.config import FinetuneConfig
from finetune.tasks.base import Reading, Task
from finetune.tasks.datasets import TASKS
from raylib.config import load_user_class, load_user_file, lookup
from raylib.errors import UserError


def find_task(config: FinetuneConfig) -> Task:
    """The task that `config.task` names, or that its file defines, with the head that `config.head` names.

    Raises:
        UserError: no such task; it cannot have that head.
    """
    task = load_task(config.task)
    if config.head not in task.heads:
        raise UserError(f"head={config.head} generates answers of an open set; {config.task} has none")
    return task.heads[config.head]


def load_task(name: str) -> Task:
    """A task by its name, or from a Python file that defines one: a `Task`, or a class that is built without
    arguments.

    Raises:
        UserError: there is no such task or file; the file defines none, or several.
    """
    if not name.endswith(".py"):
        return lookup(name, TASKS, "task")
    found = {id(value): value for value in vars(load_user_file(name)).values() if isinstance(value, Task)}
    if len(found) > 1:
        raise UserError(f"{name}: it defines {len(found)} tasks; leave one, or make a file for each")
    if found:
        return found.popitem()[1]
    task_class = load_user_class(name, Task)
    try:
        return task_class()
    except TypeError as e:
        raise UserError(f"{name}: {task_class.__name__} cannot be built without arguments ({e})") from None


def read_split(config: FinetuneConfig, split: str, language: str, limit: int | None = None) -> Reading:
    """A split under `config.data`."""
    return find_task(config).read_split(config, split, language, limit)


def languages_of(config: FinetuneConfig) -> tuple[str, ...]:
    """The languages that are evaluated."""
    return find_task(config).languages_of(config)


def test_split(config: FinetuneConfig, language: str) -> str:
    """The split that results in `language` come from; English has no translation."""
    translated = any(found.tests_translations for found in config.strategies.active().values())
    if language == "en" or not (config.setting == "translate_test" or translated):
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
                f"{config.task} has no development set in '{language}' in translation, and the run is "
                "tested on translations"
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
    return [example for reading in training_sets(config, language) for example in reading.load()]

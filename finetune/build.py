"""From a config to what it names: its task, the splits that it reads and their files, its model, strategies
and images."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from finetune.config import FinetuneConfig
from finetune.formats.items import ItemList
from finetune.image_check import check_sets, find_missing, require_few_faults
from finetune.stores.images import (
    ImageSource,
    PrecomputedFeatures,
    RegionFeatures,
    VisualSource,
    open_visual,
)
from finetune.strategies import Context, Strategies
from finetune.tasks.base import TRAINING_SPLITS, Pipeline, Reading, Task, old_scenes_hint
from finetune.tasks.datasets import TASKS
from raylib import checkpoint
from raylib.averaging import average_checkpoints
from raylib.cache import file_fingerprint, fingerprint_module, get_cache, precompute_features
from raylib.config import UserFile, load_user_class, load_user_file, lookup, user_files
from raylib.distributed import rank, world_size
from raylib.errors import UserError
from raylib.models import stored_backbone
from raylib.models.base import CODE_KEY, RegionBackbone, load_weights, read_description
from raylib.models.finetuned import (
    FinetuneModel,
    find_evaluated,
    freeze,
    is_foreign,
    model_for_language,
    set_dropout,
    tokenizer_at,
    weights_of,
)
from raylib.models.recompute import set_recomputation
from raylib.provenance import DataFile
from raylib.randomness import hash64
from raylib.text import Tokenizer


def find_task(config: FinetuneConfig) -> Task:
    """The task that `config.task` names, or that its file defines, with the head that `config.head` names.

    Raises:
        UserError: no such task; it cannot have that head.
    """
    task = load_task(config.task)
    if config.head == "pairs" and "pairs" not in task.heads:
        raise UserError(f"head=pairs scores images with captions; {config.task} retrieves none")
    if config.head not in task.heads:
        raise UserError(f"head={config.head} generates answers of an open set; {config.task} has none")
    return task.heads[config.head]


def load_task(name: str) -> Task:
    """A task by its name, or from a Python file that defines it, FILE.py or FILE.py:NAME: a `Task`, or a
    class that is built without arguments.

    Raises:
        UserError: there is no such task or file; the file defines none, or several and NAME says none of
            them.
    """
    if not user_files(name):
        return lookup(name, TASKS, "task")
    file = name if isinstance(name, UserFile) else UserFile(name)
    path = file.require("task")
    file.tell()
    entry = name.partition(".py:")[2]
    found = {key: value for key, value in vars(load_user_file(path)).items() if isinstance(value, Task)}
    if entry in found:
        return found[entry]
    if found and not entry:
        first, *others = found
        if any(found[other] is not found[first] for other in others):
            raise UserError(f"{path}: several tasks ({', '.join(found)}); say which: {path}:{first}")
        return found[first]
    if found and entry not in vars(load_user_file(path)):
        raise UserError(f"{path}: no task {entry}; it has: {', '.join(found)}")
    task_class = load_user_class(path, Task, entry or None)  # type: ignore[type-abstract]  # one that is not
    build: Callable[[], Task] = task_class
    try:
        return build()
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
    if config.direction == "from_en":
        return "test_from_en"
    return "translated_testdev" if config.split == "testdev" else "translated"


def reported_split(config: FinetuneConfig) -> str:
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
    task = find_task(config)
    sets: dict[str, str] = {}
    split = {"few_shot": "shots_dev", "single_language": "dev"}.get(config.setting)
    dev_language = None  # the language, if its own set chooses
    if language is not None and split is not None and task.has(split, language):
        is_english = split == "dev" and task.source("dev", language) == task.source("dev", "en")
        dev_language = None if is_english and language != "en" else language
    is_scored = config.select == "best" or (
        not config.run_test and (language is None or not config.dev_languages)
    )
    if config.trains and is_scored and dev_language:
        sets[dev_language] = dev_split(config, dev_language)
    elif config.trains and is_scored and task.has("dev", "en"):
        sets["en"] = "dev"
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
        assert language is not None, "few-shot training has a part a language"
        return [read_split(config, "shots", language)]
    if config.setting == "zero_shot":
        return [read_split(config, "train", "en", config.train_limit)]
    codes, task = [language] if language else languages_of(config), find_task(config)
    readings = [read_split(config, "train", code, config.train_limit) for code in codes]
    sources = {task.source("train", code) for code in codes}
    english = task.source("train", "en") if "en" in task.languages else None
    if len(sources) < len(readings) or (language not in (None, "en") and english in sources):
        raise UserError(
            f"{config.task}: its training file is English only; setting={config.setting} has nothing to "
            "train on"
        )
    return readings


def training_examples(config: FinetuneConfig, language: str | None, visual: VisualSource | None) -> ItemList:
    """The items of `training_sets`.

    Raises:
        UserError: too many of a set have no image in `visual`.
    """
    sets = []
    for reading in training_sets(config, language):
        sets.append(reading.load())
        where = f"{reading.path} (train, '{reading.language}')"
        line = find_missing(visual, sets[-1], where, config.bad_limit)
        if line and rank() == 0:
            print(line, flush=True)
    return ItemList.join(sets)


def test_sets(config: FinetuneConfig) -> dict[str, Reading]:
    """{language: its test set, read as a stream}."""
    return {
        code: read_split(config, test_split(config, code), code, config.test_limit)
        for code in languages_of(config)
    }


def extra_tests(config: FinetuneConfig) -> dict[str, FinetuneConfig]:
    """{name: the settings that `test_sets` and the images are read by} of each of `config.extra_tests`. It
    has the languages of the run whose test file is in the folder.

    Raises:
        UserError: no such folder, or no test file of any language in it; images of its own, and the run
            reads region features.
    """
    found = {}
    for name, place in config.extra_tests.items():
        folder, setting = Path(config.data, place), f"extra_tests.{name}={place}"
        if not folder.is_dir():
            raise UserError(
                f"{setting}: no such folder: {folder}; give one laid out as data=, or extra_tests={{}}"
                f"{old_scenes_hint(Path(config.data))}"
            )
        wordnet = str(config.wordnet_folder)
        extra = config.model_copy(update={"data": str(folder), "images": None, "wordnet": wordnet})
        if not extra.images_path.exists():
            extra = extra.model_copy(update={"images": str(config.images_path)})
        elif config.regions:  # which would be those of other images by the same names
            raise UserError(
                f"{setting}: it has images of its own, {extra.images_path}, and regions={config.regions} are "
                "of others; set extra_tests={}"
            )
        paths = {code: reading.path for code, reading in test_sets(extra).items()}
        there = tuple(code for code, path in paths.items() if path.exists())
        if not there:
            raise UserError(f"{setting}: no test set in it: {next(iter(paths.values()))}: no such file")
        found[name] = extra.model_copy(update={"languages": there})
    return found


class UsedSet(NamedTuple):
    """A set of a run: "test", "dev" or "train", in which of its parts, what reads it, and of which of
    `extra_tests` it is."""

    role: str
    parts: frozenset[str | None]
    reading: Reading
    extra: str = ""


def used_sets(parts: Mapping[str | None, FinetuneConfig]) -> list[UsedSet]:
    """Every set that the parts of a run use, once."""
    places: dict[tuple, tuple[UsedSet, set]] = {}
    for language, config in parts.items():
        used = [("test", reading, "") for reading in test_sets(config).values()]
        for name, extra in extra_tests(config).items():
            used += [("test", reading, name) for reading in test_sets(extra).values()]
        dev = dev_sets(config, language).items()
        used += [("dev", read_split(config, split, code, config.test_limit), "") for code, split in dev]
        if config.trains:
            used += [("train", reading, "") for reading in training_sets(config, language)]
        for role, reading, name in used:
            key = (role, reading.path, reading.split, reading.language, reading.limit, name)
            places.setdefault(key, (UsedSet(role, frozenset(), reading, name), set()))[1].add(language)
    return [used._replace(parts=frozenset(of)) for used, of in places.values()]


def check_images(
    config: FinetuneConfig,
    parts: Mapping[str | None, FinetuneConfig],
    roles: Collection[str] = ("test", "dev", "train"),
) -> Iterator[str]:
    """Look for the images, or the region features, of the sets of a run (`check_sets`). Those of what is
    trained on are looked for by the training itself, when it has read it (`training_examples`), but where the
    parts of a run train one after the other."""
    if not find_task(config).needs_images(config):
        return
    apart = config.verify or config.trains_apart or get_cache() is not None
    sets = [used for used in used_sets(parts) if used.role in roles and (used.role != "train" or apart)]
    for name, read_as in {"": config, **extra_tests(config)}.items():
        visual = open_visual(read_as, 0)
        if config.verify and isinstance(visual, RegionFeatures):
            visual.store.width = find_task(config).region_dim(config)
        of_test = [used for used in sets if used.extra == name]
        yield from check_sets(visual, of_test, config.bad_limit, config.verify)


def run_files(config: FinetuneConfig, parts: Mapping[str | None, FinetuneConfig]) -> list[DataFile]:
    """Return the annotation files, answers, dictionaries, vectors, weights and tokenizer that a run of these
    parts reads, and its images or region features, which are too large to be hashed at a first start."""
    task, data = find_task(config), Path(config.data)
    files = [file for used in used_sets(parts) for file in _files_of(used.reading)]
    files += task.files(config) + code_files(config) + user_files(config.backbone)
    files += config.strategies.files(data)
    files += _translations(config)
    # what a run started from may be gone by the time that it is evaluated again
    for model in dict.fromkeys(part.model for part in parts.values()):
        files += [weights_of(model), tokenizer_at(model)] if Path(model).exists() else []
    files += [Path(config.vision)] if config.vision else []
    large = []
    if task.needs_images(config):
        sources = [config, *extra_tests(config).values()]
        large = [Path(each.regions) if each.regions else each.images_path for each in sources]
        large = list(dict.fromkeys(large))
    # what is missing is told by its reader, who knows what it is for
    data_files = [*map(DataFile, dict.fromkeys(files)), *(DataFile(path, large=True) for path in large)]
    return [file for file in data_files if file.path.exists()]


def code_files(config: FinetuneConfig) -> list[Path]:
    """The user's own files that define the task and strategies of `config`; a run keeps copies of them."""
    named = [name for name in (config.task, *config.strategies.user_files()) if isinstance(name, UserFile)]
    return list(dict.fromkeys(name.path for name in named))


def _files_of(reading: Reading) -> list[Path]:
    """The file of a set, and those beside it that its reader is told of."""
    options = reading.task.split(reading.split, reading.language).options.values()
    option_files = (reading.path.parent / name for value in options for name in value.split("|") if name)
    return [path for path in (reading.path, *option_files) if path.is_file()]


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


def with_language_model(config: FinetuneConfig, language: str | None = None) -> FinetuneConfig:
    """`config` with the model that the part of `language`, or of its first one, starts from: where each
    language is trained apart, so may the run have been that it goes on from (paper 3's students).

    Raises:
        UserError: that run has no model for the language.
    """
    if not config.trains_apart:
        return config
    model = model_for_language(config.model, language or languages_of(config)[0])
    return config if model == config.model else config.model_copy(update={"model": model})


def build_model(config: FinetuneConfig) -> torch.nn.Module:
    """The model that training starts from, without the changes of strategies."""
    config = with_language_model(config)
    # a new head, and whatever weights a folder lacks, are drawn from the run's seed, on every worker alike
    torch.manual_seed(int(hash64(config.fit.seed, "head")) >> 1)
    task = find_task(config)
    model = task.build_model(config)
    backbone = model.backbone
    if isinstance(backbone, RegionBackbone):
        _set_region_dim(config, task, backbone)
    elif config.image_size:
        backbone.resize_images(config.image_size)
    freeze(backbone, config.freeze)
    set_dropout(backbone, config.dropout, config.attention_dropout)
    return model


def with_stored_code(config: FinetuneConfig) -> FinetuneConfig:
    """`config` with the user's file beside `config.model` as its backbone, where the model has one: so a run
    from it names the file too.

    Raises:
        UserError: as of `stored_backbone`.
    """
    model = with_language_model(config).model
    if is_foreign(Path(model)):
        return config
    folder = find_evaluated(model)
    description = read_description(folder)
    if CODE_KEY not in description:
        return config
    stored_backbone(description, folder, config.backbone)
    return config.model_copy(update={"backbone": f"{folder / description[CODE_KEY]}"})


def build_strategies(config: FinetuneConfig) -> Strategies:
    """The strategies of `config`, built.

    Raises:
        UserError: a file that one needs is missing or wrong, a setting does not fit the task.
    """
    task = find_task(config)
    training, english = task.training_texts(config)
    context = Context(
        Path(config.data),
        config.wordnet_folder,
        task.languages_of(config),
        task.label_names(config),
        tokenizer_of(config),
        Path(config.runs).absolute() / "cache",  # named by content: other runs read it too
        captions=task.training_captions(config),
        training=training,
        english=english,
    )
    return Strategies(config.strategies, context)


def build_pipeline(
    config: FinetuneConfig,
    strategies: Strategies,
    device: torch.device | str = "cpu",
    start: Path | None = None,
) -> Pipeline:
    """The model as training changes it, with the weights of the checkpoint `start`, and how it reads texts
    and images."""
    model = build_model(config).to(device)
    config.fit.set_precision(model, torch.device(device))  # of evaluation too, where nothing trains
    strategies.adapt(model)
    if start:
        load_weights(model, start)
    set_recomputation(model, config.checkpointing, config.fit.micro_batches)
    tokenizer = strategies.wrap_tokenizer(open_tokenizer(config, tokenizer_of(config)), model)
    return Pipeline(config, model, tokenizer, open_visual_for(config, model))


def load_trained(model: FinetuneModel, run: Path, select: str) -> Path:
    """Load the weights of what a run has trained, as `select` chooses them; of "average" they are made here.
    Returns the folder that they are in."""
    if select == checkpoint.AVERAGE:
        return average_checkpoints(model, run)
    trained = checkpoint.find_trained(run, select)
    load_weights(model, trained)
    return trained


def evaluate_sets(
    pipeline: Pipeline, sets: Mapping[str, Iterable[Any]], folder: Path, what: str
) -> dict[str, dict[str, Any]]:
    """Figures of the sets `what`, the "dev" sets or some that are tested, as of `Task.evaluate`.

    Raises:
        UserError: too many items of one have an image that cannot be read.
    """
    task = find_task(pipeline.config)
    figures = (task.evaluate_dev if what == "dev" else task.evaluate)(pipeline, sets, folder)
    require_few_faults(figures, what, pipeline.config.bad_limit)
    return {code: {k: v for k, v in values.items() if k != "bad_image"} for code, values in figures.items()}


def parallel_items(config: FinetuneConfig) -> Any:
    """Read test items that are in all languages, whose states are compared; None: no settings ask.

    Raises:
        UserError: similarity_items asks for some, and there are none.
    """
    codes = languages_of(config)
    if not config.similarity_items or len(codes) < 2:
        return None
    from finetune.analysis.parallel import read_parallel  # `finetune.analysis` imports this module

    parallel = read_parallel(config, codes, config.similarity_items)
    if not parallel.items:
        raise UserError(
            f"similarity_items={config.similarity_items}: no test item is in all of {', '.join(codes)}; set "
            "similarity_items=0"
        )
    return parallel


def measure_parallel(pipeline: Pipeline, parallel: Any) -> dict[str, float]:
    """{"mean": cosine of parallel items over all pairs of languages, "unpaired": of different items,
    LANGUAGE: of its items and the English ones}, of what the head reads."""
    from finetune.analysis.languages import measure_similarity, parallel_states

    config, model, tokenizer, visual = pipeline
    states = parallel_states(model, parallel, visual, tokenizer, config.length, pipeline.bf16)
    found = measure_similarity(parallel, states, {})
    unpaired = {} if found["unpaired"] is None else {"unpaired": found["unpaired"]}
    return {"mean": found["mean"], **unpaired, **found["to_english"]}


def cache_image_states(pipeline: Pipeline, items: Iterable[Any]) -> Pipeline:
    """The pipeline with the states of all images of `items` in the images' place, if the image encoder never
    changes; they are kept in `runs`/encoded (in a search, in its own) for all runs with the same encoder and
    images."""
    config, model, _, visual = pipeline
    if not (isinstance(visual, ImageSource) and config.cache_image_states and "vision" in config.freeze):
        return pipeline
    names = sorted({name for item in items for name in item.images})
    backbone = model.backbone
    read_as = (backbone.describe_preprocessing(), visual.store.max_pixels)
    # of other runs too: the images may have changed in between, and other workers cut other batches
    store = (str(visual.store.path), file_fingerprint(visual.store.path), world_size())
    key = (visual.size, store, names, pipeline.bf16, read_as)
    cache = get_cache()
    folder = cache.folder if cache else Path(config.runs).absolute()
    states_folder = folder / "encoded" / fingerprint_module(backbone.image_encoder, *key)
    states = precompute_features(backbone, visual, names, states_folder, pipeline.bf16)
    return pipeline._replace(visual=PrecomputedFeatures(states, visual.store))


def share_with_trials(tokenizer: Tokenizer, items: Iterable[Any], folder: Path) -> Path:
    """In a search, let trials share the tokens of the items' texts. Returns the folder that they share; out
    of a search, `folder`."""
    cache = get_cache()
    if cache is None:
        return folder
    tokenizer.without_prompt.remember([text for item in items for text in item.texts])
    return cache.folder


def open_tokenizer(config: FinetuneConfig, path: Path) -> Tokenizer:
    """The tokenizer at `path`, which normalises texts where the settings say so."""
    tokenizer = Tokenizer.load(path)
    if config.text_normalization == "none":
        return tokenizer
    from raylib.words import NormalizedTokenizer

    return NormalizedTokenizer(tokenizer, config.text_normalization, config.training_words)


def tokenizer_of(config: FinetuneConfig) -> Path:
    """The tokenizer file of `config.model`."""
    return tokenizer_at(with_language_model(config).model)


def open_visual_for(config: FinetuneConfig, model: Any) -> VisualSource | None:
    """Open what grounds the task's texts, as the model takes it; None where nothing does."""
    return open_visual_of(config, model) if find_task(config).needs_images(config) else None


def open_visual_of(config: FinetuneConfig, model: Any) -> VisualSource:
    """Open the images, or the region features, of a run as the model takes them."""
    backbone = model.backbone
    tagged = "tags" in backbone.row_parts
    visual = open_visual(config, backbone.image_size, tagged, backbone.preprocess)
    if isinstance(visual, RegionFeatures):
        visual.store.width = model.description["regions"]
    return visual


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
    dim = task.region_dim(config)
    assert dim is not None
    backbone.set_region_dim(dim)

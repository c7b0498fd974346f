"""`Task`: where its splits lie under the data folder, and what a run asks of it.

A run calls the methods of its task in the order in which they stand in `Task`. Whatever differs between
classifying, generating and retrieving is a method of the task or an attribute: nothing else asks of what kind
it is.
"""

import inspect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, cast

from finetune.batches import BatchOrder, EpochBatches, ExtraInputs
from finetune.formats import check_item
from finetune.formats.items import ItemList
from finetune.stores import Regions
from finetune.stores.images import VisualSource, open_visual
from finetune.strategies.base import Captions, LossTerms, Need
from raylib.cache import cached, file_fingerprint
from raylib.config import user_file_error, user_source
from raylib.data.images import BadImage
from raylib.display import progress
from raylib.engine import Objective
from raylib.errors import UserError
from raylib.text import Tokenizer

if TYPE_CHECKING:  # a config holds the strategies' settings, and strategies know tasks
    from finetune.config import FinetuneConfig


# the split that each setting trains on, of those that train on the languages' own files
TRAINING_SPLITS = {"few_shot": "shots", "single_language": "train", "all_language": "train"}


REGION_ITEMS = 100  # whose region features are tried for their width


class Split(NamedTuple):
    """A file and its reader; `options` are the reader's, filled in like the path. A .zip is read as it lies,
    and so is the file in it where it has been unzipped beside. `others`: where the same split may lie
    instead, the likeliest first."""

    path: str
    read: Callable[..., Iterator]
    options: Mapping[str, str] = {}
    others: tuple["Split", ...] = ()

    def places(self, language: str, shots: int | str) -> Iterator[tuple[str, "Split"]]:
        """(path under the data folder, the split that reads it) of every place, in the order in which they
        are looked at."""
        for split in (self, *self.others):
            path = _fill(split.path, language=language, shots=shots)
            if path.endswith(".zip"):
                yield path.removesuffix(".zip"), split
            yield path, split


def _fill(template: str, **values: int | str) -> str:
    """`template` with its {names} filled in.

    Raises:
        UserError: it has other names.
    """
    try:
        return template.format(**values)
    except (KeyError, IndexError, ValueError):
        names = " and ".join(f"{{{name}}}" for name in values)
        raise UserError(f"'{template}' in a split: {names} alone is filled in there") from None


class Overlap(NamedTuple):
    """Overlap of two sets of a published task, as its files have it.

    first, second: "test", "dev" or "train" (shots are trained on).
    language, other: of `first`, of `second`; None: any.
    images, items: how many at most; None: nobody has said how many, so whatever is found is reported, and no
        error, unless it is the same record.
    why: the source of that knowledge.
    """

    first: str
    second: str
    images: int | None
    items: int | None
    why: str
    language: str | None = None
    other: str | None = None


class Reading:
    """The items of a split in a language, read from the file each time they are gone through."""

    def __init__(self, task: "Task", path: Path, split: str, language: str, limit: int | None):
        self.task, self.path, self.split, self.language, self.limit = task, path, split, language, limit

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.task.read(self.path, self.split, self.language), self.limit)

    def load(self) -> ItemList[Any]:
        """All items in memory; in a search they are parsed once."""
        key = (self.split, self.language, self.limit, file_fingerprint(self.path))
        return cached("items", key, lambda: ItemList(progress(self, f"read {self.path.name}")))


class Pipeline(NamedTuple):
    """A model with what it takes to run it: its tokenizer, and `visual`, what grounds its texts as it takes
    it; None where nothing does."""

    config: "FinetuneConfig"
    model: Any  # what the task's `build_model` makes: no one else needs its class
    tokenizer: Tokenizer
    visual: VisualSource | None

    @property
    def bf16(self) -> bool:
        return self.config.fit.uses_bf16(next(self.model.parameters()).device)


class Score(NamedTuple):
    """A share in [0, 1] and the ends of its 95 % interval; None if one image leaves none."""

    value: float
    interval: list[float] | None


def old_scenes_hint(folder: Path) -> str:
    """Return advice about what emoji scenes that were made before lack; "" where `folder` holds none."""
    if not (folder / "scenes.jsonl").is_file():
        return ""
    return (
        "; emoji scenes that were made before may lack it: make them anew (python -m "
        "raylib.sample.scenes OUT)"
    )


def _read(reader: Callable[..., Iterator], path: Path, options: Mapping[str, str]) -> Iterator[Any]:
    """The items of `reader`; what fails in one of a user's own file is named by its line there."""
    number = 0
    try:
        for number, item in enumerate(reader(path, **options), 1):
            check_item(item, f"{path}, item {number}")
            yield item
        if not number:
            raise UserError(f"{path}: nothing in it; take an undamaged copy")
    except UserError:
        raise
    except Exception as e:
        if user_source(reader) is None:
            raise
        raise user_file_error(e, Path(inspect.getfile(reader)), f", reading {path}") from e


@dataclass(frozen=True, kw_only=True, eq=False)
class Task(ABC):
    """One task: a record of its data, by the arguments, and the methods of its kind.

    summary: one line. languages: those of the test files, English first.
    num_images: how many ground a text; 1 for a premise.
    item: what tells an item from others where splits are compared (`finetune.overlap`): its text or number
        with its images; the text alone, or the number with them; or the text with them, or the number alone.
    mscoco: images are MSCOCO's: a bare number names one of them.
    overlaps: what its published splits share.
    split_names: what results call a split whose setting has another name.
    """

    # what strategies may ask for (`finetune.strategies`): "labels", "training_texts", "captions", and of what
    # terms of the loss read "logits", "states", "embeddings"
    provides: ClassVar[frozenset[Need]] = frozenset()

    summary: str
    languages: tuple[str, ...]
    splits: Mapping[str, Split]
    num_images: int = 1
    item: Literal["grounded", "text", "number"] = "grounded"
    mscoco: bool = False
    overlaps: tuple[Overlap, ...] = ()
    split_names: Mapping[str, str] = field(default_factory=dict)

    # ---- settings and files

    @property
    def heads(self) -> Mapping[str, "Task"]:
        """The task by each of the model heads (`head=`) that it can have."""
        return {"classifier": self}

    @property
    def open_answers(self) -> bool:
        """Return whether its classes are an open set: answers of which some may mean the same."""
        return False

    def check(self, config: "FinetuneConfig") -> None:  # noqa: B027 - most tasks refuse nothing
        """Raise UserError: a setting that this task cannot have."""

    def files(self, config: "FinetuneConfig") -> list[Path]:
        """Files that are read besides the splits."""
        return []

    def label_names(self, config: "FinetuneConfig") -> tuple[str, ...]:
        """The classes; none of a task that does not tell classes apart."""
        return ()

    def needs_images(self, config: "FinetuneConfig") -> bool:
        """Return whether any text is about an image."""
        return any(
            item.images
            for split in ("train", config.split)
            for item in self.read_split(config, split, "en", 1)
        )

    def region_dim(self, config: "FinetuneConfig") -> int | None:
        """Width of the region features, where these take the place of images.

        Raises:
            UserError: no text is about an image; no features can be read of the first ones.
        """
        if not config.regions:
            return None
        store, fault = open_visual(config, 0).store, None
        # SNLI trains on sentences alone; the features of a few images may be broken
        for split in ("train", config.split):
            for item in self.read_split(config, split, "en", REGION_ITEMS):
                for image in item.images:
                    try:
                        return cast(Regions, store.read(image)).features.shape[1]
                    except BadImage as error:
                        fault = fault or error
        raise fault or UserError(f"{config.task}: its texts are about no images; leave regions= out")

    def training_captions(self, config: "FinetuneConfig") -> Captions | None:
        """Read the captions that are trained on, in any language, or translations of them; None where there
        are none, or English ones alone."""
        return None

    def training_texts(self, config: "FinetuneConfig") -> tuple[dict[str, Reading], Reading | tuple]:
        """({language: examples that are trained on}, the same in English)."""
        return {}, ()

    # ---- training

    @abstractmethod
    def build_model(self, config: "FinetuneConfig") -> Any:
        """The model that training starts from: pretrained with a new head, or, where a setting goes on from
        it, fine-tuned. Its random weights come from the global generator, which the caller has seeded.

        Raises:
            UserError: no such model, or one that cannot do this task.
        """

    @abstractmethod
    def training_items(self, items: Sequence[Any], model: Any) -> tuple[Sequence[Any], Sequence[Any]]:
        """(items that train anything, the others)."""

    @abstractmethod
    def batches(
        self, pipeline: Pipeline, items: Sequence[Any], order: BatchOrder, extra: ExtraInputs | None = None
    ) -> EpochBatches:
        """Training batches, of which each worker makes its part."""

    @abstractmethod
    def objective(self, config: "FinetuneConfig", model: Any, added: LossTerms) -> Objective:
        """The loss of a batch with the strategies' terms: `forward(batch)` -> (this worker's share of the
        loss, {by name, its terms: means over the global batch}).

        Raises:
            UserError: a term reads what this task does not compute.
        """

    # ---- evaluation

    @abstractmethod
    def evaluate(
        self, pipeline: Pipeline, sets: Mapping[str, Iterable[Any]], folder: Path
    ) -> dict[str, dict[str, Any]]:
        """{language: figures} of these sets, which can be gone through twice; predictions, and whatever is
        gone afterwards, lie in `folder`. All workers together, all return the same."""

    def evaluate_dev(
        self, pipeline: Pipeline, sets: Mapping[str, Iterable[Any]], folder: Path
    ) -> dict[str, dict[str, Any]]:
        """{language: figures} of dev sets, as of `evaluate`, or less that `dev_score` reads."""
        return self.evaluate(pipeline, sets, folder)

    @abstractmethod
    def dev_score(self, config: "FinetuneConfig", figures: dict[str, Any]) -> Score:
        """The score that chooses a checkpoint, of a language's figures."""

    @abstractmethod
    def dev_score_name(self, config: "FinetuneConfig") -> str:
        """The name of that score in tables."""

    def test_details(
        self, config: "FinetuneConfig", figures: dict[str, dict], folder: Path
    ) -> dict[str, dict]:
        """Figures of the final evaluation, with what is worth computing there alone."""
        return figures

    @abstractmethod
    def test_score(self, figures: dict[str, Any]) -> float:
        """The one score of a language's figures."""

    @abstractmethod
    def summarise(self, figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Entries of `result.json` from the figures of all languages, their intervals apart."""

    # ---- splits

    def languages_of(self, config: "FinetuneConfig") -> tuple[str, ...]:
        """The languages that are evaluated."""
        return config.languages or self.languages

    def read_split(
        self, config: "FinetuneConfig", split: str, language: str, limit: int | None = None
    ) -> Reading:
        """A split under `config.data`."""
        return Reading(
            self, self.path(Path(config.data), split, language, config.shots), split, language, limit
        )

    def has(self, name: str, language: str) -> bool:
        """Return whether there is a split `name` in `language`."""
        return name in self.splits or f"{name}.{language}" in self.splits

    def split(self, name: str, language: str) -> Split:
        """The split `name` in `language`.

        Raises:
            UserError: the task has no such split (those it has are named).
        """
        found = self.splits.get(f"{name}.{language}") or self.splits.get(name)
        if found is None:
            raise UserError(f"this task has no split '{name}'; it has {', '.join(sorted(self.splits))}")
        return found

    def paths(self, folder: Path, name: str, language: str, shots: int | str = "") -> list[Path]:
        """Return where the split may lie under the data folder: the first that is there is read."""
        return [folder / path for path, _ in self.split(name, language).places(language, shots)]

    def path(self, folder: Path, name: str, language: str, shots: int | str = "") -> Path:
        """Return where the split lies under the data folder; where it lies nowhere, where it is looked for
        first."""
        paths = self.paths(folder, name, language, shots)
        return next((path for path in paths if path.exists()), paths[0])

    def source(self, name: str, language: str) -> tuple[str, ...]:
        """Return what tells the items of a split in one language from those in another: its file, and what
        its reader is told."""
        split = self.split(name, language)
        return split.path.replace("{language}", language), *(
            _fill(v, language=language) for v in split.options.values()
        )

    def read(self, path: Path, name: str, language: str) -> Iterator[Any]:
        """The items of the split `name` in `language`, from `path`, one of its places.

        Raises:
            UserError: no such file (all places are named); what the reader finds wrong.
        """
        places = list(self.split(name, language).places(language, "*"))
        found = next((place for place in places if path.match(place[0])), places[0])
        if not path.exists():
            advice = self._missing_file_advice(path, name, places, found[0])
            raise UserError(f"{path}: no such file ({name} in '{language}'){advice}")
        split = found[1]
        options = {k: _fill(v, language=language) for k, v in split.options.items()}
        try:
            inspect.signature(split.read).bind(path, **options)
        except TypeError as e:
            takes = ", ".join([*inspect.signature(split.read).parameters][1:]) or "none"
            raise UserError(f"split '{name}': {split.read.__name__}: {e}; its options are {takes}") from None
        return _read(split.read, path, options)

    def _missing_file_advice(self, path: Path, name: str, places: list[tuple[str, Split]], place: str) -> str:
        """Return advice about a missing file at `place` in the data folder: where else it was looked for, in
        which languages it is there, and which files are similar."""
        others = [other for other, _ in places if other != place]
        advice = f", nor {', nor '.join(others)}" if others else ""
        advice += "; check data=, languages=, shots="
        if name == "translated" or name.endswith(("_to_en", "_from_en")):
            advice += ", or make translations (polyglance data translate)"
        pattern = places[0][0].rpartition("/")[2]
        if "*" in pattern and path.parent.is_dir():
            head, _, tail = pattern.partition("*")
            sizes = [p.name.removeprefix(head).removesuffix(tail) for p in path.parent.glob(pattern)]
            similar = sorted((s for s in sizes if s[:1].isdigit()), key=lambda s: (len(s), s))
            return (
                f"{advice}; shots= can be {', '.join(similar)}"
                if similar
                else f"{advice}; this language has no few-shot file"
            )
        folder = Path(*path.parts[: -len(Path(place).parts)])
        found = [
            code
            for code in self.languages
            if any(any(folder.glob(other)) for other, _ in self.split(name, code).places(code, "*"))
        ]
        if found:
            return f"{advice}; it is there in {', '.join(found)}"
        advice += old_scenes_hint(folder)
        similar = sorted(p.name for p in path.parent.iterdir())[:8] if path.parent.is_dir() else []
        return advice + (f"; beside it are {', '.join(similar)}" if similar else "")

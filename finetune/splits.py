"""A task's record, and where its splits lie under the data folder."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from finetune.examples import Captioned, Example
from raylib.errors import UserError


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
            path = split.path.format(language=language, shots=shots)
            if path.endswith(".zip"):
                yield path.removesuffix(".zip"), split
            yield path, split


class Overlap(NamedTuple):
    """Overlap of two sets of a published task, as its files have it.

    first, second: "test", "dev" or "train" (shots are trained on). language, other: of `first`, of `second`;
    None: any. images, items: how many at most; None: nobody has said how many, so whatever is found is told,
    and no error, unless it is
        the same record.
    why: where that is known from.
    """

    first: str
    second: str
    images: int | None
    items: int | None
    why: str
    language: str | None = None
    other: str | None = None


class Task(NamedTuple):
    """One task.

    kind: "answers" (an open set of answers), "labels" (a closed one, in IGLUE's order) or "retrieval".
    pictures: how many ground a text; 1 for a premise.
    languages: those of the test files, English first.
    answers: where the answer set lies, if it comes as a file (the first that is there is read).
    bleu: also BLEU, for answers that are sentences; "ja" cuts Japanese into words first.
    item: what tells an item from others where splits are compared (`finetune.overlap`): its text or number
    with its images;
        the text alone, or the number with them; or the text with them, or the number alone.
    mscoco: images are MSCOCO's: a bare number names one of them.
    overlaps: what its published splits share.
    split_names: what results call a split whose setting has another name.
    """

    summary: str
    kind: Literal["answers", "labels", "retrieval"]
    languages: tuple[str, ...]
    splits: Mapping[str, Split]
    labels: tuple[str, ...] = ()
    pictures: int = 1
    answers: tuple[str, ...] = ()
    bleu: str | None = None
    item: Literal["grounded", "text", "number"] = "grounded"
    mscoco: bool = False
    overlaps: tuple[Overlap, ...] = ()
    split_names: Mapping[str, str] = {}

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
            v.format(language=language) for v in split.options.values()
        )

    def read(self, path: Path, name: str, language: str) -> Iterator[Example] | Iterator[Captioned]:
        """The items of the split `name` in `language`, from `path`, one of its places.

        Raises:
            UserError: no such file (all places are named); what the reader finds wrong.
        """
        places = list(self.split(name, language).places(language, "*"))
        here = next((place for place in places if path.match(place[0])), places[0])
        if not path.exists():
            others = [place for place, _ in places if place != here[0]]
            raise UserError(
                f"{path}: no such file ({name} in '{language}'){self._beside(path, places, others)}"
            )
        split = here[1]
        return split.read(path, **{k: v.format(language=language) for k, v in split.options.items()})

    def _beside(self, path: Path, places: list[tuple[str, Split]], others: list[str]) -> str:
        """Return what to say of a file that is not there: where else it was looked for, and which like it
        are."""
        said = f", nor {', nor '.join(others)}" if others else ""
        said += "; check data=, languages=, shots="
        pattern = places[0][0].rpartition("/")[2]
        if "*" in pattern and path.parent.is_dir():
            head, _, tail = pattern.partition("*")
            sizes = [p.name.removeprefix(head).removesuffix(tail) for p in path.parent.glob(pattern)]
            there = sorted((s for s in sizes if s[:1].isdigit()), key=lambda s: (len(s), s))
            return (
                f"{said}; shots= can be {', '.join(there)}"
                if there
                else f"{said}; this language has no few-shot file"
            )
        if any((parent / "scenes.jsonl").is_file() for parent in path.parents):
            said += (
                "; emoji scenes that were made before may lack it: make them anew (python -m "
                "raylib.sample.scenes OUT)"
            )
        there = sorted(p.name for p in path.parent.iterdir())[:8] if path.parent.is_dir() else []
        return said + (f"; beside it are {', '.join(there)}" if there else "")

"""A drill: one row of the table, and what it is given."""

import inspect
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tests.drills.runs import (
    Case,
    Data,
    outcome,
    require_each_sample_once,
    run_to_end,
    samples_of,
)

ROOT = Path(__file__).resolve().parents[2]
T = TypeVar("T")
ROWS: dict[str, Callable[["Drill"], None]] = {}


class NotRun(Exception):
    """This machine cannot do it: why."""


class Reference(NamedTuple):
    """What a run that nothing disturbed came to, the samples of its steps, and the seconds that it took."""

    outcome: dict[str, Any]
    samples: dict[int, list[int]]
    seconds: float


class Workshop:
    """What the rows share: data, undisturbed runs, all of them made when they are first asked for."""

    def __init__(self, folder: Path, data: Data):
        self.folder, self.data = folder, data
        self._references: dict[tuple[Case, int], Reference] = {}
        self.outcomes: dict[str, dict[str, Any]] = {}  # of other undisturbed runs, by name

    def reference(self, case: Case, world: int = 1) -> Reference:
        """Return what `case` comes to if nothing disturbs it, on so many workers."""
        if (case, world) not in self._references:
            runs = Path(tempfile.mkdtemp(prefix="undisturbed-", dir=self.folder))
            began = time.perf_counter()
            run_to_end(case, runs, world=world)
            seconds = time.perf_counter() - began
            samples = samples_of(runs, world)
            require_each_sample_once(case, samples)
            self._references[case, world] = Reference(outcome(runs / "run"), samples, seconds)
        return self._references[case, world]


class Drill:
    """A row while it runs.

    Attributes:
        count: kills, or whatever else it does to runs, so far.
        quick: do a small part of it.
        only: text that is in the places at which to disturb; "": all of them.
        rng: seeded.
    """

    def __init__(self, name: str, workshop: Workshop, seed: int, quick: bool, only: str):
        self.name, self.workshop, self.quick, self.only = name, workshop, quick, only
        self.data = workshop.data
        self.rng = random.Random(f"{seed} {name}")
        self.folder = workshop.folder / name
        self.folder.mkdir()
        self.count = 0
        self.tried = 0
        self.failures: list[str] = []

    def some(self, items: Sequence[T], few: int = 6) -> list[T]:
        """Return the items that are to be tried: all, those that --only names, or a few."""
        chosen = [item for item in items if self.only in str(item)]
        return chosen[:: max(1, len(chosen) // few)] if self.quick else chosen

    def attempt(self, what: object, work: Callable[[Path], None]) -> None:
        """Do `work(folder)` in a folder of its own, which is kept if it fails; then go on."""
        self.tried += 1
        folder = self.folder / f"{self.tried:04d}"
        folder.mkdir()
        try:
            work(folder)
        except NotRun:
            raise
        except Exception as error:
            if not isinstance(error, AssertionError):
                error.add_note(f"at: {what}")
            self.failures.append(
                f"{what}: {type(error).__name__ * (not isinstance(error, AssertionError))}{error}"
            )
            (self.folder / "failures.txt").write_text("\n".join(self.failures) + "\n")
        else:
            shutil.rmtree(folder)

    def finish(self) -> None:
        """Raises AssertionError: an attempt has failed; names the first, and the file of all."""
        if self.failures:
            raise AssertionError(
                f"{len(self.failures)} of {self.tried}: {self.failures[0]}"
                + (f"; all: {self.folder}/failures.txt" if len(self.failures) > 1 else f"; {self.folder}")
            )


def row(function: Callable[[Drill], None]) -> Callable[[Drill], None]:
    """Enter a function as a row of the table, under its name. The first sentence of its docstring says what
    is done; the rest what must hold."""
    assert inspect.getdoc(function), function.__name__
    ROWS[function.__name__] = function
    return function

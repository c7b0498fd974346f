"""What there is to be done for `benchmarks.claims`: pieces of work, what each needs and hangs on, and the
records of those that are done."""

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.claims_search import contest_settings, contest_space
from benchmarks.claims_table import EXPERIMENTS, PRETRAINING_RECIPE, PRETRAININGS, UNTUNED
from benchmarks.results import RESULTS
from finetune.recipes import RECIPES
from pretrain.recipes import RECIPES as PRETRAINING_RECIPES
from raylib.config import Config
from raylib.fileio import read_jsonl, sha256_file

FILE = RESULTS / "claims.jsonl"
TRIALS = 4  # of a choice
TRIAL_SEED = 100  # no seed of an experiment


class Work(NamedTuple):
    """A piece of work: a "choice" of an experiment's settings, a "pretraining" or a "run" of a seed, or a
    "search" of `benchmarks.claims_search`."""

    kind: str
    name: str
    seed: int = 0

    @property
    def label(self) -> str:
        """Name of its folder."""
        name = re.sub(r"\W+", "_", self.name)
        return f"{name}_seed{self.seed}" if self.kind == "run" else f"{self.kind}_{name}_{self.seed}"

    def needs(self) -> "list[Work]":
        """Return the work that must be done before."""
        if self.kind in ("pretraining", "search"):
            return []
        experiment = EXPERIMENTS[self.name]
        seed = TRIAL_SEED if self.kind == "choice" else self.seed
        before = [Work("run", other, seed) for other in (experiment.after, experiment.teacher) if other]
        if self.kind == "run" and (tuner := tuner_of(self.name)):
            before.insert(0, Work("choice", tuner))
        if self.kind == "run" and experiment.pretraining:
            before.append(Work("pretraining", experiment.pretraining, seed))
        return before

    def settings(self) -> list[str]:
        """Return the settings that make this work what it is, for a reader of its record."""
        if self.kind == "pretraining":
            return list(PRETRAININGS[self.name])
        if self.kind == "search":
            return contest_settings(self.name)
        experiment = EXPERIMENTS[self.name]
        grid = [f"{path}: {knob}" for path, knob in experiment.grid.items()] if self.kind == "choice" else []
        return [experiment.recipe, *experiment.settings, *grid]

    def key(self) -> dict[str, Any]:
        """Return what a record must say to be of this work as it is planned now."""
        return {"kind": self.kind, "name": self.name, "seed": self.seed, "config": config_hash(*self[:2])}


@functools.cache
def config_hash(kind: str, name: str) -> str:
    """Return 16 digits of a SHA-256 over all that a work's outcome hangs on beside its seed, model and
    scenes: its settings, what its recipe holds, and the work that it needs."""
    work = Work(kind, name)
    recipe: Config
    more: list[Any] = []
    if kind == "pretraining":
        recipe = PRETRAINING_RECIPES[PRETRAINING_RECIPE]()
    elif kind == "search":
        space = contest_space(name)
        recipe, more = RECIPES[space.recipe](), [space]
    else:
        experiment = EXPERIMENTS[name]
        recipe = RECIPES[experiment.recipe]()
    held = recipe.model_dump(mode="json", exclude={"name", "runs", "model", "data"})
    parts = [work.settings(), _without_empty(held), *more]
    parts += [config_hash(other.kind, other.name) for other in work.needs()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=vars).encode()).hexdigest()[:16]


def _without_empty(settings: Any) -> Any:
    """Leave out what is off, so that a new setting, off by default, makes no record an old one."""
    if not isinstance(settings, dict):
        return settings
    kept = {name: _without_empty(value) for name, value in settings.items()}
    return {name: value for name, value in kept.items() if value not in (None, False, "", [], {})}


class Lab(NamedTuple):
    """Where experiments are made: folder of the runs, scenes, model, file of records; settings that make a
    try-out of each."""

    folder: Path
    scenes: Path
    model: Path
    records: Path = FILE
    limits: tuple[str, ...] = ()

    def read(self) -> list[dict[str, Any]]:
        """Return the records of this model and these scenes."""
        ours = identity(self.model, self.scenes)
        return [r for r in read_jsonl(self.records) if all(r.get(key) == ours[key] for key in ours)]

    def log(self, work: Work) -> Path:
        """Return the file that the output of a piece of work goes to."""
        return self.folder / "logs" / f"{work.label}.log"

    def result(self, name: str, seed: int) -> Path:
        """Return where a run leaves its result."""
        return self.folder / Work("run", name, seed).label / "result.json"


@functools.cache
def identity(model: Path, scenes: Path) -> dict[str, str]:
    """Return {"weights", "scenes"}, hashes of the files: of what records are."""
    return {"weights": hash_files(model, "*.safetensors"), "scenes": hash_files(scenes, "**/*")}


def hash_files(folder: Path, pattern: str) -> str:
    """Return the first 16 digits of a SHA-256 over names and contents of files; not of baselines.json, which
    tells of scenes and changes nothing in them."""
    paths = sorted(path for path in folder.glob(pattern) if path.is_file() and path.name != "baselines.json")
    lines = [f"{path.relative_to(folder)} {sha256_file(path)}" for path in paths]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def tuner_of(name: str) -> str:
    """Return the experiment whose choice of settings one takes; "": the recipe's."""
    source = EXPERIMENTS[name].tuned_as
    return "" if source == UNTUNED else tuner_of(source) if source else name


def num_seeds(name: str) -> int:
    """Seeds of an experiment: one where nothing is trained, so that no seed is of any effect."""
    if EXPERIMENTS[name].recipe.startswith("transfer_zero_shot"):
        return 1
    if EXPERIMENTS[name].pretraining:
        return 3
    # runs of xvnli are short, and its seeds far apart
    return {"xgqa": 5, "xvnli": 8}.get(name.split("/")[0], 3)


def find(records: Sequence[dict[str, Any]], work: Work) -> dict[str, Any] | None:
    """Return the newest record of a piece of work."""
    key = work.key()
    return next((r for r in reversed(records) if all(r.get(k) == v for k, v in key.items())), None)

"""Settings of a search beside its recipe and its space, and the stage that it searches over."""

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from raylib.config import (
    Config,
    Folder,
    FolderNameOrNone,
    differing_paths,
    find_code,
    read_stored_settings,
)
from raylib.errors import UserError, name_some, reading
from raylib.fileio import read_json_object
from raylib.search.space import Space
from raylib.settings import MUTABLE_SETTINGS, LaunchConfig
from raylib.strict_json import check_shape

if TYPE_CHECKING:  # PyTorch, which settings and spaces need not
    from raylib.cache import ObjectCache
    from raylib.lock import Owner
    from raylib.provenance import DataFile
    from raylib.runtime import Reporter

# settings of a search that may grow when it goes on, and those that may be anything: no past trial depends on
# either
GROWING_SETTINGS = ("num_trials", "num_finalists", "final_seeds")
FREE_SETTINGS = (
    "max_hours",
    "max_concurrent",
    "max_failures",
    "repeats",
    "warm_start",
    "gpus_per_trial",
    "callbacks",
    "cpus_per_trial",
)
# and of its recipe; the others of these are set by the search, or say how long a trial is
FREE_RECIPE_SETTINGS = {*MUTABLE_SETTINGS} - {
    "runs",
    "runtime",
    "workers",
    "resume",
    "fit.sharding",
    "fit.stop_after",
    "fit.eval_every",
    "fit.save_every",
}
POPULATION_FIXED = ("num_trials", "max_concurrent")  # members of a population begin together
DevSets = Literal["english_dev", "target_dev", "both"]
Repeats = Literal["score", "replicate"]
# the metrics that a search may maximise, by the dev sets that it may look at
GOALS: dict[str, tuple[str, ...]] = {
    "english_dev": ("english_dev",),
    "target_dev": ("target_dev",),
    "both": ("english_dev", "target_dev"),
}


class SearchConfig(Config):
    """Settings of a search; all others on its command line are its recipe's."""

    stored_as = "search"
    recipe: str
    """Of the trials."""
    name: FolderNameOrNone = ""
    """The search lives in `runs`/`name`; "": it is called by space and recipe."""
    runs: Folder = "runs"
    """Folder of the search's folder."""
    num_trials: PositiveInt = 20
    """Number of settings to try; may grow when the search goes on."""
    max_hours: PositiveFloat | None = None
    """Hours after which no trial begins, over all starts of the search; those that run go to their end."""
    repeats: Repeats = "score"
    """Of a setting that is proposed again: score, its trial is not trained and takes the first one's score;
    replicate, it is trained on another seed, and the report pools both."""
    warm_start: str | None = None
    """Folder of another search, whose finished trials tpe and priorband learn from, where they lie in the
    space."""
    algorithm: Literal["tpe", "priorband", "random", "grid", "nsga2", "cmaes", "pbt"] = "tpe"
    """tpe, nsga2 (two goals), cmaes (numbers alone) and random are Optuna's; priorband samples around
    published settings too; grid goes through the space's grid; pbt is population-based training of
    `num_trials` members, who change every `perturb_every` epochs."""
    early_stopping: Literal["asha", "median", "none"] = "asha"
    """asha stops trials that are behind others after `min_epochs`, `min_epochs` x `reduction_factor`, ...
    epochs (of two goals: by dominance, then hypervolume); median those below the median of one goal."""
    dev_sets: DevSets = "english_dev"
    """Those that may be looked at: English ones (true zero-shot), the target languages', or both as two
    goals."""
    metric: str | None = None
    """The goal, if not that of `dev_sets`: one of these dev sets, "dev/de"."""
    workers_per_trial: PositiveInt | None = None
    """null trains in the trial's process; a number trains with so many workers of Ray Train under ZeRO-2."""
    gpus_per_trial: NonNegativeFloat | None = None
    """Of a trial in its own process, also a fraction; null: a whole GPU, if the cluster has any."""
    cpus_per_trial: PositiveFloat | None = None
    """Of a trial in its own process, for itself and for its loader processes; null: its GPU's share of those
    of a node, without a GPU one."""
    max_concurrent: PositiveInt | None = None
    """Trials at a time; null: as many as fit."""
    min_epochs: PositiveInt = 1
    """Epochs after which a trial is first compared with others."""
    reduction_factor: float = Field(default=3.0, gt=1)
    """Of the trials at a rung of asha, one in so many goes on."""
    perturb_every: PositiveInt = 1
    """Epochs of pbt between changes of settings."""
    num_finalists: PositiveInt = 3
    """The best so many settings, and the published one, are run once more; may grow."""
    final_seeds: NonNegativeInt = 3
    """Fresh seeds that these are run on; may grow. 0: none is."""
    max_failures: NonNegativeInt = 1
    """How often a trial that crashes is tried again."""
    callbacks: str | None = None
    """Python file that defines `callbacks()`, which returns Ray Tune's own: loggers of W&B, MLflow, Comet."""
    seed: int = 0
    """Of the algorithm; the trials have the recipe's."""

    @model_validator(mode="after")
    def _check_combinations(self) -> "SearchConfig":
        if self.dev_sets == "both" and self.algorithm in ("cmaes", "pbt", "priorband"):
            raise ValueError(
                f"algorithm={self.algorithm} has one goal; dev_sets=both has two: take tpe or nsga2"
            )
        if self.dev_sets == "both" and self.metric:
            raise ValueError("dev_sets=both has its two goals; leave metric out")
        if self.algorithm == "nsga2" and self.dev_sets != "both":
            raise ValueError("algorithm=nsga2 is for two goals: set dev_sets=both, or take tpe")
        if self.algorithm == "pbt" and self.workers_per_trial:
            raise ValueError("algorithm=pbt trains in the trial's process; leave workers_per_trial out")
        if self.algorithm == "pbt" and self.max_hours:
            raise ValueError("algorithm=pbt begins all its members at once; leave max_hours out")
        if self.dev_sets == "both" and self.early_stopping == "median":
            raise ValueError(
                "early_stopping=median is for one goal; dev_sets=both has two: take asha or none"
            )
        if self.warm_start and self.algorithm not in ("tpe", "priorband"):
            raise ValueError(
                f"algorithm={self.algorithm} learns nothing from other trials; leave warm_start out, or take "
                "tpe or priorband"
            )
        return self

    @property
    def goals(self) -> tuple[str, ...]:
        """The metrics to maximise; a table is ordered by the first of two."""
        return (self.metric,) if self.metric else GOALS[self.dev_sets]

    @property
    def stops_trials(self) -> bool:
        """True if trials may be stopped before their end."""
        return self.early_stopping != "none" and self.algorithm != "pbt"


class SearchJob(ABC):
    """A stage of training as a search sees it; each stage has one in `tune_spaces.jobs`. The defaults are for
    a stage that is one training, whose method is complete from its first epoch on."""

    command: str  # that runs a config file
    more_epochs_hint: str  # how a trial gets more epochs
    mutable_paths: tuple[str, ...]  # config paths that may change in mid-run, of any config

    @abstractmethod
    def trial_config(self, config: Any, dev_sets: DevSets) -> Any:
        """Return `config` as a trial runs it: it looks at `dev_sets`, at no test set.

        Raises:
            UserError: there is no such dev set.
        """

    def population_config(self, config: Any) -> Any:
        """Return a trial's config as a member of a population runs it, whose settings change in mid-run."""
        return config

    def mutable_paths_of(self, config: Any) -> tuple[str, ...]:
        """Return the paths of `config` that may change in mid-run."""
        return self.mutable_paths

    def final_config(self, config: Any) -> Any:
        """Return a trial's config as a person runs it, with tests."""
        return config

    @abstractmethod
    def describe_selection(self, dev_sets: DevSets) -> str:
        """Say for a report which data choose among trials."""

    @abstractmethod
    def metric_names(self, config: Any, dev_sets: DevSets) -> tuple[str, ...]:
        """Return the names of the scores that a trial with this config reports."""

    @abstractmethod
    def check_config(self, config: Any) -> None:
        """Find mistakes of data and model before anything starts.

        Raises:
            UserError: there is one.
        """

    def release(self) -> None:  # noqa: B027
        """Free the memory that `check_config` took: no more configs will be checked."""

    def num_runs(self, config: Any) -> int:
        """Return how many trainings a trial is, one after another: of each language, for example."""
        return 1

    @abstractmethod
    def epochs_per_run(self, config: Any) -> int:
        """Return how many epochs each of them has."""

    def stage_epochs(self, config: Any) -> int:
        """Return how many of these are pruning rounds, whose model is not the trial's."""
        return 0

    def warmup_epochs(self, config: Any) -> int:
        """Return after how many epochs of a run its method is complete: earlier scores compare nothing."""
        return 1

    @abstractmethod
    def parse_report(self, config: Any, metrics: dict[str, Any]) -> tuple[float, dict[str, float]]:
        """Return (epochs of this training that are done, {name: score}) of what a checkpoint reports."""

    @abstractmethod
    def data_files(self, config: Any) -> "list[DataFile]":
        """Return the files that a trial of this config reads."""

    @abstractmethod
    def verifies_content(self, config: Any) -> bool:
        """Return whether the content of these is to be compared at every start."""

    @abstractmethod
    def run(self, config: Any, reporter: "Reporter") -> dict[str, float]:
        """Run it, or go on; return the scores of the model that it leaves."""

    def evaluate_tests(self, folder: str) -> dict[str, float]:
        """Evaluate a finished run on the test sets: {"English", "targets"}; {} if there are none."""
        return {}


class SearchContext(NamedTuple):
    """A search that is under way, as each of its trials gets it. `base`: the config of the stage that
    settings change; `folder`: of the search, absolute; `warm_start`: in words; `owner`: of its lock."""

    config: SearchConfig
    space_name: str
    space: Space
    job: SearchJob
    base: Any
    folder: Path
    object_cache: "ObjectCache"
    warm_start: str = ""
    owner: "Owner | None" = None

    @property
    def keeps_checkpoints(self) -> bool:
        """True if Tune keeps checkpoints too: members of a population go on from each other's."""
        return self.config.algorithm == "pbt"


class Resources(NamedTuple):
    """`trial`: Tune's for a trial; `test`: Ray's options for evaluating a run; `max_concurrent` trials."""

    trial: dict[str, float]
    test: dict[str, float]
    max_concurrent: int | None


class StoredSearch(BaseModel):
    """`search.json`."""

    search: dict[str, Any]
    recipe: dict[str, Any]


def check_fingerprint(folder: Path, fingerprint: dict[str, Any], recipe: type[LaunchConfig]) -> list[str]:
    """Refuse to go on with another search than the one whose folder this is. Settings that are newer than the
    folder have their defaults there. Returns in words what there is more of.

    Raises:
        UserError: it has other settings, which are named.
    """
    stored = read_search(folder, recipe, fingerprint)
    if stored is None:
        return []
    before, now = stored["search"], fingerprint["search"]
    fixed = POPULATION_FIXED if now["algorithm"] == "pbt" else ()
    may_change = {f"search.{name}" for name in (*GROWING_SETTINGS, *FREE_SETTINGS) if name not in fixed}
    may_change |= {f"recipe.{name}" for name in FREE_RECIPE_SETTINGS}
    changed = [name for name in differing_paths(stored, fingerprint) if name not in may_change]
    if changed:
        raise UserError(
            f"{folder} holds a search with other settings ({name_some(changed)}); give this one another name="
        )
    for name in GROWING_SETTINGS:
        if now[name] < before.get(name, now[name]):
            raise UserError(
                f"{folder} holds a search with {name}={before[name]}, which can only grow: "
                f"{name}={now[name]} would leave out what was run; give this one another name="
            )
    grown = [name for name in GROWING_SETTINGS if now[name] > before.get(name, now[name])]
    hours, hours_before = now["max_hours"], before.get("max_hours")
    if hours_before is not None and (hours is None or hours > hours_before):
        grown.append("max_hours")
    return [f"{name}={now[name]} ({before[name]} before)" for name in grown]


def read_search(
    folder: Path, recipe: type[LaunchConfig], own: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Return {"space", "search", "recipe"} of the search in `folder`, by the names of today; None: there is
    none.

    own: the same of the search that is asked for. To fill in what was not stored runs code that settings
    name: it is left as it is where they name other code than these do.
    """
    if not os.path.lexists(folder / "search.json"):
        return None
    advice = "restore it, or remove it to go on with the settings that are given now"
    path, what = folder / "search.json", "the settings of a search"
    stored = read_json_object(path, (), what, advice, shape=StoredSearch)
    known = {code for _, code in find_code(own)}
    for part, kind in (("search", SearchConfig), ("recipe", recipe)):
        if all(code in known for _, code in find_code(stored[part])):
            stored[part] = read_stored_settings(kind, stored[part]).values
    with reading(path, what, advice):
        amounts = {name: stored["search"].get(name) for name in (*GROWING_SETTINGS, "max_hours")}
        check_shape(amounts, dict[str, float | None])
    return stored

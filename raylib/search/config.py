"""What a search depends on, beside the recipe and the space."""

from typing import Any, Literal, NamedTuple, Protocol

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from raylib.config import Config
from raylib.launch import LaunchConfig
from raylib.provenance import DataFile
from raylib.runtime import Reporter

Select = Literal["english_dev", "target_dev", "both"]
GOALS: dict[str, tuple[str, ...]] = {  # what a search may look at, and so what it can be after
    "english_dev": ("english_dev",),
    "target_dev": ("target_dev",),
    "both": ("english_dev", "target_dev"),
}


class SearchConfig(Config):
    """recipe: what the trials run. name, runs: the search lives in `runs`/`name`; "" is called by space and
    recipe. trials: how many settings. search: tpe, nsga2, cmaes and random are Optuna's; grid goes through
    the space's grid; pbt is
        population-based training of `trials` members, who change every `perturb` epochs.
    stop: asha stops trials that are behind others after `grace`, `grace` x `reduction`, ... epochs; median
        those below the median. With two goals nothing is stopped.
    select: which dev sets may be looked at: English ones (true zero-shot), the target languages', or both as
    two goals. metric: what is searched for, if not what `select` says: a dev set it may look at, "dev/de".
    workers: None trains in the trial's process; a number trains with so many workers of Ray Train under
    ZeRO-2. gpus_per_trial, cpus_per_trial: of a trial in its own process; None: a whole GPU, if the cluster
    has any. concurrent: trials at a time; None: as many as fit. top, seeds: the best so many settings, and
    the published one, are run on so many fresh seeds. max_failures: how often a trial that crashes is tried
    again. seed: of the searcher; the trials all have the recipe's.
    """

    stored_as = "search"

    recipe: str
    name: str = Field("", pattern=r"^[\w.-]*$")
    runs: str = "runs"
    trials: PositiveInt = 20
    search: Literal["tpe", "random", "grid", "nsga2", "cmaes", "pbt"] = "tpe"
    stop: Literal["asha", "median", "none"] = "asha"
    select: Select = "english_dev"
    metric: str | None = None
    workers: PositiveInt | None = None
    gpus_per_trial: NonNegativeFloat | None = None
    cpus_per_trial: PositiveFloat = 1.0
    concurrent: PositiveInt | None = None
    grace: PositiveInt = 1
    reduction: float = Field(3.0, gt=1)
    perturb: PositiveInt = 1
    top: PositiveInt = 3
    seeds: NonNegativeInt = 3
    max_failures: NonNegativeInt = 1
    seed: int = 0

    @model_validator(mode="after")
    def _fits(self) -> "SearchConfig":
        if self.select == "both" and self.search in ("cmaes", "pbt"):
            raise ValueError(f"search={self.search} has one goal; select=both has two: take tpe or nsga2")
        if self.select == "both" and self.metric:
            raise ValueError("select=both has its two goals; leave metric out")
        if self.search == "nsga2" and self.select != "both":
            raise ValueError("search=nsga2 is for two goals: set select=both, or take tpe")
        if self.search == "pbt" and self.workers:
            raise ValueError("search=pbt trains in the trial's process; leave workers out")
        return self

    @property
    def goals(self) -> tuple[str, ...]:
        """What is searched for: the first of two is what a table is ordered by."""
        return (self.metric,) if self.metric else GOALS[self.select]

    @property
    def stops(self) -> bool:
        """Whether trials may be stopped before their end."""
        return self.stop != "none" and self.select != "both" and self.search != "pbt"


class SearchJob(Protocol):
    """What can be searched over: a stage, as its room describes it (`tune_spaces.jobs`)."""

    command: str  # that runs a config file
    more_epochs_hint: str  # how a trial gets more epochs
    mutable_paths: tuple[str, ...]  # config paths that may change in mid-run

    def trial_config(self, config: LaunchConfig, select: Select) -> LaunchConfig:
        """`config` as a trial runs it: it looks at the dev sets of `select`, at no test set.

        Raises:
            UserError: there is no such dev set.
        """

    def describe_selection(self, select: Select) -> str:
        """What is looked at, as a report says it."""

    def metric_names(self, config: LaunchConfig, select: Select) -> tuple[str, ...]:
        """What a trial of this (searched) config tells, of what may be looked at."""

    def check_config(self, config: LaunchConfig) -> None:
        """Find mistakes of data and model before anything starts.

        Raises:
            UserError: there is one.
        """

    def release(self) -> None:
        """No more will be checked: let go of what that took."""

    def num_runs(self, config: LaunchConfig) -> int:
        """How many trainings a trial is, one after another: of each language by itself, for example."""

    def epochs_per_run(self, config: LaunchConfig) -> int:
        """How many epochs a part has."""

    def pruning_epochs(self, config: LaunchConfig) -> int:
        """How many of them are for something else than the model: pruning rounds."""

    def warmup_epochs(self, config: LaunchConfig) -> int:
        """After how many epochs of a part its method is what it will be: before, a trial is not judged."""

    def parse_report(self, config: LaunchConfig, metrics: dict[str, Any]) -> tuple[float, dict[str, float]]:
        """(epochs of this training that are done, scores), of what a checkpoint reports."""

    def data_files(self, config: LaunchConfig) -> list[DataFile]:
        """Return the files that a trial of this config reads."""

    def verifies_content(self, config: LaunchConfig) -> bool:
        """True if the content of these is to be compared at every start."""

    def run(self, config: LaunchConfig, reporter: Reporter) -> dict[str, float]:
        """Run it, or go on; the scores of the model that it leaves."""

    def evaluate_tests(self, folder: str) -> dict[str, float]:
        """Evaluate a finished run on the test sets: {"English", "targets"}; nothing where there are none."""

    def final_config(self, config: LaunchConfig) -> LaunchConfig:
        """A searched config as a person runs it, with tests."""


class Searching(NamedTuple):
    """A search that is under way, as every trial of it knows it. keep: Tune keeps checkpoints too;
    object_cache: what trials share."""

    job: SearchJob
    knobs: Any
    base: LaunchConfig
    folder: str
    keep: bool
    object_cache: Any

"""The last stage: the best settings, and the published one beside them, on fresh seeds; then the test sets,
for the winner."""

import itertools
import math
import os
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import ray
from pydantic import Field
from ray import tune
from ray.exceptions import RayTaskError
from ray.tune.search import BasicVariantGenerator

from raylib.cache import set_cache
from raylib.errors import UserError, reading
from raylib.fileio import read_json, write_json
from raylib.finite import require_finite_values
from raylib.lock import make_folder, work_for
from raylib.search.config import Resources, SearchContext
from raylib.search.display import SearchTable
from raylib.search.space import Setting, SettingKey, describe_setting
from raylib.search.trial import (
    TrialResult,
    drop_checkpoints,
    final,
    has_checkpoints,
    logged,
    read_reports,
    repair_reports,
)
from raylib.search.tuner import load_callbacks, run_tuner
from raylib.strict_json import check_shape

PUBLISHED = "published"
FINALISTS = "settings.json"  # of the final runs, in their folder


class Finalist(NamedTuple):
    """A setting on every fresh seed. name: its rank among the trials, or "published"; setting: None is the
    recipe as it is. dev, test: {seed: {name: score}} of the runs that finished; num_failed: the others;
    number: in the names of their folders."""

    name: str
    setting: Setting | None
    dev: dict[int, dict[str, float]]
    test: dict[int, dict[str, float]]
    num_failed: int
    number: int = 0

    def scores(self, name: str) -> dict[int, float]:
        """Return {seed: score} of the seeds that have this score, of the dev sets or of the test sets."""
        of_seeds = {seed: {**self.dev[seed], **self.test.get(seed, {})} for seed in self.dev}
        return {seed: scores[name] for seed, scores in of_seeds.items() if scores.get(name) is not None}


def run_finalists(
    context: SearchContext, results: Sequence[TrialResult], resources: Resources
) -> list[Finalist]:
    """Run the finalists, on the seeds that they lack; return them best first: those that finished on more
    seeds, then by the mean of the goals. The winner and the published setting are tested."""
    config, folder = context.config, context.folder / "finals"
    names, settings = _choose_finalists(context, results, folder)
    if not config.final_seeds:
        return [Finalist(name, setting, {}, {}, 0) for name, setting in zip(names, settings, strict=True)]
    seeds = [context.base.fit.seed + 1 + i for i in range(config.final_seeds)]
    dev = _train(context, settings, seeds, resources)

    def rank(i: int) -> tuple[int, float]:
        means = [_mean(scores, config.goals) for scores in dev[i].values()]
        return -len(dev[i]), -statistics.fmean(means or [-math.inf])

    order = sorted(range(len(settings)), key=rank)
    # Test sets choose nothing: they are looked at once the order is fixed, for the two that are compared.
    tested = sorted({order[0], names.index(PUBLISHED) if PUBLISHED in names else order[0]})
    runs = {(i, seed): folder / f"setting{i}_seed{seed}" for i in tested for seed in dev[i]}
    # with fewer seeds another setting may have won, and this one's weights were not kept: the same seeds give
    # them again
    dropped = [run for run in runs.values() if not (run / "test.json").is_file() and not has_checkpoints(run)]
    for run in dropped:
        shutil.rmtree(run)
    if dropped:
        dev = _train(context, settings, seeds, resources)
    finalists = [
        Finalist(name, setting, scores, {}, len(seeds) - len(scores), i)
        for i, (name, setting, scores) in enumerate(zip(names, settings, dev, strict=True))
    ]
    for i in tested:
        of_setting = {seed: runs[i, seed] for seed in dev[i]}
        finalists[i] = finalists[i]._replace(test=_evaluate_tests(context, of_setting, resources.test))
    for i in order[1:]:
        for run in folder.glob(f"setting{i}_seed*"):
            drop_checkpoints(run)
    return [finalists[i] for i in order]


def _train(
    context: SearchContext, settings: list[Setting | None], seeds: Sequence[int], resources: Resources
) -> list[dict[int, dict[str, float]]]:
    """Train every setting on every seed, but where that is done; return {seed: scores} of each setting, of
    the runs that finished."""
    config, folder = context.config, context.folder / "finals"
    metrics = context.job.metric_names(context.base, config.dev_sets)
    cells = list(itertools.product(range(len(settings)), seeds))
    for run in sorted(folder.glob("setting*_seed*")):
        for note in repair_reports(run):
            print(f"search '{config.name}': {note}", flush=True)

    def scores(i: int, seed: int) -> dict[str, float] | None:
        reports = read_reports(folder / f"setting{i}_seed{seed}")
        last = next((report for report in reversed(reports) if report.get("finished")), None)
        return last and {name: last[name] for name in metrics if name in last}

    def describe(cell: dict[str, Any]) -> str:
        i, seed = cell["cell"]
        return f"seed {seed}: {describe_setting(settings[i] or {}) or 'the recipe as it is'}"

    if missing := [list(cell) for cell in cells if scores(*cell) is None]:
        trainable = tune.with_parameters(final, context=context, settings=settings)
        run_tuner(
            folder / f"tune{len(list(folder.glob('tune*'))) or ''}",
            tune.with_resources(trainable, resources.trial),
            metrics,
            BasicVariantGenerator(max_concurrent=resources.max_concurrent or 0),
            SearchTable(f"final runs of '{config.name}'", config.goals, len(missing), describe),
            num_samples=1,  # of each cell
            callbacks=load_callbacks(config.callbacks),
            config={"cell": tune.grid_search(missing)},
            max_failures=config.max_failures,
            reuse_actors=not config.workers_per_trial,
        )
    dev: list[dict[int, dict[str, float]]] = [{} for _ in settings]
    for i, seed in cells:
        if (of_run := scores(i, seed)) is not None:
            dev[i][seed] = of_run
    return dev


def pool_replicates(context: SearchContext, results: Sequence[TrialResult]) -> list[list[TrialResult]]:
    """Return the finished trials that were trained, those of equal settings together."""
    key = SettingKey(context.space.knobs, context.base)
    groups: dict[str | None, list[TrialResult]] = {}
    for result in results:
        if result.state == "finished" and result.repeat_of is None:
            groups.setdefault(key(result.setting), []).append(result)
    return list(groups.values())


def mean_result(replicates: Sequence[TrialResult]) -> TrialResult:
    """Return the first of some replicates with the mean of their scores."""
    names = [name for name in replicates[0].scores if all(name in result.scores for result in replicates)]
    means = {name: statistics.fmean(result.scores[name] for result in replicates) for name in names}
    return replicates[0]._replace(scores=means)


def pareto_front(results: Sequence[TrialResult], goals: Sequence[str]) -> list[TrialResult]:
    """Return the results that no other is at least as good as in every goal and better in one; best in the
    first goal first."""

    def scores(result: TrialResult) -> list[float]:
        return [result.scores[goal] for goal in goals]

    def is_beaten(result: TrialResult) -> bool:
        values = scores(result)
        return any(
            other != values and all(o >= v for o, v in zip(other, values, strict=True))
            for other in map(scores, results)
        )

    front = [result for result in results if not is_beaten(result)]
    return sorted(front, key=lambda result: -result.scores[goals[0]])


def _choose_finalists(
    context: SearchContext, results: Sequence[TrialResult], folder: Path
) -> tuple[list[str], list[Setting | None]]:
    """Return (names, settings): those of earlier starts, whose runs are called by their places in the list,
    then those of this one that are not among them."""
    goals, settings = context.config.goals, read_finalists(folder)
    pooled = [mean_result(replicates) for replicates in pool_replicates(context, results)]
    front = pareto_front(pooled, goals)  # of one goal: the best
    ranked = sorted(pooled, key=lambda result: (result not in front, -_mean(result.scores, goals)))
    key = SettingKey(context.space.knobs, context.base)
    ranks = {key(result.setting): str(i + 1) for i, result in enumerate(ranked)}
    published = context.space.published[0] if context.space.published else None
    for setting in (*(result.setting for result in ranked[: context.config.num_finalists]), published):
        if setting not in settings:
            settings.append(setting)
    names = [PUBLISHED if s is None or s == published else ranks[key(s)] for s in settings]
    make_folder(folder)
    write_json(folder / FINALISTS, [names, settings])
    return names, settings


def read_finalists(folder: Path) -> list[Setting | None]:
    """Return the settings that earlier starts have chosen; none of a new folder.

    Raises:
        UserError: their file is damaged.
    """
    path = folder / FINALISTS
    if not os.path.lexists(path):
        return []
    advice = f"restore it, or remove {folder} to train the finalists anew"
    what = "[names, settings] of finalists"
    stored = read_json(path, what, advice, shape=Annotated[list[Any], Field(min_length=2, max_length=2)])
    with reading(path, what, advice):
        check_shape(stored[1], list[dict[str, Any] | None])
    return stored[1]


def _mean(scores: dict[str, float], goals: Sequence[str]) -> float:
    return statistics.fmean(scores[goal] for goal in goals)


def _evaluate_tests(
    context: SearchContext, runs: dict[int, Path], resources: dict[str, float]
) -> dict[int, dict[str, float]]:
    """Return {seed: test scores} of some runs, each evaluated once, where a GPU is if they need one."""
    paths = {seed: run / "test.json" for seed, run in runs.items()}
    stored = {seed: read_test_scores(path) for seed, path in paths.items()}
    tests = {seed: scores for seed, scores in stored.items() if scores is not None}
    tasks = {
        seed: _evaluate_remotely.options(**resources).remote(context, str(run))
        for seed, run in runs.items()
        if seed not in tests
    }
    for seed, task in tasks.items():
        try:
            tests[seed] = ray.get(task)
        except RayTaskError as e:  # the same error with a traceback in its message
            raise e.cause from None
        write_json(paths[seed], tests[seed])
    for seed, scores in tests.items():  # earlier versions wrote NaN
        require_finite_values(str(paths[seed]), scores)
    return tests


def read_test_scores(path: Path) -> dict[str, float] | None:
    """Return the test scores of a final run, by their names; None: they are not there, or damaged, which is
    told: the run is evaluated again."""
    if not os.path.lexists(path):
        return None
    try:
        advice = "its run is evaluated again"
        return read_json(path, "test scores", advice, finite=False, shape=dict[str, float])
    except UserError as e:
        print(str(e), flush=True)
        return None


@ray.remote
def _evaluate_remotely(context: SearchContext, folder: str) -> dict[str, float]:
    set_cache(context.object_cache)
    with work_for(context.owner), logged(Path(folder)):
        return context.job.evaluate_tests(folder)

"""The last stage: the best settings, and the published one beside them, on fresh seeds; then the test sets,
for the winner."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import ray
from ray import tune
from ray.exceptions import RayTaskError

from raylib.cache import ObjectCache, set_cache
from raylib.fileio import read_json, write_json
from raylib.finite import require_finite_values
from raylib.search.config import Resources, SearchContext, SearchJob
from raylib.search.optuna import run_tuner
from raylib.search.space import Setting
from raylib.search.trial import TrialResult, drop_checkpoints, final

PUBLISHED = "published"


class Finalist(NamedTuple):
    """A setting on every fresh seed. name: its rank among the trials, or "published"; setting: None is the
    recipe as it is. dev, test: {seed: {name: score}} of the runs that finished; num_failed: the others."""

    name: str
    setting: Setting | None
    dev: dict[int, dict[str, float]]
    test: dict[int, dict[str, float]]
    num_failed: int

    def scores(self, name: str) -> dict[int, float]:
        """Return {seed: score} of the seeds that have this score, of the dev sets or of the test sets."""
        of_seeds = {seed: {**self.dev[seed], **self.test.get(seed, {})} for seed in self.dev}
        return {seed: scores[name] for seed, scores in of_seeds.items() if scores.get(name) is not None}


def run_finalists(
    context: SearchContext, results: Sequence[TrialResult], resources: Resources
) -> list[Finalist]:
    """Run the finalists; return them best first: those that finished on more seeds, then by the mean of the
    goals. The winner and the published setting are tested."""
    config, folder = context.config, context.folder / "finals"
    names, settings = _choose_finalists(context, results, folder)
    if not config.final_seeds:
        return [Finalist(name, setting, {}, {}, 0) for name, setting in zip(names, settings, strict=True)]
    seeds = [context.base.fit.seed + 1 + i for i in range(config.final_seeds)]
    grid = {"setting": tune.grid_search(list(range(len(settings)))), "seed": tune.grid_search(seeds)}
    trainable = tune.with_resources(
        tune.with_parameters(final, context=context, settings=settings), resources.trial
    )
    runs = run_tuner(
        folder / "tune",
        trainable,
        lambda: tune.TuneConfig(
            reuse_actors=not config.workers_per_trial, max_concurrent_trials=resources.max_concurrent
        ),
        context.job.metric_names(context.base, config.dev_sets),
        len(settings) * len(seeds),
        config.max_failures,
        grid,
    )
    dev: list[dict[int, dict[str, float]]] = [{} for _ in settings]
    for run in runs:
        if run.state == "finished":
            dev[run.setting["setting"]][run.setting["seed"]] = run.scores
    finalists = [
        Finalist(name, setting, scores, {}, len(seeds) - len(scores))
        for name, setting, scores in zip(names, settings, dev, strict=True)
    ]

    def rank(i: int) -> tuple[int, float]:
        means = [_mean(scores, config.goals) for scores in dev[i].values()]
        return -len(dev[i]), -statistics.fmean(means or [-math.inf])

    order = sorted(range(len(finalists)), key=rank)
    # Test sets choose nothing: they are looked at once the order is fixed, for the two that are compared.
    tested = {order[0], names.index(PUBLISHED) if PUBLISHED in names else order[0]}
    for i in sorted(tested):
        folders = {seed: folder / f"setting{i}_seed{seed}" for seed in dev[i]}
        finalists[i] = finalists[i]._replace(test=_evaluate_tests(context, folders, resources.test))
    for i in order[1:]:
        for run_folder in folder.glob(f"setting{i}_seed*"):
            drop_checkpoints(run_folder)
    return [finalists[i] for i in order]


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
    """Return (names, settings): decided once, then read from the file, so that a second start has the
    same."""
    path, goals = folder / "settings.json", context.config.goals
    if not path.is_file():
        finished = [result for result in results if result.state == "finished"]
        front = pareto_front(finished, goals)  # of one goal: the best
        ranked = sorted(finished, key=lambda result: (result not in front, -_mean(result.scores, goals)))
        settings: list[Setting | None] = []
        for result in ranked:
            if result.setting not in settings and len(settings) < context.config.num_finalists:
                settings.append(result.setting)
        published = context.space.published[0] if context.space.published else None
        names = [PUBLISHED if setting == published else str(i + 1) for i, setting in enumerate(settings)]
        if PUBLISHED not in names:
            names, settings = [*names, PUBLISHED], [*settings, published]
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, [names, settings])
    names, settings = read_json(path)
    return names, settings


def _mean(scores: dict[str, float], goals: Sequence[str]) -> float:
    return statistics.fmean(scores[goal] for goal in goals)


def _evaluate_tests(
    context: SearchContext, runs: dict[int, Path], resources: dict[str, float]
) -> dict[int, dict[str, float]]:
    """Return {seed: test scores} of some runs, each evaluated once, where a GPU is if they need one."""
    paths = {seed: run / "test.json" for seed, run in runs.items()}
    tasks = {
        seed: _evaluate_remotely.options(**resources).remote(
            context.job, str(runs[seed]), context.object_cache
        )
        for seed, path in paths.items()
        if not path.is_file()
    }
    for seed, task in tasks.items():
        try:
            write_json(paths[seed], ray.get(task))
        except RayTaskError as e:  # the same error with a traceback in its message
            raise e.cause from None
    tests = {seed: read_json(path) for seed, path in paths.items()}
    for seed, scores in tests.items():  # earlier versions wrote NaN
        require_finite_values(str(paths[seed]), scores)
    return tests


@ray.remote
def _evaluate_remotely(job: SearchJob, folder: str, object_cache: ObjectCache) -> dict[str, float]:
    set_cache(object_cache)
    return job.evaluate_tests(folder)

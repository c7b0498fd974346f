"""The last stage: the best settings, and the published one beside them, on fresh seeds; then the test sets,
for the winner."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray
from optuna.trial import TrialState
from ray import tune

from raylib import cache
from raylib.errors import NotFinite
from raylib.fileio import read_json, write_json
from raylib.finite import require_finite_values
from raylib.search import space
from raylib.search.config import SearchConfig, Searching, SearchJob
from raylib.search.optuna import state_of
from raylib.search.trial import final, tidy
from raylib.search.tuner import fitted

PUBLISHED = "published"


class Final(NamedTuple):
    """A setting on every fresh seed. name: its rank among the trials, or "published"; setting: None is the
    recipe as it is. scores, tests: {seed: {figure: value}} of the runs that finished; failed: how many did
    not."""

    name: str
    setting: space.Setting | None
    scores: dict[int, dict[str, float]]
    tests: dict[int, dict[str, float]]
    failed: int

    def of(self, figure: str) -> list[float]:
        """The values of one figure, seed by seed."""
        return [
            values[figure] for values in (*self.scores.values(), *self.tests.values()) if figure in values
        ]


def run(
    config: SearchConfig, chosen: space.Space, search: Searching, rows: Sequence, resources: dict[str, Any]
) -> list[Final]:
    """The finalists, best first: those that finished on more seeds, then by the mean of the goals. The winner
    and the published setting are tested."""
    folder = Path(search.folder) / "finals"
    names, settings = _finalists(config, chosen, rows, folder)
    if not config.seeds:
        return [Final(name, setting, {}, {}, 0) for name, setting in zip(names, settings, strict=True)]
    seeds = [search.base.fit.seed + 1 + i for i in range(config.seeds)]
    grid = {"setting": tune.grid_search(list(range(len(settings)))), "seed": tune.grid_search(seeds)}
    trainable = tune.with_resources(
        tune.with_parameters(final, search=search, settings=settings), resources["trial"]
    )
    tuning = tune.TuneConfig(reuse_actors=not config.workers, max_concurrent_trials=resources["concurrent"])
    results = fitted(
        folder / "tune", trainable, lambda: tuning, grid, config.max_failures, len(settings) * len(seeds)
    )
    metrics, scores = (
        search.job.metric_names(search.base, config.select),
        {which: {} for which in range(len(settings))},
    )
    for result in results:
        if state_of(result.metrics, result.error is not None, metrics) == TrialState.COMPLETE:
            told = {name: result.metrics[name] for name in metrics if name in result.metrics}
            scores[result.config["setting"]][result.config["seed"]] = told
    found = [
        Final(name, setting, scores[i], {}, len(seeds) - len(scores[i]))
        for i, (name, setting) in enumerate(zip(names, settings, strict=True))
    ]
    order = sorted(
        range(len(found)), key=lambda i: (found[i].failed, -_mean_of_goals(found[i], config.goals))
    )
    tested = {order[0], names.index(PUBLISHED) if PUBLISHED in names else order[0]}
    for which in sorted(tested):
        runs = {seed: folder / f"setting{which}_seed{seed}" for seed in found[which].scores}
        found[which] = found[which]._replace(tests=_test(search, runs, resources["test"]))
    for which in set(order) - {order[0]}:
        for run_folder in folder.glob(f"setting{which}_seed*"):
            tidy(run_folder)
    return [found[i] for i in order]


def front(rows: Sequence, goals: Sequence[str]) -> list:
    """The rows that no other is at least as good as in every goal and better in one; best in the first goal
    first."""

    def beaten(row) -> bool:
        mine = [row.scores[g] for g in goals]
        return any(
            all(o >= m for o, m in zip(other, mine, strict=True)) and other != mine
            for other in ([r.scores[g] for g in goals] for r in rows)
        )

    return sorted((row for row in rows if not beaten(row)), key=lambda row: -row.scores[goals[0]])


def _finalists(
    config: SearchConfig, chosen: space.Space, rows: Sequence, folder: Path
) -> tuple[list[str], list]:
    """(names, settings): decided once, then read from the file, so that a second start has the same."""
    path = folder / "settings.json"
    if not path.is_file():
        finished = [row for row in rows if row.state == "finished"]
        unbeaten = front(finished, config.goals)  # of one goal: the best
        ranked = sorted(finished, key=lambda row: (row not in unbeaten, -_mean(row.scores, config.goals)))
        best: list[space.Setting] = []
        for row in ranked:
            if row.setting not in best and len(best) < config.top:
                best.append(row.setting)
        published = chosen.published[0] if chosen.published else None
        names = [PUBLISHED if setting == published else str(i + 1) for i, setting in enumerate(best)]
        if PUBLISHED not in names:
            names, best = [*names, PUBLISHED], [*best, published]
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, [names, best])
    names, settings = read_json(path)
    return names, settings


def _mean(scores: dict[str, float], goals: Sequence[str]) -> float:
    return statistics.fmean(scores[goal] for goal in goals)


def _mean_of_goals(candidate: Final, goals: Sequence[str]) -> float:
    """Over seeds, of the mean of the goals; below all where no run finished."""
    return (
        statistics.fmean(_mean(s, goals) for s in candidate.scores.values())
        if candidate.scores
        else float("-inf")
    )


def _test(
    search: Searching, runs: dict[int, Path], resources: dict[str, float]
) -> dict[int, dict[str, float]]:
    """{seed: test figures} of some runs, each evaluated once, where a GPU is if they need one."""
    known = {seed: run / "test.json" for seed, run in runs.items()}
    tasks = {
        seed: _tested.options(**resources).remote(search.job, str(runs[seed]), search.object_cache)
        for seed, path in known.items()
        if not path.is_file()
    }
    for seed, task in tasks.items():
        figures = ray.get(task)
        if "not_finite" in figures:
            raise NotFinite(f"{runs[seed]}: its test: {figures['not_finite']}")
        write_json(known[seed], figures)
    tests = {seed: read_json(path) for seed, path in known.items()}
    for seed, figures in tests.items():  # earlier versions wrote NaN
        require_finite_values(str(known[seed]), figures)
    return tests


@ray.remote
def _tested(job: SearchJob, folder: str, store: cache.ObjectCache) -> dict[str, Any]:
    """The run's test figures; or {"not_finite": what}, since Ray would wrap the error in a traceback."""
    cache.set_cache(store)
    try:
        return job.evaluate_tests(folder)
    except NotFinite as e:
        return {"not_finite": str(e)}

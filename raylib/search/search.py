"""Run a search: trials under Tune, the best once more on fresh seeds, the winner's test, a report.

runs/NAME/
    search.json        what was asked for; a second start with something else is refused
    tune/, finals/tune Tune's own: state, results, CSV, TensorBoard
    trials/, finals/   the runs
    optuna.journal     Optuna's study, for optuna-dashboard
    trials.csv, best.yaml, report.md, *.png
"""

import itertools
import json
import re
import shutil
from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray import tune
from ray.tune.search import BasicVariantGenerator

from raylib.config import change_settings, dump_config, validate, without_settings
from raylib.errors import UserError
from raylib.fileio import read_json, write_json
from raylib.finite import finite_values
from raylib.launch import VERIFY, LaunchConfig, connect
from raylib.provenance import record_identity
from raylib.renames import rename_settings
from raylib.search import final_runs as finals
from raylib.search import report, space
from raylib.search.cache import RayObjectCache
from raylib.search.config import SearchConfig, Searching, SearchJob
from raylib.search.optuna import JOURNAL, searcher, state_of
from raylib.search.schedulers import check_changeable, population, scheduler
from raylib.search.trial import tidy, trained, trial
from raylib.search.trial_log import read_told
from raylib.search.tuner import fitted

# what may be asked for anew when a search goes on
MAY_CHANGE = ("gpus_per_trial", "cpus_per_trial")
COLOURS = re.compile(r"\x1b\[\d*m")  # of Ray's tracebacks
STATES = {"COMPLETE": "finished", "PRUNED": "stopped", "FAIL": "failed"}
FREE = 0.01  # CPUs of a trial that only waits for its workers: 0 is refused


class Row(NamedTuple):
    """What became of a trial. `state`: finished, stopped or failed; a stopped one has the scores that it was
    stopped at, and is no result. `seconds`: of its own; `start_seconds`: until its first batch."""

    id: str
    state: str
    setting: space.Setting
    scores: dict[str, float]
    epoch: float
    epochs: float
    seconds: float
    start_seconds: float | None
    error: str | None


def run(config: SearchConfig, name: str, chosen: space.Space, job: SearchJob, base: LaunchConfig) -> Path:
    """Search the space called `name` over `base`, or go on where an earlier start of this search was; returns
    its folder.

    Raises:
        UserError: whatever of space, settings, data or model is wrong, before the first trial; no trial
        finished. KeyboardInterrupt: it was interrupted; the same command goes on.
    """
    folder = Path(config.runs).absolute() / config.name
    asked = {
        **json.loads(dump_config(config)),
        "runs": str(folder.parent),
    }  # where Tune's files say that it is
    question = {
        "space": {"name": name, "knobs": space.described(chosen.knobs)},
        "search": asked,
        "recipe": json.loads(dump_config(base)),
    }
    _compare(folder, question, type(base))
    if (folder / "report.md").is_file():
        print(f"search '{config.name}' is complete: {folder}/report.md (another name= starts another search)")
        return folder
    base = prepared(config, name, chosen, job, base)
    started = connect()
    try:
        resources = _resources(config)
        folder.mkdir(parents=True, exist_ok=True)
        # trials that are to come would be compared with finished ones on other data
        files = [
            file for _, values in _telling(chosen) for file in job.data_files(change_settings(base, values))
        ]
        for note in record_identity(folder, dict.fromkeys(files), job.verifies_content(base)):
            print(note, flush=True)
        write_json(folder / "search.json", question)
        search = Searching(
            job, chosen.knobs, base, str(folder), config.search == "pbt", RayObjectCache(folder)
        )
        rows = _trials(config, chosen, search, resources)
        report.write_trials(folder, chosen.knobs, rows)
        if not any(row.state == "finished" for row in rows):
            raise UserError(
                f"no trial finished; what they died of is in {folder}/trials.csv and under {folder}/tune"
            )
        found = finals.run(config, chosen, search, rows, resources)
        report.write(config, name, chosen, job, base, folder, rows, found)
    finally:
        if started:
            ray.shutdown()
    print((folder / "report.md").read_text(encoding="utf-8"))
    print(f"{folder}/report.md, trials.csv; the best: python -m {job.command} --config {folder}/best.yaml")
    return folder


def prepared(
    config: SearchConfig, name: str, chosen: space.Space, job: SearchJob, base: LaunchConfig
) -> LaunchConfig:
    """The config that trials start from, all of it checked.

    Raises:
        UserError: see `run`.
    """
    wanted = (
        {"runtime": "ray", "workers": config.workers}
        if config.workers
        else {"runtime": "local", "workers": 1}
    )
    base = job.trial_config(
        change_settings(base, {**wanted, "name": "trial", "resume": "newest"}), config.select
    )
    if config.search == "pbt" and "select" in type(base).model_fields:
        base = change_settings(
            base, {"select": "last"}
        )  # a model is its member's last, after whatever settings it had
    space.check(name, chosen, base)
    known = job.metric_names(base, config.select)
    for goal in config.goals:
        if goal not in known:
            raise UserError(
                f"metric={goal}: no run reports that; with select={config.select} there are "
                f"{', '.join(known)}"
            )
    if config.search == "grid" and not chosen.grid:
        raise UserError(f"space '{name}' has no grid; leave search=grid out")
    if config.search == "cmaes":
        odd = [path for path, knob in chosen.knobs.items() if isinstance(knob, space.Choice | space.OneOf)]
        if odd:
            raise UserError(f"search=cmaes is for numbers; space '{name}' has {', '.join(odd)}: take tpe")
    if config.search == "pbt":
        check_changeable(chosen.knobs, job.mutable_paths)
    epochs = trained(job, base)
    if config.stops and config.grace >= epochs:
        raise UserError(
            f"stop={config.stop}: a trial is judged after grace={config.grace} epochs, and has {epochs}; set "
            f"stop=none, or {job.more_epochs_hint}"
        )
    for told, values in _telling(chosen):
        try:
            trial_config = change_settings(base, values)
            if config.search == "pbt" and (
                job.num_runs(trial_config) > 1 or job.pruning_epochs(trial_config)
            ):
                raise UserError(
                    "search=pbt: a trial must be one training, for its members take each other's "
                    "checkpoints; this one trains several languages apart, or looks for masks"
                )
            job.check_config(trial_config)
        except UserError as e:
            raise UserError(f"space '{name}'{f' ({told})' if told else ''}: {e}") from None
    job.release()
    return base


def _telling(chosen: space.Space) -> Iterator[tuple[str, dict[str, Any]]]:
    """(which, {path: value}) of settings that together have every end of every knob, and all that is
    published or in the grid."""
    seen: set[tuple[str, str]] = set()
    named = [("published", space.read(chosen.knobs, setting)) for setting in chosen.published]
    named += [
        ("grid", space.read(chosen.knobs, setting)) for setting in (chosen.points() if chosen.grid else ())
    ]
    for told, values in itertools.chain(named, space.corners(chosen.knobs)):
        new = {(path, repr(value)) for path, value in values.items()} - seen
        if new:
            seen |= new
            yield told, values


def named(trial) -> str:
    """What a trial and its folder are called: Tune's own names are as long as its settings."""
    return trial.trial_id


def _trials(config: SearchConfig, chosen: space.Space, search: Searching, resources: dict) -> list[Row]:
    """The trials of a search, in the order in which they were first heard of."""
    folder = Path(search.folder)
    trainable = tune.with_resources(tune.with_parameters(trial, search=search), resources["trial"])
    trials = len(chosen.points()) if config.search == "grid" else config.trials
    grid = fitted(
        folder / "tune",
        trainable,
        lambda: _tuning(config, chosen, search, resources, trials),
        None,
        config.max_failures,
        trials,
    )
    if search.keep:  # members of a population have kept every checkpoint, for others to go on from
        for checkpoint in (folder / "tune").glob("*/checkpoint_*"):
            shutil.rmtree(checkpoint)
        tidy(folder / "trials")
    metrics = search.job.metric_names(search.base, config.select)
    rows = [_row(result, metrics) for result in grid]
    return sorted(
        rows, key=lambda row: [line["at"] for line in read_told(folder / "trials" / row.id)[:1]] or [inf]
    )


def _forget(folder: Path) -> None:
    """Drop what a search has left that was killed before Tune had written anything.

    Raises:
        UserError: its trials have trained already.
    """
    if any(read_told(run) for run in (folder / "trials").glob("*")):
        raise UserError(
            f"{folder}/tune: Tune's state is damaged, and so is its copy; what trials told is in "
            f"{folder}/trials. Give the search another name="
        )
    shutil.rmtree(folder / "trials", ignore_errors=True)
    (folder / JOURNAL).unlink(missing_ok=True)


def _tuning(
    config: SearchConfig, chosen: space.Space, search: Searching, resources: dict, trials: int
) -> tune.TuneConfig:
    """Searcher and scheduler of a search that begins.

    Raises:
        UserError: see `_forget`.
    """
    _forget(Path(search.folder))
    goals, runs = config.goals, Path(search.folder) / "trials"
    # a stopped trial that waits for workers of its own cannot hand on its process
    common = {
        "reuse_actors": not config.workers,
        "max_concurrent_trials": resources["concurrent"],
        "trial_name_creator": named,
        "trial_dirname_creator": named,
    }
    if config.search == "pbt":
        rule = population(search.knobs, goals[0], config.perturb, config.seed, runs)
        return tune.TuneConfig(
            scheduler=rule,
            num_samples=trials,
            search_alg=BasicVariantGenerator(random_state=config.seed),
            **common,
        )
    epochs = trained(search.job, search.base)
    return tune.TuneConfig(
        scheduler=scheduler(
            config.stop if config.stops else "none",
            goals[0],
            config.grace,
            config.reduction,
            longest=int(epochs * config.reduction) + 1,
            runs=runs,
        ),
        search_alg=searcher(
            config.search, chosen, goals, config.seed, trials, Path(search.folder), config.name
        ),
        num_samples=trials,
        **common,
    )


def _row(result: tune.Result, metrics: tuple[str, ...]) -> Row:
    """A trial's last word as a row; a stopped one's is what it was stopped at."""
    told = result.metrics or {}
    scores = {m: told[m] for m in metrics if m in told}
    finite = finite_values(scores)
    trouble = told.get("trouble") or (
        ", ".join(scores.keys() - finite.keys()) + " not finite" if scores != finite else None
    )
    error = COLOURS.sub("", str(result.error)).strip() if result.error else trouble
    state = state_of(told, result.error is not None, metrics)
    return Row(
        told.get("trial_id", Path(result.path).name),
        STATES[state.name],
        result.config or {},
        finite,
        told.get("epoch", 0),
        told.get("epochs", 0),
        told.get("spent", 0.0),
        told.get("start_seconds"),
        error,
    )


def _resources(config: SearchConfig) -> dict[str, Any]:
    """{"trial": what Tune sets aside for one, "test": for evaluating a run, "concurrent"}.

    Raises:
        UserError: the cluster has not so much.
    """
    have = ray.cluster_resources()
    gpus = config.gpus_per_trial if config.gpus_per_trial is not None else float(have.get("GPU", 0) > 0)
    asked = {"cpu": config.cpus_per_trial, "gpu": gpus}
    if config.workers:
        kind = "GPU" if have.get("GPU", 0) > 0 else "CPU"
        fit = int((have.get(kind, 0) - (FREE if kind == "CPU" else 0)) // config.workers)
        if not fit:
            raise UserError(
                f"workers={config.workers}, but the cluster has {have.get(kind, 0):g} {kind}s, and a trial "
                f"needs a hundredth of a CPU besides; set workers={int(have.get(kind, 0)) - (kind == 'CPU')}"
            )
        test = {"num_cpus": 1, "num_gpus": float(kind == "GPU")}
        return {"trial": {"cpu": FREE}, "test": test, "concurrent": min(fit, config.concurrent or fit)}
    for kind, wanted in asked.items():
        most = max(node["Resources"].get(kind.upper(), 0) for node in ray.nodes() if node["Alive"])
        if wanted > most:
            raise UserError(
                f"{kind}s_per_trial={wanted:g}, but no node of the cluster has more than {most:g} "
                f"{kind.upper()}s"
            )
    test = {"num_cpus": asked["cpu"], "num_gpus": gpus}
    return {"trial": asked, "test": test, "concurrent": config.concurrent}


def _compare(folder: Path, question: dict[str, Any], recipe: type[LaunchConfig]) -> None:
    """Refuse to go on with another search than the one whose folder this is. Settings that are newer than the
    folder have their defaults there.

    Raises:
        UserError: it was asked for something else; that is named.
    """
    path = folder / "search.json"
    if not path.is_file():
        return
    before = read_json(path)
    before["search"] = rename_settings(SearchConfig.stored_as, before["search"])
    stored = rename_settings(recipe.stored_as, before["recipe"])
    before["recipe"] = json.loads(dump_config(validate(recipe, stored, str(path))))
    now = question | {"recipe": without_settings(question["recipe"], VERIFY)}
    before["recipe"] = without_settings(before["recipe"], VERIFY)
    changed = [
        f"{part}.{key}"
        for part in now
        for key in now[part]
        if before[part].get(key) != now[part][key] and key not in MAY_CHANGE
    ]
    if changed:
        raise UserError(
            f"{folder} holds a search with other settings ({', '.join(changed)}); give this one another name="
        )

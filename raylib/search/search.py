"""Run a search: trials under Tune, the best once more on fresh seeds, the winner's test, a report.

runs/NAME/
    search.json         space, settings and recipe; a second start with others is refused
    trials.jsonl        the trials, their settings and what became of them: a search goes on from it
    trials/, finals/    the runs, their reports in told.jsonl
    tune/, finals/tune  Tune's own: results, CSV, TensorBoard
    optuna.journal      Optuna's study, for optuna-dashboard
    trials.csv, best.yaml, report.md, *.png
"""

import itertools
import json
import shutil
import sys
from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm

from raylib.command import spell_commands
from raylib.config import change_settings, dump_config
from raylib.errors import UserError
from raylib.fileio import read_bytes, write_json
from raylib.launch import IDLE_CPUS, gpu_share, list_nodes, warn_of_copy
from raylib.lock import add_ray_job, hold_run, owner_of, watch_file
from raylib.provenance import record_identity
from raylib.ray_cluster import job_has_ended, ray_cluster, this_job
from raylib.search import report
from raylib.search.config import Resources, SearchConfig, SearchContext, SearchJob, check_fingerprint
from raylib.search.display import SearchTable
from raylib.search.final_runs import run_finalists
from raylib.search.generator import GeneratorOptions, build_generator
from raylib.search.optuna import WarmStart, load_warm_start
from raylib.search.schedulers import build_population, build_scheduler, check_mutable
from raylib.search.space import (
    Choice,
    OneOf,
    SettingKey,
    Space,
    apply_changes,
    check_space,
    config_changes,
    corners,
    describe_knobs,
    knobs_by_name,
)
from raylib.search.trial import (
    RayObjectCache,
    TrialResult,
    drop_checkpoints,
    model_epochs,
    trial,
)
from raylib.search.trial_log import TrialLog
from raylib.search.tuner import RecordTrials, load_callbacks, run_tuner
from raylib.settings import LaunchConfig


def run_search(config: SearchConfig, name: str, space: Space, job: SearchJob, base: LaunchConfig) -> Path:
    """Search the space called `name` over `base`, or go on where an earlier start of this search was, with
    more trials, finalists or seeds if it now asks for more; return its folder.

    Raises:
        UserError: whatever of space, settings, data or model is wrong, before the first trial; no trial
        finished. KeyboardInterrupt: it was interrupted; the same command goes on.
    """
    folder = Path(config.runs).absolute() / config.name
    fingerprint = {
        "space": {"name": name, "knobs": describe_knobs(space.knobs)},
        # an absolute path, as the one in Tune's files
        "search": {**json.loads(dump_config(config)), "runs": str(folder.parent)},
        "recipe": json.loads(dump_config(base)),
    }
    warn_of_copy(config.runs)
    with hold_run(folder, job_has_ended):
        return _search_in(folder, config, name, space, job, base, fingerprint)


def _search_in(
    folder: Path,
    config: SearchConfig,
    name: str,
    space: Space,
    job: SearchJob,
    base: LaunchConfig,
    fingerprint: dict[str, Any],
) -> Path:
    """`run_search`, in a folder that it holds."""
    grown = check_fingerprint(folder, fingerprint, type(base))
    report_file = folder / "report.md"  # says that all is done; a power failure may leave zero bytes
    if report_file.is_file() and read_bytes(report_file).strip(b"\0") and not grown:
        print(f"search '{config.name}' is complete: {folder}/report.md (another name= starts another search)")
        return folder
    warm_start = load_warm_start(config, space, fingerprint, type(base))
    base = prepare_base(config, name, space, job, base)
    with ray_cluster(quiet=True):
        resources = plan_resources(config)
        add_ray_job(folder, this_job())
        # Scores of finished trials are compared with those of trials to come, so all must read the same data.
        configs = (apply_changes(base, changes) for _, changes in coverage_settings(space))
        files = [file for trial_config in configs for file in job.data_files(trial_config)]
        for note in record_identity(folder, dict.fromkeys(files), job.verifies_content(base)):
            print(note, flush=True)
        if grown and report_file.is_file():
            report_file.rename(folder / "report.before.md")
        write_json(folder / "search.json", fingerprint)
        watch_file(folder / "search.json")
        if grown:
            print(f"search '{config.name}' goes on with {', '.join(grown)}", flush=True)
        if warm_start.trials:
            print(f"search '{config.name}': {warm_start.description}", flush=True)
        context = SearchContext(
            config,
            name,
            space,
            job,
            base,
            folder,
            RayObjectCache(folder),
            warm_start.description,
            owner_of(folder),
        )
        results = run_trials(context, resources, warm_start)
        report.write_trials(context, results)
        if not any(result.state == "finished" for result in results):
            raise UserError(
                f"no trial finished; their errors are in {folder}/trials.csv and under {folder}/tune"
            )
        finalists = run_finalists(context, results, resources)
        report.write_report(context, results, finalists)
    print(report_file.read_text(encoding="utf-8"))
    best = spell_commands(f"python -m {job.command} --config {folder}/best.yaml")
    print(f"{folder}/report.md, trials.csv; the best: {best}")
    return folder


def prepare_base(
    config: SearchConfig, name: str, space: Space, job: SearchJob, base: LaunchConfig
) -> LaunchConfig:
    """Return the config that trials start from, all of it checked.

    Raises:
        UserError: see `run_search`.
    """
    workers = config.workers_per_trial
    runtime = {"runtime": "ray" if workers else "local", "workers": workers or 1}
    base = job.trial_config(
        change_settings(base, {**runtime, "name": "trial", "resume": "newest"}), config.dev_sets
    )
    if config.algorithm == "pbt":
        base = job.population_config(base)
    check_space(name, space, base)
    metrics = job.metric_names(base, config.dev_sets)
    for goal in config.goals:
        if goal not in metrics:
            raise UserError(
                f"metric={goal}: no run reports that; with dev_sets={config.dev_sets} there are "
                f"{', '.join(metrics)}"
            )
    _check_algorithm(config, name, space, job, base)
    load_callbacks(config.callbacks)
    epochs = model_epochs(job, base)
    if config.stops_trials and config.min_epochs >= epochs:
        raise UserError(
            f"early_stopping={config.early_stopping}: trials are compared after min_epochs="
            f"{config.min_epochs} epochs, and have {epochs}; set early_stopping=none, or "
            f"{job.more_epochs_hint}"
        )
    for description, changes in coverage_settings(space):
        try:
            trial_config = apply_changes(base, changes)
            several = job.num_runs(trial_config) > 1 or job.stage_epochs(trial_config)
            if config.algorithm == "pbt" and several:
                raise UserError(
                    "algorithm=pbt: a trial must be one training, for its members take each other's "
                    "checkpoints; this one trains several languages apart, or looks for masks"
                )
            job.check_config(trial_config)
        except UserError as e:
            raise UserError(f"space '{name}'{f' ({description})' if description else ''}: {e}") from None
    job.release()
    return base


def _check_algorithm(
    config: SearchConfig, name: str, space: Space, job: SearchJob, base: LaunchConfig
) -> None:
    if config.algorithm == "grid" and not space.grid:
        raise UserError(f"space '{name}' has no grid; leave algorithm=grid out")
    if config.algorithm == "cmaes":
        categorical = [path for path, knob in space.knobs.items() if isinstance(knob, Choice | OneOf)]
        if categorical:
            raise UserError(
                f"algorithm=cmaes is for numbers; space '{name}' has {', '.join(categorical)}: take tpe"
            )
    if config.algorithm == "pbt":
        _, changes = next(coverage_settings(space))  # a strategy of the user's may be in the space alone
        check_mutable(space.knobs, job.mutable_paths_of(apply_changes(base, changes)), base.stored_as)


def coverage_settings(space: Space) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (description, {path: value}) of settings that together have every end of every knob, and all that
    is published or in the grid; none that adds no value to those before it."""
    given = [("published", config_changes(space.knobs, setting)) for setting in space.published]
    given += [("grid", config_changes(space.knobs, setting)) for setting in space.grid_settings()]
    covered: set[tuple[str, str]] = set()
    for description, changes in itertools.chain(given, corners(space.knobs)):
        values = {(path, repr(value)) for path, value in changes.items()}
        if not values <= covered:
            covered |= values
            yield description, changes


def trial_name(trial: Any) -> str:
    """Return the name of a trial and of its folder: Tune's own names are as long as its settings."""
    return trial.trial_id


def run_trials(context: SearchContext, resources: Resources, warm_start: WarmStart) -> list[TrialResult]:
    """Run the trials of a search, or those that it lacks; return their results in the order in which the
    trials began (which, unlike that of their reports, is the same on any machine).

    Raises:
        UserError: see `TrialLog.restore_from_folders`. MachineError: a disk is full, or the like.
    """
    config, folder = context.config, context.folder
    trainable = tune.with_resources(tune.with_parameters(trial, context=context), resources.trial)
    num_trials = len(context.space.grid_settings()) if config.algorithm == "grid" else config.num_trials
    metrics = context.job.metric_names(context.base, config.dev_sets)
    log = TrialLog(folder)
    scheduler: TrialScheduler | None
    if config.algorithm == "pbt":
        search_alg, scheduler = _build_population(context, resources, log)
    else:
        search_alg, scheduler = _build_search(context, resources, num_trials, warm_start, log)
    for note in log.notes:
        print(f"search '{config.name}': {note}", flush=True)
    table = SearchTable(f"search '{config.name}'", config.goals, num_trials, earlier=log.ended_trials())
    if len(log.outcomes) < num_trials:
        run_tuner(
            folder / "tune",
            trainable,
            metrics,
            search_alg,
            table,
            knobs_by_name(context.space.knobs),
            [RecordTrials(log, metrics), *load_callbacks(config.callbacks)],
            num_samples=num_trials,
            scheduler=scheduler,
            max_failures=config.max_failures,
            # a stopped trial that waits for workers of its own cannot hand on its process
            reuse_actors=not config.workers_per_trial,
            trial_name_creator=trial_name,
            trial_dirname_creator=trial_name,
        )
    else:  # a population would begin its members again
        table.report([], done=True)
    # members of a population kept all of them, for others to go on from; of others, the driver may have died
    # before they were dropped
    for checkpoint in (folder / "tune").glob("*/checkpoint_*"):
        shutil.rmtree(checkpoint)
    drop_checkpoints(folder / "trials")

    return log.results(metrics)


def _build_search(
    context: SearchContext, resources: Resources, num_trials: int, warm_start: WarmStart, log: TrialLog
) -> tuple[SearchAlgorithm, TrialScheduler | None]:
    """Return (the source of trials, the rule that stops them), both as far as earlier starts came."""
    config = context.config
    options = GeneratorOptions(
        num_trials,
        SettingKey(context.space.knobs, context.base),
        config.repeats,
        resources.max_concurrent or sys.maxsize,
        inf if config.max_hours is None else 3600 * config.max_hours,
        config.seed,
    )
    generator = build_generator(config, context.space, log, options)
    log.restore_from_folders(context.folder / "tune")
    scheduler = build_scheduler(
        config.early_stopping if config.stops_trials else "none",
        config.goals,
        config.min_epochs,
        config.reduction_factor,
        max_epochs=int(model_epochs(context.job, context.base) * config.reduction_factor) + 1,
    )
    stopped = scheduler.replay(log) if scheduler else set()
    generator.go_on(stopped.__contains__)
    generator.learn(warm_start.trials)
    return generator, scheduler


def _build_population(
    context: SearchContext, resources: Resources, log: TrialLog
) -> tuple[SearchAlgorithm, TrialScheduler]:
    """Return (the source of a population's members, its rule). Members of an earlier start have its names."""
    config = context.config
    log.restore_from_folders(context.folder / "tune")
    for checkpoint in (context.folder / "tune").glob("*/checkpoint_*"):
        shutil.rmtree(checkpoint)  # Tune counts from 0 again
    members = BasicVariantGenerator(max_concurrent=resources.max_concurrent or 0, random_state=config.seed)
    if log.settings:
        members._uuid_prefix = min(log.settings).rpartition("_")[0] + "_"
    knobs, goal = context.space.knobs, config.goals[0]
    return members, build_population(knobs, goal, config.perturb_every, config.seed, log)


def plan_resources(config: SearchConfig) -> Resources:
    """Return what trials and tests get of the cluster.

    Raises:
        UserError: the cluster has not so much.
    """
    available, workers = ray.cluster_resources(), config.workers_per_trial
    has_gpus = available.get("GPU", 0) > 0
    if workers:
        kind = "GPU" if has_gpus else "CPU"
        num_fitting = int((available.get(kind, 0) - (0 if has_gpus else IDLE_CPUS)) // workers)
        if not num_fitting:
            most = int(available.get(kind, 0)) - (not has_gpus)
            raise UserError(
                f"workers_per_trial={workers}, but the cluster has {available.get(kind, 0):g} {kind}s, and a "
                f"trial needs a hundredth of a CPU besides; set workers_per_trial={most}"
            )
        test = {"num_cpus": 1.0, "num_gpus": float(has_gpus)}
        return Resources({"cpu": IDLE_CPUS}, test, min(num_fitting, config.max_concurrent or num_fitting))
    nodes = list_nodes()
    gpus = config.gpus_per_trial if config.gpus_per_trial is not None else float(has_gpus)
    cpus = config.cpus_per_trial or float(max(1, int(gpus * gpu_share(nodes))))
    for kind, count in (("cpu", cpus), ("gpu", gpus)):
        largest = max(node.get(kind.upper(), 0) for node in nodes)
        if count > largest:
            raise UserError(
                f"{kind}s_per_trial={count:g}, but no node of the cluster has more than {largest:g} "
                f"{kind.upper()}s"
            )
    test = {"num_cpus": cpus, "num_gpus": gpus}
    return Resources({"cpu": cpus, "gpu": gpus}, test, config.max_concurrent)

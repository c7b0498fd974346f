"""Results of a search for people: trials.csv, best.yaml, report.md; the finalists as a study of Optuna."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import optuna
import yaml
from optuna.trial import FixedTrial, create_trial

from raylib.display import markdown_table, mean_and_interval, mean_and_std, percent
from raylib.fileio import write_atomically
from raylib.metrics import t_interval
from raylib.search.config import SearchConfig, SearchContext
from raylib.search.display import draw_figures
from raylib.search.final_runs import PUBLISHED, Finalist, mean_result, pareto_front, pool_replicates
from raylib.search.optuna import open_journal
from raylib.search.schedulers import describe_agreements, rank_agreements
from raylib.search.space import DefineByRun, apply_changes, config_changes, describe_setting, knobs_by_name
from raylib.search.trial import TrialResult, setting_config

TABLE_ROWS = 10  # of the table of trials
TESTS = ("English", "targets")  # scores on test sets


def write_trials(context: SearchContext, results: Sequence[TrialResult]) -> None:
    """Write every trial into trials.csv: its state, setting and scores."""
    names = list(knobs_by_name(context.space.knobs))
    scores = list(dict.fromkeys(name for result in results for name in result.scores))
    text = io.StringIO(newline="")
    out = csv.writer(text)
    times = ["epoch", "epochs", "seconds", "start_seconds"]
    out.writerow(["trial", "state", *names, *scores, *times, "error", "repeat_of", "replicate"])
    for r in results:
        values = [*(r.setting.get(n, "") for n in names), *(r.scores.get(n, "") for n in scores)]
        spent = [r.epoch, r.epochs, f"{r.seconds:.1f}", r.start_seconds or ""]
        out.writerow([r.id, r.state, *values, *spent, r.error or "", r.repeat_of or "", r.replicate])
    write_atomically(context.folder / "trials.csv", text.getvalue())


def write_report(
    context: SearchContext, results: Sequence[TrialResult], finalists: Sequence[Finalist]
) -> None:
    """Write best.yaml, the figures, and, last, report.md, which says that the search is complete."""
    config, best = context.config, finalists[0]
    write_best(context, best)
    if config.final_seeds:
        store_finalists(context, finalists)
    trained = [result for result in results if result.repeat_of is None]
    figures = draw_figures(context, trained)
    stopping = f"stopped early by {config.early_stopping}" if config.stops_trials else "nothing stopped early"
    counts = Counter(result.state for result in results)
    states = ", ".join(f"{counts[s]} {s}" for s in ("finished", "stopped", "failed") if counts[s])
    parts = [
        f"# Search of `{context.space_name}` over `{config.recipe}`",
        f"{len(results)} trials: {states}; {config.algorithm}, {stopping}. Looked at: "
        f"{context.job.describe_selection(config.dev_sets)}. Searched for: {' and '.join(config.goals)}."
        + "".join(f" {note}." for note in _notes(context, results)),
        "## The best",
        verdict(config, finalists),
        *([_finalists_table(config, finalists)] if config.final_seeds else []),
        _assignments(context, best),
    ]
    pooled = pool_replicates(context, results)
    if len(config.goals) > 1:
        front = pareto_front([mean_result(replicates) for replicates in pooled], config.goals)
        on_front = [replicates for replicates in pooled if replicates[0].id in {r.id for r in front}]
        parts += ["## Best of each goal against the other", _results_table(config, on_front, settings=False)]
    parts += ["## What it cost", cost_table(trained)]
    if config.algorithm != "pbt" and (agreement := _early_agreement(context, trained)):
        parts += ["## What early scores tell", agreement]
    parts += [
        "## Trials",
        _results_table(config, pooled, settings=True),
        "All of them, with every knob: trials.csv.",
        *(f"![{title}]({file})" for file, title in figures),
    ]
    if failed := [result for result in results if result.state == "failed"]:
        parts.append("## Failed")
        parts += [f"- {r.id}: {(r.error or 'no error message').splitlines()[-1]}" for r in failed]
    write_atomically(context.folder / "report.md", "\n\n".join(parts) + "\n")


def _notes(context: SearchContext, results: Sequence[TrialResult]) -> list[str]:
    """Return sentences on repeats, a time that was up, another search that this one learned from."""
    config, notes = context.config, []
    if num_repeats := sum(result.repeat_of is not None for result in results):
        notes.append(f"{num_repeats} proposed a setting again and took its score, untrained")
    if num_replicates := sum(result.replicate > 0 for result in results):
        notes.append(f"{num_replicates} are replicates: a setting that was proposed again, on another seed")
    if config.algorithm != "grid" and len(results) < config.num_trials:
        notes.append(f"max_hours={config.max_hours:g} were over before {config.num_trials} trials had begun")
    if context.warm_start:
        notes.append(f"It began with a {context.warm_start}")
    return notes


def write_best(context: SearchContext, best: Finalist) -> None:
    """Write the winner's whole config, which the stage's own command runs."""
    config, job = context.config, context.job
    changes = {} if best.setting is None else config_changes(context.space.knobs, best.setting)
    whole = job.final_config(apply_changes(context.base, changes)).model_copy(
        update={"name": f"{config.name}_best", "runs": config.runs}
    )
    head = [
        f"# The best of the search {config.name}, by {' and '.join(config.goals)}: "
        f"python -m {job.command} --config best.yaml"
    ]
    for goal in config.goals if best.dev else ():
        score = mean_and_interval(*t_interval(list(best.scores(goal).values())))
        head.append(f"# {goal} {score} % over {len(best.dev)} seeds")
    text = yaml.safe_dump(whole.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_atomically(context.folder / "best.yaml", "\n".join(head) + "\n" + text)


def store_finalists(context: SearchContext, finalists: Sequence[Finalist]) -> None:
    """Write the finalists, as a study of their own, into the search's journal: means over seeds, and test
    scores of those that were tested. Optuna adds nothing to trials that have ended."""
    goals, job, storage = list(context.config.goals), context.job, open_journal(context.folder)
    name = f"{context.config.name}_finals"
    if name in optuna.get_all_study_names(storage):  # with fewer trials, or fewer seeds
        optuna.delete_study(study_name=name, storage=storage)
    study = optuna.create_study(storage=storage, study_name=name, directions=["maximize"] * len(goals))
    study.set_metric_names(goals)
    for finalist in finalists:
        fixed = FixedTrial(finalist.setting or {})
        if finalist.setting is not None:
            DefineByRun(context.space.knobs)(fixed)
        config = setting_config(context, finalist.setting, "finals", finalist.name)
        tests = {f"test {name}": list(finalist.scores(name).values()) for name in TESTS}
        attributes = {
            "rank among trials": finalist.name,
            "folder": str(context.folder / "finals" / f"setting{finalist.number}_seed*"),
            "seeds": list(finalist.dev),
            "epochs": job.epochs_per_run(config) * job.num_runs(config),
            **{name: fmean(scores) for name, scores in tests.items() if scores},
        }
        if finalist.dev:
            study.add_trial(
                create_trial(
                    params=finalist.setting or {},
                    distributions=fixed.distributions,
                    values=[fmean(finalist.scores(goal).values()) for goal in goals],
                    user_attrs=attributes,
                )
            )


def _early_agreement(context: SearchContext, results: Sequence[TrialResult]) -> str:
    config, goal = context.config, context.config.goals[0]
    last = {result.id: result.scores[goal] for result in results if result.state == "finished"}
    agreements = rank_agreements(
        context.folder / "trials", last, goal, config.min_epochs, config.reduction_factor
    )
    has_stopped = any(result.state == "stopped" for result in results)
    return describe_agreements(agreements, config.min_epochs if has_stopped else None)


def cost_table(results: Sequence[TrialResult]) -> str:
    """Return seconds and epochs that trials had, and those that stopping saved, at each trial's own speed."""
    stopped = [result for result in results if result.state == "stopped"]
    seconds, epochs = sum(r.seconds for r in results), sum(r.epoch for r in results)
    lines = [
        ["", "trials", "epochs", "time of trials"],
        ["trained", str(len(results)), f"{epochs:g}", _format_time(seconds)],
    ]
    if not stopped:
        return markdown_table(lines)
    saved_seconds = sum(r.seconds / r.epoch * (r.epochs - r.epoch) for r in stopped if r.epoch)
    saved = sum(r.epochs - r.epoch for r in stopped)
    planned = sum(r.epochs for r in results if r.state != "failed")
    lines.append(
        ["not trained, for they were stopped", str(len(stopped)), f"{saved:g}", _format_time(saved_seconds)]
    )
    return markdown_table(lines) + f"\n\nStopping saved {100 * saved / planned:.0f} % of the epochs."


def _format_time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def verdict(config: SearchConfig, finalists: Sequence[Finalist]) -> str:
    """Say whether the best beats the published setting, on the dev sets that were searched and on the tests
    that were not."""
    best, published = finalists[0], next((f for f in finalists if f.name == PUBLISHED), None)
    if not config.final_seeds:
        return "By one run each (final_seeds=0): no interval, and nothing tested."
    if not best.dev:
        return (
            "**No final run finished on any fresh seed**: the best is the trials' first, by one run, and "
            "nothing was tested."
        )
    if published is None or best is published:
        return "The published setting is the best found: the search does not beat it."
    lines = []
    for name in ("targets", "English", *config.goals):
        ours, published_scores = best.scores(name), published.scores(name)
        seeds = sorted(ours.keys() & published_scores.keys())
        if not seeds:
            continue
        mean, half = t_interval([ours[seed] - published_scores[seed] for seed in seeds])
        points = f"{percent(mean)} points" + (f" ± {percent(half)}" if half is not None else "")
        if half is None:
            outcome = f"{points} on the one seed: no interval"
        elif abs(mean) > half:
            outcome = f"the best {'beats' if mean > 0 else 'is below'} the published setting, by {points}"
        else:
            outcome = f"no difference that {len(seeds)} seeds could show, {points}"
        where = "test sets" if name in TESTS else "which it was chosen by"
        lines.append(f"- {name}, {where}: {outcome}")
    return "Seed by seed, with 95 % confidence intervals:\n\n" + "\n".join(lines)


def _finalists_table(config: SearchConfig, finalists: Sequence[Finalist]) -> str:
    tests = [name for name in TESTS if any(finalist.scores(name) for finalist in finalists)]
    rows = [["setting", "seeds", *(f"{goal}, %" for goal in config.goals), *(f"test, {t}, %" for t in tests)]]
    for finalist in finalists:
        scores = [list(finalist.scores(name).values()) for name in (*config.goals, *tests)]
        failed = f" ({finalist.num_failed} failed)" if finalist.num_failed else ""
        name = finalist.name if finalist.name == PUBLISHED else f"trials' no. {finalist.name}"
        estimates = [mean_and_interval(*t_interval(values)) if values else "" for values in scores]
        rows.append([name, f"{len(finalist.dev)}{failed}", *estimates])
    return (
        markdown_table(rows)
        + "\n\nMean ± half of the 95 % confidence interval, over seeds that the search had not seen."
    )


def _assignments(context: SearchContext, best: Finalist) -> str:
    if best.setting is None:
        return "It is the recipe as it is."
    changes = config_changes(context.space.knobs, best.setting)
    return "Its settings: " + ", ".join(f"`{path}={_format(value)}`" for path, value in changes.items())


def _results_table(config: SearchConfig, pooled: Sequence[Sequence[TrialResult]], settings: bool) -> str:
    """Return a row a setting, the best in the first goal first, with its trials' goals (mean and standard
    deviation of replicates) and, if `settings`, the setting."""
    has_replicates = any(len(replicates) > 1 for replicates in pooled)
    lines = [["trial", *(["setting"] if settings else []), *(f"{goal}, %" for goal in config.goals)]]
    best = sorted(pooled, key=lambda replicates: -mean_result(replicates).scores[config.goals[0]])
    for replicates in best[: TABLE_ROWS if settings else None]:
        first = replicates[0]
        more = f" and {len(replicates) - 1} more" if len(replicates) > 1 else ""
        goals = [mean_and_std(result.scores[goal] for result in replicates) for goal in config.goals]
        lines.append([first.id + more, *([describe_setting(first.setting)] if settings else []), *goals])
    note = "\n\nOf replicates, mean ± standard deviation over their seeds." if has_replicates else ""
    return markdown_table(lines, words=1 + settings) + note


def _format(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)

"""Results of a search for people: trials.csv, best.yaml, report.md and its figures."""

import csv
from collections import Counter
from collections.abc import Sequence
from typing import Any

import yaml

from raylib.config import change_settings
from raylib.fileio import write_atomically
from raylib.metrics import t_interval
from raylib.search.config import SearchConfig, SearchContext
from raylib.search.figures import draw_figures
from raylib.search.final_runs import PUBLISHED, Finalist, pareto_front
from raylib.search.schedulers import describe_agreements, rank_agreements
from raylib.search.space import config_changes, knobs_by_name
from raylib.search.trial import TrialResult
from raylib.tables import markdown_table, mean_and_interval, percent

TESTS = ("English", "targets")  # scores on test sets


def write_trials(context: SearchContext, results: Sequence[TrialResult]) -> None:
    """Write every trial into trials.csv: its state, setting and scores."""
    names = list(knobs_by_name(context.space.knobs))
    scores = list(dict.fromkeys(name for result in results for name in result.scores))
    with open(context.folder / "trials.csv", "w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(
            ["trial", "state", *names, *scores, "epoch", "epochs", "seconds", "start_seconds", "error"]
        )
        for r in results:
            values = [*(r.setting.get(n, "") for n in names), *(r.scores.get(n, "") for n in scores)]
            times = [r.epoch, r.epochs, f"{r.seconds:.1f}", r.start_seconds or ""]
            out.writerow([r.id, r.state, *values, *times, r.error or ""])


def write_report(
    context: SearchContext, results: Sequence[TrialResult], finalists: Sequence[Finalist]
) -> None:
    """Write best.yaml, the figures, and, last, report.md, which says that the search is complete."""
    config, best = context.config, finalists[0]
    write_best(context, best)
    agreement = "" if config.algorithm == "pbt" else _early_agreement(context, results)
    figures = draw_figures(context, results)
    stopping = f"stopped early by {config.early_stopping}" if config.stops_trials else "nothing stopped early"
    counts = Counter(result.state for result in results)
    states = ", ".join(f"{counts[s]} {s}" for s in ("finished", "stopped", "failed") if counts[s])
    parts = [
        f"# Search of `{context.space_name}` over `{config.recipe}`",
        f"{len(results)} trials: {states}; {config.algorithm}, {stopping}. Looked at: "
        f"{context.job.describe_selection(config.dev_sets)}. Searched for: {' and '.join(config.goals)}.",
        "## The best",
        verdict(config, finalists),
        *([_finalists_table(config, finalists)] if config.final_seeds else []),
        _assignments(context, best),
    ]
    finished = [result for result in results if result.state == "finished"]
    if len(config.goals) > 1:
        front = pareto_front(finished, config.goals)
        parts += ["## Best of each goal against the other", _results_table(config, front, settings=False)]
    parts += ["## What it cost", cost_table(results)]
    if agreement:
        parts += ["## What early scores tell", agreement]
    ten_best = sorted(finished, key=lambda result: -result.scores[config.goals[0]])[:10]
    parts += ["## Trials", _results_table(config, ten_best, settings=True)]
    parts += ["All of them, with every knob: trials.csv."]
    parts += [f"![{title}]({file})" for file, title in figures]
    failed = [result for result in results if result.state == "failed"]
    if failed:
        errors = [
            f"- {result.id}: {(result.error or 'no error message').splitlines()[-1]}" for result in failed
        ]
        parts += ["## Failed", *errors]
    write_atomically(context.folder / "report.md", "\n\n".join(parts) + "\n")


def write_best(context: SearchContext, best: Finalist) -> None:
    """Write the winner's whole config, which the stage's own command runs."""
    config, job = context.config, context.job
    changes = {} if best.setting is None else config_changes(context.space.knobs, best.setting)
    whole = job.final_config(change_settings(context.base, changes)).model_copy(
        update={"name": f"{config.name}_best", "runs": config.runs}
    )
    goals = " and ".join(config.goals)
    head = [f"# The best of the search {config.name}, by {goals}: python -m {job.command} --config best.yaml"]
    for goal in config.goals if best.dev else ():
        score = mean_and_interval(*t_interval(list(best.scores(goal).values())))
        head.append(f"# {goal} {score} % over {len(best.dev)} seeds")
    text = yaml.safe_dump(whole.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_atomically(context.folder / "best.yaml", "\n".join(head) + "\n" + text)


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
    lines = [["", "trials", "epochs", "time of trials"]]
    lines.append(["trained", str(len(results)), f"{epochs:g}", _format_time(seconds)])
    if not stopped:
        return markdown_table(lines)
    saved_seconds = sum(r.seconds / r.epoch * (r.epochs - r.epoch) for r in stopped if r.epoch)
    saved = sum(r.epochs - r.epoch for r in stopped)
    planned = sum(r.epochs for r in results if r.state != "failed")
    label = "not trained, for they were stopped"
    lines.append([label, str(len(stopped)), f"{saved:g}", _format_time(saved_seconds)])
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


def _results_table(config: SearchConfig, results: Sequence[TrialResult], settings: bool) -> str:
    """Return a row a trial, with the goals and, if `settings`, its setting."""
    lines = [["trial", *(["setting"] if settings else []), *(f"{goal}, %" for goal in config.goals)]]
    for result in results:
        pairs = [f"{name.removeprefix('strategies.')} {_format(v)}" for name, v in result.setting.items()]
        goals = [percent(result.scores[goal]) for goal in config.goals]
        lines.append([result.id, *([", ".join(pairs)] if settings else []), *goals])
    return markdown_table(lines, words=1 + settings)


def _format(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)

"""Results of a search for people: trials.csv, best.yaml, report.md and its figures: the history, learning
curves, scores against each knob, the trade-off of two goals and the importance of each knob. Optuna draws all
but the last, from studies made of the trials, whatever algorithm they came from."""

import csv
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import yaml
from matplotlib.ticker import MaxNLocator
from optuna.trial import FixedTrial, TrialState, create_trial
from optuna.visualization import matplotlib as plots

from raylib.config import change_settings
from raylib.fileio import write_atomically
from raylib.metrics import t_interval
from raylib.search.config import SearchConfig, SearchContext
from raylib.search.final_runs import PUBLISHED, Finalist, pareto_front
from raylib.search.schedulers import describe_agreements, learning_curve, rank_agreements
from raylib.search.space import DefineByRun, Knobs, alternatives, config_changes, knobs_by_name
from raylib.search.trial import TrialResult
from raylib.tables import markdown_table, mean_and_interval, open_pyplot, percent, save_figure

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
    if config.algorithm != "pbt" and (agreement := _early_agreement(context, results)):
        parts += ["## What early scores tell", agreement]
    ten_best = sorted(finished, key=lambda result: -result.scores[config.goals[0]])[:10]
    parts += [
        "## Trials",
        _results_table(config, ten_best, settings=True),
        "All of them, with every knob: trials.csv.",
        *(f"![{title}]({file})" for file, title in figures),
    ]
    if failed := [result for result in results if result.state == "failed"]:
        parts.append("## Failed")
        parts += [f"- {r.id}: {(r.error or 'no error message').splitlines()[-1]}" for r in failed]
    write_atomically(context.folder / "report.md", "\n\n".join(parts) + "\n")


def write_best(context: SearchContext, best: Finalist) -> None:
    """Write the winner's whole config, which the stage's own command runs."""
    config, job = context.config, context.job
    changes = {} if best.setting is None else config_changes(context.space.knobs, best.setting)
    whole = job.final_config(change_settings(context.base, changes)).model_copy(
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


MIN_TRIALS = 4  # finished trials, below which a forest learns nothing of importance
SLICES_PER_FIGURE = 4
MAX_CURVES_NAMED = 20  # as many colours has Optuna's figure of learning curves


def draw_figures(context: SearchContext, results: Sequence[TrialResult]) -> list[tuple[str, str]]:
    """Draw a search's figures into its folder; return [(file, title)]."""
    pyplot = open_pyplot()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    goals, knobs, seed = context.config.goals, context.space.knobs, context.config.seed
    finished = [result for result in results if result.state == "finished"]
    figures: list[tuple[str, str]] = []

    def save(axes: Any, file: str, title: str) -> None:
        save_figure(axes.figure, context.folder / file)
        figures.append((file, title))

    # Optuna warns that its figures are experimental, sets a style for the whole process, and draws legends
    # beyond the edge of its figures, which are cut off there unless "tight" says otherwise
    with warnings.catch_warnings(), pyplot.style.context({"savefig.bbox": "tight"}):
        warnings.simplefilter("ignore")
        for i, goal in enumerate(goals):
            study = to_study(knobs, results, [goal])
            axes = plots.plot_optimization_history(study, target_name=f"{goal}, %")
            save(axes, f"history{i + 1 if i else ''}.png", f"history of {goal}")
        study = to_study(knobs, results, goals[:1], context.folder / "trials")
        if any(trial.intermediate_values for trial in study.trials):
            axes = plots.plot_intermediate_values(study)
            axes.set(xlabel="epoch", ylabel=f"{goals[0]}, %")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if len(study.trials) > MAX_CURVES_NAMED and (legend := axes.get_legend()):
                legend.remove()
            save(axes, "curves.png", "score after each epoch, of the trials that were stopped too")
        names = [name for name in knobs_by_name(knobs) if any(name in r.setting for r in finished)]
        # one figure of all knobs would be as wide as they are many
        for i in range(0, len(names), SLICES_PER_FIGURE):
            some = names[i : i + SLICES_PER_FIGURE]
            slices: Any = plots.plot_slice(study, some, target_name=f"{goals[0]}, %")
            for axes in np.atleast_1d(slices):
                axes.set_xlabel(axes.get_xlabel().removeprefix("strategies."), fontsize=8)
                axes.tick_params(axis="x", which="both", labelrotation=60, labelsize=7)
                # Optuna colours the points of each knob by the range of its own trials, whatever the bar says
                for points in axes.collections:
                    points.set_clim(0, max(1, len(study.trials) - 1))
            number = i // SLICES_PER_FIGURE + 1 if i else ""
            save(np.atleast_1d(slices)[0], f"slices{number}.png", "score against each knob")
        if len(goals) > 1:
            study = to_study(knobs, results, goals)
            axes = plots.plot_pareto_front(study, target_names=[f"{goal}, %" for goal in goals])
            save(axes, "front.png", "Pareto front")
        shares = {goal: importances(knobs, finished, goal, seed) for goal in goals}
        if any(shares.values()):
            save(_importance_bars(shares), "importance.png", "importance of each knob")
    return figures


def to_study(
    knobs: Knobs, results: Sequence[TrialResult], goals: Sequence[str], runs: Path | None = None
) -> optuna.Study:
    """Return the trials that finished, and, of one goal, those that were stopped, as a study of Optuna's with
    scores in %. `runs`: the folder of the trials' folders, if intermediate values are needed."""
    study = optuna.create_study(directions=["maximize"] * len(goals))
    for result in results:
        if result.state == "failed" or (result.state == "stopped" and len(goals) > 1):
            continue
        fixed_trial = FixedTrial(result.setting)
        DefineByRun(knobs)(fixed_trial)
        curve = learning_curve(runs / result.id, goals[0], prunable_only=False) if runs else {}
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE if result.state == "finished" else TrialState.PRUNED,
                params=dict(result.setting),
                distributions=fixed_trial.distributions,
                values=[100 * result.scores[goal] for goal in goals if goal in result.scores] or None,
                intermediate_values={epoch: 100 * score for epoch, score in curve.items()},
            )
        )
    return study


# Optuna's `plot_param_importances` leaves out the knobs of alternatives with functional ANOVA: it takes those
# alone that every trial has. PED-ANOVA, its default, takes them all, but says little of so few trials as a
# search has: it gives a knob that alone decides a share of 0.65 with 16 trials, where functional ANOVA gives
# 0.97.


def importances(knobs: Knobs, finished: Sequence[TrialResult], goal: str, seed: int) -> dict[str, float]:
    """Return {knob: share of the variance of `goal` that it explains (functional ANOVA)}. The knobs that
    every trial has are told apart from each other; those of an alternative among the trials that chose it,
    which is said in the name."""
    shares: dict[str, float] = {}
    explained: set[str] = set()
    for alternative, members in _groups(knobs, finished).items():
        names = [name for name in members[0].setting if all(name in r.setting for r in members)]
        varied = [name for name in names if len({str(r.setting[name]) for r in members}) > 1]
        scores = {result.scores[goal] for result in members}
        if len(members) < MIN_TRIALS or not set(varied) - explained or len(scores) == 1:
            continue
        of_group = optuna.importance.get_param_importances(
            to_study(knobs, members, [goal]),
            evaluator=optuna.importance.FanovaImportanceEvaluator(seed=seed),
            params=varied,
        )
        for name in [name for name in of_group if name not in explained]:
            shares[f"{name} ({alternative})" if alternative else name] = of_group[name]
        explained |= set(varied)
    return shares


def _groups(knobs: Knobs, finished: Sequence[TrialResult]) -> dict[str, list[TrialResult]]:
    """Return all trials as group "", then those of each alternative, {"name=alternative": trials}."""
    groups: dict[str, list[TrialResult]] = {"": list(finished)} if finished else {}
    for name in dict.fromkeys(name for fixed in alternatives(knobs) for name in fixed):
        for result in finished:
            if name in result.setting:
                groups.setdefault(f"{name}={result.setting[name]}", []).append(result)
    return groups


def _importance_bars(shares: dict[str, dict[str, float]]) -> Any:
    """Return axes with a bar for each knob and goal."""
    names = dict.fromkeys(name for of_goal in shares.values() for name in of_goal)
    ordered = sorted(names, key=lambda name: max(of_goal.get(name, 0) for of_goal in shares.values()))
    _, axes = open_pyplot().subplots(figsize=(7, 0.8 + 0.35 * len(ordered) * len(shares)))
    for i, (goal, of_goal) in enumerate(shares.items()):
        positions = [k + 0.4 * i for k in range(len(ordered))]
        axes.barh(positions, [of_goal.get(name, 0) for name in ordered], height=0.4, label=goal)
    labels = [name.removeprefix("strategies.") for name in ordered]
    axes.set_yticks([k + 0.2 * (len(shares) - 1) for k in range(len(ordered))], labels, fontsize=8)
    axes.set(xlabel="share of the variance that it explains", xlim=(0, 1))
    axes.legend(fontsize=8)
    return axes

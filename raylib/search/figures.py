"""Figures of a search: the history, learning curves, scores against each knob, the trade-off of two goals,
the importance of each knob. Optuna draws all but the last, from studies made of the trials, whatever
algorithm they came from."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from matplotlib.ticker import MaxNLocator
from optuna.trial import FixedTrial, TrialState, create_trial
from optuna.visualization import matplotlib as plots

from raylib.display import open_pyplot, save_figure
from raylib.search.config import SearchContext
from raylib.search.schedulers import learning_curve
from raylib.search.space import DefineByRun, Knobs, alternatives, knobs_by_name
from raylib.search.trial import TrialResult

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

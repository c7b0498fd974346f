"""Display of a search. While it runs: its table in the terminal, its curves and hyper-parameters in
TensorBoard. Then figures: the history, learning curves, scores against each knob, the trade-off of two
goals, the importance of each knob; Optuna draws all but the last, from studies made of the trials, whatever
algorithm they came from.
"""

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from matplotlib.ticker import MaxNLocator
from optuna.trial import FixedTrial, TrialState, create_trial
from optuna.visualization import matplotlib as plots
from ray import tune
from ray.tune.experiment.trial import Trial
from ray.tune.logger import TBXLoggerCallback
from tensorboardX.summary import hparams

from raylib.display import open_pyplot, percent, save_figure
from raylib.search.config import SearchContext
from raylib.search.schedulers import learning_curve
from raylib.search.space import (
    DefineByRun,
    Distribution,
    Knobs,
    alternatives,
    describe_setting,
    knobs_by_name,
)
from raylib.search.trial import REPEAT_OF, TrialResult

MIN_TRIALS = 4  # finished trials, below which a forest learns nothing of importance
SLICES_PER_FIGURE = 4
MAX_CURVES_NAMED = 20  # as many colours has Optuna's figure of learning curves
TABLE_SECONDS = 30.0  # between tables
MAX_ROWS = 20


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


class SearchTable(tune.ProgressReporter):
    """Prints trials with state, epochs, scores and setting, those under way first, then the best; above them
    the best so far. Tune's own table shows neither scores nor settings of a define-by-run search.

    name: of the search; goals: scores that trials report; num_trials: in all; describe: a trial's setting;
    earlier: trials that have ended in earlier starts, of which Tune knows nothing.
    """

    def __init__(
        self,
        name: str,
        goals: Sequence[str],
        num_trials: int,
        describe: Callable[[dict[str, Any]], str] = describe_setting,
        earlier: Sequence[Any] = (),
    ):
        self.name, self.goals, self.num_trials, self.describe = name, goals, num_trials, describe
        self.earlier = earlier
        self.began = self.last = time.monotonic()
        self.last_text = ""

    def should_report(self, trials: list[Trial], done: bool = False) -> bool:
        return done or time.monotonic() - self.last >= TABLE_SECONDS

    def report(self, trials: list[Trial], done: bool, *resources: str) -> None:
        self.last = time.monotonic()
        text = self.table(trials)
        if text != self.last_text:
            self.last_text = text
            minutes = (self.last - self.began) / 60
            print(f"{self.name}, {minutes:.1f} min: {text}\n", flush=True)

    def table(self, trials: Sequence[Trial]) -> str:
        """Return the text of the table."""
        running = {trial.trial_id for trial in trials}  # ended members of a population are begun again
        trials = [*(trial for trial in self.earlier if trial.trial_id not in running), *trials]
        states = {trial.trial_id: trial_status(trial) for trial in trials}
        reports = {trial.trial_id: trial.last_result or {} for trial in trials}
        for trial_id, report in list(reports.items()):  # a repeat has the score of the trial that was trained
            if first := reports.get(report.get(REPEAT_OF, "")):
                reports[trial_id] = first

        def score(trial: Trial) -> float:
            return reports[trial.trial_id].get(self.goals[0], -math.inf)

        counts = Counter(state.partition(" ")[0] for state in states.values())
        lines = [
            f"{len(trials)} of {self.num_trials} trials: {', '.join(f'{n} {s}' for s, n in counts.items())}"
        ]
        finished = [trial for trial in trials if states[trial.trial_id] == "finished"]
        if best := max(finished, key=score, default=None):
            lines.append(
                f"best so far: {self._scores(reports[best.trial_id])} by {best.trial_id}, "
                f"{self._setting(best)}"
            )
        order = sorted(trials, key=lambda trial: (states[trial.trial_id] != "running", -score(trial)))
        rows = [["trial", "state", "epoch", *(f"{goal}, %" for goal in self.goals), "setting"]]
        for trial in order[:MAX_ROWS]:
            report = reports[trial.trial_id]
            epoch = f"{report['epoch']:g} of {report['epochs']:g}" if "epochs" in report else ""
            scores = [percent(report.get(goal)) for goal in self.goals]
            rows.append([trial.trial_id, states[trial.trial_id], epoch, *scores, self._setting(trial)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        if len(order) > MAX_ROWS:
            lines.append(f"and {len(order) - MAX_ROWS} more")
        return "\n  ".join(lines)

    def _scores(self, report: dict[str, Any]) -> str:
        return ", ".join(f"{goal} {percent(report[goal])} %" for goal in self.goals if goal in report)

    def _setting(self, trial: Trial) -> str:
        return self.describe({name: value for name, value in trial.config.items() if name != REPEAT_OF})


def trial_status(trial: Trial) -> str:
    """Return "running", "pending", "finished", "stopped", "failed" or "repeat of TRIAL"."""
    last = trial.last_result or {}
    if trial.status == Trial.ERROR or last.get("trouble"):
        return "failed"
    if REPEAT_OF in trial.config:
        return f"repeat of {trial.config[REPEAT_OF]}"
    if trial.status == Trial.TERMINATED:
        return "finished" if last.get("finished") else "stopped"
    return trial.status.lower()


class TensorBoardScores(TBXLoggerCallback):
    """Writes scores and losses of trials over their epochs, and, as a trial ends, its settings and scores as
    hyper-parameters; not the twenty figures that Tune and a report's bookkeeping would add.

    scores: names of the scores that trials report; knobs: by name, of the space.
    """

    def __init__(self, scores: Sequence[str], knobs: Mapping[str, Distribution]):
        super().__init__()
        self.scores, self.knobs = scores, knobs

    def log_trial_result(self, iteration: int, trial: Trial, result: dict[str, Any]) -> None:
        if trial not in self._trial_writer:  # it went on after a restart
            self.log_trial_start(trial)
        scores = {name: result[name] for name in self.scores if name in result}
        losses = {name: value for name, value in result.items() if name.startswith("loss/")}
        if not result.get("finished"):  # the last report is of the best epoch again
            for name, value in (scores | losses).items():
                self._trial_writer[trial].add_scalar(name, value, math.ceil(result["epoch"]))
        self._trial_writer[trial].flush()
        self._trial_result[trial] = {f"final/{name}": value for name, value in scores.items()}

    def log_trial_end(self, trial: Trial, failed: bool = False) -> None:
        for name, value in self._trial_result.get(trial, {}).items():
            self._trial_writer[trial].add_scalar(name, value, 0)  # the page of hyper-parameters looks for it
        super().log_trial_end(trial, failed)

    def _try_log_hparams(self, trial: Trial, result: dict[str, Any]) -> None:
        def columns(values: Mapping[str, Any]) -> dict[str, Any]:
            return {name: v if isinstance(v, int | float) else str(v) for name, v in values.items()}

        # TensorBoard has the columns that one trial names: each names all knobs, not its alternatives' alone
        every = {name: knob.ends[0] for name, knob in self.knobs.items()}
        experiment, _, _ = hparams(columns(every), result)
        _, start, end = hparams(columns({k: v for k, v in trial.config.items() if k in self.knobs}), result)
        for summary in (experiment, start, end) if self.knobs else ():
            self._trial_writer[trial].file_writer.add_summary(summary)

"""Pictures of a search: how it went, which knob mattered, how the score follows each, what two goals cost
each other."""

from collections.abc import Sequence
from pathlib import Path

import optuna

from raylib.search import space
from raylib.tables import open_pyplot, save_figure

FEWEST = 4  # finished trials, below which a forest learns nothing of importance


def draw(
    folder: Path, knobs: space.Knobs, rows: Sequence, goals: Sequence[str], seed: int
) -> list[tuple[str, str]]:
    """[(file in `folder`, title)]."""
    made = [_history(folder, rows, goals), _slices(folder, knobs, rows, goals)]
    if len([row for row in rows if row.state == "finished"]) >= FEWEST:
        made += _importances(folder, knobs, rows, goals, seed)
    if len(goals) > 1:
        made.append(_front(folder, rows, goals))
    return made


def importances(knobs: space.Knobs, rows: Sequence, goal: str, seed: int) -> dict[str, float]:
    """{knob: share of the variance of `goal` that it explains (functional ANOVA)}, of finished trials. The
    knobs that every one has are told apart from each other; those of an alternative among the trials that
    chose it, which is said in the name."""
    finished = [row for row in rows if row.state == "finished"]
    found: dict[str, float] = {}
    told: set[str] = set()
    for fixed, members in _groups(knobs, finished).items():
        names = [name for name in members[0].setting if all(name in row.setting for row in members)]
        varied = [name for name in names if len({str(row.setting[name]) for row in members}) > 1]
        if len(members) < FEWEST or not set(varied) - told or len({row.scores[goal] for row in members}) == 1:
            continue
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
        shares = optuna.importance.get_param_importances(
            _study(knobs, members, goal), evaluator=evaluator, params=varied
        )
        found |= {
            f"{name} ({fixed})" if fixed else name: share
            for name, share in shares.items()
            if name not in told
        }
        told |= set(varied)
    return found


def _groups(knobs: space.Knobs, rows: Sequence) -> dict[str, list]:
    """All trials, then those of each alternative, by what they chose."""
    groups: dict[str, list] = {"": list(rows)}
    for name in dict.fromkeys(name for fixed in space.alternatives(knobs) for name in fixed):
        for row in rows:
            if name in row.setting:
                groups.setdefault(f"{name}={row.setting[name]}", []).append(row)
    return {fixed: members for fixed, members in groups.items() if members}


def _study(knobs: space.Knobs, rows: Sequence, goal: str) -> optuna.Study:
    """Trials as a study of Optuna's, whatever searcher they came from."""
    study = optuna.create_study(direction="maximize")
    for row in rows:
        drawn = optuna.trial.FixedTrial(row.setting)
        space.Suggest(knobs)(drawn)
        made = optuna.trial.create_trial(
            params=dict(row.setting), distributions=drawn.distributions, value=row.scores[goal]
        )
        study.add_trial(made)
    return study


def _history(folder: Path, rows: Sequence, goals: Sequence[str]) -> tuple[str, str]:
    """Score of each trial as it was started, and the best of those that finished so far."""
    figure, many = open_pyplot().subplots(
        1, len(goals), figsize=(6.5 * len(goals), 3.6), layout="constrained", squeeze=False
    )
    for axes, goal in zip(many[0], goals, strict=True):
        best, line = float("-inf"), []
        for number, row in enumerate(rows, 1):
            if row.state == "finished":
                best = max(best, row.scores[goal])
            if best > float("-inf"):
                line.append((number, 100 * best))
        for state, colour in (("finished", "tab:blue"), ("stopped", "tab:gray")):
            points = [
                (i, 100 * row.scores[goal])
                for i, row in enumerate(rows, 1)
                if row.state == state and goal in row.scores
            ]
            if points:
                marker = "o" if state == "finished" else "x"
                axes.scatter(*zip(*points, strict=True), color=colour, marker=marker, s=22, label=state)
        axes.step(*zip(*line, strict=True), where="post", color="tab:orange", label="best so far")
        axes.set(xlabel="trial", ylabel=f"{goal}, %")
        axes.legend(fontsize=8)
    return _saved(figure, folder, "history.png", "history")


def _slices(folder: Path, knobs: space.Knobs, rows: Sequence, goals: Sequence[str]) -> tuple[str, str]:
    """Score against each knob, of the trials that have it."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    named = space.by_name(knobs)
    names = [name for name in named if any(name in row.setting for row in rows)]
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure, many = open_pyplot().subplots(
        lines, columns, figsize=(3.1 * columns, 2.7 * lines), layout="constrained", squeeze=False, sharey=True
    )
    for axes, name in zip(many.flat, names, strict=False):
        for state, colour in (("stopped", "tab:gray"), ("finished", "tab:blue")):
            having = [
                row for row in rows if row.state == state and name in row.setting and goals[0] in row.scores
            ]
            values = [row.setting[name] for row in having]
            if any(not isinstance(v, int | float) or isinstance(v, bool) for v in values):
                values = [str(v) for v in values]
            axes.scatter(
                values,
                [100 * row.scores[goals[0]] for row in having],
                color=colour,
                s=16,
                marker="o" if state == "finished" else "x",
            )
        if getattr(named[name], "log", False):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
            axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(name.removeprefix("strategies."), fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in list(many.flat)[len(names) :]:
        axes.set_axis_off()
    figure.supylabel(f"{goals[0]}, %", fontsize=9)
    return _saved(figure, folder, "slices.png", "score against each knob; crosses were stopped")


def _importances(
    folder: Path, knobs: space.Knobs, rows: Sequence, goals: Sequence[str], seed: int
) -> list[tuple[str, str]]:
    """Importance of each knob for each goal; no picture where all trials scored the same."""
    shares = {goal: importances(knobs, rows, goal, seed) for goal in goals}
    if not any(shares.values()):
        return []
    names = sorted(
        {name for of in shares.values() for name in of},
        key=lambda n: max(of.get(n, 0) for of in shares.values()),
    )
    figure, axes = open_pyplot().subplots(
        figsize=(7, 0.8 + 0.35 * max(1, len(names)) * len(goals)), layout="constrained"
    )
    for k, (goal, of) in enumerate(shares.items()):
        axes.barh(
            [i + k * 0.4 for i in range(len(names))], [of.get(n, 0) for n in names], height=0.4, label=goal
        )
    axes.set_yticks(
        [i + 0.2 * (len(goals) - 1) for i in range(len(names))],
        [n.removeprefix("strategies.") for n in names],
        fontsize=8,
    )
    axes.set(xlabel="share of the variance that it explains", xlim=(0, 1))
    if len(goals) > 1:
        axes.legend(fontsize=8)
    return [_saved(figure, folder, "importance.png", "importance of each knob")]


def _front(folder: Path, rows: Sequence, goals: Sequence[str]) -> tuple[str, str]:
    """Both goals of every finished trial; those that none beats in both are joined."""
    from raylib.search.final_runs import front

    finished = [row for row in rows if row.state == "finished"]
    figure, axes = open_pyplot().subplots(figsize=(5, 4), layout="constrained")
    axes.scatter(*([100 * row.scores[goal] for row in finished] for goal in goals), color="tab:blue", s=22)
    best = [[100 * row.scores[goal] for goal in goals] for row in front(finished, goals)]
    axes.plot(*zip(*best, strict=True), color="tab:orange", marker="o", label="not beaten in both")
    axes.set(xlabel=f"{goals[0]}, %", ylabel=f"{goals[1]}, %")
    axes.legend(fontsize=8)
    return _saved(figure, folder, "front.png", "Pareto front")


def _saved(figure, folder: Path, file: str, title: str) -> tuple[str, str]:
    save_figure(figure, folder / file)
    return file, title

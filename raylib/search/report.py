"""What a search leaves for people: trials.csv, best.yaml, report.md and its pictures."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from raylib.config import change_settings
from raylib.fileio import write_atomically
from raylib.launch import LaunchConfig
from raylib.metrics import t_interval
from raylib.search import early_stopping as early
from raylib.search import figures, space
from raylib.search.config import SearchConfig, SearchJob
from raylib.search.final_runs import PUBLISHED, Final, front
from raylib.tables import markdown_table, mean_and_interval, percent


def write_trials(folder: Path, knobs: space.Knobs, rows: Sequence) -> None:
    """Every trial into trials.csv: what became of it, its setting, its scores."""
    names = list(space.by_name(knobs))
    scores = list(dict.fromkeys(name for row in rows for name in row.scores))
    with open(folder / "trials.csv", "w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(
            ["trial", "state", *names, *scores, "epoch", "epochs", "seconds", "start_seconds", "error"]
        )
        for row in rows:
            out.writerow(
                [
                    row.id,
                    row.state,
                    *(row.setting.get(n, "") for n in names),
                    *(row.scores.get(n, "") for n in scores),
                    row.epoch,
                    row.epochs,
                    f"{row.seconds:.1f}",
                    row.start_seconds or "",
                    row.error or "",
                ]
            )


def write(
    config: SearchConfig,
    name: str,
    chosen: space.Space,
    job: SearchJob,
    base: LaunchConfig,
    folder: Path,
    rows: Sequence,
    found: Sequence[Final],
) -> None:
    """best.yaml, the pictures, and, last, report.md."""
    write_best(config, job, base, folder, chosen, found[0])
    early_scores = "" if config.search == "pbt" else _early_scores(config, folder, rows)
    pictures = figures.draw(folder, chosen.knobs, rows, config.goals, config.seed)
    parts = [
        f"# Search of `{name}` over `{config.recipe}`",
        f"{_counted(rows)}; {config.search}, "
        f"{f'stopped early by {config.stop}' if config.stops else 'nothing stopped early'}. Looked at: "
        f"{job.describe_selection(config.select)}. Searched for: {' and '.join(config.goals)}.",
        "## The best",
        _verdict(config, found),
        *([_finals_table(config, found)] if config.seeds else []),
        _assignments(chosen, found[0]),
        *(
            ["## Best of each goal against the other", _front_table(config, rows)]
            if len(config.goals) > 1
            else []
        ),
        "## What it cost",
        cost(rows),
        *(["## What early scores tell", early_scores] if early_scores else []),
        "## Trials",
        _trials_table(config, rows),
        "All of them, with every knob: trials.csv.",
        *(f"![{title}]({file})" for file, title in pictures),
    ]
    failed = [row for row in rows if row.state == "failed"]
    if failed:
        parts += [
            "## Failed",
            *(f"- {row.id}: {(row.error or 'no word').splitlines()[-1]}" for row in failed),
        ]
    write_atomically(folder / "report.md", "\n\n".join(parts) + "\n")


def write_best(
    config: SearchConfig, job: SearchJob, base: LaunchConfig, folder: Path, chosen: space.Space, best: Final
) -> None:
    """The winner's whole config, which the stage's own command runs."""
    values = {} if best.setting is None else space.read(chosen.knobs, best.setting)
    whole = job.final_config(change_settings(base, values)).model_copy(
        update={"name": f"{config.name}_best", "runs": config.runs}
    )
    goals = " and ".join(config.goals)
    head = [f"# The best of the search {config.name}, by {goals}: python -m {job.command} --config best.yaml"]
    for goal in config.goals if best.scores else ():
        head.append(
            f"# {goal} {mean_and_interval(*t_interval(best.of(goal)))} % over {len(best.scores)} seeds"
        )
    text = yaml.safe_dump(whole.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_atomically(folder / "best.yaml", "\n".join(head) + "\n" + text)


def _early_scores(config: SearchConfig, folder: Path, rows: Sequence) -> str:
    last = {row.id: row.scores[config.goals[0]] for row in rows if row.state == "finished"}
    found = early.agreements(folder / "trials", last, config.goals[0], config.grace, config.reduction)
    return early.told(found, config.grace if any(row.state == "stopped" for row in rows) else None)


def cost(rows: Sequence) -> str:
    """Seconds and epochs that trials had, and what the stopped ones did not have; theirs are counted at their
    own speed."""
    spent, saved = sum(row.seconds for row in rows), 0.0
    for row in rows:
        if row.state == "stopped" and row.epoch:
            saved += row.seconds / row.epoch * (row.epochs - row.epoch)
    trained, whole = sum(row.epoch for row in rows), sum(row.epochs for row in rows if row.state != "failed")
    lines = [
        ["", "trials", "epochs", "time of trials"],
        ["trained", str(len(rows)), f"{trained:g}", _time(spent)],
    ]
    stopped = [row for row in rows if row.state == "stopped"]
    left = sum(row.epochs - row.epoch for row in stopped)
    if not stopped:
        return markdown_table(lines)
    lines.append(["not trained, for they were stopped", str(len(stopped)), f"{left:g}", _time(saved)])
    return markdown_table(lines) + f"\n\nStopping saved {100 * left / whole:.0f} % of the epochs."


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _counted(rows: Sequence) -> str:
    counts = {state: sum(row.state == state for row in rows) for state in ("finished", "stopped", "failed")}
    return f"{len(rows)} trials: " + ", ".join(f"{n} {state}" for state, n in counts.items() if n)


def _verdict(config: SearchConfig, found: Sequence[Final]) -> str:
    """Whether the best beats the published setting, on the dev sets that were searched and on the tests that
    were not."""
    best, published = found[0], next((f for f in found if f.name == PUBLISHED), None)
    if not config.seeds:
        return "By one run each (seeds=0): no interval, and nothing tested."
    if not best.scores:
        return (
            "**No final run finished on any fresh seed**: the best is the trials' first, by one run, and "
            "nothing was tested."
        )
    if published is None or best is published:
        return "The published setting is the best found: the search does not beat it."
    lines = []
    for figure in ("targets", "English", *config.goals):
        pairs = _paired(best, published, figure)
        if not pairs:
            continue
        mean, half = t_interval(pairs)
        where = (
            f"{figure}, test sets"
            if figure in ("English", "targets")
            else f"{figure}, which it was chosen by"
        )
        if half is None:
            lines.append(f"- {where}: {percent(mean)} points on the one seed: no interval")
        elif abs(mean) > half:
            how = "beats" if mean > 0 else "is below"
            lines.append(
                f"- {where}: the best {how} the published setting, by {percent(mean)} points ± "
                f"{percent(half)}"
            )
        else:
            lines.append(
                f"- {where}: no difference that {len(pairs)} seeds could show, {percent(mean)} points ± "
                f"{percent(half)}"
            )
    return "Seed by seed, with 95 % confidence intervals:\n\n" + "\n".join(lines)


def _paired(one: Final, other: Final, figure: str) -> list[float]:
    """Differences of a figure on the seeds that both have."""

    def of(final: Final) -> dict[int, float]:
        both = {
            seed: {**final.scores.get(seed, {}), **final.tests.get(seed, {})}
            for seed in {*final.scores, *final.tests}
        }
        return {seed: values[figure] for seed, values in both.items() if values.get(figure) is not None}

    mine, theirs = of(one), of(other)
    return [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]


def _finals_table(config: SearchConfig, found: Sequence[Final]) -> str:
    tests = [name for name in ("English", "targets") if any(f.of(name) for f in found)]
    rows = [
        [
            "setting",
            "seeds",
            *(f"{goal}, %" for goal in config.goals),
            *(f"test, {name}, %" for name in tests),
        ]
    ]
    for final in found:
        figures_of = [_with_interval(final.of(name)) for name in (*config.goals, *tests)]
        failed = f" ({final.failed} failed)" if final.failed else ""
        name = final.name if final.name == PUBLISHED else f"trials' no. {final.name}"
        rows.append([name, f"{len(final.scores)}{failed}", *figures_of])
    return (
        markdown_table(rows)
        + "\n\nMean ± half of the 95 % confidence interval, over seeds that the search had not seen."
    )


def _with_interval(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return mean_and_interval(*t_interval(known)) if known else ""


def _assignments(chosen: space.Space, best: Final) -> str:
    if best.setting is None:
        return "It is the recipe as it is."
    settled = space.read(chosen.knobs, best.setting)
    return "Its settings: " + ", ".join(f"`{path}={_short(value)}`" for path, value in settled.items())


def _front_table(config: SearchConfig, rows: Sequence) -> str:
    finished = [row for row in rows if row.state == "finished"]
    lines = [["trial", *(f"{goal}, %" for goal in config.goals)]]
    lines += [
        [row.id, *(percent(row.scores[goal]) for goal in config.goals)]
        for row in front(finished, config.goals)
    ]
    return markdown_table(lines)


def _trials_table(config: SearchConfig, rows: Sequence) -> str:
    """The ten best that finished."""
    finished = sorted(
        (row for row in rows if row.state == "finished"), key=lambda row: -row.scores[config.goals[0]]
    )[:10]
    lines = [["trial", "setting", *(f"{goal}, %" for goal in config.goals)]]
    for row in finished:
        setting = ", ".join(
            f"{name.removeprefix('strategies.')} {_short(value)}" for name, value in row.setting.items()
        )
        lines.append([row.id, setting, *(percent(row.scores[goal]) for goal in config.goals)])
    return markdown_table(lines, words=2)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)

"""The worth of a search on emoji scenes: many knobs of all methods (`tune_spaces best_of_scenes`), turned by
TPE with ASHA, at random, or not at all, which are the papers' published settings; part of
`benchmarks.claims`.

All see the English development set alone, the same data and, of a seed, the same seed of training. Each has
the epochs of 16 whole trials; what a search has begun beyond these counts for nothing. Its best setting and
the recipe as it is are then run on a seed that it has not seen, and the better one on the development set is
tested. Compute is counted in epochs, those of pruning rounds with the others.
"""

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raylib.display import markdown_table, mean_and_interval, mean_and_std
from raylib.fileio import read_json
from raylib.metrics import t_interval
from raylib.search.space import OneOf, Space, config_changes
from tune_spaces.spaces import SPACES

TASKS = ("xgqa", "xvnli")
SEEDS = 3
EPOCHS = 6
BUDGET = 16 * EPOCHS
# So many trials take about the budget: pruning rounds come on top of a trial's epochs, and ASHA stops most. A
# finalist is chosen among all trials, so that none may lie far beyond it.
RANDOM_TRIALS, ASHA_TRIALS = 12, 26
PUBLISHED = "published settings"
CONTESTANTS = {
    PUBLISHED: ("algorithm=grid", "early_stopping=none"),
    "random search": ("algorithm=random", "early_stopping=none", f"num_trials={RANDOM_TRIALS}"),
    "TPE, ASHA": ("algorithm=tpe", "early_stopping=asha", f"num_trials={ASHA_TRIALS}"),
}
COMMON = ("image_size=null", 'freeze=["vision"]', "train_limit=9000", f"epochs={EPOCHS}", "extra_tests={}")
GOAL = "english_dev"
ROWS = ("P0's best", "P2's", "P1's", "full fine-tuning")


def contestants() -> list[str]:
    """Return the names of all searches, "task/contestant"."""
    return [f"{task}/{contestant}" for task in TASKS for contestant in CONTESTANTS]


def contest_space(name: str) -> Space:
    """Return the space of a search: that of all methods, of which nothing published is told; or, of the
    published settings, one knob that chooses among them and the recipe as it is. A prior over three verdicts
    says nothing, so xvnli has none."""
    task, contestant = name.split("/")
    space = SPACES["best_of_scenes"]
    knobs = {k: knob for k, knob in space.knobs.items() if task == "xgqa" or k != "prior"}
    if contestant != PUBLISHED:
        return Space(f"{space.summary} ({task})", f"scenes_{task}", knobs)
    settings = [
        {k: v for k, v in setting.items() if task == "xgqa" or k.removeprefix("strategies.")[:5] != "prior"}
        for setting in space.published
    ]
    branches = [config_changes(knobs, setting) for setting in settings]
    rows = dict(zip(ROWS, [*branches, {}], strict=True))
    return Space(f"rows of the papers ({task})", f"scenes_{task}", {"row": OneOf(**rows)}, grid={"row": ROWS})


def contest_settings(name: str) -> list[str]:
    """Return the settings of a search and of its trials."""
    return [*CONTESTANTS[name.split("/")[1]], "final_seeds=1", "num_finalists=1", *COMMON]


def read_contest(folder: Path) -> dict[str, Any]:
    """Return {"trials": state, score and epochs of each, in order; "setting" that won; its scores "dev",
    "test"; "recipe": the test scores of the recipe as it is} of a search that is complete."""
    from raylib.search.trial import read_reports

    with open(folder / "trials.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    trials = [
        {
            "state": row["state"],
            "score": float(row[GOAL]) if row[GOAL] else None,
            "epoch": float(row["epoch"]),
        }
        for row in rows
    ]
    names, settings = read_json(folder / "finals" / "settings.json", "finalists")
    finals = []
    for number, (finalist, setting) in enumerate(zip(names, settings, strict=True)):
        for run in folder.glob(f"finals/setting{number}_seed*"):
            reports = read_reports(run)
            finals.append((reports[-1][GOAL], finalist, setting, run / "test.json"))
    dev, _, setting, test = max(finals, key=lambda final: final[0])
    recipe = next(path for _, finalist, _, path in finals if finalist == "published")
    return {
        "trials": trials,
        "setting": setting,
        "dev": dev,
        "test": read_json(test, "test scores"),
        "recipe": read_json(recipe, "test scores"),
    }


def within_budget(trials: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the trials that had begun, and ended, in the first `BUDGET` epochs."""
    spent, found = 0.0, []
    for trial in trials:
        spent += trial["epoch"]
        if spent > BUDGET:
            break
        found.append(trial)
    return found


def best_score(trials: Sequence[Mapping[str, Any]]) -> float:
    """Return the best score of the trials that finished."""
    return max(trial["score"] for trial in trials if trial["state"] == "finished")


def epochs_to(trials: Sequence[Mapping[str, Any]], score: float) -> float:
    """Return the epochs of trials until one has finished with `score` or more; infinity if none has."""
    spent = 0.0
    for trial in trials:
        spent += trial["epoch"]
        if trial["state"] == "finished" and trial["score"] >= score:
            return spent
    return math.inf


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return a table a task: a row a contestant, over the seeds that all have."""
    found = {(r["name"], r["seed"]): r for r in records if r["kind"] == "search"}
    tables = [_task_table(task, found) for task in TASKS]
    return "\n\n".join(filter(None, tables)) or "No search has been run yet."


def _task_table(task: str, found: Mapping[tuple[str, int], Mapping[str, Any]]) -> str:
    names = [f"{task}/{contestant}" for contestant in CONTESTANTS]
    seeds = [seed for seed in range(SEEDS) if all((name, seed) in found for name in names)]
    if not seeds:
        return ""
    head = [f"{task}, {len(seeds)} seeds", "trials", "epochs", "best on English dev, %"]
    head += [f"published settings' score reached after, of {BUDGET} epochs"]
    head += [
        "test: English, %",
        "targets, %",
        "English, above published",
        "targets, above published",
        "core-h",
    ]
    rows = [head]
    for contestant in CONTESTANTS:
        searches = [found[f"{task}/{contestant}", seed] for seed in seeds]
        published = [found[f"{task}/{PUBLISHED}", seed] for seed in seeds]
        trials = [within_budget(search["trials"]) for search in searches]
        reached = [
            epochs_to(of_seed, best_score(other["trials"])) / BUDGET
            for of_seed, other in zip(trials, published, strict=True)
        ]
        row = [
            contestant,
            f"{statistics.fmean(map(len, trials)):.0f}",
            f"{statistics.fmean(sum(t['epoch'] for t in of_seed) for of_seed in trials):.0f}",
            mean_and_std(best_score(of_seed) for of_seed in trials),
            f"{_share(statistics.median(reached))} ({', '.join(map(_share, reached))})",
        ]
        for language in ("English", "targets"):
            row.append(_interval([search["test"][language] for search in searches]))
        for language in ("English", "targets"):
            pairs = zip(searches, published, strict=True)
            differences = [a["test"][language] - b["test"][language] for a, b in pairs]
            row.append("" if contestant == PUBLISHED else _interval(differences, "+"))
        row.append(f"{sum(search['cpu_seconds'] for search in searches) / 3600:.1f}")
        rows.append(row)
    return markdown_table(rows)


def _interval(values: Sequence[float], sign: str = "") -> str:
    return mean_and_interval(*t_interval(values), sign)


def _share(share: float) -> str:
    return "never" if share == math.inf else f"{100 * share:.0f} %"

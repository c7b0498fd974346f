"""Compare TPE with early stopping to the paper's grid and to random search, on paper 4's own grid.

    python -m benchmarks.search MODEL DATA [--seeds 8] [--folder runs/search_benchmark]

Paper 4 tries five weights of the alignment times three learning rates on XTD, 15 runs; all of them are ten
times as large here, where vectors are short and the model is small. The same is asked of emoji scenes (recipe
`transfer_routine3_lora`, German, 50 captions, 20 epochs), scored on the German development set. All see the
same ranges and seeds, two trials at a time. Compute is counted in epochs, which cost the same in every trial
here, whatever else the machine does. MODEL: a run or an export, DATA: emoji scenes; for docs/results.md,
runs/sample_model and runs/scenes of `make search`.
"""

import argparse
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.results import RESULTS, newest
from raylib.config import override
from raylib.display import markdown_table, mean_and_std
from raylib.fileio import append_jsonl, read_jsonl
from raylib.search.config import SearchConfig
from raylib.search.space import Float, Space

FILE = RESULTS / "search.jsonl"
SPACE = Space(
    "paper 4's grid of weight and learning rate",
    "transfer_routine3_lora",
    {"strategies.alignment.weight": Float(0.01, 100, log=True), "optim.lr": Float(3e-4, 3e-3, log=True)},
    published=({"strategies.alignment.weight": 10.0, "optim.lr": 1e-3},),
    grid={"strategies.alignment.weight": (0.01, 0.1, 1.0, 10.0, 100.0), "optim.lr": (3e-4, 1e-3, 3e-3)},
)
CONTESTANTS = {  # three times as many trials as the grid has, most of them stopped
    "paper's grid": ("algorithm=grid", "early_stopping=none"),
    "random search": ("algorithm=random", "early_stopping=none", "num_trials=15"),
    "TPE, ASHA": ("algorithm=tpe", "early_stopping=asha", "num_trials=45"),
    "TPE, ASHA from epoch 3": ("algorithm=tpe", "early_stopping=asha", "min_epochs=3", "num_trials=45"),
    "TPE, nothing stopped": ("algorithm=tpe", "early_stopping=none", "num_trials=15"),
}
GOAL = "target_dev"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path("runs/search_benchmark"))
    given = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for seed in range(given.seeds):
        for name, settings in CONTESTANTS.items():
            found = search(given.model, given.data, given.folder, seed, name, settings)
            line = {"seed": seed, "contestant": name, **found}
            if line not in read_jsonl(FILE):  # a search that is complete is not made again
                append_jsonl(FILE, line)
    print(table(read_jsonl(FILE)))


def search(
    model: Path,
    data: Path,
    runs: Path,
    seed: int,
    name: str,
    settings: Sequence[str],
    space: Space = SPACE,
) -> dict:
    """Run one contestant: {"rows": its trials in the order of their start, "early": how their early scores
    rank as the last}."""
    from finetune.recipes import RECIPES
    from raylib.search.schedulers import rank_agreements
    from raylib.search.search import run_search
    from tune_spaces.jobs import FinetuneSearchJob

    search_name = f"{''.join(c for c in name if c.isalnum())}_seed{seed}"
    search_settings = [
        f"name={search_name}",
        f"runs={runs}",
        "dev_sets=target_dev",
        "final_seeds=0",
        "max_concurrent=2",
        f"seed={seed}",
    ]
    config = override(SearchConfig(recipe=space.recipe), [*search_settings, *settings])
    recipe_settings = [
        f"model={model}",
        f"data={data}",
        'languages=["de"]',
        f"fit.seed={seed}",
        "fit.bf16=false",
        "fit.loader_workers=0",
        "test_limit=150",
    ]
    base = override(RECIPES[space.recipe](), recipe_settings)
    folder = run_search(config, "paper4", space, FinetuneSearchJob(), base)
    rows = trials(folder)
    last = {row["trial"]: row["score"] for row in rows if row["state"] == "finished"}
    if config.early_stopping != "none":
        return {"rows": rows, "early": []}
    agreements = rank_agreements(folder / "trials", last, GOAL, 1, config.reduction_factor)
    return {"rows": rows, "early": [[a.epoch, a.rho] for a in agreements]}


def trials(folder: Path) -> list[dict]:
    """Return the columns of trials.csv that the table needs."""
    import csv

    with open(folder / "trials.csv", encoding="utf-8") as file:
        return [
            {
                "trial": row["trial"],
                "state": row["state"],
                "score": float(row[GOAL]) if row[GOAL] else None,
                "epoch": float(row["epoch"]),
                "seconds": float(row["seconds"]),
                "start": float(row["start_seconds"]) if row["start_seconds"] else None,
                "weight": float(row["strategies.alignment.weight"]),
                "lr": float(row["optim.lr"]),
            }
            for row in csv.DictReader(file)
        ]


def best_within(rows: Sequence[dict], budget: float) -> tuple[float | None, int]:
    """Return (best score of the trials that finished, number of trials) in the first `budget` epochs of
    trials."""
    spent, best, count = 0.0, None, 0
    for row in rows:
        spent += row["epoch"]
        if spent > budget:
            break
        count += 1
        if row["state"] == "finished" and (best is None or row["score"] > best):
            best = row["score"]
    return best, count


def epochs_to(rows: Sequence[dict], score: float) -> float:
    """Return the epochs of trials until one has finished with `score` or more; infinity if none has."""
    spent = 0.0
    for row in rows:
        spent += row["epoch"]
        if row["state"] == "finished" and row["score"] >= score:
            return spent
    return math.inf


def grid_noise(grids: Sequence[Sequence[dict]]) -> float:
    """Return the standard deviation of scores (seeds x settings) less a setting's mean and a seed's; 0 of one
    seed."""
    points = [{(row["weight"], row["lr"]): row["score"] for row in rows} for rows in grids]
    scores = np.array([[point[key] for key in sorted(points[0])] for point in points])
    residuals = scores - scores.mean(0) - scores.mean(1, keepdims=True) + scores.mean()
    free = (scores.shape[0] - 1) * (scores.shape[1] - 1)
    return float(np.sqrt((residuals**2).sum() / free)) if free else 0.0


def table(lines: Sequence[dict]) -> str:
    """Return a table with a row a contestant, over the seeds that all of them have."""
    lines = newest(list(lines), "seed", "contestant")
    rows_of = {(line["seed"], line["contestant"]): line["rows"] for line in lines}
    seeds = [
        seed
        for seed in sorted({line["seed"] for line in lines})
        if all((seed, name) in rows_of for name in CONTESTANTS)
    ]
    if not seeds:
        return "Not measured yet."
    head = [
        "",
        "trials for the grid's epochs",
        "trials a core-hour",
        "best German mean recall, %",
        "grid's best reached after, of its epochs",
        "within its noise",
        "first start in a process, s",
        "later starts, s",
    ]
    out, noise = [head], grid_noise([rows_of[seed, "paper's grid"] for seed in seeds])
    for name in CONTESTANTS:
        counts, rates, bests, shares, near_best, first, later = [], [], [], [], [], [], []
        for seed in seeds:
            rows, grid = rows_of[seed, name], rows_of[seed, "paper's grid"]
            budget = sum(row["epoch"] for row in grid)
            best, count = best_within(rows, budget)
            grid_best = max(row["score"] for row in grid if row["state"] == "finished")
            shares.append(epochs_to(rows, grid_best) / budget)
            near_best.append(epochs_to(rows, grid_best - noise) / budget)
            counts.append(count)
            rates.append(3600 * len(rows) / sum(row["seconds"] for row in rows))
            bests.append(best)
            first += [row["start"] for row in rows[:2] if row["start"]]  # two at a time
            later += [row["start"] for row in rows[2:] if row["start"]]
        reached = [
            f"{_share(statistics.median(found))} ({', '.join(map(_share, found))})"
            for found in (shares, near_best)
        ]
        out.append(
            [
                name,
                f"{statistics.fmean(counts):.0f}",
                f"{statistics.fmean(rates):.0f}",
                mean_and_std(bests),
                *reached,
                f"{statistics.median(first):.1f}",
                f"{statistics.median(later):.1f}",
            ]
        )
    early = [(f"after {age}", statistics.median(rhos)) for age, rhos in _early(lines, seeds).items()]
    note = (
        f"Seeds {', '.join(map(str, seeds))}: mean ± std, or the median and each. Noise: {100 * noise:.2f} "
        "points, the standard deviation of a grid setting's score over seeds, less what a seed adds to all "
        "settings."
    )
    if early:
        note += (
            " Rank correlation of a score with the last, median of the searches that stop nothing: "
            f"{', '.join(f'{rho:.2f} {when}' for when, rho in early)} epochs."
        )
    return f"{markdown_table(out)}\n\n{note}"


def _share(share: float) -> str:
    return "never" if share == math.inf else f"{100 * share:.0f} %"


def _early(lines: Sequence[dict], seeds: Sequence[int]) -> dict[int, list[float]]:
    """Return {epoch: Spearman's rho of the scores after it with the last ones, of every search that stopped
    nothing}."""
    found: dict[int, list[float]] = {}
    for line in lines:
        for age, rho in line["early"] if line["seed"] in seeds else ():
            found.setdefault(age, []).append(rho)
    return found


if __name__ == "__main__":
    main()

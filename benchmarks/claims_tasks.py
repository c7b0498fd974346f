"""What the model of `benchmarks.claims` can do: its full fine-tuning rows task by task, beside what answers
without looking at both text and image, and beside the floors below which methods could not be told apart."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.claims_table import HELD_OUT
from raylib.display import markdown_table, mean_and_interval, mean_and_std, percent
from raylib.metrics import t_interval

ROWS = {  # experiment: what it is called in tables
    "xgqa/baseline": "xgqa",
    "xvnli/baseline": "xvnli",
    "xflickrco/baseline": "xflickrco (mean recall)",
    "marvl/baseline": "marvl, from pretraining alone",
    "marvl/after_xgqa": "marvl, after xgqa",
}
Run = Mapping[str, Any]  # record of a seed
Group = Sequence[Run]  # the seeds of an experiment
Runs = Mapping[str, Group]


def targets_of(scores: Mapping[str, float]) -> dict[str, float]:
    """Return the scores of the languages that are neither English nor held out."""
    return {code: score for code, score in scores.items() if code not in ("en", HELD_OUT)}


def mean_of_targets(scores: Mapping[str, float]) -> float | None:
    """Return the mean of `targets_of`; None of no targets."""
    found = targets_of(scores)
    return statistics.fmean(found.values()) if found else None


# ---- floors


class Floor(NamedTuple):
    """A score, in shares of one, that an experiment must reach."""

    experiment: str
    what: str
    least: float
    measure: Callable[[Group], float]


def _english(group: Group) -> float:
    return statistics.fmean(run["scores"]["en"] for run in group)


def _kind(kind: str) -> Callable[[Group], float]:
    return lambda group: statistics.fmean(run["by_type"]["en"][kind] for run in group)


def by_images(group: Group) -> dict[str, float]:
    """Return what the right images bring each target, against those of other items: mean of the seeds."""
    return {
        code: statistics.fmean(run["scores"][code] - run["shuffled_images"][code] for run in group)
        for code in targets_of(group[0]["scores"])
    }


def _least_by_images(group: Group) -> float:
    return min(by_images(group).values())


def _share_without_things(group: Group) -> float:
    """Return the share of languages and seeds whose yes-no questions are not all answered with things."""
    marks = [run["marks"].get(code, "") for run in group for code in run["scores"]]
    return statistics.fmean("‡" not in each for each in marks)


FLOORS = (
    Floor("xgqa/baseline", "English", 0.80, _english),
    Floor("xgqa/baseline", "English, verify", 0.95, _kind("verify")),
    Floor("xgqa/baseline", "English, choose", 0.95, _kind("choose")),
    Floor("xgqa/baseline", "English, query", 0.60, _kind("query")),
    Floor("xvnli/baseline", "English", 0.85, _english),
    Floor("xflickrco/baseline", "English", 0.70, _english),
    Floor("marvl/baseline", "English", 0.75, _english),
    Floor("xgqa/baseline", "lowest target, above itself with shuffled images", 0.10, _least_by_images),
    Floor("xvnli/baseline", "lowest target, above itself with shuffled images", 0.08, _least_by_images),
    Floor("xgqa/baseline", "languages that answer yes-no questions with yes or no", 1, _share_without_things),
)


def floors_table(runs: Runs) -> str:
    """Return a row a floor: met or missed."""
    rows = [["floor: %", "of", "wanted", "reached", "seeds", "verdict"]]
    for floor in FLOORS:
        group = runs.get(floor.experiment, ())
        row = [floor.what, ROWS[floor.experiment], percent(floor.least)]
        if not group:
            rows.append([*row, "", "", "not run"])
            continue
        value = floor.measure(group)
        verdict = "met" if value >= floor.least else f"missed by {percent(floor.least - value)}"
        rows.append([*row, percent(value), str(len(group)), verdict])
    return markdown_table(rows, words=2)


# ---- tables


def tasks_table(runs: Runs) -> str:
    """Return a row a task: English, targets and the held-out language, each beside its score with the images
    of other items; what the text alone and the image alone reach."""
    rows = [
        ["fine-tuned in English: %", "seeds", "English", "images shuffled", "by the images", "other style"]
        + ["text alone", "image alone", "most frequent answer, or chance"]
        + ["targets", "images shuffled", "by the images", "other style", HELD_OUT, "images shuffled"]
    ]
    for name, title in ROWS.items():
        if not (group := runs.get(name)):
            rows.append([title, "not run", *[""] * (len(rows[0]) - 2)])
            continue
        baselines = group[-1].get("baselines", {}).get("en", {})
        frequent = baselines.get("majority", baselines.get("chance"))
        rows.append(
            [
                title,
                str(len(group)),
                *_scores(group, _of("en")),
                percent(baselines.get("text")),
                percent(baselines.get("image")),
                percent(frequent),
                *_scores(group, mean_of_targets),
                *_scores(group, _of(HELD_OUT))[:2],
            ]
        )
    return markdown_table(rows)


def _of(code: str) -> Callable[[Mapping[str, float]], float | None]:
    return lambda scores: scores.get(code)


def _scores(group: Group, figure: Callable[[Mapping[str, float]], float | None]) -> list[str]:
    """Return the cells of a figure: score, with shuffled images, the difference seed by seed, in another
    style."""
    scores, shuffled, style = (
        [figure(run.get(part, {})) for run in group] for part in ("scores", "shuffled_images", "test_style")
    )
    differences = [a - b for a, b in zip(scores, shuffled, strict=True) if a is not None and b is not None]
    by_images = mean_and_interval(*t_interval(differences), "+") if differences else ""
    return [mean_and_std(scores), mean_and_std(shuffled), by_images, mean_and_std(style)]


def kinds_table(runs: Runs) -> str:
    """Return a row a kind of question, of xgqa."""
    group = runs.get("xgqa/baseline", ())
    rows = [["xgqa: %", "English", "images shuffled", "targets", "images shuffled", HELD_OUT]]
    for kind in sorted({kind for run in group for kind in run["by_type"]["en"]}):
        cells = []
        for figure in (_of("en"), mean_of_targets, _of(HELD_OUT)):
            for part in ("by_type", "shuffled_by_type"):
                tables = (run.get(part, {}) for run in group)
                cells.append(mean_and_std(figure(_of_kind(table, kind)) for table in tables))
        rows.append([kind, *cells[:5]])
    return markdown_table(rows) if group else ""


def _of_kind(by_type: Mapping[str, Mapping[str, float]], kind: str) -> dict[str, float]:
    return {code: scores[kind] for code, scores in by_type.items() if kind in scores}


def marks_line(runs: Runs) -> str:
    """Say which languages get one answer, or things for yes and no, in which seeds."""
    found = [
        (title, code, mark, [str(run["seed"]) for run in runs[name] if mark in run["marks"].get(code, "")])
        for name, title in ROWS.items()
        for mark in "†‡"
        for code in (runs[name][0]["scores"] if name in runs else ())
    ]
    lines = [
        f"{mark} {what}: {_listed(found, mark)}."
        for mark, what in (
            ("†", "Nearly all items, or yes-no questions, get one answer"),
            ("‡", "Yes-no questions get things as answers"),
        )
    ]
    return "\n\n".join(lines) if runs.keys() & ROWS.keys() else ""


def _listed(found: Iterable[tuple[str, str, str, Sequence[str]]], mark: str) -> str:
    items = [
        f"{title}, {code} (seed {', '.join(seeds)})"
        for title, code, of, seeds in found
        if of == mark and seeds
    ]
    return "; ".join(items) or "none"


def tables(runs: Runs) -> str:
    """Return all that is said of what the model can do."""
    parts = [floors_table(runs), tasks_table(runs), kinds_table(runs), marks_line(runs)]
    return "\n\n".join(filter(None, parts))

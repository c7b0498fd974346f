"""Runs side by side: a row for runs that differ in seeds alone, a column for each setting in which rows
differ.

    mean ± h      over the seeds of a row; h is half of the 95 % confidence interval of the mean by Student's
                  t: t(0.975, n - 1) s / sqrt(n), s the sample standard deviation. One seed has no interval.
    difference    between two rows: the mean of their differences seed by seed, over the seeds that both have,
                  and the interval of that mean. What a seed decides in both (order of the data, a new head)
                  cancels out.

Runs are in one row if their settings are equal but for the seeds, and so are those of the runs that they go
on from (`finetune.lineage`). A run with the settings and seeds of an earlier one repeats it: named and left
out.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from finetune.lineage import described, read_lineage
from finetune.report import read_result, scores_of
from raylib.config import suggest
from raylib.errors import UserError
from raylib.metrics import t_interval
from raylib.provenance import list_changed_files, read_identity

ABSENT = object()  # no such setting in a row: a part that is off, or a model that is no run
Estimate = tuple[float, float | None]  # a mean, and half of its interval: None of one value


class Run(NamedTuple):
    """A finished run: its folder, result, settings and seeds (`finetune.lineage`), and its method's name."""

    folder: Path
    result: dict[str, Any]
    settings: dict[str, Any]
    seeds: tuple[int, ...]
    method: str


class Row(NamedTuple):
    """Runs that differ in seeds alone."""

    method: str
    settings: dict[str, Any]
    runs: list[Run]

    @property
    def by_seed(self) -> dict[tuple[int, ...], Run]:
        """Runs by the seed that pairs them with another row's: their own, or all of theirs where some share
        it."""
        own = {run.seeds[:1]: run for run in self.runs}
        return own if len(own) == len(self.runs) else {run.seeds: run for run in self.runs}


class Comparison(NamedTuple):
    """The rows of one task.

    columns: dotted paths of the settings in which rows differ. scores: {head of a column: the share that a
    result has there, or None}; aggregates: those that are of several languages. baseline: the row that the
    others' differences are from.
    """

    task: str
    metric: str
    rows: list[Row]
    columns: list[str]
    scores: dict[str, Callable[[dict[str, Any]], float | None]]
    aggregates: frozenset[str]
    baseline: Row

    def mean(self, row: Row, score: str) -> Estimate | None:
        """The mean over seeds; None if no run has the score."""
        values = [self.scores[score](run.result) for run in row.runs]
        known = [value for value in values if value is not None]
        return t_interval(known) if known else None

    def pairs(self, row: Row) -> list[tuple[Run, Run]]:
        """(run, the baseline's run) of each seed that both have. A run that depends on no seed, for nothing
        was trained, is a pair with each of the other row's."""
        runs, others = row.by_seed, self.baseline.by_seed
        if () in runs:
            return [(runs[()], other) for other in others.values()]
        if () in others:
            return [(run, others[()]) for run in runs.values()]
        return [(run, others[seed]) for seed, run in runs.items() if seed in others]

    def difference(self, row: Row, score: str) -> Estimate | None:
        """The mean of the paired differences from the baseline; None if no pair has the score, or if it is of
        other languages in both: a mean over hard ones is not below that over easy ones by what was
        trained."""
        value = self.scores[score]
        pairs = self.pairs(row)
        if score in self.aggregates:
            pairs = [(a, b) for a, b in pairs if scores_of(a.result).keys() == scores_of(b.result).keys()]
        found = [(value(run.result), value(other.result)) for run, other in pairs]
        known = [ours - theirs for ours, theirs in found if ours is not None and theirs is not None]
        return t_interval(known) if known else None


def compare(folders: Sequence[Path], baseline: Path | None = None) -> tuple[list[Comparison], list[str]]:
    """Compare finished runs, task by task.

    baseline: a run whose row is the baseline of its task; where none is given, the first row is.

    Returns:
        (comparisons, lines to tell: runs that repeat others, runs made from other data or by other code than
        the first one of their task, stored settings that this version has not).
    Raises:
        UserError: a folder is no finished run, or a trial that was never tested; `baseline` is not among
        `folders`.
    """
    chosen = baseline and baseline.resolve()
    if chosen and chosen not in [folder.resolve() for folder in folders]:
        close = suggest(str(baseline), [str(folder) for folder in folders])
        raise UserError(f"--baseline {baseline}: not among the runs that are compared{close}")
    lines: list[str] = []
    tasks: dict[tuple[str, bool], list[Row]] = {}
    for folder in folders:
        run, unknown = _read(folder)
        lines += [line for line in unknown if line not in lines]
        rows = tasks.setdefault((run.result["task"], "retrieval" in run.result), [])
        row = next((row for row in rows if (row.method, row.settings) == (run.method, run.settings)), None)
        if row is None:
            rows.append(Row(run.method, run.settings, [run]))
        elif same := next((other for other in row.runs if other.seeds == run.seeds), None):
            seed = f"seed {', '.join(map(str, run.seeds))}" if run.seeds else "nothing that a seed decides"
            lines.append(f"{folder} repeats {same.folder}: the same settings, {seed}; left out")
            if folder.resolve() == chosen:
                chosen = same.folder.resolve()
        else:
            row.runs.append(run)
    for rows in tasks.values():
        lines += _made_differently([run for row in rows for run in row.runs])
    return [_comparison(task, rows, chosen) for (task, _), rows in tasks.items()], lines


def _made_differently(runs: Sequence[Run]) -> list[str]:
    """A line for each run of a task that has read other data than the first one by the same paths, and one if
    they are of several versions of the code. Settings do not tell these apart, and so neither do rows."""
    first = runs[0]
    lines: list[str] = []
    versions: dict[str, list[Path]] = {}
    data = read_identity(first.folder)["data"]
    for run in runs:
        if different := list_changed_files(data, read_identity(run.folder)["data"]):
            lines.append(
                f"{run.folder} and {first.folder} were made from different data: {', '.join(different[:3])}"
            )
        if code := run.result.get("code"):  # earlier versions did not record it
            versions.setdefault(code, []).append(run.folder)
    if len(versions) > 1:
        which = "; ".join(f"{code} ({len(by)}, such as {by[0]})" for code, by in versions.items())
        lines.append(f"{first.result['task']}: runs made by {len(versions)} versions of the code: {which}")
    return lines


def _read(folder: Path) -> tuple[Run, tuple[str, ...]]:
    result, lineage = read_result(folder), read_lineage(folder)
    method = result["method"]  # if this version cannot read the settings
    if lineage.config:
        finished, skipped = result.get("finished", True), result.get("skipped_steps", 0)
        method = described(lineage.config, result["steps"], finished, folder, skipped)
    # the split that was evaluated: earlier versions meant xGQA's testdev where the setting says "test"
    settings = lineage.settings | {"split": result.get("split", lineage.settings.get("split"))}
    return Run(folder, result, settings, lineage.seeds, method), lineage.unknown


def _comparison(task: str, rows: list[Row], chosen: Path | None) -> Comparison:
    results = [run.result for row in rows for run in row.runs]
    metric, first = ("mean recall", "R@1") if "retrieval" in results[0] else ("accuracy", "accuracy")
    scores: dict[str, Callable] = {}
    for code in dict.fromkeys(code for result in results for code in scores_of(result)):
        scores[f"{code}, {metric}"] = lambda result, code=code: scores_of(result).get(code)
    languages = len(scores)
    for name, key in (("mean of the targets", "mean_targets"), ("gap", "gap")):
        scores[f"{name}, {metric}"] = lambda result, key=key: result[key]
    for key in ("std", "range"):  # how far languages are apart (`raylib.metrics.disparity`)
        # one language is not apart from itself: 0 would look like the fairest model
        scores[f"{key} of languages, {first}"] = lambda result, key=key: (
            result.get("disparity", {}).get(key) if len(scores_of(result)) > 1 else None
        )
    base = next((row for row in rows if chosen in [run.folder.resolve() for run in row.runs]), rows[0])
    columns, aggregates = differing([row.settings for row in rows]), frozenset(list(scores)[languages:])
    return Comparison(task, metric, rows, columns, scores, aggregates, base)


def differing(settings: Sequence[dict[str, Any]], prefix: str = "") -> list[str]:
    """Dotted paths at which some of these nested settings differ. A part that some have and others have not
    is one path, unless those that have it differ within: then the paths within tell it."""
    found: list[str] = []
    for name in dict.fromkeys(name for values in settings for name in values):
        values = [part.get(name, ABSENT) for part in settings]
        parts = [value for value in values if isinstance(value, dict)]
        others = [value for value in values if not isinstance(value, dict)]
        within = differing(parts, f"{prefix}{name}.") if len(parts) > 1 else []
        if within and all(value is None or value is ABSENT for value in others):
            found += within
        elif any(value != values[0] for value in values):
            found += [prefix + name, *within]
    return found

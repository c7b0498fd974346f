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

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from finetune.lineage import ABSENT, RunSettings, described, read_lineage, varying_paths
from finetune.one_answer import MARKS, marks_of
from finetune.report import (
    baselines_of,
    extra_mean,
    extra_scores,
    read_result,
    scores_of,
    trained_languages,
)
from raylib.config import suggest
from raylib.display import latex_table, markdown_table, mean_and_interval, percent
from raylib.errors import UserError, name_errors
from raylib.metrics import t_interval
from raylib.provenance import list_changed_files, read_identity

Estimate = tuple[float, float | None]  # a mean, and half of its interval: None of one value


class ComparedRun(NamedTuple):
    """A finished run: its folder, result, settings and seeds (`finetune.lineage`), and its method's name."""

    folder: Path
    result: dict[str, Any]
    settings: dict[str, Any]
    seeds: tuple[int, ...]
    method: str


class ComparisonRow(NamedTuple):
    """Runs that differ in seeds alone."""

    method: str
    settings: dict[str, Any]
    runs: list[ComparedRun]

    @property
    def by_seed(self) -> dict[tuple[int, ...], ComparedRun]:
        """Runs by the seed that pairs them with another row's: their own, or all of theirs where some share
        it."""
        cells_of_row = {run.seeds[:1]: run for run in self.runs}
        return cells_of_row if len(cells_of_row) == len(self.runs) else {run.seeds: run for run in self.runs}


class Comparison(NamedTuple):
    """The rows of one task.

    columns: dotted paths of the settings in which rows differ. scores: {head of a column: the share that a
    result has there, or None}; languages: {head: the language} of those that are the score of one;
    aggregates: those that are of several. baseline: the row that the others' differences are from.
    """

    task: str
    metric: str
    rows: list[ComparisonRow]
    columns: list[str]
    scores: dict[str, Callable[[dict[str, Any]], float | None]]
    languages: dict[str, str]
    aggregates: frozenset[str]
    baseline: ComparisonRow

    def mean(self, row: ComparisonRow, score: str) -> Estimate | None:
        """The mean over seeds; None if no run has the score."""
        values = [self.scores[score](run.result) for run in row.runs]
        known = [value for value in values if value is not None]
        return t_interval(known) if known else None

    def marks(self, row: ComparisonRow, score: str) -> str:
        """The marks (`finetune.one_answer`) that any of the row's runs has in a language."""
        code = self.languages.get(score, "")
        found = {mark for run in row.runs for mark in marks_of(run.result.get("answers", {}).get(code, {}))}
        return "".join(mark for mark in MARKS if mark in found)

    def baselines(self) -> dict[str, dict[str, float]]:
        """{what answers without understanding: {head of a column: its share}} (`report.baselines_of`), as far
        as all runs agree: others were tested on other items."""
        shares: dict[str, dict[str, set[float]]] = {}
        for result in (run.result for row in self.rows for run in row.runs):
            for name, scores in baselines_of(result).items():
                for group, share in scores.items():
                    head = f"{'mean of the targets' if group == 'targets' else group}, {self.metric}"
                    shares.setdefault(name, {}).setdefault(head, set()).add(share)
        agreed = {
            name: {head: min(found) for head, found in heads.items() if len(found) == 1}
            for name, heads in shares.items()
        }
        return {name: heads for name, heads in agreed.items() if heads}

    def pairs(self, row: ComparisonRow) -> list[tuple[ComparedRun, ComparedRun]]:
        """(run, the baseline's run) of each seed that both have. A run that depends on no seed, for nothing
        was trained, is a pair with each of the other row's."""
        runs, others = row.by_seed, self.baseline.by_seed
        if () in runs:
            return [(runs[()], other) for other in others.values()]
        if () in others:
            return [(run, others[()]) for run in runs.values()]
        return [(run, others[seed]) for seed, run in runs.items() if seed in others]

    def difference(self, row: ComparisonRow, score: str) -> Estimate | None:
        """The mean of the paired differences from the baseline; None if no pair has the score, or if it is of
        other languages in both: a mean over hard ones is not below that over easy ones by what was
        trained."""
        value = self.scores[score]
        pairs = [(run.result, other.result) for run, other in self.pairs(row)]
        if score in self.aggregates:
            pairs = [(a, b) for a, b in pairs if trained_languages(a) == trained_languages(b)]
        found = [(value(a), value(b)) for a, b in pairs]
        known = [a - b for a, b in found if a is not None and b is not None]
        return t_interval(known) if known else None


def compare_runs(folders: Sequence[Path], baseline: Path | None = None) -> tuple[list[Comparison], list[str]]:
    """Compare finished runs, task by task.

    baseline: a run whose row is the baseline of its task; where none is given, the first row is.

    Returns:
        (comparisons, lines to tell: runs that repeat others, runs made from other data or by other code than
        the first one of their task, stored settings that this version has not).
    Raises:
        UserError: a folder is no finished run, or a trial that was never tested; `baseline` is not among
        `folders`.
    """
    baseline_folder = baseline and baseline.resolve()
    if baseline_folder and baseline_folder not in [folder.resolve() for folder in folders]:
        close = suggest(str(baseline), [str(folder) for folder in folders])
        raise UserError(f"--baseline {baseline}: not among the runs that are compared{close}")
    lines: list[str] = []
    tasks: dict[tuple[str, bool], list[ComparisonRow]] = {}
    # the first run of a setting opens its row; later ones differ in seeds, or repeat one
    for folder in folders:
        run, unknown = _read_run(folder)
        lines += [line for line in unknown if line not in lines]
        rows = tasks.setdefault((run.result["task"], "retrieval" in run.result), [])
        row = next((row for row in rows if (row.method, row.settings) == (run.method, run.settings)), None)
        if row is None:
            rows.append(ComparisonRow(run.method, run.settings, [run]))
        elif same := next((other for other in row.runs if other.seeds == run.seeds), None):
            seed = f"seed {', '.join(map(str, run.seeds))}" if run.seeds else "nothing that a seed decides"
            lines.append(f"{folder} repeats {same.folder}: the same settings, {seed}; left out")
            if folder.resolve() == baseline_folder:
                baseline_folder = same.folder.resolve()
        else:
            row.runs.append(run)
    for rows in tasks.values():
        lines += _provenance_notes([run for row in rows for run in row.runs])
    return [_compare_rows(task, rows, baseline_folder) for (task, _), rows in tasks.items()], lines


def _provenance_notes(runs: Sequence[ComparedRun]) -> list[str]:
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


def _read_run(folder: Path) -> tuple[ComparedRun, tuple[str, ...]]:
    result, lineage = read_result(folder), read_lineage(folder)
    method = result["method"]  # if this version cannot read the settings
    if lineage.config:
        finished, skipped = result.get("finished", True), result.get("skipped_steps", 0)
        method = described(lineage.config, result["steps"], finished, folder, skipped)
    # the split that was evaluated: earlier versions meant xGQA's testdev where the setting says "test"
    settings = lineage.settings | {"split": result.get("split", lineage.settings.get("split"))}
    return ComparedRun(folder, result, settings, lineage.seeds, method), lineage.unknown


def _compare_rows(task: str, rows: list[ComparisonRow], baseline_folder: Path | None) -> Comparison:
    results = [run.result for row in rows for run in row.runs]
    metric, first = ("mean recall", "R@1") if "retrieval" in results[0] else ("accuracy", "accuracy")
    scores: dict[str, Callable] = {}
    languages = {}
    for code in dict.fromkeys(code for result in results for code in scores_of(result)):
        scores[f"{code}, {metric}"] = lambda result, code=code: scores_of(result).get(code)
        languages[f"{code}, {metric}"] = code
    for name, key in (("mean of the targets", "mean_targets"), ("gap", "gap")):
        scores[f"{name}, {metric}"] = lambda result, key=key: result[key]
    for key in ("std", "range"):  # how far languages are apart (`raylib.metrics.disparity`)
        # one language is not apart from itself: 0 would look like the fairest model
        scores[f"{key} of languages, {first}"] = lambda result, key=key: (
            result.get("disparity", {}).get(key) if len(scores_of(result)) > 1 else None
        )
    # of extra tests English and the mean of the targets: each run's own table has all languages
    for name in dict.fromkeys(name for result in results for name in extra_scores(result)):
        head = name.replace("_", " ")
        if any("en" in extra_scores(result).get(name, {}) for result in results):
            scores[f"en, {head}"] = lambda result, name=name: extra_scores(result).get(name, {}).get("en")
        scores[f"mean of the targets, {head}"] = lambda result, name=name: extra_mean(result, name)
    base = next(
        (row for row in rows if baseline_folder in [run.folder.resolve() for run in row.runs]), rows[0]
    )
    columns = varying_paths([row.settings for row in rows])
    aggregates = frozenset(head for head in scores if head not in languages and not head.startswith("en, "))
    return Comparison(task, metric, rows, columns, scores, languages, aggregates, base)


# ---- for people: Markdown, LaTeX, CSV

CSV_COLUMNS = (
    *("runs", "seeds", "score", "mean", "low", "high"),
    *("baseline", "seeds in common", "difference", "difference low", "difference high"),
)


class ComparisonTable(NamedTuple):
    """lines: the head first. words: how many columns hold words, before those with figures. notes: below."""

    title: str
    lines: list[list[str]]
    words: int
    notes: Sequence[str] = ()


def to_markdown(comparisons: Sequence[Comparison]) -> str:
    """Every table under its title."""
    tables = _tables(comparisons)
    parts = ([title, markdown_table(lines, words), *notes] for title, lines, words, notes in tables)
    return "\n\n".join("\n\n".join(part) for part in parts)


def write_latex(comparisons: Sequence[Comparison], path: Path) -> None:
    """Write every table as LaTeX that needs no package.

    Raises:
        UserError: `path` cannot be written.
    """
    parts = [
        latex_table(lines, ". ".join([title, *notes]), words)
        for title, lines, words, notes in _tables(comparisons)
    ]
    _write_text(path, "\n\n".join(parts) + "\n")


def write_csv(comparisons: Sequence[Comparison], path: Path) -> None:
    """Write a line for each row and score: task, method, settings, runs; then shares in [0, 1], not rounded:
    the mean and the ends of its interval, the difference from the baseline and the ends of its interval.
    Empty is what there is not.

    Raises:
        UserError: `path` cannot be written.
    """
    settings = list(dict.fromkeys(column for comparison in comparisons for column in comparison.columns))
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow([*("task", "method"), *settings, *CSV_COLUMNS])
    for comparison in comparisons:
        for row in comparison.rows:
            cells_of_row = dict(zip(comparison.columns, _setting_cells(comparison, row)[1:], strict=True))
            cells = [cells_of_row.get(column, "") for column in settings]
            runs = " ".join(str(run.folder) for run in row.runs)
            about = [comparison.task, row.method, *cells, runs, len(row.runs) if row.runs[0].seeds else 0]
            other = row is not comparison.baseline
            pairs = [comparison.baseline.runs[0].folder, len(comparison.pairs(row))] if other else ["", ""]
            for score in comparison.scores:
                if mean := comparison.mean(row, score):
                    difference = comparison.difference(row, score) if other else None
                    out.writerow([*about, score, *_ends(mean), *pairs, *_ends(difference)])
    _write_text(path, text.getvalue())


def _tables(comparisons: Sequence[Comparison]) -> list[ComparisonTable]:
    """The means of each task and, where it has more rows than one, their differences."""
    tables = []
    for comparison in comparisons:
        rows = comparison.rows
        scores = [score for score in comparison.scores if any(comparison.mean(row, score) for row in rows)]
        tables.append(_mean_table(comparison, scores))
        if len(rows) > 1:
            tables.append(_difference_table(comparison, scores))
    return tables


def _mean_table(comparison: Comparison, scores: list[str]) -> ComparisonTable:
    """In %."""
    lines = [["method", *comparison.columns, "seeds", *scores, "trained, % of parameters"]]
    for row in comparison.rows:
        seeds = _seed_count(len(row.runs)) if row.runs[0].seeds else "none (nothing trained)"
        estimates = [
            " ".join(filter(None, (_estimate(comparison.mean(row, score)), comparison.marks(row, score))))
            for score in scores
        ]
        lines.append([*_setting_cells(comparison, row), seeds, *estimates, _trained_share(row)])
    for name, found in comparison.baselines().items():
        cells = [percent(found.get(score)) for score in scores]
        lines.append([name, *("" for _ in comparison.columns), "", *cells, ""])
    settings, columns = comparison.rows[0].settings, comparison.columns
    equal = [settings.get(name) for name in ("setting", "split") if name not in columns]
    what = ", ".join([comparison.task, *map(str, equal)])
    title = f"{what}: {comparison.metric} in %, mean ± half of its 95 % interval over seeds"
    return ComparisonTable(title, lines, 1 + len(columns), _mark_notes(comparison))


def _mark_notes(comparison: Comparison) -> list[str]:
    """A line for each mark: of which rows and languages, and of how many of their runs."""
    notes = []
    for mark, meaning in MARKS.items():
        cells = []
        for row in comparison.rows:
            for code in comparison.languages.values():
                count = sum(mark in marks_of(run.result.get("answers", {}).get(code, {})) for run in row.runs)
                cells += [f"{row.method}, {code} ({count} of {len(row.runs)} runs)"] if count else []
        notes += [f"{mark} note: {meaning}: {'; '.join(cells)}"] if cells else []
    return notes


def _difference_table(comparison: Comparison, scores: list[str]) -> ComparisonTable:
    """In points of a per cent."""
    lines = [["method", *comparison.columns, "seeds in common", *scores]]
    for row in (row for row in comparison.rows if row is not comparison.baseline):
        seeds = _seed_count(len(comparison.pairs(row)))
        estimates = [_estimate(comparison.difference(row, score), "+") for score in scores]
        lines.append([*_setting_cells(comparison, row), seeds, *estimates])
    method, *cells = _setting_cells(comparison, comparison.baseline)
    pairs = zip(comparison.columns, cells, strict=True)
    base = ", ".join([method, *(f"{path} {cell}" for path, cell in pairs if cell)])
    title = f"{comparison.task}: points above {base}, seed by seed, mean ± half of its 95 % interval"
    return ComparisonTable(title, lines, 1 + len(comparison.columns))


def _setting_cells(comparison: Comparison, row: ComparisonRow) -> list[str]:
    """The method, and the settings in which rows differ."""
    return [row.method, *(_setting_cell(comparison, row, path) for path in comparison.columns)]


def _setting_cell(comparison: Comparison, row: ComparisonRow, path: str) -> str:
    """A setting; of a run, where the first seed's lies; of a part that is on in some rows, "on"; "" where the
    row has none."""
    value = _setting_at(row, path)
    if isinstance(value, RunSettings):
        return value.path + (" ..." if len(row.runs) > 1 else "")
    if isinstance(value, dict):
        return "on"
    if value is None:
        is_part = any(isinstance(_setting_at(other, path), dict) for other in comparison.rows)
        return "" if is_part else "none"
    if value is ABSENT:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _setting_at(row: ComparisonRow, path: str) -> Any:
    """The setting at a dotted path, or ABSENT."""
    value: Any = row.settings
    for name in path.split("."):
        value = value.get(name, ABSENT) if isinstance(value, dict) else ABSENT
    return value


def _trained_share(row: ComparisonRow) -> str:
    """Share of the parameters that were trained; of small modules without heads, as paper 4 counts."""
    shares = {
        run.result.get("share", run.result["trainable"] / run.result["params"])
        for run in row.runs
        if run.result["steps"] > run.result.get("skipped_steps", 0) and run.result.get("params")
    }
    return " ".join(f"{100 * share:.2f}" for share in sorted(shares))


def _seed_count(seeds: int) -> str:
    return "1 (no interval)" if seeds == 1 else str(seeds)


def _estimate(found: Estimate | None, sign: str = "") -> str:
    return mean_and_interval(*found, sign) if found else ""


def _ends(found: Estimate | None) -> list[float | str]:
    """[mean, low, high]."""
    if found is None:
        return ["", "", ""]
    mean, half = found
    return [mean, "", ""] if half is None else [mean, mean - half, mean + half]


def _write_text(path: Path, text: str) -> None:
    with name_errors(path):
        path.write_text(text, encoding="utf-8")

"""Comparisons for people: Markdown, LaTeX, CSV."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from finetune.compare import ABSENT, Comparison, Estimate, Row
from finetune.lineage import RunSettings
from raylib.errors import UserError
from raylib.tables import latex_table, markdown_table, mean_and_interval


class Table(NamedTuple):
    """lines: the head first. words: how many columns hold words, before those with figures."""

    title: str
    lines: list[list[str]]
    words: int


def to_markdown(comparisons: Sequence[Comparison]) -> str:
    """Every table under its title."""
    parts = [f"{title}\n\n{markdown_table(lines, words)}" for title, lines, words in _tables(comparisons)]
    return "\n\n".join(parts)


def write_latex(comparisons: Sequence[Comparison], path: Path) -> None:
    """Write every table as LaTeX that needs no package.

    Raises:
        UserError: `path` cannot be written.
    """
    parts = [latex_table(lines, title, words) for title, lines, words in _tables(comparisons)]
    _write(path, "\n\n".join(parts) + "\n")


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
    out.writerow(
        [
            "task",
            "method",
            *settings,
            "runs",
            "seeds",
            "score",
            "mean",
            "low",
            "high",
            "baseline",
            "seeds in common",
            "difference",
            "difference low",
            "difference high",
        ]
    )
    for comparison in comparisons:
        for row in comparison.rows:
            own = dict(zip(comparison.columns, _settings(comparison, row)[1:], strict=True))
            cells = [own.get(column, "") for column in settings]
            runs = " ".join(str(run.folder) for run in row.runs)
            about = [comparison.task, row.method, *cells, runs, len(row.runs) if row.runs[0].seeds else 0]
            other = row is not comparison.baseline
            pairs = [comparison.baseline.runs[0].folder, len(comparison.pairs(row))] if other else ["", ""]
            for score in comparison.scores:
                if mean := comparison.mean(row, score):
                    difference = comparison.difference(row, score) if other else None
                    out.writerow([*about, score, *_ends(mean), *pairs, *_ends(difference)])
    _write(path, text.getvalue())


def _tables(comparisons: Sequence[Comparison]) -> list[Table]:
    """The means of each task and, where it has more rows than one, their differences."""
    tables = []
    for comparison in comparisons:
        rows = comparison.rows
        scores = [score for score in comparison.scores if any(comparison.mean(row, score) for row in rows)]
        tables.append(_means(comparison, scores))
        if len(rows) > 1:
            tables.append(_differences(comparison, scores))
    return tables


def _means(comparison: Comparison, scores: list[str]) -> Table:
    """In %."""
    lines = [["method", *comparison.columns, "seeds", *scores, "trained, % of parameters"]]
    for row in comparison.rows:
        seeds = _count(len(row.runs)) if row.runs[0].seeds else "none (nothing trained)"
        estimates = [_words(comparison.mean(row, score)) for score in scores]
        lines.append([*_settings(comparison, row), seeds, *estimates, _trained(row)])
    settings, columns = comparison.rows[0].settings, comparison.columns
    equal = [settings.get(name) for name in ("setting", "split") if name not in columns]
    what = ", ".join([comparison.task, *map(str, equal)])
    title = f"{what}: {comparison.metric} in %, mean ± half of its 95 % interval over seeds"
    return Table(title, lines, 1 + len(columns))


def _differences(comparison: Comparison, scores: list[str]) -> Table:
    """In points of a per cent."""
    lines = [["method", *comparison.columns, "seeds in common", *scores]]
    for row in comparison.rows:
        if row is not comparison.baseline:
            estimates = [_words(comparison.difference(row, score), "+") for score in scores]
            lines.append([*_settings(comparison, row), _count(len(comparison.pairs(row))), *estimates])
    method, *cells = _settings(comparison, comparison.baseline)
    pairs = zip(comparison.columns, cells, strict=True)
    base = ", ".join([method, *(f"{path} {cell}" for path, cell in pairs if cell)])
    title = f"{comparison.task}: points above {base}, seed by seed, mean ± half of its 95 % interval"
    return Table(title, lines, 1 + len(comparison.columns))


def _settings(comparison: Comparison, row: Row) -> list[str]:
    """The method, and the settings in which rows differ."""
    return [row.method, *(_cell(comparison, row, path) for path in comparison.columns)]


def _cell(comparison: Comparison, row: Row, path: str) -> str:
    """A setting; of a run, where the first seed's lies; of a part that is on in some rows, "on"; "" where the
    row has none."""
    value = _value(row, path)
    if isinstance(value, RunSettings):
        return value.path + (" ..." if len(row.runs) > 1 else "")
    if isinstance(value, dict):
        return "on"
    if value is None:
        parts = [other for other in comparison.rows if isinstance(_value(other, path), dict)]
        return "" if parts else "none"
    if value is ABSENT or isinstance(value, str):
        return "" if value is ABSENT else value
    return json.dumps(value, ensure_ascii=False)


def _value(row: Row, path: str) -> Any:
    """The setting at a dotted path, or ABSENT."""
    value: Any = row.settings
    for name in path.split("."):
        value = value.get(name, ABSENT) if isinstance(value, dict) else ABSENT
    return value


def _trained(row: Row) -> str:
    """Share of the parameters that were trained; of small modules without heads, as paper 4 counts."""
    shares = {
        run.result.get("share", run.result["trainable"] / run.result["params"])
        for run in row.runs
        if run.result["steps"] > run.result.get("skipped_steps", 0) and run.result.get("params")
    }
    return " ".join(f"{100 * share:.2f}" for share in sorted(shares))


def _count(seeds: int) -> str:
    return "1 (no interval)" if seeds == 1 else str(seeds)


def _words(found: Estimate | None, sign: str = "") -> str:
    return mean_and_interval(*found, sign) if found else ""


def _ends(found: Estimate | None) -> list[float | str]:
    """[mean, low, high]."""
    mean, half = found or ("", None)
    return [mean, "", ""] if half is None else [mean, mean - half, mean + half]


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise UserError(f"{path}: not written ({e.strerror})") from None

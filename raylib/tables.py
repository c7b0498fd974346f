"""Tables and figures for people: Markdown, LaTeX, shares as per cent; how matplotlib is opened and closed."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "\n": " ",
}


def markdown_table(rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """`rows`, the first of which is the head; after the first `words` columns all are figures, and aligned as
    such."""
    rule = ["---"] * words + ["---:"] * (len(rows[0]) - words)
    cells = ([cell.replace("|", "\\|") for cell in row] for row in (rows[0], rule, *rows[1:]))
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def percent(value: float | None) -> str:
    """A share in %, without the sign; nothing for None."""
    return "" if value is None else f"{round(100 * value, 1) + 0.0:.1f}"  # no "-0.0"


def mean_and_interval(mean: float, half: float | None, sign: str = "") -> str:
    """A mean and half of its interval (`raylib.metrics`), in %; `sign` stands before what is above 0."""
    text = (sign if round(100 * mean, 1) > 0 else "") + percent(mean)
    return text if half is None else f"{text} ± {percent(half)}"


def mean_and_std(shares: Iterable[float | None]) -> str:
    """Mean and, of two or more, standard deviation, in %; None is left out."""
    known = [share for share in shares if share is not None]
    if not known:
        return ""
    return percent(statistics.fmean(known)) + (
        f" ± {percent(statistics.stdev(known))}" if len(known) > 1 else ""
    )


def escape_latex(text: str) -> str:
    """`text` as LaTeX prints it; a negative number with a minus, not a hyphen."""
    sign, rest = ("$-$", text[1:]) if text[:1] == "-" and text[1:2].isdigit() else ("", text)
    return sign + "".join(LATEX.get(character, character) for character in rest)


def latex_table(rows: Sequence[Sequence[str]], caption: str, words: int = 1) -> str:
    """`rows`, the first of which is the head, as a table environment that needs no package; after the first
    `words` columns all are figures, and aligned to the right."""
    head, *rest = (" & ".join(map(escape_latex, row)) + r" \\" for row in rows)
    columns = "l" * words + "r" * (len(rows[0]) - words)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape_latex(caption)}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\hline",
        head,
        r"\hline",
        *rest,
        r"\hline",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines)


def open_pyplot() -> Any:
    """Return matplotlib's pyplot, which opens no window."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, path: Path, dpi: int = 120) -> None:
    """Write a figure as an image file, and let go of its memory."""
    figure.savefig(path, dpi=dpi)
    open_pyplot().close(figure)

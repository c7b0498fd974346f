"""Output for people: tables and figures (Markdown, LaTeX, shares as per cent; how matplotlib is opened
and closed); progress where a person waits, a bar with rate and remaining time on a terminal, a line now and
then in a log."""

import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, BinaryIO, TextIO, TypeVar

from tqdm import tqdm

from raylib.fileio import atomic_file

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
    "†": r"$\dagger$",
    "‡": r"$\ddagger$",
    "\n": " ",
}
T = TypeVar("T")
LOG_SECONDS = 30.0  # between lines, where nobody watches a terminal
LINE = "{desc}: {n_fmt} of {total_fmt}{unit}, {rate_fmt}, {elapsed} so far, {remaining} to go"
LINE_OF_UNKNOWN_TOTAL = "{desc}: {n_fmt}{unit}, {rate_fmt}, {elapsed} so far"
_hidden = False
DELAY = 1.0  # seconds before a terminal shows a bar: what is done by then needs none


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
    """Write a figure as an image file, whole or not at all, and let go of its memory.

    Raises:
        MachineError: a full disk, no permission.
    """
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format=path.suffix[1:])
    open_pyplot().close(figure)


def hide_progress() -> None:
    """Let `progress` show nothing in this process: the one that it works for shows how far all are."""
    global _hidden
    _hidden = True


class _Bar(tqdm):
    monitor_interval = 0  # no thread: processes are forked while bars are shown


class _Lines:
    """A log: what tqdm writes over its last line becomes a line of its own."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        if line := " ".join(text.split()):
            self.stream.write(f"{line}\n")

    def flush(self) -> None:
        self.stream.flush()


def progress(
    iterable: Iterable[T],
    description: str,
    total: int | None = None,
    unit: str = "items",
    size: Callable[[T], int] | None = None,
) -> Iterator[T]:
    """Yield from `iterable`, and show on stderr how many `unit` of `total` are done, how many a second, and
    the time that remains. A terminal has a line that changes, gone in the end; a log gets one at most every
    30 seconds; of several workers the first shows it.

    unit: "B" are bytes. total: of units; default: the length of `iterable`, if it has one. size: units in an
        item, of batches; default: 1.
    """
    from raylib.distributed import rank

    watched = sys.stderr.isatty()
    log: Any = sys.stderr if watched else _Lines(sys.stderr)
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    line = LINE_OF_UNKNOWN_TOTAL if total is None else LINE
    bar = _Bar(
        iterable if size is None else None,
        desc=description,
        total=total,
        unit=unit if unit == "B" else f" {unit}",
        unit_scale=unit == "B",
        file=log,
        bar_format=None if watched else line,
        disable=_hidden or rank() > 0,
        leave=False,
        dynamic_ncols=watched,
        delay=DELAY if watched else LOG_SECONDS,
        mininterval=0.2 if watched else LOG_SECONDS,
        maxinterval=LOG_SECONDS,
        miniters=1,
    )
    with bar:
        if size is None:
            yield from bar
            return
        for item in iterable:
            yield item
            bar.update(size(item))


def file_progress(file: BinaryIO, items: Iterable[T], description: str) -> Iterator[T]:
    """Yield `items` that are read from `file`, as `progress` does, which counts how far this is read."""
    position = file.tell()

    def advance(_: T) -> int:
        nonlocal position
        before, position = position, file.tell()
        return position - before

    return progress(items, description, os.fstat(file.fileno()).st_size, "B", advance)

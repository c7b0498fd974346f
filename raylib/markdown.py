"""Tables for people: Markdown, shares as per cent."""

import statistics
from collections.abc import Iterable, Sequence


def table(rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """`rows`, the first of which is the head; after the first `words` columns all are figures, and aligned as
    such."""
    rule = ["---"] * words + ["---:"] * (len(rows[0]) - words)
    cells = ([cell.replace("|", "\\|") for cell in row] for row in (rows[0], rule, *rows[1:]))
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def percent(value: float | None) -> str:
    """A share in %, without the sign; nothing for None."""
    return "" if value is None else f"{round(100 * value, 1) + 0.0:.1f}"  # no "-0.0"


def estimate(mean: float, half: float | None, sign: str = "") -> str:
    """A mean and half of its interval (`raylib.intervals`), in %; `sign` stands before what is above 0."""
    text = (sign if round(100 * mean, 1) > 0 else "") + percent(mean)
    return text if half is None else f"{text} ± {percent(half)}"


def spread(shares: Iterable[float | None]) -> str:
    """Mean and, of two or more, standard deviation, in %; None is left out."""
    known = [share for share in shares if share is not None]
    if not known:
        return ""
    return percent(statistics.fmean(known)) + (
        f" ± {percent(statistics.stdev(known))}" if len(known) > 1 else ""
    )

"""Progress where a person waits: a bar with rate and remaining time on a terminal, a line now and then in a
log."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, BinaryIO, TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")
LOG_SECONDS = 30.0  # between lines, where nobody watches a terminal
LINE = "{desc}: {n_fmt} of {total_fmt}{unit}, {rate_fmt}, {elapsed} so far, {remaining} to go"
LINE_OF_UNKNOWN_TOTAL = "{desc}: {n_fmt}{unit}, {rate_fmt}, {elapsed} so far"
DELAY = 1.0  # seconds before a terminal shows a bar: what is done by then needs none


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
        disable=rank() > 0,
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

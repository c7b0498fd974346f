"""What a trial has told, in a file of its own beside its run: it outlives the driver, and Ray's own files."""

import time
from pathlib import Path
from typing import Any

from raylib.fileio import append_jsonl, read_jsonl
from raylib.finite import require_finite_values

FILE = "told.jsonl"


def tell(run: Path, values: dict[str, Any]) -> None:
    """Append a line, with the time that it was told "at".

    Raises:
        NotFinite: a value is not finite; nothing is told.
    """
    require_finite_values(str(run), values)
    append_jsonl(run / FILE, {"at": time.time(), **values})


def read_told(run: Path) -> list[dict[str, Any]]:
    """All lines, in order; one cut off by a crash is dropped."""
    return read_jsonl(run / FILE)

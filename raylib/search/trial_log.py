"""What a trial has told, in a file of its own beside its run: it outlives the driver, and Ray's own files."""

import json
import time
from pathlib import Path
from typing import Any

from raylib.finite import require_finite_values

FILE = "told.jsonl"


def tell(run: Path, values: dict[str, Any]) -> None:
    """Append a line, with the time that it was told "at".

    Raises:
        NotFinite: a value is not finite; nothing is told.
    """
    require_finite_values(str(run), values)
    with open(run / FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps({"at": time.time(), **values}, allow_nan=False) + "\n")


def read_told(run: Path) -> list[dict[str, Any]]:
    """All lines, in order; one cut off by a crash is dropped."""
    path, found = run / FILE, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found

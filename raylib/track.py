"""Metrics of a run: `metrics.jsonl`, from which `raylib.trackers` has them."""

import json
from pathlib import Path

from raylib.fileio import append_jsonl, read_jsonl, write_atomically
from raylib.finite import finite_values


class Tracker:
    """Appends one line a record. A resumed run drops the lines of steps that it will do again, and of others
    what is not finite, which earlier versions wrote as NaN: JSON has no such word."""

    def __init__(self, run: Path, start: int):
        self.path, self.name = run / "metrics.jsonl", run.name
        # a run that crashed has logged steps after its newest checkpoint, which come again
        lines = [json.dumps(finite_values(r)) + "\n" for r in read_metrics(run) if r["step"] <= start]
        write_atomically(self.path, "".join(lines))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Finite values at `step`; names with a slash group: "loss/itm", "retrieval/de"."""
        append_jsonl(self.path, {"step": step, **values})


def read_metrics(run: Path) -> list[dict]:
    """Return all records of a run, in order; a last line cut off by a crash is dropped."""
    return read_jsonl(run / "metrics.jsonl")

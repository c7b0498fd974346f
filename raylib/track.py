"""Metrics of a run: `metrics.jsonl`, from which `raylib.tracking` has them; the line of progress that is
printed."""

import json
import time
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


class ProgressLog:
    """Passes what a training of `steps` steps reaches on to `tracker`, and prints it: step, losses, samples a
    second, time left. Workers without a tracker say nothing."""

    def __init__(self, steps: int, first: int, tracker: Tracker | None):
        self.steps, self.first, self.tracker = steps, first, tracker
        self.num_samples = 0  # of a step, on all workers
        self.start_time = self.last_time = time.perf_counter()
        self.last_step = first

    def log(self, step: int, lr: float, losses: dict[str, float], skipped: int, batch: dict) -> None:
        """Log step `step`: its losses, how many steps have been skipped so far, samples of all workers a
        second since the last line. JSON has no NaN: a loss that is not finite is in the printed line
        alone."""
        now = time.perf_counter()
        self.num_samples = batch.get("samples", 0)
        rate = (step - self.last_step) * self.num_samples / (now - self.last_time)
        self.last_time, self.last_step = now, step
        if self.tracker:
            finite = {f"loss/{k}": v for k, v in finite_values(losses).items()}
            self.tracker.log(step, {"lr": lr, **finite, "skipped": skipped, "samples_per_second": rate})
            line = " ".join(f"{k} {v:.3f}" for k, v in losses.items())
            line += f"  skipped {skipped}" if skipped else ""
            seconds = (now - self.start_time) / (step - self.first) * (self.steps - step)
            eta = f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
            print(f"step {step}/{self.steps}  {line}  {rate:.0f} samples/s  ETA {eta}", flush=True)

    def log_evaluation(self, step: int, scores: dict[str, float]) -> None:
        """Log the scores after `step` steps."""
        if self.tracker:
            self.tracker.log(step, {f"eval/{k}": v for k, v in scores.items()})
            line = "  ".join(f"{k} {v:.4f}" for k, v in scores.items())
            print(f"step {step}/{self.steps}  {line}", flush=True)

    def mean_rate(self, step: int, seconds: dict[str, float]) -> float:
        """Return samples a second over all of the `step` steps, which took `seconds` by activity."""
        spent = seconds.get("step", 0.0) + seconds.get("data", 0.0)
        return step * self.num_samples / spent if spent else 0.0


def read_metrics(run: Path) -> list[dict]:
    """Return all records of a run, in order; a last line cut off by a crash is dropped."""
    return read_jsonl(run / "metrics.jsonl")

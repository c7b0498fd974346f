"""Metrics of a run: into `metrics.jsonl` always; to TensorBoard, Weights & Biases or MLflow when asked; the
line of progress that is printed."""

import importlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from raylib.errors import UserError
from raylib.fileio import append_jsonl, read_jsonl
from raylib.finite import finite_values

Backend = Literal["tensorboard", "wandb", "mlflow"]
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
LOG: dict[str, Callable[[Any, int, dict[str, float]], Any]] = {
    "tensorboard": lambda writer, step, values: [writer.add_scalar(k, v, step) for k, v in values.items()],
    "wandb": lambda wandb, step, values: wandb.log(values, step=step),
    "mlflow": lambda mlflow, step, values: mlflow.log_metrics(values, step=step),
}
CLOSE: dict[str, Callable[[Any], Any]] = {
    "tensorboard": lambda writer: writer.close(),
    "wandb": lambda wandb: wandb.finish(),
    "mlflow": lambda mlflow: mlflow.end_run(),
}


class Tracker:
    """Appends one line a record. A resumed run drops the lines of steps that it will do again, and of others
    what is not finite, which earlier versions wrote as NaN: JSON has no such word."""

    def __init__(self, run: Path, backends: tuple[Backend, ...], start: int):
        self.path, self.name = run / "metrics.jsonl", run.name
        # a run that crashed has logged steps after its newest checkpoint, which come again
        lines = [json.dumps(finite_values(r)) + "\n" for r in read_metrics(run) if r["step"] <= start]
        self.path.write_text("".join(lines), encoding="utf-8")
        self.backends = {name: _open_backend(name, run) for name in backends}

    def log(self, step: int, values: dict[str, float]) -> None:
        """Finite values at `step`; names with a slash group: "loss/itm", "retrieval/de"."""
        append_jsonl(self.path, {"step": step, **values})
        for name, module in self.backends.items():
            LOG[name](module, step, values)

    def close(self) -> None:
        """Tell the backends that the run has ended."""
        for name, module in self.backends.items():
            CLOSE[name](module)


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


def _open_backend(name: str, run: Path) -> Any:
    try:
        module = importlib.import_module(MODULES[name])
    except ImportError:
        raise UserError(
            f"track: '{name}' is not installed; `pip install {name}`, or leave it out of track"
        ) from None
    if name == "tensorboard":
        return module.SummaryWriter(run / "tensorboard")
    if name == "wandb":
        module.init(project="polyglance", name=run.name, dir=run, id=run.name, resume="allow")
        return module
    # a server where one is named; else a database, for MLflow no longer writes folders
    here = f"sqlite:///{(run / 'mlflow.db').resolve()}"
    module.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI", here))
    module.start_run(run_name=run.name)
    return module

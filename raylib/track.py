"""Where figures go: `metrics.jsonl` always; TensorBoard, Weights & Biases or MLflow when asked."""

import importlib
import json
from pathlib import Path
from typing import Literal

from raylib.errors import UserError
from raylib.fileio import append_jsonl, read_jsonl
from raylib.finite import finite_values

Backend = Literal["tensorboard", "wandb", "mlflow"]
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


class Tracker:
    """Appends one line a record. A resumed run drops the lines of steps that it will do again, and of others
    what is not finite, which earlier versions wrote as NaN: JSON has no such word."""

    def __init__(self, run: Path, backends: tuple[Backend, ...], start: int):
        self.path, self.name = run / "metrics.jsonl", run.name
        lines = [r for r in read_metrics(run) if r["step"] <= start] if start else []
        self.path.write_text("".join(json.dumps(finite_values(r)) + "\n" for r in lines), encoding="utf-8")
        self.backends = {name: _open(name, run) for name in backends}

    def log(self, step: int, values: dict[str, float]) -> None:
        """Finite values at `step`; names with a slash group: "loss/itm", "retrieval/de"."""
        append_jsonl(self.path, {"step": step, **values})
        for name, module in self.backends.items():
            if name == "tensorboard":
                for key, value in values.items():
                    module.add_scalar(key, value, step)
            elif name == "wandb":
                module.log(values, step=step)
            else:
                module.log_metrics(values, step=step)

    def close(self) -> None:
        for name, module in self.backends.items():
            getattr(module, {"tensorboard": "close", "wandb": "finish", "mlflow": "end_run"}[name])()


def read_metrics(run: Path) -> list[dict]:
    """All records of a run, in order; a last line cut off by a crash is dropped."""
    return read_jsonl(run / "metrics.jsonl")


def _open(name: str, run: Path):
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
    module.set_tracking_uri((run / "mlflow").resolve().as_uri())
    module.start_run(run_name=run.name)
    return module

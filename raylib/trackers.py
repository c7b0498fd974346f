"""The services that runs are tracked in (`fit.track`): TensorBoard, Weights & Biases, MLflow."""

import csv
import io
import os
import re
import secrets
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

from raylib.display import open_pyplot
from raylib.errors import hide_secrets
from raylib.fileio import file_lock
from raylib.settings import Backend

Status = Literal["finished", "stopped", "failed"]
Figures = Mapping[str, Mapping[str, float | None]]  # {language: {name: value}}

PROJECT = "polyglance"  # unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME say otherwise
IMAGE = ".png"


class Point(NamedTuple):
    """Value logged at a step. `time`: of logging, in ms since 1970."""

    time: int
    step: int
    values: dict[str, float]


class RunFacts(NamedTuple):
    """A run as trackers show it. `kind`: pretrain or finetune; `top`: the folder of the search, or of the run
    with parts, that it belongs to, or its own; `parents`: {tracker: id} of the run that it is a part of."""

    folder: Path
    kind: str
    config: dict[str, Any]
    tags: dict[str, str]
    top: Path
    parents: dict[Backend, str]

    @property
    def name(self) -> str:
        """The run's name; of a part or a trial with the names of what it belongs to."""
        return str(self.folder.relative_to(self.top.parent))

    @property
    def group(self) -> str | None:
        """The name of the search or run that it belongs to."""
        return self.top.name if self.top != self.folder else None


class ExperimentTracker(ABC):
    """A run in one tracker. `id`: its id there; `address`: of the project, in which an id means something."""

    id: str
    address: str

    @abstractmethod
    def __init__(self, facts: RunFacts, stored: dict[str, Any]):
        """Begin the run, or go on with the one of this id and address, which is `stored`.

        Raises:
            ImportError: the tracker's package is not installed.
        """

    @abstractmethod
    def log(self, points: Sequence[Point]) -> None:
        """Log metrics, in the order of their steps."""

    @abstractmethod
    def log_results(self, split: str, figures: Figures, files: Sequence[Path]) -> None:
        """Log what the run came to: a table, the figures one by one, images and other files."""

    @abstractmethod
    def close(self, status: Status) -> None:
        """Tell the tracker how this start of the run ended."""


class TensorBoard(ExperimentTracker):
    """Files in RUN/tensorboard, for `tensorboard --logdir RUNS`."""

    id = address = "tensorboard"

    def __init__(self, facts: RunFacts, stored: dict[str, Any]):
        from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread

        self.folder, before = facts.folder / "tensorboard", threading.excepthook

        def hide_writers(arguments: Any) -> None:
            # its error comes out of the next call too, where it is told in a line
            if not isinstance(arguments.thread, _AsyncWriterThread):
                before(arguments)

        threading.excepthook = hide_writers
        self._open()
        if not stored:
            lines = [f"- `{path}` {value}" for path, value in flatten({**facts.tags, **facts.config}).items()]
            self.writer.add_text("config", "\n".join(lines))

    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder))

    def log(self, points: Sequence[Point]) -> None:
        try:
            for point in points:
                for name, value in point.values.items():
                    self.writer.add_scalar(name, value, point.step, point.time / 1000)
            self.writer.flush()
        except OSError:  # a full disk has ended the thread that writes: with room again, a new one goes on
            self._open()
            raise

    def log_results(self, split: str, figures: Figures, files: Sequence[Path]) -> None:
        rows = [" | ".join(map(str, row)) for row in table_rows(figures)]
        if rows:
            rule = " | ".join("---" for _ in table_rows(figures)[0])
            self.writer.add_text(split, "\n".join([rows[0], rule, *rows[1:]]))
        for file in files:
            if file.suffix == IMAGE:
                self.writer.add_image(file.stem, open_pyplot().imread(file), dataformats="HWC")

    def close(self, status: Status) -> None:
        self.writer.close()


class Wandb(ExperimentTracker):
    """A run of Weights & Biases, whose variables win: WANDB_PROJECT, WANDB_ENTITY, WANDB_RUN_GROUP,
    WANDB_NAME, WANDB_TAGS, WANDB_DIR, WANDB_MODE=offline, ... A process that is killed (SIGKILL) takes along
    what W&B has not written yet: the newest step, and of an offline run the last second."""

    EXIT_CODES: Mapping[Status, int] = {"finished": 0, "failed": 1, "stopped": 255}  # 255 is W&B's of Ctrl-C

    def __init__(self, facts: RunFacts, stored: dict[str, Any]):
        # before the import: between writes of an offline run's file, 15 by default
        os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")
        import wandb

        self.wandb = wandb
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self.address = f"{os.environ.get('WANDB_ENTITY', '')}/{project}"
        is_known = stored.get("address") == self.address
        tags = [f"{name}:{value}"[:64] for name, value in facts.tags.items() if name in ("recipe", "search")]
        options = {
            "name": ("WANDB_NAME", facts.name),
            "group": ("WANDB_RUN_GROUP", facts.group),
            "job_type": ("WANDB_JOB_TYPE", facts.kind),
            "tags": ("WANDB_TAGS", tags),
            "dir": ("WANDB_DIR", str(facts.folder)),
        }
        self.id = stored["id"] if is_known else secrets.token_hex(4)
        self.run = wandb.init(
            project=project,
            id=self.id,
            resume="allow" if is_known and not wandb.Settings()._offline else None,
            # several runs of one process: the parts of a fine-tuning run, trials of a search
            reinit="create_new",
            config={**facts.config, **facts.tags},
            **{name: value for name, (variable, value) in options.items() if variable not in os.environ},
        )

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            self.run.log(point.values, step=point.step)

    def log_results(self, split: str, figures: Figures, files: Sequence[Path]) -> None:
        rows = table_rows(figures)
        media: dict[str, Any] = {f.stem: self.wandb.Image(str(f)) for f in files if f.suffix == IMAGE}
        if rows:
            media[f"{split}/table"] = self.wandb.Table(columns=rows[0], data=rows[1:])
        self.run.log(media)
        self.run.summary.update(flatten({split: figures}, "/"))
        for file in files:
            shutil.copy2(file, self.run.dir)  # which is sent at the end

    def close(self, status: Status) -> None:
        self.run.finish(exit_code=self.EXIT_CODES[status])


class Mlflow(ExperimentTracker):
    """A run of MLflow, on the server of MLFLOW_TRACKING_URI, or in a database beside the runs, for `mlflow ui
    --backend-store-uri sqlite:///RUNS/mlflow.db`. MLFLOW_EXPERIMENT_NAME and MLFLOW_RUN_NAME are honoured."""

    STATES: Mapping[Status, str] = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
    METRICS, PARAMS = 1000, 100  # at most in a request
    NAME, VALUE = 250, 6000  # the longest name and value of a param

    def __init__(self, facts: RunFacts, stored: dict[str, Any]):
        # before the import; seven tries take minutes, and this module tries again by itself
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        import mlflow

        self.mlflow = mlflow
        local = f"sqlite:///{facts.top.parent / 'mlflow.db'}"
        uri = os.environ.get("MLFLOW_TRACKING_URI") or local
        self.address = hide_secrets(uri)
        # a client makes the tables of a new database; those of several trials at once would spoil it
        with file_lock(facts.top.parent / ".mlflow.lock") if uri.startswith("sqlite") else nullcontext():
            self.client = mlflow.MlflowClient(uri)
        if stored.get("address") == self.address:
            self.id = stored["id"]
            self.client.update_run(self.id, "RUNNING")
            return
        folder = (facts.top.parent / "mlartifacts").as_uri() if uri == local else None
        parent = facts.parents.get("mlflow")
        tags = {
            "mlflow.source.name": facts.kind,
            "mlflow.source.type": "LOCAL",
            **({"mlflow.source.git.commit": facts.tags["git"]} if "git" in facts.tags else {}),
            **({"mlflow.parentRunId": parent} if parent else {}),
            **({"group": facts.group} if facts.group else {}),
            **facts.tags,
        }
        name = os.environ.get("MLFLOW_RUN_NAME", facts.name)
        experiment = self._experiment(folder)
        self.id = self.client.create_run(experiment, tags=tags, run_name=name).info.run_id
        params = [
            mlflow.entities.Param(self._name(path), str(value)[: self.VALUE])
            for path, value in flatten(facts.config).items()
        ]
        for start in range(0, len(params), self.PARAMS):
            self.client.log_batch(self.id, params=params[start : start + self.PARAMS])

    def _experiment(self, artifacts: str | None) -> str:
        """Return the id of the experiment, made if it is not there; another process may make it meanwhile."""
        if identifier := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return identifier
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        if found := self.client.get_experiment_by_name(name):
            return found.experiment_id
        try:
            return self.client.create_experiment(name, artifacts)
        except self.mlflow.MlflowException:
            if found := self.client.get_experiment_by_name(name):
                return found.experiment_id
            raise

    def _name(self, name: str) -> str:
        return re.sub(r"[^\w\-./: ]", "_", name)[: self.NAME]

    def log(self, points: Sequence[Point]) -> None:
        metrics = [
            self.mlflow.entities.Metric(self._name(name), value, point.time, point.step)
            for point in points
            for name, value in point.values.items()
        ]
        for start in range(0, len(metrics), self.METRICS):
            self.client.log_batch(self.id, metrics=metrics[start : start + self.METRICS])

    def log_results(self, split: str, figures: Figures, files: Sequence[Path]) -> None:
        self.log([Point(int(1000 * time.time()), 0, flatten({split: figures}, "/"))])
        text = io.StringIO()
        csv.writer(text).writerows(table_rows(figures))
        self.client.log_text(self.id, text.getvalue(), f"{split}.csv")
        for file in files:
            self.client.log_artifact(self.id, str(file))

    def close(self, status: Status) -> None:
        self.client.set_terminated(self.id, self.STATES[status])


TRACKERS: dict[Backend, type[ExperimentTracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
}


def flatten(values: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Return {"a.b": value} of nested `values`; what is None or empty is left out."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, separator, f"{prefix}{name}{separator}")
        elif value not in (None, [], ()):
            flat[f"{prefix}{name}"] = value
    return flat


def table_rows(figures: Figures) -> list[list[Any]]:
    """Return a head and a row a language of `figures`; none of no figures."""
    columns = list(dict.fromkeys(name for values in figures.values() for name in values))
    rows = [[language, *(values.get(name) for name in columns)] for language, values in figures.items()]
    return [["language", *columns], *rows] if rows else []

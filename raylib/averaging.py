"""The mean of a run's checkpoints (stochastic weight averaging, Izmailov et al. 2018; of the ends of epochs):
what `select=average` evaluates, in RUN/average."""

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from raylib import checkpoint
from raylib.distributed import barrier, rank
from raylib.fileio import atomic_folder
from raylib.lock import require_owned
from raylib.models.base import load_weights, read_weights, save_model
from raylib.weights import load_state


def average_checkpoints(model: Any, run: Path) -> Path:
    """Load the mean of the checkpoints that `run` keeps into `model`, and leave it in RUN/average, as a
    checkpoint without an optimizer; every worker calls it. Returns that folder."""
    names, folder = checkpoint.read_registry(run).checkpoints, run / checkpoint.AVERAGE
    if rank() == 0:
        load_state(model, mean_weights([run / checkpoint.FOLDER / name for name in names]), folder)
        require_owned(run)
        shutil.rmtree(folder, ignore_errors=True)  # of a start that was killed before it had said so
        newest = checkpoint.read_meta(run / checkpoint.FOLDER / names[-1])
        meta = {**newest, "evaluation": {}, "score": None, "averaged": list(names)}
        with atomic_folder(folder) as partial:
            save_model(partial, model.files())
            (partial / "meta.json").write_text(json.dumps(meta, indent=1, allow_nan=False), encoding="utf-8")
    barrier()
    load_weights(model, folder)
    return folder


def mean_weights(folders: list[Path]) -> dict[str, Tensor]:
    """Return the mean of each tensor of floats over models of one shape; of others, the last one's."""
    total: dict[str, Tensor] = {}
    last: dict[str, Tensor] = {}
    for folder in folders:
        last = read_weights(folder)
        for name, weight in last.items():
            if weight.is_floating_point():
                total[name] = total.get(name, 0) + weight.double()
    mean = {name: (weight / len(folders)).to(last[name].dtype) for name, weight in total.items()}
    return {**last, **mean}

"""Write the optimizer states of a run of an earlier version anew, so that it can be trained on. They are
pickles, a format that can run code. Here they are interpreted (`raylib.torch_files`), which runs none, and
refuses a file that wants more than tensors and plain values; even so, convert only runs of your own.

1. `optimizer.pt` (PyTorch's engine) knows parameters by their places in the optimizer's groups alone. The
   new state has them by these places too, "#0", "#1", ...: a run of the same settings has the same groups.
2. `zero/` (DeepSpeed) has a file a worker: its part of each group, and where parameters lie in it.

What is old goes when what is new is on the disk, and listed; killed at any moment, the command does the rest
when it is called again.
"""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from raylib import checkpoint
from raylib.engine_state import MOMENTS, VALUE, EngineState, Piece, make_state, state_files
from raylib.errors import UserError, reading
from raylib.fileio import read_json_object, write_json
from raylib.lock import hold_run
from raylib.saving import write_files
from raylib.torch_files import read_torch

SHARDS = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
# what DeepSpeed's files hold besides tensors and plain values
DEEPSPEED_RECORDS = (
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
)


def convert_run(run: Path) -> int:
    """Convert all checkpoints of a run and of its parts, also those that were set aside; print a line for
    each one. Returns how many.

    Raises:
        UserError: no run, or one that is in use; a checkpoint is not whole, or its optimizer's state is not
            to be read.
    """
    if not any(run.rglob(checkpoint.FOLDER)):
        raise UserError(f"{run}: no folder {checkpoint.FOLDER} in it; give the folder of a run")
    inner = sorted(path.parent.name for path in run.glob(f"*/{checkpoint.FOLDER}"))
    if len(inner) > 1 and not any(
        (run / name).exists() for name in ("config.json", "search.json", checkpoint.FOLDER)
    ):
        names = ", ".join(inner[:4]) + (" ..." if len(inner) > 4 else "")
        raise UserError(f"{run}: no run, but a folder of {len(inner)} ({names}); give one of them")
    count = 0
    with hold_run(run):
        for part in sorted(path.parent for path in run.rglob(checkpoint.FOLDER) if path.is_dir()):
            checkpoint.settle(part)  # one registry, with the best checkpoint in it
            for folder in sorted([*part.glob(f"{checkpoint.FOLDER}*/step_*"), part / checkpoint.OLD_BEST]):
                if folder.is_dir() and checkpoint.has_old_optimizer(folder):
                    convert_checkpoint(folder)
                    print(f"{folder}: converted", flush=True)
                    count += 1
                if folder.is_dir() and checkpoint.has_optimizer(folder):
                    _remove_old(folder)
    return count


def convert_checkpoint(folder: Path) -> None:
    """Write the optimizer's state of a checkpoint anew; the old one goes.

    Raises:
        UserError: the checkpoint is not whole, or its state is not to be read.
    """
    workers = checkpoint.verify(folder)["workers"]
    with reading(folder, "the state of an optimizer", "take an undamaged copy; nothing has changed"):
        states = _read_zero(folder / "zero") if (folder / "zero").is_dir() else _read_torch(folder)
        written = [write_files(folder, state_files(state, rank)) for rank, state in enumerate(states)]
    # the list of worker 0 last: by it the checkpoint is one of an earlier version or not
    for rank in reversed(range(workers)):
        listing = folder / f"files-{rank:05d}.json"
        files = {k: v for k, v in read_json_object(listing).items() if not checkpoint.is_for_training(k)}
        write_json(listing, files | (written[rank] if rank < len(written) else {}))
    _remove_old(folder)


def _remove_old(folder: Path) -> None:
    for name in checkpoint.OLD_OPTIMIZER:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _read_torch(folder: Path) -> Iterator[EngineState]:
    """Yield the one part of a state that `torch.optim.AdamW` has written."""
    stored = _load(folder / "optimizer.pt")
    states = {f"#{place}": state for place, state in stored["state"].items()}
    pieces = (
        Piece(kind, name, state[kind].shape, 0, state[kind].contiguous().flatten())
        for name, state in states.items()
        for kind in MOMENTS
    )
    state = make_state(pieces, {name: int(state["step"]) for name, state in states.items()}, workers=1)
    state.layout["parameters"] = sum(len(group["params"]) for group in stored["param_groups"])
    yield state


def _read_zero(folder: Path) -> Iterator[EngineState]:
    """Yield the parts of a state that DeepSpeed's workers have written."""
    model = _load(folder / "mp_rank_00_model_states.pt")
    workers = int(model["dp_world_size"])
    # what the objective has besides its model, whose weights are in a file of their own, and some of them
    # here under several names
    held = {x.data_ptr() for name, x in model["module"].items() if name.startswith("model.")}
    values = [
        Piece(VALUE, name, x.shape, 0, x.flatten())
        for name, x in model["module"].items()
        if x.data_ptr() not in held
    ]
    for rank in range(workers):
        stored = _load(folder / SHARDS.format(rank))["optimizer_state_dict"]
        pieces = list(values if rank == 0 else ())
        steps: dict[str, int] = {}
        states = stored["base_optimizer_state"]["state"]
        for i, shapes in enumerate(model["param_shapes"] if states else ()):
            steps |= dict.fromkeys(shapes, int(states[i]["step"]))
            size = states[i][MOMENTS[0]].numel()  # padding included: as many on each worker
            for name, offset in _offsets(shapes, stored["param_alignment_paddings"][i]).items():
                if place := stored["param_slice_mappings"][i].get(name):
                    own = slice(place["start"], place["start"] + place["numel"])
                    start = rank * size + place["start"] - offset
                    pieces += [
                        Piece(kind, name, shapes[name], start, states[i][kind][own]) for kind in MOMENTS
                    ]
        yield make_state(pieces, steps, workers)


def _offsets(shapes: dict[str, torch.Size], paddings: list[int]) -> dict[str, int]:
    """Return where each parameter begins in its group."""
    offsets, end = {}, 0
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        offsets[name] = end
        end += math.prod(shape) + padding
    return offsets


def _load(path: Path) -> Any:
    return read_torch(path, classes=DEEPSPEED_RECORDS)

"""The state of an optimizer in a checkpoint, by parameter and offset, whatever the engine and the number of
workers that wrote it or read it.

    model.safetensors             the model's state: it is the master weights too
    optimizer-00000.safetensors   pieces of worker 0, {"exp_avg:model.text.norm.weight": (n,)}
    optimizer-00000.json          {"workers": 2, "steps": {parameter: steps of its Adam},
                                   "pieces": {"exp_avg:model.text.norm.weight": {"shape": [16], "start": 0}}}

A piece is a flat slice of a tensor: of a moment of a parameter that has any, or of the value of what an
objective has besides its model. A worker writes what it alone holds (its partition under ZeRO), or its part
of what all hold alike (DDP). A reader takes the slices that it needs. Nothing is unpickled.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, NonNegativeInt, PositiveInt
from safetensors import safe_open
from torch import Tensor

from raylib.errors import UserError, reading
from raylib.fileio import read_json
from raylib.finite import is_finite
from raylib.saving import FileContent

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
VALUE = "value"


class EngineState(NamedTuple):
    """Pieces of one worker: `tensors`, {"KIND:NAME": (n,)}, refer to the live ones, on their device; `layout`
    is the JSON of their places."""

    tensors: dict[str, Tensor]
    layout: dict[str, Any]


class Piece(NamedTuple):
    """`values` (n,), the flat elements from `start` on of a tensor of `shape`: the `kind` of the parameter
    `name`."""

    kind: str
    name: str
    shape: Sequence[int]
    start: int
    values: Tensor


def share_out(tensors: Iterable[tuple[str, str, Tensor]], rank: int, workers: int) -> Iterator[Piece]:
    """Yield the part that worker `rank` writes of tensors (kind, name, tensor) that all workers hold alike:
    as many elements as any other."""
    tensors = list(tensors)
    total = sum(tensor.numel() for _, _, tensor in tensors)
    first, last = total * rank // workers, total * (rank + 1) // workers
    offset = 0
    for kind, name, tensor in tensors:
        start, stop = max(first - offset, 0), min(last - offset, tensor.numel())
        if start < stop:
            yield Piece(kind, name, tensor.shape, start, tensor.detach().reshape(-1)[start:stop])
        offset += tensor.numel()


def make_state(pieces: Iterable[Piece], steps: Mapping[str, int], workers: int) -> EngineState:
    """Return the state of a worker with these pieces. steps: of every parameter that has moments."""
    tensors, places = {}, {}
    for piece in pieces:
        key = f"{piece.kind}:{piece.name}"
        tensors[key] = piece.values
        places[key] = {"shape": list(piece.shape), "start": piece.start}
    return EngineState(tensors, {"workers": workers, "steps": dict(steps), "pieces": places})


def state_file(folder: Path, rank: int) -> Path:
    """Return the file of a worker's pieces; their layout lies beside it, as .json."""
    return folder / f"optimizer-{rank:05d}.safetensors"


def state_files(state: EngineState, rank: int) -> dict[str, FileContent]:
    """Return the files of a worker's state in a checkpoint."""
    path = state_file(Path(), rank)
    layout = json.dumps(state.layout, ensure_ascii=False, separators=(",", ":"))
    return {path.name: state.tensors, path.with_suffix(".json").name: layout.encode()}


class StoredPlace(BaseModel):
    """Of a piece: the shape of the tensor that it is of, and its first element there."""

    shape: list[NonNegativeInt]
    start: NonNegativeInt


class StoredLayout(BaseModel):
    """The JSON of a worker's pieces; parameters: how many a converted state has."""

    workers: PositiveInt
    steps: dict[str, NonNegativeInt]
    pieces: dict[str, StoredPlace]
    parameters: NonNegativeInt | None = None


class StoredState:
    """The state that the workers of `folder` wrote, all of them together; `steps` are those of each
    parameter.

    names: of the optimizer's parameters in the order of its groups, by which a converted state knows them
        ("#0", "#1", ...: `raylib.convert`).

    Raises:
        UserError: a file is missing or broken, or a tensor has gaps.
    """

    def __init__(self, folder: Path, names: Sequence[str]):
        self.folder, self.names = folder, names
        self.steps: dict[str, int] = {}
        self.shapes: dict[tuple[str, str], tuple[int, ...]] = {}  # by kind and name
        self.places: dict[tuple[str, str], list[tuple[int, int, int, str]]] = {}  # (start, stop, worker, key)
        self.files: dict[int, Any] = {}
        workers, rank = 1, 0
        while rank < workers:
            workers = self._read_layout(rank)
            rank += 1
        for (kind, name), places in self.places.items():
            places.sort()
            starts = [*(start for start, *_ in places), math.prod(self.shapes[kind, name])]
            if starts != [0, *(stop for _, stop, *_ in places)]:
                raise UserError(f"{folder}: the optimizer's {kind} of {name} has gaps; {ADVICE}")

    def read(self, kind: str, name: str, shape: Sequence[int], start: int, stop: int) -> Tensor:
        """Read the flat elements `start` to `stop` of a tensor, onto the CPU.

        Raises:
            UserError: there is none, or it has another shape than `shape`.
        """
        stored = self.shapes.get((kind, name))
        if stored != tuple(shape):
            found = "missing" if stored is None else f"of shape {list(stored)}"
            raise UserError(
                f"{self.folder}: {kind} of {name} is {found}, and the run's of shape {list(shape)}: the "
                "checkpoint is not one of this run"
            )
        parts = []
        for first, last, rank, key in self.places[kind, name]:
            low, high = max(start, first), min(stop, last)
            if low < high:
                parts.append(self._open(rank).get_slice(key)[low - first : high - first])
        values = parts[0] if len(parts) == 1 else torch.cat(parts)
        if not is_finite(values):
            what = f"the objective's {name}" if kind == VALUE else f"the optimizer's {kind} of {name}"
            raise UserError(f"{self.folder}: {what} is not finite (NaN or infinite); {ADVICE}")
        return values

    def read_whole(self, kind: str, name: str, like: Tensor) -> Tensor:
        """Read a whole tensor of the shape of `like`, onto its device."""
        return self.read(kind, name, like.shape, 0, like.numel()).view(like.shape).to(like.device)

    def _read_layout(self, rank: int) -> int:
        """Add the pieces of a worker; return how many workers there are."""
        path = state_file(self.folder, rank)
        for file in (path, path.with_suffix(".json")):
            if not file.is_file():
                raise UserError(f"{file}: missing, so this checkpoint is not whole; {ADVICE}")
        layout = read_json(path.with_suffix(".json"), WHAT, ADVICE, shape=StoredLayout)
        with reading(path, WHAT, ADVICE):
            if layout.get("parameters", len(self.names)) != len(self.names):
                raise ValueError(
                    f"of {layout['parameters']} parameters, and the run trains {len(self.names)}"
                )
            if rank == 0:
                self.steps = {self._name(name): int(steps) for name, steps in layout["steps"].items()}
            for key, place in layout["pieces"].items():
                kind, _, name = key.partition(":")
                tensor, shape, start = (kind, self._name(name)), tuple(place["shape"]), int(place["start"])
                piece = self._open(rank).get_slice(key)
                (size,) = piece.get_shape()
                if not piece.get_dtype().startswith(("F", "BF")):
                    raise ValueError(f"{key} holds {piece.get_dtype()}, not floating-point numbers")
                if self.shapes.setdefault(tensor, shape) != shape:
                    raise ValueError(f"{key} has several shapes")
                self.places.setdefault(tensor, []).append((start, start + size, rank, key))
        return layout["workers"]

    def _name(self, name: str) -> str:
        return self.names[abs(int(name[1:]))] if name.startswith("#") else name

    def _open(self, rank: int) -> Any:
        # mapped into memory: the system reads no more than what is asked for
        if rank not in self.files:
            self.files[rank] = safe_open(state_file(self.folder, rank), "pt")
        return self.files[rank]


WHAT = "an optimizer's state"
ADVICE = "restore it, or start from an older checkpoint with resume=step_NNNNNN"

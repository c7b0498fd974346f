"""Files of weights, of every backbone and of whatever else is kept as tensors: read, and put into models, in
one place.

1. `read_tensors` reads a file, safetensors or PyTorch's own. What is damaged, something else, or not finite
   is one line that names it.
2. `limit_model` bounds what a model takes whose sizes a file says, by the size of its weights.
3. `load_state` puts tensors into a model that has them all, and names those that do not fit.
"""

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from raylib.errors import UserError, hub_hint, reading
from raylib.fileio import open_plain
from raylib.finite import require_finite_file
from raylib.strict_json import parse_json
from raylib.torch_files import TensorRecord, read_torch

ADVICE = "take an undamaged copy, of the weights alone"
# keys under which checkpoints have a model's state beside an optimizer's and others
NESTED = ("model", "state_dict", "model_state_dict", "module")
CUT_OFF = "incomplete metadata"  # of safetensors, where a file is not as long as its header says
LISTED = 250  # characters of the tensors that a line names
MAX_NAME = 200  # characters of a tensor's name
ENDINGS = (".bin", ".pt", ".pth", ".th", ".tar", ".safetensors")  # of files of weights
# A model may be so many times as large as the weights that it starts from, and so much larger: an image
# encoder, heads, embeddings of regions start from random numbers.
MODEL_FACTOR, FREE_BYTES, MAX_TENSORS = 4, 1 << 27, 50_000
SAFETENSORS = {
    **{f"F{size}": getattr(torch, f"float{size}") for size in (64, 32, 16)},
    **{f"I{size}": getattr(torch, f"int{size}") for size in (64, 32, 16, 8)},
    **{f"U{size}": getattr(torch, f"uint{size}") for size in (64, 32, 16, 8)},
    **{"BF16": torch.bfloat16, "BOOL": torch.bool, "C64": torch.complex64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
RANDOM_BYTES = 1 << 29  # of an image encoder as published, which starts from random numbers


def read_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Read a file of weights, .safetensors or PyTorch's own; of a checkpoint with more, the model's state.
    Nothing that is pickled in it is run.

    Raises:
        UserError: it is damaged, or holds other things; a tensor is not finite (it is named).
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path, device=device)[0]
    with reading(path, "weights (PyTorch)", ADVICE):
        tensors = read_torch(path, _choose_state)
        _require_names(tensors)
    require_finite_file(path, tensors)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def read_safetensors(
    path: Path | str, what: str = "weights (safetensors)", advice: str = ADVICE, device: str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a safetensors file, and its metadata. what, advice: of the line of an error.

    Raises:
        UserError: it is damaged, or something else; a tensor is not finite (it is named).
    """
    _require_file(path, what)
    with reading(path, what, advice):
        try:
            with safe_open(path, "pt") as file:  # it has checked the header, and every place in it
                names, metadata = file.keys(), file.metadata() or {}
        except SafetensorError as e:
            cut = "it is cut off, as after an unfinished download, or damaged" if CUT_OFF in str(e) else e
            raise ValueError(cut) from e
        _require_names(names)
        tensors = _read_all(Path(path), names)
    require_finite_file(path, tensors)
    return {name: tensor.to(device) for name, tensor in tensors.items()}, metadata


def _read_all(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Read tensors of a safetensors file into memory of their own. The library maps the file into memory: one
    that is cut off or written anew meanwhile, as by a download, would end the process by a signal."""
    tensors = {}
    with open_plain(path) as file:
        size = int.from_bytes(file.read(8), "little")
        if size > os.fstat(file.fileno()).st_size:
            raise ValueError("it has changed while it was read")
        header = parse_json(file.read(size))
        for name in names:
            start, end = header[name]["data_offsets"]
            data = np.empty(end - start, np.uint8)  # no `torch.empty`, which `limit_model` would count
            file.seek(8 + size + start)
            if file.readinto(data.data) < len(data):
                raise ValueError("it has become shorter while it was read")
            kind, stored = SAFETENSORS[header[name]["dtype"]], torch.from_numpy(data)
            stored = stored.view(kind) if len(data) else stored.to(kind)
            tensors[name] = stored.reshape(header[name]["shape"])
    return tensors


def _require_names(tensors: Iterable[str]) -> None:
    """Raise ValueError unless the names can stand in a line."""
    for name in tensors:
        if not name.isprintable() or len(name) > MAX_NAME:
            raise ValueError(f"a tensor is called {name[:40]!r}...")


def _require_file(path: Path | str, what: str) -> None:
    if not Path(path).is_file():  # a pipe would never end
        raise UserError(f"{path}: no such file; wanted {what}{hub_hint(path)}")


def _choose_state(value: Any) -> dict[str, TensorRecord]:
    """The state dict in what a file of PyTorch's holds."""
    for _ in range(2):  # {"state_dict": {"module": ...}}
        inner = [value[key] for key in NESTED if isinstance(value, dict) and isinstance(value.get(key), dict)]
        if not inner:
            break
        value = inner[0]
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{_describe(value)}, where names and their tensors should be")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, TensorRecord):
            raise ValueError(f"{name!r} is {_describe(tensor)}, where only tensors should be")
    return value


def _describe(value: Any) -> str:
    if isinstance(value, TensorRecord):
        return "a tensor"
    return f"of type {type(value).__name__}" if value or value == 0 else f"an empty {type(value).__name__}"


def load_state(model: nn.Module, tensors: Mapping[str, Tensor], path: Path | str) -> None:
    """Load tensors into a model that has these and no others.

    path: where they come from.
    Raises:
        UserError: a tensor is missing, left over, of another shape or kind of numbers; names it.
    """
    # a module may make a parameter that a state has, such as the bias of a contrast
    with reading(path, "weights of this model", ADVICE):
        own = model.state_dict()
        model.load_state_dict({name: x for name, x in tensors.items() if name not in own}, strict=False)
    own = model.state_dict()
    misfits = [f"missing {name}" for name in own if name not in tensors]
    misfits += [f"unused {name}" for name in tensors if name not in own]
    misfits += [
        misfit
        for name in own
        if name in tensors and (misfit := describe_misfit(name, tensors[name], own[name]))
    ]
    require_no_misfits(path, misfits)
    model.load_state_dict(dict(tensors))


def describe_misfit(name: str, value: Tensor, own: Tensor) -> str | None:
    """Return in words why a tensor read as `name` cannot take the place of a model's `own`; None: it can."""
    if value.shape != own.shape:
        return f"{name} is {tuple(value.shape)}, wanted {tuple(own.shape)}"
    if value.is_floating_point() != own.is_floating_point():
        found, wanted = (str(x.dtype).removeprefix("torch.") for x in (value, own))
        return f"{name} holds {found}, wanted {wanted}"
    return None


def require_no_misfits(path: Path | str, misfits: list[str]) -> None:
    """Raise `UserError` naming the first of `misfits`, if there are any."""
    if misfits:
        # as many as a line has room for
        lengths = itertools.accumulate(len(misfit) for misfit in misfits)
        count = max(1, sum(length <= LISTED for length in lengths))
        more = f"; and {len(misfits) - count} more" if len(misfits) > count else ""
        raise UserError(f"{path} does not fit the model: {'; '.join(misfits[:count])}{more}")


@contextmanager
def limit_model(where: Path | str, *weights: Path | str | None, free: int = FREE_BYTES) -> Iterator[None]:
    """Let the block make a model whose sizes a file says, and that starts from other files: not many times as
    large as these. A damaged size would ask for all memory before the first tensor is found not to fit.

    Args:
        where: the sizes come from.
        weights: files of weights, or folders of them.
        free: bytes that the model may have besides, of parts that start from random numbers.
    Raises:
        UserError: the model becomes larger.
    """
    num_bytes = sum(file.stat().st_size for path in weights if path for file in _files_of(Path(path)))
    with _ModelLimit(where, MODEL_FACTOR * num_bytes + free):
        yield


def _files_of(path: Path) -> Iterable[Path]:
    if not path.is_dir():
        return [path] if path.exists() else []  # whoever reads it says that it is not there
    return (file for file in path.iterdir() if file.suffix in ENDINGS and file.is_file())


class _ModelLimit(TorchDispatchMode):
    """Counts the tensors that are made, and their bytes in float32."""

    def __init__(self, where: Path | str, num_bytes: int):
        super().__init__()
        self.where, self.num_bytes, self.num_tensors = where, num_bytes, MAX_TENSORS

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # the sizes of `empty`, `zeros`, `randn` and their like; what works on a tensor is as large as that
        if args and isinstance(args[0], list | tuple) and all(type(n) is int for n in args[0]):
            self.num_bytes -= 4 * math.prod(args[0])
            self.num_tensors -= 1
            if self.num_bytes < 0 or self.num_tensors < 0:
                raise UserError(
                    f"{self.where}: its sizes are those of a model many times as large as its weights; take "
                    "an undamaged copy of both"
                )
        return func(*args, **(kwargs or {}))

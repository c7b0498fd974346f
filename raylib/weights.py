"""Files of weights, of every backbone and of whatever else is kept as tensors: read in one place."""

from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from raylib.errors import UserError
from raylib.finite import require_finite_file


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file of weights, .safetensors or PyTorch's own. Nothing that is pickled in it is run.

    Raises:
        UserError: it is cut off, or holds other things; a tensor is not finite (it is named).
    """
    try:
        safe = path.suffix == ".safetensors"
        tensors = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, ValueError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(
            f"{path}: not to be read as tensors ({reason}); take an undamaged copy, of the weights alone"
        ) from None
    require_finite_file(path, tensors)
    return tensors

"""Finite or refused: a number that is not finite is never compared, kept as best, reported, exported or
loaded.

Readers of files raise a plain `UserError` that names file and tensor; training and evaluation raise
`NotFinite`, which a search takes for the end of a trial and not for a mistake in its settings.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raylib.errors import NotFinite, UserError


def is_finite(value: Tensor | np.ndarray | float) -> bool:
    """Return whether every element of `value` is finite; integers always are."""
    if isinstance(value, int | float):
        return math.isfinite(value)
    # A sum is finite only if every element is. It reads the elements once and stores nothing; the exact test,
    # which allocates a mask, is needed only where the sum itself overflowed.
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind not in "fc":
            return True
        with np.errstate(all="ignore"):
            total = value.sum(dtype=np.float32 if value.itemsize < 4 else None)
        return bool(np.isfinite(total) or np.isfinite(value).all())
    if not (value.is_floating_point() or value.is_complex()):
        return True
    total = value.sum(dtype=torch.float32 if value.element_size() < 4 else None)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(value).all())


def require_finite(what: str, value: Tensor | np.ndarray | float, advice: str = "") -> None:
    """Raise `NotFinite` naming `what` (embeddings, scores, a loss) unless `value` is finite."""
    if not is_finite(value):
        raise NotFinite(f"{what}: not finite (NaN or infinite){advice and '; ' + advice}")


def require_finite_values(where: str, values: Mapping[str, Any]) -> None:
    """Raise `NotFinite` naming every float of the nested dicts and lists in `values` that is not finite."""
    names = list(_not_finite(values, ""))
    if names:
        raise NotFinite(f"{where}: {', '.join(names)} not finite (NaN or infinite)")


def finite_values(values: Mapping[str, float]) -> dict[str, float]:
    """Return the items of `values` that are finite."""
    return {name: value for name, value in values.items() if is_finite(value)}


def require_finite_file(path: Path | str, tensors: Mapping[str, Tensor | np.ndarray]) -> None:
    """Raise `UserError` naming the file and the first tensor read from it that is not finite."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise UserError(
                f"{path}: tensor {name} is not finite (NaN or infinite); take an older or undamaged copy"
            )


def _not_finite(value: Any, name: str):
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _not_finite(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _not_finite(inner, f"{name}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield name

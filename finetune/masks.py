"""Pruning masks: which weights of a model are kept. Made by global magnitude, kept in files, applied to a
model.

A mask is {parameter name: bool tensor, True where the weight is kept}.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from raylib.errors import UserError
from raylib.fileio import atomic_file
from raylib.finite import require_finite

Mask = dict[str, Tensor]


def prune(weights: dict[str, Tensor], mask: Mask | None, rate: float) -> Mask:
    """The mask without the smallest `rate` of the weights that are left, over all matrices at once (Algorithm
    1 of paper 0).

    Args:
        weights: by name; those that may be pruned. mask: of an earlier round, or None: all are left.
    Exactly round(rate x left) weights go; of equal ones, the first in order.

    Raises:
        NotFinite: a weight, which has no magnitude then.
    """
    for name, w in weights.items():
        require_finite(f"weights of {name}", w)
    kept = {
        name: np.ones(w.shape, bool) if mask is None else mask[name].numpy() for name, w in weights.items()
    }
    sizes = np.concatenate(
        [w.detach().float().abs().cpu().numpy()[kept[name]] for name, w in weights.items()]
    )
    going = round(rate * len(sizes))
    left = np.ones(len(sizes), bool)
    if going:
        threshold = np.partition(sizes, going - 1)[going - 1]
        left[sizes < threshold] = False
        left[np.flatnonzero(sizes == threshold)[: going - int((~left).sum())]] = False
    pruned, first = {}, 0
    for name, where in kept.items():
        there = where.copy()
        count = int(where.sum())
        there[where] = left[first : first + count]
        pruned[name], first = torch.from_numpy(there), first + count
    return pruned


def sparsity(mask: Mask, parameters: int) -> dict[str, float]:
    """{"prunable": share of the mask's weights that are gone, "whole": share of all `parameters`}."""
    gone = sum(int((~kept).sum()) for kept in mask.values())
    return {"prunable": gone / sum(kept.numel() for kept in mask.values()), "whole": gone / parameters}


def apply(model: nn.Module, mask: Mask, where: str) -> None:
    """Set what is pruned to zero, and keep it there: its gradient is zero from now on.

    A weight of zero with gradients of zero has moments of zero, and weight decay leaves it at zero too: so no
    optimizer moves it, not even ZeRO's own copy of the weights, and nothing has to be done after a step.

    Raises:
        UserError: the mask is another model's; `where` says which file.
    """
    parameters = dict(model.named_parameters())
    wrong = [
        name for name, kept in mask.items() if name not in parameters or parameters[name].shape != kept.shape
    ]
    if wrong:
        raise UserError(
            f"{where}: the mask of another model ({len(wrong)} tensors do not fit, such as {wrong[0]})"
        )
    for name, kept in mask.items():
        parameter, kept = parameters[name], kept.to(parameters[name].device)
        with torch.no_grad():
            parameter.mul_(kept)
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient, kept=kept: gradient * kept)


def write(mask: Mask, path: Path) -> None:
    """A safetensors file, eight weights a byte; it appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = {name: torch.from_numpy(np.packbits(kept.numpy())) for name, kept in mask.items()}
    shapes = {"shapes": json.dumps({name: list(kept.shape) for name, kept in mask.items()})}
    with atomic_file(path) as temporary:
        save_file(packed, temporary, shapes)


def read(path: Path | str) -> Mask:
    """What `write` wrote.

    Raises:
        UserError: no such file, or no mask.
    """
    try:
        with safe_open(path, "pt") as file:
            shapes = json.loads(file.metadata()["shapes"])
            return {
                name: torch.from_numpy(
                    np.unpackbits(file.get_tensor(name).numpy(), count=int(np.prod(shape)))
                )
                .bool()
                .view(shape)
                for name, shape in shapes.items()
            }
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as e:
        raise UserError(f"{path}: no pruning mask is read there ({e}); give a file of RUN/masks") from None

"""Sparse fine-tuning (paper 0, Algorithm 1): find the weights that a task needs, rewind, train them alone.

Iterative magnitude pruning: train, prune, rewind, again. Each round is a training of its own in RUN/round_N,
cut short after some epochs of the run's own schedule; RUN/masks/round_N.safetensors is what it leaves. A
round whose mask is there is not done again, one that was interrupted goes on: so the cycle resumes wherever
it stopped.

A mask is {parameter name: bool tensor, True where the weight is kept}.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from finetune.strategies.base import (
    Context,
    Need,
    Stage,
    StageOutcome,
    StageRun,
    Strategy,
    StrategyConfig,
)
from raylib.errors import UserError, reading
from raylib.fileio import atomic_file
from raylib.lock import make_folder
from raylib.strict_json import check_shape, parse_json

if TYPE_CHECKING:  # settings of strategies are read without PyTorch (`raylib.settings`)
    from torch import Tensor

Mask = dict[str, "Tensor"]


class SparseConfig(StrategyConfig):
    """Sparse fine-tuning by iterative magnitude pruning. Defaults are paper 0's."""

    needs = frozenset({"dense_weights"})
    run_fields = ("mask",)

    rate: float = Field(0.1, gt=0, lt=1)
    """Share of the remaining weights that each round prunes."""
    rounds: PositiveInt = 5
    """Rounds of training and pruning."""
    epochs: PositiveInt = 1
    """Epochs of a round."""
    rewind: Literal["initial", "none"] = "initial"
    """Weights that the next round starts from: initial as the paper says, or none, the trained ones, as its
    public code does without meaning to."""
    mask: str | None = None
    """File of masks to use; null: the rounds find one."""

    def provides(self) -> frozenset[Need]:
        return frozenset() if self.mask else frozenset({"pruning_rounds"})

    def check_run(self, run: Any) -> None:
        if not self.mask and self.epochs > run.epochs:
            raise UserError(
                f"strategies.sparse.epochs={self.epochs}: a round is cut out of a run of epochs={run.epochs}"
            )

    def files(self, data: Path) -> tuple[Path, ...]:
        return (Path(self.mask),) if self.mask else ()

    def build(self, context: Context) -> "Masked":
        """Read the mask, if there is one yet.

        Raises:
            UserError: no mask in that file.
        """
        return Masked(read_mask(self.mask) if self.mask else {}, str(self.mask))

    @property
    def stage_epochs(self) -> int:
        return 0 if self.mask else self.rounds * self.epochs

    def stages_before(self, run: StageRun) -> StageOutcome:
        """The rounds that find the mask."""
        import torch.distributed as dist

        from raylib.distributed import world_size
        from raylib.models.base import read_weights

        file, trained = Path(self.mask) if self.mask else None, None
        for number in range(1, self.rounds + 1) if file is None else ():
            # Algorithm 1 rewinds: each round begins at the pretrained weights again, under the last mask
            start = None if self.rewind == "initial" else trained
            settings = {"mask": file and str(file)}
            trained = run.train(
                Stage(f"round_{number}", "pruning", self.epochs, start, strategy_settings=settings)
            )
            pruned = run.folder / "masks" / f"round_{number}.safetensors"
            if run.is_main_process and not pruned.is_file():
                weights = read_weights(trained)
                prunable = {name: weights[name] for name in run.build_model().prunable()}
                write_mask(prune_mask(prunable, read_mask(file) if file else None, self.rate), pruned)
            if world_size() > 1:
                dist.barrier()  # the others read what the first has written
            file = pruned
        assert file is not None  # there is a round at least
        parameters = sum(p.numel() for p in run.build_model().parameters())
        return StageOutcome({"mask": str(file)}, figures={"sparsity": sparsity(read_mask(file), parameters)})


class Masked(Strategy):
    """A model under a mask; `where` says which file it comes from."""

    def __init__(self, mask: Mask, where: str):
        self.mask, self.where = mask, where

    def adapt(self, model: Any) -> None:
        """Raises UserError: the mask is another model's."""
        apply_mask(model, self.mask, self.where)


def prune_mask(weights: "Mapping[str, Tensor]", mask: Mask | None, rate: float) -> Mask:
    """The mask without the smallest `rate` of the weights that are left, over all matrices at once (Algorithm
    1 of paper 0).

    Args:
        weights: by name; those that may be pruned.
        mask: of an earlier round, or None: all are left. Exactly round(rate x left) weights go; of equal
            ones, the first in order.

    Raises:
        NotFinite: a weight, which has no magnitude then.
    """
    import torch

    from raylib.finite import require_finite

    for name, w in weights.items():
        require_finite(f"weights of {name}", w)
    unpruned = {
        name: np.ones(w.shape, bool) if mask is None else mask[name].numpy() for name, w in weights.items()
    }
    # one threshold over all matrices: what a layer loses depends on how small its weights are
    sizes = np.concatenate(
        [w.detach().float().abs().cpu().numpy()[unpruned[name]] for name, w in weights.items()]
    )
    num_pruned = round(rate * len(sizes))
    survives = np.ones(len(sizes), bool)
    if num_pruned:
        threshold = np.partition(sizes, num_pruned - 1)[num_pruned - 1]
        survives[sizes < threshold] = False
        # of weights as small as the threshold, so many that the share is exact
        survives[np.flatnonzero(sizes == threshold)[: num_pruned - int((~survives).sum())]] = False
    pruned, first = {}, 0
    for name, before in unpruned.items():
        remaining = before.copy()
        count = int(before.sum())
        remaining[before] = survives[first : first + count]
        pruned[name], first = torch.from_numpy(remaining), first + count
    return pruned


def sparsity(mask: Mask, parameters: int) -> dict[str, float]:
    """{"prunable": share of the mask's weights that are gone, "whole": share of all `parameters`}."""
    num_pruned = sum(int((~keep).sum()) for keep in mask.values())
    return {
        "prunable": num_pruned / sum(keep.numel() for keep in mask.values()),
        "whole": num_pruned / parameters,
    }


def apply_mask(model: Any, mask: Mask, where: str) -> None:
    """Set what is pruned to zero, and keep it there: its gradient is zero from now on.

    A weight of zero with gradients of zero has moments of zero, and weight decay leaves it at zero too: so no
    optimizer moves it, not even ZeRO's own copy of the weights, and nothing has to be done after a step.

    Raises:
        UserError: the mask is another model's; `where` says which file.
    """
    import torch

    parameters = dict(model.named_parameters())
    misfits = [
        name for name, keep in mask.items() if name not in parameters or parameters[name].shape != keep.shape
    ]
    if misfits:
        raise UserError(
            f"{where}: the mask of another model ({len(misfits)} tensors do not fit, such as {misfits[0]})"
        )
    for name, keep in mask.items():
        parameter, keep = parameters[name], keep.to(parameters[name].device)
        with torch.no_grad():
            parameter.mul_(keep)
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient, keep=keep: gradient * keep)


def write_mask(mask: Mask, path: Path) -> None:
    """A safetensors file, eight weights a byte; it appears whole."""
    import torch
    from safetensors.torch import save_file

    make_folder(path.parent)
    packed = {name: torch.from_numpy(np.packbits(keep.numpy())) for name, keep in mask.items()}
    shapes = {"shapes": json.dumps({name: list(keep.shape) for name, keep in mask.items()})}
    with atomic_file(path) as temporary:
        save_file(packed, temporary, shapes)


def read_mask(path: Path | str) -> Mask:
    """The mask that `write_mask` wrote.

    Raises:
        UserError: no such file, or no mask.
    """
    import torch

    from raylib.weights import read_safetensors

    what, advice = "a pruning mask (safetensors)", "give a file of RUN/masks"
    packed, metadata = read_safetensors(path, what, advice)
    mask = {}
    with reading(path, what, advice):
        shapes = parse_json(metadata["shapes"])
        check_shape(shapes, dict[str, list[NonNegativeInt]])
        if shapes.keys() != packed.keys() or not shapes:
            raise ValueError("its tensors are not those that it lists")
        for name, shape in shapes.items():
            count = math.prod(shape)
            if packed[name].dtype != torch.uint8 or packed[name].shape != (-(-count // 8),):
                raise ValueError(f"tensor {name} is not one of {shape} bits")
            mask[name] = torch.from_numpy(np.unpackbits(packed[name].numpy(), count=count)).bool().view(shape)
    return mask

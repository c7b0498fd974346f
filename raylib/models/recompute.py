"""Activations that are computed again in backward instead of kept from forward (Chen et al. 2016, "Training
deep nets with sublinear memory cost"), and batches that pass an encoder in pieces.

`set_recomputation` says which parts of a model do so:

    checkpointing   kept for backward                                    forward passes of an encoder
    none            every activation                                     1
    blocks          the input of each block                              2
    all             the input and output of each encoder; then the       3
                    blocks' inputs of one encoder after the other
    micro_batches   as `all`, but each encoder call runs in pieces of    2, with blocks or all 3
                    the batch's rows: the activations of one piece

Pieces are cached gradients (Gao et al. 2021, "Scaling deep contrastive learning batch size under memory
limited setup", GradCache) within one graph: forward keeps the states of all pieces alone, over which the
losses, contrast too, are those of the whole batch; backward first makes the gradients of these states, then
goes through one piece after the other: computed again, used, freed. Autograd takes the piece that was made
last first, and never two at once, for of all nodes that are ready it runs the youngest. So the gradients are
those of the whole batch, its sums taken piece by piece, and DDP and ZeRO see one backward.

Dropout is drawn again from the state that the generator had in forward.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raylib.errors import UserError
from raylib.settings import Checkpointing


class Recomputable(nn.Module, ABC):
    """A part that can be computed again in backward."""

    @abstractmethod
    def set_recomputation(self, checkpointing: Checkpointing, micro_batches: int) -> None:
        """Compute again what `set_recomputation` of this module says."""


class RecomputedModule(Recomputable):
    """A module that is computed again as a whole."""

    is_block: ClassVar[bool] = False  # of an encoder; else it is what comes before or after the blocks
    recomputes = False

    def set_recomputation(self, checkpointing: Checkpointing, micro_batches: int) -> None:
        self.recomputes = (
            checkpointing != "none" if self.is_block else checkpointing == "all" or micro_batches > 1
        )

    def __call__(self, *args: Any) -> Any:
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(super().__call__, *args, use_reentrant=False)
        return super().__call__(*args)


class SplitModule(Recomputable):
    """A module whose rows pass it in `num_pieces` pieces, each computed again as a whole; 0: all at once, and
    kept."""

    num_pieces = 0

    def set_recomputation(self, checkpointing: Checkpointing, micro_batches: int) -> None:
        self.num_pieces = micro_batches if checkpointing == "all" or micro_batches > 1 else 0

    @property
    def pieces_now(self) -> int:
        """`num_pieces`; 0 where nothing is kept for backward anyway."""
        return self.num_pieces if torch.is_grad_enabled() else 0

    def run_piece(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """Return `function(*args)`, computed again in backward where there are pieces. By the tensors in
        `args` PyTorch knows of which device's generator it must keep the state."""
        if not self.pieces_now:
            return function(*args)
        with _uncached_casts():
            return checkpoint(function, *args, use_reentrant=False)

    def run_pieces(self, function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """Return `function(rows)` (n, ...), which treats each of the rows (n, ...) alone, piece by piece."""
        if self.pieces_now <= 1:
            return self.run_piece(function, rows)
        return torch.cat([self.run_piece(function, piece) for piece in rows.chunk(self.pieces_now)])


def set_recomputation(model: nn.Module, checkpointing: Checkpointing, micro_batches: int = 1) -> None:
    """Make `model` compute its activations again in backward as the table above says. Pieces have a row at
    least, so that there are no more of them than rows.

    Raises:
        UserError: it has no part that can, as an encoder in a user's own file.
    """
    parts = [module for module in model.modules() if isinstance(module, Recomputable)]
    if not parts and (checkpointing != "none" or micro_batches > 1):
        raise UserError(
            f"{type(model).__name__} has no encoder of ours, which alone compute their activations again; "
            "set checkpointing=none fit.micro_batches=1"
        )
    for part in parts:
        part.set_recomputation(checkpointing, micro_batches)


def recompute_layers(layers: Iterable[Any], checkpointing: Checkpointing) -> None:
    """Make layers of `transformers`, its `GradientCheckpointingLayer`s, compute themselves again."""
    for layer in layers:
        layer.gradient_checkpointing = checkpointing != "none"
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


@contextmanager
def _uncached_casts() -> Iterator[None]:
    """Autocast casts the weights anew in each piece, so that the pieces' gradients add up in the weights'
    precision and not in bf16."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)

"""Finite or refused: a number that is not finite is never compared, kept as best, reported, exported or
loaded.

Readers of files raise a plain `UserError` that names file and tensor; training and evaluation raise
`NotFinite`, which a search takes for the end of a trial and not for a mistake in its settings.

Steps whose loss or gradient is not finite: both engines skip them alike, and too many of them end the run.

1. `StepGuard.check_loss` (`raylib.engine`): a loss or term that is not finite makes the loss NaN, and so the
   gradients of all workers.
2. The engine leaves weights and optimizer state as they are, to the bit, where the gradient's norm is not
   finite.
3. `StepGuard.count`: how many steps were skipped stays on the device, so that no step waits for it.
4. `StepMonitor` reads it before anything is logged, evaluated or saved.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from raylib.distributed import raise_on_all_workers, world_size
from raylib.errors import NotFinite, UserError
from raylib.precision import autocast

if TYPE_CHECKING:
    from raylib.engine import Engine, StepGuard


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


def require_finite(what: str, value: Tensor | np.ndarray | float) -> None:
    """Raise `NotFinite` naming `what` (embeddings, scores, a loss) unless `value` is finite."""
    if not is_finite(value):
        raise NotFinite(f"{what}: not finite (NaN or infinite)")


def require_finite_values(where: str, values: Mapping[str, Any]) -> None:
    """Raise `NotFinite` naming every float of the nested dicts and lists in `values` that is not finite."""
    if names := list(_not_finite(values, "")):
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


class StepMonitor:
    """Reads `guard` before anything is kept.

    replay: `replay(step)` -> this worker's batch of a step, after seeding what that step's forward draws.
    find_newest: returns the checkpoint that the run can go on from, if there is one.
    """

    def __init__(
        self,
        guard: "StepGuard",
        engine: "Engine",
        replay: Callable[[int], dict],
        find_newest: Callable[[], Path | None],
    ):
        self.guard, self.engine, self.replay, self.find_newest = guard, engine, replay, find_newest
        self.counts = guard.read_counts()

    def read(self) -> None:
        """Wait for the device, and read the counts.

        Raises:
            NotFinite: too many steps in a row were skipped; names step, terms and parameter.
        """
        self.counts = self.guard.read_counts()
        end = self.counts.end_step
        if end < 0:
            return
        terms = self.guard.nonfinite_terms_at_end()
        what = f"{', '.join(terms)} not finite" if terms else "all terms finite, the gradient is not"
        rows = f"{self.guard.limit + 1} steps in a row skipped, more than fit.max_skipped={self.guard.limit}"
        where = "goes on from there" if self.find_newest() else "starts anew"
        more = f"if it is the data, with a larger fit.max_skipped the same command {where}"
        raise NotFinite(
            f"step {end + 1}: {rows}: {what}; {self._first_parameter(end)}; {self.advice()}; {more}"
        )

    def require_usable_weights(self, done: int) -> None:
        """Check, on all workers together, that the weights after `done` steps may be evaluated and kept.

        Raises:
            NotFinite: a weight or the optimizer's state is not finite (it is named); or the batch of the last
                step that was not skipped, which had a finite loss and gradient before its update, has them no
                more: weights may be finite, and broken.
        """
        found = self.engine.find_not_finite()
        raise_on_all_workers(found and f"step {done}: {found} is not finite; {self.advice()}")
        # Finite weights may be broken all the same: an update that overflows a product gives them no finite
        # loss any more. The batch of the last update tells, for before it its loss and gradient were finite.
        if self.counts.last_applied >= 0:
            self.engine.objective.zero_grad(set_to_none=True)  # the last step's gradients make room for these
            loss, terms = self._forward(self.counts.last_applied)
            bad = [name for name, value in {"loss": loss, **terms}.items() if not is_finite(value)]
            # weights of a finite loss whose gradient overflows would be good to evaluate, but no run could go
            # on from them. The backward pass gathers: no worker may leave it out.
            gradients = self._gradients(loss)
            if not self._has_finite_total_norm(gradients) and not bad:
                bad = ["the gradient"]
            raise_on_all_workers(
                f"step {done}: the update of step {self.counts.last_applied + 1} broke the weights: of its "
                f"own batch, once more, {', '.join(bad)} not finite; {self.advice()}"
                if bad
                else None
            )

    def advice(self) -> str:
        """Return what to do about a run that ended."""
        path = self.find_newest()
        last = f"the last good checkpoint is {path}" if path else "there is no checkpoint yet"
        clip = " or optim.clip" if self.engine.config.clip else ", or set optim.clip=1"
        return f"lower optim.lr{clip}, under another name=; {last}"

    def _forward(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(self.engine.device, self.engine.bf16):
            return self.engine.objective(self.replay(step))

    def _first_parameter(self, step: int) -> str:
        """Name the first parameter whose gradient in `step` is not finite on any worker, or whose gradient
        alone has a norm that overflows. It is computed anew, outside of the engine, since ZeRO has let go of
        its own; the weights are still those of the step."""
        names = [name for name, p in self.engine.objective.named_parameters() if p.requires_grad]
        try:
            gradients = self._gradients(self._forward(step)[0])
        except torch.OutOfMemoryError:
            return "the first parameter hit is unknown, for its gradient does not fit the memory"
        for kind, check in (("", is_finite), (" by a norm that overflows", _has_finite_norm)):
            hit = _on_any_worker([g is not None and not check(g) for g in gradients], self.engine.device)
            if any(hit):
                return f"first parameter hit{kind} {names[hit.index(True)]} ({sum(hit)} of {len(names)})"
        return (
            "all parameters' own gradients are finite"  # a term alone is at fault, or the norm of all of them
        )

    def _gradients(self, loss: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of `loss` for each trainable parameter, None of one that it does not depend on, in the
        order of the parameters. Nothing is left in their `grad`, which belongs to the engine."""
        return torch.autograd.grad(loss, self._parameters(), allow_unused=True)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for p in self.engine.objective.parameters() if p.requires_grad]

    def _has_finite_total_norm(self, gradients: Sequence[Tensor | None]) -> bool:
        """Return whether the mean of all workers' gradients has a finite norm, as the step's clipping reckons
        it."""
        is_local_finite = is_finite(nn.utils.get_total_norm([g for g in gradients if g is not None]))
        if not any(_on_any_worker([not is_local_finite], self.engine.device)) or world_size() == 1:
            return is_local_finite
        # A worker's own gradient is larger than the mean of all, up to as many times as there are workers:
        # only the mean ends a run at the same step whatever their number.
        means = [
            torch.zeros_like(p) if g is None else g.clone()
            for p, g in zip(self._parameters(), gradients, strict=True)
        ]
        for mean in means:
            dist.all_reduce(mean.div_(world_size()))
        return is_finite(nn.utils.get_total_norm(means))


def _has_finite_norm(gradient: Tensor) -> bool:
    return is_finite(gradient.norm())


def _on_any_worker(hit: list[bool], device: torch.device) -> list[bool]:
    flags = torch.tensor(hit, dtype=torch.int32, device=device)
    if world_size() > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]

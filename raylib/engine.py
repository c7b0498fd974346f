"""AdamW, its rates, the guard that skips steps that are not finite, and the engine that steps it.

`TorchEngine` is plain PyTorch (DDP with several processes); that of `raylib.engine_zero` shards optimizer
state and gradients over the workers.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, compress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from raylib import checkpoint
from raylib.distributed import errors_on_all_workers, rank, world_size
from raylib.engine_state import (
    MOMENTS,
    VALUE,
    EngineState,
    Piece,
    StoredState,
    make_state,
    share_out,
)
from raylib.errors import UserError
from raylib.finite import is_finite
from raylib.precision import autocast
from raylib.settings import OptimConfig
from raylib.weights import load_state, read_tensors

# Gradients travel in buckets of this size, so that the first are on their way while backward goes on; it is
# PyTorch's own default.
BUCKET_MB = 25

# constant factor of the learning rate of the parameter of a name
RateScale = Callable[[str], float]
# factor of the learning rate at a depth (`raylib.models.base`) in a step; 0 freezes
LayerRates = Callable[[int | None, int], float]


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Return the rate of step `step` (from 0) of `steps`: step / warm-up while warming up, then falling to 0
    after the schedule's last."""
    steps = round(steps * config.schedule_factor)
    warmup = round(steps * config.warmup)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    remaining = (steps - step) / max(1, steps - warmup)
    return config.lr * (remaining if config.decay == "linear" else 0.5 - 0.5 * math.cos(math.pi * remaining))


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    depth_of: Callable[[str], int | None] | None = None,
    scale_of: RateScale | None = None,
) -> list[dict]:
    """Return the trainable parameters in groups: matrices decay, biases, norms and scalars do not. Every one
    is in one group.

    depth_of: of a parameter's name; then each depth has groups of its own, which carry it as "depth".
    scale_of: likewise, as "scale".
    """
    groups: dict[tuple, dict] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            depth, decays = depth_of(name) if depth_of else None, parameter.ndim >= 2
            scale, rank_of_depth = scale_of(name) if scale_of else 1.0, -1 if depth is None else depth
            decay = weight_decay if decays else 0.0
            group = {"params": [], "weight_decay": decay, "depth": depth, "scale": scale}
            groups.setdefault((rank_of_depth, not decays, scale), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


class AdamW(torch.optim.AdamW):
    """PyTorch's, with methods that do not import its compiler (1.4 CPU-seconds at each start) only to tell it
    to leave them alone: nothing compiles them."""

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def build_optimizer(
    groups: Iterable[dict], config: OptimConfig, kind: type[torch.optim.AdamW] = AdamW
) -> torch.optim.AdamW:
    """Return a fused AdamW: a sixth of the time of the foreach one."""
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def step_count(steps: int, parameter: Tensor) -> Tensor:
    """Return what fused AdamW counts the steps of `parameter` by."""
    return torch.tensor(float(steps), device=parameter.device)


def set_rate(
    group: dict, members: list[nn.Parameter], rates: LayerRates | None, step: int, lr: float
) -> bool:
    """Set the rate of an AdamW group for this step; at 0 its members get no gradient, and so no decay.
    Returns whether it thaws now, after a step in which it was frozen: its optimizer state must then start
    anew, as if it were new to training.

    Frozen is a factor of 0, never merely a rate of 0, at which warm-up starts: moments would fill all the
    same. All is a function of the step, so that a resumed run thaws as the uninterrupted one does.
    """
    factor = rates(group["depth"], step) if rates else 1.0
    group["lr"] = lr * factor * group["scale"]
    if rates:
        for member in members:
            member.requires_grad_(factor > 0)
    return bool(rates and factor > 0 and step > 0 and rates(group["depth"], step - 1) == 0)


class Objective(nn.Module, ABC):
    """A training step as one module, which DDP and ZeRO wrap whole: an encoder called around the wrapped
    module would miss the sync of gradients."""

    model: Any  # what is trained: it can `save(folder)`, and, under rates a layer, tell `depth_of(name)`

    @property
    @abstractmethod
    def has_unused_parameters(self) -> bool:
        """True if some parameters get no gradient in a step, which DDP must know."""

    @abstractmethod
    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (this worker's share of the loss times the number of workers, {term: its value over the
        global batch})."""


class StepCounts(NamedTuple):
    """Steps skipped in all, and in a row; the last one that was not, and the one that ended the run, both
    counted from 0; -1 where there is no such step."""

    skipped: int
    in_a_row: int
    last_applied: int
    end_step: int


class IntervalSums:
    """Sums of steps' values over an interval, in float64 on `device`, without those of skipped steps:
    no step waits for them.

    stored: the `state` of an earlier start of the run.
    """

    def __init__(self, device: torch.device, stored: Mapping[str, Any] | None = None):
        stored = stored or {"names": (), "sums": (), "count": 0}
        self.device, self.names = device, tuple(stored["names"])
        self.sums = torch.tensor(stored["sums"], dtype=torch.float64, device=device)
        self.count = torch.tensor(stored["count"], device=device)

    def add(self, names: tuple[str, ...], values: Tensor, skip: Tensor) -> None:
        """Add the `values` (names,) of a step, unless `skip` says not to. Other names begin anew."""
        if names != self.names:
            self.names = names
            self._reset()
        self.sums = self.sums + torch.where(skip, 0.0, values.double())
        self.count = self.count + ~skip

    def means(self, ends: bool) -> dict[str, float]:
        """Wait for the device, and return the means; NaN where every step was skipped. If the interval
        `ends` here, the next one begins."""
        means = dict(zip(self.names, (self.sums / self.count).tolist(), strict=True))
        if ends:
            self._reset()
        return means

    def state(self) -> dict[str, Any]:
        """Return what a resumed run goes on from, so that its means are those of the whole interval."""
        return {"names": self.names, "sums": self.sums.tolist(), "count": int(self.count)}

    def _reset(self) -> None:
        self.sums = torch.zeros(len(self.names), dtype=torch.float64, device=self.device)
        self.count = torch.zeros_like(self.count)


class StepGuard:
    """Counts skipped steps on `device`. After more than `limit` in a row every further step is skipped too:
    the weights stay those at which the run ended, whenever that is read.

    skipped, in_a_row, interval: what an earlier start of the run had counted.
    """

    def __init__(
        self,
        device: torch.device,
        limit: int = 10,
        skipped: int = 0,
        in_a_row: int = 0,
        interval: Mapping[str, Any] | None = None,
    ):
        self.device, self.limit = device, limit
        self.interval = IntervalSums(device, interval)  # of the terms and the gradient's norm
        # `StepCounts`, kept on the device: to read them each step would make the host wait for it
        counts = (torch.tensor(n, device=device) for n in (skipped, in_a_row, -1, -1))
        self.skipped, self.in_a_row, self.last_applied, self.end_step = counts
        self.names: tuple[str, ...] = ()
        # (names,): of the step under way
        self.values, self.finite = torch.empty(0), torch.empty(0, dtype=torch.bool)
        self.finite_at_end: Tensor | None = None  # of the last step, or of `end_step`

    def check_loss(self, loss: Tensor, terms: Mapping[str, Tensor]) -> Tensor:
        """Return `loss` to the bit, or NaN where it or one of its terms is not finite."""
        self.names = ("loss", *terms)
        values = [torch.as_tensor(value, device=loss.device) for value in (loss, *terms.values())]
        self.values = torch.stack([value.detach().reshape(()).float() for value in values])
        self.finite = self.values.isfinite()
        # a factor of 1 changes neither loss nor gradient; one of NaN reaches every gradient: NaN x 0 is NaN
        return loss * torch.where(self.finite.all(), 1.0, torch.nan).to(loss.dtype)

    def count(self, step: int, norm: Tensor) -> Tensor:
        """Count `step`, whose gradient has this norm. Returns 1.0 where its update must be skipped, else 0.0,
        as a tensor on the device."""
        # everything here is tensors and `where`, not Python's `if`: a branch would wait for the device
        norm = norm.to(self.device, non_blocking=True).detach().reshape(1)
        skip, running = ~norm[0].isfinite(), self.end_step < 0
        self.skipped = self.skipped + skip
        self.in_a_row = (self.in_a_row + 1) * skip
        last = self.finite if self.finite_at_end is None else self.finite_at_end
        self.finite_at_end = torch.where(running, self.finite, last)
        self.end_step = torch.where(running & (self.in_a_row > self.limit), step, self.end_step)
        # once a row is too long, nothing is applied any more: when the host reads of it, some steps later on
        # a GPU, the weights are still those at which the run ended
        skip = skip | (self.end_step >= 0)
        self.last_applied = torch.where(skip, self.last_applied, step)
        # the total loss is a worker's own share: it stays out
        values = torch.cat([self.values[1:], norm.to(self.values)])
        self.interval.add((*self.names[1:], "grad_norm"), values, skip)
        return skip.float()

    def read_counts(self) -> StepCounts:
        """Wait for the device, and return its counts."""
        counts = (self.skipped, self.in_a_row, self.last_applied, self.end_step)
        return StepCounts(*torch.stack(counts).tolist())

    def nonfinite_terms_at_end(self) -> list[str]:
        """Name the loss and terms that were not finite in the step that ended the run."""
        assert self.finite_at_end is not None, "no step has been counted"
        return list(compress(self.names, (~self.finite_at_end).tolist()))


class Engine(ABC):
    """An objective and the optimizer that steps it, in float32 weights; bf16 autocast where `bf16` says so.

    Args:
        start: the checkpoint to go on from.
        rates: factor of the learning rate of each depth in each step.
        gradient_dtype: in which gradients travel between workers.
    """

    name: str
    waits = False  # for the device, in each step
    optimizer: Any

    def __init__(
        self,
        objective: Objective,
        config: OptimConfig,
        device: torch.device,
        bf16: bool,
        start: Path | None,
        rates: LayerRates | None = None,
        guard: StepGuard | None = None,
        gradient_dtype: Literal["float32", "bfloat16"] = "float32",
    ):
        self.objective, self.config, self.device, self.bf16 = objective.to(device), config, device, bf16
        self.rates, self.guard, self.gradient_dtype = rates, guard or StepGuard(device), gradient_dtype
        # called before a step changes weights or optimizer, of which a copy may be under way
        self.before_update: Callable[[], None] = lambda: None
        self.names = {p: name for name, p in objective.named_parameters() if p.requires_grad}
        # on all workers together: a fault on one must not leave the others waiting
        if start:
            with errors_on_all_workers():
                checkpoint.require_optimizer(start)
                order = [self.names[p] for group in self._groups() for p in group["params"]]
                stored = StoredState(start, order)
                self._load_values(stored)
        # after the weights are there: the copies that an engine makes of them need no loading
        self._build()
        if start:
            with errors_on_all_workers():
                self._load_moments(stored)
                if found := self.find_not_finite():
                    raise UserError(
                        f"{start}: {found} is not finite (NaN or infinite); go on from an older checkpoint "
                        "with resume=step_NNNNNN"
                    )

    @abstractmethod
    def step(self, batch: dict, step: int, lr: float) -> dict[str, Tensor]:
        """Take one optimizer step, `step` of the run; skipped where loss, a term or the gradient's norm is
        not finite. Returns the terms of the global batch and the norm, as tensors on the device."""

    @abstractmethod
    def state(self) -> EngineState:
        """Return this worker's part of what a run goes on from, besides the model's own state: moments and
        step counts of the optimizer, and what the objective has besides its model."""

    def find_not_finite(self) -> str | None:
        """Name the first weight, or tensor of this worker's part of the state, that is not finite."""
        tensors = dict(self.objective.model.state_dict())
        for key, values in self.state().tensors.items():
            kind, _, name = key.partition(":")
            tensors[f"the optimizer's {kind} of {name}" if kind != VALUE else f"the objective's {name}"] = (
                values
            )
        return next((name for name, x in tensors.items() if isinstance(x, Tensor) and not is_finite(x)), None)

    @abstractmethod
    def _build(self) -> None: ...

    @abstractmethod
    def _load_moments(self, stored: StoredState) -> None: ...

    def _load_values(self, stored: StoredState) -> None:
        """Load what the model's file holds, and what it lacks.

        Raises:
            UserError: the state is not one of this run.
        """
        if others := stored.steps.keys() - self.names.values():
            raise UserError(
                f"{stored.folder}: the optimizer's state is also of {min(others)}, which this run does not "
                "train"
            )
        path = stored.folder / "model.safetensors"
        try:
            load_state(self.objective.model, read_tensors(path, str(self.device)), path)
        except UserError as e:
            raise UserError(f"{e}; or go on from an older checkpoint with resume=step_NNNNNN") from e
        with torch.no_grad():
            for name, value in self._objective_values().items():
                value.copy_(stored.read_whole(VALUE, name, value))

    def _objective_values(self) -> dict[str, Tensor]:
        """Return the parameters and buffers of the objective that its model's state lacks."""
        found = {id(x) for x in self.objective.model.state_dict(keep_vars=True).values()}
        values = {}
        # by identity: a tensor may have several names
        for name, x in chain(
            self.objective.state_dict(keep_vars=True).items(), ((n, p) for p, n in self.names.items())
        ):
            if isinstance(x, Tensor) and id(x) not in found:
                found.add(id(x))
                values[name] = x
        return values

    def _shared_pieces(self, moments: Iterable[tuple[str, str, Tensor]] = ()) -> Iterator[Piece]:
        """Yield this worker's part of what all workers hold alike: `moments`, and the objective's values."""
        values = ((VALUE, name, value) for name, value in self._objective_values().items())
        return share_out(chain(moments, values), rank(), world_size())

    def _groups(self) -> list[dict]:
        """AdamW groups of the trainable parameters; with `rates` one or two a depth, with
        `config.rates` a part."""
        model = self.objective.model
        depth_of = (lambda name: model.depth_of(name.removeprefix("model."))) if self.rates else None
        return parameter_groups(
            self.objective, self.config.weight_decay, depth_of, _scale_of_parts(model, self.config)
        )


def _scale_of_parts(model: Any, config: OptimConfig) -> RateScale | None:
    """The factor by which a parameter's rate differs from `config.lr`; None: no part has one of its own.

    Raises:
        UserError: a rate is of a part that the model lacks.
    """
    rates = config.rates
    if not rates.parts and rates.new_factor == 1:
        return None
    parts, new = model.part_names(), model.new_parameters()
    for part in rates.parts:
        if part not in parts.values():
            known = ", ".join(sorted(set(parts.values())))
            raise UserError(f"optim.rates.{part}: this model has no part '{part}'; it has: {known}")

    def scale(name: str) -> float:
        name = name.removeprefix("model.")
        # what an objective has besides its model is new with it
        return rates.scale(parts.get(name, "head"), name in new or name not in parts, config.lr)

    return scale


class TorchEngine(Engine):
    """AdamW on full gradients."""

    name = "torch"

    def step(self, batch: dict, step: int, lr: float) -> dict[str, Tensor]:
        for group in self.optimizer.param_groups:
            if set_rate(group, group["params"], self.rates, step, lr):
                for parameter in group["params"]:
                    self.optimizer.state.pop(parameter, None)
        if self.rates:
            self.objective.train()  # what is frozen in this step is in evaluation mode (`Backbone.train`)
        # before the forward pass, whose activations take the place of the last step's gradients
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.bf16):
            loss, terms = self.module(batch)
        self.guard.check_loss(loss, terms).backward()
        parameters = list(self.objective.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.config.clip:
            nn.utils.clip_grads_with_norm_(parameters, self.config.clip, norm)
        # as GradScaler does it: where `found_inf` is 1, fused AdamW changes nothing, not even its count of
        # steps, and no host has to wait for the device to know
        self.optimizer.found_inf = self.guard.count(step, norm)
        self.before_update()
        self.optimizer.step()
        return {**terms, "grad_norm": norm}

    def state(self) -> EngineState:
        stored = {
            name: self.optimizer.state[p] for p, name in self.names.items() if p in self.optimizer.state
        }
        moments = ((kind, name, values[kind]) for name, values in stored.items() for kind in MOMENTS)
        # one copy from the device for all of them
        counts = torch.stack([values["step"] for values in stored.values()]).tolist() if stored else ()
        steps = {name: int(count) for name, count in zip(stored, counts, strict=True)}
        return make_state(self._shared_pieces(moments), steps, world_size())

    def _build(self) -> None:
        self.module: nn.Module = self.objective
        self.optimizer = build_optimizer(self._groups(), self.config)
        if world_size() > 1:
            # layers that are frozen for now get no gradient either
            unused = self.objective.has_unused_parameters or self.rates is not None
            # where every parameter gets its gradient in every step, DDP learns all of it from the first one:
            # what a checkpointed block computes twice then counts once
            self.module = ddp = DistributedDataParallel(
                self.objective,
                bucket_cap_mb=BUCKET_MB,
                gradient_as_bucket_view=True,
                find_unused_parameters=unused,
                static_graph=not unused,
            )
            if self.gradient_dtype == "bfloat16":
                ddp.register_comm_hook(None, _send_in_bf16)

    def _load_moments(self, stored: StoredState) -> None:
        for parameter, name in self.names.items():
            # one that has been frozen so far, or has had no gradient, has none
            if name in stored.steps:
                moments = {kind: torch.empty_like(parameter, requires_grad=False) for kind in MOMENTS}
                for kind, moment in moments.items():
                    moment.copy_(stored.read_whole(kind, name, parameter))
                self.optimizer.state[parameter] = {
                    "step": step_count(stored.steps[name], parameter),
                    **moments,
                }


def _send_in_bf16(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Reduce a bucket of gradients in bf16. DDP takes PyTorch's hook under its own name on NCCL alone."""
    return bf16_compress_hook(group, bucket)

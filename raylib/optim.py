"""AdamW groups and the learning rate as a pure function of the step."""

import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import nn

from raylib.config import Config


class OptimConfig(Config):
    """AdamW; warm-up over a share of the steps from 0 to `lr`, then decay to 0, linear (paper 2, section 4.1)
    or along half a cosine (paper 4). `horizon`: the schedule is laid out for so many times the steps that are
    trained (IGLUE's: 20 epochs, of which xGQA trains 5)."""

    lr: PositiveFloat = 1e-4
    warmup: float = Field(0.1, ge=0, le=1)
    decay: Literal["linear", "cosine"] = "linear"
    horizon: float = Field(1.0, ge=1)
    weight_decay: NonNegativeFloat = 0.2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    clip: PositiveFloat = 1.0


# factor of the learning rate at a depth (`raylib.models`) in a step; 0 freezes
LayerRates = Callable[[int | None, int], float]


def parameter_groups(
    module: nn.Module, weight_decay: float, depth_of: Callable[[str], int | None] | None = None
) -> list[dict]:
    """Trainable parameters in groups: matrices decay, biases, norms and scalars do not. Every one is in one.

    depth_of: of a parameter's name; then each depth has groups of its own, which carry it as "depth".
    """
    groups: dict[tuple, dict] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            depth, decays = depth_of and depth_of(name), parameter.ndim >= 2
            made = {"params": [], "weight_decay": weight_decay if decays else 0.0, "depth": depth}
            groups.setdefault((-1 if depth is None else depth, not decays), made)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def build_optimizer(groups: Iterable[dict], config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW: a sixth of the time of the foreach one."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Rate of step `step` (from 0) of `steps`: step / warm-up while warming up, then falling to 0 after the
    schedule's last."""
    steps = round(steps * config.horizon)
    warmup = round(steps * config.warmup)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    left = (steps - step) / max(1, steps - warmup)
    return config.lr * (left if config.decay == "linear" else 0.5 - 0.5 * math.cos(math.pi * left))

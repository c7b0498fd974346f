"""Steps whose loss or gradient is not finite change nothing, to the bit, under both engines alike."""

import os

import pytest
import torch

from raylib.engine import OptimConfig, StepGuard, TorchEngine
from raylib.engine_zero import DeepSpeedEngine
from tests.test_strategies import Squares, Stack, batch_of
from tests.workers import run_workers

OPTIM = OptimConfig(lr=0.02, weight_decay=0.1, warmup=0.0, clip=0.05)
CPU = torch.device("cpu")
FAULTS = {  # step -> what goes wrong in it, on the last worker alone
    1: "gradient",
    2: "loss",
    5: "term",
    6: "gradient",
    7: "norm",
}
STEPS = 9


class Faulty(Squares):
    """Squares, but for batches with a "fault"."""

    def forward(self, batch):
        loss, terms = super().forward(batch)
        weight, fault = self.model.layers[2].weight, batch.get("fault")
        if fault == "gradient":  # the loss is what it was, the slope of a root at 0 is infinite
            loss = loss + (weight - weight.detach()).sum().sqrt()
        if fault == "norm":  # every gradient is finite, the sum of their squares is not
            loss = loss * 1e25
        if fault == "loss":  # overflows float32
            loss = loss * 3e38 * 3e38
        if fault == "term":  # the loss is finite, and so is its gradient
            terms["task"] = terms["task"] * torch.nan
        return loss, terms


def thaw(depth, step):
    """Depth 1 thaws after a step that is skipped, depth 2 in one, depth 4 in one that is fine."""
    return 0.0 if step < {1: 3, 2: 2, 4: 4}.get(depth, 0) else 1.0


def faulty_batch(step, rank=0, world=1, faults=FAULTS):
    batch = batch_of(step, rank, world)
    return batch | {"fault": faults[step]} if step in faults and rank == world - 1 else batch


def train(engine_class, rank=0, world=1, rates=None):
    """(weights after STEPS steps, skipped in all, {faulty step: whether it left weights and optimizer as they
    were, to the bit}, what is not finite at the end)."""
    objective, guard = Faulty(Stack()), StepGuard(CPU, 10)
    engine = engine_class(objective, OPTIM, CPU, False, None, rates, guard)
    untouched = {}
    for step in range(STEPS):
        before = snapshot(engine)
        engine.step(faulty_batch(step, rank, world), step, OPTIM.lr)
        if step in FAULTS and not (rates and step == 2):  # in which a group's state starts anew
            after = snapshot(engine)
            untouched[step] = all(after[k].equal(v) for k, v in before.items())
    weights = {name: p.detach().clone() for name, p in objective.model.named_parameters()}
    return weights, guard.read_counts()[0], untouched, engine.find_not_finite()


def snapshot(engine):
    """Copies of weights, moments and counts of steps."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    state = {
        f"{i} {key}": value.clone()
        for i, values in enumerate(optimizer.state.values())
        for key, value in values.items()
    }
    return state | {name: p.detach().clone() for name, p in engine.objective.named_parameters()}


def slow_reference(rates=None):
    """A plain loop that leaves the faulty steps out: an optimizer for each parameter, made anew when it
    thaws."""
    model, optimizers = Stack(), {}
    for step in range(STEPS):
        active = {n: p for n, p in model.named_parameters() if not rates or rates(model.depth_of(n), step)}
        for name in set(optimizers) - set(active):
            del optimizers[name]
        if step in FAULTS:
            continue
        batch = batch_of(step)
        loss = ((model(batch["x"]) - batch["y"]) ** 2).mean()
        gradients = dict(zip(active, torch.autograd.grad(loss, list(active.values())), strict=True))
        norm = sum(g.double().square().sum() for g in gradients.values()).sqrt()
        for name, p in active.items():
            if name not in optimizers:
                decay = OPTIM.weight_decay if p.ndim >= 2 else 0.0
                optimizers[name] = torch.optim.AdamW(
                    [p], lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps, weight_decay=decay
                )
            p.grad = gradients[name] * min(1.0, OPTIM.clip / float(norm + 1e-6))
            optimizers[name].step()
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_skipped(found, rates):
    weights, skipped, untouched, bad = found
    assert skipped == len(FAULTS) and all(untouched.values()) and len(untouched) >= 3 and bad is None
    for name, expected in slow_reference(rates).items():
        torch.testing.assert_close(
            weights[name], expected, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("rates", [None, thaw])
def test_torch_engine_skips_non_finite_steps(rates):
    assert_skipped(train(TorchEngine, rates=rates), rates)


def on_workers(rank, world, engine_class):
    os.environ["LOCAL_RANK"] = str(rank)
    return [train(engine_class, rank, world, rates) for rates in (None, thaw)]


@pytest.mark.parametrize("engine_class", [TorchEngine, DeepSpeedEngine])
@pytest.mark.parametrize("world", [1, 2])
def test_engine_fault_on_one_worker_is_skipped_by_all(engine_class, world):
    for results in run_workers(on_workers, world, engine_class):
        for found, rates in zip(results, (None, thaw), strict=True):
            assert_skipped(found, rates)

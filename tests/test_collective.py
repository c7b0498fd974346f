"""Two and three workers (gloo) on a split batch give the loss and the gradients of one worker on the
whole."""

import pytest
import torch

from raylib.distributed import all_gather, all_reduce, gather_ragged
from raylib.objectives.pretraining import ObjectiveConfig, UnifiedObjective
from raylib.packed import Ragged
from tests.factories import make_batch, make_model, take_rows
from tests.workers import run_workers

SIZES = (6, 6, 6)  # pairs, translations, mono: multiples of 2 and 3


def objective_on_share(rank, world, switches):
    out = []
    for change in switches:
        model = make_model()
        loss, terms = UnifiedObjective(model, ObjectiveConfig(**change))(
            take_rows(make_batch(8, *SIZES), rank, world)
        )
        loss.backward()
        out.append((terms, {k: p.grad for k, p in model.named_parameters()}))
    return out


@pytest.mark.parametrize("world", [2, 3])
def test_objective_on_several_workers_equals_one_worker(world):
    switches = [
        {},
        {"fuse_every": 2 if world == 3 else 3},
        {"itm_text": "clean", "ucl_text": "masked", "directions": "mean"},
        {"temperature": (0.1, 0.5)},
        {"temperature": (0.001, 0.01)},  # it is 0.07: outside, on either side
    ]
    results = run_workers(objective_on_share, world, switches)
    for i, change in enumerate(switches):
        model = make_model()
        loss, terms = UnifiedObjective(model, ObjectiveConfig(**change))(make_batch(8, *SIZES))
        loss.backward()
        for rank in range(world):
            for name, value in terms.items():
                torch.testing.assert_close(results[rank][i][0][name], value, rtol=1e-6, atol=1e-6, msg=name)
        for name, parameter in model.named_parameters():
            grads = [results[rank][i][1][name] for rank in range(world)]
            mean = sum(g for g in grads if g is not None) / world  # what DDP and ZeRO do
            torch.testing.assert_close(
                mean, parameter.grad, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
            )


def pieces(rank, world):
    x = (torch.arange(4.0).view(2, 2) + 10 * rank).requires_grad_()
    gathered = all_gather(x)
    (gathered * torch.arange(1.0, 1 + 2 * world)[:, None] * (rank + 1)).sum().backward()
    rows = Ragged((torch.arange(3.0 + rank) + 100 * rank)[:, None], torch.tensor([1, 2 + rank]))
    return gathered.detach(), x.grad, all_reduce(torch.tensor(rank + 1.0)), *gather_ragged(rows, 5)


def test_gather_returns_all_rows_with_gradient():
    first, second = run_workers(pieces, 2)
    assert first[0].tolist() == second[0].tolist() == [[0, 1], [2, 3], [10, 11], [12, 13]]
    assert first[1].tolist() == [[3, 3], [6, 6]]  # (1 + 2) x the weight of its rows
    assert second[1].tolist() == [[9, 9], [12, 12]]
    assert float(first[2]) == 3.0
    assert first[4].tolist() == [1, 2, 1, 3]
    assert first[3].flatten().tolist() == [0, 1, 2, 100, 101, 102, 103]

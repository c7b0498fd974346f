"""Two and three workers (gloo) on a split batch give the loss and the gradients of one worker on the
whole."""

import pytest
import torch
import torch.distributed as dist

from raylib.distributed import all_gather, all_reduce, exchange_rows, plan_exchange
from raylib.objectives.pretraining import TERMS, ObjectiveConfig, TermWeights, UnifiedObjective
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
        {"contrast": "sigmoid"},
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
    return gathered.detach(), x.grad, all_reduce(torch.tensor(rank + 1.0))


def test_gather_returns_all_rows_with_gradient():
    first, second = run_workers(pieces, 2)
    assert first[0].tolist() == second[0].tolist() == [[0, 1], [2, 3], [10, 11], [12, 13]]
    assert first[1].tolist() == [[3, 3], [6, 6]]  # (1 + 2) x the weight of its rows
    assert second[1].tolist() == [[9, 9], [12, 12]]
    assert float(first[2]) == 3.0


NEEDED = torch.tensor([[0, 3, 3, 5], [2, 2, 0, 0], [4, 5, 4, 5]])  # of 3 workers with 2 rows each


def exchange(rank, world, dtype):
    """The rows that this worker needs, their gradient in the owners' values, and what travelled."""
    lengths = torch.tensor([1, 2, 3, 1, 2, 2])
    mine = Ragged(
        torch.arange(float(lengths[2 * rank : 2 * rank + 2].sum()))[:, None].add(100 * rank).to(dtype),
        lengths[2 * rank : 2 * rank + 2],
    )
    mine.values.requires_grad_()
    plan = plan_exchange(NEEDED, rank, 2)
    rows = exchange_rows(mine, lengths, plan).select_rows(plan.rows)
    (rows.values * (rank + 1)).sum().backward()
    return rows.values.detach().flatten(), rows.lengths, mine.values.grad.flatten(), plan.sent, plan.received


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exchange_brings_needed_rows_once_with_gradient(dtype):
    found = run_workers(exchange, 3, dtype)
    values, lengths, gradients, sent, received = zip(*found, strict=True)
    # rows of worker 0: [0], [1, 2]; of 1: [100, 101, 102], [103]; of 2: [200, 201], [202, 203]
    assert [v.tolist() for v in values] == [
        [0, 103, 103, *torch.tensor([202.0, 203]).to(dtype).tolist()],
        [100, 101, 102, 100, 101, 102, 0, 0],
        torch.tensor([200.0, 201, 202, 203] * 2).to(dtype).tolist(),
    ]
    assert [n.tolist() for n in lengths] == [[1, 1, 1, 2], [3, 3, 1, 1], [2, 2, 2, 2]]
    assert [g.tolist() for g in gradients] == [[1 + 2 * 2, 0, 0], [4, 4, 4, 2], [6, 6, 7, 7]]
    # own rows stay at home, and one that is needed twice travels once
    assert [s.tolist() for s in sent] == [[0], [1], [1]]
    assert [r.tolist() for r in received] == [[3, 5], [0], []]


def travelling(rank, world, train_vision):
    """Bytes of float tensors that this worker sends in a step, forward and backward, by collective."""
    sent = dict.fromkeys(("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor"), 0)

    def counting(name, call):
        def count(out, x, *more):
            sent[name] += x.nbytes * x.is_floating_point()
            return call(out, x, *more)

        return count

    for name in sent:
        setattr(dist, name, counting(name, getattr(dist, name)))
    config = ObjectiveConfig(
        train_vision=train_vision, weights=TermWeights(**dict.fromkeys(TERMS, 0) | {"itm": 1})
    )
    objective = UnifiedObjective(make_model(), config)
    found = []
    for backward in (False, True):
        sent |= dict.fromkeys(sent, 0)
        loss, _ = objective(take_rows(make_batch(8, *SIZES), rank, world))
        if backward:
            loss.backward()
        found.append(dict(sent))
    return found


def test_only_needed_states_travel_and_frozen_vision_sends_nothing_back():
    """6 images of 5 states each, on three workers."""
    forward, both = zip(*run_workers(travelling, 3, True), strict=True)
    frozen_forward, frozen = zip(*run_workers(travelling, 3, False), strict=True)
    total = {name: sum(sent[name] for sent in forward) for name in forward[0]}
    embeddings = 6 * 2 * make_model().config.embedding * 8
    assert total["all_gather_into_tensor"] == embeddings, "no states in a gather"
    assert total["reduce_scatter_tensor"] == 0
    assert 0 < total["all_to_all_single"]
    # backward what came goes back: forward's bytes twice in all; of a frozen image encoder texts' alone
    assert sum(sent["all_to_all_single"] for sent in both) == 2 * total["all_to_all_single"]
    back = sum(
        b["all_to_all_single"] - f["all_to_all_single"] for f, b in zip(frozen_forward, frozen, strict=True)
    )
    images = 6 * 5 * make_model().config.width * 8
    assert total["all_to_all_single"] - back <= images and back < total["all_to_all_single"]

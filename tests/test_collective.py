"""Any number of workers (gloo) on a split batch give the loss and the gradients of one on the whole."""

import pytest
import torch
import torch.distributed as dist

from raylib.distributed import (
    all_gather,
    all_reduce,
    count_rows,
    exchange_rows,
    plan_exchange,
    worker_rows,
)
from raylib.objectives.pretraining import TERMS, ObjectiveConfig, TermWeights, UnifiedObjective
from raylib.packed import Ragged
from tests.factories import make_batch, make_model, take_rows
from tests.workers import run_workers

SIZES = (6, 6, 6)  # pairs, translations, mono: multiples of 2 and 3
ODD_SIZES = (11, 8, 7)  # of which neither 2, 3 nor 5 workers have equal shares of all


def odd_batch():
    """A batch of odd sizes, in which some workers have no masked word of their sentences."""
    batch = make_batch(8, *ODD_SIZES)
    text = batch["text"]["text"]
    kept = text.positions < text.lengths[:2].sum()
    batch["text"]["text"] = text._replace(
        masked=torch.where(torch.arange(len(text.clean)) < text.lengths[:2].sum(), text.masked, text.clean),
        positions=text.positions[kept],
        labels=text.labels[kept],
    )
    return batch


def objective_on_share(rank, world, switches):
    out = []
    for change in switches:
        model = make_model()
        loss, terms = UnifiedObjective(model, ObjectiveConfig(**change))(take_rows(odd_batch(), rank, world))
        loss.backward()
        out.append((terms, {k: p.grad for k, p in model.named_parameters()}))
    return out


@pytest.mark.parametrize("world", [2, 3, 5])
def test_objective_on_several_workers_equals_one_worker(world):
    switches = [
        {},
        {"fuse_every": 2 if world == 3 else 3} if world < 5 else {"contrast": "sigmoid", "itm_text": "clean"},
        {"itm_text": "clean", "ucl_text": "masked", "directions": "mean"},
        {"contrast": "sigmoid"},
        {"temperature": (0.1, 0.5)},
        {"temperature": (0.001, 0.01)},  # it is 0.07: outside, on either side
    ]
    results = run_workers(objective_on_share, world, switches)
    for i, change in enumerate(switches):
        model = make_model()
        loss, terms = UnifiedObjective(model, ObjectiveConfig(**change))(odd_batch())
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


def pieces(rank, world, size):
    """Gathered rows, the gradient of this worker's, a sum; rows of worker r begin with 10 r."""
    counts, x = count_rows(size), torch.arange(2.0 * len(worker_rows(size, rank, world))).view(-1, 2)
    x = (x + 10 * rank).requires_grad_()
    gathered = all_gather(x, counts)
    assert torch.equal(gathered, all_gather(x.detach()))  # counts are asked
    (gathered * torch.arange(1.0, 1 + size)[:, None] * (rank + 1)).sum().backward()
    return gathered.detach(), x.grad, all_reduce(torch.tensor(rank + 1.0))


def test_gather_returns_all_rows_with_gradient():
    first, second = run_workers(pieces, 2, 4)
    assert first[0].tolist() == second[0].tolist() == [[0, 1], [2, 3], [10, 11], [12, 13]]
    assert first[1].tolist() == [[3, 3], [6, 6]]  # (1 + 2) x the weight of its rows
    assert second[1].tolist() == [[9, 9], [12, 12]]
    assert float(first[2]) == 3.0


def test_gather_of_unequal_workers_returns_all_rows_with_gradient():
    found = run_workers(pieces, 3, 5)
    rows = [[0, 1], [10, 11], [12, 13], [20, 21], [22, 23]]
    assert all(gathered.tolist() == rows for gathered, _, _ in found)
    weights = [[6 * (1 + row)] * 2 for row in range(5)]  # (1 + 2 + 3) x the weight of a row
    assert [grad.tolist() for _, grad, _ in found] == [weights[:1], weights[1:3], weights[3:]]


@pytest.mark.parametrize(("size", "world"), [(8, 3), (64, 5), (5, 5), (7, 6), (512, 7)])
def test_workers_have_rows_of_a_batch_once_and_as_equally_as_can_be(size, world):
    rows = [worker_rows(size, rank, world) for rank in range(world)]
    assert [row for part in rows for row in part] == list(range(size))
    counts = {len(part) for part in rows}
    assert max(counts) - min(counts) <= 1 and min(counts) >= 1


def counts_of(rank, world):
    return [count_rows(size, every) for size, every in ((8, 1), (11, 3), (9, 2), (64, 16))]


def test_rows_are_counted_as_they_are_dealt():
    for world in (3, 4):
        for (size, every), counts in zip(
            ((8, 1), (11, 3), (9, 2), (64, 16)), run_workers(counts_of, world)[0], strict=True
        ):
            rows = [worker_rows(size, rank, world) for rank in range(world)]
            assert counts == [sum(row % every == 0 for row in part) for part in rows] and min(counts) > 0


NEEDED = torch.tensor([5, 3, 3, 2, 0, 4])  # by the rows of 3 workers, who have 1, 3 and 2
COUNTS = [1, 3, 2]


def exchange(rank, world, dtype):
    """The rows that this worker needs, their gradient in the owners' values, and what travelled."""
    lengths = torch.tensor([1, 2, 3, 1, 2, 2])
    own = lengths.split(COUNTS)[rank]
    mine = Ragged(torch.arange(float(own.sum()))[:, None].add(100 * rank).to(dtype), own)
    mine.values.requires_grad_()
    plan = plan_exchange(NEEDED, rank, COUNTS)
    rows = exchange_rows(mine, lengths, plan).select_rows(plan.rows)
    (rows.values * (rank + 1)).sum().backward()
    return rows.values.detach().flatten(), rows.lengths, mine.values.grad.flatten(), plan.sent, plan.received


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exchange_brings_needed_rows_once_with_gradient(dtype):
    found = run_workers(exchange, 3, dtype)
    values, lengths, gradients, sent, received = zip(*found, strict=True)
    # rows of worker 0: [0]; of 1: [100, 101], [102, 103, 104], [105]; of 2: [200, 201], [202, 203]
    assert [v.tolist() for v in values] == [
        torch.tensor([202.0, 203]).to(dtype).tolist(),
        [105, 105, 102, 103, 104],
        [0, 200, 201],
    ]
    assert [n.tolist() for n in lengths] == [[2], [1, 1, 3], [1, 2]]
    assert [g.tolist() for g in gradients] == [[3], [0, 0, 2, 2, 2, 4], [3, 3, 1, 1]]
    # own rows stay at home, and one that is needed twice travels once
    assert [s.tolist() for s in sent] == [[0], [], [1]]
    assert [r.tolist() for r in received] == [[5], [], [0]]


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

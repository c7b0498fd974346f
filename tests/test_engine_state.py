"""The optimizer's state in a checkpoint: any engine at any number of workers goes on from what any other
wrote."""

import json
import os
import shutil
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from raylib.distributed import barrier, gather_objects
from raylib.engine import OptimConfig, TorchEngine
from raylib.engine_state import MOMENTS, VALUE, StoredState, share_out, state_file, state_files
from raylib.engine_zero import DeepSpeedEngine, Fragment
from raylib.errors import UserError
from raylib.saving import write_files
from tests.test_strategies import Stack
from tests.workers import run_workers

OPTIM = OptimConfig(lr=0.02, weight_decay=0.1, warmup=0.0, clip=1e9)
ENGINES = {"torch": TorchEngine, "zero2": DeepSpeedEngine}
STEPS = 9


class Model(Stack):
    """A stack with a layer that never trains, a parameter of two names, a gain, one that no loss depends
    on, and a buffer."""

    def __init__(self):
        super().__init__()
        self.layers[2].requires_grad_(False)
        self.head.weight = nn.Parameter(torch.full((1, 6), 0.1))
        self.tied = nn.Linear(6, 1)
        self.tied.weight = self.head.weight
        self.gain, self.idle = nn.Parameter(torch.tensor([1.5])), nn.Parameter(torch.ones(3, 5))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.gain + self.tied(x) * self.calls / 10

    def depth_of(self, name):
        return super().depth_of(name) if name.startswith(("embedding", "layers", "head")) else None

    def save(self, folder):
        save_file(
            {name: x.detach().clone() for name, x in self.state_dict().items()}, folder / "model.safetensors"
        )


class ShiftedSquares(nn.Module):
    """Squares of `model`, and of what the objective trains itself: a vector, by which a frozen one and a
    buffer are multiplied."""

    has_unused_parameters = True

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = Model()
        self.shift = nn.Parameter(torch.randn(12, 1))
        self.frozen = nn.Parameter(torch.randn(12, 1), requires_grad=False)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, batch):
        shift = (self.shift * self.frozen)[batch["rows"]] * (1 + self.mean.sum())
        loss = ((self.model(batch["x"]) + shift - batch["y"]) ** 2).mean()
        self.mean += 0.01
        return loss, {"task": loss.detach()}


def rates(depth, step):
    """Layers above the second train from step 5 on, the others from the start."""
    return 0.0 if depth is not None and depth > 2 and step < 5 else 1.0


def batch_of(step, rank, world):
    g = torch.Generator().manual_seed(step)
    x, y = torch.randn(12, 6, generator=g), torch.randn(12, 1, generator=g)
    return {"rows": torch.arange(12)[rank::world], "x": x[rank::world], "y": y[rank::world]}


class Result(NamedTuple):
    """losses: of the global batches. weights: of the objective's state. master: whether ZeRO's float32 master
    is its weights, to the bit. read: number of elements of moments that this worker has read."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    is_master: bool
    read: int


def train(rank, world, name, start, first, last, folder=None):
    """Steps `first` to `last` of one engine from the checkpoint `start`; saves into `folder`."""
    os.environ["LOCAL_RANK"] = str(rank)
    read, plain = [], StoredState.read

    def count(self, kind, name, shape, start, stop):
        read.append((stop - start) * (kind in MOMENTS))
        return plain(self, kind, name, shape, start, stop)

    StoredState.read = count
    objective = ShiftedSquares()
    if start:  # nothing of this may be left
        with torch.no_grad():
            for x in objective.state_dict().values():
                x.fill_(7)
    engine = ENGINES[name](objective, OPTIM, torch.device("cpu"), False, start, rates)
    StoredState.read = plain
    losses = []
    for step in range(first, last):
        terms = engine.step(batch_of(step, rank, world), step, OPTIM.lr * (step + 1) / STEPS)
        losses.append(sum(gather_objects(float(terms["task"]))) / world)
    if folder:
        folder.mkdir(exist_ok=True)
        barrier()
        write_files(folder, state_files(engine.state(), rank))
        if rank == 0:
            objective.model.save(folder)
        barrier()
    weights = {key: value.detach().clone() for key, value in objective.state_dict().items()}
    is_master = name == "torch" or all(
        mapping.get_hp_fragment().equal(p.detach().flatten()[place.start : place.stop])
        for p in engine.names
        if (place := Fragment.of(p)) and (mapping := p._hp_mapping)
    )
    return tuple(Result(losses, weights, is_master, sum(read)))


def work(rank, world, *calls):
    return [train(rank, world, *call) for call in calls]


def trained(world, *calls):
    """The results of each call of `train`, of all workers."""
    return [
        [Result(*result) for result in results]
        for results in zip(*run_workers(work, world, *calls), strict=True)
    ]


def whole_state(folder, names=()):
    """Every tensor of a stored state, whole, and the counts of steps."""
    stored = StoredState(folder, names)
    tensors = {
        (kind, name): stored.read(kind, name, shape, 0, torch.Size(shape).numel())
        for (kind, name), shape in stored.shapes.items()
    }
    return tensors, stored.steps


def assert_same_state(a, b):
    (first, steps), (second, others) = whole_state(a), whole_state(b)
    assert steps == others and first.keys() == second.keys()
    assert all(value.equal(second[key]) for key, value in first.items())
    one, other = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert all(value.equal(other[key]) for key, value in one.items())


@pytest.mark.parametrize("world", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_resume_on_the_same_workers_is_equal_to_the_bit(tmp_path, world):
    """In the middle of a phase in which layers are frozen, and after it."""
    calls = []
    for name in ENGINES:
        calls += [(name, None, 0, STEPS, tmp_path / name)]
        for at in (3, 7):
            place = tmp_path / f"{name}-{at}"
            calls += [(name, None, 0, at, place), (name, place, at, STEPS, tmp_path / f"{name}-{at}-end")]
    found = trained(world, *calls)
    for i, name in enumerate(ENGINES):
        whole, first, after, later, after_later = found[5 * i : 5 * i + 5]
        for parts in ((first, after), (later, after_later)):
            assert parts[0][0].losses + parts[1][0].losses == whole[0].losses
            for rank in range(world):
                assert all(x.equal(whole[rank].weights[key]) for key, x in parts[1][rank].weights.items())
                assert parts[1][rank].is_master and whole[rank].is_master
        for at in (3, 7):
            assert_same_state(tmp_path / name, tmp_path / f"{name}-{at}-end")


CHAINS = (("zero2", "zero2", "zero2"), ("zero2", "torch", "zero2"), ("torch", "zero2", "torch"))


def test_run_goes_on_with_other_engines_and_numbers_of_workers(tmp_path):
    """2 -> 1 -> 3 workers, under ZeRO, and from engine to engine. What is stored is taken over to the bit;
    losses are those of the undisturbed run but for rounding, since gradients are summed in another order."""
    whole, *_ = trained(2, ("zero2", None, 0, STEPS))
    expected, stages = whole[0], ((2, 0, 3), (1, 3, 6), (3, 6, STEPS))
    losses = {chain: [] for chain in CHAINS}
    for i, (world, first, last) in enumerate(stages):
        calls = []
        for n, chain in enumerate(CHAINS):
            start = tmp_path / f"{n}-{i - 1}" if i else None
            calls += [
                (chain[i], start, first, first, tmp_path / f"{n}-{i}-loaded"),
                (chain[i], start, first, last, tmp_path / f"{n}-{i}"),
            ]
        found = trained(world, *calls)
        for n, chain in enumerate(CHAINS):
            loaded, stepped = found[2 * n : 2 * n + 2]
            assert all(result.is_master for result in (*loaded, *stepped))
            losses[chain] += stepped[0].losses
            if i:
                stored, steps = whole_state(tmp_path / f"{n}-{i - 1}")
                again, same_steps = whole_state(tmp_path / f"{n}-{i}-loaded")
                assert all(value.equal(again[key]) for key, value in stored.items())
                assert {**steps, "model.idle": 0} == {**same_steps, "model.idle": 0}
                # PyTorch has no state of a parameter without a gradient, ZeRO a moment of 0
                new = {key: value for key, value in again.items() if key not in stored}
                assert {name for _, name in new} <= {"model.idle"} and not any(x.any() for x in new.values())
                # as many elements on each worker as it needs, and one more where they do not divide
                total = sum(x.numel() for (kind, _), x in stored.items() if kind in MOMENTS)
                needed = total if chain[i] == "torch" else total / world
                assert all(result.read <= needed + 60 for result in loaded)
                assert sum(result.read for result in loaded) == total * (world if chain[i] == "torch" else 1)
    for chain in CHAINS:
        assert losses[chain] == pytest.approx(expected.losses, rel=1e-5), chain


def test_parts_of_workers_are_of_equal_size_and_fit_together():
    tensors = [("exp_avg", "a", torch.arange(7.0).view(7, 1)), ("exp_avg", "b", torch.arange(0.0))]
    tensors += [("exp_avg", "c", torch.arange(4.0).view(2, 2).T), ("value", "d", torch.tensor(5.0))]
    for workers in (1, 2, 3, 20):
        parts = [list(share_out(tensors, rank, workers)) for rank in range(workers)]
        sizes = [sum(len(piece.values) for piece in part) for part in parts]
        assert sum(sizes) == 12 and max(sizes) - min(sizes) <= 1
        for _, name, tensor in tensors:
            pieces = [piece for part in parts for piece in part if piece.name == name]
            ends = [piece.start + len(piece.values) for piece in pieces]
            assert [piece.start for piece in pieces] == [0, *ends[:-1]][: len(pieces)]
            assert torch.cat([torch.empty(0), *(piece.values for piece in pieces)]).equal(tensor.flatten())


NO_LAYOUTS = (b"", b"{}", b"[1]", b'{"workers": 1, "steps": 3, "pieces": {}}', b"\xff\xfe")


def save_alone(folder, steps=3):
    """What one worker saves after some steps of `TorchEngine`."""
    train(0, 1, "torch", None, 0, steps, folder)
    return state_file(folder, 0)


def load(folder):
    TorchEngine(ShiftedSquares(), OPTIM, torch.device("cpu"), False, folder, rates)


def test_parameters_without_state_have_none_after_a_resume(tmp_path):
    save_alone(tmp_path / "a")
    objective = ShiftedSquares()
    engine = TorchEngine(objective, OPTIM, torch.device("cpu"), False, tmp_path / "a", rates)
    names = {engine.names[p] for p in engine.optimizer.state}
    assert "model.embedding.weight" in names and "model.layers.3.weight" not in names
    assert not {"model.idle", "frozen", "model.tied.weight"} & names


def test_stored_state_names_what_is_wrong(tmp_path):
    path = save_alone(tmp_path / "a")
    layout = json.loads(path.with_suffix(".json").read_text())

    def broken(name, change):
        folder = tmp_path / name
        shutil.copytree(tmp_path / "a", folder)
        change(folder, json.loads(json.dumps(layout)))
        with pytest.raises(UserError) as caught:
            load(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    def write(folder, changed):
        (folder / "optimizer-00000.json").write_text(json.dumps(changed))

    def more_workers(folder, layout):
        write(folder, layout | {"workers": 2})

    def gap(folder, layout):
        layout["pieces"]["exp_avg:model.head.bias"]["start"] = 1
        write(folder, layout)

    def lost(folder, layout):
        del layout["pieces"]["exp_avg:model.head.bias"]
        write(folder, layout)

    def lost_value(folder, layout):
        del layout["pieces"]["value:shift"]
        write(folder, layout)

    def renamed(folder, layout):
        layout["steps"]["model.other"] = layout["steps"].pop("model.head.bias")
        write(folder, layout)

    def infinite(folder, layout):
        tensors = load_file(folder / path.name)
        tensors["value:shift"][3] = float("nan")
        save_file(tensors, folder / path.name)

    assert "optimizer-00001.safetensors: missing" in broken("workers", more_workers)
    assert "exp_avg of model.head.bias has gaps" in broken("gap", gap)
    assert "exp_avg of model.head.bias is missing" in broken("lost", lost)
    assert "value of shift is missing" in broken("lost_value", lost_value)
    assert "also of model.other" in broken("renamed", renamed)
    assert "the objective's shift is not finite" in broken("infinite", infinite)

    def no_model(folder, _):
        (folder / "model.safetensors").write_bytes(b"no tensors")

    def other_model(folder, _):
        save_file({"a": torch.ones(1)}, folder / "model.safetensors")

    assert "model.safetensors: not to be read as weights (safetensors)" in broken("no_model", no_model)
    assert "model.safetensors does not fit the model: missing " in broken("other_model", other_model)
    files = {f"json-{i}": ("optimizer-00000.json", content) for i, content in enumerate(NO_LAYOUTS)}
    sizes = (0, 7, 100, path.stat().st_size - 1)
    files |= {f"cut-{size}": (path.name, path.read_bytes()[:size]) for size in sizes}
    for case, file in files.items():

        def replace(folder, _, file=file):
            (folder / file[0]).write_bytes(file[1])

        assert "not to be read as an optimizer's state" in broken(case, replace), case


def test_master_weights_are_not_written_twice(tmp_path):
    path = save_alone(tmp_path / "a")
    assert {key.partition(":")[0] for key in load_file(path)} == {*MOMENTS, VALUE}
    stored = StoredState(tmp_path / "a", ())
    assert {name for kind, name in stored.shapes if kind == VALUE} == {"shift", "frozen", "mean"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", list(ENGINES))
def test_state_on_a_gpu_is_taken_over_to_the_bit(tmp_path, name):
    gpu = torch.device("cuda", 0)
    objective = ShiftedSquares()
    engine = ENGINES[name](objective, OPTIM, gpu, False, None, rates)
    for step in range(3):
        batch = {key: value.to(gpu) for key, value in batch_of(step, 0, 1).items()}
        engine.step(batch, step, OPTIM.lr)
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        write_files(folder, state_files(engine.state(), 0))
        objective.model.save(folder)
        objective = ShiftedSquares()
        engine = ENGINES[name](objective, OPTIM, gpu, False, folder, rates)
    assert_same_state(tmp_path / "a", tmp_path / "b")
    engine.step({key: value.to(gpu) for key, value in batch_of(3, 0, 1).items()}, 3, OPTIM.lr)

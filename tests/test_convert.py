"""Runs with pickled optimizer states of earlier versions: refused, then converted and gone on with.

`data/optimizers_2026_11.tar.xz` was written by commit e74bac0: the run of `test_not_finite_run` stopped at
step 4 of 9, by PyTorch's engine (none_1), and by DeepSpeed's on one worker and on two; the layers above the
second thaw at step 5.
"""

import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.__main__ import main
from raylib import checkpoint, convert
from raylib.engine_state import MOMENTS
from raylib.errors import UserError
from raylib.fileio import sha256_file
from tests.test_engine_state import whole_state
from tests.test_not_finite_run import run
from tests.workers import run_workers

RUNS = ("none_1", "zero2_1", "zero2_2")
ARCHIVE = Path(__file__).parent / "data" / "optimizers_2026_11.tar.xz"
NAME = "step_000004"
# the optimizer's groups: the head, then from the embedding up, each with its weights first
ORDER = [
    f"model.{layer}.{part}"
    for layer in ("head", "embedding", *(f"layers.{i}" for i in range(4)))
    for part in ("weight", "bias")
]


@pytest.fixture
def old(tmp_path):
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path / "optimizers_2026_11"


def rates(depth, step):
    return 0.0 if depth is not None and depth > 2 and step < 5 else 1.0


def go_on(rank, world, folder, sharding):
    """Train to the end from wherever `folder` is."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    run(folder, {}, rank=rank, world=world, steps=9, sharding=sharding, rates=rates, save_every=9)


def old_state(folder, workers):
    """{(kind, name): tensor} and {name: steps} of an old checkpoint, read as DeepSpeed and PyTorch do."""
    tensors, steps = {}, {}
    if (folder / "optimizer.pt").is_file():
        for place, state in torch.load(folder / "optimizer.pt", weights_only=True)["state"].items():
            steps[ORDER[place]] = int(state["step"])
            tensors |= {(kind, ORDER[place]): state[kind].flatten() for kind in MOMENTS}
        return tensors, steps
    shards = [
        torch.load(folder / "zero" / convert.SHARDS.format(r), weights_only=False) for r in range(workers)
    ]
    states = [shard["optimizer_state_dict"]["base_optimizer_state"]["state"] for shard in shards]
    weights = load_file(folder / "model.safetensors")
    for i, name in enumerate(ORDER):  # each group has one parameter
        steps[name] = int(states[0][i]["step"])
        for kind in MOMENTS:
            flat = torch.cat([state[i][kind] for state in states])
            tensors[kind, name] = flat[: weights[name.removeprefix("model.")].numel()]
    return tensors, steps


@pytest.mark.parametrize("name", RUNS)
def test_converted_run_is_the_old_one(old, tmp_path, name, capsys):
    """Its state to the bit; and it goes on as an undisturbed run of today, but for the rounding of the
    machine that it began on."""
    sharding, workers = name.split("_")[0], int(name[-1])
    folder = old / name / "checkpoints" / NAME
    expected, steps = old_state(folder, workers)
    with pytest.raises(UserError, match=f"pickled .* python -m pretrain convert {old / name} writes it anew"):
        checkpoint.require_optimizer(folder)
    capsys.readouterr()
    assert main(["convert", str(old / name)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert (
        "pickles" in printed[0] and "of your own" in printed[0] and "1 checkpoints converted" in printed[-1]
    )
    assert checkpoint.verify(folder)["step"] == 4
    assert not [
        path.name for path in folder.rglob("*") if path.suffix in (".pt", ".py") or path.name == "latest"
    ]
    stored, stored_steps = whole_state(folder, ORDER)
    assert stored_steps == steps and stored.keys() == expected.keys()
    assert all(value.equal(stored[key]) for key, value in expected.items())
    registry = json.loads((folder.parent / checkpoint.REGISTRY).read_text())
    assert registry == {"checkpoints": [NAME], "best": None}
    run_workers(go_on, workers, old / name, sharding)
    run_workers(go_on, workers, tmp_path / "whole", sharding)
    ends = [path / "checkpoints" / "step_000009" for path in (old / name, tmp_path / "whole")]
    weights = load_file(ends[1] / "model.safetensors")
    for key, value in load_file(ends[0] / "model.safetensors").items():
        torch.testing.assert_close(value, weights[key], rtol=1e-5, atol=1e-6)
    assert whole_state(ends[0])[1] == whole_state(ends[1])[1]
    assert main(["convert", str(old / name)]) == 0 and "0 checkpoints converted" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("other", [("none", 1), ("zero2", 3)])
def test_converted_run_goes_on_under_another_engine(old, other):
    """By their places in the groups, or by their names."""
    for name in ("none_1", "zero2_2"):
        assert main(["convert", str(old / name)]) == 0
        shutil.copytree(old / name, old / "again")
        run_workers(go_on, other[1], old / "again", other[0])
        assert checkpoint.find_newest(old / "again").name == "step_000009"
        shutil.rmtree(old / "again")


@pytest.mark.parametrize("name", RUNS)
def test_conversion_killed_at_any_moment_is_finished_by_another(old, name, monkeypatch):
    """Killed before each file that it writes, and each that it removes."""
    expected, steps = old_state(old / name / "checkpoints" / NAME, int(name[-1]))
    calls = ("write_json", "write_files"), ("rmtree",), ("unlink",)
    places = zip((convert, shutil, Path), calls, strict=True)
    functions = [(place, function) for place, names in places for function in names]
    for count in range(100):
        folder = old / f"copy-{count}"
        shutil.copytree(old / name, folder)
        left = [count]

        def killing(function, left=left):
            def call(*args, **options):
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return function(*args, **options)

            return call

        with monkeypatch.context() as patch:
            for place, function in functions:
                patch.setattr(place, function, killing(getattr(place, function)))
            code = main(["convert", str(folder)])
        newest = checkpoint.find_newest(folder)
        assert checkpoint.verify(newest)["step"] == 4
        assert checkpoint.has_optimizer(newest) != checkpoint.has_old_optimizer(newest)
        if code == 0:
            break
        assert main(["convert", str(folder)]) == 0
        stored, stored_steps = whole_state(newest, ORDER)
        assert stored_steps == steps and all(x.equal(stored[key]) for key, x in expected.items())
        assert not [path.name for path in newest.rglob("*") if path.suffix == ".pt"]
    assert 8 < count < 50


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def seal(folder):
    """Write the lists of a checkpoint's files anew, as whoever crafts one would."""
    for listing in folder.glob("files-*.json"):
        files = {
            name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
            for name in json.loads(listing.read_text())
        }
        listing.write_text(json.dumps(files))


@pytest.mark.parametrize("way", ["torch.save", "pickle"])
def test_conversion_runs_no_code_of_a_pickle(old, capsys, way):
    marker = old / "executed"
    paths = [path.relative_to(old) for path in sorted(old.rglob("*.pt"))]
    assert len(paths) == 6
    for i, path in enumerate(paths):
        place = old / str(i)
        shutil.copytree(old / path.parts[0], place / path.parts[0])
        content = {name: Evil(marker) for name in ("optimizer_state_dict", "state", "module")}
        if way == "pickle":
            (place / path).write_bytes(pickle.dumps(content))
        else:
            torch.save(content, place / path)
        folder = place / path.parts[0] / "checkpoints" / NAME
        seal(folder)
        before = {each.name: each.read_bytes() for each in folder.rglob("*") if each.is_file()}
        assert main(["convert", str(place)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {folder}: not to be read as the state of an optimizer")
        assert not marker.exists()
        after = {each.name: each.read_bytes() for each in folder.rglob("*") if each.is_file()}
        assert before.items() <= after.items() and checkpoint.has_old_optimizer(folder)


def test_conversion_names_what_is_no_run(tmp_path, capsys):
    assert main(["convert", str(tmp_path)]) == 2
    assert f"{tmp_path}: no folder checkpoints in it" in capsys.readouterr().err


def test_convert_of_the_folder_of_all_runs_says_what_to_give(old, capsys):
    assert main(["convert", str(old)]) == 2
    line = capsys.readouterr().err
    assert f"{old}: no run, but a folder of " in line and "give one of them" in line and line.count("\n") == 1

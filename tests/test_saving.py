"""The writer of checkpoints: what it writes and copies, what becomes of a save that fails or is killed."""

import gc
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from raylib import checkpoint, saving
from raylib.config import dump_config
from raylib.errors import MachineError
from raylib.monitoring import read_metrics
from raylib.saving import DTYPES, CheckpointWriter, HostCopy, num_bytes, write_files
from tests.test_checkpoint import killed_everywhere, steps
from tests.test_not_finite_run import run as train
from tests.workers import run_workers

CPU = torch.device("cpu")
UNSHARE = ["unshare", *([] if os.geteuid() == 0 else ["--map-root-user"]), "--mount"]


def some_tensors():
    """Of every format, empty, without dimension, not contiguous, of names in other alphabets."""
    g = torch.Generator().manual_seed(0)
    tensors = {str(dtype): torch.randint(0, 2, (3, 5), generator=g).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "字": torch.randn(7, generator=g)}
    return tensors | {"transposed": torch.randn(4, 6, generator=g).T, "odd": torch.ones(3, dtype=torch.bool)}


def same(one, other):
    return one.keys() == other.keys() and all(
        x.dtype == other[name].dtype and x.shape == other[name].shape and x.equal(other[name])
        for name, x in one.items()
    )


def test_write_files_writes_what_safetensors_reads(tmp_path):
    tensors = some_tensors()
    files = {"a.safetensors": tensors, "b.json": b"{}", "none.safetensors": {}}
    written = write_files(tmp_path, files)
    assert (
        same(load_file(tmp_path / "a.safetensors"), tensors)
        and load_file(tmp_path / "none.safetensors") == {}
    )
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    for name, values in written.items():
        data = (tmp_path / name).read_bytes()
        assert values == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert num_bytes(files) == sum(values["bytes"] for values in written.values())
    # the library's own file has the same bytes of data: readers of slices find them in the same order
    save_file({name: x.contiguous() for name, x in tensors.items()}, tmp_path / "peer.safetensors")
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("a", "peer")]
    assert abs(sizes[0] - sizes[1]) < 100


def test_host_copy_is_of_its_moment_and_keeps_its_memory():
    tensors, copy = some_tensors(), HostCopy(CPU)
    before = {name: x.clone() for name, x in tensors.items()}
    files = copy.take({"a": tensors, "b": b"text"})
    for x in tensors.values():
        x.zero_()
    assert same(files["a"], before) and files["b"] == b"text"
    place = copy.buffer.data_ptr()
    again = copy.take({"a": before})["a"]
    assert copy.buffer.data_ptr() == place and same(again, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_host_copy_of_a_gpu_is_of_its_moment():
    """While the device computes on, and tensors are changed as soon as it is told to wait for the copy."""
    device = torch.device("cuda")
    weights, copy = torch.zeros(1 << 26, device=device), HostCopy(device)
    noise = torch.randn(4096, 4096, device=device)
    for step in range(1, 5):
        for _ in range(20):
            noise = (noise @ noise).tanh()  # the update below is far behind the host
        weights.add_(1.0)
        files = copy.take({"w": {"x": weights, "temporary": weights[:1000] * 2}})
        assert files["w"]["x"].is_pinned()
        copy.wait_on_device()
        weights.mul_(1.0).add_(0.0)
        scratch = weights * 100  # takes the memory that the temporary tensor had
        copy.wait_on_host()
        assert bool((files["w"]["x"] == step).all()) and bool((files["w"]["temporary"] == 2 * step).all())
        del scratch


def writer(run, keep=2, in_background=True, rank=0, world=1):
    (run / checkpoint.FOLDER).mkdir(parents=True, exist_ok=True)
    return CheckpointWriter(run, keep, rank, world, CPU, in_background)


def part(step, size=10, rank=0, world=1, score=None):
    """A worker's files of a checkpoint."""
    files = {f"optimizer-{rank:05d}.safetensors": {"x": torch.full((size,), float(step + rank))}}
    if rank == 0:
        meta = {"step": step, "workers": world, "score": score, "skipped_steps": 0}
        files |= {"meta.json": json.dumps(meta).encode(), "model.safetensors": {"w": torch.ones(size) * step}}
    return files


@pytest.mark.parametrize("in_background", [True, False])
def test_writer_registers_whole_checkpoints_in_order(tmp_path, in_background):
    saver, told = writer(tmp_path, 1, in_background), []
    for step in range(1, 6):
        files = part(step, score=0.5 if step == 2 else 0.1)
        saver.save(step, files, lambda step=step: told.append((step, checkpoint.find_newest(tmp_path).name)))
        files["model.safetensors"]["w"].zero_()  # training goes on
    saver.wait()
    assert told == [(step, checkpoint.step_name(step)) for step in range(1, 6)]
    assert checkpoint.read_registry(tmp_path) == (steps(2, 5), ("step_000002", 0.5), {})
    for step in (2, 5):
        folder = tmp_path / "checkpoints" / checkpoint.step_name(step)
        assert checkpoint.verify(folder)["step"] == step
        assert load_file(folder / "model.safetensors")["w"].equal(torch.ones(10) * step) or not in_background
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "registry.json",
        *steps(2, 5),
    ]


def save_and_kill(run):
    saver = writer(run, keep=1)
    saver.save(3, part(3, score=0.9), lambda: None)
    saver.wait()


def test_writer_killed_anywhere_leaves_old_or_new_checkpoint(tmp_path):
    saver = writer(tmp_path / "run", in_background=False)
    for step, score in ((1, 0.5), (2, 0.1)):
        saver.save(step, part(step, score=score), lambda: None)
    found = []
    for run in killed_everywhere(tmp_path, save_and_kill):
        before = checkpoint.read_registry(run)
        assert all(checkpoint.verify(run / "checkpoints" / name) for name in before.checkpoints)
        checkpoint.settle(run)
        assert before == checkpoint.read_registry(run) and not list(run.rglob(".*"))
        found.append((list(before.checkpoints), before.best.checkpoint))
    assert sorted(set(map(str, found))) == sorted(
        map(str, [(steps(1, 2), steps(1)[0]), (steps(3), steps(3)[0])])
    )
    assert len(found) > 10


def on_small_disk(function, folder, *arguments):
    """Call a function of this file with `folder`, on a disk of 4 MB, and return what it prints as JSON: in a
    process with mounts of its own, so that nothing is left of it."""
    code = f"from tests import test_saving as t; t.mount_small_disk({str(folder)!r}); "
    code += f"t.{function.__name__}({str(folder)!r}, *{arguments!r})"
    folder.mkdir()
    done = subprocess.run([*UNSHARE, sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def mount_small_disk(folder):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=True)


def fill_disk(folder, in_background, looks_ahead):
    """Save 2 MB twice, the second time without room for them."""
    run = Path(folder) / "run"
    saver = writer(run, 2, in_background)
    saver.save(1, part(1, 1 << 18), lambda: None)
    saver.wait()
    (run / "other").write_bytes(bytes(200_000))
    if not looks_ahead:  # as under a quota, or beside another who fills the disk
        saving.shutil = SimpleNamespace(disk_usage=lambda path: (1 << 40, 0, 1 << 40))
    try:
        saver.save(2, part(2, 1 << 18), lambda: None)
        saver.wait()
    except MachineError as e:
        found = str(e), checkpoint.read_registry(run).checkpoints, sorted(p.name for p in run.rglob(".*"))
        checkpoint.verify(checkpoint.find_newest(run))
    (run / "other").unlink()
    checkpoint.remove_folder(run / "checkpoints/step_000001")  # room is made: it goes on
    saver.save(2, part(2, 1 << 18), lambda: None)
    saver.wait()
    print(json.dumps([*found, checkpoint.verify(checkpoint.find_newest(run))["step"]]))


@pytest.mark.parametrize(
    ("looks_ahead", "in_background"),
    [(True, True), (False, True), *(pytest.param(a, False, marks=pytest.mark.slow) for a in (True, False))],
)
def test_writer_on_full_disk_keeps_last_checkpoint_and_says_what_is_needed(
    tmp_path, in_background, looks_ahead
):
    line, kept, left, step = on_small_disk(fill_disk, tmp_path / "disk", in_background, looks_ahead)
    assert "/run/checkpoints" in line and "no space left on the disk (2.1 MB needed, " in line, line
    assert "MB free" in line and "\n" not in line
    assert (kept, left, step) == (steps(1), [], 2)


def train_saving(rank, world, folder):
    """Train with a checkpoint after each step, in the background and in line, on both engines."""
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world)}
    for sharding in ("none", "zero2"):
        for in_background in (True, False):
            place = folder / f"{sharding} {in_background}"
            more = {"keep": 9, "async_save": in_background, "sharding": sharding, "steps": 6, "log_every": 5}
            train(place, {}, rank=rank, world=world, **more)


@pytest.mark.parametrize("world", [1, 2])
def test_training_saved_in_background_has_checkpoints_of_one_saved_in_line(tmp_path, world):
    """To the byte, after each step, although training goes on while they are written."""
    run_workers(train_saving, world, tmp_path)
    for sharding in ("none", "zero2"):
        one, other = (tmp_path / f"{sharding} {x}" / "checkpoints" for x in (True, False))
        for name in steps(*range(1, 7)):
            checkpoint.verify(one / name)
            files = sorted(path.name for path in (one / name).glob("*.safetensors"))
            assert len(files) == 1 + world
            for file in files:
                assert (one / name / file).read_bytes() == (other / name / file).read_bytes(), (name, file)


def fit_often(rank, world, folder):
    """How many (threads, open files) this process has after each of 12 trainings."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    counts = []
    for number in range(12):
        train(Path(folder) / str(number), {}, rank=rank, world=world, steps=2)
        gc.collect()
        counts.append(tuple(len(os.listdir(f"/proc/self/{kind}")) for kind in ("task", "fd")))
    return counts


@pytest.mark.slow
def test_trainings_in_one_process_leave_no_threads_and_open_files(tmp_path):
    """Each has two groups of processes of its own, with threads and connections."""
    for counts in run_workers(fit_often, 2, tmp_path):
        assert max(counts[4:]) <= max(counts[:4]), counts


@pytest.mark.parametrize("stop_after", [None, 7])
def test_training_gives_a_checkpoint_no_score_of_another_step(tmp_path, stop_after):
    """Evaluated after 3, 6, 9 and 10 steps, saved after 2, 4 ... 10: the best of both is step 6's, though
    that of step 3 is higher. Also where the run was stopped in between."""

    def evaluate(model):
        evaluated.append(len(evaluated))
        return {"score": [0.9, 0.8, 0.7, 0.1][evaluated[-1]]}

    evaluated, settings = [], {"evaluate": evaluate, "steps": 10, "eval_every": 3, "save_every": 2, "keep": 9}
    if stop_after:
        train(tmp_path, {}, stop_after=stop_after, **settings)
    result = train(tmp_path, {}, **settings)
    metas = [checkpoint.read_meta(tmp_path / "checkpoints" / name) for name in steps(2, 4, 6, 8, 10)]
    assert [meta["score"] for meta in metas] == [None, None, 0.8, None, 0.1]
    assert checkpoint.read_registry(tmp_path).best == ("step_000006", 0.8)
    assert result["evaluation"] == {"score": 0.1} and result["evaluation_step"] == 10
    assert [(r["step"], r["eval/score"]) for r in read_metrics(tmp_path) if "eval/score" in r] == [
        *zip((3, 6, 9, 10), (0.9, 0.8, 0.7, 0.1), strict=True)
    ]


def test_pretraining_on_full_disk_ends_with_one_line_and_goes_on_later(mini, tmp_path):
    """On the command line: a checkpoint takes 5 MB of 8."""
    disk = tmp_path / "disk"
    disk.mkdir()
    config = mini("name=full", f"runs={disk}", "runtime=local", "workers=1", "fit.bf16=false")
    (tmp_path / "config.json").write_text(dump_config(config))
    command = f"{sys.executable} -m pretrain --config {tmp_path}/config.json"
    script = f"""
mount -t tmpfs -o size=8m tmpfs {disk}
{command}
echo "first $?"
ls -A {disk}/full/checkpoints
cat {disk}/full/checkpoints/registry.json
mount -o remount,size=64m {disk}
{command}
echo "then $?"
"""
    done = subprocess.run([*UNSHARE, "sh", "-c", script], capture_output=True, text=True)
    error = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    needed = (
        r"error: \S+/full/checkpoints: no space left on the disk \(\d\.\d MB needed, [\d.]+ MB free\); free"
    )
    assert len(error) == 1 and re.match(needed, error[0]), done.stderr
    assert "Traceback" not in done.stderr and "then 0" in done.stdout
    first, found = done.stdout.partition("first 1\n")[::2]
    assert "step 4/6" in first and found.split()[:2] == ["registry.json", "step_000002"]
    assert json.loads(found.partition("then 0")[0].partition("step_000002\n")[2].partition("\n}")[0] + "}")[
        "checkpoints"
    ] == ["step_000002"]


def test_writer_whose_run_vanished_says_so(tmp_path):
    saver = writer(tmp_path / "run")
    saver.save(1, part(1), lambda: None)
    saver.wait()
    shutil.rmtree(tmp_path / "run")
    saver.save(2, part(2), lambda: None)
    with pytest.raises(
        MachineError, match="run/checkpoints: the folder of this run is gone, and its checkpoints"
    ):
        saver.wait()
    assert not (tmp_path / "run").exists()


def save_together(rank, world, run):
    """Two checkpoints of several workers; then one that worker 1 cannot write."""
    saver = writer(run, 1, True, rank, world)
    registered = []
    for step in (1, 2):
        files = part(step, 10 + rank, rank, world)
        saver.save(step, files, lambda: registered.append(checkpoint.find_newest(run).name))
    saver.wait()
    files = part(3, 10, rank, world)
    if rank == 1:
        files["no/such/folder"] = b"x"
    saver.save(3, files, lambda: registered.append("never"))
    try:
        saver.wait()
    except Exception as e:
        return registered, str(e)


def test_writer_of_several_workers_makes_one_checkpoint_or_none(tmp_path):
    results = run_workers(save_together, 3, tmp_path)
    assert all(registered == steps(1, 2) for registered, _ in results)
    assert all("no/such/folder" in line for _, line in results), results
    assert checkpoint.read_registry(tmp_path).checkpoints == steps(2)
    folder = tmp_path / "checkpoints/step_000002"
    checkpoint.verify(folder)
    for rank in range(3):
        x = load_file(folder / f"optimizer-{rank:05d}.safetensors")["x"]
        assert x.equal(torch.full((10 + rank,), 2.0 + rank))
    assert not list(tmp_path.rglob(".*"))

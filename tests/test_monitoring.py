"""What people see of a training while it runs: means over an interval, the line of progress, steps that
hang."""

import contextlib
import io
import os
import time
import types
from pathlib import Path

import pytest
import torch

from raylib import distributed, loop
from raylib.checkpoint import find_newest, read_meta
from raylib.data.loading import StepDataset
from raylib.distributed import all_reduce
from raylib.engine import OptimConfig, TorchEngine
from raylib.errors import UserError
from raylib.loop import Meter
from raylib.monitoring import (
    MetricsLog,
    ProgressLog,
    StallWatch,
    duration,
    layout,
    list_losses,
    read_metrics,
    short,
)
from raylib.runtime import LocalRuntime, peak_flops
from tests import test_not_finite_run
from tests.test_not_finite import Faulty, faulty_batch
from tests.test_not_finite_run import Batches
from tests.test_not_finite_run import run as train
from tests.test_strategies import Stack
from tests.workers import run_workers

FAULTS = {4: "term", 5: "gradient", 11: "loss"}


def losses(folder):
    return {
        line["step"]: {k: v for k, v in line.items() if k.startswith("loss/")}
        for line in read_metrics(folder)
        if "lr" in line
    }


def test_line_has_means_over_its_interval_without_skipped_steps(tmp_path):
    train(tmp_path / "each", FAULTS, steps=12)
    train(tmp_path / "every_4", FAULTS, steps=12, log_every=4)
    train(tmp_path / "every_2", FAULTS, steps=12, log_every=2)
    each, means = losses(tmp_path / "each"), losses(tmp_path / "every_4")
    assert list(means) == [4, 8, 12]
    for step, values in means.items():
        counted = [each[i] for i in range(step - 3, step + 1) if i - 1 not in FAULTS]
        for name, value in values.items():
            assert value == pytest.approx(sum(line[name] for line in counted) / len(counted), rel=1e-12)
    assert losses(tmp_path / "every_2")[6] == {}  # both were skipped


@pytest.mark.parametrize("stop_after", [3, 5, 6])
def test_line_of_an_interval_that_a_resume_cuts_is_the_whole_one(tmp_path, stop_after):
    train(tmp_path / "whole", FAULTS, steps=12, log_every=4)
    train(tmp_path / "parts", FAULTS, steps=12, log_every=4, stop_after=stop_after)
    train(tmp_path / "parts", FAULTS, steps=12, log_every=4)
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    parts.pop(stop_after)  # the line of the stop itself
    assert parts == whole  # to the bit


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0:00"),
        (59.6, "1:00"),
        (725, "12:05"),
        (3723, "1:02:03"),
        (86399, "23:59:59"),
        (3 * 86400 + 4 * 3600 + 12 * 60 + 59, "3 d 04:12"),
        (12 * 86400, "12 d 00:00"),
    ],
)
def test_duration(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "0.00"),
        (9.324, "9.32"),
        (99.96, "100"),
        (512.4, "512"),
        (999.6, "1.00k"),
        (12345, "12.3k"),
        (999_600, "1.00M"),
    ],
)
def test_short_rates_have_three_digits(number, words):
    assert short(number) == words


GROUPS = [
    "tiny step 120/1200 epoch 48.91",
    "ucl_image 5.234 itm 0.643 vlm 7.321 ucl_translation 6.012 tlm 8.231 xmlm 8.221 grad_norm 0.812",
    "lr 1.00e-03",
    "4.35k samples/s 81.3k tokens/s 41 % of peak",
    "41.2 GB",
    "waiting 2 %",
    "ETA 1:02:03",
]


@pytest.mark.parametrize(("columns", "lines"), [(80, 4), (120, 3), (200, 2), (300, 1)])
def test_line_fits_a_terminal(columns, lines, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    printed = layout(GROUPS).split("\n")
    assert len(printed) == lines and max(map(len, printed)) <= columns
    words = [word for group in GROUPS for word in group.split()]
    assert [word for word in " ".join(printed).split() if word != "|"] == words


def test_line_is_one_in_a_log(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert layout(GROUPS) == " | ".join(GROUPS)


def hang(rank, world, folder):
    """Train on `world` workers; the first reads the batch of step 61 for 3 s."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    StallWatch.LEAST_SECONDS, read = 0.5, Batches.__getitem__

    def slow_read(self, step):
        if rank == 0 and step == 60:
            time.sleep(3)
        return read(self, step)

    Batches.__getitem__ = slow_read
    with open(Path(folder) / f"stderr-{rank}", "w") as file, contextlib.redirect_stderr(file):
        train(Path(folder), {}, rank=rank, world=world, steps=80, log_every=80, save_every=0)
    return sorted(path.name for path in Path(folder).glob("stacks-*"))


def test_step_that_hangs_is_told_with_the_stacks_of_all_workers(tmp_path):
    assert run_workers(hang, 2, str(tmp_path)) == [["stacks-61.txt"]] * 2
    (line,) = (tmp_path / "stderr-0").read_text().splitlines()
    assert not (tmp_path / "stderr-1").read_text()
    assert line.startswith("step 61 hangs: ") and line.endswith(
        f"all workers' stacks: {tmp_path}/stacks-61.txt"
    )
    parts = (tmp_path / "stacks-61.txt").read_text().split("==== ")[1:]
    assert sorted(part.partition(" on ")[0] for part in parts) == ["worker 0", "worker 1"]
    first, second = sorted(parts)
    # what hangs, and what waits for it
    assert "in slow_read" in first and "time.sleep(3)" in first and "thread MainThread" in first
    assert "in slow_read" not in second and "engine.py" in second


def test_training_that_is_slow_all_the_time_is_told_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(StallWatch, "LEAST_SECONDS", 0.01)
    monkeypatch.setattr(StallWatch, "FACTOR", 1000)
    train(tmp_path, {}, steps=40, save_every=10)
    assert not list(tmp_path.glob("stacks-*")) and "hangs" not in capfd.readouterr().err


def log_tokens(rank, world, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    read = Batches.__getitem__
    Batches.__getitem__ = lambda self, step: read(self, step) | {"tokens": 10 + 5 * self.rank}
    train(Path(folder), {}, rank=rank, world=world, steps=8, log_every=8)


def test_tokens_are_those_of_all_workers(tmp_path):
    run_workers(log_tokens, 2, str(tmp_path))
    line = next(line for line in read_metrics(tmp_path) if "lr" in line)
    # 8 samples a step are those of both
    assert line["tokens_per_second"] / line["samples_per_second"] == pytest.approx((10 + 15) / 8)
    assert 0 <= line["waiting"] <= 1 and line["memory_gb"] > 0 and line["eta_seconds"] == 0


class Replacing(Batches):
    """On each of two workers a sample of every other step is another than it should be."""

    def __init__(self, faults, rank, world):
        super().__init__(faults, rank, world)
        self.checks = []

    def __getitem__(self, step):
        return super().__getitem__(step) | {"bad": step % 2}

    def check_replaced(self, count, steps):
        self.checks.append((count, steps))
        if count > 9:
            raise UserError(f"{count} of {steps}")


def count_replaced(rank, world, folder):
    """What each start of a run looks at that is stopped after 3 steps and goes on, and what it ends with."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    found = []
    test_not_finite_run.Batches = lambda *arguments: found.append(Replacing(*arguments)) or found[-1]
    settings = {"steps": 14, "log_every": 4, "save_every": 7}
    train(Path(folder), {}, rank=rank, world=world, stop_after=3, **settings)
    with pytest.raises(UserError) as error:
        train(Path(folder), {}, rank=rank, world=world, **settings)
    return [batches.checks for batches in found], str(error.value)


def test_samples_replaced_are_those_of_all_workers_and_starts(tmp_path):
    """They are looked at with each line of progress, and each save, where the workers meet in any case."""
    for (first, then), error in run_workers(count_replaced, 2, str(tmp_path)):
        assert first == [(2, 3), (2, 3)] and error == "12 of 12"
        assert then == [(4, 4), (6, 7), (8, 8), (12, 12)]
    newest = find_newest(tmp_path)
    assert newest.name == "step_000007" and read_meta(newest)["samples_replaced"] == 6


def test_flops_of_the_first_step_are_counted_and_change_nothing():
    weights = []
    for peak in (None, 1e12):
        engine = TorchEngine(Faulty(Stack()), OptimConfig(), torch.device("cpu"), False, None)
        meter = Meter({}, peak)
        for step in range(2):
            batch = faulty_batch(step, faults={}) | {"tokens": 8}
            with meter.count_flops(batch):
                engine.step(batch, step, 0.1)
        weights.append(engine.objective.model.state_dict())
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items())
    # forward, and gradients of weights and inputs, but for the first layer's input
    layers, head, first = 3 * 4 * 2 * 8 * 6 * 6, 3 * 2 * 8 * 6, 2 * 2 * 8 * 6 * 6
    assert meter.flops_per_token == (layers + head + first) / 8


def count_on_workers(rank, world, folder):
    """Train under DDP and under ZeRO, on devices of a known peak; the losses that were logged."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    read = Batches.__getitem__
    Batches.__getitem__ = lambda self, step: read(self, step) | {"tokens": 4}
    for zero in ("none", "zero2"):
        for peak in (None, 1e12):
            loop.peak_flops = lambda device, peak=peak: peak
            place = Path(folder) / f"{zero} {peak}"
            train(place, {}, rank=rank, world=world, steps=3, bf16=True, sharding=zero, save_every=0)


def test_flops_are_counted_under_ddp_and_zero_and_change_nothing(tmp_path):
    run_workers(count_on_workers, 2, str(tmp_path))
    for zero in ("none", "zero2"):
        plain, counted = (tmp_path / f"{zero} {peak}" for peak in (None, 1e12))
        assert losses(plain) == losses(counted) and len(losses(plain)) == 3
        assert all("share_of_peak" not in line for line in read_metrics(plain))
        assert all(0 < line["share_of_peak"] < 1 for line in read_metrics(counted))


class Clock:
    """A clock that only `sleep` moves: a machine under load changes nothing of what it measures."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class WorkingObjective(torch.nn.Module):
    """A forward pass of so many seconds in each step of a worker, and an exchange in which it waits until
    the step's seconds are over."""

    def __init__(self, clock, step, seconds):
        super().__init__()
        self.clock, self.step, self.seconds = clock, step, iter(seconds)

    def forward(self, x):
        seconds = next(self.seconds)
        self.clock.sleep(seconds)
        with distributed._exchange():
            self.clock.sleep(self.step - seconds)
        return all_reduce(x)


def log_steps(worker, world, folder, cases):
    """What worker 0 prints of each case, in whose steps worker i works `case[1][i]` seconds by itself."""
    clock = Clock()
    loop.time = distributed.time = clock
    runtime = types.SimpleNamespace(
        run=Path(folder), device=torch.device("cpu"), world_size=world, publish=lambda _: None
    )
    printed = []
    for step_seconds, seconds, _ in cases:
        objective, meter = WorkingObjective(clock, step_seconds, seconds[worker]), Meter({})
        meter.time_forward(objective)
        log = MetricsLog(Path(folder), 0) if worker == 0 else None
        steps = len(seconds[0])
        progress = ProgressLog("x", steps, 0, StepDataset(), meter, runtime, log)
        with contextlib.redirect_stdout(io.StringIO()) as text:
            for step in range(steps):
                objective(torch.ones(1))
                meter.lap("step")
                progress.log(step + 1, 0.1, {}, 0)
        printed.append(text.getvalue())
    return printed


FAST, HICCUP, BUSY = [0.002] * 10, [0.03] * 10, [0.05] * 10  # seconds of each step of a window
# (seconds of a step, those of each worker's own part, what is said after which step)
SLOW_WORKERS = [
    (
        0.1,
        (HICCUP * 4, FAST * 4),
        {20: "worker 0 is slow: its own part of a step takes 0.03 s, that of other"},
    ),
    (0.1, (FAST * 4, FAST + HICCUP * 3), {30: "worker 1 is slow: its own part of a step takes 0.03 s, that"}),
    # twice, with a time between in which it was not; one after the other
    (0.1, (HICCUP * 2 + FAST + HICCUP * 2, FAST * 5), {20: "worker 0", 50: "worker 0"}),
    (0.1, (HICCUP * 2 + FAST * 2, FAST * 2 + HICCUP * 2), {20: "worker 0", 40: "worker 1"}),
    # a window of a loaded machine; one of this worker and one of that
    (0.1, (FAST + HICCUP + FAST * 2, FAST * 4), {}),
    (0.1, ((FAST + HICCUP) * 2, (HICCUP + FAST) * 2), {}),
    # milliseconds; a small part of a step; not half as long again; nothing
    (0.1, ([0.0033] * 40, [0.0021] * 40), {}),
    (0.1, ([0.011] * 40, FAST * 4), {}),
    (1.0, (HICCUP * 4, FAST * 4), {}),
    (0.1, (BUSY * 4, [0.034] * 40), {}),
    (0.1, (FAST * 4, FAST * 4), {}),
]


def test_slow_worker_is_named_once(tmp_path):
    first, second = run_workers(log_steps, 2, str(tmp_path), SLOW_WORKERS)
    for printed, nothing, (_, seconds, said) in zip(first, second, SLOW_WORKERS, strict=True):
        lines = [line for line in printed.splitlines() if "is slow" in line]
        assert nothing == "" and len(lines) == len(said), (seconds, lines)
        for line, (step, words) in zip(lines, said.items(), strict=True):
            assert line.startswith(f"x step {step}/{len(seconds[0])} | {words}"), line


def test_share_of_peak_is_of_all_workers_devices(tmp_path):
    meter = Meter({"data": 1.0}, peak=1e3)
    runtime = LocalRuntime(tmp_path, 1)
    progress = ProgressLog("x", 10, 0, StepDataset(), meter, runtime, MetricsLog(tmp_path, 0))
    meter.seconds |= {"data": 2.0, "step": 3.0}
    meter.tokens, meter.samples, meter.flops_per_token = 400, 20, 4.0
    progress.log(5, 0.1, {"task": 1.0}, 0)
    (line,) = read_metrics(tmp_path)
    assert line["share_of_peak"] == 0.4 and line["tokens_per_second"] == 100
    assert line["waiting"] == 0.25 and line["eta_seconds"] == 4.0 and line["samples_per_second"] == 5


def test_peak_of_known_devices(monkeypatch):
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H100 PCIe": 756e12}
    for name, peak in {**names, "NVIDIA A10": 125e12, "NVIDIA L4": 121e12, "Tesla V100": None}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None


def test_losses_of_a_run_are_listed_without_what_stands_beside_them():
    records = [
        {"step": 1, "loss/itm": 1.0, "loss/itm_accuracy": 0.5, "loss/grad_norm": 2.0},
        {"step": 2, "loss/a": 1.0, "eval/score": 0.1},
    ]
    assert list_losses(records) == ["loss/a", "loss/itm"]

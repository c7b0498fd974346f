"""The parts of `benchmarks.gpu`, in the order in which most is learnt in the least time. Each is a function
of a `Report`, which it gives its figures as it goes, so that an end in the middle loses none."""

import gc
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu_peers import MaskedLanguageModel, OpenClip
from benchmarks.gpu_steps import (
    Setting,
    Training,
    copy_tb_per_second,
    count_flops,
    find_waits,
    matmul_tflops,
    profile_steps,
    time_steps,
    time_training,
    training,
)
from benchmarks.results import ROOT
from benchmarks.twin import PaddedTwin
from raylib.memory import GB, StepSize, estimate_memory
from raylib.runtime import device_name, peak_flops

SIZES = ("base", "small", "tiny")
NEEDS_GPU = 'reason="needs a GPU"'  # of the marks of tests
CONTRAST = [f"objective.weights.{term}=0" for term in ("itm", "vlm", "ucl_translation", "tlm", "xmlm")]


class Report:
    """Figures by part and name; `write` is called with all of them after each. `ends`: when the part under
    way has used its time (`time.monotonic`)."""

    def __init__(self, setting: Setting, write: Callable[[dict[str, Any]], None]):
        self.setting, self.write, self.ends = setting, write, math.inf
        self.figures: dict[str, Any] = {}
        self.part = ""

    def note(self, name: str, value: Any) -> None:
        self.figures.setdefault(self.part, {})[name] = value
        print(f"{self.part} | {name}: {value}", flush=True)
        self.write(self.figures)

    def has_time(self, name: str) -> bool:
        """Whether the part has time left; if not, notes that `name` is left out."""
        if time.monotonic() < self.ends:
            return True
        self.note(name, "left out: no time")
        return False

    def measure(self, name: str, function: Callable[[], Any]) -> Any:
        """Note what `function` returns, or why it failed; the memory of it is free afterwards."""
        if not self.has_time(name):
            return None
        try:
            value = function()
        except Exception as error:  # of whatever kind: the next measurement does not depend on it
            value = {"failed": f"{type(error).__name__}: {error}"[:400]}
        self.note(name, value)
        gc.collect()
        if self.setting.device.type == "cuda":
            torch.cuda.empty_cache()
        return value


def machine(report: Report) -> None:
    """What the machine is, and what it can at most."""
    setting = report.setting
    report.note("device", device_name(setting.device))
    report.note("torch", torch.__version__)
    report.note("threads", torch.get_num_threads())
    if setting.device.type == "cuda":
        report.note("cuda", torch.version.cuda)
        report.note("driver", _driver())
        report.note("memory_gb", round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1))
    report.note("matmul_tflops", round(matmul_tflops(setting), 2))
    report.note("copy_tb_s", round(copy_tb_per_second(setting), 3))


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def step(report: Report) -> None:
    """A step of `base`: time, share of the peak, waits, kernels."""
    with training(report.setting, "base") as run:
        report.measure("base", lambda: _whole_step(report, run))
        report.measure("waits", lambda: find_waits(report.setting, run.step))
        report.measure("profile", lambda: profile_steps(report.setting, run.step))


def _estimated_gb(run: Training) -> float:
    """Peak of a step as `raylib.memory` estimates it from the settings, to stand beside the measured one."""
    config, rows = run.config, dict(zip(("image_text", "parallel", "text"), run.batch, strict=True))
    fit: dict[str, Any] = {"micro_batches": config.fit.micro_batches, "residual": config.fit.residual}
    size = StepSize.of_rows(rows, 1)
    return round(estimate_memory(config.model, config.objective, size, **fit).peak / GB, 2)


def _whole_step(report: Report, run: Training) -> dict[str, Any]:
    """Time of a step with loader and optimizer, what share of the peak its matrix products reach, and the
    estimate of its memory."""
    figures = {**time_training(run), "estimated_gb": _estimated_gb(run)}
    tflop = count_flops(run.step)
    rate = 1e3 * tflop / figures["ms"]
    figures |= {"batch": run.batch, "tflop": round(tflop, 3), "tflops": round(rate, 1)}
    figures["share_of_measured_peak"] = round(rate / report.figures["machine"]["matmul_tflops"], 3)
    if promised := peak_flops(run.setting.device):
        figures["share_of_data_sheet"] = round(1e12 * rate / promised, 3)
    return figures


def gpu_tests(report: Report) -> None:
    """The tests that need a GPU."""
    # those files alone: others import what a bare machine lacks
    files = [path for path in sorted(ROOT.glob("tests/test_*.py")) if NEEDS_GPU in path.read_text("utf-8")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *map(str, files)]

    def run_tests() -> dict[str, Any]:
        left = report.ends - time.monotonic()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left)
        lines = (done.stdout or done.stderr).strip().splitlines()
        figures: dict[str, Any] = {"summary": lines[-1] if lines else ""}
        if done.returncode:
            wrong = [line for line in lines if line.startswith(("FAILED", "ERROR", "INTERNALERROR", "E  "))]
            figures["failed"] = wrong[-40:] or lines[-10:]
        return figures

    report.measure("pytest -m gpu", run_tests)


def twin(report: Report) -> None:
    """Forward and backward beside the plain padded twin of the same weights, in bf16, without dropout."""
    setting = report.setting
    with training(setting, "base", ["model.dropout=0"]) as run:
        peer = PaddedTwin(run.objective.model, "masked")

        def peer_step() -> None:
            run.objective.zero_grad(set_to_none=True)
            with torch.autocast(setting.device.type, torch.bfloat16):
                loss, _ = peer(run.next_batch())
            loss.backward()

        ours = report.measure(
            "ours", lambda: time_steps(setting, lambda: run.forward_backward(run.next_batch()))
        )
        theirs = report.measure("twin", lambda: time_steps(setting, peer_step))
        again = report.measure(
            "ours again", lambda: time_steps(setting, lambda: run.forward_backward(run.next_batch()))
        )
    note_ratio(report, theirs, _fastest([ours, again]))


def note_ratio(report: Report, theirs: dict | None, ours: dict | None) -> None:
    """Note how many times ours the peer takes."""
    if theirs and ours and "ms" in theirs:
        report.note("ratio", round(theirs["ms"] / ours["ms"], 2))


def open_clip(report: Report) -> None:
    """The contrastive part alone beside open_clip, whole steps: towers, loss, optimizer."""
    setting = report.setting
    pairs = 4 if setting.is_rehearsal else 256
    ours = []
    for name, changes in {"ours": [], "ours, fit.compile=true": ["fit.compile=true"]}.items():
        changes = ["model.dropout=0", *CONTRAST, *changes]
        with training(setting, "base", changes, (pairs, 4, 4), ("image_text",)) as run:
            batches = [run.next_batch() for _ in range(2 if setting.is_rehearsal else 8)]
            numbers = iter(range(10**6))

            def our_step(
                run: Training = run, batches: list = batches, numbers: Iterator[int] = numbers
            ) -> None:
                number = next(numbers)
                run.engine.step(batches[number % len(batches)], number, 1e-4)

            ours.append(report.measure(name, lambda: _pairs_per_second(pairs, time_steps(setting, our_step))))
    results = []
    # a CPU compiles for minutes what is over in milliseconds
    for compiled in (False,) if setting.is_rehearsal else (False, True):
        for is_bucketed in (False, True):
            name = "open_clip, buckets of length" if is_bucketed else "open_clip, padded"
            name += ", compiled" if compiled else ", eager"

            def theirs(is_bucketed: bool = is_bucketed, compiled: bool = compiled) -> dict[str, Any]:
                peer = OpenClip(run.config.model, setting.device, is_bucketed, compiled)
                numbers = iter(range(10**6))
                each = lambda: peer.step(batches[next(numbers) % len(batches)])  # noqa: E731
                return _pairs_per_second(pairs, time_steps(setting, each, warm=len(batches) + 2))

            results.append(report.measure(name, theirs))
    note_ratio(report, _fastest(results), _fastest(ours))


def _fastest(results: list[dict | None]) -> dict | None:
    """The fastest of these that did not fail."""
    return min((r for r in results if r and "ms" in r), key=lambda figures: figures["ms"], default=None)


def _pairs_per_second(pairs: int, figures: dict[str, Any]) -> dict[str, Any]:
    return {**figures, "pairs_per_second": round(1e3 * pairs / figures["ms"], 1)}


def sizes(report: Report) -> None:
    """The other sizes' steps."""
    for size in SIZES[1:]:
        with training(report.setting, size) as run:
            report.measure(size, lambda run=run: _whole_step(report, run))


# settings that a run may have, each beside the recipe's own
LEVERS: dict[str, list[str]] = {
    "as the recipe": [],
    "fit.compile=true": ["fit.compile=true"],
    "fit.residual=float32": ["fit.residual=float32"],
    "fit.tf32=false": ["fit.tf32=false"],
    "model.checkpointing=blocks": ["model.checkpointing=blocks"],
    "model.checkpointing=all": ["model.checkpointing=all"],
    "fit.micro_batches=4": ["fit.micro_batches=4"],
    "objective.contrast=sigmoid": ["objective.contrast=sigmoid"],
    "fit.sharding=zero2": ["fit.sharding=zero2"],  # last: it leaves a process group behind
}


def levers(report: Report) -> None:
    """What each setting is worth in time and memory."""
    for name, changes in LEVERS.items():

        def measure(changes: list[str] = changes) -> dict[str, Any]:
            with training(report.setting, "base", changes) as run:
                figures = time_training(run, None if report.setting.is_rehearsal else 10)
                return {**figures, "estimated_gb": _estimated_gb(run)}

        report.measure(name, measure)


def growth(report: Report) -> None:
    """Time and memory by the batch, until memory ends."""
    factors = (1,) if report.setting.is_rehearsal else (0.125, 1, 2, 4, 8, 16)
    for name, changes in {"": [], "model.checkpointing=all ": ["model.checkpointing=all"]}.items():
        for factor in factors:
            batch = tuple(round(factor * n) for n in report.setting.batch)

            def measure(batch: tuple = batch, changes: list[str] = changes) -> dict[str, Any]:
                with training(report.setting, "base", changes, batch) as run:
                    return _whole_step(report, run)

            result = report.measure(f"{name}{'/'.join(map(str, batch))}", measure)
            if result is None or "OutOfMemoryError" in str(result.get("failed")):
                break


def masked_language(report: Report) -> None:
    """Masked sentences alone beside `transformers`, whole steps."""
    setting = report.setting
    count = 8 if setting.is_rehearsal else 256
    with training(setting, "base", ["model.dropout=0"], (1, 1, count), ("text",)) as run:
        batches = [run.next_batch() for _ in range(4)]
        numbers = iter(range(10**6))

        def ours_step() -> None:
            number = next(numbers)
            run.engine.step(batches[number % len(batches)], number, 1e-4)

        ours = report.measure("ours", lambda: time_steps(setting, ours_step))

    def peer_steps() -> dict[str, Any]:
        peer = MaskedLanguageModel(run.config.model, setting.device)
        return time_steps(setting, lambda: peer.step(batches[next(numbers) % len(batches)]))

    note_ratio(report, report.measure("transformers", peer_steps), ours)


# each with the most seconds that it may take
PARTS: dict[Callable[[Report], None], int] = {
    machine: 20,
    step: 90,
    gpu_tests: 90,
    twin: 40,
    open_clip: 150,
    levers: 120,
    sizes: 60,
    growth: 90,
    masked_language: 40,
}

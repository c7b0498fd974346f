"""Steps to time, and how they are timed, for `benchmarks.gpu`.

A step takes a batch from loader processes, brings it to the device, and runs forward, backward and optimizer
in an engine of the project, as training does. Every batch has lengths of its own, drawn as a corpus gives
them.
"""

import shutil
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.dry import project_line
from benchmarks.step import make_batch
from benchmarks.twin import OBJECTIVE
from pretrain.recipes import RECIPES
from pretrain.train import PretrainConfig
from raylib.config import override
from raylib.data.loading import PREFETCH, BatchStream, StepDataset
from raylib.engine import TorchEngine
from raylib.engine_zero import DeepSpeedEngine
from raylib.models.recompute import set_recomputation
from raylib.models.unified import UnifiedModel
from raylib.objectives.pretraining import UnifiedObjective

BATCH = (64, 256, 256)  # image-text pairs, translations, sentences: one of eight GPUs' share of the paper's
REHEARSAL = ["model.width=64", "model.heads=2", "model.feedforward=128", "model.vocabulary=2000"]
REHEARSAL += ["model.text_layers=2", "model.fusion_layers=2", "model.vision_layers=2", "model.image_size=32"]
WORKERS = 8  # loader processes


class Setting:
    """A machine to measure on: `device`; on a CPU, models and batches of a rehearsal."""

    def __init__(self, device: torch.device):
        self.device, self.is_rehearsal = device, device.type == "cpu"
        self.batch = (4, 8, 8) if self.is_rehearsal else BATCH
        self.num_steps = 2 if self.is_rehearsal else 20
        self.workers = 0 if self.is_rehearsal else WORKERS

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def config(self, size: str, changes: Sequence[str] = ()) -> PretrainConfig:
        """The recipe `size` with the whole objective, in bf16; `changes`: settings, "path=value"."""
        config = RECIPES[size]().model_copy(update={"objective": OBJECTIVE})
        small = REHEARSAL if self.is_rehearsal else []
        return override(config, [*small, "fit.bf16=true", *changes])


class RandomBatches(StepDataset):
    """Batches of random images and ids, `batches[step]` with lengths of its own; the images of all steps are
    those of the first, in another order, for drawing bytes would take longer than reading files."""

    def __init__(self, config: PretrainConfig, batch: Sequence[int], streams: Sequence[str] = ()):
        self.config, self.batch, self.streams = config.model, tuple(batch), tuple(streams)
        self.images: Tensor | None = None
        texts = sum(self.batch) * 64 * 40  # bytes of ids, at most
        self.batch_bytes = 3 * config.model.image_size**2 * self.batch[0] + texts

    def __getitem__(self, step: int) -> dict[str, Any]:
        batch = make_batch(self.config, self.batch, step, fresh=True, images=self.images)
        self.images = batch["image_text"]["images"]
        if self.streams:
            batch = {name: part for name, part in batch.items() if name in (*self.streams, "step")}
        return {**batch, "tokens": self.count_tokens(batch), "samples": sum(self.batch)}


class Training:
    """A pretraining step of the project: model, objective, engine, batches."""

    def __init__(
        self,
        setting: Setting,
        size: str,
        changes: Sequence[str] = (),
        batch: Sequence[int] | None = None,
        streams: Sequence[str] = (),
    ):
        torch.manual_seed(0)
        self.setting, self.batch = setting, tuple(batch or setting.batch)
        self.config = setting.config(size, changes)
        fit, device = self.config.fit, setting.device
        model = UnifiedModel(self.config.model).to(device).train()
        set_recomputation(model, self.config.model.checkpointing, fit.micro_batches)
        self.objective = UnifiedObjective(model, self.config.objective)
        fit.set_precision(self.objective, device)
        engine = DeepSpeedEngine if fit.sharding == "zero2" else TorchEngine
        self.engine = engine(self.objective, self.config.optim, device, fit.uses_bf16(device), None)
        data = RandomBatches(self.config, self.batch, streams)
        # large batches and little shared memory leave room for fewer loader processes
        room = shutil.disk_usage("/dev/shm").free // (PREFETCH * data.batch_bytes)
        self.loader_workers = min(setting.workers, room)
        self.stream = BatchStream(data, 0, 10**6, self.loader_workers, device, is_quiet=True)
        self.num_steps = 0

    def next_batch(self) -> dict[str, Any]:
        return next(self.stream)

    def step(self) -> None:
        """Take one step, with the batch's way to the device."""
        self.engine.step(self.next_batch(), self.num_steps, 1e-4)
        self.num_steps += 1

    def forward_backward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the terms; gradients are left in the model."""
        self.objective.zero_grad(set_to_none=True)
        with torch.autocast(self.setting.device.type, torch.bfloat16):
            loss, terms = self.objective(batch)
        loss.backward()
        return terms


@contextmanager
def training(setting: Setting, *args: Any, **kwargs: Any) -> Iterator[Training]:
    """A `Training`, whose loader processes and memory are gone afterwards."""
    run = Training(setting, *args, **kwargs)
    try:
        yield run
    finally:
        del run.stream


def time_steps(setting: Setting, step: Callable[[], Any], num: int | None = None, warm: int = 3) -> dict:
    """Milliseconds a step over `num` steps that follow each other without a wait of ours, the last one
    included; CPU milliseconds of all threads of this process, waiting for the device included; peak GB."""
    num = num or setting.num_steps
    for _ in range(warm):
        step()
    setting.wait()
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    laps, start, cpu = [], time.perf_counter(), time.process_time()
    for _ in range(num):
        lap = time.perf_counter()
        step()
        laps.append(1e3 * (time.perf_counter() - lap))
    setting.wait()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "ms": round(1e3 * seconds / num, 2),
        "host_cpu_ms": round(1e3 * cpu / num, 2),
        "median_call_ms": round(median(laps), 2),
        "slowest_call_ms": round(max(laps), 2),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)
        if setting.device.type == "cuda"
        else None,
        "steps": num,
    }


def time_training(run: Training, num: int | None = None) -> dict[str, Any]:
    """`time_steps` of whole steps, with samples a second."""
    figures = time_steps(run.setting, run.step, num)
    rate = round(1e3 * sum(run.batch) / figures["ms"], 1)
    return {**figures, "samples_per_second": rate, "loader_workers": run.loader_workers}


def count_flops(step: Callable[[], Any]) -> float:
    """TFLOP of the matrix products and attention of one call."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / 1e12


def find_waits(setting: Setting, step: Callable[[], Any]) -> dict[str, int]:
    """Lines of the project at which the host waits for the GPU in one call, with their number."""
    if setting.device.type != "cuda":
        step()
        return {}
    waits: Counter[str] = Counter()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            waits[project_line()] += 1

    mode, show = torch.cuda.get_sync_debug_mode(), warnings.showwarning
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
        warnings.showwarning = show
    return dict(waits.most_common())


# kinds of kernels, by parts of their names, the first that fits
KERNELS = {
    "attention": ("flash", "fmha", "attention"),
    "matmul": ("gemm", "nvjet", "cutlass", "xmma", "splitk", "gemv", "addmm", "::mm", "::bmm"),
    "optimizer": ("multi_tensor_apply", "adam"),
    "copies": ("memcpy", "memset"),
    "triton": ("triton",),
    "norms": ("layer_norm", "gammabeta", "rms_norm"),
    "softmax": ("softmax", "nll_loss"),
    "indexing": ("index", "embedding", "gather", "scatter", "catarray"),
    "reductions": ("reduce", "cub::"),
}
SYNC_CALLS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def kind_of(kernel: str) -> str:
    """The kind of kernel of this name; "elementwise" what no other is."""
    name = kernel.lower()
    return next((k for k, parts in KERNELS.items() if any(part in name for part in parts)), "elementwise")


def profile_steps(setting: Setting, step: Callable[[], Any], num: int = 3, rows: int = 25) -> dict[str, Any]:
    """Kernels of a step, their time by kind and name, the time in which none runs, the host's own time."""
    on_gpu = setting.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    step()
    setting.wait()
    with profile(activities=activities, acc_events=True) as profiler:
        start = time.perf_counter()
        for _ in range(num):
            step()
        issued = time.perf_counter() - start
        setting.wait()
        seconds = time.perf_counter() - start
    where = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = list(profiler.events())
    kernels = [e for e in events if e.device_type == where and not e.is_user_annotation]
    by_name: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for kernel in kernels:
        row = by_name[kernel.name[:100]]
        row[0] += 1 / num
        row[1] += kernel.time_range.elapsed_us() / 1e3 / num
    by_kind: Counter[str] = Counter()
    for name, (_, ms) in by_name.items():
        by_kind[kind_of(name)] += ms
    busy = _covered(kernels) / 1e3 / num
    waited = sum(e.time_range.elapsed_us() for e in events if e.name in SYNC_CALLS) / 1e3
    top = sorted(by_name.items(), key=lambda item: -item[1][1])[:rows]
    return {
        "kernels": round(len(kernels) / num),
        "ms": round(1e3 * seconds / num, 2),
        "busy_ms": round(busy, 2),
        "idle_share": round(1 - busy * num / (1e3 * seconds), 3),
        # under the profiler, which takes time for each operator
        "host_ms": round((1e3 * issued - waited) / num, 2),
        "kinds_ms": {kind: round(ms, 2) for kind, ms in by_kind.most_common()},
        "top": [[name, round(count, 1), round(ms, 3)] for name, (count, ms) in top],
    }


def _covered(kernels: list[Any]) -> float:
    """Microseconds in which at least one of the kernels runs."""
    covered, end = 0.0, float("-inf")
    for span in sorted((kernel.time_range for kernel in kernels), key=lambda span: span.start):
        covered += max(0.0, span.end - max(span.start, end))
        end = max(end, span.end)
    return covered


def matmul_tflops(setting: Setting, size: int = 8192) -> float:
    """TFLOP/s of large bf16 matrix products."""
    size = 256 if setting.is_rehearsal else size
    a, b = (torch.randn(size, size, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    ms = min(time_steps(setting, lambda: a @ b, num=10, warm=2)["ms"] for _ in range(5))
    return 2 * size**3 / max(ms, 1e-3) / 1e9


def copy_tb_per_second(setting: Setting) -> float:
    """TB/s read and written by a copy within the device's memory."""
    size = 2**20 if setting.is_rehearsal else 2**31
    source = torch.empty(size, device=setting.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    ms = time_steps(setting, lambda: target.copy_(source), num=10, warm=2)["ms"]
    return 2 * size / max(ms, 1e-3) / 1e9

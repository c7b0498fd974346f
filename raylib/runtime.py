"""Runtimes of the training loop: `LocalRuntime` (this process, or one of torchrun's) and `RayRuntime` (a Ray
Train worker); the device of a worker: which one it is, what it can, its memory.

Both runtimes tell the loop who it is, and report its checkpoints. No other module that a loop sees knows
about Ray.
"""

import ctypes
import gc
import os
import re
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from raylib.distributed import join_workers
from raylib.errors import UserError
from raylib.notice import notices_to
from raylib.settings import Sharding


class Reporter(Protocol):
    """Receiver of a training's checkpoints: the search that it is a trial of."""

    def __call__(self, metrics: dict[str, Any], checkpoint: Path) -> None:
        """Report a checkpoint of a training in this process."""

    def train_callback(self) -> Any:
        """Return a callback for `ray.train.RunConfig`, which reports from Ray Train's controller."""

    def after(self, epochs: int, num_epochs: int | None = None) -> "Reporter":
        """Return the reporter of the training that follows `epochs` more epochs of the same trial and has
        `num_epochs` itself; None: as many as the trial's config says."""


class LocalRuntime:
    """One process on one device; or, under torchrun, one of several that talk through gloo or NCCL.
    `reporter(metrics, checkpoint)` is told of each checkpoint. keep: newest checkpoints that stay.

    cpus: that this worker may use, for itself and for its loader processes.
    """

    sharding: Sharding = "none"  # unless `fit.sharding` says otherwise

    def __init__(self, run: Path, keep: int, reporter: Reporter | None = None):
        self.run, self.keep, self.reporter = run, keep, reporter
        # a search is told of a checkpoint, and may end the trial, in the thread that trains
        self.waits_for_saves = reporter is not None
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = local_device()
        if self.world_size > 1 and not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            join_workers(backend)
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        given = _ray_cpus() if reporter else None  # a trial's process
        self.cpus = given or available_cpus() / neighbours

    def publish(self, metrics: dict[str, float]) -> None:
        """Show `metrics` nowhere: no cluster's dashboard watches this process."""

    def report(self, metrics: dict[str, Any], checkpoint: Path) -> None:
        """Report a checkpoint that is registered, and what it came to, to the search that this is a trial of.
        All workers call it."""
        if self.reporter and self.rank == 0:
            self.reporter(metrics, checkpoint)

    def notices_to(self, receive: Callable[[int], None]) -> AbstractContextManager[None]:
        """Hand this process's signals to `receive` within the block."""
        return notices_to(receive)


class RayRuntime:
    """A Ray Train worker. Ray owns the process group. keep, cpus: as of `LocalRuntime`. board: brings notices
    from the driver (`raylib.notice.NoticeBoard`)."""

    sharding: Sharding = "zero2"
    waits_for_saves = (
        False  # Ray takes reports in any thread; after two it blocks until its next look at them
    )

    def __init__(self, run: Path, keep: int, board: Any):
        from ray import train
        from ray.train.torch import get_device

        context = train.get_context()
        self.run, self.keep, self.board = run, keep, board
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = get_device()
        self.cpus = _ray_cpus() or available_cpus() / context.get_local_world_size()
        # Ray starts a thread for each CPU of a worker: all of them but one are for loader processes
        if os.environ.get("OMP_NUM_THREADS") == f"{int(self.cpus)}":
            torch.set_num_threads(1)
        self.gauges: dict[str, Any] = {}

    def report(self, metrics: dict[str, Any], checkpoint: Path) -> None:
        """As `LocalRuntime.report`, to Ray Train, whose callback reports to a search. The checkpoint itself
        is no affair of Ray's: a run goes on from it without Ray too."""
        from ray import train

        train.report(metrics)

    @contextmanager
    def notices_to(self, receive: Callable[[int], None]) -> Iterator[None]:
        """Hand what the driver posts to `receive`, on worker 0, within the block: `StopVote` brings it to the
        others."""
        import ray

        ray.get(self.board.enter.remote(ray.get_runtime_context().get_node_id(), self.rank == 0))
        if self.rank == 0:
            threading.Thread(target=self._listen, args=(receive,), name="notices", daemon=True).start()
        try:
            yield
        finally:
            with suppress(ray.exceptions.RayError):  # the driver has ended
                if self.rank == 0 and (notice := ray.get(self.board.leave.remote())):
                    receive(notice)

    def _listen(self, receive: Callable[[int], None]) -> None:
        import ray

        known = 0
        with suppress(ray.exceptions.RayError):  # the driver has ended, and this worker will
            while known := ray.get(self.board.wait.remote(known)):
                receive(known)

    def publish(self, metrics: dict[str, float]) -> None:
        """Show `metrics` as Ray's gauges, such as "polyglance_loss_itm", in its Prometheus endpoints, with
        the run's name."""
        from ray.util.metrics import Gauge

        for name, value in metrics.items():
            metric = f"polyglance_{re.sub('[^a-zA-Z0-9]+', '_', name)}"
            if metric not in self.gauges:
                self.gauges[metric] = Gauge(metric, f"{name} of a training", tag_keys=("run",))
            self.gauges[metric].set(value, {"run": self.run.name})


def _ray_cpus() -> float | None:
    """Return how many CPUs Ray has given this process; None: it has not said, or this is no worker of its."""
    import ray

    context = ray.get_runtime_context() if ray.is_initialized() else None
    if context is None or not context.get_actor_id():
        return None
    return context.get_assigned_resources().get("CPU")


Runtime = LocalRuntime | RayRuntime

# Dense bf16 products a second, in TFLOP, by a part of the device's name, the longer ones first: NVIDIA's and
# AMD's data sheets
BF16_TFLOPS = {
    "B200": 2250,
    "H100 PCIe": 756,
    "H100": 989,
    "H200": 989,
    "GH200": 989,
    "A100": 312,
    "A800": 312,
    "A40": 150,
    "A30": 165,
    "A10": 125,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "MI300X": 1307,
    "MI250X": 383,
}


def peak_flops(device: torch.device) -> float | None:
    """Return the bf16 operations a second that a GPU's data sheet promises for dense matrix products; None:
    it is no GPU, or none that is known here."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * tflops for part, tflops in BF16_TFLOPS.items() if part in name), None)


def local_device() -> torch.device:
    """Return this process's GPU, made the current one, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", 0))  # torchrun sets it
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def has_bf16(device: torch.device) -> bool:
    """Return whether the hardware multiplies bf16 faster than float32. Of NVIDIA's GPUs: from compute
    capability 8.0 on (A100), older ones emulate it; all of AMD's. Of CPUs: with AMX, and AMD's with AVX-512
    BF16; Intel's without AMX run these instructions at half the rate of float32 (`docs/performance.md`)."""
    if device.type == "cuda":
        return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)
    by_amd = cpu_info("vendor_id") == "AuthenticAMD"
    return torch.cpu._is_amx_tile_supported() or (torch.cpu._is_avx512_bf16_supported() and by_amd)


def describe_precision(device: torch.device, bf16: bool, residual: str | None, tf32: bool) -> str:
    """Return the line of a run's log about the formats of its numbers on a GPU: whether steps are in `bf16`,
    the dtype of their residual stream (None: bfloat16), whether float32 is multiplied in `tf32`."""
    matmuls = f"TF32 {'on' if tf32 else 'off'}"
    if not bf16:
        units = "" if has_bf16(device) else f" ({device_name(device)} multiplies no bf16)"
        return f"precision: float32{units}, {matmuls}"
    line = f"precision: bf16 autocast, residual stream {residual or 'bfloat16'}, {matmuls}"
    if has_bf16(device):
        return line
    return f"{line}; warning: {device_name(device)} emulates bf16, slower than float32; leave out fit.bf16"


def set_deterministic(enabled: bool) -> None:
    """Let PyTorch take kernels that add in one order, or its faster ones. The setting is the process's; it
    must be there before a GPU multiplies anything."""
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once
    if (
        enabled != torch.are_deterministic_algorithms_enabled()
    ):  # to tell it imports PyTorch's compiler: 1.3 s
        torch.use_deterministic_algorithms(enabled)
    # filling new tensors would help to find reads of memory that nothing has written; it costs their traffic
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a GPU, those that PyTorch keeps for itself included; 0 of a CPU,
    which shares its memory with the system's cache of files."""
    if device.type != "cuda":
        return 0
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def release_memory() -> None:
    """Free what nothing refers to any more, and have glibc return its free pages: a heap of many sizes else
    grows from one training to the next in a process that trains one after the other."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library has no such function
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_memory(device: torch.device) -> float:
    """Return the peak memory of this worker: GPU memory, else resident memory, in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class MemoryAdvice(NamedTuple):
    """Settings that a stage has to do with less memory: for a step over a worker's batch, and for its
    evaluation."""

    step: Callable[[dict], str] = lambda batch: "give it more workers, or a smaller batch"
    evaluation: str = "run it on a device that nothing else uses"


@contextmanager
def advise_on_memory(what: str, device: torch.device, advise: Callable[[], str]) -> Iterator[None]:
    """Say what to do where something in the block does not fit the memory of `device`; `advise` names
    settings that whatever runs there has.

    Raises:
        UserError: `what` does not fit.
    """
    try:
        yield
    except RuntimeError as e:
        if not isinstance(e, torch.OutOfMemoryError) and "can't allocate memory" not in str(e):
            raise
        raise UserError(f"{what} does not fit the memory of {device}; {advise()}") from e


def device_name(device: torch.device) -> str:
    """Return "NVIDIA H100 80GB HBM3", or the model of the CPU as Linux calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_info("model name") or "CPU"


def cpu_info(field: str) -> str:
    """Return a field of the first CPU in Linux's /proc/cpuinfo, such as "vendor_id"; "" elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def available_cpus() -> int:
    """Return how many CPUs this process may use: by its affinity, and by the quota of its control group,
    which is what bounds a container."""
    cpus = float(len(os.sched_getaffinity(0)))
    root, own = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
    # of version 2, whose line begins with "0::"; a group is bounded by those that it is in too
    lines = own.read_text().splitlines() if own.is_file() else []
    path = next((root / line[4:] for line in lines if line.startswith("0::/")), root)
    for folder in (path, *path.parents):
        quota = folder / "cpu.max"
        if folder.is_relative_to(root) and quota.is_file():
            limit, period = quota.read_text().split()
            cpus = cpus if limit == "max" else min(cpus, int(limit) / int(period))
    return max(1, int(cpus))

"""The device of a worker: which one it is, what it can, its memory."""

import os
import resource
from pathlib import Path

import torch

from raylib.errors import UserError


def local_device() -> torch.device:
    """Return this process's GPU, made the current one, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", 0))  # torchrun sets it
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def has_bf16(device: torch.device) -> bool:
    """Return whether the hardware multiplies bf16 faster than float32. Of CPUs: with AMX, and AMD's with
    AVX-512 BF16; Intel's without AMX run these instructions at half the rate of float32
    (`benchmarks/README.md`)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    by_amd = cpu_info("vendor_id") == "AuthenticAMD"
    return torch.cpu._is_amx_tile_supported() or (torch.cpu._is_avx512_bf16_supported() and by_amd)


def peak_memory(device: torch.device) -> float:
    """Return the peak memory of this worker: GPU memory, else resident memory, in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def out_of_memory_error(
    error: RuntimeError, step: int, batch: dict, device: torch.device, num_workers: int
) -> UserError:
    """Return what to do where `step` ran out of memory. Any other `error` is raised again.

    Splitting the batch is no way out: it would change the contrastive negatives.
    """
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
        raise error
    sizes = ", ".join(
        f"{name} {len(part['index'])}" for name, part in batch.items() if isinstance(part, dict)
    )
    return UserError(
        f"step {step}: a worker's part of the batch ({sizes}) does not fit the memory of {device}; give "
        f"it more than workers={num_workers}, or lower data.*.batch, or take a smaller model"
    )


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

"""Batches from loader processes, in order.

A batch is dicts and named tuples of tensors, three dozen of them. torch hands each over as a file of shared
memory of its own (9 ms a batch in the training process, as long as building it took); here it travels as one
tensor (2 ms).
"""

import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from raylib.errors import UserError

SHARED_MEMORY = "/dev/shm"
PREFETCH = 4  # batches that each loader process works ahead
ALIGN = 64


def load_batches(batches: Dataset, first: int, last: int, workers: int, pin: bool = False) -> Iterator[Any]:
    """`batches[first]` ... `batches[last - 1]`, read ahead by `workers` processes (0: in this one).

    Batches travel through shared memory; `batches.batch_bytes`, if there is one, says how large one is.

    Raises:
        UserError: no shared memory, or too little; and, as one line, what a loader process raised as a
            UserError.
    """
    if workers:
        _check_shared_memory(workers * PREFETCH * getattr(batches, "batch_bytes", 0))
    options = {"num_workers": workers, "pin_memory": pin, "prefetch_factor": PREFETCH if workers else None}
    packed = DataLoader(_Packing(batches), batch_size=None, sampler=range(first, last), **options)
    for plan, data in _one_ahead(packed) if workers else packed:
        if isinstance(plan, UserError):
            raise plan
        yield unpack(plan, data)


def _one_ahead(items: Iterable) -> Iterator:
    """`items`, the next one fetched by a thread while the last is used: to hand over a file of shared memory,
    torch shakes hands with the process that made it, which takes some milliseconds where all cores are
    busy."""
    source, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, source, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, source, end)
            yield item


class _Packing(Dataset):
    """Batches as one tensor each; a user's error as a value, since torch would wrap it in the worker's
    traceback."""

    def __init__(self, batches: Dataset):
        self.batches = batches

    def __getitem__(self, step: int) -> tuple["_Plan | UserError", Tensor]:
        try:
            return pack(self.batches[step])
        except UserError as error:
            return error, torch.empty(0)


class _Slot(NamedTuple):
    """Where a tensor lies in the packed bytes."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class _Plan:
    """The batch with slots for its tensors; a class of its own, so that torch's pinning passes it by."""

    def __init__(self, tree: Any):
        self.tree = tree


def pack(tree: Any) -> tuple[_Plan, Tensor]:
    """A tree of dicts and tuples with CPU tensors as leaves -> (plan, one uint8 tensor)."""
    slots, tensors, end = [], [], 0

    def place(tensor: Tensor) -> _Slot:
        nonlocal end
        slot = _Slot(end, tensor.dtype, tuple(tensor.shape))
        end += -(-slot.bytes // ALIGN) * ALIGN
        slots.append(slot)
        tensors.append(tensor)
        return slot

    plan = _Plan(_map(tree, Tensor, place))
    data = torch.empty(end, dtype=torch.uint8)
    for slot, tensor in zip(slots, tensors, strict=True):
        _at(slot, data).copy_(tensor)
    return plan, data


def unpack(plan: _Plan, data: Tensor) -> Any:
    """The tree again, its tensors views of `data`."""
    return _map(plan.tree, _Slot, lambda slot: _at(slot, data))


def _at(slot: _Slot, data: Tensor) -> Tensor:
    return data[slot.start : slot.start + slot.bytes].view(slot.dtype).view(slot.shape)


def _map(tree: Any, leaf: type, change) -> Any:
    if isinstance(tree, leaf):
        return change(tree)
    if isinstance(tree, dict):
        return {name: _map(value, leaf, change) for name, value in tree.items()}
    if isinstance(tree, tuple):
        values = [_map(value, leaf, change) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
    return tree


def _check_shared_memory(wanted: int) -> None:
    try:
        space = os.statvfs(SHARED_MEMORY)
    except OSError:
        raise UserError(
            f"no shared memory at {SHARED_MEMORY} for loader processes; set fit.loader_workers=0"
        ) from None
    free = space.f_bavail * space.f_frsize
    if free < wanted:
        raise UserError(
            f"{SHARED_MEMORY} has {free >> 20} MB free, loader processes need {wanted >> 20}; set "
            "fit.loader_workers=0 or give the container more (docker run --shm-size)"
        )

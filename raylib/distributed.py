"""Communication between workers inside a step. With one process every function is the identity.

Convention: each worker's loss is its own share times the number of workers, so that the engines' averaging of
gradients (DDP, ZeRO) gives the gradient of the loss over the global batch.
"""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from raylib.errors import NotFinite, UserError
from raylib.packed import Ragged

T = TypeVar("T")


def world_size() -> int:
    """Workers in the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This worker's number in the default process group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait for all workers."""
    if world_size() > 1:
        dist.barrier()


def gather_objects(local: T) -> list[T]:
    """Return the objects of all workers, in rank order."""
    if world_size() == 1:
        return [local]
    objects: list[Any] = [None] * world_size()
    dist.all_gather_object(objects, local)
    return objects


def raise_on_all_workers(error: str | None, kind: type[UserError] = NotFinite) -> None:
    """Raise on every worker, as a `kind`, the `error` that one of them has found, so that none waits for
    another in vain. All workers call it; without an error on any, nothing happens."""
    if found := next(filter(None, gather_objects(error)), None):
        raise kind(found)


def broadcast_from_rank0(value: T) -> T:
    """Return, on every worker, the value that worker 0 has. All workers call it."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, 0)
    return values[0]


def all_reduce(x: Tensor) -> Tensor:
    """Return the sum of `x` over all workers, without gradient."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_gather(x: Tensor) -> Tensor:
    """Gather (b, ...) of each worker as (W b, ...) in rank order, with gradient: each worker gets back the
    sum of what all workers' losses owe to its rows."""
    return _Gather.apply(x) if world_size() > 1 else x


def gather_ragged(x: Ragged, width: int) -> Ragged:
    """Gather all workers' rows in rank order, with gradient. No row is longer than `width` tokens on any
    worker."""
    if world_size() == 1:
        return x
    columns = torch.arange(width)
    valid = columns < x.lengths[:, None]
    index = (x.starts[:, None] + torch.where(valid, columns, 0)).to(x.values.device)
    lengths = all_gather(x.lengths.to(x.values.device)).cpu()
    # rows travel padded, since all workers must send alike. `embedding`, because the gradient of plain
    # indexing adds up in no fixed order on threads
    padded = all_gather(F.embedding(index, x.values))
    token_cells = (columns < lengths[:, None]).flatten().nonzero().squeeze(1)
    return Ragged(padded.flatten(0, 1).index_select(0, token_cells.to(padded.device)), lengths)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        out = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(out, x.contiguous())
        return torch.cat(out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # every worker's loss has used every worker's rows: what they owe to these rows lies on all of them.
        # gloo has no reduce_scatter; the gathered states are small beside the gradients
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def clamp_parameter(x: Tensor, low: float, high: float) -> Tensor:
    """Clamp a parameter to [low, high]. Outside, the gradient passes only if a step along it leads back in:
    clamping the parameter itself would be undone by ZeRO's own copy of it. Where a step leads depends on all
    workers' gradients, and on those of all terms: call it once a step."""
    return _Clamp.apply(x, low, high)


class _Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.low, ctx.high = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx, grad: Tensor):
        # this worker's share alone might point inwards while the step, which follows the sum, goes outwards
        (x,), total = ctx.saved_tensors, all_reduce(grad)
        # a step goes against the gradient
        outward = ((x <= ctx.low) & (total > 0)) | ((x >= ctx.high) & (total < 0))
        return grad.masked_fill(outward, 0.0), None, None

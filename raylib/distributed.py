"""Communication between workers inside a step. With one process every function is the identity.

A global batch lies on the workers as `worker_rows` deals it: one run of rows each, in rank order, as equal as
can be. So rows that are gathered are in the order of the batch, and every worker knows how many each has.

Convention: each worker's loss is its own share times the number of workers, so that the engines' averaging of
gradients (DDP, ZeRO) gives the gradient of the loss over the global batch.
"""

import ipaddress
import itertools
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from raylib.errors import MachineError, NotFinite, UserError
from raylib.packed import Ragged, concatenate, upload

# torch 2.13 has other names for these two, which 2.11 lacks
warnings.filterwarnings(
    "ignore", ".*(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated", category=FutureWarning
)

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)  # for a worker to take part in an exchange
LOOPBACK = "127.0.0.1"
_stores: dict[int, dist.TCPStore] = {}  # by port: those that this process serves, until their group is formed


def join_workers(backend: str) -> None:
    """Form the default process group of the workers that torchrun's variables of the environment describe:
    RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, LOCAL_WORLD_SIZE. All workers call it.

    Where this machine has them all, what listens for the others does so on its loopback interface alone.

    Raises:
        MachineError: worker 0 cannot have the port.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = None
    if _is_one_machine():
        keep_to_loopback()
        # torchrun's own process may serve the store
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            port = int(os.environ["MASTER_PORT"])
            store = serve_store(port) if rank == 0 else dist.TCPStore(LOOPBACK, port, timeout=TIMEOUT)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    _stores.clear()  # the group has it, and ends it: another one must not find its keys


def keep_to_loopback() -> None:
    """Let gloo and NCCL listen on this machine's loopback interface, unless the environment names another:
    by themselves they take the address of the host's name, and the first card of the network."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "=lo")  # without "=" it may be another whose name begins so


def serve_store(port: int = 0) -> dist.TCPStore:
    """Return the store of this process in which workers of this machine find each other, at `port`, or at a
    free one. PyTorch itself would listen on every address.

    Raises:
        MachineError: the port is taken.
    """
    if port not in _stores:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((LOOPBACK, port))
        except OSError as e:
            listener.close()
            raise MachineError(f"port {port}: {e.strerror}; choose another: MASTER_PORT=N") from None
        listener.listen(socket.SOMAXCONN)
        port = listener.getsockname()[1]
        _stores[port] = dist.TCPStore(
            LOOPBACK,
            port,
            is_master=True,
            timeout=TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
    return _stores[port]


def _is_one_machine() -> bool:
    """Return whether all workers are on this machine: torchrun counts them so, or they meet at an address
    that no other machine reaches."""
    address = os.environ["MASTER_ADDR"]
    try:
        meets_here = ipaddress.ip_address(address).is_loopback
    except ValueError:  # a name
        meets_here = address == "localhost"
    return meets_here or os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]


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


def gather_objects(local: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the objects of all workers, in rank order. `group`: of all workers, in place of the default."""
    if world_size() == 1:
        return [local]
    objects: list[Any] = [None] * world_size()
    dist.all_gather_object(objects, local, group)
    return objects


def raise_on_all_workers(error: str | None, kind: type[UserError] = NotFinite) -> None:
    """Raise on every worker, as a `kind`, the `error` that one of them has found, so that none waits for
    another in vain. All workers call it; without an error on any, nothing happens."""
    if found := next(filter(None, gather_objects(error)), None):
        raise kind(found)


@contextmanager
def errors_on_all_workers() -> Iterator[None]:
    """Raise a `UserError` that the block raises on one worker on every one of them. All workers enter it."""
    error = None
    try:
        yield
    except UserError as e:
        error = str(e)
    raise_on_all_workers(error, UserError)


_exchanged = 0.0  # seconds of this process


@contextmanager
def _exchange() -> Iterator[None]:
    """Count the time of the block as an exchange with other workers."""
    global _exchanged
    began = time.perf_counter()
    try:
        yield
    finally:
        _exchanged += time.perf_counter() - began


def exchange_seconds() -> float:
    """Return how long this process has been in exchanges with other workers so far, where it also waits for
    the slowest of them. On a GPU the host does not wait: it is the time to begin them."""
    return _exchanged


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
        with _exchange():
            dist.all_reduce(x)
    return x


def worker_rows(size: int, rank: int, world: int) -> range:
    """Return the rows of a global batch of `size` that a worker has: as many as every other, or one more."""
    return range(rank * size // world, (rank + 1) * size // world)


def count_rows(size: int, every: int = 1) -> list[int]:
    """Return how many rows of a global batch of `size` each worker has, of those whose index is a multiple of
    `every`."""
    world = world_size()
    ends = [-(-(worker * size // world) // every) for worker in range(world + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]


def all_gather(x: Tensor, counts: list[int] | None = None) -> Tensor:
    """Gather (b, ...) of each worker as (B, ...) in rank order, with gradient: each worker gets back the sum
    of what all workers' losses owe to its rows.

    counts: rows of each worker (`count_rows`); None: they are asked, for which the host waits.
    """
    if world_size() == 1:
        return x
    if counts is None:
        num_rows = torch.tensor([len(x)], device=x.device)
        counts = _gather_rows(num_rows, [1] * world_size()).tolist()
    return _Gather.apply(x, counts)


class RowExchange(NamedTuple):
    """Rows on their way from the workers that have them to those that need them, each once; all on the CPU.

    sent: (S,) this worker's rows that others need, for one worker after the other; send_to: (S,) that worker.
    received: (R,) the rows that come, by their positions among all workers' rows in rank order;
    receive_from: (R,) whose they are. rows: (n,) each needed row among this worker's own ones, in their
    order, and then those that come.
    """

    sent: Tensor
    send_to: Tensor
    received: Tensor
    receive_from: Tensor
    rows: Tensor


def plan_exchange(needed: Tensor, rank: int, counts: list[int]) -> RowExchange:
    """Plan which rows travel.

    Args:
        needed: (B,) the row that each row of each worker needs, by positions among all workers' rows in rank
            order; on the CPU.
        rank: of this worker.
        counts: rows of each worker.
    """
    total, num_rows = len(needed), counts[rank]
    workers = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))  # whose each row is
    # each worker's needs once, in the order of workers and positions, in which owners follow each other too:
    # sender and receiver agree on the order of rows without a word
    needs = (workers * total + needed).unique()
    reader, position = needs // total, needs % total
    owner = workers[position]
    sends, comes = (owner == rank) & (reader != rank), (owner != rank) & (reader == rank)
    first = sum(counts[:rank])
    local = slice(first, first + num_rows)
    place = torch.full((total,), -1)
    place[local] = torch.arange(num_rows)
    place[position[comes]] = num_rows + torch.arange(int(comes.sum()))
    return RowExchange(
        position[sends] - first, reader[sends], position[comes], owner[comes], place[needed[local]]
    )


def exchange_rows(x: Ragged, lengths: Tensor, plan: RowExchange) -> Ragged:
    """This worker's rows, and those that come from others, with gradient: each worker gets back what others'
    losses owe to its rows.

    Args:
        lengths: (B,) of all workers' rows, on the CPU.
    """
    world = world_size()
    if world == 1:
        return x
    tokens = upload(x.token_index(plan.sent), x.values.device)
    received = lengths[plan.received]

    def count_tokens(worker: Tensor, lengths: Tensor) -> list[int]:
        return torch.zeros(world, dtype=torch.int64).index_add(0, worker, lengths).tolist()

    counts = count_tokens(plan.send_to, x.lengths[plan.sent]), count_tokens(plan.receive_from, received)
    # `embedding`, because its gradient adds up in one order, that of plain indexing in none
    values = _AllToAll.apply(F.embedding(tokens, x.values), *counts)
    return concatenate([x, Ragged(values, received)])


def ring(x: Tensor, counts: list[int]) -> Iterator[tuple[int, Tensor]]:
    """Go through the workers, this one first and the one before it last: (its number, its `x`), of as many
    rows as `counts` says. The next worker's is on its way while the caller works on one; no more are held."""
    world, x = world_size(), pad_rows(x, max(counts))
    for turn in range(world):
        waits, following = _start_passing(x, tag=0) if turn + 1 < world else ([], x)
        worker = (rank() + turn) % world
        yield worker, x[: counts[worker]]
        for wait in waits:
            with _exchange():
                wait.wait()
        x = following


def pass_on(x: Tensor) -> Tensor:
    """Give `x` to the worker before this one, and return that of the one after it, of equal shape."""
    waits, received = _start_passing(x, tag=1)
    for wait in waits:
        wait.wait()
    return received


def _start_passing(x: Tensor, tag: int) -> tuple[list[dist.Work], Tensor]:
    received, x = torch.empty_like(x, memory_format=torch.contiguous_format), x.contiguous()
    before, after = (rank() - 1) % world_size(), (rank() + 1) % world_size()
    operations = [
        dist.P2POp(dist.isend, x, before, tag=tag),
        dist.P2POp(dist.irecv, received, after, tag=tag),
    ]
    return dist.batch_isend_irecv(operations), received


def pad_rows(x: Tensor, count: int) -> Tensor:
    """Return `x` (b, ...) with rows of zeros after its own, `count` in all."""
    return x if len(x) == count else torch.cat([x, x.new_zeros(count - len(x), *x.shape[1:])])


def _gather_rows(x: Tensor, counts: list[int]) -> Tensor:
    # collectives want equal shapes: where some worker has a row more, the others send one of zeros
    most = max(counts)
    out = x.new_empty(len(counts) * most, *x.shape[1:])
    with _exchange():
        dist.all_gather_into_tensor(out, pad_rows(x, most).contiguous())
    if min(counts) == most:
        return out
    return torch.cat([rows[:count] for rows, count in zip(out.split(most), counts, strict=True)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        return _gather_rows(x, counts)

    @staticmethod
    def backward(ctx, grad: Tensor):
        # every worker's loss has used every worker's rows: what they owe to these rows lies on all of them
        counts, most = ctx.counts, max(ctx.counts)
        if min(counts) < most:
            grad = torch.cat([pad_rows(rows, most) for rows in grad.split(counts)])
        out = grad.new_empty(most, *grad.shape[1:])
        dist.reduce_scatter_tensor(out, grad.contiguous())
        return out[: counts[rank()]], None


class _AllToAll(torch.autograd.Function):
    """(S, d), of whose rows each worker gets as many as `send_counts` says -> (R, d), of which as many as
    `receive_counts` says come from each."""

    @staticmethod
    def forward(ctx, x: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
        ctx.counts = send_counts, receive_counts
        out = x.new_empty(sum(receive_counts), *x.shape[1:])
        with _exchange():
            dist.all_to_all_single(out, x.contiguous(), receive_counts, send_counts)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        send_counts, receive_counts = ctx.counts
        return _AllToAll.apply(grad, receive_counts, send_counts), None, None


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

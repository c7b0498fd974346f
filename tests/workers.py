"""Run a function on several gloo workers, and compare what they return with one worker."""

import multiprocessing
import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Workers fork from one server that has imported what they need: they start in milliseconds, and still
# inherit nothing of the test's own process.
PRELOAD = [
    "pytest",
    "transformers",
    "torch._dynamo",  # any optimizer imports it
    "torch.onnx",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # ZeRO imports it, and the compiler behind it
    "finetune.__main__",
    "pretrain.__main__",
    "tests.factories",
]


def run_workers(work, world, *arguments):
    """`work(rank, world, *arguments)` in `world` processes; their results in rank order."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        start = (world, folder, work, arguments)
        mp.start_processes(_start, start, nprocs=world, start_method="forkserver")
        return [torch.load(f"{folder}/{rank}.pt") for rank in range(world)]


def _start(rank, world, folder, work, arguments):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.save(work(rank, world, *arguments), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def assert_workers_equal_one(results, alone):
    """Assert that (terms, gradients) of each worker, the gradients' mean, are those of one process."""
    values, gradients = alone
    for name, value in values.items():
        for terms, _ in results:
            torch.testing.assert_close(terms[name], value, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        if gradient is not None:
            mean = sum(grads[name] for _, grads in results) / len(results)  # what DDP and ZeRO do
            torch.testing.assert_close(mean, gradient, rtol=1e-4, atol=1e-6, msg=name)

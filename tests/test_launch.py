"""What a run asks of a cluster."""

import pytest

from raylib.launch import gpu_share, worker_resources

HEAD, CPU4 = {"CPU": 0.0}, {"CPU": 4.0}
BOX, NODE = {"CPU": 96.0, "GPU": 8.0}, {"CPU": 64.0, "GPU": 4.0}


@pytest.mark.parametrize(
    ("nodes", "workers", "loaders", "is_trial", "cpus"),
    [
        ([{"CPU": 2.0}], 2, None, False, 1),  # `make run` on a laptop
        ([{"CPU": 2.0}], 1, None, False, 1),
        ([CPU4], 1, None, False, 2),
        ([CPU4], 1, 0, False, 1),
        ([CPU4], 1, 9, False, 3),  # as many as there are
        ([CPU4, CPU4], 3, 2, False, 1),  # a node holds one worker of three CPUs, and of two
        ([CPU4, CPU4], 2, 2, False, 3),
        ([CPU4], 1, 2, True, 1),
    ],
)
def test_worker_asks_for_cpus_of_its_loaders(nodes, workers, loaders, is_trial, cpus):
    assert worker_resources(nodes, workers, False, loaders, is_trial) == {"CPU": cpus}


@pytest.mark.parametrize(
    ("nodes", "workers", "loaders", "is_trial", "cpus"),
    [
        ([HEAD, BOX], 8, None, False, 11),  # a share of 96 / 8, of which something is left to others
        ([HEAD, BOX], 1, None, False, 11),
        ([HEAD, BOX], 8, 3, False, 4),
        ([HEAD, BOX], 8, 30, False, 11),
        ([HEAD, BOX], 1, 30, False, 31),
        ([HEAD, BOX], 1, 30, True, 11),  # trials run beside each other
        ([BOX, NODE], 12, None, False, 11),
        ([{"CPU": 2.0, "GPU": 1.0}], 1, None, False, 1),
        ([{"CPU": 2.0, "GPU": 2.0}], 2, None, False, None),  # drivers have the CPUs
        ([HEAD, {"CPU": 0.0, "GPU": 2.0}], 2, 4, False, None),
    ],
)
def test_worker_with_a_gpu_asks_for_its_share_of_cpus(nodes, workers, loaders, is_trial, cpus):
    wanted = {"GPU": 1} if cpus is None else {"CPU": cpus, "GPU": 1}
    assert worker_resources(nodes, workers, True, loaders, is_trial) == wanted


def test_share_of_a_gpu_is_that_of_the_poorest_node():
    assert gpu_share([HEAD, BOX, NODE]) == 11 and gpu_share([NODE]) == 15 and gpu_share([CPU4]) == 0

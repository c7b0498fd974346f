"""Addresses at which the processes of a real run listen, in the midst of it: this machine's own alone."""

import ipaddress
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from raylib import distributed
from raylib.config import dump_config
from raylib.distributed import join_workers, serve_store
from raylib.errors import MachineError
from raylib.monitoring import read_metrics
from tests.factories import free_port, listening

# variables that would decide for the product which interface is taken
NETWORK = ("RAY_ADDRESS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")


def is_loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    mapped = ip.ipv4_mapped if ip.version == 6 else None
    return (mapped or ip).is_loopback


def begin(command: list, log: Path, **env) -> subprocess.Popen:
    """Start `python -m COMMAND`."""
    plain = {name: value for name, value in os.environ.items() if name not in NETWORK}
    with open(log, "ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *map(str, command)],
            env={**plain, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in env.items()}},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def look_into_run(begin_all, config, log: Path, look=listening) -> list:
    """What `look` finds of each process that `begin_all` starts, some steps into a run without an end, which
    is stopped then: all that listens."""
    processes, limit = begin_all(), time.monotonic() + 200
    try:
        while len(read_metrics(Path(config.runs) / config.name)) < 3:
            alive = all(process.poll() is None for process in processes)
            assert alive and time.monotonic() < limit, log.read_text(errors="replace")[-2000:]
            time.sleep(0.05)
        found = [each for process in processes for each in look(process.pid)]
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        codes = [process.wait(120) for process in processes]
    assert all(codes), log.read_text(errors="replace")[-2000:]  # 143, and 1 of torchrun's
    return found


def assert_loopback(sockets: list[tuple[str, str]]) -> None:
    outside = [f"{address} {name}" for address, name in sockets if not is_loopback(address)]
    assert not outside, "\n".join(outside)


@pytest.fixture
def endless(mini, tmp_path):
    """`endless(*settings)` -> a config whose run lasts until it is stopped, and the file that it is in."""

    def build(*settings):
        config = mini("name=endless", "fit.steps=1000000", "fit.save_every=1000", *settings)
        file = tmp_path / "endless.json"
        file.write_text(dump_config(config), encoding="utf-8")
        return config, file

    return build


def test_listening_sees_sockets_of_children(tmp_path):
    program = "import socket, time; s = socket.create_server(('', 0)); print(flush=True); time.sleep(99)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        found = listening(os.getpid())
        child.kill()
    assert [each for each in found if each[0] == "0.0.0.0"]
    assert [is_loopback(each) for each in ("0.0.0.0", "::", "::ffff:127.0.0.1", "::1", "192.0.2.2")] == [
        False,
        False,
        True,
        True,
        False,
    ]


def test_workers_of_one_machine_listen_on_loopback(endless, tmp_path):
    """As torchrun starts them, but without its own process: they find each other at a port, then in pairs."""
    config, file = endless("runtime=local", "fit.loader_workers=1")
    log, port = tmp_path / "log", free_port()

    def begin_all():
        place = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": socket.gethostname()}
        return [
            begin(["pretrain", "--config", file], log, RANK=rank, LOCAL_RANK=rank, MASTER_PORT=port, **place)
            for rank in (0, 1)
        ]

    found = look_into_run(begin_all, config, log)
    assert len(found) >= 3  # the store, a gloo device each
    assert_loopback(found)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "zero2"])
def test_one_process_listens_on_loopback(endless, tmp_path, sharding):
    config, file = endless("runtime=local", "workers=1", f"fit.sharding={sharding}", "fit.loader_workers=1")
    log = tmp_path / "log"
    found = look_into_run(lambda: [begin(["pretrain", "--config", file], log)], config, log)
    assert (sharding == "none") == (not found)  # ZeRO wants a group, even of one
    assert_loopback(found)


@pytest.mark.slow
def test_torchrun_with_a_file_to_meet_at_listens_on_loopback(endless, tmp_path):
    """As docs/cluster.md says; torchrun's other ways to meet are a store of its own, on all addresses."""
    config, file = endless("runtime=local")
    log = tmp_path / "log"
    meet = ["--rdzv-backend=c10d", "--rdzv-conf=store_type=file", "--local-addr=127.0.0.1"]
    command = ["torch.distributed.run", *meet, "--nproc-per-node=2", "-m", "pretrain", "--config", file]
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": 1}
    found = look_into_run(lambda: [begin(command, log, **environment)], config, log)
    assert len(found) >= 3
    assert_loopback(found)


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.parametrize("start", ["a run's own", "cluster run"])
def test_ray_cluster_of_one_machine_listens_on_loopback(endless, tmp_path, start):
    config, file = endless("runtime=ray", "workers=2", "fit.loader_workers=1")
    log = tmp_path / "log"
    command = ["pretrain", "--config", file]
    if start == "cluster run":
        command = ["cluster", "run", "--dashboard-port", free_port(), "--", "python", "-m", *command]
    runs = {"POLYGLANCE_RUNS": config.runs}
    found = look_into_run(lambda: [begin(command, log, **runs)], config, log)
    names = {name for _, name in found}
    assert {"gcs_server", "raylet"} <= names and len(found) >= 15, found
    assert_loopback(found)


def worker_keys(pid: int) -> list[str | None]:
    """WANDB_API_KEY of each worker of Ray Train that descends from a process."""
    workers = [p for p in psutil.Process(pid).children(recursive=True) if "RayTrainWorker" in p.name()]
    return [worker.environ().get("WANDB_API_KEY") for worker in workers]


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_keys_of_trackers_reach_workers_and_no_file(endless, tmp_path):
    """Ray's logs of what is handed to it can be read by everybody on the machine."""
    config, file = endless("runtime=ray", "workers=2")
    log, key = tmp_path / "log", secrets.token_hex(20)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # a socket's path has 107 characters
        environment = {"RAY_TMPDIR": folder, "WANDB_API_KEY": key}
        command = ["pretrain", "--config", file]
        found = look_into_run(lambda: [begin(command, log, **environment)], config, log, worker_keys)
        files = [path for path in (*Path(folder).rglob("*"), *tmp_path.rglob("*")) if path.is_file()]
        assert [path for path in files if path.name == "runtime_env_agent.log"]
        assert not [path for path in files if key.encode() in path.read_bytes()]
    assert set(found) == {key}


def test_store_listens_on_loopback_and_serves_one_port_once():
    store = serve_store()
    assert [address for address, _ in listening(os.getpid(), store.port)] == ["127.0.0.1"]
    assert serve_store(store.port) is store
    dist.TCPStore("127.0.0.1", store.port).set("a", "b")
    assert store.get("a") == b"b"


STORE_TWICE = """
import os
import torch.distributed as dist
from raylib.distributed import join_workers, serve_store
from tests.factories import listening

port = serve_store().port
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
for _ in range(2):
    join_workers("gloo")
    assert listening(os.getpid(), port)
    dist.destroy_process_group()
    assert not listening(os.getpid(), port)
"""


def test_store_ends_with_its_group():
    """The next group at that port, of another training in this process, begins with none of its keys. In a
    process of its own: DeepSpeed may have left a group in this one."""
    subprocess.run([sys.executable, "-c", STORE_TWICE], check=True, timeout=120)


def test_store_at_a_port_that_is_taken_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(MachineError, match=f"port {port}: Address already in use; choose another"):
            serve_store(port)


@pytest.mark.parametrize(
    ("variables", "is_here"),
    [
        ({"MASTER_ADDR": "127.0.0.1"}, True),
        ({"MASTER_ADDR": "localhost"}, True),
        ({"MASTER_ADDR": "::1"}, True),
        ({"MASTER_ADDR": "node-7", "LOCAL_WORLD_SIZE": "4"}, True),
        ({"MASTER_ADDR": "node-7", "LOCAL_WORLD_SIZE": "2"}, False),
        ({"MASTER_ADDR": "192.0.2.2"}, False),
    ],
)
def test_workers_of_several_machines_meet_where_all_reach_it(variables, is_here, monkeypatch):
    """PyTorch then makes the store itself, of RANK, MASTER_ADDR and MASTER_PORT."""
    joined = []
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **options: joined.append(options["store"]))
    monkeypatch.setattr(distributed, "serve_store", lambda port: f"store at {port}")
    for name in ("LOCAL_WORLD_SIZE", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_PORT": "29500", **variables}.items():
        monkeypatch.setenv(name, value)
    join_workers("gloo")
    assert joined == ["store at 29500" if is_here else None]
    interfaces = [os.environ.get(f"{library}_SOCKET_IFNAME") for library in ("GLOO", "NCCL")]
    assert interfaces == (["lo", "=lo"] if is_here else [None, None])

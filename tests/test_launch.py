"""What a run asks of a cluster, what becomes of it where there is none, and which of its failures another
attempt may mend."""

import errno
import os
import signal
import socket
import threading
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError, RayError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from raylib import ray_cluster, ray_run
from raylib.command import entry_point
from raylib.config import dump_config
from raylib.errors import MachineError, UserError, hide_secrets
from raylib.launch import gpu_share, open_run, run_folder, warn_of_copy, worker_resources
from raylib.notice import Interrupted, signals_handled
from raylib.ray_cluster import connect_to_ray
from raylib.ray_run import _Attempt, _explain, train_on_ray

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


@pytest.mark.parametrize(
    ("address", "error", "words"),
    [
        ("http://127.0.0.1:8265", UserError, "not of the form HOST:PORT"),
        ("garbage", UserError, "not of the form HOST:PORT"),
        ("127.0.0.1:99999", UserError, "not of the form HOST:PORT"),
        (
            "127.0.0.1:{closed}",
            MachineError,
            r"nothing answers there \(Connection refused\); start that cluster",
        ),
        ("no-such-host.invalid:6379", MachineError, "nothing answers there"),
    ],
)
def test_connect_to_ray_where_no_cluster_is_is_one_line_at_once(address, error, words, monkeypatch):
    with socket.socket() as probe:  # bound, but not listening
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", address.format(closed=probe.getsockname()[1]))
        with pytest.raises(error, match=words):
            connect_to_ray()


@pytest.mark.parametrize("address", ["local", "auto"])
def test_connect_to_ray_tells_what_ray_says_in_one_line(address, monkeypatch):
    """Another version, another token: whatever `ray.init` raises."""
    import ray

    def refuse(**options):
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.0.0\n")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(
        MachineError, match="Version mismatch: The cluster was started with: Ray: 2.0.0"
    ) as caught:
        connect_to_ray()
    assert "\n" not in str(caught.value)


def test_connect_to_ray_with_another_token_says_so_in_one_line(monkeypatch, capfd):
    """Ray's exception is about the connection; why it is refused, it writes on stderr, again and again. Also
    what it says beside is not lost."""
    import ray

    def refuse(**options):
        os.write(2, b"gcs_client.cc: Unauthenticated: InvalidAuthToken: Authentication token is ...\n" * 20)
        raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(MachineError, match="^RAY_ADDRESS=auto: this cluster has a token, and this process"):
        connect_to_ray()
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(ray, "init", lambda **options: os.write(2, b"a warning\n"))
    assert connect_to_ray() and capfd.readouterr().err == "a warning\n"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("https://ada:s3cret@host:8080/a?b=c", "https://***@host:8080/a?b=c"),
        ("see http://:s3cret@host and s3://bucket/a@b", "see http://***@host and s3://bucket/a@b"),
        (
            "https://b.host/x.tar?X-Amz-Signature=0f3a&X-Amz-Date=1&access_token=t",
            "https://b.host/x.tar?***&X-Amz-Date=1&***",
        ),
        ("pipe:curl https://ada:s3cret@host/{name}", "pipe:curl https://***@host/{name}"),
        ("file:///a/b:c@d http://host:80/ 10:30 a@b.c", "file:///a/b:c@d http://host:80/ 10:30 a@b.c"),
    ],
)
def test_passwords_of_addresses_are_hidden(text, hidden):
    assert hide_secrets(text) == hidden


def test_error_line_shows_no_password(capsys):
    @entry_point()
    def main(arguments):
        raise UserError("https://ada:s3cret@host/shards: could not fetch manifest.json")

    assert main([]) == 2
    assert capsys.readouterr().err == "error: https://***@host/shards: could not fetch manifest.json\n"


def test_new_run_keeps_no_password_of_its_settings(mini):
    config = mini("data.image_text.folder=https://ada:s3cret@host/shards")
    with pytest.raises(UserError, match="^data.image_text.folder: an address with a password"):
        open_run(config)
    folder = run_folder(config)
    assert not (folder / "config.json").exists()
    # one of an earlier version goes on: its config.json has it already
    (folder / "config.json").write_text(dump_config(config))
    open_run(config)


def test_run_whose_folder_was_renamed_is_told_so(mini):
    config = mini("name=one")
    open_run(config)
    run_folder(config).rename(run_folder(config).with_name("two"))
    with pytest.raises(UserError, match="/two holds the run 'one', whose folder was renamed: "):
        open_run(config.model_copy(update={"name": "two"}))


@pytest.mark.parametrize("given", ["", " "])
def test_folder_of_runs_that_is_empty_is_told_what_to_give(given, mini):
    with pytest.raises(UserError, match="runs: give a folder; . is the one that you are in"):
        mini(f"runs={given}")


@pytest.mark.parametrize("before", [None, 0o644])
def test_token_of_rays_clusters_is_this_users_alone(before, tmp_path, monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    token = tmp_path / ".ray" / "auth_token"
    if before:
        token.parent.mkdir()
        token.write_text("kept")
        token.chmod(before)
    ray_cluster._make_private_token()
    assert token.stat().st_mode & 0o777 == 0o600
    text = token.read_text()
    assert text == "kept" if before else len(text) == 64
    ray_cluster._make_private_token()
    assert token.read_text() == text


@pytest.mark.parametrize("given", [None, "1"])
def test_local_cluster_is_private_while_it_starts(given, monkeypatch):
    """Its processes inherit the environment; others that start later must not."""
    from ray._private import ray_constants, services

    loopback, usage = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_USAGE_STATS_ENABLED"
    monkeypatch.delenv(loopback, raising=False)
    monkeypatch.setenv(usage, given or "")
    if given is None:
        monkeypatch.delenv(usage)
    before = dict(os.environ)
    with ray_cluster.private_ray():
        assert services.get_node_ip_address() == "127.0.0.1"
        assert (os.environ[loopback], os.environ[usage]) == ("0", given or "0")
    assert dict(os.environ) == before and ray_constants.ENABLE_RAY_CLUSTER


def test_keys_of_trackers_are_handed_to_rays_other_clusters_alone():
    """A cluster that is started here has the environment anyway."""
    every = list(ray_cluster.RAY_ENV)
    names = ["WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "WANDB_SERVICE", "HF_TOKEN", *every]
    handed = {local: [n for n in names if ray_cluster._is_for_workers(n, local)] for local in (False, True)}
    assert handed == {False: names[:2] + every, True: every}


def test_relative_runs_in_the_copy_of_a_job_are_warned_of(tmp_path, monkeypatch, capsys):
    copy = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    warn_of_copy("runs")
    monkeypatch.chdir(copy)
    warn_of_copy("/shared/runs")
    assert capsys.readouterr().err == ""
    warn_of_copy("runs")
    assert capsys.readouterr().err.startswith(
        "warning: runs=runs is relative, and this job's working directory"
    )


CLOSED = RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:18422")


def died(preempted: bool = False) -> WorkerHealthCheckFailedError:
    words = "The actor is dead because its worker process has died."
    cause = RayActorError(error_msg=words, preempted=preempted)
    return WorkerHealthCheckFailedError("A worker health check failed.", cause)


@pytest.mark.parametrize(
    ("failures", "cause", "is_preemption"),
    [
        ({0: CLOSED, 1: died()}, "worker 1 died (its process was killed, as for want of memory, or", False),
        ({0: died(), 1: died()}, "workers 0, 1 died (its process", False),
        ({0: CLOSED, 1: died(preempted=True)}, "worker 1 died with a node that Ray took away", True),
        ({0: CLOSED}, "worker 0 lost the others ([gloo/transport", False),
        ({1: ConnectionResetError("reset by peer")}, "worker 1 lost the others (reset by peer)", False),
    ],
)
def test_failure_that_another_attempt_may_mend_names_its_cause(failures, cause, is_preemption):
    found = _explain(WorkerGroupError("a traceback", failures))
    assert found.cause.startswith(cause) and found.is_preemption == is_preemption and "\n" not in found.cause


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UserError("https://a: timed out"), UserError),
        (MachineError("the quota is used up"), MachineError),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), MachineError),
        (ValueError("a bug"), WorkerGroupError),  # with the traceback
    ],
)
def test_failure_that_would_only_come_again_ends_the_run(error, kind):
    with pytest.raises(kind):
        _explain(WorkerGroupError("a traceback", {0: CLOSED, 1: error}))


class Ending(_Attempt):
    """An attempt without a cluster, whose workers end between two looks at the signals, as one comes."""

    def __init__(self, run, outcome):
        self.run_folder, self.notice, self.is_preempted = run, 0, False
        self.outcome, self.end_with, self.ends = None, outcome, threading.Event()

    def _fit(self):
        self.ends.wait()
        self.outcome = self.end_with

    def _look_for_preemption(self):
        self.ends.set()
        (thread,) = (each for each in threading.enumerate() if each.name == "ray train")
        thread.join()
        signal.raise_signal(signal.SIGTERM)

    def _abort(self):
        pass


@pytest.mark.parametrize("outcome", [{"finished": True}, RayError("the controller is lost")])
def test_signal_that_comes_when_the_workers_end_is_not_lost(outcome, tmp_path, monkeypatch):
    """The next training of a run, or its next attempt, would begin, and no further signal be heard."""
    attempts = []

    def begin(*_):
        assert not attempts, "another attempt"
        attempts.append(Ending(tmp_path, outcome))
        return attempts[-1]

    monkeypatch.setattr(ray_run, "_Attempt", begin)
    config = SimpleNamespace(max_failures=3, max_preemptions=3)
    with signals_handled(), pytest.raises(Interrupted) as caught:
        train_on_ray(None, config, tmp_path, {}, None)
    assert caught.value.exit_code == 143

"""The lock of a run: one owner, taken over from one that is gone; workers that stop; a run that is lost."""

import errno
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from raylib import processes
from raylib.checkpoint import find_newest
from raylib.errors import RunLost, UserError, error_line
from raylib.lock import (
    LOCK,
    Owner,
    add_ray_job,
    hold_run,
    owner_of,
    require_owned,
    stored_owner,
    watch_file,
    work_for,
)
from raylib.processes import this_process

HOLD = """
import sys
from pathlib import Path
from raylib.command import entry_point
from raylib.lock import hold_run
@entry_point()
def main(arguments):
    with hold_run(Path(arguments[0])):
        print('held', flush=True)
        sys.stdin.readline()
    return 0
sys.exit(main())
"""
# works for the owner whose token it reads, until it is ended
WORK = """
import sys, time
from pathlib import Path
from raylib.lock import stored_owner, work_for
with work_for(stored_owner(Path(sys.argv[1]))):
    print('works', flush=True)
    time.sleep(60)
"""


def start(code, folder, first):
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], **pipes)
    assert process.stdout.readline() == f"{first}\n", process.stderr.read()
    return process


def end(process):
    """(exit code, what it said) of a process that may go on."""
    process.stdin.write("\n")
    process.stdin.close()
    out, err = process.stdout.read(), process.stderr.read()  # `communicate` passes over what was buffered
    return process.wait(timeout=30), out + err


def tree(folder):
    return {
        path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")
    }


def write_record(folder, **changes):
    """A lock of this process, but for `changes`."""
    folder.mkdir(exist_ok=True)
    record = {"token": "t", **this_process(), "since": "then", "command": "c", "ray": None, **changes}
    (folder / LOCK).write_text(json.dumps(record))


def test_lock_second_start_says_who_has_it_and_changes_nothing(tmp_path):
    run = tmp_path / "run"
    first = start(HOLD, run, "held")
    (run / "config.json").write_text("{}")
    before = tree(run)
    second = subprocess.run([sys.executable, "-c", HOLD, str(run)], capture_output=True, text=True)
    host = os.uname().nodename
    line = rf"error: {run}: in use by process {first.pid} on {host} \(`.*`\), since \d+-.* UTC; wait for .*\n"
    assert second.returncode == 2 and re.fullmatch(line, second.stderr), second.stderr
    assert tree(run) == before
    assert end(first) == (0, "") and not (run / LOCK).exists()
    assert end(start(HOLD, run, "held")) == (0, "")


def test_lock_of_a_killed_owner_is_taken_over_with_a_word(tmp_path):
    first = start(HOLD, tmp_path, "held")
    first.kill()
    first.wait()
    taken = f"{tmp_path}: taken over from process {first.pid} on {os.uname().nodename}, which is gone"
    second = start(HOLD, tmp_path, taken)
    assert end(second) == (0, "held\n")


def test_lock_of_a_killed_owner_is_not_kept_by_processes_that_it_forked(tmp_path):
    code = HOLD.replace(
        "        sys.stdin",
        "        if not __import__('os').fork(): __import__('time').sleep(9)\n        sys.stdin",
    )
    first = start(code, tmp_path, "held")
    first.kill()
    first.wait()
    assert (
        end(
            start(
                HOLD,
                tmp_path,
                f"{tmp_path}: taken over from process {first.pid} on {os.uname().nodename}, which is gone",
            )
        )[0]
        == 0
    )


@pytest.mark.parametrize("content", [b"", b'{"token": "a', b"[]", b"\0" * 300])
def test_lock_that_a_crash_has_torn_is_nobodys(content, tmp_path):
    (tmp_path / LOCK).write_bytes(content)
    with hold_run(tmp_path):
        require_owned(tmp_path)


def test_lock_of_a_number_that_another_process_has_now_is_taken_over(tmp_path, capsys):
    write_record(tmp_path, pid=os.getppid(), start="1")
    with hold_run(tmp_path):
        assert f"taken over from process {os.getppid()} on" in capsys.readouterr().out


def test_lock_of_a_live_process_is_kept_where_the_file_is_not_locked(tmp_path):
    write_record(tmp_path, pid=os.getppid(), start=processes.process_start(os.getppid()))
    with pytest.raises(UserError, match="in use by process"), hold_run(tmp_path):
        pass


@pytest.mark.parametrize(
    ("file_system", "of_owner", "is_taken"),
    [
        (("nfs4", "rw,local_lock=none"), "shared", True),
        (("nfs4", "rw,local_lock=none"), "local", False),  # it is the server, whose locks clients do not see
        (("nfs4", "rw,local_lock=all"), "shared", False),
        (("fuse.s3fs", "rw"), "", False),
        (("ext4", "rw"), "local", True),  # a disk that was moved
        (("ext4", "rw"), "shared", False),  # this is the server
    ],
)
def test_lock_of_another_machine_is_judged_by_what_its_file_system_carries(
    file_system, of_owner, is_taken, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(processes, "_file_system", lambda path: file_system)
    write_record(tmp_path, host="other", boot="another", locks=of_owner)
    if is_taken:
        with hold_run(tmp_path):
            assert "taken over from process" in capsys.readouterr().out
    else:
        with work_for(stored_owner(tmp_path)):  # in doubt, the owner of this worker lives
            require_owned(tmp_path)
        with pytest.raises(UserError, match=f"; if it is gone, remove {tmp_path}/{LOCK}"), hold_run(tmp_path):
            pass


def test_lock_of_another_machine_that_holds_the_file_is_kept(tmp_path):
    first = start(HOLD, tmp_path, "held")
    record = json.loads((tmp_path / LOCK).read_text())
    (tmp_path / LOCK).write_text(json.dumps(record | {"host": "other", "boot": "another"}))
    with pytest.raises(UserError, match=f"in use by process {first.pid} on other"), hold_run(tmp_path):
        pass
    end(first)


@pytest.mark.parametrize(("ended", "is_taken"), [(True, True), (False, False), (None, False)])
def test_lock_of_another_machine_asks_its_ray_job(ended, is_taken, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_file_system", lambda path: ("lustre", "rw"))
    write_record(tmp_path, host="other", boot="another", ray={"job": "01000000"})
    if is_taken:
        with hold_run(tmp_path, lambda record: ended):
            pass
    else:
        with pytest.raises(UserError, match="Ray job 01000000"), hold_run(tmp_path, lambda record: ended):
            pass


def test_lock_of_a_machine_that_has_rebooted_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_file_system", lambda path: ("lustre", "rw"))
    write_record(tmp_path, boot="before")
    with hold_run(tmp_path):
        pass


def _race(folder, barrier, results):
    barrier.wait()
    try:
        with hold_run(Path(folder)):
            results.put(os.getpid())
            time.sleep(0.5)
    except UserError as e:
        results.put(str(e))


def test_lock_of_starts_at_the_same_moment_goes_to_one(tmp_path):
    fork = multiprocessing.get_context("fork")
    for i in range(2):
        barrier, results = fork.Barrier(6), fork.Queue()
        starts = [fork.Process(target=_race, args=(tmp_path / str(i), barrier, results)) for _ in range(6)]
        for process in starts:
            process.start()
        outcomes = [results.get(timeout=30) for _ in starts]
        for process in starts:
            process.join()
        owners = [outcome for outcome in outcomes if isinstance(outcome, int)]
        assert len(owners) == 1, outcomes
        assert all(f"process {owners[0]} on" in o for o in outcomes if isinstance(o, str)), outcomes


def test_lock_without_locks_of_the_file_system_works_by_its_record(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(processes.fcntl, "flock", unsupported)
    with hold_run(tmp_path):
        require_owned(tmp_path)
        write_record(tmp_path)
        with pytest.raises(RunLost, match="has taken the run over"):
            require_owned(tmp_path)


def test_lock_covers_what_is_below_it(tmp_path):
    """Parts and trials have no lock of their own, and nobody else can have one."""
    with hold_run(tmp_path / "search"):
        with hold_run(tmp_path / "search" / "trials" / "a"):
            assert not list((tmp_path / "search").glob("trials/**/*"))
            assert owner_of(tmp_path / "search" / "trials" / "a").folder == tmp_path / "search"
        ended = subprocess.run(
            [sys.executable, "-c", HOLD, str(tmp_path / "search" / "trials" / "a")],
            capture_output=True,
            text=True,
        )
    assert ended.returncode == 2 and f"a part of {tmp_path}/search, which is in use by" in ended.stderr
    assert not (tmp_path / "search").exists()  # it was new, and nothing has come into it


def test_lock_that_finds_no_room_leaves_nothing(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(Exception) as caught, hold_run(tmp_path / "run"):  # noqa: PT011
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert str(error_line(caught.value)).startswith(f"{tmp_path}/run/{LOCK}: ")
    assert not (tmp_path / "run").exists()


def test_lock_where_a_file_lies_is_one_line(tmp_path):
    (tmp_path / "run").write_text("")
    for path in (tmp_path / "run", tmp_path / "run" / "below"):
        with pytest.raises(OSError, match=str(tmp_path)) as caught, hold_run(path):
            pass
        line = error_line(caught.value)
        assert line.exit_code == 2 and str(tmp_path / "run") in str(line)


def test_worker_whose_owner_is_killed_ends_within_seconds(tmp_path):
    owner = start(HOLD, tmp_path, "held")
    worker = start(WORK, tmp_path, "works")
    owner.kill()
    owner.wait()
    code, said = worker.wait(timeout=15), worker.stderr.read()
    gone = f"its owner, process {owner.pid} on {os.uname().nodename}, is gone"
    assert code == 1 and said == f"error: {tmp_path}: {gone}; this worker ends\n"


def test_worker_whose_run_was_taken_over_registers_nothing(tmp_path):
    owner = start(HOLD, tmp_path, "held")
    token = json.loads((tmp_path / LOCK).read_text())["token"]
    with work_for(Owner(tmp_path, token)):
        require_owned(tmp_path)
        owner.kill()
        owner.wait()
        with pytest.raises(RunLost, match="is gone"):
            require_owned(tmp_path)
        second = start(
            HOLD,
            tmp_path,
            f"{tmp_path}: taken over from process {owner.pid} on {os.uname().nodename}, which is gone",
        )
        assert second.stdout.readline() == "held\n"
        with pytest.raises(RunLost):
            require_owned(tmp_path)
    with (
        pytest.raises(RunLost, match=f"process {second.pid} on .* has taken the run over"),
        work_for(Owner(tmp_path, token)),
    ):
        pass
    end(second)


def test_lock_keeps_its_token_when_its_ray_job_is_known(tmp_path):
    with hold_run(tmp_path):
        token = owner_of(tmp_path).token
        add_ray_job(tmp_path, {"job": "02000000"})
        require_owned(tmp_path)
        record = json.loads((tmp_path / LOCK).read_text())
        assert (record["token"], record["ray"]) == (token, {"job": "02000000"})


LOSSES = {
    "folder": lambda run: shutil.rmtree(run.rename(run.with_name("away")), ignore_errors=True),
    "config.json": lambda run: (run / "config.json").unlink(),
    "config.json cut off": lambda run: (run / "config.json").write_text(""),
    "metrics.jsonl": lambda run: (run / "metrics.jsonl").unlink(),
    "lock.json": lambda run: (run / LOCK).unlink(),
}


@pytest.mark.parametrize("lost", LOSSES)
def test_run_that_loses_its_folder_or_a_file_of_it_ends_with_an_error(lost, mini, tmp_path, capsys):
    from pretrain.train import run as pretrain
    from raylib.command import entry_point

    config = mini("name=lost", "runtime=local", "workers=1", "fit.steps=100000", "fit.save_every=5")
    run = tmp_path / "lost"

    def lose():
        while not (run / "checkpoints" / "step_000005").is_dir():
            time.sleep(0.05)
        LOSSES[lost](run)

    thread = threading.Thread(target=lose)
    thread.start()
    code = entry_point()(lambda arguments: pretrain(config) and 0)([])
    thread.join()
    err = capsys.readouterr().err.splitlines()
    assert code == 1 and err[-1].startswith(f"error: {run}") and "under way; it ends here" in err[-1], err
    assert run.exists() == (lost != "folder")
    if lost in ("config.json", "metrics.jsonl"):
        assert not (run / lost).exists()


@pytest.mark.parametrize("lost", ["folder", "config.json"])
def test_fine_tuning_that_loses_its_folder_or_config_ends_with_an_error(lost, finetune, tmp_path):
    run = tmp_path / "lost"

    def lose():
        while not (run / "checkpoints" / "registry.json").is_file() or not find_newest(run):
            time.sleep(0.05)
        LOSSES[lost](run)

    thread = threading.Thread(target=lose)
    thread.start()
    code, printed = finetune("scenes_xvnli", "name=lost", "epochs=500", "train_limit=30")
    thread.join()
    last = printed.splitlines()[-1]
    assert code == 1 and last.startswith(f"error: {run}") and "under way; it ends here" in last, printed
    assert run.exists() == (lost != "folder") and not (run / "config.json").exists()


def test_lock_watches_files_of_parts(tmp_path):
    part = tmp_path / "run" / "de"
    with hold_run(tmp_path / "run"), hold_run(part):
        part.mkdir()
        (part / "config.json").write_text("{}")
        watch_file(part / "config.json")
        require_owned(part)
        (part / "config.json").unlink()
        with pytest.raises(RunLost, match=f"{part}/config.json: gone while the run was under way"):
            require_owned(tmp_path / "run")


POOL = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from raylib.processes import end_with_parent

if __name__ == "__main__":
    with ProcessPoolExecutor(2, multiprocessing.get_context(sys.argv[1]), end_with_parent) as pool:
        for seconds in (60, 0.01):  # one has work, the other waits for some
            pool.submit(time.sleep, seconds)
        print(*pool._processes, flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_processes_of_a_pool_end_with_a_parent_that_is_killed(method, tmp_path):
    (tmp_path / "pool.py").write_text(POOL)
    command = [sys.executable, str(tmp_path / "pool.py"), method]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ}) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(pids) == 2
    end = time.monotonic() + 20
    while any(map(processes.process_start, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(map(processes.process_start, pids))

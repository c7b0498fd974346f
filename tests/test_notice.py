"""A notice is a checkpoint: signals to a run, the line and the exit code it ends with, and the same run after
it, to the bit."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

import pretrain.train
from pretrain.__main__ import main
from pretrain.train import run as run_pretraining
from raylib import checkpoint, loop
from raylib.config import dump_config
from raylib.errors import MachineError
from raylib.monitoring import read_metrics
from raylib.notice import PREEMPTION, Interrupted, StopVote, known_grace, notice_of
from tests.workers import run_workers

ALONE = ("runtime=local", "workers=1")


@pytest.fixture(autouse=True)
def listens():
    """Ctrl-C and a closed terminal count, even where these tests run in the background of a shell, or under
    nohup, in which they are ignored."""
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGHUP, hangup)


def start(config) -> int:
    """Run a config as a command; return its exit code."""
    file = Path(config.runs) / f"{config.name}.json"
    file.write_text(dump_config(config), encoding="utf-8")
    return main(["--config", str(file)])


def signal_in_step(monkeypatch, step: int, *numbers: int) -> None:
    """Send this process signals while it is in its step `step`."""
    real = loop._step

    def interrupted(engine, batch, number, *rest):
        if number == step:
            for each in numbers:
                signal.raise_signal(each)
        return real(engine, batch, number, *rest)

    monkeypatch.setattr(loop, "_step", interrupted)


def outcome(config) -> dict:
    """What a run leaves, but for times: curves, each line once, scores, weights, best."""
    run = Path(config.runs) / config.name
    steady = ("step", "lr", "epoch", "skipped")
    records = [
        {k: v for k, v in r.items() if k in steady or k.startswith(("loss/", "eval/"))}
        for r in read_metrics(run)
    ]
    newest = checkpoint.find_newest(run)
    best = checkpoint.find_trained(run, "best")
    result = json.loads((run / "result.json").read_text())
    return {
        "records": records,
        "weights": {k: v.tolist() for k, v in load_file(newest / "model.safetensors").items()},
        "best": (checkpoint.read_meta(best)["step"], checkpoint.read_meta(best)["score"]),
        "best weights": {k: v.tolist() for k, v in load_file(best / "model.safetensors").items()},
        "scores": {k: result[k] for k in ("retrieval", "losses", "evaluation", "steps", "skipped_steps")},
    }


_outcomes: dict[tuple, dict] = {}


@pytest.fixture
def undisturbed(mini):
    """The settings of a run, and what it leaves undisturbed."""
    settings = (*ALONE, "fit.steps=8", "fit.eval_every=2", "fit.save_every=4", "fit.keep=2")
    if settings not in _outcomes:
        whole = mini("name=whole", *settings)
        assert start(whole) == 0
        _outcomes[settings] = outcome(whole)
    return settings, _outcomes[settings]


@pytest.mark.parametrize(
    ("number", "code", "name"),
    [
        (signal.SIGTERM, 143, "SIGTERM"),
        (signal.SIGINT, 130, "Ctrl-C"),
        (signal.SIGUSR1, 138, "SIGUSR1"),
        (signal.SIGHUP, 129, "SIGHUP (its terminal was closed)"),
    ],
)
def test_notice_saves_at_the_next_step_boundary_and_the_run_goes_on(
    mini, undisturbed, monkeypatch, capfd, number, code, name
):
    """At a step without a checkpoint or an evaluation, of which no trace stays."""
    settings, expected = undisturbed
    config = mini("name=parts", *settings)
    with monkeypatch.context() as patched:
        signal_in_step(patched, 4, number)
        capfd.readouterr()
        assert start(config) == code
    lines = capfd.readouterr().err.splitlines()
    stopped = f"stopped by {name} at step 5 of 8; saved; the same command goes on from there"
    hint = ["Ctrl-C: saves after this step, and stops; a second one ends at once"] * (code == 130)
    assert lines == [*hint, stopped]
    assert checkpoint.find_newest(Path(config.runs) / "parts").name == "step_000005"
    assert start(config) == 0 and outcome(config) == expected


@pytest.mark.parametrize("step", [1, 3, 7])
def test_notice_at_a_step_with_an_evaluation_is_evaluated_by_the_resumed_run(
    mini, undisturbed, monkeypatch, step
):
    """After step 2 an evaluation alone is due, after 4 a checkpoint too, 8 is the last."""
    settings, expected = undisturbed
    config = mini("name=parts", *settings)
    with monkeypatch.context() as patched:
        signal_in_step(patched, step, signal.SIGTERM)
        assert start(config) == 143
    meta = checkpoint.read_meta(checkpoint.find_newest(Path(config.runs) / "parts"))
    assert (meta["step"], meta["score"], meta["evaluation_due"]) == (step + 1, None, True)
    assert start(config) == 0 and outcome(config) == expected


@pytest.mark.parametrize("evaluation", [1, 3])
def test_notice_during_an_evaluation_does_not_wait_for_its_end(mini, undisturbed, monkeypatch, evaluation):
    """Nor twice: the evaluation that the resumed run catches up with is ended too."""
    settings, expected = undisturbed
    config, real, calls = mini("name=parts", *settings), pretrain.train.ZeroShotRetrieval.__call__, []

    def interrupted(self, model, bf16):
        calls.append(len(calls))
        if calls[-1] in (evaluation, evaluation + 1):
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("it went on")
        return real(self, model, bf16)

    monkeypatch.setattr(pretrain.train.ZeroShotRetrieval, "__call__", interrupted)
    assert start(config) == 143
    newest = checkpoint.find_newest(Path(config.runs) / "parts")
    assert checkpoint.read_meta(newest)["step"] == 2 * (evaluation + 1)
    assert start(config) == 143 and checkpoint.find_newest(Path(config.runs) / "parts") == newest
    assert start(config) == 0 and outcome(config) == expected


def test_notice_killed_while_it_catches_up_with_an_evaluation_logs_it_once(mini, undisturbed, monkeypatch):
    settings, expected = undisturbed
    config = mini("name=parts", *settings)
    with monkeypatch.context() as patched:
        signal_in_step(patched, 3, signal.SIGTERM)
        assert start(config) == 143

    def killed(*_):
        raise MemoryError

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(checkpoint, "add_scores", killed)
        start(config)
    assert start(config) == 0 and outcome(config) == expected


def test_stop_after_an_unscheduled_step_leaves_no_trace(mini, undisturbed):
    """Its checkpoint has no score: that of step 2 is of other weights."""
    settings, expected = undisturbed
    config = mini("name=parts", *settings)
    run_pretraining(config.model_copy(update={"fit": config.fit.model_copy(update={"stop_after": 3})}))
    newest = checkpoint.find_newest(Path(config.runs) / "parts")
    assert (
        checkpoint.read_meta(newest)["score"] is None and checkpoint.find_best(newest.parent.parent) is None
    )
    assert start(config) == 0 and outcome(config) == expected


def stop_on_full_disk(rank, world):
    """Worker 1 gets a notice amid an evaluation whose state finds no room."""

    def evaluation():
        if rank == 1:
            vote.receive(notice_of(signal.SIGTERM))
        while time.monotonic() < end:
            time.sleep(0.01)

    def save():
        raise MachineError("no space left on the disk")

    vote, end = StopVote(world), time.monotonic() + 60
    try:
        vote.evaluate(evaluation, save, lambda: os._exit(9))
    except MachineError as e:
        return str(e), time.monotonic() < end


def test_notice_during_an_evaluation_that_cannot_be_saved_ends_with_its_error(capfd):
    """On all workers, at once: the thread that saves must not take it with it."""
    assert run_workers(stop_on_full_disk, 2) == [("no space left on the disk", True)] * 2
    assert "Traceback" not in capfd.readouterr().err


def test_notice_of_a_preemption_after_the_last_step_ends_nothing():
    """A worker's `Interrupted` would end the run as a bug does; a signal's is told by the driver."""
    vote = StopVote(1)
    assert vote.at_end() == 0
    vote.receive(PREEMPTION)
    vote.require_heeded()
    vote.receive(notice_of(signal.SIGTERM))
    with pytest.raises(Interrupted):
        vote.require_heeded()


def test_notice_second_ctrl_c_ends_at_once(mini, monkeypatch, capfd):
    config = mini("name=twice", *ALONE)
    with monkeypatch.context() as patched:
        signal_in_step(patched, 1, signal.SIGINT, signal.SIGINT)
        assert start(config) == 130
    assert (
        capfd.readouterr().err.splitlines()[-1]
        == "interrupted; the same command resumes from the newest checkpoint"
    )
    assert checkpoint.find_newest(Path(config.runs) / "twice") is None


def test_notice_of_a_closed_terminal_is_none_under_nohup(mini, undisturbed, monkeypatch):
    settings, expected = undisturbed
    config, before = mini("name=parts", *settings), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal_in_step(monkeypatch, 4, signal.SIGHUP)
    try:
        assert start(config) == 0 and outcome(config) == expected
    finally:
        signal.signal(signal.SIGHUP, before)


IN_TERMINAL = """
import sys, time
from raylib.notice import notices_to, signals_handled

notices = []
with signals_handled(), notices_to(notices.append):
    print("ready", flush=True)
    while not notices:
        time.sleep(0.01)
    print("a line that nobody reads", flush=True)
    print("another", file=sys.stderr, flush=True)
sys.exit(notices[0])
"""


def test_notice_of_a_closed_terminal_takes_what_is_printed_from_then_on():
    """The system answers each such line by an error."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", IN_TERMINAL],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    assert os.read(ours, 100).strip() == b"ready"
    os.close(ours)
    assert process.wait(timeout=60) == 129


def test_notice_second_sigterm_is_none(mini, monkeypatch, capfd):
    """Slurm and torchrun may both send one."""
    config = mini("name=twice", *ALONE)
    with monkeypatch.context() as patched:
        signal_in_step(patched, 0, signal.SIGTERM, signal.SIGTERM)
        assert start(config) == 143
    assert (
        capfd.readouterr().err
        == "stopped by SIGTERM at step 1 of 6; saved; the same command goes on from there\n"
    )


@pytest.mark.slow
def test_notice_in_fine_tuning_is_a_checkpoint_in_every_training_of_it(finetune, monkeypatch, tmp_path):
    """A pruning round of 3 steps, and the run's own training of 6, whose dev set is due after 3 and 6: a
    notice in each of a round, amid an epoch, and at an epoch's end; then in the evaluation of the test sets,
    which has nothing to save."""
    from finetune import worker

    settings = ("runtime=local", "strategies.sparse.rounds=1")
    assert finetune("scenes_xgqa", "name=whole", *settings)[0] == 0
    for number, step in enumerate((1, 3, 5)):
        with monkeypatch.context() as patched:
            # the round has step 1, the training 3, and 5, of which the round has none
            signal_in_step(patched, step, signal.SIGTERM)
            code, printed = finetune("scenes_xgqa", "name=parts", *settings)
        assert code == 143 and f"stopped by SIGTERM at step {step + 1} of 6; saved" in printed, (
            number,
            printed,
        )

    def interrupted(*_):
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(worker, "test_result", interrupted)
        code, printed = finetune("scenes_xgqa", "name=parts", *settings)
    assert code == 143 and printed.splitlines()[-1].startswith("stopped by SIGTERM; the same command")
    assert finetune("scenes_xgqa", "name=parts", *settings)[0] == 0
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    results = [json.loads((run / "result.json").read_text()) for run in (whole, parts)]
    steady = ("accuracy", "intervals", "steps", "sparsity", "curve")
    whole_result, parts_result = ({k: r.get(k) for k in steady} for r in results)
    assert whole_result == parts_result
    for language in ("en", "ru"):
        files = [run / "predictions" / f"{language}.jsonl" for run in (whole, parts)]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert trained(whole) == trained(parts)


def trained(run: Path) -> dict:
    """What all trainings of a fine-tuning run came to: best, weights, curves without a line twice."""
    found = {}
    for folder in sorted(run.glob("**/checkpoints")):
        part = folder.parent
        best = checkpoint.find_trained(part, "best")
        weights = {k: v.tolist() for k, v in load_file(best / "model.safetensors").items()}
        records = [
            {k: v for k, v in r.items() if k == "step" or k.startswith(("loss/", "eval/"))}
            for r in read_metrics(part)
        ]
        found[part.relative_to(run)] = (best.name, checkpoint.read_meta(best)["score"], weights, records)
    return found


def torchrun(*arguments) -> subprocess.Popen:
    """Begin two workers."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    pipes: dict = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *map(str, arguments)], env=env, **pipes, start_new_session=True)


def end_of(process: subprocess.Popen) -> tuple[list[str], str]:
    """(the exit codes that torchrun reports of its workers, their own lines on stderr)."""
    _, complaints = process.communicate(timeout=240)
    lines = [line for line in complaints.splitlines() if line.startswith(("stopped", "error", "interrupted"))]
    return re.findall(r"exitcode\s*: (-?\d+)", complaints), "\n".join(lines)


# an evaluation that one worker never leaves by itself, where it gets the notice; the other waits for it
STUCK = """
import os, signal, sys, time
import pretrain.train
from pretrain.__main__ import main

real = pretrain.train.ZeroShotRetrieval.__call__

def stuck(self, model, bf16):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            time.sleep(0.01)
    return real(self, model, bf16)

pretrain.train.ZeroShotRetrieval.__call__ = stuck
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_notice_of_one_torchrun_worker_stops_all_at_one_step(mini, tmp_path):
    """To one worker of two, with its loaders; to torchrun, which passes it on; in an evaluation that a worker
    cannot leave, for it waits for the other."""
    settings = (
        "runtime=local",
        "fit.steps=24",
        "fit.eval_every=12",
        "fit.save_every=12",
        "fit.loader_workers=1",
    )
    configs = {name: mini(f"name={name}", *settings) for name in ("whole", "one", "launcher", "stuck")}
    files = {name: tmp_path / f"{name}.json" for name in configs}
    for name, config in configs.items():
        files[name].write_text(dump_config(config), encoding="utf-8")
    script = tmp_path / "stuck.py"
    script.write_text(STUCK)
    assert end_of(torchrun("-m", "pretrain", "--config", files["whole"])) == ([], "")
    for name in ("one", "launcher", "stuck"):
        run = Path(configs[name].runs) / name
        command = (script,) if name == "stuck" else ("-m", "pretrain")
        begun = torchrun(*command, "--config", files[name])
        while name != "stuck" and len(read_metrics(run)) < 3:
            assert begun.poll() is None, begun.communicate()
            time.sleep(0.01)
        if name == "one":
            workers = [p for p in psutil.Process(begun.pid).children() if "pretrain" in p.cmdline()]
            (second,) = [p for p in workers if p.environ()["RANK"] == "1"]
            os.killpg(second.pid, signal.SIGTERM)  # torchrun makes a group of each worker
        elif name == "launcher":
            begun.terminate()
        codes, lines = end_of(begun)
        meta = checkpoint.read_meta(checkpoint.find_newest(run))
        assert meta["evaluation_due"] == (name == "stuck") and meta["step"] <= 12
        assert (
            lines
            == f"stopped by SIGTERM at step {meta['step']} of 24; saved; the same command goes on from there"
        )
        # one that ends a moment later than the other gets another SIGTERM, of torchrun's
        assert set(codes) <= {"143", "-15"} and (codes or name == "launcher")
        assert end_of(torchrun("-m", "pretrain", "--config", files[name])) == ([], "")
        assert outcome(configs[name]) == outcome(configs["whole"]), name


def test_notice_is_warned_of_where_a_save_takes_longer_than_a_stop_leaves(mini, monkeypatch, capfd):
    for name in ("POLYGLANCE_STOP_SECONDS", "RAY_JOB_STOP_WAIT_TIME_S", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    assert known_grace() is None
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert known_grace() == (3.0, "RAY_JOB_STOP_WAIT_TIME_S")  # as Ray has it by default
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "0")
    config = mini("name=slow", *ALONE)
    assert start(config) == 0
    note = (
        r"note: a save took \d+\.\d s, but a stop leaves this run 0 s: set RAY_JOB_STOP_WAIT_TIME_S to \d+ .*"
    )
    assert len(re.findall(note, capfd.readouterr().out)) == 1  # of three saves
    newest = checkpoint.read_meta(checkpoint.find_newest(Path(config.runs) / "slow"))
    assert 0 < newest["save_seconds"] < 60
    monkeypatch.setenv("POLYGLANCE_STOP_SECONDS", "100")
    assert start(mini("name=quick", *ALONE)) == 0 and "a save took" not in capfd.readouterr().out

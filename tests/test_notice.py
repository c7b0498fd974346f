"""A notice is a checkpoint: signals to a run, the line and the exit code it ends with, and the same run after
it, to the bit."""

import json
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

import pretrain.train
from pretrain.__main__ import main
from raylib import checkpoint, loop
from raylib.config import dump_config
from raylib.monitoring import read_metrics

ALONE = ("runtime=local", "workers=1")


@pytest.fixture(autouse=True)
def listens():
    """Ctrl-C counts, even where these tests run in the background of a shell, in which it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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
    [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C"), (signal.SIGUSR1, 138, "SIGUSR1")],
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


@pytest.mark.parametrize("step", [1, 3, 5, 7])
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


@pytest.mark.parametrize("evaluation", [0, 1, 3])
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

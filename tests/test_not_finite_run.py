"""Runs that meet what is not finite: what is counted, what ends them, which checkpoints are left."""

import json
import math
import os
from pathlib import Path
from typing import ClassVar, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from raylib import checkpoint
from raylib.data.loading import StepDataset
from raylib.engine import OptimConfig, StepGuard
from raylib.errors import NotFinite
from raylib.loop import FitConfig, fit
from raylib.models.base import model_files, save_model
from raylib.monitoring import read_metrics
from raylib.runtime import LocalRuntime
from tests.test_not_finite import CPU, Faulty, faulty_batch
from tests.test_strategies import Stack
from tests.workers import run_workers

OPTIM = OptimConfig(lr=0.02, weight_decay=0.1, warmup=0.0, clip=0.05)


class Stored(Stack):
    """A stack that can be saved."""

    tuning: ClassVar[dict] = {}

    def files(self):
        return model_files(self, self, {"model_type": "stack"})


class Batches(StepDataset):
    """Faulty batches of one worker of `world`."""

    def __init__(self, faults, rank=0, world=1):
        self.faults, self.rank, self.world = faults, rank, world

    def __getitem__(self, step):
        return faulty_batch(step, self.rank, self.world, self.faults) | {"samples": 8}


def run(folder, faults, optim=OPTIM, evaluate=lambda model: {}, rank=0, world=1, rates=None, **settings):
    """Train a stack in `folder`, logging, saving and evaluating as `settings` say; what `fit` returns."""
    config = FitConfig(
        **{
            "steps": 30,
            "log_every": 1,
            "save_every": 1,
            "loader_workers": 0,
            "bf16": False,
            "sharding": "none",
            **settings,
        }
    )
    (folder / checkpoint.FOLDER).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    objective = Faulty(Stored())
    return fit(
        objective,
        Batches(faults, rank, world),
        LocalRuntime(folder, config.keep),
        config,
        optim,
        evaluate,
        {"run": "x"},
        rates,
    )


def checkpoints(folder):
    return json.loads((folder / checkpoint.FOLDER / checkpoint.REGISTRY).read_text())["checkpoints"]


def weights(folder, name):
    return load_file(folder / checkpoint.FOLDER / name / "model.safetensors")


def test_skipped_steps_are_counted_in_log_meta_and_result(tmp_path, capsys):
    result = run(tmp_path, {3: "term", 4: "gradient", 9: "loss"}, steps=12)
    assert result["skipped_steps"] == 3 and result["steps"] == 12
    lines = {r["step"]: r for r in read_metrics(tmp_path) if "skipped" in r}
    assert [lines[step]["skipped"] for step in range(1, 13)] == [0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3, 3]
    # a skipped step has no part in a mean; JSON has no NaN
    assert [step for step, line in lines.items() if "loss/task" not in line] == [4, 5, 10]
    assert all(("loss/grad_norm" in line) == ("loss/task" in line) for line in lines.values())
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert "skipped 2" in capsys.readouterr().out
    meta = checkpoint.read_meta(tmp_path / checkpoint.FOLDER / "step_000012")
    assert meta["skipped_steps"] == 3 and meta["skipped_in_a_row"] == 0
    assert all(math.isfinite(v) for v in result["losses"].values())


def test_skipped_steps_counts_survive_resume(tmp_path):
    faults = dict.fromkeys((2, 5, 6, 7), "gradient")
    run(tmp_path / "parts", faults, stop_after=7)
    meta = checkpoint.read_meta(tmp_path / "parts" / checkpoint.FOLDER / "step_000007")
    assert (meta["skipped_steps"], meta["skipped_in_a_row"]) == (3, 2)
    assert (
        run(tmp_path / "parts", faults)["skipped_steps"]
        == run(tmp_path / "whole", faults)["skipped_steps"]
        == 4
    )
    whole, parts = (weights(tmp_path / name, "step_000030") for name in ("whole", "parts"))
    assert all(value.equal(parts[name]) for name, value in whole.items())
    # a row that crosses the restart ends the run where it would have ended without one
    with pytest.raises(NotFinite, match="step 8: 3 steps in a row skipped, more than fit.max_skipped=2"):
        run(tmp_path / "rows", faults, stop_after=7, max_skipped=2)
        run(tmp_path / "rows", faults, max_skipped=2)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("loss", "loss not finite; first parameter hit model.embedding.weight (12 of 12)"),
        ("term", "task not finite; all parameters' own gradients are finite"),
        (
            "gradient",
            "all terms finite, the gradient is not; first parameter hit model.layers.2.weight (1 of 12)",
        ),
    ],
)
@pytest.mark.parametrize("log_every", [1, 100])
def test_skipped_steps_above_limit_end_run_with_one_report(tmp_path, fault, words, log_every):
    faults = dict.fromkeys(range(6, 30), fault)
    with pytest.raises(NotFinite) as error:
        run(tmp_path, faults, max_skipped=3, save_every=5, log_every=log_every)
    text = str(error.value)
    assert "step 10: 4 steps in a row skipped, more than fit.max_skipped=3" in text and words in text, text
    assert f"the last good checkpoint is {tmp_path}/checkpoints/step_000005" in text
    assert checkpoints(tmp_path) == ["step_000005"] and "\n" not in text
    # as the report says: with more allowed the same run goes on from there
    few = {step: fault for step in faults if step < 12}
    assert run(tmp_path, few, max_skipped=6, save_every=5)["skipped_steps"] == 6


def test_skipped_steps_at_limit_do_not_end_run(tmp_path):
    assert run(tmp_path, dict.fromkeys(range(6, 9), "gradient"), max_skipped=3)["skipped_steps"] == 3


def test_skipped_steps_limit_leaves_run_unchanged_when_noticed_late():
    guard, norm = StepGuard(CPU, 2), [1.0, *[math.inf] * 3, 1.0, math.nan, 1.0]
    skips = []
    for step, value in enumerate(norm):
        guard.check_loss(
            torch.tensor(1.0), {"a": torch.tensor(math.nan if step == 3 else 1.0), "b": torch.tensor(2.0)}
        )
        skips.append(float(guard.count(step, torch.tensor(value))))
    assert skips == [0, 1, 1, 1, 1, 1, 1]
    assert guard.read_counts() == (4, 0, 0, 3) and guard.nonfinite_terms_at_end() == ["a"]


def on_zero(rank, world, folder):
    """Faults on the last worker alone, under ZeRO-2 and DDP: the reports, and whether a run with few of them
    finishes."""
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world)}
    out = []
    for zero in ("zero2", "none"):
        place = folder / f"{zero}{world}"
        try:
            run(
                place,
                dict.fromkeys(range(6, 30), "gradient"),
                max_skipped=3,
                save_every=5,
                rank=rank,
                world=world,
                sharding=zero,
            )
        except NotFinite as e:
            out.append(str(e))
        result = run(
            place,
            {6: "gradient", 9: "loss"},
            max_skipped=3,
            save_every=5,
            rank=rank,
            world=world,
            sharding=zero,
        )
        out.append(result["skipped_steps"])
    return out


@pytest.mark.parametrize("world", [1, 2])
def test_skipped_steps_limit_is_the_same_with_workers_and_zero(tmp_path, world):
    results = run_workers(on_zero, world, tmp_path)
    assert all(result == results[0] for result in results)  # nobody is left waiting
    reports, counts = results[0][::2], results[0][1::2]
    assert counts == [2] * len(reports) and len(reports) == 2
    for text in reports:
        assert (
            "step 10: 4 steps in a row" in text
            and "first parameter hit model.layers.2.weight (1 of 12)" in text
        )


def zero_report(rank, world, folder):
    """The report of ZeRO-2 whose shards are on two workers, of a fault on the last alone."""
    from raylib.engine_zero import DeepSpeedEngine
    from raylib.finite import StepMonitor

    os.environ["LOCAL_RANK"] = str(rank)
    faults, guard = dict.fromkeys(range(2, 20), "gradient"), StepGuard(CPU, 2)
    engine = DeepSpeedEngine(Faulty(Stack()), OPTIM, CPU, False, None, None, guard)
    monitor = StepMonitor(guard, engine, lambda step: faulty_batch(step, rank, world, faults), lambda: None)
    for step in range(10):
        engine.step(faulty_batch(step, rank, world, faults), step, OPTIM.lr)
        try:
            monitor.read()
        except NotFinite as e:
            return step, str(e)
    return None


def test_skipped_steps_report_under_zero_names_the_parameter(tmp_path):
    first, second = run_workers(zero_report, 2, tmp_path)
    assert first == second and first[0] == 4
    assert (
        "step 5: 3 steps in a row" in first[1]
        and "first parameter hit model.layers.2.weight (1 of 12)" in first[1]
    )


def mean_norms(rank, world):
    """Return what is said of two gradients of the last worker, the others' being zero."""
    from raylib.finite import StepMonitor

    monitor = StepMonitor(StepGuard(CPU), Engine(Faulty(Stack())), None, lambda: None)
    first, *others = monitor.engine.objective.parameters()
    found = []
    for largest in (2.5e19, 5e19):  # squares of more than 1.8e19 overflow float32
        gradient = torch.zeros_like(first)
        gradient.view(-1)[0] = largest if rank == world - 1 else 0.0
        found.append(monitor._has_finite_total_norm([gradient, *[None] * len(others)]))
    return found


class Engine(NamedTuple):
    objective: nn.Module
    device: torch.device = CPU


def test_skipped_steps_are_decided_by_gradient_mean_of_all_workers():
    """Or a run would end at another step with another number of workers."""
    assert run_workers(mean_norms, 2) == [[True, False]] * 2
    assert run_workers(mean_norms, 1) == [[False, False]]


def broken_at(step, factor):
    """Rates that are sound but for one step."""
    return lambda depth, number: factor if number == step else 1.0


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("save_every", [1, 4])
def test_checkpoint_is_not_written_after_update_that_breaks_weights(tmp_path, keep, save_every):
    """The weights are finite after step 9, but give no finite loss any more: whether the checkpoint falls due
    at once or after some skipped steps, it is not written."""
    with pytest.raises(NotFinite) as error:
        run(tmp_path, {}, rates=broken_at(8, 1e35), keep=keep, save_every=save_every)
    due = 9 if save_every == 1 else 12
    assert f"step {due}: the update of step 9 broke the weights: of its own batch, once more, loss" in str(
        error.value
    )
    assert f"the last good checkpoint is {tmp_path}/checkpoints/step_000008" in str(error.value)
    assert checkpoints(tmp_path) == [f"step_{8 - save_every * i:06d}" for i in reversed(range(keep))]
    assert (
        run(tmp_path, {}, rates=lambda depth, step: 1.0, keep=keep)["steps"] == 30
    )  # with a sound rate it goes on from there


def overflowing_then_sound(rank, world, folder, save_every, zero):
    """(what ended a run whose gradient overflows from step 10 on, its checkpoints, what a sound run from
    there came to)."""
    try:
        run(
            folder, {}, rates=broken_at(8, 1e10), keep=1, save_every=save_every, sharding=zero, max_skipped=20
        )
    except NotFinite as error:
        ended = str(error)
    kept = checkpoints(folder)
    sound = run(folder, {}, rates=lambda depth, step: 1.0, keep=1, sharding=zero)
    return ended, kept, (sound["steps"], sound["skipped_steps"])


@pytest.mark.parametrize("save_every", [1, 4])
@pytest.mark.parametrize("zero", ["none", "zero2"])
def test_checkpoint_is_not_written_from_weights_without_finite_gradient(tmp_path, save_every, zero):
    """After step 9 weights and loss are finite, but the gradient overflows whatever the batch: every further
    step is skipped. A checkpoint from within that row would be the only one left, and no lower rate could
    begin from it."""
    # in a process of its own, whose end takes DeepSpeed's process group with it
    ((ended, kept, sound),) = run_workers(overflowing_then_sound, 1, tmp_path, save_every, zero)
    assert (
        "the update of step 9 broke the weights: of its own batch, once more, the gradient not finite"
        in ended
    )
    assert kept == ["step_000008"] and sound == (30, 0)


def test_skipped_steps_report_names_parameter_overflowing_in_norm(tmp_path):
    with pytest.raises(
        NotFinite, match="first parameter hit by a norm that overflows model.embedding.weight"
    ):
        run(tmp_path, {}, rates=broken_at(8, 1e10), max_skipped=3, save_every=0)


def test_checkpoint_with_non_finite_weights_is_never_registered(tmp_path):
    """A rate so high that the update itself overflows."""
    with pytest.raises(NotFinite, match="step 9: embedding.weight is not finite; .*step_000008"):
        run(tmp_path, {}, rates=broken_at(8, 1e42))
    assert checkpoints(tmp_path) == ["step_000007", "step_000008"]


def test_non_finite_score_ends_run_before_it_is_kept(tmp_path):
    scores = iter([0.5, math.nan])
    with pytest.raises(NotFinite, match="step 20: evaluation: score not finite"):
        run(tmp_path, {}, evaluate=lambda model: {"score": next(scores)}, eval_every=10, save_every=10)
    assert checkpoints(tmp_path) == ["step_000010"]
    assert checkpoint.read_registry(tmp_path).best == ("step_000010", 0.5)


def old_best(folder: Path, score: float, bad: bool) -> None:
    """A run of an earlier version, with `best/` and a list of checkpoints."""
    best = folder / checkpoint.OLD_BEST
    best.mkdir(parents=True)
    save_file({"a": torch.tensor([math.nan if bad else 1.0])}, best / "model.safetensors")
    (best / "meta.json").write_text(json.dumps({"step": 1, "workers": 1, "score": score}))
    newest = folder / checkpoint.FOLDER / "step_000002"
    newest.mkdir(parents=True)
    (newest / "meta.json").write_text(json.dumps({"step": 2, "workers": 1, "score": None}))
    (folder / checkpoint.FOLDER / checkpoint.REGISTRY).write_text('["step_000002"]')


@pytest.mark.parametrize(
    ("score", "bad", "words"), [(math.nan, False, "its score nan"), (1.0, True, "tensor a")]
)
def test_non_finite_stored_best_is_not_kept(tmp_path, capsys, score, bad, words):
    old_best(tmp_path, score, bad)
    checkpoint.settle(tmp_path)
    assert f"best: {words} is not finite (NaN or infinite); it is not kept" in capsys.readouterr().out
    assert checkpoint.read_registry(tmp_path) == (["step_000002"], None, {})
    assert checkpoint.find_best(tmp_path) is None and not (tmp_path / checkpoint.OLD_BEST).exists()


def test_finite_stored_best_is_kept(tmp_path):
    old_best(tmp_path, 0.75, bad=False)
    assert checkpoint.find_best(tmp_path) == tmp_path / checkpoint.OLD_BEST
    checkpoint.settle(tmp_path)
    assert checkpoint.read_registry(tmp_path) == (["step_000001", "step_000002"], ("step_000001", 0.75), {})
    assert checkpoint.find_best(tmp_path) == tmp_path / checkpoint.FOLDER / "step_000001"
    assert (checkpoint.find_best(tmp_path) / "model.safetensors").is_file()


@pytest.mark.parametrize("what", ["exp_avg", "weight"])
def test_non_finite_checkpoint_is_not_resumed(tmp_path, what):
    run(tmp_path, {}, stop_after=5)
    folder = tmp_path / checkpoint.FOLDER / "step_000005"
    if what == "exp_avg":
        state = load_file(folder / "optimizer-00000.safetensors")
        state["exp_avg:model.embedding.weight"][0] = math.inf
        save_file(state, folder / "optimizer-00000.safetensors")
    else:
        stored = weights(tmp_path, "step_000005")
        stored["head.weight"][0] = math.nan
        save_file(stored, folder / "model.safetensors")
    named = "the optimizer's exp_avg of model.embedding.weight" if what == "exp_avg" else "head.weight"
    with pytest.raises(Exception, match=f"step_000005.*{named} is not finite .*resume=step_NNNNNN"):
        run(tmp_path, {})


def test_non_finite_model_is_not_written(tmp_path):
    model = Stored()
    with torch.no_grad():
        model.layers[0].bias[1] = -math.inf
    with pytest.raises(Exception, match=r"model.safetensors: tensor layers.0.bias is not finite"):
        save_model(tmp_path / "model", model.files())
    assert not (tmp_path / "model").exists()

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from raylib import engine_zero
from raylib.engine import OptimConfig, TorchEngine, build_optimizer, learning_rate, parameter_groups
from raylib.engine_zero import DeepSpeedEngine
from raylib.errors import UserError
from raylib.models.recompute import set_recomputation
from raylib.objectives.pretraining import ObjectiveConfig, UnifiedObjective
from raylib.runtime import set_deterministic
from tests.factories import make_batch, make_model, take_rows
from tests.test_not_finite_run import run
from tests.workers import run_workers


def test_lr_schedule_of_the_paper():
    config = OptimConfig(lr=1e-4)
    rates = [learning_rate(s, 240_000, config) for s in (0, 11_999, 23_999, 24_000, 131_999 + 1, 239_999)]
    assert rates == pytest.approx([1e-4 / 24_000, 5e-5, 1e-4, 1e-4, 5e-5, 1e-4 / 216_000])


def test_lr_schedule_without_warmup_and_of_one_step():
    assert learning_rate(0, 10, OptimConfig(lr=1.0, warmup=0)) == 1.0
    assert learning_rate(0, 1, OptimConfig(lr=1.0)) == 1.0


def test_lr_schedule_cosine_and_of_longer_run():
    """Half a cosine from lr to 0 (paper 4), as PyTorch's; IGLUE's schedule of 20 epochs over a run of 5."""
    config = OptimConfig(lr=1.0, warmup=0, decay="cosine")
    layer = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    peer = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for step in range(10):
        assert learning_rate(step, 10, config) == pytest.approx(peer.get_last_lr()[0])
        optimizer.step()
        peer.step()
    iglue = OptimConfig(lr=4e-5, warmup=0.1, schedule_factor=4)
    assert [learning_rate(s, 500, iglue) for s in (0, 199, 499)] == pytest.approx(
        [4e-5 / 200, 4e-5, 4e-5 * 1501 / 1800]
    )


def test_parameter_groups_exempt_biases_norms_and_scalars_from_decay():
    model = make_model()
    model.vision.requires_grad_(False)
    decayed, plain = parameter_groups(model, 0.2)
    assert decayed["weight_decay"] == 0.2
    assert plain["weight_decay"] == 0.0
    names = {id(p): n for n, p in model.named_parameters()}
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert {"temperature", "masked_head.bias", "embedding.norm.weight"} <= {
        names[id(p)] for p in plain["params"]
    }
    together = {names[id(p)] for g in (decayed, plain) for p in g["params"]}
    assert together == {n for n, p in model.named_parameters() if not n.startswith("vision")}


def test_adamw_equals_the_formula():
    torch.manual_seed(0)
    layer, config = nn.Linear(3, 2).double(), OptimConfig(lr=0.01, weight_decay=0.2)
    weight, m, v = layer.weight.detach().clone(), 0.0, 0.0
    optimizer = build_optimizer(parameter_groups(layer, config.weight_decay), config)
    for t in range(1, 4):
        layer.zero_grad()
        (layer(torch.ones(1, 3).double() * t) ** 2).sum().backward()
        g = layer.weight.grad.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        step = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + config.eps)
        weight = weight * (1 - 0.01 * 0.2) - 0.01 * step
        torch.testing.assert_close(layer.weight.detach(), weight)


def train(engine_class, rank, world, bf16=False, recompute=("none", 1), optim=None, **settings):
    """Losses of the last of four steps of this worker's rows, and the weights after them."""
    model = make_model(dtype=torch.float32)
    set_recomputation(model, *recompute)
    objective = UnifiedObjective(model, ObjectiveConfig())
    cpu = torch.device("cpu")
    engine = engine_class(objective, optim or OptimConfig(), cpu, bf16, None, **settings)
    for step in range(4):
        terms = engine.step(take_rows(make_batch(step, 6, 6, 6), rank, world), step, 1e-3)
    return terms, {name: value.detach().clone() for name, value in objective.model.state_dict().items()}


def train_both_ways(rank, world):
    """By `fit.sharding` and `fit.gradient_dtype`; ZeRO also with buckets smaller than a worker's share."""
    os.environ["LOCAL_RANK"] = str(rank)
    found = {}
    for dtype in ("float32", "bfloat16"):
        for bf16 in (False, True):
            found["none", dtype, bf16] = train(TorchEngine, rank, world, bf16, gradient_dtype=dtype)
            for name, megabytes in (("zero2", 25), ("zero2, small buckets", 0.001)):
                engine_zero.BUCKET_MB = megabytes
                found[name, dtype, bf16] = train(DeepSpeedEngine, rank, world, bf16, gradient_dtype=dtype)
    return found


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_sharding_changes_nothing_and_gradient_dtype_rounds(world):
    for found in run_workers(train_both_ways, world):
        for (name, dtype, bf16), (terms, weights) in found.items():
            plain_terms, plain_weights = found["none", "float32", bf16]
            # steps in bf16 make more of a difference of rounding, and so do gradients in it
            limits = {"float32": (1e-2, 3e-5) if bf16 else (1e-5, 1e-6), "bfloat16": (2e-2, 1e-4)}[dtype]
            for key, value in terms.items():
                expected = pytest.approx(float(plain_terms[key]), rel=limits[0])
                assert float(value) == expected, (name, dtype, key)
            # AdamW moves a weight by up to its rate, 1e-3 a step, even where a gradient that is 0 but for
            # rounding, as that of keys' biases, changes its sign: their mean says what happens to weights
            errors = torch.cat([(weights[key] - value).flatten() for key, value in plain_weights.items()])
            error = float(errors.abs().mean())
            assert error < limits[1], (name, dtype, bf16)
            assert dtype == "float32" or error > 1e-7, "nothing was rounded on its way"


def train_with_clips(rank, world):
    os.environ["LOCAL_RANK"] = str(rank)
    clips = (1e9, 0, None, 0.01)
    return {
        (engine.name, clip): train(engine, rank, world, optim=OptimConfig(eps=1e-2, clip=clip))
        for engine in (TorchEngine, DeepSpeedEngine)
        for clip in clips
    }


def test_clipping_of_0_or_null_scales_no_gradient():
    """A large epsilon lets AdamW's steps tell how long a gradient is."""
    for found in run_workers(train_with_clips, 2):
        for engine in ("torch", "deepspeed"):
            terms, free = found[engine, 1e9]
            for clip in (0, None):
                assert float(found[engine, clip][0]["grad_norm"]) == float(terms["grad_norm"]) > 0.01
                for name, value in free.items():
                    torch.testing.assert_close(found[engine, clip][1][name], value, rtol=0, atol=0)
            clipped = found[engine, 0.01][1]
            assert any(not torch.allclose(clipped[name], value) for name, value in free.items())


def train_recomputing(rank, world):
    os.environ["LOCAL_RANK"] = str(rank)
    ways = [("none", 1), ("blocks", 1), ("all", 1), ("none", 2)]
    return [
        train(engine, rank, world, recompute=way) for engine in (TorchEngine, DeepSpeedEngine) for way in ways
    ]


def test_engines_take_what_is_computed_twice():
    """Checkpointed blocks and micro-batches under DDP, whose graph is static, and under ZeRO-2."""
    for found in run_workers(train_recomputing, 2):
        for terms, weights in found[1:]:
            for name, value in found[0][0].items():
                assert float(terms[name]) == pytest.approx(float(value), rel=1e-5), name
            errors = torch.cat([(weights[name] - value).flatten() for name, value in found[0][1].items()])
            assert float(errors.abs().mean()) < 1e-6


@pytest.fixture
def deterministic():
    set_deterministic(True)
    yield
    set_deterministic(False)


def test_deterministic_step_is_the_same_step(deterministic):
    terms, weights = train(TorchEngine, 0, 1)
    set_deterministic(False)
    plain_terms, plain_weights = train(TorchEngine, 0, 1)
    for name, value in plain_terms.items():
        torch.testing.assert_close(terms[name], value)
    for name, value in plain_weights.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-6, atol=1e-8)


def test_deterministic_names_what_has_no_such_kernel(deterministic, tmp_path, monkeypatch):
    monkeypatch.setattr(
        TorchEngine, "step", lambda *_: torch.zeros(2).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    )
    with pytest.raises(UserError, match="^step 0: put_ does not have .*; fit.deterministic=false goes on"):
        run(tmp_path, {})


STEP_WITHOUT_COMPILER = """
import sys
import torch
from raylib.engine import OptimConfig, build_optimizer, parameter_groups
from raylib.runtime import set_deterministic

set_deterministic(False)
layer = torch.nn.Linear(2, 1)
optimizer = build_optimizer(parameter_groups(layer, 0.1), OptimConfig())
layer(torch.ones(1, 2)).sum().backward()
optimizer.step()
optimizer.zero_grad()
assert "torch._dynamo" not in sys.modules
"""


def test_optimizer_imports_no_compiler():
    """PyTorch's own takes 1.4 CPU-seconds of each start for it."""
    run = subprocess.run([sys.executable, "-c", STEP_WITHOUT_COMPILER], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

"""The estimate of a step's memory against counted bytes, and what it says of the recipes."""

from pathlib import Path

import pytest
import torch

from benchmarks.device import GPU, simulated_gpu
from benchmarks.dry import Counter
from benchmarks.step import MEANS, make_batch
from pretrain.recipes import base, small
from raylib.config import override
from raylib.data.loading import to_device
from raylib.engine import BUCKET_MB
from raylib.memory import (
    BUCKET,
    GB,
    LOGITS_SHARE,
    MEAN_TOKENS,
    StepSize,
    count_parameters,
    estimate_memory,
    find_settings,
    image_tokens,
)
from raylib.models.heads import MEMORY_SHARE
from raylib.models.recompute import set_recomputation
from raylib.models.unified import UnifiedModel
from raylib.objectives.pretraining import UnifiedObjective
from raylib.precision import set_residual
from raylib.settings import ModelConfig, ObjectiveConfig, SwinSizes
from tests.live_bytes import LiveBytes

THIN = ModelConfig(
    vocabulary=3000,
    width=256,
    heads=4,
    feedforward=1024,
    text_layers=2,
    fusion_layers=2,
    vision_layers=2,
    image_size=64,
    patch=8,
)


def count(model, batch, objective=None, micro_batches=1, bf16=True, residual=None, backward=True):
    """Bytes kept for backward, and the most at a time, of a step on a simulated GPU."""
    torch.manual_seed(0)
    with torch.device("meta"):
        module = UnifiedModel(model)
    with simulated_gpu(), Counter():
        module = module.to(GPU).train()
        set_recomputation(module, model.checkpointing, micro_batches)
        set_residual(module, residual)
        step = UnifiedObjective(module, objective or ObjectiveConfig())
        on_device = to_device(make_batch(model, batch), GPU)
        with LiveBytes(on_gpu=True) as memory:
            with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
                loss, _ = step(on_device)
            kept = memory.live
            if backward:
                torch.autograd.backward(loss)
    return kept, memory.peak


def assert_estimated(model, batch, objective=None, micro_batches=1, bf16=True, residual=None, backward=True):
    kept, peak = count(model, batch, objective, micro_batches, bf16, residual, backward)
    estimate = estimate_memory(
        model,
        objective or ObjectiveConfig(),
        StepSize.of_batch(make_batch(model, batch), 1),
        micro_batches=micro_batches,
        bf16=bf16,
        residual=residual,
    )
    figures = {name: round(value / 1e6, 1) for name, value in estimate.kept.items()}
    working = estimate.peak - estimate.states
    assert sum(estimate.kept.values()) == pytest.approx(kept, rel=0.1), (kept / 1e6, figures)
    # gradients come one by one in backward; the estimate has all of them throughout, as from the step before
    assert 0.9 * working <= peak <= 1.1 * (working + estimate.gradients), (peak / 1e6, working / 1e6, figures)


CASES = {
    "none": ({}, {}, {}),
    "blocks": ({"checkpointing": "blocks"}, {}, {}),
    "pieces": ({}, {}, {"micro_batches": 2}),
}
MORE_CASES = {
    "all": ({"checkpointing": "all"}, {}, {}),
    "blocks and pieces": ({"checkpointing": "blocks"}, {}, {"micro_batches": 3}),
    "float32": ({}, {}, {"bf16": False}),
    "float32 residual": ({}, {}, {"residual": "float32"}),
    "no dropout": ({"dropout": 0.0}, {}, {}),
    "every fourth": ({}, {"fuse_every": 4}, {}),
    "clean": ({}, {"itm_text": "clean", "tlm_source": "masked"}, {}),
    "frozen vision": ({}, {"train_vision": False}, {}),
    "entangled": ({"fusion": "entangled"}, {}, {}),
    "windows": ({"vision_window": 32, "vision_width": 128}, {}, {}),
}


def assert_case_estimated(case):
    changes, objective, settings = case
    model = THIN.model_copy(update=changes)
    assert_estimated(model, (64, 128, 128), ObjectiveConfig(**objective), **settings)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_memory_estimate_is_within_a_tenth_of_counted_bytes(case):
    assert_case_estimated(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_CASES.values(), ids=MORE_CASES)
def test_memory_estimate_of_other_settings_is_within_a_tenth_of_counted_bytes(case):
    assert_case_estimated(case)


WHOLE = {
    f"{recipe.__name__} {name}": (recipe, changes, micro_batches)
    for recipe in (small, base)
    for name, changes, micro_batches in (
        ("none", {}, 1),
        ("blocks", {"checkpointing": "blocks"}, 1),
        ("pieces", {}, 4),
    )
}


@pytest.mark.slow
@pytest.mark.parametrize("case", WHOLE.values(), ids=WHOLE)
def test_memory_estimate_of_recipes_is_within_a_tenth_of_counted_bytes(case):
    recipe, changes, micro_batches = case
    model = recipe().model.model_copy(update={"checkpointing": "none", **changes})
    # half of the paper's batch: of more pairs the simulated GPU draws no negatives
    assert_estimated(model, (256, 1024, 1024), micro_batches=micro_batches)


@pytest.mark.parametrize(
    "changes",
    [{}, {"fusion": "entangled"}, {"vision_window": 32, "vision_width": 128}, {"text_layers": 5}],
)
def test_parameters_are_counted_exactly(changes):
    for config in (THIN.model_copy(update=changes), base().model, small().model):
        with torch.device("meta"):
            model = UnifiedModel(config)
        assert sum(count_parameters(config).values()) == sum(p.numel() for p in model.parameters())


def test_parameters_and_tokens_of_a_swin_are_counted():
    config = ModelConfig(vocabulary=100, swin=SwinSizes(), patch=4, image_size=224)
    with torch.device("meta"):
        model = UnifiedModel(config)
    counted = sum(p.numel() for p in model.vision.parameters())
    assert count_parameters(config)["vision"] == pytest.approx(counted, rel=0.01)
    assert image_tokens(config) == 1 + 7 * 7


def test_constants_are_those_of_the_code():
    assert (BUCKET, LOGITS_SHARE, MEAN_TOKENS) == (BUCKET_MB * 2**20, MEMORY_SHARE, MEANS)


def needed(recipe, *changes, workers=1, sharding="none", gpu=24):
    config = override(recipe(), list(changes))
    rows = {name: stream.batch for name, stream in config.data.streams.items()}
    estimate = estimate_memory(
        config.model,
        config.objective,
        StepSize.of_rows(rows, workers),
        sharding=sharding,
        micro_batches=config.fit.micro_batches,
        gpu=gpu * GB,
    )
    return estimate.needed / GB


ROWS = [  # recipe, workers, GB of each one's GPU, settings
    (small, 1, 24, ()),
    (small, 1, 24, ("fit.micro_batches=2", "model.checkpointing=none")),
    (small, 1, 80, ("model.checkpointing=none",)),
    (base, 8, 80, ()),
    (base, 8, 24, ("model.checkpointing=blocks",)),
    (base, 1, 80, ("model.checkpointing=blocks",)),
    (base, 1, 80, ("fit.micro_batches=2",)),
    (base, 1, 24, ("model.checkpointing=blocks", "fit.micro_batches=4")),
]


def test_pretraining_page_has_the_estimates():
    page = (Path(__file__).resolve().parent.parent / "docs" / "pretraining.md").read_text(encoding="utf-8")
    table = page.partition("<!-- memory -->\n")[2].partition("<!-- /memory -->")[0]
    rows = ["| recipe | GPUs | settings | about GB each |", "|-|-|-|-:|"]
    for recipe, workers, gpu, changes in ROWS:
        sharding = "zero2" if workers > 1 else "none"
        size = needed(recipe, *changes, workers=workers, sharding=sharding, gpu=gpu)
        assert size < gpu
        settings = " ".join(f"`{change}`" for change in changes) or "as it is"
        rows.append(f"| `{recipe.__name__}` | {workers} x {gpu} GB | {settings} | {size:.0f} |")
    assert table.splitlines() == rows, "\n".join(rows)


def test_small_fits_one_gpu_of_24_gb_as_it_is():
    assert needed(small) < 14
    assert needed(small, "model.checkpointing=none") > 24


def test_base_fits_eight_gpus_of_24_gb_and_one_of_80_gb():
    blocks = "model.checkpointing=blocks"
    assert needed(base, blocks, workers=8, sharding="zero2") < 12
    assert needed(base, blocks, gpu=80) < 32 and needed(base, "fit.micro_batches=2", gpu=80) < 40
    assert needed(base, gpu=80) > 80
    assert needed(base, blocks, "fit.micro_batches=4") < 24


def test_sharding_saves_optimizer_states_and_gradients():
    config = base()
    size = StepSize.of_rows({"image_text": 512, "parallel": 2048, "text": 2048}, 8)
    whole, shared = (
        estimate_memory(config.model, config.objective, size, sharding=sharding)
        for sharding in ("none", "zero2")
    )
    assert shared.optimizer == pytest.approx(whole.optimizer * 1.5 / 8)
    assert shared.weights == whole.weights and shared.gradients < whole.gradients
    assert shared.kept == whole.kept


def test_settings_are_found_that_cost_least():
    config = base()
    size = StepSize.of_rows({"image_text": 512, "parallel": 2048, "text": 2048}, 1)
    found = {gpu: find_settings(config.model, config.objective, size, gpu * GB) for gpu in (200, 80, 16, 4)}
    assert [(c, n) for c, n, _ in found[200]] == [("none", 1)]
    assert [(c, n) for c, n, _ in found[80]] == [("blocks", 1), ("none", 2)]
    assert all(estimate.needed <= 16 * GB for _, _, estimate in found[16])
    assert found[4] == []

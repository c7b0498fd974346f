"""Recomputation in backward: equal losses and gradients, and the memory that it saves."""

import contextlib

import pytest
import torch

from raylib.errors import UserError
from raylib.models import BACKBONES, recompute
from raylib.models.recompute import set_recomputation
from raylib.models.swin import SwinSizes
from raylib.monitoring import read_metrics
from raylib.objectives.pretraining import ObjectiveConfig, UnifiedObjective
from raylib.packed import Ragged
from tests.factories import make_batch, make_model, take_rows
from tests.live_bytes import LiveBytes
from tests.workers import assert_workers_equal_one, run_workers

SWIN = {"swin": SwinSizes(width=8, layers=(1, 1), heads=(1, 2)), "patch": 2}
MODELS = {"vit": {}, "swin": SWIN, "entangled": {"fusion": "entangled"}, "windows": {"vision_window": 8}}


def step(model, batch, config=None, memory=None):
    """(loss, its terms, gradients by name) of a step; bytes kept for backward and at most, if counted."""
    objective = UnifiedObjective(model, config or ObjectiveConfig()).train()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    with memory or contextlib.nullcontext():
        loss, terms = objective(batch)
        kept = memory and memory.live
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), terms, gradients, (kept, memory and memory.peak)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("checkpointing", ["blocks", "all"])
def test_checkpointing_changes_no_bit(changes, checkpointing):
    model = make_model(dtype=torch.float32, dropout=0.2, **changes)
    loss, _, gradients, _ = step(model, make_batch())
    set_recomputation(model, checkpointing)
    again, _, recomputed, _ = step(model, make_batch())
    assert torch.equal(loss, again)
    assert gradients.keys() == recomputed.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_checkpointing_all_keeps_less_than_blocks_keeps_less_than_none():
    sizes = dict(width=32, feedforward=128, text_layers=4, fusion_layers=4, vision_layers=4)
    model = make_model(dropout=0.1, **sizes)
    batch, kept = make_batch(pairs=24, translations=24, mono=24), {}
    for checkpointing in ("none", "blocks", "all"):
        set_recomputation(model, checkpointing)
        kept[checkpointing] = step(model, batch, memory=LiveBytes())[3]
    (none, peak_none), (blocks, peak_blocks), (everything, peak_all) = kept.values()
    assert everything < 0.5 * blocks and blocks < 0.2 * none, kept
    assert peak_all < peak_blocks < 0.3 * peak_none, kept


CONFIGS = {
    "paper": {},
    "masked ucl, clean itm": {"ucl_text": "masked", "itm_text": "clean"},
    "every third": {"fuse_every": 3},
    "frozen vision": {"train_vision": False},
}


@pytest.mark.parametrize("switches", CONFIGS.values(), ids=CONFIGS)
def test_micro_batches_equal_the_whole_batch(switches):
    assert_pieces_equal_the_whole({}, switches, ((2, "none"), (4, "blocks"), (100, "none")))


@pytest.mark.parametrize("changes", list(MODELS.values())[1:], ids=list(MODELS)[1:])
def test_micro_batches_equal_the_whole_batch_of_other_models(changes):
    assert_pieces_equal_the_whole(changes, {}, ((3, "all"),))


def assert_pieces_equal_the_whole(changes, switches, settings):
    batch, config = make_batch(pairs=9, translations=11, mono=5), ObjectiveConfig(**switches)
    model = make_model(**changes)
    loss, terms, gradients, _ = step(model, batch, config)
    for micro_batches, checkpointing in settings:
        set_recomputation(model, checkpointing, micro_batches)
        again, terms_again, pieced, _ = step(model, batch, config)
        torch.testing.assert_close(again, loss, rtol=1e-10, atol=1e-10)
        for name, value in terms.items():
            torch.testing.assert_close(terms_again[name], value, rtol=1e-6, atol=1e-6)
        assert gradients.keys() == pieced.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(pieced[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


def on_share(rank, world, micro_batches):
    model = make_model()
    set_recomputation(model, "none", micro_batches)
    batch = take_rows(make_batch(pairs=8, translations=12, mono=6), rank, world)
    return step(model, batch)[1:3]


def test_micro_batches_on_three_workers_equal_the_whole_batch_on_one():
    assert_workers_equal_one(run_workers(on_share, 3, 3), on_share(0, 1, 1))


def test_micro_batches_draw_dropout_again_as_they_drew_it(monkeypatch):
    model = make_model(dropout=0.3)
    set_recomputation(model, "blocks", 3)
    loss, _, gradients, _ = step(model, make_batch())
    # the same pieces, kept
    monkeypatch.setattr(recompute, "checkpoint", lambda function, *args, use_reentrant: function(*args))
    again, _, kept, _ = step(model, make_batch())
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in kept.items())


def test_micro_batches_take_the_memory_of_one_piece_and_run_one_by_one():
    sizes = dict(width=32, feedforward=128, vision_layers=4)
    model, batch, peaks = make_model(**sizes), make_batch(pairs=32, translations=32, mono=32), {}
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    runs = []
    encode = model.vision._encode

    def note_run(images):
        runs.append((torch._C._current_graph_task_id() >= 0, int(images.long().sum())))  # in backward?
        return encode(images)

    model.vision._encode = note_run
    for n in (1, 4, 16):
        runs.clear()
        set_recomputation(model, "none", n)
        peaks[n] = step(model, batch, memory=LiveBytes())[3][1] - weights  # gradients
    assert peaks[4] < 0.45 * peaks[1] and peaks[16] < 0.3 * peaks[1], peaks
    forward, backward = ([x for again, x in runs if again is when] for when in (False, True))
    assert len(forward) == 16 and backward == forward[::-1]


@pytest.mark.parametrize("kind", ["uc2", "m3p", "oscar", "mclip", "clip"])
def test_recomputation_of_other_backbones_changes_nothing(kind):
    torch.manual_seed(0)
    sizes = BACKBONES[kind].sizes["tiny"]
    if kind != "clip":
        sizes = sizes.model_copy(update={"dropout": 0.0})
    model = BACKBONES[kind](sizes).double().train()
    text = Ragged(torch.randint(5, 90, (23,)), torch.tensor([4, 7, 3, 9]))

    def gradients():
        model.zero_grad(set_to_none=True)
        if kind in ("mclip", "clip"):
            images = torch.randint(0, 256, (4, 16, 16, 3), generator=torch.Generator().manual_seed(1))
            images = model.encode_images(images.to(torch.uint8))
            loss = (model.embed_images(images, normalize=True) * model.embed_text(text, normalize=True)).sum()
        else:
            regions = torch.rand(10, 13, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            memory = model.embed_regions(Ragged(regions, torch.tensor([3, 2, 4, 1])))
            loss = model.fused_cls(text, memory).square().sum()
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    for checkpointing, micro_batches in (("blocks", 1), ("all", 1), ("none", 3)):
        set_recomputation(model, checkpointing, micro_batches)
        again = gradients()
        assert again.keys() == plain.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(again[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


def test_recomputation_of_a_foreign_encoder_is_refused():
    model = torch.nn.Linear(2, 2)
    set_recomputation(model, "none", 1)
    for settings in (("blocks", 1), ("none", 2)):
        with pytest.raises(UserError, match="Linear has no encoder of ours"):
            set_recomputation(model, *settings)


def test_recomputation_of_frozen_layers_changes_no_bit():
    """As scheduled unfreezing leaves them: layers that get no gradient for now, below some that do."""
    model = make_model(dtype=torch.float32, dropout=0.2)
    model.embedding.requires_grad_(False)
    model.text.blocks[0].requires_grad_(False)
    model.vision.blocks[1].requires_grad_(False)
    loss, _, gradients, _ = step(model, make_batch())
    assert "text.blocks.0.output.weight" not in gradients and "text.blocks.1.output.weight" in gradients
    for checkpointing in ("blocks", "all"):
        set_recomputation(model, checkpointing)
        again, _, recomputed, _ = step(model, make_batch())
        assert torch.equal(loss, again) and gradients.keys() == recomputed.keys()
        assert all(torch.equal(recomputed[name], gradient) for name, gradient in gradients.items())


def test_finetuning_recomputes_as_its_settings_say(finetune, tmp_path):
    losses = []
    for name in ("none", "blocks"):
        settings = ("runtime=local", "epochs=1", "run_test=false", f"checkpointing={name}")
        code, printed = finetune("scenes_xvnli", f"name={name}", *settings)
        assert code == 0, printed
        records = read_metrics(tmp_path / name)
        losses.append([record["loss/task"] for record in records if "loss/task" in record])
    assert losses[0] and losses[0] == losses[1]

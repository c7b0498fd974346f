"""CCLM as a backbone: Swin, sizes, published checkpoints."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import SwinConfig, SwinModel

from raylib.cache import fingerprint_module
from raylib.errors import UserError
from raylib.models import BACKBONES
from raylib.models.cclm import PIXELS
from raylib.models.finetuned import FinetuneModel
from raylib.models.swin import SwinSizes, interpolate_bias
from raylib.models.unified import ModelConfig, UnifiedModel
from raylib.packed import Ragged
from tests.factories import SMALL, make_model

SWIN = dict(embed_dim=16, depths=[2, 2], num_heads=[2, 4], patch_size=2)  # images: multiples of 4


def shaken(model):
    """`model` with weights far from those it starts with, biases of relative positions too."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def swin_model(size=16, window=4):
    return shaken(SwinModel(SwinConfig(**SWIN, image_size=size, window_size=window), add_pooling_layer=False))


def swin_config(**changes) -> ModelConfig:
    """A small model whose Swin is as wide, after its last stage, as its text."""
    sizes = {"swin": SwinSizes(width=16, layers=(2, 2), heads=(2, 4)), "patch": 2, "width": 32, **changes}
    return ModelConfig(**{**SMALL.model_dump(), **sizes})


def images(n=3, size=16):
    return torch.randint(
        0, 256, (n, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5)
    )


@pytest.mark.parametrize("width", [32, 48])
def test_swin_states_equal_transformers_behind_their_mean(width):
    peer, model = swin_model(), UnifiedModel(swin_config(width=width, **PIXELS)).eval()
    model.vision.swin.load_state_dict(peer.state_dict())
    mean, deviation = (torch.tensor(PIXELS[name]).view(3, 1, 1) for name in ("pixel_mean", "pixel_std"))
    expected = peer((images().permute(0, 3, 1, 2) - mean) / deviation).last_hidden_state
    expected = torch.cat([expected.mean(1, keepdim=True), expected], 1)
    if width == 48:
        expected = expected @ model.vision.output.weight.T + model.vision.output.bias
    states = model.encode_images(images())
    assert states.lengths.tolist() == [1 + 16] * 3  # a grid of 4 x 4
    torch.testing.assert_close(states.values.view(3, 17, width), expected)


def test_swin_resize_changes_windows_and_interpolates_biases():
    model = UnifiedModel(swin_config()).eval()
    shaken(model.vision)
    before, mark = (
        {k: v.clone() for k, v in model.vision.state_dict().items()},
        fingerprint_module(model.vision),
    )
    model.resize_images(16)
    assert fingerprint_module(model.vision) == mark
    model.resize_images(24)  # windows of 6 and no longer 4
    assert model.config.image_size == 24 and model.encode_images(images(size=24)).lengths.tolist() == [37] * 3
    for name, value in model.vision.state_dict().items():
        if name.endswith("bias_table"):
            assert len(before[name]) == 7**2 and len(value) == 11**2
            middle = [len(table) // 2 for table in (before[name], value)]  # a patch seen from itself
            torch.testing.assert_close(value[middle[1]], before[name][middle[0]])
        else:
            assert value.equal(before[name]), name
    assert fingerprint_module(model.vision) != mark
    with pytest.raises(UserError, match="image_size=26 is not a multiple of the model's patch, 4"):
        model.resize_images(26)
    with pytest.raises(ValueError, match="multiple of the 4 pixels"):
        swin_config(image_size=18)
    with pytest.raises(ValueError, match="same stages"):
        SwinSizes(layers=(2, 2))


def test_swin_without_transformers_names_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="transformers is not installed: pip install"):
        UnifiedModel(swin_config())


def test_swin_bias_interpolation_keeps_constants_and_size():
    table = torch.randn(7**2, 2)
    assert interpolate_bias(table, 49) is table
    assert interpolate_bias(table, 13**2).shape == (169, 2)
    torch.testing.assert_close(interpolate_bias(torch.full((9, 1), 0.5), 25), torch.full((25, 1), 0.5))


def test_swin_bias_interpolation_equals_cclms():
    """CCLM's `interpolate_relative_pos_embed` (models/swin_transformer.py), run with SciPy 1.11.4, whose
    `interp2d` later versions do not have, on these tables: window a -> b is stored as "a_b"."""
    with np.load(Path(__file__).parent / "data/beit_spline.npz") as stored:
        for name, expected in stored.items():
            old, new = map(int, name.split("_"))
            rows = (2 * old - 1) ** 2
            table = torch.sin(torch.arange(2 * rows, dtype=torch.float64) ** 1.5).view(rows, 2).float()
            found = interpolate_bias(table, (2 * new - 1) ** 2)
            torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-6, rtol=1e-6)


def test_swin_saves_and_loads_also_older_exports(tmp_path):
    model = UnifiedModel(swin_config())
    model.save(tmp_path / "swin")
    again = UnifiedModel.from_pretrained(tmp_path / "swin")
    assert again.config == model.config
    assert all(value.equal(again.state_dict()[name]) for name, value in model.state_dict().items())
    make_model(dtype=torch.float32).save(tmp_path / "old")
    values = json.loads((tmp_path / "old/config.json").read_text())
    del values["swin"]
    (tmp_path / "old/config.json").write_text(json.dumps(values))
    assert UnifiedModel.from_pretrained(tmp_path / "old").config == SMALL


def count(model) -> dict[str, int]:
    parts: dict[str, int] = {}
    for name, p in model.named_parameters():
        parts[name.split(".")[0]] = parts.get(name.split(".")[0], 0) + p.numel()
    return parts


def block(d: int, f: int, cross: bool) -> int:
    """Parameters of a layer: attentions (4 d^2 + 4 d) with their norms, feed-forward (2 d f + f + d) with its
    norm."""
    return (2 if cross else 1) * (4 * d * d + 4 * d + 2 * d) + 2 * d * f + f + d + 2 * d


@pytest.mark.parametrize(("name", "d", "f", "text"), [("cclm", 768, 3072, 12), ("cclm_swin", 1024, 4096, 6)])
def test_cclm_base_has_published_parameter_counts(name, d, f, text):
    backbone = BACKBONES[name]
    with torch.device("meta"):
        model = backbone(backbone.sizes["base"])
    parts = count(model)
    assert model.kind == name and model.num_layers == text + 6 and model.num_fusion_layers == 6
    assert parts["text"] == text * block(d, f, False) and parts["fusion"] == 6 * block(d, f, True)
    # Linear, LayerNorm, GELU, Linear; twice the width
    assert parts["match_head"] == 2 * d * d + 2 * d + 4 * d + 2 * 2 * d + 2
    assert parts["embedding"] == (250002 + backbone.sizes["base"].positions) * d + 2 * d
    if name == "cclm":
        # ViT-B/16 at 224: patches, CLS and 14 x 14 positions, 12 layers, a norm
        assert (
            parts["vision"]
            == 16 * 16 * 3 * d + d + d + 197 * d + 12 * block(d, f, False) + 2 * d
            == 85_798_656
        )
        assert parts["text"] + parts["fusion"] == 141_765_120 and sum(parts.values()) == 422_383_253
    else:
        # Swin-B (Liu et al., table 7: 88 M, of which the classifier of 1000 classes is 1.0 M)
        assert parts["vision"] + 1024 * 1000 + 1000 == 87_768_224
    depths = {model.depth_of(name) for name, _ in model.named_parameters()}
    assert depths == {None, *range(text + 6 + 1)}


@pytest.mark.parametrize("name", ["cclm", "cclm_swin"])
def test_cclm_tiny_runs_and_gives_every_parameter_a_depth(name, tmp_path):
    backbone = BACKBONES[name]
    torch.manual_seed(0)
    model = backbone(backbone.sizes["tiny"]).eval()
    text = Ragged(torch.randint(5, 12000, (9,)), torch.tensor([5, 4]))
    condition = model.encode_images(images(2))
    cls = model.fused_cls(text, condition)
    whole = model.fused_states(text, condition)
    torch.testing.assert_close(whole.values[[0, 5]], cls, atol=1e-5, rtol=1e-4)
    assert model.depth_of("text.blocks.0.output.weight") == 1 and model.depth_of("embedding.word.weight") == 0
    assert model.depth_of(f"fusion.blocks.{model.num_fusion_layers - 1}.cross_norm.bias") == model.num_layers
    assert all(model.depth_of(n) is None for n, _ in model.named_parameters() if n.startswith("vision."))
    tuned = FinetuneModel(model, ("a", "b"), 1, 0.0).eval()
    tuned.save(tmp_path)
    again = FinetuneModel.from_pretrained(tmp_path).eval()
    assert again.backbone.kind == name
    inputs = {"text": text, "images": images(2)}
    assert torch.equal(again(inputs), tuned(inputs))

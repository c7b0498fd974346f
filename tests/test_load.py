"""Initialising from checkpoints in Hugging Face format, with `transformers` itself as the peer."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ViTConfig,
    ViTModel,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

from raylib.errors import UserError
from raylib.models.hf_weights import load_text, load_vision, text_sizes
from raylib.models.unified import ModelConfig, UnifiedModel
from raylib.models.vision import interpolate
from raylib.packed import Ragged
from tests.factories import SMALL

SIZES = dict(vocab_size=60, hidden_size=16, num_attention_heads=2, intermediate_size=24)


def peer_text(kind, layers, positions):
    torch.manual_seed(1)
    config, model = (
        (XLMRobertaConfig, XLMRobertaForMaskedLM) if kind == "xlmr" else (BertConfig, BertForMaskedLM)
    )
    eps = SMALL.eps
    peer = model(
        config(**SIZES, num_hidden_layers=layers, max_position_embeddings=positions, layer_norm_eps=eps)
    ).eval()
    with torch.no_grad():
        for p in peer.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return peer


def our_rows(ids):
    lengths = torch.tensor([len(row) for row in ids])
    return Ragged(torch.cat(ids), lengths)


@pytest.mark.parametrize(("kind", "positions"), [("xlmr", 20), ("bert", 16)])
def test_load_text_states_equal_transformers(tmp_path, kind, positions):
    peer = peer_text(kind, 4, positions)
    peer.save_pretrained(tmp_path)
    model = UnifiedModel(SMALL).eval()
    load_text(model, tmp_path)
    ids = [torch.randint(5, 60, (n,)) for n in (3, 9, 9, 14, 5)]
    rows = our_rows(ids)
    unimodal = model.encode_text(rows)
    unified = model.fuse(rows.with_values(unimodal))
    head = model.masked_head(unified) @ model.embedding.word.weight.T + model.masked_head.bias
    start = 0
    for row in ids:
        out = peer(row[None], output_hidden_states=True)
        part = slice(start, start + len(row))
        torch.testing.assert_close(unimodal[part], out.hidden_states[2][0], atol=1e-5, rtol=0)
        torch.testing.assert_close(unified[part], out.hidden_states[4][0], atol=1e-5, rtol=0)
        torch.testing.assert_close(head[part], out.logits[0], atol=1e-4, rtol=0)
        start += len(row)


def test_load_text_copies_first_and_last_layers_and_cross_attention(tmp_path):
    peer = peer_text("xlmr", 6, 20)
    peer.save_pretrained(tmp_path)
    model = UnifiedModel(SMALL)
    load_text(model, tmp_path)
    layers = peer.roberta.encoder.layer
    for block, layer in zip(
        [*model.text.blocks, *model.fusion.blocks], [*layers[:2], *layers[4:]], strict=True
    ):
        torch.testing.assert_close(block.attention.query.weight, layer.attention.self.query.weight)
    for block in model.fusion.blocks:
        for name, parameter in block.cross_attention.named_parameters():
            torch.testing.assert_close(parameter, block.attention.get_parameter(name))
        torch.testing.assert_close(block.cross_norm.weight, block.attention_norm.weight)


@pytest.mark.parametrize("size", [16, 32])
def test_load_vision_equals_transformers_and_interpolates(tmp_path, size):
    torch.manual_seed(2)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=16,
        patch_size=8,
    )
    peer = ViTModel(config).eval()
    with torch.no_grad():
        for p in peer.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    peer.save_pretrained(tmp_path)
    model = UnifiedModel(SMALL.model_copy(update={"image_size": size})).eval()
    load_vision(model, tmp_path)
    images = torch.randint(0, 256, (3, size, size, 3), dtype=torch.uint8)
    ours = model.encode_images(images).values.view(3, -1, 16)
    pixels = (images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    peer_states = peer(pixels, interpolate_pos_encoding=size != 16).last_hidden_state
    torch.testing.assert_close(ours, peer_states, atol=2e-5, rtol=0)


def test_interpolate_keeps_the_cls_position():
    positions = torch.randn(1 + 4, 3)
    assert interpolate(positions, 9).shape == (10, 3)
    torch.testing.assert_close(interpolate(positions, 9)[0], positions[0])
    assert interpolate(positions, 4) is positions


def test_load_text_layers_can_be_selected_and_repeated(tmp_path):
    peer = peer_text("bert", 5, 20)
    peer.save_pretrained(tmp_path)
    model = UnifiedModel(SMALL)
    load_text(model, tmp_path, layers=(0, 4, 3, 4))
    peer_layers = peer.base_model.encoder.layer
    for block, layer in zip([*model.text.blocks, *model.fusion.blocks], (0, 4, 3, 4), strict=True):
        assert torch.equal(block.intermediate.weight, peer_layers[layer].intermediate.dense.weight)
        assert torch.equal(block.attention.query.weight, peer_layers[layer].attention.self.query.weight)
    for wrong in ((0, 4, 3), (0, 5, 3, 4)):
        with pytest.raises(UserError, match=r"layers \[0, .*\] of its 5; 4 from 0 to 4 are wanted"):
            load_text(model, tmp_path, layers=wrong)


def test_load_text_missing_unused_and_misshapen_tensors_are_listed(tmp_path):
    from safetensors.torch import load_file, save_file

    peer_text("xlmr", 4, 20).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["roberta.encoder.layer.1.output.dense.bias"]
    weights["roberta.adapter.weight"] = torch.zeros(2)
    weights["lm_head.dense.bias"] = torch.zeros(3)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as e:
        load_text(UnifiedModel(SMALL), tmp_path)
    message = str(e.value)
    assert "missing encoder.layer.1.output.dense.bias" in message
    assert "unused adapter.weight" in message
    assert "lm_head.dense.bias is (3,), wanted (16,)" in message
    assert "\n" not in message


def test_load_text_too_few_layers_or_positions_is_an_error(tmp_path):
    peer_text("xlmr", 3, 20).save_pretrained(tmp_path / "few")
    with pytest.raises(UserError, match="3 layers, the model wants 4"):
        load_text(UnifiedModel(SMALL), tmp_path / "few")
    peer_text("xlmr", 4, 12).save_pretrained(tmp_path / "short")
    with pytest.raises(UserError, match="10 positions, the model wants 16"):
        load_text(UnifiedModel(SMALL), tmp_path / "short")


@pytest.mark.parametrize("kind", ["xlmr", "bert"])
def test_load_text_without_mlm_head_keeps_ours_and_says_so(tmp_path, caplog, kind):
    peer = peer_text(kind, 4, 20)
    peer.save_pretrained(tmp_path / "whole")
    peer.base_model.save_pretrained(tmp_path / "bare")
    whole, model = UnifiedModel(SMALL), UnifiedModel(SMALL)
    before = {name: value.clone() for name, value in model.masked_head.state_dict().items()}
    load_text(whole, tmp_path / "whole")
    assert not caplog.records
    load_text(model, tmp_path / "bare")
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'bare'}: no masked-language head (lm_head or cls.predictions); it stays as initialised"
    ]
    for name, value in model.masked_head.state_dict().items():
        assert torch.equal(value, before[name]), name
    for part in ("embedding", "text", "fusion"):
        for name, value in getattr(model, part).state_dict().items():
            assert torch.equal(value, getattr(whole, part).state_dict()[name]), name


def test_load_text_incomplete_mlm_head_is_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    peer_text("xlmr", 4, 20).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"missing lm_head\.dense\.weight"):
        load_text(UnifiedModel(SMALL), tmp_path)


@pytest.mark.parametrize(("kind", "positions"), [("xlmr", 20), ("bert", 18)])
def test_text_sizes_takes_sizes_from_config_json(tmp_path, kind, positions):
    peer_text(kind, 5, positions).save_pretrained(tmp_path)
    config = ModelConfig(**text_sizes(tmp_path))
    assert (config.vocabulary, config.width, config.heads, config.feedforward, config.positions) == (
        60,
        16,
        2,
        24,
        18,
    )
    assert (config.text_layers, config.fusion_layers, config.vision_layers, config.eps) == (
        2,
        3,
        2,
        SMALL.eps,
    )
    load_text(UnifiedModel(config), tmp_path)


def test_text_sizes_of_vision_folder_is_refused(tmp_path):
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"model_type 'vit' is none of bert, .*; name its file: backbone=FILE.py"
    ):
        text_sizes(tmp_path)


def test_load_text_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        load_text(UnifiedModel(SMALL), tmp_path)


def test_unified_model_saves_and_loads_and_names_wrong_folders(tmp_path):
    model = UnifiedModel(SMALL)
    model.save(tmp_path)
    again = UnifiedModel.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)
    with pytest.raises(UserError, match=r"no config\.json"):
        UnifiedModel.from_pretrained(tmp_path / "nowhere")

"""Initialising from checkpoints in Hugging Face format, with `transformers` itself as the peer."""

import json

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    SwinConfig,
    SwinModel,
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
from raylib.settings import SwinSizes
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


def peer_vit(**sizes):
    torch.manual_seed(2)
    small = dict(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=16,
        patch_size=8,
    )
    peer = ViTModel(ViTConfig(**small, **sizes)).eval()
    with torch.no_grad():
        for p in peer.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return peer


@pytest.mark.parametrize("size", [16, 32])
def test_load_vision_equals_transformers_and_interpolates(tmp_path, size):
    peer = peer_vit()
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


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("text", "hidden_act", "relu"),
        ("text", "hidden_act", "gelu_new"),
        ("text", "position_embedding_type", "relative_key"),
        ("text", "is_decoder", True),
        ("text", "quantization_config", {"bits": 4}),
        ("vit", "hidden_act", "quick_gelu"),
        ("vit", "qkv_bias", False),
        ("vit", "num_channels", 1),
        ("vit", "model_type", "beit"),
        ("vit", "image_size", [8, 32]),
        ("swin", "hidden_act", "relu"),
        ("swin", "mlp_ratio", 2.0),
        ("swin", "use_absolute_embeddings", True),
        ("swin", "layer_norm_eps", 1e-6),
    ],
)
def test_load_refuses_fields_that_change_what_a_model_computes(tmp_path, kind, field, value):
    model = UnifiedModel(SMALL)
    if kind == "text":
        peer_text("xlmr", 4, 20).save_pretrained(tmp_path)
    elif kind == "vit":
        peer_vit().save_pretrained(tmp_path)
    else:
        sizes = dict(embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2, patch_size=2, image_size=8)
        SwinModel(SwinConfig(**sizes)).save_pretrained(tmp_path)
        swin = SwinSizes(width=16, layers=(1, 1), heads=(2, 2))
        model = UnifiedModel(SMALL.model_copy(update={"swin": swin, "patch": 2, "image_size": 8}))
    load = load_text if kind == "text" else load_vision
    load(model, tmp_path)
    change_config(tmp_path, **{field: value})
    with pytest.raises(UserError, match=field):
        load(model, tmp_path)


def test_load_compares_heads_and_tells_of_eps(tmp_path, caplog):
    peer_text("xlmr", 4, 20).save_pretrained(tmp_path / "text")
    peer_vit().save_pretrained(tmp_path / "vit")
    for folder, load in ((tmp_path / "text", load_text), (tmp_path / "vit", load_vision)):
        load(UnifiedModel(SMALL), folder)
        assert not caplog.records
        change_config(folder, layer_norm_eps=1e-5)
        load(UnifiedModel(SMALL), folder)
        assert "layer_norm_eps is 1e-05, the model's is 1e-12" in caplog.records.pop().getMessage()
        change_config(folder, num_attention_heads=4)
        with pytest.raises(UserError, match="num_attention_heads is 4, the model has 2"):
            load(UnifiedModel(SMALL), folder)


@pytest.mark.parametrize("eps", [1e-12, 0.05])
def test_imported_model_has_the_eps_of_both_folders(tmp_path, eps):
    """Widths of 16, heads of 8, and a large epsilon, which a constant would not have."""
    text = peer_text("bert", 4, 20)
    text.config.layer_norm_eps = eps
    text.save_pretrained(tmp_path / "text")
    text = BertForMaskedLM.from_pretrained(tmp_path / "text").eval()
    vit = peer_vit(layer_norm_eps=eps / 2)
    vit.save_pretrained(tmp_path / "vit")
    model = UnifiedModel.import_weights(tmp_path / "text", tmp_path / "vit").eval()
    model.save(tmp_path / "ours")
    model = UnifiedModel.from_pretrained(tmp_path / "ours").eval()
    ids, images = torch.randint(5, 60, (7,)), torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    pixels = (images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        states = text(ids[None], output_hidden_states=True).hidden_states[2][0]
        torch.testing.assert_close(model.encode_text(our_rows([ids])), states, atol=1e-5, rtol=0)
        seen = model.encode_images(images).values.view(2, 5, 16)
        torch.testing.assert_close(seen, vit(pixels).last_hidden_state, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["xlmr", "bert"])
def test_load_text_old_folder_without_model_type_starts_where_its_kind_does(tmp_path, kind):
    """BERT's of 2018, two token types, from row 0 of the positions; RoBERTa's, one type, from row 2."""
    peer = peer_text(kind, 4, 20)
    peer.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = {
        k: v for k, v in json.loads(path.read_text()).items() if k not in ("model_type", "pad_token_id")
    }
    path.write_text(json.dumps({**config, "type_vocab_size": 1 if kind == "xlmr" else 2}))
    model = UnifiedModel(SMALL).eval()
    load_text(model, tmp_path)
    ids = torch.randint(5, 60, (9,))
    states = peer(ids[None], output_hidden_states=True).hidden_states[2][0]
    torch.testing.assert_close(model.encode_text(our_rows([ids])), states, atol=1e-5, rtol=0)


def test_load_text_untied_decoder_is_an_error(tmp_path):
    peer = peer_text("bert", 4, 20)
    weights = {k: v.clone() for k, v in peer.state_dict().items()}
    weights["cls.predictions.decoder.weight"] += 1
    peer.config.save_pretrained(tmp_path)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"cls\.predictions\.decoder\.weight is not its word embedding"):
        load_text(UnifiedModel(SMALL), tmp_path)


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

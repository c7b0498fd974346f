"""Loading CCLM: synthetic checkpoints with the published names of tensors, and folders of text and image
encoders."""

import re

import pytest
import torch
from transformers import SwinConfig, SwinModel, ViTConfig, ViTModel, XLMRobertaForMaskedLM

from raylib.errors import UserError
from raylib.models.cclm import PIXELS
from raylib.models.finetuned import load_backbone
from tests.factories import xlmr_config
from tests.test_cclm import SWIN, images, shaken, swin_model

D, F_, VOCABULARY, PLACES = 128, 24, 60, 20  # of the synthetic checkpoints: two heads of 64


def text_layer(at: str, cross: bool, seen: int = D) -> dict:
    tensors = {}
    for name, inputs in {"attention": D, **({"crossattention": seen} if cross else {})}.items():
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            width = inputs if part in ("self.key", "self.value") else D
            tensors |= {
                f"{at}.{name}.{part}.weight": torch.randn(D, width),
                f"{at}.{name}.{part}.bias": torch.randn(D),
            }
        tensors |= {f"{at}.{name}.output.LayerNorm.{part}": torch.randn(D) for part in ("weight", "bias")}
    tensors |= {
        f"{at}.intermediate.dense.weight": torch.randn(F_, D),
        f"{at}.intermediate.dense.bias": torch.randn(F_),
    }
    tensors |= {f"{at}.output.dense.weight": torch.randn(D, F_), f"{at}.output.dense.bias": torch.randn(D)}
    return tensors | {f"{at}.output.LayerNorm.{part}": torch.randn(D) for part in ("weight", "bias")}


def embeddings(at: str) -> dict:
    return {
        f"{at}.word_embeddings.weight": torch.randn(VOCABULARY, D),
        f"{at}.token_type_embeddings.weight": torch.randn(1, D),
        f"{at}.position_embeddings.weight": torch.randn(PLACES, D),
        f"{at}.position_ids": torch.arange(PLACES)[None],
        f"{at}.LayerNorm.weight": torch.randn(D),
        f"{at}.LayerNorm.bias": torch.randn(D),
    }


def prediction(at: str, word: torch.Tensor) -> dict:
    transform = {"dense.weight": (D, D), "dense.bias": (D,), "LayerNorm.weight": (D,), "LayerNorm.bias": (D,)}
    tensors = {f"{at}.transform.{name}": torch.randn(size) for name, size in transform.items()}
    return tensors | {f"{at}.bias": torch.randn(VOCABULARY), f"{at}.decoder.weight": word}


def heads() -> dict:
    tensors = {"temp": torch.tensor(0.05)}
    for side in ("vision", "text"):
        tensors |= {f"{side}_proj.weight": torch.randn(8, D), f"{side}_proj.bias": torch.randn(8)}
    for name, out in (("itm_head", 2), ("bbox_head", 4)):
        sizes = {"0": (2 * D, D), "1": (2 * D,), "3": (out, 2 * D)}
        tensors |= {f"{name}.{i}.weight": torch.randn(size) for i, size in sizes.items()}
        tensors |= {f"{name}.{i}.bias": torch.randn(size[0]) for i, size in sizes.items()}
    return tensors


def microsofts(swin: SwinModel) -> dict:
    """A Swin's tensors under the names that CCLM has them by, with the buffers that it stores."""
    tensors, weights = {}, swin.state_dict()
    for name, value in weights.items():
        if "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            value = torch.cat([weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
        for published, ours in (
            ("encoder.", ""),
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            ("embeddings.norm", "patch_embed.norm"),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("attention.q_proj", "attn.qkv"),
            ("attention.o_proj", "attn.proj"),
            ("attention.relative_position_bias.", "attn."),
        ):
            name = name.replace(published, ours)
        tensors["vision_encoder." + re.sub("^layernorm", "norm", name)] = value
    tensors["vision_encoder.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(
        16, 16, dtype=torch.int64
    )
    return tensors | {"vision_encoder.layers.0.blocks.1.attn_mask": torch.zeros(4, 16, 16)}


def wide_swin():
    config = SwinConfig(**{**SWIN, "embed_dim": 64}, image_size=16, window_size=4)
    return shaken(SwinModel(config, add_pooling_layer=False))


def cclm_file(path, swin, prefix="bert."):
    torch.manual_seed(4)
    at = f"text_encoder.{prefix}"
    tensors = embeddings(f"{at}embeddings") | heads() | microsofts(swin)
    for n in range(12):
        tensors |= text_layer(f"{at}encoder.layer.{n}", n >= 6)
    if prefix:
        tensors |= prediction(
            "text_encoder.cls.predictions", tensors[f"{at}embeddings.word_embeddings.weight"]
        )
    torch.save({"model": tensors}, path)
    return tensors


def same_block(block, tensors, at, cross):
    for attention, name in [(block.attention, "attention")] + (
        [(block.cross_attention, "crossattention")] if cross else []
    ):
        keys = torch.cat([tensors[f"{at}.{name}.self.{part}.weight"] for part in ("key", "value")])
        assert attention.key_value.weight.equal(keys) and attention.query.bias.equal(
            tensors[f"{at}.{name}.self.query.bias"]
        )
        assert attention.output.weight.equal(tensors[f"{at}.{name}.output.dense.weight"])
    if cross:
        assert block.cross_norm.weight.equal(tensors[f"{at}.crossattention.output.LayerNorm.weight"])
    assert block.output_norm.bias.equal(tensors[f"{at}.output.LayerNorm.bias"])


def same_match_head(model, tensors):
    """Both have `build_mlp`: Linear, LayerNorm, GELU, Linear."""
    states = torch.randn(3, D)

    def at(name):
        return tensors[f"itm_head.{name}.weight"], tensors[f"itm_head.{name}.bias"]

    hidden = torch.nn.functional.linear(states, *at(0))
    hidden = torch.nn.functional.gelu(torch.nn.functional.layer_norm(hidden, (2 * D,), *at(1)))
    torch.testing.assert_close(model.match_logits(states), torch.nn.functional.linear(hidden, *at(3)))


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_cclm_checkpoint_of_first_version_loads(tmp_path, prefix, caplog):
    peer = wide_swin()
    tensors = cclm_file(tmp_path / "cclm.th", peer, prefix)
    model = load_backbone(tmp_path / "cclm.th", "cclm_swin").eval()
    config = model.config
    assert (config.text_layers, config.fusion_layers, config.width, config.heads, config.image_size) == (
        6,
        6,
        D,
        2,
        16,
    )
    for n, ours in enumerate([*model.text.blocks, *model.fusion.blocks]):
        same_block(ours, tensors, f"text_encoder.{prefix}encoder.layer.{n}", n >= 6)
    at = f"text_encoder.{prefix}embeddings"
    places = tensors[f"{at}.position_embeddings.weight"] + tensors[f"{at}.token_type_embeddings.weight"]
    assert model.embedding.position.weight.equal(places)  # a BERT: texts start at its first row
    assert model.temperature.item() == pytest.approx(0.05) and model.image_projection.bias.equal(
        tensors["vision_proj.bias"]
    )
    mean, deviation = (torch.tensor(PIXELS[name]).view(3, 1, 1) for name in ("pixel_mean", "pixel_std"))
    expected = peer((images().permute(0, 3, 1, 2) - mean) / deviation).last_hidden_state
    torch.testing.assert_close(model.encode_images(images()).values.view(3, 17, D)[:, 1:], expected)
    same_match_head(model, tensors)
    assert ("no masked-language head" in caplog.text) == (not prefix)
    with pytest.raises(UserError, match="its image encoder is a Swin; set backbone=cclm_swin"):
        load_backbone(tmp_path / "cclm.th", "cclm")


def x2vlm_file(path, vision: dict):
    torch.manual_seed(4)
    tensors = embeddings("text_encoder.roberta.embeddings") | heads() | vision
    for n in range(12):
        tensors |= text_layer(f"text_encoder.roberta.encoder.layer.{n}", False)
    for n in range(6):
        tensors |= text_layer(f"cross_encoder.encoder.layer.{n}", True)
    tensors |= prediction("mlm_head.predictions", torch.randn(VOCABULARY, D))
    torch.save({"model": tensors}, path)
    return tensors


def timms_vit(layers=2) -> dict:
    tensors = {
        "cls_token": torch.randn(1, 1, D),
        "pos_embed": torch.randn(1, 5, D),
        "norm.weight": torch.randn(D),
        "patch_embed.proj.weight": torch.randn(D, 3, 8, 8),
        "patch_embed.proj.bias": torch.randn(D),
        "norm.bias": torch.randn(D),
    }
    sizes = {
        "norm1": (D,),
        "attn.qkv": (3 * D, D),
        "attn.proj": (D, D),
        "norm2": (D,),
        "mlp.fc1": (F_, D),
        "mlp.fc2": (D, F_),
    }
    for n in range(layers):
        tensors |= {f"blocks.{n}.{name}.weight": torch.randn(size) for name, size in sizes.items()}
        tensors |= {f"blocks.{n}.{name}.bias": torch.randn(size[0]) for name, size in sizes.items()}
    return {f"vision_encoder.{name}": value for name, value in tensors.items()}


def test_cclm_checkpoint_of_x2vlm_loads(tmp_path, caplog):
    tensors = x2vlm_file(tmp_path / "cclm_x2vlm.th", timms_vit())
    model = load_backbone(tmp_path / "cclm_x2vlm.th", "cclm")
    assert (model.config.text_layers, model.config.fusion_layers, model.config.vision_layers) == (12, 6, 2)
    # XLM-R's, BERT's, timm's
    norms = (model.text.blocks[0].output_norm, model.fusion.blocks[0].cross_norm, model.vision.norm)
    assert [norm.eps for norm in norms] == [1e-5, 1e-12, 1e-6] and model.masked_head.norm.eps == 1e-5
    for n, ours in enumerate(model.text.blocks):
        same_block(ours, tensors, f"text_encoder.roberta.encoder.layer.{n}", False)
    for n, ours in enumerate(model.fusion.blocks):
        same_block(ours, tensors, f"cross_encoder.encoder.layer.{n}", True)
    at = "text_encoder.roberta.embeddings"
    places = tensors[f"{at}.position_embeddings.weight"] + tensors[f"{at}.token_type_embeddings.weight"]
    assert model.embedding.position.weight.equal(places[2:])  # a RoBERTa: texts start behind the padding
    assert model.masked_head.norm.weight.equal(tensors["mlm_head.predictions.transform.LayerNorm.weight"])
    assert "vocabulary of its own" in caplog.text
    same_match_head(model, tensors)
    vit = model.vision.blocks[1].attention
    assert torch.cat([vit.query.weight, vit.key_value.weight]).equal(
        tensors["vision_encoder.blocks.1.attn.qkv.weight"]
    )
    assert model.vision.position.equal(tensors["vision_encoder.pos_embed"][0])


def small_vit(width: int, feedforward: int, patch: int) -> ViTModel:
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=feedforward,
        image_size=16,
        patch_size=patch,
    )
    return ViTModel(config, add_pooling_layer=False)


def test_cclm_beit_is_refused_unless_vision_folder_replaces_it(tmp_path):
    beit = timms_vit() | {"vision_encoder.blocks.0.gamma_1": torch.randn(D)}
    x2vlm_file(tmp_path / "cclm.th", beit)
    with pytest.raises(UserError, match=r"BEiT-2.*vision_encoder\.blocks\.0\.gamma_1.*vision=VIT_FOLDER"):
        load_backbone(tmp_path / "cclm.th", "cclm")
    vit = small_vit(D, F_, patch=4)
    vit.save_pretrained(tmp_path / "vit")
    model = load_backbone(tmp_path / "cclm.th", "cclm", str(tmp_path / "vit"))
    assert (model.config.vision_layers, model.config.patch, model.config.pixel_mean) == (1, 4, 127.5)
    assert model.vision.norm.weight.equal(vit.layernorm.weight)


def test_cclm_missing_unused_and_foreign_tensors_are_named(tmp_path):
    tensors = x2vlm_file(tmp_path / "odd.th", timms_vit())
    del tensors["cross_encoder.encoder.layer.3.output.dense.bias"]
    tensors["text_encoder.roberta.adapter"] = torch.zeros(2)
    tensors["vision_proj.bias"] = torch.zeros(3)
    torch.save({"model": tensors}, tmp_path / "odd.th")
    with pytest.raises(UserError) as e:
        load_backbone(tmp_path / "odd.th", "cclm")
    for words in (
        "missing encoder.layer.15.output.dense.bias",
        "unused adapter",
        "vision_proj.bias is (3,), wanted (8,)",
    ):
        assert words in str(e.value)
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "other.th")
    with pytest.raises(UserError, match="give a published CCLM checkpoint"):
        load_backbone(tmp_path / "other.th", "cclm")
    (tmp_path / "text.th").write_text("no checkpoint")
    with pytest.raises(UserError, match="not to be read as weights .PyTorch. .no file of PyTorch's"):
        load_backbone(tmp_path / "text.th", "cclm")


def text_folder(path, layers):
    sizes = dict(vocab_size=60, hidden_size=16, num_attention_heads=2, intermediate_size=24)
    config = xlmr_config(num_hidden_layers=layers, max_position_embeddings=20, **sizes)
    peer = shaken(XLMRobertaForMaskedLM(config))
    peer.save_pretrained(path)
    return peer.roberta.encoder.layer


@pytest.mark.parametrize(
    ("kind", "layers", "taken"),
    [
        ("cclm", 12, [*range(12), *range(6, 12)]),
        ("cclm", 18, [*range(18)]),
        ("cclm_swin", 12, [*range(12)]),
        ("cclm_swin", 24, [*range(1, 24, 2)]),
    ],
)
def test_cclm_text_folder_fills_layers_by_depth(tmp_path, kind, layers, taken):
    peer_layers = text_folder(tmp_path / "text", layers)
    peer = swin_model() if kind == "cclm_swin" else small_vit(16, 24, patch=8)
    peer.save_pretrained(tmp_path / "vision")
    model = load_backbone(tmp_path / "text", kind, str(tmp_path / "vision")).eval()
    blocks = [*model.text.blocks, *model.fusion.blocks]
    assert len(model.text.blocks) == (12 if kind == "cclm" else 6) and len(model.fusion.blocks) == 6
    for ours, number in zip(blocks, taken, strict=True):
        assert ours.output.weight.equal(peer_layers[number].output.dense.weight)
    for ours, number in zip(model.fusion.blocks, taken[-6:], strict=True):
        assert ours.cross_attention.query.weight.equal(peer_layers[number].attention.self.query.weight)
    if kind == "cclm_swin":
        assert all(
            value.equal(peer.state_dict()[name]) for name, value in model.vision.swin.state_dict().items()
        )


def test_cclm_unfit_text_folders_are_refused(tmp_path):
    text_folder(tmp_path / "few", 6)
    with pytest.raises(UserError, match="6 layers; give a text encoder of 12, or of 18 or more"):
        load_backbone(tmp_path / "few", "cclm")
    with pytest.raises(
        UserError, match="6 layers; give a text encoder of 24, of which every other is taken, or of 12"
    ):
        load_backbone(tmp_path / "few", "cclm_swin")
    text_folder(tmp_path / "twelve", 12)
    swin_model(window=2).save_pretrained(tmp_path / "swin")
    with pytest.raises(UserError, match="windows of 2 patches at 16 pixels"):
        load_backbone(tmp_path / "twelve", "cclm_swin", str(tmp_path / "swin"))

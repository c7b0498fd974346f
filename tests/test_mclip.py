"""Multilingual-CLIP and CLIP as backbones: against `transformers`, from folders like the published ones;
parameter counts."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from finetune.__main__ import main
from raylib.errors import UserError
from raylib.models import BACKBONES
from raylib.models.dual_encoder import Clip, MClip, MClipConfig
from raylib.packed import Ragged
from raylib.sample import DATA
from tests.conftest import QUICK
from tests.factories import CLIP_VISION, make_clip, write_mclip, xlmr_config


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(Multilingual-CLIP folder, CLIP folder, the published form of both in `transformers`)."""
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("mclip")
    text = transformers.XLMRobertaModel(xlmr_config()).eval()
    clip, mapped = make_clip(), torch.nn.Linear(64, 24)
    clip.save_pretrained(home / "clip")
    sizes = {"transformerDimensions": 64, "numDims": 24}
    write_mclip(home / "text", text, mapped, **sizes)
    return home / "text", home / "clip", (text, mapped, clip)


def test_mclip_embeddings_equal_transformers(folders):
    path, vision, (text, mapped, clip) = folders
    model = MClip.import_weights(path, vision).eval()
    ids = torch.tensor([[0, 5, 6, 7, 2], [0, 8, 2, 1, 1]])
    mask = ids != 1
    with torch.inference_mode():
        states = text(input_ids=ids, attention_mask=mask.long())[0]
        expected = mapped(
            (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        )  # M-CLIP's mean: over all real tokens
        flat = Ragged(ids[mask], mask.sum(1))
        torch.testing.assert_close(model.embed_text(flat, normalize=False), expected, rtol=1e-4, atol=1e-5)
        images = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
        mean, std = (
            torch.tensor(v)
            for v in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
        )
        pixels = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
        seen = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
        found = model.embed_images(model.encode_images(images), normalize=False)
        torch.testing.assert_close(found, seen, rtol=1e-4, atol=1e-5)


def text_encoder(kind: str) -> transformers.PreTrainedModel:
    """A small text encoder: heads of width 32, and an epsilon that no constant would be."""
    torch.manual_seed(1)
    bert = dict(
        vocab_size=90,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=96,
        max_position_embeddings=20,
        layer_norm_eps=0.02,
    )
    if kind == "distilbert":
        model = transformers.DistilBertModel(
            transformers.DistilBertConfig(
                vocab_size=90, dim=64, n_layers=2, n_heads=2, hidden_dim=96, max_position_embeddings=20
            )
        )
    elif kind == "xlm-roberta":
        model = transformers.XLMRobertaModel(xlmr_config(num_attention_heads=2, layer_norm_eps=0.02))
    else:
        model = transformers.BertModel(transformers.BertConfig(**bert))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def assert_equal_texts(path, vision, text, mapped) -> None:
    """Compare with what Multilingual-CLIP computes: the mean over the tokens of a text, mapped."""
    model = MClip.import_weights(path, vision).eval()
    ids = torch.tensor([[3, 5, 6, 7, 4], [3, 8, 4, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with torch.inference_mode():
        states = text(input_ids=ids, attention_mask=mask)[0]
        expected = mapped((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        found = model.embed_text(Ragged(ids[mask.bool()], mask.sum(1)), normalize=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("place", ["folder", "beside", "fields"])
@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "distilbert"])
def test_mclip_text_tower_is_what_its_base_says(folders, tmp_path, kind, place):
    text, mapped = text_encoder(kind), torch.nn.Linear(64, 24)
    text.save_pretrained(tmp_path / "base")
    if place == "folder":
        write_mclip(tmp_path / "text", text, mapped, modelBase=str(tmp_path / "base"))
    elif place == "beside":
        write_mclip(tmp_path / "text", text, mapped)
    else:  # its kind is known, and its own config.json has the heads
        names = {"bert": "sentence-transformers/LaBSE", "distilbert": "distilbert-base-multilingual-cased"}
        heads = {"num_attention_heads": 2, **({} if kind == "distilbert" else {"layer_norm_eps": 0.02})}
        write_mclip(tmp_path / "text", text, mapped, modelBase=names.get(kind, "xlm-roberta-base"), **heads)
    assert_equal_texts(tmp_path / "text", folders[1], text, mapped)


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_mclip_older_folder_has_its_map_in_a_pickle(folders, tmp_path, kind):
    text, mapped = text_encoder(kind), torch.nn.Linear(64, 24)
    text.save_pretrained(tmp_path / "text")
    with pytest.raises(UserError, match=r"no LinearTransformation among its tensors, and 0 files \.pkl"):
        MClip.import_weights(tmp_path / "text", folders[1])
    arrays = [mapped.weight.detach().T.numpy(), mapped.bias.detach().numpy()]
    (tmp_path / "text" / "M-BERT Linear Weights.pkl").write_bytes(pickle.dumps(arrays))
    assert_equal_texts(tmp_path / "text", folders[1], text, mapped)
    (tmp_path / "text" / "M-BERT Linear Weights.pkl").write_bytes(pickle.dumps(arrays[::-1]))
    with pytest.raises(UserError, match=r"M-BERT Linear Weights\.pkl.*arrays of shapes"):
        MClip.import_weights(tmp_path / "text", folders[1])


def test_mclip_published_base_is_known_by_its_name(folders, tmp_path):
    """LaBSE's width, heads, epsilon and first position, on one layer."""
    torch.manual_seed(2)
    sizes = dict(vocab_size=20, hidden_size=768, num_hidden_layers=1, num_attention_heads=12)
    config = transformers.BertConfig(**sizes, intermediate_size=32, max_position_embeddings=20)
    text, mapped = transformers.BertModel(config).eval(), torch.nn.Linear(768, 24)
    write_mclip(tmp_path / "text", text, mapped, modelBase="sentence-transformers/LaBSE")
    assert_equal_texts(tmp_path / "text", folders[1], text, mapped)


def test_mclip_asks_for_what_no_tensor_shows(folders, tmp_path):
    text, mapped = text_encoder("bert"), torch.nn.Linear(64, 24)
    path, vision = tmp_path / "text", folders[1]
    write_mclip(path, text, mapped, modelBase="someone/encoder")
    with pytest.raises(UserError, match="someone/encoder' is not known here.*as base_config.json"):
        MClip.import_weights(path, vision)
    for name, words in (
        ("sentence-transformers/LaBSE", "is 768 wide, this 64, .*as base_config.json"),
        (None, "'xlm-roberta-large' is 1024 wide, this 64"),
        (7, "modelBase is 7, no name"),
    ):
        described = {"model_type": "M-CLIP", **({} if name is None else {"modelBase": name})}
        (path / "config.json").write_text(json.dumps(described))
        with pytest.raises(UserError, match=words):
            MClip.import_weights(path, vision)
    (path / "config.json").write_text(json.dumps({"model_type": "M-CLIP"}))
    base = json.loads(text.config.to_json_string())
    for field, value in (("hidden_act", "relu"), ("is_decoder", True), ("model_type", "electra")):
        (path / "base_config.json").write_text(json.dumps({**base, field: value}))
        with pytest.raises(UserError, match=field):
            MClip.import_weights(path, vision)


def test_mclip_image_tower_of_open_clip_equals_its_code(folders, tmp_path):
    """`VisionTransformer` of open_clip/transformer.py, sizes 12 / 4, width 12, 2 layers of 3 heads, mlp_ratio
    2, output 10: its weights, images, and what it made of them. Its sizes are written as open_clip's."""
    vision = {"image_size": 12, "layers": 2, "width": 12, "patch_size": 4, "head_width": 4, "mlp_ratio": 2.0}
    with np.load(Path(__file__).parent / "data/open_clip_tower.npz") as stored:
        arrays = {name: torch.from_numpy(value) for name, value in stored.items()}
    folder = tmp_path / "open_clip"
    folder.mkdir()
    weights = {k: v for k, v in arrays.items() if k.startswith("visual.")} | {"logit_scale": torch.ones(())}
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in weights.items()}}, folder / "open_clip_pytorch_model.bin"
    )
    text, mapped = text_encoder("bert"), torch.nn.Linear(64, 10)
    write_mclip(tmp_path / "text", text, mapped)
    with pytest.raises(UserError, match=r"no open_clip_config\.json, which says how many heads"):
        MClip.import_weights(tmp_path / "text", folder)

    def describe(**changes):
        described = {"model_cfg": {"embed_dim": 10, "vision_cfg": {**vision, **changes}}}
        (folder / "open_clip_config.json").write_text(json.dumps(described))

    describe()
    MClip.import_weights(tmp_path / "text", folder).save(tmp_path / "ours")
    model = MClip.from_pretrained(tmp_path / "ours").eval()
    with torch.inference_mode():
        found = model.embed_images(model.encode_images(arrays["images"]), normalize=False)
    torch.testing.assert_close(found, arrays["output"], rtol=0, atol=1e-5)
    for changes, words in (
        ({"layers": [4, 6, 10, 6]}, "is a ResNet"),
        ({"pool_type": "avg"}, "pool_type is 'avg'"),
        ({"timm_model_name": "vit"}, "timm_model_name is 'vit'"),
        ({"ls_init_value": 0.1}, "ls_init_value is 0.1"),
    ):
        describe(**changes)
        with pytest.raises(UserError, match=words):
            MClip.import_weights(tmp_path / "text", folder)


def test_mclip_keeps_its_image_towers_activation_and_eps(folders, tmp_path):
    torch.manual_seed(4)
    config = transformers.CLIPVisionConfig(
        **CLIP_VISION, projection_dim=24, hidden_act="gelu", layer_norm_eps=0.03
    )
    tower = transformers.CLIPVisionModelWithProjection(config).eval()
    tower.save_pretrained(tmp_path / "clip")
    MClip.import_weights(folders[0], tmp_path / "clip").save(tmp_path / "ours")
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    model = MClip.from_pretrained(tmp_path / "ours").eval()
    with torch.inference_mode():
        expected = tower(pixel_values=model.pixel_values(images)).image_embeds
        torch.testing.assert_close(model.encode_images(images).values, expected, rtol=0, atol=1e-5)


def test_mclip_saves_and_loads(folders, tmp_path):
    model = MClip.import_weights(*folders[:2]).eval()
    model.save(tmp_path)
    back = MClip.from_pretrained(tmp_path).eval()
    ids = Ragged(torch.tensor([0, 5, 2]), torch.tensor([3]))
    assert (
        back.embed_text(ids, normalize=False).equal(model.embed_text(ids, normalize=False))
        and back.config == model.config
    )


def test_clip_equals_transformers_and_saves(folders, tmp_path):
    """Vectors of both towers; texts of unequal length beside each other; saved and read again."""
    clip = folders[2][2]
    model = Clip.import_weights(folders[1], None).eval()
    texts = [[7, 5, 6, 39], [7, 8, 39]]
    flat = Ragged(torch.tensor([*texts[0], *texts[1]]), torch.tensor([4, 3]))
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    with torch.inference_mode():
        for row, ids in enumerate(texts):
            states = clip.text_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            found = model.embed_text(flat, normalize=False)[row]
            torch.testing.assert_close(found, clip.text_projection(states), rtol=1e-4, atol=1e-5)
        seen = model.embed_images(model.encode_images(images), normalize=False)
        torch.testing.assert_close(
            seen, MClip.import_weights(*folders[:2]).encode_images(images).values, rtol=1e-4, atol=1e-5
        )
        model.save(tmp_path)
        assert (
            Clip.from_pretrained(tmp_path)
            .eval()
            .embed_text(flat, normalize=False)
            .equal(model.embed_text(flat, normalize=False))
        )
    depths = {model.depth_of(name) for name, _ in model.named_parameters()}
    assert depths == {None, 0, 1} and model.num_layers == 1 and len(model.prunable()) == 6
    with pytest.raises(UserError, match="brings its own image tower"):
        Clip.import_weights(folders[1], folders[1])
    with pytest.raises(UserError, match="not of clip"):
        Clip.import_weights(folders[0], None)


def test_mclip_base_has_published_parameter_count():
    """XLM-R-large's 559,890,432 without its pooler's (1,049,600) and folded token type, the map, CLIP
    ViT-L/14's tower."""
    with torch.device("meta"):
        model = MClip(MClipConfig())
    counts = {
        part: sum(p.numel() for p in getattr(model, part).parameters())
        for part in ("embedding", "text", "vision")
    }
    pad_and_offset = 2 * 1024  # rows of XLM-R's 514 positions that no text uses
    assert counts["embedding"] + counts["text"] == 559_890_432 - 1_049_600 - 1024 - pad_and_offset
    assert counts["vision"] == 303_966_208 and model.text_projection.weight.shape == (768, 1024)


def test_mclip_depths_and_prunable_parameters():
    model = BACKBONES["mclip"](BACKBONES["mclip"].sizes["tiny"])
    depths = {name: model.depth_of(name) for name, _ in model.named_parameters()}
    assert (
        depths["embedding.word.weight"] == 0
        and depths["text.blocks.1.output.weight"] == 2 == model.num_layers
    )
    assert depths["text_projection.weight"] is None and {
        d for n, d in depths.items() if n.startswith("vision")
    } == {None}
    assert len(model.prunable()) == 2 * 5 and all(name.startswith("text.") for name in model.prunable())


def test_mclip_wrong_folders_and_settings_are_errors(folders, tmp_path):
    path, vision, _ = folders
    with pytest.raises(UserError, match="set vision=FOLDER"):
        MClip.import_weights(path, None)
    with pytest.raises(UserError, match="no config.json"):
        MClip.import_weights(path, tmp_path)
    other = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**CLIP_VISION, projection_dim=20)
    )
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="maps texts to 24 numbers"):
        MClip.import_weights(path, tmp_path / "other")
    weights = torch.load(path / "pytorch_model.bin", weights_only=True)
    (tmp_path / "more").mkdir()
    save_file({**weights, "transformer.extra": torch.zeros(1)}, tmp_path / "more" / "model.safetensors")
    for name in ("config.json", "base_config.json"):
        (tmp_path / "more" / name).write_text((path / name).read_text())
    with pytest.raises(UserError, match="unused extra"):
        MClip.import_weights(tmp_path / "more", vision)


def test_mclip_retrieval_runs_end_to_end(tmp_path, scenes, capsys):
    """From published folders: M-CLIP tuned with LoRA and aligned, its images encoded once, evaluated again,
    gone on from; M-CLIP and CLIP as they are, with translations; a task of another kind is refused."""
    torch.manual_seed(0)
    sizes = xlmr_config(vocab_size=12000, max_position_embeddings=66)
    text = transformers.XLMRobertaModel(sizes, add_pooling_layer=False)
    make_clip(12000).save_pretrained(tmp_path / "clip")
    write_mclip(tmp_path / "text", text, torch.nn.Linear(64, 24))
    for folder in ("text", "clip"):
        shutil.copy2(DATA / "tokenizer.model", tmp_path / folder)
    own = [
        f"data={scenes}",
        f"runs={tmp_path}",
        *QUICK,
        "use_itm_head=false",
        'languages=["en","ru"]',
        'freeze=["vision"]',
    ]
    mclip = ["backbone=mclip", f"model={tmp_path / 'text'}", f"vision={tmp_path / 'clip'}"]

    def run(name, *settings, recipe="scenes_xflickrco"):
        code = main([recipe, f"name={name}", *own, *settings])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    few = [
        "setting=few_shot",
        "shots=5",
        "batch=5",
        "epochs=2",
        "strategies.lora.rank=2",
        "strategies.alignment={}",
    ]
    code, printed = run("aligned", *mclip, *few)
    assert code == 0, printed
    found = json.loads((tmp_path / "aligned" / "result.json").read_text())
    assert (
        found["retrieval"]["ru"]["pairs"] == 0
        and (tmp_path / "aligned" / "ru" / "tuned.safetensors").is_file()
    )
    ways = {name: found["preprocessing"][name] for name in ("resize", "resize_to", "resample", "crop")}
    assert ways == {"resize": "shortest_edge", "resize_to": 16, "resample": "bicubic", "crop": 16}
    assert main(["evaluate", str(tmp_path / "aligned")]) == 0
    again = json.loads((tmp_path / "aligned" / "result.json").read_text())
    assert again["retrieval"] == found["retrieval"] and again["preprocessing"] == found["preprocessing"]
    for name, more in (("more", []), ("named", ["backbone=mclip"])):  # as paper 4's recipes name it
        code, printed = run(name, f"model={tmp_path / 'aligned' / 'ru'}", *few, *more)
        assert code == 0, printed
    for name, model in (("mclip", mclip), ("clip", ["backbone=clip", f"model={tmp_path / 'clip'}"])):
        for setting in ("untrained", "translate_test"):
            code, printed = run(f"{name}_{setting}", *model, f"setting={setting}")
            assert code == 0, printed
    code, printed = run("wrong", *mclip, recipe="scenes_xgqa")
    assert code == 2 and "mclip reads texts and images apart" in printed
    code, printed = run("unmatched", *mclip, "use_itm_head=true")
    assert code == 2 and "set use_itm_head=false" in printed

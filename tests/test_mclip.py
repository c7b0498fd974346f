"""Multilingual-CLIP and CLIP as backbones: against `transformers`, from folders like the published ones;
parameter counts."""

import json
import shutil

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
    sizes = {"modelBase": "xlm-roberta-large", "transformerDimensions": 64, "numDims": 24}
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
    (tmp_path / "more" / "config.json").write_text((path / "config.json").read_text())
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
    assert main(["evaluate", str(tmp_path / "aligned")]) == 0
    again = json.loads((tmp_path / "aligned" / "result.json").read_text())
    assert again["retrieval"] == found["retrieval"]
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

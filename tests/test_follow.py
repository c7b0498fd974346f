"""`objective.follow=code` against the public code of paper 2 itself (FudanDISC/weakly-supervised-mVLP, branch
master, f6700a7): losses and gradients of its `ALBEF_Stage1` in float64, on small random weights.

`data/mvlp_pretraining.npz` (made by tests/public_pretraining.py) has the weights, a batch for each of two
"GPUs", between which that code's contrast and negatives do not reach, what it masked and drew, and the
losses that it returned; of the first batch the gradients too.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.__main__ import main as pretrain
from pretrain.config import PretrainConfig
from pretrain.recipes import RECIPES
from raylib.config import load_config, override
from raylib.models.cclm import VIT_NAMES
from raylib.models.hf_weights import WeightMapper, copy_text, copy_vision
from raylib.models.unified import UnifiedModel
from raylib.objectives.pretraining import UnifiedObjective
from raylib.packed import Sentences
from raylib.settings import FOLLOW, ModelConfig, ObjectiveConfig
from tests.factories import make_batch, make_model
from tests.reference import slow_terms

SIZES = ModelConfig(
    vocabulary=40,
    width=16,
    heads=2,
    feedforward=24,
    text_layers=1,
    fusion_layers=1,
    vision_layers=1,
    image_size=16,
    patch=8,
    positions=12,
    embedding=8,
    dropout=0.0,
    vision_eps=1e-6,
)
PARTS = {"image_text": 4, "parallel": 5, "text": 3}  # rows of a "GPU"
PAD, SEP = 1, 2


@pytest.fixture(scope="module")
def public():
    with np.load(Path(__file__).parent / "data" / "mvlp_pretraining.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def load_public(model: UnifiedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Fill `model` from tensors by the public code's names: weights, or gradients in their place."""
    text, vision = {}, {}
    for name, value in tensors.items():
        value = value.double()
        if name.startswith("visual_encoder."):
            name = name.removeprefix("visual_encoder.")
            if ".attn.qkv." in name:
                parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
                vision |= {name.replace(".qkv.", f".{part}."): third for part, third in parts}
            else:
                vision[name] = value
        elif name.startswith("text_encoder."):
            text[re.sub(r"^text_encoder\.(bert\.)?", "", name)] = value
    for pattern, name in VIT_NAMES.items():
        vision = {re.sub(pattern, name, key): value for key, value in vision.items()}
    heads = {
        "vision_proj": model.image_projection,
        "text_proj": model.text_projection,
        "itm_head": model.match_head,
    }
    with torch.no_grad():
        for name, layer in heads.items():
            if f"{name}.weight" in tensors:
                layer.weight.copy_(tensors[f"{name}.weight"])
                layer.bias.copy_(tensors[f"{name}.bias"])
        model.temperature.fill_(float(tensors["temp"]))
        mapper = WeightMapper(text, "public")
        copy_text(mapper, model, 0, (0, 1))
        mapper.assert_all_used([])
        if vision:
            mapper = WeightMapper(vision, "public")
            copy_vision(mapper, model)
            mapper.assert_all_used([])


def make_public_model(public) -> UnifiedModel:
    model = UnifiedModel(SIZES).double()
    weights = {k.removeprefix("weight/"): v for k, v in public.items() if k.startswith("weight/")}
    load_public(model, weights)
    return model


def read_sentences(public, names: list[str], first_id: int) -> Sentences:
    """Padded sentences of one or two "GPUs", packed."""
    clean, masked, labels, lengths = [], [], [], []
    for name in names:
        ids = public[f"{name}/ids"].long()
        for row, real in enumerate(ids != PAD):
            clean.append(ids[row][real])
            masked.append(public[f"{name}/masked"][row][real].long())
            labels.append(public[f"{name}/labels"][row][real].long())
            lengths.append(int(real.sum()))
    flat = torch.cat(labels)
    places = (flat != -100).nonzero().squeeze(1)
    return Sentences(
        torch.cat(clean),
        torch.cat(masked),
        torch.tensor(lengths),
        places,
        flat[places],
        torch.arange(len(lengths)) + first_id,
    )


def read_batch(public, gpus: list[int]) -> dict:
    def places(stream):
        size = PARTS[stream] * len(gpus)
        return {"size": size, "index": torch.arange(size)}

    def sentences(name, first_id):
        return read_sentences(public, [f"gpu{gpu}/{name}" for gpu in gpus], first_id)

    images = torch.cat([public[f"gpu{gpu}/images"] for gpu in gpus])
    uniforms = torch.cat([public[f"gpu{gpu}/uniforms"] for gpu in gpus])
    pairs = places("image_text") | {
        "images": images.permute(0, 2, 3, 1).double(),
        "image_id": torch.arange(len(images)) + 900,
        "text": sentences("captions", 0),
        "negative_uniforms": uniforms.float(),
    }
    sides = {"source": sentences("source", 100), "target": sentences("target", 200)}
    return {
        "step": 0,
        "image_text": pairs,
        "parallel": places("parallel") | sides,
        "text": places("text") | {"text": sentences("text", 300)},
    }


def test_follow_code_equals_the_public_codes_losses_and_gradients(public):
    model = make_public_model(public)
    objective = UnifiedObjective(model, ObjectiveConfig(follow="code", contrast_groups=1)).train()
    loss, terms = objective(read_batch(public, [0]))
    assert 0 <= terms.pop("itm_accuracy") <= 1
    for name, value in terms.items():
        assert float(value) == pytest.approx(float(public[f"gpu0/loss/{name}"]), rel=1e-6), name
    loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients = {k.removeprefix("gpu0/gradient/"): v for k, v in public.items() if "/gradient/" in k}
    assert {name.partition(".")[0] for name in gradients} == {"text_encoder", "text_proj", "itm_head", "temp"}
    assert not any(name.startswith(("vision", "image_projection")) for name in ours)
    expected = UnifiedModel(SIZES).double()
    load_public(expected, gradients)
    for name, value in expected.named_parameters():
        # a table of positions has the only type's vector in it here, and both have gradients there
        if name in ours and name != "embedding.position.weight":
            torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_follow_code_keeps_contrast_and_negatives_in_groups_as_on_gpus(public):
    """A batch of both "GPUs" in two groups has the mean of what each has by itself. The public code takes the
    mean over masked tokens on each GPU, we over those of all."""
    objective = UnifiedObjective(make_public_model(public), ObjectiveConfig(follow="code", contrast_groups=2))
    terms = objective(read_batch(public, [0, 1]))[1]
    for name in ("ucl_image", "itm", "ucl_translation"):
        mean = sum(float(public[f"gpu{gpu}/loss/{name}"]) for gpu in (0, 1)) / 2
        assert float(terms[name]) == pytest.approx(mean, rel=1e-6), name
    whole = UnifiedObjective(make_public_model(public), ObjectiveConfig(follow="code", contrast_groups=1))
    assert float(whole(read_batch(public, [0, 1]))[1]["ucl_image"]) > float(terms["ucl_image"]) + 0.1


def test_public_code_masks_the_separator(public):
    ids, labels = public["gpu0/captions/ids"], public["gpu0/captions/labels"]
    masked = torch.cat(
        [public[f"gpu{g}/{n}/labels"].flatten() for g in (0, 1) for n in ("source", "target", "text")]
    )
    assert ids.shape == labels.shape and (masked == SEP).any()


def test_follow_sets_defaults_that_given_settings_win_over():
    code = override(RECIPES["base"](), ["objective.follow=code", "objective.itm_text=clean"])
    values = code.objective.model_dump()
    assert {name: values[name] for name in FOLLOW["code"]} == FOLLOW["code"] | {"itm_text": "clean"}
    assert code.optim.weight_decay == 0.02 and code.data.mask_separator
    paper = override(code, ["objective.follow=paper"])
    assert paper == RECIPES["base"]()
    assert paper.objective.itm_text == "clean" and paper.optim.weight_decay == 0.2
    # what a recipe pins stays
    assert override(RECIPES["tiny"](), ["objective.follow=paper"]).objective.itm_text == "masked"
    assert override(RECIPES["emoji_e5"](), ["objective.follow=code"]).optim.weight_decay == 0.05


def test_follow_defaults_are_those_of_the_fields():
    for name, value in FOLLOW["paper"].items():
        assert ObjectiveConfig.model_fields[name].default == value, name
    assert FOLLOW["paper"].keys() == FOLLOW["code"].keys()


@pytest.mark.parametrize("directions", ["sum", "mean"])
def test_stored_objective_without_follow_means_what_it_meant(directions, tmp_path):
    """Then `directions=mean` halved TLM too, ITM read masked captions, and the ViT had the text's dropout."""
    stored = {
        "model": {"dropout": 0.1, "width": 16, "heads": 2},
        "objective": {
            "directions": directions,
            "ucl_text": "clean",
            "itm_text": "masked",
            "tlm_source": "clean",
        },
        "data": {"tokenizer": ""},
        "fit": {"steps": 1},
    }
    (tmp_path / "config.json").write_text(json.dumps(stored))
    config = load_config(PretrainConfig, tmp_path / "config.json")
    assert config.model.vision_dropout == 0.1
    batch, model = make_batch(), make_model()
    terms = UnifiedObjective(model, config.objective)(batch)[1]
    before = slow_terms(
        model, batch, ObjectiveConfig(itm_text="masked", directions=directions, tlm_directions=directions)
    )
    for name, value in before.items():
        assert float(terms[name]) == pytest.approx(float(value.detach()), rel=2e-6), name


ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "cluster").glob("*.*")]


def documented_commands() -> list[tuple[str, str, list[str]]]:
    """(file, recipe, its settings) of every documented command that pretrains a paper's recipe."""
    found = []
    for page in PAGES:
        if page.suffix not in (".md", ".sh", ".yaml"):
            continue
        text = re.sub(r"\\\n\s*#?\s*", " ", page.read_text(encoding="utf-8"))
        for match in re.finditer(
            r"(?:pretrain|slurm\.sh) (base\w*)((?:[ ]+(?:--)?[\w.]+(?:=[^\s`;]+)?)*)", text
        ):
            words = match[2].split()
            if "--print-config" not in words and any("=" in word for word in words):
                found.append((page.name, match[1], [word for word in words if "=" in word]))
    return found


def test_documented_commands_of_paper_recipes_start_from_published_weights():
    commands = documented_commands()
    assert {page for page, *_ in commands} >= {
        "README.md",
        "cluster.md",
        "slurm.sh",
        "rayjob.yaml",
        "data.md",
    }
    for page, recipe, settings in commands:
        config = override(RECIPES[recipe](), [s.rstrip(".") for s in settings])
        config.init.require_given(f"{page}: {recipe}")


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name.startswith("base")])
def test_paper_recipes_refuse_random_weights(recipe, tmp_path, capsys):
    settings = ["runtime=local", f"runs={tmp_path}", "corpus=nowhere"]
    assert pretrain([recipe, *settings]) == 2
    line = capsys.readouterr().err
    assert "init.text=FOLDER" in line and "init.vision=FOLDER" in line and "init=scratch" in line
    assert line.count("\n") == 1 and not list(tmp_path.iterdir())
    assert pretrain([recipe, *settings, "init.text=x"]) == 2
    line = capsys.readouterr().err
    assert "init.text=FOLDER" not in line and "init.vision=FOLDER" in line
    # what they insist on is another mistake's turn
    for insisted in (["init=scratch"], ["init=scratch", "init.vision=x"], ["init.model=x"]):
        assert pretrain([recipe, *settings, *insisted]) == 2
        assert "random" not in capsys.readouterr().err

"""The contract of backbones, over the registry and one in a user's file (that of docs/extending.md): each is
built at tiny size, trains a step, is stored, loaded with equal outputs, and few-shot goes on from it on every
kind of task that it has."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from finetune.__main__ import main
from raylib.api.export import export_model
from raylib.checkpoint import find_best
from raylib.errors import UserError
from raylib.models import BACKBONES, find_backbone, stored_backbone
from raylib.models.base import FusionBackbone, RegionBackbone, RetrievalBackbone, read_description
from raylib.models.finetuned import FinetuneModel, load_backbone
from raylib.models.hf_folders import encoder_sizes
from raylib.models.unified import UnifiedModel
from raylib.packed import Ragged
from raylib.sample import DATA
from tests.test_finetune_models import regions_of, write_regions

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
ENCODERS = ("unified", "cclm", "cclm_swin")  # they read images, and have a head that matches pairs
APART = ("mclip", "clip")
ON_REGIONS = ("uc2", "m3p", "muniter", "xuniter", "oscar")
TASKS = {"xgqa": [], "xvnli": [], "marvl": [], "xflickrco": ["candidates=3"]}
SHOTS = {"xgqa": 1, "xvnli": 5, "marvl": 4, "xflickrco": 5}


@pytest.fixture(scope="session")
def user_file(tmp_path_factory):
    """The file of the page."""
    (body,) = re.findall(r"^```python my_backbone.py\n(.*?)^```$", PAGE.read_text(), re.S | re.M)
    file = tmp_path_factory.mktemp("user") / "my_backbone.py"
    file.write_text(body)
    return file


@pytest.fixture
def backbone(request, user_file):
    """A tiny backbone of a kind, or "user": of the page's file."""
    torch.manual_seed(0)
    if request.param == "user":
        tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
        text = {**tower, "vocab_size": 12000, "max_position_embeddings": 16}
        sizes = {"text_config": text, "vision_config": {**tower, "image_size": 16, "patch_size": 8}}
        kind = find_backbone(str(user_file))
        return kind(kind.config_class(siglip=sizes))
    return BACKBONES[request.param](BACKBONES[request.param].sizes["tiny"])


every_kind = pytest.mark.parametrize("backbone", [*BACKBONES, "user"], indirect=True)


def outputs_of(model, batch):
    """The input of a head or a contrast, of a batch: (n, any) numbers."""
    if isinstance(model, FinetuneModel):
        return model(batch)
    images = model.embed_images(model.encode_images(batch["images"]), normalize=True)
    return torch.cat([images, model.embed_text(batch["text"], normalize=True)])


@every_kind
def test_backbone_trains_a_step_and_loads_with_equal_outputs(backbone, tmp_path):
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 5, 4])
    batch = {
        "text": Ragged(torch.randint(5, 12000, (12,), generator=g), lengths),
        "images": torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8, generator=g),
    }
    model = backbone
    if isinstance(backbone, RegionBackbone):
        batch = {**batch, "regions": Ragged(torch.rand(6, 6 + 7, generator=g), torch.tensor([1, 2, 3]))}
        del batch["images"]
    if isinstance(backbone, FusionBackbone):
        dim = 6 if isinstance(backbone, RegionBackbone) else None
        model = FinetuneModel(backbone, ("no", "maybe", "yes"), 1, 0.0, dim)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1)
    F.cross_entropy(outputs_of(model, batch), torch.arange(len(outputs_of(model, batch))) % 3).backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not p.equal(before[name])}
    depths = {model.depth_of(name) for name in changed}
    assert depths == {None, *range(model.num_layers + 1)}, depths
    model.save(str(tmp_path))
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        assert outputs_of(again, batch).equal(outputs_of(model.eval(), batch))
    loaded = load_backbone(
        tmp_path, str(tmp_path / "my_backbone.py") if backbone.kind == "siglip" else "unified"
    )
    assert type(loaded) is type(backbone) and loaded.config == backbone.config


@every_kind
def test_backbone_declares_what_it_has(backbone):
    names = dict(backbone.named_parameters())
    assert backbone.width > 0 and 0 <= backbone.num_fusion_layers <= backbone.num_layers
    assert set(backbone.prunable()) <= names.keys() and all(names[n].ndim == 2 for n in backbone.prunable())
    parts = {"embeddings", "text", "vision", "image_projection", "fusion"}
    assert backbone.freezable_parts().keys() <= parts
    assert set(backbone.part_names().values()) <= {"vision", "text", "fusion", "head"}
    assert backbone.part_names().keys() == dict(backbone.named_parameters()).keys()
    takes_images = not isinstance(backbone, RegionBackbone)
    assert (backbone.image_size > 0) == takes_images == (backbone.image_encoder is not None)
    assert isinstance(backbone, RetrievalBackbone | FusionBackbone) and backbone.backbone is backbone
    for use in ("classification", "generation", "contrast", "matching"):
        backbone.freeze_unused(use)


def test_backbones_are_registered_by_their_kind():
    for kind, backbone in BACKBONES.items():
        assert backbone.kind == kind and backbone.summary
        assert all(type(backbone.sizes[size]) is backbone.config_class for size in ("base", "tiny"))


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """`start(kind)`: the folder of a small random model of that kind."""
    made = {}

    def make(kind):
        if kind not in made:
            folder, backbone = tmp_path_factory.mktemp(kind), BACKBONES[kind]
            torch.manual_seed(0)
            model = backbone(backbone.sizes["tiny"])
            if kind in ON_REGIONS:  # stored with a head alone
                model.set_region_dim(6)
                model = FinetuneModel(model, ("?",), 1, 0.1, 6)
            model.save(folder)
            shutil.copy2(DATA / "tokenizer.model", folder)
            made[kind] = folder
        return made[kind]

    return make


def stored(folder):
    values = json.loads((find_best(folder) / "config.json").read_text())
    return values.get("backbone", values["model_type"])


def gone_on_from(finetune, tmp_path, task, settings, kind):
    """Train a step of English, then of Russian from there; how both are stored."""
    code, printed = finetune(
        f"scenes_{task}", "name=english", *settings, "train_limit=16", "epochs=1", "test_limit=8"
    )
    assert code == 0, printed
    more = [
        f"model={tmp_path / 'english'}",
        f"backbone={kind}",
        "setting=few_shot",
        f"shots={SHOTS[task]}",
        "batch=3",
    ]
    few = ["epochs=1", 'languages=["ru"]', "test_limit=8"]
    code, printed = finetune(f"scenes_{task}", "name=few", *settings, *more, *few)
    assert code == 0, printed
    return stored(tmp_path / "english"), stored(tmp_path / "few/ru")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", ENCODERS)
def test_few_shot_resumes_from_every_backbone_and_task(finetune, tmp_path, start, kind, task):
    settings = [*TASKS[task], f"model={start(kind)}", f"backbone={kind}"]
    as_stored = f"polyglance-{kind}" if task == "xflickrco" else kind
    assert gone_on_from(finetune, tmp_path, task, settings, kind) == (as_stored, as_stored)


@pytest.mark.parametrize("kind", APART)
def test_few_shot_resumes_from_retrieval_backbones(finetune, tmp_path, start, kind):
    settings = [f"model={start(kind)}", f"backbone={kind}", "use_itm_head=false", "image_size=null"]
    as_stored = f"polyglance-{kind}"
    assert gone_on_from(finetune, tmp_path, "xflickrco", settings, kind) == (as_stored, as_stored)


@pytest.mark.parametrize("kind", ON_REGIONS)
def test_few_shot_resumes_from_region_backbones(finetune, tmp_path, scenes, start, kind):
    path = write_regions(tmp_path, "npz", regions_of(scenes, "xvnli", [("shots", "ru")]))
    settings = [f"model={start(kind)}", f"backbone={kind}", f"regions={path}", "image_size=null"]
    assert gone_on_from(finetune, tmp_path, "xvnli", settings, kind) == (kind, kind)


@pytest.mark.parametrize("kind", ["cclm", "cclm_swin"])
def test_few_shot_resumes_from_retrieval_run_stored_as_another_kind(finetune, tmp_path, start, kind):
    """Before, CCLM's were stored as unified models; what they are is in the run's settings."""
    settings = [
        "candidates=3",
        f"model={start(kind)}",
        f"backbone={kind}",
        "train_limit=16",
        "epochs=1",
        "test_limit=8",
    ]
    assert finetune("scenes_xflickrco", "name=english", *settings)[0] == 0
    for path in (tmp_path / "english").rglob("config.json"):
        path.write_text(path.read_text().replace(f'"polyglance-{kind}"', '"polyglance-unified"'))
    more = [f"model={tmp_path / 'english'}", "setting=few_shot", "shots=5", "batch=5", 'languages=["ru"]']
    code, printed = finetune("scenes_xflickrco", "name=few", *settings, *more)
    assert code == 0 and stored(tmp_path / "few/ru") == f"polyglance-{kind}", printed
    assert (
        load_backbone(tmp_path / "english").kind == kind
        and load_backbone(tmp_path / "english/best").kind == kind
    )
    other = "cclm" if kind == "cclm_swin" else "cclm_swin"
    code, printed = finetune("scenes_xflickrco", "name=other", *settings, *more, f"backbone={other}")
    assert code == 2 and f"is a model of ours on the backbone {kind}" in printed


def test_cclm_loads_as_any_unified_model(start):
    for kind in ENCODERS:
        assert isinstance(UnifiedModel.from_pretrained(start(kind)), UnifiedModel)
        assert load_backbone(start(kind)).kind == kind


def test_user_backbone_is_stored_with_its_code_and_gone_on_from(finetune, tmp_path, user_file, monkeypatch):
    """By a relative path; the stored model is read in another process, from another place, and without the
    file."""
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    from transformers import SiglipConfig, SiglipModel

    text = {**tower, "vocab_size": 12000, "max_position_embeddings": 64}
    config = SiglipConfig(text_config=text, vision_config={**tower, "image_size": 16, "patch_size": 8})
    SiglipModel(config).save_pretrained(tmp_path / "siglip")
    shutil.copy2(DATA / "tokenizer.model", tmp_path / "siglip")
    shutil.copy2(user_file, tmp_path / "mine.py")
    monkeypatch.chdir(tmp_path)
    settings = [f"model={tmp_path / 'siglip'}", "use_itm_head=false", "backbone=mine.py"]
    assert gone_on_from(finetune, tmp_path, "xflickrco", settings, "mine.py") == ("polyglance-siglip",) * 2
    assert (
        json.loads((find_best(tmp_path / "english") / "config.json").read_text())["code"] == "mine.py:Siglip"
    )
    (tmp_path / "mine.py").unlink()
    export_model(tmp_path / "few/ru", tmp_path / "elsewhere/model")
    code = "import sys; from raylib.models import finetuned as f; print(f.load_backbone(*sys.argv[1:]).kind)"
    folder = str(tmp_path / "elsewhere/model")
    command = [sys.executable, "-c", code, folder, f"{folder}/mine.py"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "siglip\n"
    (tmp_path / "elsewhere/model/mine.py").unlink()
    with pytest.raises(UserError, match=r"model: mine\.py, which defines its backbone, is gone; put it back"):
        load_backbone(tmp_path / "elsewhere/model")


@pytest.fixture(scope="session")
def vilt(tmp_path_factory):
    """A folder with the page's ViLT, `my_vilt.py`, and a small one of random weights, `vilt`."""
    from transformers import ViltConfig, ViltModel

    folder = tmp_path_factory.mktemp("fusion")
    (body,) = re.findall(r"^```python my_vilt.py\n(.*?)^```$", PAGE.read_text(), re.S | re.M)
    (folder / "my_vilt.py").write_text(body)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": 12000, "max_position_embeddings": 40, "image_size": 16, "patch_size": 8}
    ViltModel(ViltConfig(**sizes)).save_pretrained(folder / "vilt")
    shutil.copy2(DATA / "tokenizer.model", folder / "vilt")
    return folder


def test_user_fusion_backbone_run_is_evaluated_by_its_checkpoint_alone(
    finetune, tmp_path, vilt, monkeypatch, capsys
):
    """With the copy of the file beside the weights, after the file was edited and the start weights are gone;
    few-shot from it names that copy, so that it is evaluated too."""
    shutil.copytree(vilt, tmp_path / "start")
    monkeypatch.chdir(tmp_path / "start")
    few = ["train_limit=16", "epochs=1", "test_limit=8", "image_size=null", 'languages=["ru"]']
    code, printed = finetune("scenes_xvnli", "name=one", "model=vilt", "backbone=my_vilt.py", *few)
    assert code == 0, printed
    model = f"model={tmp_path / 'one'}"
    code, printed = finetune("scenes_xvnli", "name=two", model, "setting=few_shot", "batch=3", *few)
    assert code == 0, printed
    settings = json.loads((tmp_path / "two/ru/config.json").read_text())
    assert settings["backbone"] == f"{find_best(tmp_path / 'one') / 'my_vilt.py'}:Vilt"
    Path("my_vilt.py").write_text("raise ValueError('the edited file ran')")
    shutil.rmtree("vilt")
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        before = json.loads((tmp_path / name / "result.json").read_text())["accuracy"]
        assert main(["evaluate", f"{tmp_path / name}"]) == 0, capsys.readouterr()
        assert json.loads((tmp_path / name / "result.json").read_text())["accuracy"] == before
        shutil.rmtree(tmp_path / "start", ignore_errors=True)


def test_stored_code_runs_only_if_it_is_named(finetune, tmp_path, user_file):
    """A model folder from somebody else: its code runs by name, or in a run that names it."""
    kind = find_backbone(str(user_file))
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    text = {**tower, "vocab_size": 12000, "max_position_embeddings": 16}
    sizes = {"text_config": text, "vision_config": {**tower, "image_size": 16, "patch_size": 8}}
    folder = tmp_path / "run/best"
    kind(kind.config_class(siglip=sizes)).save(folder)
    code = folder / "my_backbone.py"
    refusal = re.escape(f"{folder} holds code (my_backbone.py) that would be run: read it, then name it: ")
    (tmp_path / "other.py").write_text("class Other: pass\n")
    for name in ("unified", "my_backbone.py", str(tmp_path / "other.py")):
        with pytest.raises(UserError, match=refusal + re.escape(f"backbone={code}")):
            stored_backbone(read_description(folder), folder, name)
    assert load_backbone(folder, f"{code}").kind == load_backbone(folder, f"{code}:Siglip").kind == "siglip"
    (tmp_path / "run/config.json").write_text('{"fit": {}, "backbone": "my_code/my_backbone.py:Siglip"}')
    assert load_backbone(folder).kind == "siglip"
    (tmp_path / "run/config.json").write_text('{"fit": {}, "backbone": "unified"}')
    with pytest.raises(UserError, match=refusal):
        load_backbone(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "code": "../../other.py:Other"}))
    with pytest.raises(UserError, match="best: other.py, which defines its backbone, is gone"):
        load_backbone(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("vilt.encoder.layer", "vilt.encoder.layers"),
            "Vilt.layer_names: 'vilt.encoder.layers': .*no attribute",
        ),
        (
            ('("vilt.encoder.layer",)', '("vilt.encoder",)'),
            "'vilt.encoder' is a ViltEncoder, no nn.ModuleList",
        ),
        (
            ('("vilt.pooler",)', '"vilt.pooler"'),
            r"pooler_names: 'vilt.pooler' is a str; write \('vilt.pooler',\)",
        ),
        (("config.hidden_size", "config.hiden_size"), "Vilt.width: .*'hiden_size'"),
        (
            ("return self.vilt.config.image_size", "return 0"),
            "Vilt.image_size: it encodes images; say how many",
        ),
    ],
)
def test_user_backbone_declaration_is_checked_when_it_is_built(tmp_path, vilt, change, message):
    (tmp_path / "my_vilt.py").write_text((vilt / "my_vilt.py").read_text().replace(*change))
    with pytest.raises(UserError, match=message) as e:
        load_backbone(vilt / "vilt", f"{tmp_path}/my_vilt.py")
    assert "\n" not in str(e.value)


def test_finetune_mistake_leaves_no_folder(finetune, tmp_path, vilt):
    """Before a checkpoint there is nothing to keep: the corrected command may have the name."""
    few = [
        "name=one",
        f"model={vilt / 'vilt'}",
        "train_limit=16",
        "epochs=1",
        "test_limit=8",
        "image_size=null",
    ]
    code, printed = finetune("scenes_xvnli", *few)
    assert code == 2 and "vilt: model_type 'vilt' is none of bert, roberta, xlm-roberta" in printed
    assert "; name its file: backbone=FILE.py" in printed and not (tmp_path / "one").exists()
    (tmp_path / "my_vilt.py").write_text((vilt / "my_vilt.py").read_text().replace("vilt.pooler", "pooler"))
    backbone = f"backbone={tmp_path / 'my_vilt.py'}"
    code, printed = finetune("scenes_xvnli", *few, backbone)
    assert code == 2 and "Vilt.pooler_names: 'pooler'" in printed and not (tmp_path / "one").exists()
    code, printed = finetune("scenes_xvnli", *few, "backbone=my_vlit.py")
    assert code == 2 and "my_vlit.py: no such file" in printed and not (tmp_path / "one").exists()
    shutil.copy2(vilt / "my_vilt.py", tmp_path)
    code, printed = finetune("scenes_xvnli", *few, backbone, 'languages=["en"]')
    assert code == 0, printed


def test_text_longer_than_the_positions_is_one_line():
    text = Ragged(torch.arange(70), torch.tensor([2, 68]))
    with pytest.raises(UserError, match="a text of 68 tokens, the model has 64 positions; lower length="):
        UnifiedModel(UnifiedModel.sizes["tiny"]).embed_text(text, normalize=True)
    with pytest.raises(UserError, match="a text of 68 tokens, the model has 40 positions; lower length="):
        text.padded(40)


@pytest.mark.parametrize("field", ["hidden_size", "max_position_embeddings", "num_hidden_layers"])
def test_text_encoder_folder_with_a_null_size_is_one_line(field):
    config = dict(
        vocab_size=9, hidden_size=4, num_attention_heads=2, intermediate_size=8, layer_norm_eps=1e-5
    )
    config |= {"num_hidden_layers": 2, "max_position_embeddings": 12, "pad_token_id": None, field: None}
    with pytest.raises(UserError, match=f"x/config.json: no {field}; give"):
        encoder_sizes({"model_type": "roberta", **config}, "x")
    assert encoder_sizes({**config, field: 4}, "x")["positions"] in (2, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('kind = "siglip"', 'kind = "clip"'), "there is a backbone of kind 'clip'; give Siglip another"),
        (('    kind = "siglip"\n', ""), "Siglip does not declare kind"),
        (("def embed_text", "def embed_texts"), "Siglip has no embed_text"),
        (("import SiglipConfig", "import SiglopConfig"), "mine.py:9: ImportError: cannot import name"),
    ],
)
def test_user_backbone_mistakes_are_one_line(tmp_path, user_file, change, message):
    (tmp_path / "mine.py").write_text(user_file.read_text().replace(*change))
    with pytest.raises(UserError, match=message) as e:
        find_backbone(f"{tmp_path}/mine.py")
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match=r"none\.py: no such file"):
        find_backbone(f"{tmp_path}/none.py")

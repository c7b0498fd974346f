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

from finetune.model import FinetuneModel, load_backbone
from pretrain.train import export_model
from raylib.errors import UserError
from raylib.models import BACKBONES, find_backbone
from raylib.models.base import FusionBackbone, RegionBackbone, RetrievalBackbone
from raylib.models.unified import UnifiedModel
from raylib.packed import Ragged
from raylib.sample.concepts import DATA
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
    """What a head or a contrast gets of a batch: (n, any) numbers."""
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
    model.save(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        assert outputs_of(again, batch).equal(outputs_of(model.eval(), batch))
    loaded = load_backbone(tmp_path)
    assert type(loaded) is type(backbone) and loaded.config == backbone.config


@every_kind
def test_backbone_declares_what_it_has(backbone):
    names = dict(backbone.named_parameters())
    assert backbone.width > 0 and 0 <= backbone.num_fusion_layers <= backbone.num_layers
    assert set(backbone.prunable()) <= names.keys() and all(names[n].ndim == 2 for n in backbone.prunable())
    assert backbone.freezable_parts().keys() <= {"embeddings", "text", "vision", "fusion"}
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
    values = json.loads((folder / "best/config.json").read_text())
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
    assert json.loads((tmp_path / "english/best/config.json").read_text())["code"] == "mine.py:Siglip"
    (tmp_path / "mine.py").unlink()
    export_model(tmp_path / "few/ru", tmp_path / "elsewhere/model")
    code = "import sys; from finetune.model import load_backbone; print(load_backbone(sys.argv[1]).kind)"
    command = [sys.executable, "-c", code, str(tmp_path / "elsewhere/model")]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "siglip\n"
    (tmp_path / "elsewhere/model/mine.py").unlink()
    with pytest.raises(UserError, match=r"model: mine\.py, which defines its backbone, is gone; put it back"):
        load_backbone(tmp_path / "elsewhere/model")


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

"""The kind of backbone that a trained model is stored as: few-shot goes on from every one, on every kind of
task that it has."""

import json
import shutil

import pytest
import torch

from finetune.model import FinetuneModel, load_backbone
from raylib.models import BACKBONES
from raylib.models.unified import UnifiedModel
from raylib.sample.concepts import DATA
from tests.test_finetune_models import regions_of, write_regions

ENCODERS = ("unified", "cclm", "cclm_swin")  # they read pictures, and have a head that matches pairs
APART = ("mclip", "clip")
ON_REGIONS = ("uc2", "m3p", "muniter", "xuniter", "oscar")
TASKS = {"xgqa": [], "xvnli": [], "marvl": [], "xflickrco": ["candidates=3"]}
SHOTS = {"xgqa": 1, "xvnli": 5, "marvl": 4, "xflickrco": 5}


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

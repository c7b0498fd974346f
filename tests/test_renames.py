import json
import sys
from pathlib import Path

import pytest

from finetune import formats
from pretrain.recipes import tiny
from raylib import objectives, renames
from raylib.config import Config, load_config, load_user_file, override
from raylib.errors import UserError
from raylib.models import BACKBONES
from raylib.renames import MODULES, rename_settings


@pytest.fixture
def table(monkeypatch):
    table = {
        "finetune": {
            "curves": "eval_each_epoch",
            "strategies.lora.r": "strategies.lora.rank",
            "methods": "strategies",
            "data.sources.file": "data.sources.path",
            "horizon": "optim.schedule.epochs",
        }
    }
    monkeypatch.setattr(renames, "RENAMED", table)


def test_rename_settings_moves_nested_paths_and_elements_of_lists(table):
    stored = {
        "curves": True,
        "strategies": {"lora": {"r": 4}, "prior": None},
        "data": {"sources": [{"file": "a"}, {"file": "b", "weight": 1}]},
        "horizon": 3,
        "optim": {"lr": 1, "schedule": None},
    }
    before = json.dumps(stored)
    assert rename_settings("finetune", stored) == {
        "eval_each_epoch": True,
        "strategies": {"lora": {"rank": 4}, "prior": None},
        "data": {"sources": [{"path": "a"}, {"path": "b", "weight": 1}]},
        "optim": {"lr": 1, "schedule": {"epochs": 3}},
    }
    assert json.dumps(stored) == before, "the stored values themselves are left alone"
    assert rename_settings("pretrain", stored) == stored


def test_rename_settings_leaves_what_is_off_or_has_its_new_name(table):
    assert rename_settings("finetune", {"strategies": {"lora": None}}) == {"strategies": {"lora": None}}
    assert rename_settings("finetune", {"methods": {"lora": None}}) == {"strategies": {"lora": None}}
    assert rename_settings("finetune", {"curves": True, "eval_each_epoch": False}) == {
        "eval_each_epoch": False
    }


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_rename_settings_gives_sharding_for_zero(kind):
    for zero, sharding in ((True, "zero2"), (False, "none"), (None, None)):
        assert rename_settings(kind, {"fit": {"zero": zero}}) == {"fit": {"sharding": sharding}}
    assert rename_settings(kind, {"fit": {"zero": "odd"}}) == {"fit": {"sharding": "odd"}}  # refused later


def test_load_reads_a_stored_config_by_its_old_names(table, tmp_path):
    class Renamed(Config):
        stored_as = "finetune"
        eval_each_epoch: bool

    (tmp_path / "config.json").write_text('{"curves": true}')
    (tmp_path / "config.yaml").write_text("curves: true")
    assert load_config(Renamed, tmp_path / "config.json") == load_config(Renamed, tmp_path / "config.yaml")
    assert load_config(Renamed, tmp_path / "config.json").eval_each_epoch


def test_rebuild_reads_sizes_by_their_old_names(monkeypatch):
    monkeypatch.setattr(renames, "RENAMED", {"unified": {"breadth": "width"}})
    sizes = BACKBONES["unified"].sizes["tiny"].model_dump()
    sizes["breadth"] = sizes.pop("width")
    assert (
        BACKBONES["unified"].from_sizes(sizes, "unified", Path("x")).config
        == BACKBONES["unified"].sizes["tiny"]
    )


@pytest.mark.parametrize("kind", ["uc2", "m3p", "muniter", "xuniter"])
def test_single_stream_reads_whole_image_by_its_old_name(kind):
    sizes = BACKBONES[kind].sizes["tiny"].model_dump()
    sizes["whole_picture"] = sizes.pop("whole_image")
    assert BACKBONES[kind].from_sizes(sizes, kind, Path("x")).config == BACKBONES[kind].sizes["tiny"]


def test_finetuned_model_reads_number_of_images_by_its_old_name():
    assert rename_settings("finetuned", {"pictures": 2, "labels": []}) == {"num_images": 2, "labels": []}


def test_users_file_of_a_stored_run_imports_modules_by_their_old_names(tmp_path, monkeypatch):
    for old in MODULES:  # as in a new process
        monkeypatch.delitem(sys.modules, old, raising=False)
    (tmp_path / "mine.py").write_text(
        "from finetune.formats.jsonl import read_examples\nfrom raylib.objectives.terms import LossPart\n"
    )
    module = load_user_file(tmp_path / "mine.py")
    assert module.read_examples is formats.read_examples and module.LossPart is objectives.LossPart


def test_old_name_on_the_command_line_is_answered_by_the_new_one():
    with pytest.raises(UserError, match="unknown setting 'fit.zero'; it is fit.sharding now"):
        override(tiny(), ["fit.zero=true"])


def test_stored_settings_that_came_later_mean_what_was_done_before(tmp_path):
    """A stored distillation counts words between spaces; one that says so, and a new one, count otherwise."""
    from finetune.config import FinetuneConfig

    for given, found in (({}, "spaces"), ({"words": "segmented"}, "segmented")):
        stored = {"task": "cvil_vqa", "strategies": {"distillation": {"teacher": "x", **given}}}
        (tmp_path / "config.json").write_text(json.dumps(stored))
        config = load_config(FinetuneConfig, tmp_path / "config.json")
        assert config.strategies.distillation.words == found
    new = FinetuneConfig(task="cvil_vqa", strategies={"distillation": {"teacher": "x"}})
    assert new.strategies.distillation.words == "segmented"
    assert rename_settings("finetune", {"strategies": {"distillation": None}}) == {
        "strategies": {"distillation": None}
    }

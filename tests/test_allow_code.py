"""Code runs that the command line names or allows, not what a file names; models of `transformers` bring
none."""

import json
import os
import pickle
import shutil

import pytest

from finetune.__main__ import main
from finetune.config import FinetuneConfig
from finetune.recipes import RECIPES
from pretrain.__main__ import main as pretrain_main
from raylib.api.loading import _refuse_code
from raylib.config import load_config
from raylib.errors import UserError
from raylib.search.config import read_search
from tests.fuzz.readers import weights as records

CODE = "open({trace!r}, 'a').write({name!r})\n"


@pytest.fixture
def trace(tmp_path, monkeypatch):
    """A file that code writes its name into; `theirs/` holds a stranger's, the folder that one is in the
    user's."""
    trace = tmp_path / "executed"
    for name in ("theirs/task.py", "theirs/more.py", "task.py", "term.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(CODE.format(trace=str(trace), name=f"{name};"))
    monkeypatch.chdir(tmp_path)
    return trace


def write_config(path, **changes):
    path.write_text(json.dumps({"task": "scenes_xvnli", "data": "/none", **changes}))
    return str(path)


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        ("task", {"task": "task.py"}),
        ("task", {"task": "task.py:Mine", "allow_code": True}),
        ("strategies.my", {"strategies": {"my": "task.py"}}),
        ("strategies.my.file", {"strategies": {"my": {"file": "more.py:X", "a": 1}}}),
        ("backbone", {"backbone": "theirs/task.py"}),
    ],
)
@pytest.mark.parametrize("name", ["c.json", "c.yaml", "config.json"])
def test_code_of_a_config_file_is_not_run(trace, capsys, name, path, changes):
    file = write_config(trace.parent / "theirs" / name, **changes)
    for words in ([], ["epochs=2"], ["allow_code=false"], ["--print-config"], ["--help"]):
        assert main(["--config", file, *words]) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"error: {file}: {path} names code, ") and line.count("\n") == 1
        assert f"add allow_code=true to the command line, or give {path}=" in line
    assert not trace.exists()


def test_term_of_a_config_file_is_not_run(trace, capsys):
    file = trace.parent / "theirs" / "c.json"
    file.write_text(json.dumps({"objective": {"terms": {"my": {"file": "task.py", "weight": 1}}}}))
    assert pretrain_main(["--config", str(file)]) == 2
    assert "objective.terms.my.file names code" in capsys.readouterr().err and not trace.exists()


def test_code_of_a_config_file_runs_where_the_command_line_allows_it(trace, capsys):
    file = write_config(trace.parent / "theirs" / "c.json", strategies={"my": "task.py"})
    assert main(["--config", file, "allow_code=true", "--print-config"]) == 2  # it defines no strategy
    told, line = capsys.readouterr().err.splitlines()
    assert (
        told == f"note: the settings in {trace.parent}/theirs name code, which runs now: theirs/task.py"
        or (told.endswith("theirs/task.py"))
    )
    assert "no class derived from StrategyConfig" in line and trace.read_text() == "theirs/task.py;"


def test_code_that_the_command_line_gives_is_the_users_own(trace, capsys):
    """The file of the same name beside the config file is another."""
    file = write_config(trace.parent / "theirs" / "c.json", strategies={"my": "task.py"})
    assert main(["--config", file, "strategies.my=task.py"]) == 2
    assert "note" not in capsys.readouterr().err and trace.read_text() == "task.py;"
    # a word for one setting is none for another
    file = write_config(trace.parent / "theirs" / "c.json", task="task.py", strategies={"my": "more.py"})
    assert main(["--config", file, "task=more.py"]) == 2
    assert "strategies.my names code" in capsys.readouterr().err and trace.read_text() == "task.py;"


def test_code_of_a_run_that_a_command_reads_is_told(trace, capsys):
    write_config(trace.parent / "theirs" / "config.json", strategies={"my": "task.py"})
    with pytest.raises(UserError, match="no class derived"):
        load_config(FinetuneConfig, trace.parent / "theirs" / "config.json")
    assert capsys.readouterr().err.startswith("note: the settings in ") and trace.exists()


@pytest.mark.parametrize(
    "settings", [{"strategies": {"my": {"file": "task.py:X"}}}, {"task": "xvnli", "backbone": "task.py"}]
)
def test_code_that_an_export_names_is_refused(trace, settings):
    with pytest.raises(UserError, match="names code .* which no export has"):
        _refuse_code(settings, trace.parent / "config.json")
    _refuse_code({"task": "task.py"}, trace.parent / "config.json")  # a label, which nothing loads
    assert not trace.exists()


def test_code_that_another_search_names_is_not_run(trace):
    """`warm_start=` reads a stranger's search."""
    recipe = json.loads(next(iter(RECIPES.values()))().model_dump_json())
    recipe["strategies"]["my"] = str(trace.parent / "theirs/task.py")
    values = {"space": "s", "search": {}, "recipe": recipe}
    (trace.parent / "search.json").write_text(json.dumps(values))
    for own in (None, {"recipe": {"strategies": {"my": "task.py"}}}):
        stored = read_search(trace.parent, FinetuneConfig, own)
        assert stored["recipe"]["strategies"]["my"] == recipe["strategies"]["my"]
    assert not trace.exists()


# ---- folders that `transformers` reads


class Command:
    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mknod, (self.trace,)


def change(name, **values):
    def damage(folder, trace):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))

    return damage


def add_code(folder, trace):
    (folder / "evil.py").write_text(CODE.format(trace=str(trace), name="evil"))
    autos = ("AutoConfig", "AutoModel", "AutoModelForSeq2SeqLM", "AutoTokenizer")
    change("config.json", auto_map=dict.fromkeys(autos, "evil.X"), model_type="new")(folder, trace)


def add_pickles(folder, trace):
    for name in ("adapter_model.bin", "pytorch_model.bin", ".metadata", "__0_0.distcp"):
        (folder / name).write_bytes(pickle.dumps(Command(trace)))
    adapter = {"base_model_name_or_path": "/none", "peft_type": "LORA", "target_modules": ["q"]}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(CODE.format(trace=str(trace), name="evil"))


FOLDERS = {
    "swin": (records.example_swin, records.read_swin),
    "translator": (records.example_translator, records.read_translator),
    "aligner": (records.example_aligner, records.read_aligner),
}
DAMAGE = {
    "code": (add_code, "custom code|does not fit"),
    "kernel": (change("config.json", attn_implementation="some/kernel"), "code of the hub's"),
    "sizes": (change("config.json", hidden_size=16, embed_dim=64, d_model=16), "does not fit the model"),
    "type": (change("config.json", model_type="gpt2"), "not to be read|does not fit"),
    "pickles": (add_pickles, None),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", FOLDERS)
def test_folder_of_transformers_brings_no_code(tmp_path, capfd, monkeypatch, kind, damage):
    monkeypatch.setattr("builtins.input", lambda words: pytest.fail(f"asks on the terminal: {words}"))
    example, read = FOLDERS[kind]
    folder, (change_folder, words) = example(tmp_path), DAMAGE[damage]
    expected = read(folder)
    change_folder(folder, tmp_path / "executed")
    capfd.readouterr()
    if words:
        with pytest.raises(UserError, match=words) as caught:
            read(folder)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    else:  # what it adds is not read
        values = read(folder)
        assert all((values[name] == expected[name]).all() for name in expected)
    assert capfd.readouterr() == ("", "") and not (tmp_path / "executed").exists()
    shutil.rmtree(folder)

"""`pipe:` runs a shell command: the user's own, or one of a file's that the command line allows."""

import json
import os
from pathlib import Path

import pytest

from pretrain.__main__ import main
from pretrain.recipes import tiny
from raylib.config import dump_config, load_config, require_permission
from raylib.data.fetch import is_remote
from raylib.data.sources import Source
from raylib.errors import UserError
from raylib.search.space import apply_changes


@pytest.fixture
def command(tmp_path, corpus):
    """A base whose command leaves a trace, and that trace."""
    trace = tmp_path / "executed"
    return f"pipe:touch {trace}; cat {corpus}/text/{{name}}", trace


def write_config(path, command, corpus, **changes):
    config = json.loads(dump_config(tiny()))
    config |= {"corpus": str(corpus), "runtime": "local", "runs": str(path.parent / "runs"), **changes}
    config["data"]["text"]["folder"] = command
    config["data"]["cache"] = str(path.parent / "cache")
    config["fit"]["steps"] = 1
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("name", ["c.json", "c.yaml", "run/config.json"])
@pytest.mark.parametrize("changes", [{}, {"allow_pipe": True}])
def test_command_of_a_config_file_is_not_run(tmp_path, corpus, command, capsys, name, changes):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    path = write_config(tmp_path / name, command[0], corpus, **changes)
    for words in ([], ["fit.steps=2"], ["data.text.batch=16"], ["allow_pipe=false"]):
        assert main(["--config", str(path), *words]) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"error: {path}: data.text.folder is a shell command, 'pipe:touch ")
        assert line.count("\n") == 1 and "add allow_pipe=true to the command line" in line
    assert not command[1].exists() and not (tmp_path / "runs").exists()


def test_command_of_a_config_file_is_shown_and_not_run(tmp_path, corpus, command, capsys):
    path = write_config(tmp_path / "c.json", command[0], corpus, allow_pipe=True)
    assert main(["--config", str(path), "--print-config"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["data"]["text"]["folder"] == command[0] and printed["allow_pipe"] is False
    assert main(["--config", str(path), "--help"]) == 0 and not command[1].exists()


def test_command_in_another_s_place_needs_no_permission(tmp_path, corpus, command):
    """What the command line gives is the user's own, in whole or by the stream."""
    config = load_config(type(tiny()), write_config(tmp_path / "c.json", command[0], corpus))
    values = config.model_dump()
    with pytest.raises(UserError, match=r"data\.text\.folder is a shell command"):
        require_permission(config, values, "c.json", ["data.text.batch=3", "data.tex=1"])
    for assignment in ("data.text.folder=/x", 'data.text={"folder": "/x"}', "data={}"):
        require_permission(config, values, "c.json", [assignment])
    require_permission(config.model_copy(update={"allow_pipe": True}), values, "c.json")


def test_command_that_is_allowed_or_given_runs_and_its_run_resumes(tmp_path, corpus, command, capsys):
    """A run that began with a command goes on by the same rule: the permission belongs to a start."""
    path = write_config(tmp_path / "c.json", command[0], corpus, name="x")
    small = ["data.image_text.batch=0", "data.parallel.batch=0", "data.dev=false"]
    small += ["objective.weights.ucl_translation=0", "fit.loader_workers=0"]
    assert main(["--config", str(path), "allow_pipe=true", *small]) == 0, capsys.readouterr().err
    assert command[1].exists()
    stored = tmp_path / "runs/x/config.json"
    command[1].unlink()
    assert main(["--config", str(stored), "fit.steps=2"]) == 2
    assert "data.text.folder is a shell command" in capsys.readouterr().err and not command[1].exists()
    own = f"data.text.folder={command[0]}"
    for allowed in (["allow_pipe=true"], [own]):
        assert main(["--config", str(stored), *allowed]) == 0, capsys.readouterr().err


def test_command_of_a_search_space_needs_permission(command):
    with pytest.raises(UserError, match=r"^the search space: data\.text\.folder is a shell command"):
        apply_changes(tiny(), {"data.text.folder": command[0]})
    allowed = tiny().model_copy(update={"allow_pipe": True})
    assert apply_changes(allowed, {"data.text.folder": command[0]}).data.text.folder == command[0]


def test_path_is_never_a_command(tmp_path, monkeypatch, command, corpus):
    """Settings of folders other than the streams' are paths, whatever they say."""
    monkeypatch.chdir(tmp_path)
    assert is_remote(command[0]) and not is_remote(Path(command[0]))
    with pytest.raises(UserError, match="no such file"):
        Source(Path(command[0]))
    own = ["tiny", "runtime=local", f"runs={tmp_path}/runs", f"corpus={corpus}"]
    for setting in ("corpus", "data.retrieval", "data.dev"):
        assert main([*own, f"{setting}={command[0]}"]) == 2
    assert not command[1].exists() and os.listdir(tmp_path) in ([], ["runs"])

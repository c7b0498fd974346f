"""`polyglance`, the console script: it lists, finds and runs the commands of all packages."""

import contextlib
import subprocess
import sys

import pytest

from raylib import __version__
from raylib.command import COMMANDS, main, spell_commands


@pytest.fixture(autouse=True)
def argv(monkeypatch):
    """`main` names its process."""
    monkeypatch.setattr(sys, "argv", ["python"])


@pytest.mark.parametrize(
    ("arguments", "code"), [([], 2), (["--help"], 0), (["help"], 0), (["data"], 2), (["data", "-h"], 0)]
)
def test_console_lists_every_command_with_one_line(arguments, code, capsys):
    assert main(arguments) == code
    lines = capsys.readouterr().out.splitlines()
    group = "data " if arguments[:1] == ["data"] else ""
    for command in COMMANDS:
        if command.name.startswith(group) and " " not in command.name.removeprefix(group):
            assert [line for line in lines if line.split("  ")[1:2] == [command.name]], command.name
    assert max(map(len, lines)) <= 100


def test_console_names_nearest_commands(capsys):
    assert main(["fintune"]) == 2 and main(["data", "scene"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: unknown command 'fintune'; did you mean finetune?; `polyglance --help` lists them",
        "error: unknown command 'data scene'; did you mean data scenes or data encoder or data index?; "
        "`polyglance --help` lists them",
    ]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_console_help_is_that_of_python_m_under_its_own_name(command, capsys, monkeypatch):
    def page(run, *arguments):
        with contextlib.suppress(SystemExit):  # of argparse
            assert run([*arguments, "--help"]) == 0
        return capsys.readouterr().out

    monkeypatch.setenv("COLUMNS", "200")
    module = __import__(command.module, fromlist=["main"])
    plain = page(module.main, *command.leading)
    console = page(main, *command.name.split())
    assert plain.startswith(f"usage: {command.python} ")
    assert console.startswith(f"usage: polyglance {command.name} ")
    assert "python -m" in plain and "python -m" not in console
    assert " ".join(console.split()) == " ".join(spell_commands(plain).split())
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, page(main, *command.name.split()).splitlines())) <= 80


def test_console_lists_commands_without_torch():
    code = "import sys; from raylib.command import main; main(['--help']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_console_errors_name_its_commands(capsys, tmp_path):
    assert main(["cluster", "run"]) == 2
    assert "polyglance cluster run -- polyglance pretrain tiny" in capsys.readouterr().err


def test_console_tells_its_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"polyglance {__version__}\n"

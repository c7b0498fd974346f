"""docs/extending.md as a reader follows it: every file of the page is written, every command run, section by
section.

A fenced block "```python my_task.py" is the file of that name (other languages likewise); the lines of a
"```console" block that begin with "$ " are commands. A block of neither kind may only be "```text": what a
command prints.
"""

import re
import runpy
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.S | re.M))
BLOCK = re.compile(r"^```(\S+)(?: (\S+))?\n(.*?)^```$", re.S | re.M)
COMMANDS = ("pretrain", "finetune", "tune_spaces")


def run(command: str) -> int:
    """Exit status of `python -m PACKAGE ...`, run in this process, or of `python FILE.py`."""
    words = shlex.split(command)
    if words[1].endswith(".py"):
        runpy.run_path(words[1], run_name="__main__")
        return 0
    assert words[:2] == ["python", "-m"] and words[2] in COMMANDS, command
    return import_module(f"{words[2]}.__main__").main(words[3:])


@pytest.mark.parametrize("section", SECTIONS)
def test_extending_page_section_runs(section, tmp_path, monkeypatch, scenes, corpus, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "scenes").symlink_to(scenes)
    (tmp_path / "runs" / "corpus").symlink_to(corpus)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for language, name, body in BLOCK.findall(SECTIONS[section]):
        if name:
            Path(name).write_text(body, encoding="utf-8")
            continue
        assert language in ("console", "text"), f"{section}: a block of {language} without a file name"
        for command in re.findall(r"^\$ (.+)$", body, re.M) if language == "console" else ():
            assert run(command) == 0, f"{command}: {capsys.readouterr()}"


def test_extending_page_blocks_are_all_found():
    assert len(BLOCK.findall(PAGE.read_text(encoding="utf-8"))) * 2 == PAGE.read_text(encoding="utf-8").count(
        "```"
    )

"""The generated parts of README and docs are what the recorded results say; each script explains itself."""

import ast
import runpy
import shutil
from pathlib import Path

import pytest

from benchmarks import data, record, results
from raylib.fileio import append_jsonl, read_jsonl
from raylib.text import Tokenizer

FOLDER = results.ROOT / "benchmarks"
LIBRARIES = {"__init__", "results", "twin"}  # what scripts share; not run


def test_benchmark_tables_match_recorded_results(tmp_path):
    files = ("README.md", "docs/results.md", "docs/performance.md", "docs/data.md")
    (tmp_path / "docs").mkdir()
    for name in files:
        shutil.copy2(results.ROOT / name, tmp_path / name)
    record.write_pages(tmp_path)
    for name in files:
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert text == (results.ROOT / name).read_text(encoding="utf-8"), (
            f"python -m benchmarks.record: {name}"
        )
        assert "Not measured yet" not in text


def test_benchmark_records_newest_of_a_run_counts(tmp_path):
    append_jsonl(tmp_path / "runs.jsonl", {"run": "a", "value": 1})
    append_jsonl(tmp_path / "runs.jsonl", {"run": "a", "value": 2})
    assert results.newest(read_jsonl(tmp_path / "runs.jsonl"), "run") == [{"run": "a", "value": 2}]


def test_reading_benchmark_finds_its_tokenizer():
    assert Tokenizer.load(data.TOKENIZER).vocabulary > 10_000


@pytest.mark.parametrize("name", sorted({path.stem for path in FOLDER.glob("*.py")} - LIBRARIES))
def test_benchmark_help_prints_and_runs_nothing(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [name, "--help"])
    before = {path: path.stat().st_mtime for path in FOLDER.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert exit.value.code == 0 and "usage:" in capsys.readouterr().out
    assert {path: path.stat().st_mtime for path in FOLDER.rglob("*") if path.is_file()} == before


def test_benchmark_files_import_each_other_in_one_direction():
    def imports(path: Path) -> set[str]:
        """Files of this folder that a file imports, wherever in it."""
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "benchmarks":
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks."):
                names.add(node.module.removeprefix("benchmarks."))
        return names

    left = {path.stem: imports(path) for path in FOLDER.glob("*.py")}
    while leaves := [name for name, others in left.items() if not others & left.keys()]:
        for name in leaves:
            del left[name]
    assert not left, f"these import each other in a circle: {sorted(left)}"

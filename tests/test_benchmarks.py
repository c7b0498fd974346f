"""The generated parts of README and docs are what the recorded results say; each script explains itself."""

import ast
import runpy
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks import data, record, results
from benchmarks.device import GPU
from benchmarks.dry import dry_run
from raylib.fileio import append_jsonl, read_jsonl
from raylib.text import Tokenizer

FOLDER = results.ROOT / "benchmarks"
LIBRARIES = {
    "__init__",
    "device",
    "dry",
    "gpu_parts",
    "gpu_peers",
    "gpu_steps",
    "results",
    "twin",
}  # what scripts share; not run


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


def test_dry_run_counts_operators_copies_and_waits():
    with dry_run() as counter:
        layer = torch.nn.Linear(8, 4, device=GPU)
        counter.clear()
        x = torch.arange(24.0).view(3, 8).to(GPU, non_blocking=True)
        rows = torch.tensor([2, 0]).to(GPU)  # waits
        with torch.autocast("cuda", torch.bfloat16):
            out = layer(x.index_select(0, rows))
        assert out.device == GPU and out.is_cuda and out.dtype == torch.bfloat16
        counter.phase = "backward"
        out.sum().backward()
        assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.shape == (4, 8)
        assert rows.cpu().tolist() == [2, 0] and int(rows.max()) == 2  # two more
    figures = counter.summary()
    assert sum(figures["waits"].values()) == 3 and figures["attention_calls"] == 0
    assert figures["host_to_device"] == {"copies": 2, "bytes": 3 * 8 * 4 + 2 * 8}
    # forward: two copies, index_select, three casts, addmm
    assert figures["operators"]["forward"] == 7
    assert sum(op.flops for op in counter.operators) == 2 * (2 * 2 * 8 * 4)  # x needs no gradient
    assert not torch.is_autocast_enabled("cuda") and torch.ones(2).sum().item() == 2


def test_dry_run_counts_packed_attention_by_its_lengths():
    with dry_run() as counter:
        ends = torch.tensor([0, 3, 10], dtype=torch.int32).to(GPU)
        q, k, v = (torch.zeros(10, 2, 16, device=GPU, dtype=torch.bfloat16) for _ in range(3))
        counter.clear()
        torch.ops.aten._flash_attention_forward(q, k, v, ends, ends, 7, 7, 0.1, False, False)
    assert counter.summary()["attention_calls"] == 1
    assert counter.operators[0].flops == 4 * 2 * 16 * (3 * 3 + 7 * 7)

"""The generated parts of the READMEs are what the recorded results say."""

import shutil

from benchmarks import data, record
from raylib.fileio import append_jsonl, read_jsonl
from raylib.text import Tokenizer


def test_benchmark_tables_match_recorded_results(tmp_path, monkeypatch):
    files = ("README.md", "benchmarks/README.md")
    (tmp_path / "benchmarks").mkdir()
    for name in files:
        shutil.copy2(record.ROOT / name, tmp_path / name)
    monkeypatch.setattr(record, "ROOT", tmp_path)
    record.main([])
    for name in files:
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert text == (record.RESULTS.parent.parent / name).read_text(encoding="utf-8"), (
            f"python -m benchmarks.record: {name}"
        )
        assert "Not measured yet" not in text


def test_benchmark_records_newest_of_a_run_counts(tmp_path):
    append_jsonl(tmp_path / "runs.jsonl", {"run": "a", "value": 1})
    append_jsonl(tmp_path / "runs.jsonl", {"run": "a", "value": 2})
    assert record.newest(read_jsonl(tmp_path / "runs.jsonl"), "run") == [{"run": "a", "value": 2}]


def test_reading_benchmark_finds_its_tokenizer():
    assert Tokenizer.load(data.TOKENIZER).vocabulary > 10_000

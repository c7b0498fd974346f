"""The generated parts of README and docs are what the recorded results say; each script explains itself."""

import ast
import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks import by_hand, data, gpu, gpu_tables, record, results, scaling
from benchmarks.device import GPU
from benchmarks.dry import dry_run
from raylib.fileio import append_jsonl, read_jsonl
from raylib.text import Tokenizer

FOLDER = results.ROOT / "benchmarks"
LIBRARIES = {"__init__", "by_hand", "device", "dry", "results", "twin"}
LIBRARIES |= {f"claims_{part}" for part in ("report", "runs", "search", "table", "tasks", "work")}
LIBRARIES |= {f"gpu_{part}" for part in ("parts", "peers", "steps", "tables")}  # what scripts share; not run


def test_benchmark_tables_match_recorded_results(tmp_path):
    docs = ("results", "performance", "data", "cluster", "security")
    own = {"README.md", "benchmarks/claims.md", "raylib/sample/scenes/README.md"}
    files = own | {f"docs/{name}.md" for name in docs} | by_hand.pages().keys()
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(results.ROOT / name, tmp_path / name)
    record.write_pages(tmp_path)
    for name in files:
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert text == (results.ROOT / name).read_text(encoding="utf-8"), (
            f"python -m benchmarks.record: {name}"
        )
        assert "Not measured yet" not in text


PAGES = ("README.md", "benchmarks/README.md", "benchmarks/claims.md", "raylib/sample/data/README.md")
PAGES += ("raylib/sample/scenes/README.md",)
PAGES += tuple(
    f"docs/{path.name}"
    for path in sorted((results.ROOT / "docs").glob("*.md"))
    if path.name not in ("changelog.md", "recipes.md")  # history; generated as a whole
)
# What has a unit, and decimals but of an address or a version of three numbers ("640 x 427" is a size).
MEASURED = (
    r"(?<![\w.-])(?:\d+(?:[.,]\d+)*(?: ?(?:%|x\b(?! \d)|times\b|points?\b)"
    r"| (?:us|ms|s|CPU-s|CPU-seconds|GFLOP/s|MB|GB)\b)|\d+\.\d+(?!\.?\d))"
)
# Numbers outside what is generated and code that are no measurement of ours, on any page and by page.
ALLOWED_NUMBERS = {
    "": {
        "3.11": "Python's version",
        "3.13": "Python's version",
        "95 %": "the level of intervals, raylib.metrics",
        "127.5": "half of 255",
    },
    "docs/quick-start.md": {"3 GB": "what the installed requirements take, asked of the reader's disk"},
    "benchmarks/README.md": {"1 GB": "size of the checkpoint, chosen"},
    "docs/cluster.md": {
        "4 GB": "12 bytes a parameter of base, of 7 in 8 of them",
        "25 MB": "raylib.engine.BUCKET_MB",
        "300 MB": "shared memory to give",
        **dict.fromkeys(("3 s", "10 s", "30 s", "60 s", "120 s", "300 s"), "limits of time, settings"),
    },
    "docs/data.md": {
        "1.04": "WikiMatrix's margin",
        "16 MB": "raylib.data.sources.MAX_TEXT_BYTES",
        "256 MB": "raylib.data.tars.MAX_MEMBER_BYTES",
    },
    "docs/extending.md": {"1.0": "an answer's score, in an example"},
    "docs/finetuning.md": {
        **dict.fromkeys(("10 %", "70 %", "90 %"), "limits of the marks, finetune"),
        "0.01": "bad_limit",
        **dict.fromkeys(("0.02", "0.1", "0.3"), "the papers' heads: initialisation, dropout"),
    },
    "docs/methods.md": dict.fromkeys(("0.16 %", "0.45 %", "0.05 %"), "counted, tests/test_tuning.py"),
    "docs/monitoring.md": {
        "10 %": "limit of a log line",
        **dict.fromkeys(("0.61 s", "0.21 s"), "an example of a log line"),
        **dict.fromkeys(("1.5 times", "10 ms"), "limits of a log line"),
        "0.5": "chance",
    },
    "docs/performance.md": {
        "0.4 MB": "257 x 768 numbers of 2 bytes",
        "0.27 GB": "pretrain.embeddings.FrozenStates.LIMIT",
        "2 GB": "store_gb",
        "8.0": "a compute capability",
    },
    "docs/pretraining.md": {
        **dict.fromkeys(("0.001", "0.02", "0.1", "0.2", "0.3", "0.5", "15 %"), "the paper's and its code's"),
        "2303.15343": "arXiv",
        "0.85 GB": "by the formula beside it",
        "1.2 GB": "raylib.memory.RESERVED",
        "0.01": "bad_limit; a temperature",
        "8.0": "a compute capability",
    },
    "docs/results.md": {
        "281.64": "parameters, counted by the code (tests/test_single_stream.py)",
        "281.66": "parameters, printed in UC2's paper",
    },
    "docs/search.md": dict.fromkeys(("0.001", "0.01", "0.1"), "values of a space"),
    "raylib/sample/data/README.md": {
        "18 MB": "size of the folder, shipped",
        **dict.fromkeys(("2.0", "4.0"), "versions of licences"),
        "2.3": "EmojiOne's version",
    },
    "raylib/sample/scenes/README.md": {
        "30 %": "sentences made wrong, a setting",
        "0.5": "difficulty",
        "3.0": "WordNet's version",
        "1.0": "version of a licence",
    },
}


def measured_numbers(text: str) -> list[str]:
    """Numbers of a page that look measured, outside its generated parts, code and links."""
    text = re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", "", text, flags=re.S)
    text = re.sub(r"^```.*?^```|^    .*?$|`[^`\n]*`|\]\([^)]*\)", "", text, flags=re.S | re.M)
    return re.findall(MEASURED, text)


@pytest.mark.parametrize("page", PAGES)
def test_pages_have_no_measured_number_that_is_not_generated(page):
    allowed = ALLOWED_NUMBERS[""] | ALLOWED_NUMBERS.get(page, {})
    found = measured_numbers((results.ROOT / page).read_text(encoding="utf-8"))
    unknown = [number for number in found if number not in allowed]
    assert not unknown, f"{page}: record what they are measured by, or give a reason in ALLOWED_NUMBERS"
    unused = ALLOWED_NUMBERS.get(page, {}).keys() - set(found)
    assert not unused, f"{page}: ALLOWED_NUMBERS has what the page has not"


def test_measured_numbers_are_told_from_versions_and_sizes():
    assert measured_numbers("2.4 ms, 17 % and 100 CPU-seconds, 3.9x; 12 MB") == [
        *("2.4 ms", "17 %", "100 CPU-seconds", "3.9x", "12 MB")
    ]
    assert not measured_numbers("127.0.0.1, 16.0.1, 640 x 427, `0.5`, 1e-10, 4,096 examples")
    assert not measured_numbers("<!-- part -->\n0.5 s\n<!-- /part -->")


def test_measurements_by_hand_have_a_place_and_all_their_figures():
    lines = by_hand.records()
    assert len({line["name"] for line in lines}) == len(lines)
    for line in lines:
        page = (results.ROOT / line["page"]).read_text(encoding="utf-8")
        assert f"<!-- {line['part']} -->\n" in page, line["name"]
        assert re.fullmatch(r"[0-9a-f]{7}", line["commit"]), line["name"]
        used = set(re.findall(r"{(\w+)", line["text"]))
        assert used <= line.keys() | line["figures"].keys(), line["name"]
        assert "recorded" in line or used >= line["figures"].keys(), line["name"]
        typed = measured_numbers(re.sub(r"{[^}]*}", "", line["text"]))
        assert not typed, f"{line['name']}: numbers that are no figures of the record"


def test_scaling_page_matches_model_of_cost_and_records():
    assert scaling.PAGE.read_text(encoding="utf-8") == scaling.page(), "python -m benchmarks.scaling"


def test_scaling_counts_what_collectives_bring():
    """By hand, of 2 workers with 3 pairs: 1 of 2 halves comes from outside."""
    s = scaling.Shapes(parameters=10, words=6, states=5, width=4, embedding=2)
    received = {t.name: t.received for t in scaling.before(s, 2, 3)}
    assert received["states of images"] == 3 * (6 * 5 * 4 * 4) / 2
    assert received["gradients"] == 2 * (6 * 4 + 4 * 2) / 2 and received["weights"] == 10 * 4 / 2
    now = {t.name: t.received for t in scaling.after(s, 2, 3, False, 2)}
    assert now["states of images"] == 2 * (3 * 5 * 4 * 2) / 2
    assert now["gradients, of words"] == 2 * 6 * 2 / 2 and "weights" not in now
    slow = scaling.Traffic("x", 8e9)
    assert scaling.seconds(slow, 16) > scaling.seconds(slow, 8), "the network is slower than NVLink"
    scattered = scaling.Traffic("x", 8e9, scattered=True)
    assert scaling.seconds(scattered, 64) > 5 * scaling.seconds(slow, 64), "through its own port alone"


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


# a step of `base`, forward and backward: what it has reached
GOALS = {"attention_calls": 96, "gb": 152.0, "tflop": 30.3, "operators": 3_190, "waits": 1}


@pytest.fixture(scope="module")
def dry_figures():
    counter = gpu.count("base", gpu.BATCH)
    figures = counter.summary()
    return {
        **figures,
        "operators": sum(figures["operators"].values()),
        "waits": sum(figures["waits"].values()),
    }


@pytest.mark.parametrize("name", GOALS)
def test_step_asks_no_more_of_a_gpu_than_it_did(dry_figures, name):
    assert dry_figures[name] <= GOALS[name]


def gpu_record() -> dict:
    """A line as `benchmarks.gpu` writes it."""
    step = {
        "ms": 100.0,
        "samples_per_second": 5760.0,
        "batch": [64, 256, 256],
        "peak_gb": 20.0,
        "estimated_gb": 19.0,
    }
    shares = {"share_of_measured_peak": 0.5, "share_of_data_sheet": 0.36}
    profile = {"kernels": 4000, "ms": 101.0, "busy_ms": 95.0, "host_ms": 60.0, "kinds_ms": {"matmul": 60.0}}
    return {
        "format": gpu_tables.FORMAT,
        "date": "2026-11-27",
        "commit": "abcdef0",
        "parts": {
            "machine": {"device": "NVIDIA H100", "torch": "2.11", "matmul_tflops": 700.0, "copy_tb_s": 2.9},
            "step": {"base": step | shares, "waits": {"raylib/a.py:1": 2}, "profile": profile},
            "twin": {"ours": {"ms": 90.0}, "twin": {"ms": 180.0}, "ours again": {"ms": 89.0}, "ratio": 2.02},
            "open_clip": {"part": {"failed": "ImportError: no module"}},
            "levers": {"fit.residual=float32": step | {"ms": 120.0}, "fit.sharding=zero2": {"failed": "x"}},
            "growth": {"512/2048/2048": "left out: no time"},
        },
    }


def test_record_leads_with_gpu_once_it_is_measured(tmp_path, monkeypatch):
    shutil.copytree(results.RESULTS, tmp_path / "results")
    for module in (record, results):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    assert record.gpu_part() == "No GPU has run it yet." or "NVIDIA" in record.gpu_part()
    append_jsonl(tmp_path / "results" / "gpu.jsonl", gpu_record())
    assert record.speed_line().startswith("On one NVIDIA H100, a training step of `base` with 64 pairs, 256")
    assert (
        "100 ms: 5,760 samples a second, 36% of its data sheet's bf16 rate and 50% of" in record.speed_line()
    )
    assert (
        "2.0x as fast as its padded twin" in record.speed_line() and "one CPU thread" in record.speed_line()
    )
    part = record.gpu_part()
    assert "| base, fit.residual=float32 | 64/256/256 | 120.0 |" in part
    assert "| twin: twin | 89.0 | 180.0 | 2.02x |" in part and "waits 2 times: raylib/a.py:1" in part


@pytest.mark.slow
def test_gpu_benchmark_rehearses_on_a_cpu(tmp_path):
    figures = gpu.measure(torch.device("cpu"), tmp_path, seconds=500)
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"].keys() == figures["parts"].keys()
    parts = figures["parts"]
    assert list(parts) == [part.__name__ for part in gpu.PARTS]
    failures = [
        (part, name, value)
        for part, names in parts.items()
        for name, value in names.items()
        if "failed" in str(value) or "left out" in str(value)
    ]
    # open_clip is a wheel that requirements.txt has not
    assert all(part == "open_clip" and "No module named 'open_clip'" in str(v) for part, _, v in failures), (
        failures
    )
    assert parts["step"]["base"]["ms"] > 0 and parts["twin"]["ratio"] > 0

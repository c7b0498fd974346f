"""Which room may import which (README, Architecture): read from the source, not from what happens to be
loaded."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {room: {"raylib", room} for room in ("raylib", "pretrain", "finetune", "cluster")}
ALLOWED["tune_spaces"] = {"raylib", "pretrain", "finetune", "tune_spaces"}
ROOMS = {"raylib", "pretrain", "finetune", "tune_spaces", "cluster", "benchmarks", "tests"}
HEAVY = {
    "ray": {"raylib/runtime.py", "raylib/launch.py"},
    "deepspeed": {"raylib/zero.py"},
}


def imports(path: Path) -> set[tuple[str, bool]]:
    """(top package, whether it is imported at the module's top level)."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        found |= {(name.split(".")[0], node in tree.body) for name in names}
    return found


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_run_one_way(room):
    for path in (ROOT / room).rglob("*.py"):
        foreign = {name for name, _ in imports(path)} & ROOMS - ALLOWED[room]
        assert not foreign, f"{path} imports {foreign}"


@pytest.mark.parametrize("package", HEAVY)
def test_ray_and_deepspeed_are_imported_only_where_allowed(package):
    for room in ("raylib", "pretrain", "finetune", "tune_spaces"):
        for path in (ROOT / room).rglob("*.py"):
            if package == "ray" and (ROOT / "raylib/search") in path.parents:
                continue  # imported only when a search begins
            found = [top for name, top in imports(path) if name == package]
            assert not found or str(path.relative_to(ROOT)) in HEAVY[package], path
            assert True not in found, f"{path} imports {package} before it is used"


def test_search_is_imported_by_searches_alone():
    for room in ("raylib", "pretrain", "finetune"):
        for path in (ROOT / room).rglob("*.py"):
            if (ROOT / "raylib/search") not in path.parents:
                text = path.read_text(encoding="utf-8")
                assert "import raylib.search" not in text and "from raylib.search" not in text, path

"""Rules of the house (README, Architecture; docs/architecture.md), read from the source, not from what
happens to be loaded."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("raylib", "pretrain", "finetune", "tune_spaces", "cluster")
ALLOWED = {room: {"raylib", room} for room in ("raylib", "pretrain", "finetune", "cluster")}
ALLOWED["tune_spaces"] = {"raylib", "pretrain", "finetune", "tune_spaces"}
# `import polyglance`: it loads models of both stages, and nothing of raylib imports it
ALLOWED["raylib/api"] = {"raylib", "pretrain", "finetune"}
ROOMS = {*PRODUCT, "benchmarks", "tests"}
HEAVY = {
    "ray": {"raylib/runtime.py", "raylib/launch.py", "raylib/ray_cluster.py", "raylib/ray_run.py"},
    "deepspeed": {"raylib/engine_zero.py"},
}
APART = {  # these import nothing of those
    "raylib/data": ("raylib.models", "raylib.objectives"),
    "finetune/formats": ("raylib.models", "finetune.tasks"),
    "finetune/stores": ("raylib.models", "finetune.tasks"),
}
MAX_FORMAT_SKIPS = 20
DENSE = ("raylib/models", "raylib/objectives", "raylib/data", "raylib/packed.py")
COMMENTS = 3  # own-line ones in 100 lines of these
QUESTIONS = re.compile(r"(What|Where|How|Which|Whether|Whatever)\b")
PROBES = {  # these may ask an object what it has, or of which kind it is
    "raylib/data/sources.py": {  # a destructor after a failed start; the kind of the data in a source
        "hasattr(self, 'file')",
        "kind != self.kind",
        "self.kind != 'image_text'",
    },
    "raylib/models/finetuned.py": {
        "find_backbone(kind).kind != stored"
    },  # the backbone named, and the one stored
}


def sources(*rooms: str) -> dict[str, str]:
    """{path from the root: text} of the Python files in these folders; a file may be given itself."""
    paths = [path for room in rooms for path in [ROOT / room, *(ROOT / room).rglob("*.py")] if path.is_file()]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(paths)}


def imports(text: str) -> set[tuple[str, bool]]:
    """(dotted module, whether it is imported at the module's top level)."""
    tree, found = ast.parse(text), set()
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        found |= {(name, node in tree.body) for name in names}
    return found


def is_inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_run_one_way(room):
    for path, text in sources(room).items():
        if room == "raylib" and path.startswith("raylib/api/"):
            continue  # a room of its own
        foreign = {name.split(".")[0] for name, _ in imports(text)} & ROOMS - ALLOWED[room]
        assert not foreign, f"{path} imports {foreign}"


@pytest.mark.parametrize("package", HEAVY)
def test_ray_and_deepspeed_are_imported_only_where_allowed(package):
    for path, text in sources("raylib", "pretrain", "finetune", "tune_spaces").items():
        found = [top for name, top in imports(text) if is_inside(name, package)]
        if package == "ray" and path.startswith("raylib/search/"):
            continue  # imported only when a search begins
        assert not found or path in HEAVY[package], path
        assert True not in found, f"{path} imports {package} before it is used"


@pytest.mark.parametrize("room", APART)
def test_readers_import_nothing_of_models(room):
    for path, text in sources(room).items():
        found = {name for name, _ in imports(text) if any(is_inside(name, other) for other in APART[room])}
        assert not found, f"{path} imports {found}"


def test_search_is_imported_by_searches_alone():
    for path, text in sources("raylib", "pretrain", "finetune").items():
        found = {name for name, _ in imports(text) if is_inside(name, "raylib.search")}
        assert path.startswith("raylib/search/") or not found, f"{path} imports {found}"


@pytest.mark.parametrize("room", DENSE)
def test_dense_code_is_commented(room):
    lines = [line.strip() for text in sources(room).values() for line in text.splitlines()]
    comments = sum(line.startswith("#") for line in lines)
    assert comments >= COMMENTS * len(lines) / 100, f"{comments} in {len(lines)} lines"


def test_format_is_rarely_skipped():
    texts = sources(*PRODUCT, "benchmarks", "tests").values()
    assert sum(text.count("# fmt: " + "skip") for text in texts) <= MAX_FORMAT_SKIPS


@pytest.mark.parametrize("room", PRODUCT)
def test_docstrings_are_statements(room):
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        f"{path}: {doc.splitlines()[0]}"
        for path, text in sources(room).items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, documented) and QUESTIONS.match(doc := ast.get_docstring(node) or "")
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("room", PRODUCT)
def test_objects_are_not_probed(room):
    """`hasattr`, `getattr` of a name written out or with a default, `.kind ==`: what an object can do is
    declared by its class."""
    found = set()
    for path, text in sources(room).items():
        for node in ast.walk(ast.parse(text)):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            probe = called == "hasattr" or (
                called == "getattr" and (len(node.args) > 2 or isinstance(node.args[1], ast.Constant))
            )
            compared = isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.NotEq)
            if compared:
                sides = [node.left, *node.comparators]
                compared = any(isinstance(side, ast.Attribute) and side.attr == "kind" for side in sides)
            if probe or compared:
                found.add((path, ast.unparse(node)))
    allowed = {(path, line) for path, lines in PROBES.items() for line in lines}
    assert not found - allowed, "\n".join(f"{path}: {line}" for path, line in sorted(found - allowed))

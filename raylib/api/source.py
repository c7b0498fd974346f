"""One Python file out of several modules: what some definitions need, and nothing else.

So the code of an export is ours, and not a second model written by hand. Definitions at the top level of a
module are kept if a kept one names them; statements that are none (settings of a library for the whole
process) are left out, as are methods about files and published weights. Names stay as they are: two different
definitions of one name are an error, which tests of every kind of model would meet.
"""

import ast
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import raylib

ROOT = Path(raylib.__file__).parent.parent
PACKAGES = ("raylib", "finetune", "pretrain")
# methods that store models, read them, or import published weights
LEFT_OUT = (
    *("import_weights", "has_embeddings", "save", "from_pretrained", "from_sizes", "check_declaration"),
    "published_preprocessing",
)

Key = tuple[str, str]  # module, name


class Module:
    """The top-level statements of a module by the names that they define."""

    def __init__(self, name: str, path: Path):
        self.name, self.text = name, path.read_text(encoding="utf-8")
        self.lines = self.text.splitlines(keepends=True)
        self.definitions: dict[str, ast.stmt] = {}
        self.internal: dict[str, Key] = {}  # local name -> what it is elsewhere; ("module", "") is the module
        self.external: dict[str, str] = {}  # local name -> the import that brings it
        for statement in ast.parse(self.text).body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                self._add_import(statement)
            else:
                self.definitions |= dict.fromkeys(_defined(statement), statement)

    def _add_import(self, statement: ast.Import | ast.ImportFrom) -> None:
        for alias in statement.names:
            local = alias.asname or alias.name.split(".")[0]
            renamed = f" as {alias.asname}" if alias.asname else ""
            if isinstance(statement, ast.Import):
                self.external[local] = f"import {alias.name}{renamed}"
            elif statement.module and statement.module.split(".")[0] in PACKAGES:
                below = f"{statement.module}.{alias.name}"
                is_module = find_module(below) is not None
                self.internal[local] = (below, "") if is_module else (statement.module, alias.name)
            else:
                self.external[local] = f"from {statement.module} import {alias.name}{renamed}"

    def kept_lines(self, statement: ast.stmt) -> str:
        """The text of a statement with the comments above it, without the methods that are left out."""
        first = min([statement.lineno, *(d.lineno for d in _decorators(statement))]) - 1
        while first and self.lines[first - 1].startswith("#"):
            first -= 1
        text = self.lines[first : statement.end_lineno]
        for method in reversed(list(_left_out(statement))):
            start = min([method.lineno, *(d.lineno for d in _decorators(method))]) - 1 - first
            assert method.end_lineno is not None
            end = method.end_lineno - first
            while end < len(text) and not text[end].strip():
                end += 1
            del text[start:end]
        return "".join(text).rstrip() + "\n"


def bundle(
    roots: Sequence[Key], files: Mapping[str, Path], replaced: Mapping[Key, tuple[str, Sequence[Key]]]
) -> str:
    """The text of a module with the definitions `roots` and all that they need.

    files: modules that lie elsewhere, a user's, by the name that roots call them. replaced: definitions that
        have another text in it, and what that needs.
    """
    modules: dict[str, Module] = {}
    kept: dict[str, set[str]] = {}  # names by module
    imports: set[str] = set()

    def module(name: str) -> Module:
        if name not in modules:
            path = files.get(name) or find_module(name)
            assert path is not None, f"no module {name}"
            modules[name] = _parse(name, path)
        return modules[name]

    def keep(key: Key) -> None:
        name, definition = key
        source = module(name)
        if definition in source.internal:
            return keep(source.internal[definition])
        if definition in source.external:
            imports.add(source.external[definition])
        elif definition in source.definitions and definition not in kept.setdefault(name, set()):
            kept[name].add(definition)
            if key in replaced:
                for needed in replaced[key][1]:
                    keep(needed)
            else:
                for needed in _names(source, source.definitions[definition]):
                    keep(needed)
        return None

    for root in roots:
        keep(root)
    parts = [
        f"# {'-' * 20} {name.replace('.', '/')}.py\n\n" + _render(modules[name], kept[name], replaced)
        for name in _in_order(modules, kept)
    ]
    _refuse_doubles(kept)
    plain = sorted(line for line in imports if line.startswith("import "))
    others = sorted(imports.difference(plain))
    return "\n".join([*plain, *others]) + "\n\n\n" + "\n\n".join(parts)


@functools.cache
def _parse(name: str, path: Path) -> Module:
    return Module(name, path)


def find_module(name: str) -> Path | None:
    """The file of one of our modules."""
    path = ROOT.joinpath(*name.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def _defined(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    if isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]


def _decorators(statement: ast.stmt) -> list[ast.expr]:
    return statement.decorator_list if isinstance(statement, ast.FunctionDef | ast.ClassDef) else []


def _left_out(statement: ast.stmt) -> Iterator[ast.FunctionDef]:
    """The methods of a class that are left out."""
    for node in statement.body if isinstance(statement, ast.ClassDef) else []:
        if isinstance(node, ast.FunctionDef) and node.name in LEFT_OUT:
            yield node


def _names(module: Module, statement: ast.stmt) -> Iterator[Key]:
    """Yield all that a statement names, where it is defined: of a module of ours, the name after the dot."""
    left_out = set(_left_out(statement))
    nodes: list[ast.AST] = [statement]
    while nodes:
        node = nodes.pop()
        if node in left_out:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
            raise AssertionError(f"{module.name}:{node.lineno}: imported inside of a function")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            target = module.internal.get(node.value.id)
            if target and not target[1]:
                yield target[0], node.attr
                continue
        if isinstance(node, ast.Name):
            yield module.name, node.id
        nodes += ast.iter_child_nodes(node)


def _render(module: Module, names: set[str], replaced: Mapping[Key, tuple[str, Sequence[Key]]]) -> str:
    """The kept definitions of a module, in their order."""
    texts = {}
    for name in sorted(names, key=lambda name: module.definitions[name].lineno):
        statement = module.definitions[name]
        found = replaced.get((module.name, name))
        texts[statement] = found[0] if found else module.kept_lines(statement)
    text = "\n\n".join(texts.values())
    for alias in (local for local, (_, name) in module.internal.items() if not name):
        text = re.sub(rf"(?<![\w.`]){alias}\.(?=\w)", "", text)
    return text


def _in_order(modules: Mapping[str, Module], kept: Mapping[str, set[str]]) -> list[str]:
    """Modules with kept definitions, each after those that it imports."""
    order: list[str] = []

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in order or name in above or name not in modules:
            return
        for imported in sorted({target for target, _ in modules[name].internal.values()}):
            visit(imported, (*above, name))
        order.append(name)

    for name in modules:
        visit(name, ())
    return [name for name in order if kept.get(name)]


def _refuse_doubles(kept: Mapping[str, set[str]]) -> None:
    places: dict[str, str] = {}
    for module, names in kept.items():
        for name in names:
            assert places.setdefault(name, module) == module, f"{name} is in {places[name]} and in {module}"

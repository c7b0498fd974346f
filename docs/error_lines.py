"""Write the list of all error lines into troubleshooting.md, from the code: `python docs/error_lines.py`."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
ERRORS = ("UserError", "MachineError", "NotFinite")
AREAS = {  # heading: where the code lies; the first that fits
    "Settings and command lines": ("raylib/config", "raylib/command", "raylib/renames"),
    "Runs, checkpoints, Ray": (
        *(
            f"raylib/{name}"
            for name in ("launch", "runtime", "checkpoint", "engine", "loop", "provenance", "track")
        ),
        "cluster",
    ),
    "Numbers that are not finite": ("raylib/finite",),
    "Pretraining data": ("raylib/data", "pretrain"),
    "Text and tokenizers": ("raylib/text",),
    "Models and their files": (
        "raylib/weights",
        "raylib/pickles",
        "raylib/models",
        "finetune/model",
        "finetune/decoder",
        "raylib/api",
    ),
    "Fine-tuning data": ("finetune/formats", "finetune/stores", "finetune/overlap"),
    "Methods": ("finetune/strategies",),
    "Fine-tuning runs and tasks": ("finetune",),
    "Searches": ("raylib/search", "tune_spaces"),
    "The miniature world": ("raylib/sample",),
    "Others": ("raylib",),
}


def template(node: ast.expr) -> str:
    """The text of a message; what is filled in stands in capitals where it has a name,
    else as an ellipsis."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(value) for value in node.values)
    if isinstance(node, ast.FormattedValue):
        return template(node.value)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    if isinstance(node, ast.Attribute):
        return node.attr.strip("_").upper()
    return node.id.upper() if isinstance(node, ast.Name) and len(node.id) > 1 else "…"


def error_lines() -> dict[str, list[str]]:
    """{area: the messages of all errors that are raised or returned there}."""
    lines: dict[str, set[str]] = {area: set() for area in AREAS}
    for package in ("raylib", "pretrain", "finetune", "tune_spaces", "cluster"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            area = next(area for area, starts in AREAS.items() if name.startswith(starts))
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS:
                    text = " ".join(template(node.args[0]).split())
                    if len(re.findall("[a-z]{2,}", text)) > 1:  # not a message that was made elsewhere
                        lines[area].add(text)
    return {area: sorted(found, key=lambda line: line.lstrip("…`'").lower()) for area, found in lines.items()}


def page() -> str:
    """The page with its list made anew."""
    parts = []
    for area, lines in error_lines().items():
        quoted = (line.replace("`", "'") for line in lines)
        parts += [f"### {area}", "\n".join(f"- `{line}`" for line in quoted)]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition("<!-- lines -->\n")
    return (
        before
        + "<!-- lines -->\n"
        + "\n\n".join(parts)
        + "\n<!-- /lines -->"
        + rest.partition("<!-- /lines -->")[2]
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

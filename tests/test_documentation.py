"""Links, anchors, images and commands of the documentation name what is there."""

import importlib
import re
import runpy
import shlex
from pathlib import Path

import pytest
import yaml

from finetune.recipes import RECIPES as FINETUNE
from pretrain.recipes import RECIPES as PRETRAIN
from raylib.command import COMMANDS
from raylib.config import override
from raylib.search.config import SearchConfig
from tune_spaces.spaces import SPACES

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), ROOT / ".github" / "CONTRIBUTING.md"]
EXAMPLES = {"RECIPE", "SPACE", "X", "...", "COMMAND"}  # placeholders, where a name would stand
NAMES = {command.python: command.name for command in COMMANDS}


def without_code(text: str) -> str:
    """A page without its code, in which brackets are no links."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return re.sub(r"`[^`\n]*`", "", re.sub(r"(?m)^    .*$", "", text))


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    heads = re.findall(r"(?m)^#+ (.+)$", path.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_documentation_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target}"
        assert page.parent != DOCS or path.is_relative_to(DOCS), (
            f"{page.name}: {target} is not on the web site"
        )
        assert not anchor or anchor in anchors(path), f"{page.name}: no heading for {target}"


def test_documentation_site_has_every_page():
    site = yaml.safe_load((ROOT / ".github" / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = [name for entry in site["nav"] for name in entry.values()]
    assert len(listed) == len(set(listed))
    assert set(listed) == {path.name for path in DOCS.glob("*.md")}


def test_documentation_lists_every_error_line():
    page = runpy.run_path(str(DOCS / "error_lines.py"))["page"]()
    assert page == (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), "python docs/error_lines.py"


def test_documentation_lists_every_recipe():
    page = runpy.run_path(str(DOCS / "recipes.py"))["page"]()
    assert page == (DOCS / "recipes.md").read_text(encoding="utf-8"), "python docs/recipes.py"
    for row in ("p4_multi30k_framework", "iglue_uc2_translate_test_wit", "p0_uc2_cdm", "base"):
        assert f"| `{row}` |" in page


def command_lines() -> list[tuple[str, str]]:
    """(page, command line) of all commands of ours: lines of code, and code within a sentence."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        lines = re.findall(r"(?m)^(?:    |\$ )?((?:polyglance|python -m|make|ray job submit) .*)$", text)
        lines += re.findall(
            r"`((?:polyglance|python -m|make|ray job submit) [^`]+)`", text.replace("\n", " ")
        )
        found += [(page.name, re.sub(r"\s+#.*", "", line).strip()) for line in lines]
    return found


def test_documentation_make_targets_exist():
    targets = set(re.findall(r"(?m)^([\w/-]+):", (ROOT / "Makefile").read_text(encoding="utf-8")))
    used = {line.split()[1] for _, line in command_lines() if line.startswith("make ")}
    assert used and used <= targets


def test_documentation_commands_have_recipes_and_settings_that_exist():
    checked = 0
    for page, line in command_lines():
        line = line.split(" -- ")[-1]  # what `ray job submit` and `cluster run` run
        for python, name in sorted(NAMES.items(), key=lambda item: -len(item[0])):
            if re.match(rf"{re.escape(python)}(?![\w.])", line):
                line = f"polyglance {name}{line.removeprefix(python)}"
        if not line.startswith("polyglance "):
            continue
        words = [word for word in shlex.split(line.replace("[", "").replace("]", ""))[1:] if word != "..."]
        check_command(words, f"{page}: {line}")
        checked += 1
    assert checked > 30


def check_command(words: list[str], where: str) -> None:
    """Check the words after `polyglance`."""
    names = {command.name for command in COMMANDS}
    assert (
        not words or words[0].startswith("-") or words[0] in {name.split()[0] for name in names} | EXAMPLES
    ), where
    settings = [word for word in words if re.match(r"[a-z_.]+=", word) and "=..." not in word]
    if words[0] == "data" and len(words) > 1:
        assert " ".join(words[:2]) in names, where
    if len(words) < 2 or words[1].startswith("-") or words[1] in EXAMPLES or words[1].endswith(".py"):
        return
    if words[0] == "pretrain" and words[1] not in ("evaluate", "overlap", "export", "convert", "settings"):
        assert words[1] in PRETRAIN, where
        override(PRETRAIN[words[1]](), settings)
    if words[0] == "finetune" and words[1] not in ("evaluate", "compare", "analyse", "translate", "settings"):
        assert words[1] in FINETUNE, where
        override(FINETUNE[words[1]](), [s for s in settings if not s.startswith("strategies.my")])
    if words[0] == "search" and words[1] != "settings":
        assert words[1] in SPACES, where
        own = [s for s in settings if s.split("=")[0] in SearchConfig.model_fields]
        assert {s for s in settings if s.startswith("recipe=")} <= {
            f"recipe={n}" for n in {**FINETUNE, **PRETRAIN}
        }, where
        override(SearchConfig(recipe="tiny"), own)


def test_documentation_of_security_has_the_limits_of_the_code():
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    table = text.partition("<!-- limits -->")[2].partition("<!-- /limits -->")[0]
    rows = [line.strip("| ").split(" | ") for line in table.strip().splitlines()[2:]]
    assert len(rows) > 10
    units = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
    for _, limit, place in rows:
        module, _, name = place.rpartition(".")
        number, _, unit = limit.partition(" ")
        value = getattr(importlib.import_module(module), name)
        assert int(number.replace(",", "")) * units.get(unit, 1) == value, f"{place} is {value:,}"

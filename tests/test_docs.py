"""Every "```python" block of README.md and of the pages in docs/ runs, page by page, from top to bottom, in
a folder that has runs/sample and images. Blocks with a file name are those of docs/extending.md, which has a
test of its own."""

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```$", re.S | re.M)
PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if BLOCK.search(page.read_text())
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_docs_python_blocks_run(page, library, tmp_path, monkeypatch):
    shutil.copytree(library, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    text, names = page.read_text(encoding="utf-8"), {"__name__": "__main__"}
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start(2))
        code = re.sub(rf"(?m)^{found[1]}", "", found[2])
        # as many empty lines before it as the page has, so that a traceback names the page's own line
        exec(compile("\n" * line + code, page, "exec"), names)


def test_docs_have_python_blocks():
    assert {"README.md", "python.md"} <= {page.name for page in PAGES}

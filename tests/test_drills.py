"""The drills' own means: each file operation is seen, a kill comes at the one named, a power failure takes
what was not synced. The drills themselves are run by `make drills`."""

import os
import shutil
import threading
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import ones

from tests.drills.tracer import Operation, torn_writes, trace

TEXT = b"0123456789"


def use_folder(folder: Path) -> int:
    """Operations of each kind, by Python, by another language, by a thread, by a child process."""
    (folder / "sub").mkdir()
    with open(folder / "sub" / "a", "wb", buffering=0) as file:
        file.write(TEXT)
        os.fsync(file.fileno())
    os.rename(folder / "sub" / "a", folder / "b")
    thread = threading.Thread(target=(folder / "c").write_bytes, args=(TEXT,))
    thread.start()
    thread.join()
    save_file({"x": ones(4)}, folder / "d")
    os.link(folder / "b", folder / "e")
    os.truncate(folder / "e", 4)
    assert os.system(f"echo word >>{folder}/f") == 0
    (folder / "b").read_bytes()
    shutil.rmtree(folder / "sub")
    return 7


def replace_file(folder: Path, sync: bool) -> int:
    """Replace `kept` by a new file, which is synced before or not."""
    with open(folder / "new", "wb") as file:
        file.write(TEXT)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    os.replace(folder / "new", folder / "kept")
    (folder / "end").touch()
    return 0


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_tracer_sees_every_operation_in_order(folder, tmp_path):
    found = trace([lambda: use_folder(folder)], folder, tmp_path / "log")
    assert found.codes == [7] and not found.reached
    # on other machines the same calls have an "at", or lack it
    calls = [
        (each.call.removesuffix("at"), each.path)
        for each in found.operations[0]
        if not each.path.startswith((".tmp", "d"))
    ]
    assert calls == [
        *[("mkdir", "sub"), ("open", "sub/a"), ("write", "sub/a"), ("fsync", "sub/a"), ("rename", "b")],
        *[("open", "c"), ("write", "c"), ("link", "e"), ("truncate", "e")],
        *[("open", "f"), ("write", "f"), ("rmdir", "sub")],
    ]
    safetensors = [each.call for each in found.operations[0] if each.path.startswith((".tmp", "d"))]
    assert "write" in safetensors and safetensors[-1].startswith("rename")


@pytest.mark.parametrize("torn", [False, True])
def test_tracer_kills_before_an_operation_or_in_the_middle_of_a_write(folder, tmp_path, torn):
    point = Operation("write", "c", 1)
    point = torn_writes([point])[0] if torn else point
    found = trace([lambda: use_folder(folder)], folder, tmp_path / "log", point=(0, point))
    assert found.codes == [-9] and found.reached
    assert found.operations[0][-1] == point._replace(torn=False)
    assert (folder / "c").read_bytes() == (TEXT[:5] if torn else b"")
    assert sorted(path.name for path in folder.iterdir()) == ["b", "c", "sub"]


@pytest.mark.parametrize(("sync", "content"), [(True, TEXT), (False, b"")])
def test_power_failure_takes_what_was_renamed_before_it_was_synced(folder, tmp_path, sync, content):
    (folder / "kept").write_bytes(b"old")
    found = trace(
        [lambda: replace_file(folder, sync)],
        folder,
        tmp_path / "log",
        point=(0, Operation("openat", "end", 1)),
        power_fails=True,
    )
    assert found.reached and (folder / "kept").read_bytes() == content

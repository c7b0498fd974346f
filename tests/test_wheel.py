"""The project as a wheel, installed into a folder of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.heavy


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command that must succeed; what it printed."""
    environment = {**os.environ, "PYTHONPATH": "", **environment}
    completed = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
    assert completed.returncode == 0, completed.stderr[-2000:]
    return completed.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the wheel of a copy of the checkout, so that no build folder is left in it."""
    copy, wheels, folder = (tmp_path_factory.mktemp(name) for name in ("copy", "wheels", "installed"))
    names = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in (name for name in names if (ROOT / name).is_file()):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, copy, cwd=copy)
    (wheel,) = wheels.glob("*.whl")
    run(*pip, "install", "--no-deps", "--target", folder, wheel, cwd=copy)
    return folder


@pytest.mark.parametrize("package", ["pretrain", "finetune", "tune_spaces", "cluster"])
def test_wheel_commands_print_their_help(installed, tmp_path, package):
    code = f"import {package}; print({package}.__file__)"
    found = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed))
    assert Path(found.strip()).is_relative_to(installed)
    assert package in run(sys.executable, "-m", package, "--help", cwd=tmp_path, PYTHONPATH=str(installed))


def test_wheel_holds_data_of_every_package(installed):
    for room in ("raylib", "cluster"):
        for path in (ROOT / room).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert (installed / path.relative_to(ROOT)).is_file(), path


def test_wheel_writes_the_sample_corpus(installed, tmp_path):
    code = "import sys; from pretrain.corpora import build_sample_corpus as b; print(b(sys.argv[1]))"
    found = run(sys.executable, "-c", code, tmp_path / "c", cwd=tmp_path, PYTHONPATH=str(installed))
    assert (Path(found.strip()) / "image_text" / "manifest.json").is_file()

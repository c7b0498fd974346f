"""The project as a wheel, installed into an environment of its own."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import raylib
from raylib.command import COMMANDS
from tests.conftest import MINI

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.heavy


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command that must succeed; what it printed."""
    environment = {**os.environ, "PYTHONPATH": "", **environment}
    completed = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
    assert completed.returncode == 0, completed.stderr[-2000:]
    return completed.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """A fresh environment with the wheel of a copy of the checkout, so that no build folder is left in that;
    all that it depends on is this environment's, without the checkout that is installed here."""
    copy, wheels, folder = (tmp_path_factory.mktemp(name) for name in ("copy", "wheels", "environment"))
    names = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in (name for name in names if (ROOT / name).is_file()):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, copy, cwd=copy)
    (wheel,) = wheels.glob("*.whl")
    run(sys.executable, "-m", "venv", folder, cwd=copy)
    packages = folder / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    # a line that is no import is a path, whose own .pth files are not read
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    run(folder / "bin/python", "-m", "pip", "-q", "install", "--no-deps", wheel, cwd=copy)
    ray = folder / "bin/ray"  # as pip writes it where it installs Ray itself
    ray.write_text(f"#!{folder}/bin/python\nfrom ray.scripts.scripts import main\n\nmain()\n")
    ray.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def installed(environment) -> Path:
    """The folder of the installed packages."""
    found = run(environment / "bin/python", "-c", "import raylib; print(raylib.__file__)", cwd=environment)
    folder = Path(found.strip()).parent.parent
    assert folder.is_relative_to(environment)
    return folder


def test_wheel_commands_print_version_and_help(environment, tmp_path):
    polyglance = environment / "bin/polyglance"
    assert run(polyglance, "--version", cwd=tmp_path).strip() == f"polyglance {raylib.__version__}"
    for command in COMMANDS:
        page = run(polyglance, *command.name.split(), "--help", cwd=tmp_path)
        assert page.startswith(f"usage: polyglance {command.name}")
        module = command.module.removesuffix(".__main__")
        run(environment / "bin/python", "-m", module, *command.leading, "--help", cwd=tmp_path)


def test_wheel_is_a_typed_library_with_one_copy_of_each_class(environment, installed, tmp_path):
    code = (
        "import polyglance, raylib.api; assert polyglance is raylib.api; from polyglance import Model;"
        "from raylib.api.model import Model as Same; assert Model is Same; print(polyglance.__file__)"
    )
    assert run(environment / "bin/python", "-c", code, cwd=tmp_path).startswith(str(installed))
    assert (installed / "polyglance" / "py.typed").is_file() and (installed / "raylib/api/py.typed").is_file()


@pytest.mark.parametrize("how", ["local", "ray", "cluster"])
def test_wheel_pretrains_outside_of_a_checkout(environment, how, tmp_path):
    polyglance = environment / "bin/polyglance"
    start = (
        (polyglance,)
        if how != "cluster"
        else (polyglance, "cluster", "run", "--dashboard-port", "8299", "--", "polyglance")
    )
    runtime = "runtime=local" if how == "local" else "runtime=ray"
    printed = run(
        *start, "pretrain", "tiny", "name=first", runtime, "workers=1", *MINI, "fit.steps=2", cwd=tmp_path
    )
    assert "step 2/2" in printed and (tmp_path / "runs/first/result.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    assert "site-packages" not in printed and "working-dir" not in printed
    code = "import polyglance; print(polyglance.load('runs/first').encode_text(['ein Hund']).shape)"
    assert run(environment / "bin/python", "-c", code, cwd=tmp_path).startswith("(1, ")


def test_wheel_holds_data_of_every_package(installed):
    for room in ("raylib", "cluster"):
        for path in (ROOT / room).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert (installed / path.relative_to(ROOT)).is_file(), path


def test_wheel_writes_the_sample_corpus(environment, tmp_path):
    code = "import sys; from pretrain.corpora import build_sample_corpus as b; print(b(sys.argv[1]))"
    found = run(environment / "bin/python", "-c", code, tmp_path / "c", cwd=tmp_path)
    assert (Path(found.strip()) / "image_text" / "manifest.json").is_file()

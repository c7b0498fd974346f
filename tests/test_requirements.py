"""requirements.lock, the installation from it (`make install LOCKED=1`), and its audit."""

import importlib.util
import json
import re
import shutil
import stat
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pip
import pytest

ROOT = Path(__file__).parent.parent
REQUIREMENT = re.compile(
    r"(?P<name>[\w.-]+)==(?P<version>\S+)(?: ; .*?)?(?P<hashes>(?: --hash=sha256:[0-9a-f]{64})+)"
)


def load(script: str):
    """The module of a script in .ci."""
    spec = importlib.util.spec_from_file_location(script, ROOT / ".ci" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def normal(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def locked() -> dict[str, str]:
    """{package: version} of requirements.lock, all of whose lines are comments and packages with hashes."""
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8").replace(" \\\n   ", "")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    found = [REQUIREMENT.fullmatch(line) for line in lines]
    assert None not in found, [line for line, match in zip(lines, found, strict=True) if not match][:3]
    return {match["name"]: match["version"] for match in found}


def test_lock_has_every_requirement_at_its_version_with_hashes():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = dict(line.split("==") for line in lines if not line.startswith("#"))
    versions = locked()
    assert {normal(name): version for name, version in required.items()}.items() <= versions.items()
    more = versions.keys() - {normal(name) for name in required}
    assert all(name.startswith(("nvidia-", "cuda-", "triton")) for name in more), more  # torch's, of Linux


def test_lock_names_no_registry():
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert "//" not in text and "index-url" not in text and "find-links" not in text


def test_lock_has_the_files_of_linux_alone():
    """Those of other systems and Pythons are left out, and the source wherever x86_64 has wheels."""
    lock = load("lock")
    tags = ("cp311-cp311-manylinux_2_28_x86_64", "cp312-cp312-manylinux2014_x86_64.manylinux_2_17_x86_64")
    tags += ("cp313-cp313-manylinux_2_28_aarch64", "cp39-abi3-manylinux_2_34_x86_64")
    others = ("cp310-cp310-manylinux_2_28_x86_64", "cp313-cp313t-manylinux_2_28_x86_64")
    others += ("cp312-cp312-win_amd64", "cp311-cp311-macosx_11_0_arm64")
    others += ("cp311-cp311-musllinux_1_2_x86_64", "cp314-abi3-manylinux_2_28_x86_64")
    wheels = [{"url": f"https://host/a-1.0-{tag}.whl", "hashes": {"sha256": tag}} for tag in (*tags, *others)]
    package = {"name": "a", "version": "1.0", "wheels": wheels, "sdist": {"hashes": {"sha256": "source"}}}
    assert lock.package_hashes(package) == sorted(tags)
    assert lock.package_hashes({**package, "wheels": wheels[:1]}) == sorted([tags[0], "source"])
    assert lock.package_hashes({**package, "marker": "sys_platform == 'win32'"}) == []
    assert lock.lock_lines([{**package, "wheels": wheels[:1], "marker": "python_version < '3.12'"}]).endswith(
        f"a==1.0 ; python_version < '3.12' \\\n    --hash=sha256:{tags[0]}\n"
    )


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with a virtual environment that has pip, and a folder as the only package index, with a
    setuptools that is none."""
    folder, index = tmp_path / "checkout", tmp_path / "index"
    index.mkdir()
    for name in ("Makefile", "requirements.txt", "requirements.lock", "pyproject.toml"):
        folder.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, folder)
    venv.create(folder / ".venv", symlinks=True)  # with pip of its own it takes long
    packages = folder / ".venv" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    (packages / "pip").symlink_to(Path(pip.__file__).parent)
    (folder / ".venv" / "bin" / "pip").symlink_to(sys.executable)
    version = locked()["setuptools"]
    with zipfile.ZipFile(index / f"setuptools-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"setuptools-{version}.dist-info/METADATA", f"Name: setuptools\nVersion: {version}\n")
        wheel.writestr(f"setuptools-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"setuptools-{version}.dist-info/RECORD", "")
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": index, "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", str(value))
    return folder


def make(folder: Path, *words: str) -> tuple[int, str]:
    done = subprocess.run(["make", *words], cwd=folder, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def test_locked_install_refuses_a_file_of_another_hash(checkout):
    code, printed = make(checkout, "install", "LOCKED=1")
    assert code == 2 and "THESE PACKAGES DO NOT MATCH THE HASHES" in printed, printed
    assert "setuptools" in printed and not (checkout / ".venv" / ".installed").exists()
    # once a checkout is locked it stays so, and what was installed otherwise is not called locked
    (checkout / ".venv" / ".installed").touch()
    code, printed = make(checkout, "install", "LOCKED=1")
    assert code == 2 and "error: nobody compared the packages of .venv with hashes" in printed, printed
    (checkout / ".venv" / ".locked").touch()
    (checkout / ".venv" / ".installed").unlink()
    assert "--require-hashes" in make(checkout, "--dry-run", "install")[1]


def test_plain_install_takes_no_lock(checkout):
    code, printed = make(checkout, "--dry-run", "install")
    assert code == 0 and "-r requirements.txt" in printed and "require-hashes" not in printed


@pytest.mark.parametrize(
    ("report", "code", "line"),
    [
        ([{"name": "a", "version": "1", "vulns": []}], 0, "1 packages audited, 0 with known faults"),
        (
            [{"name": "a", "version": "1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"]}]}],
            1,
            "a 1: PYSEC-1, mended in 2",
        ),
        ([{"name": "a", "skip_reason": "not found"}], 3, "not audited: .* knows nothing of 1 of 1 packages"),
        (None, 3, r"not audited: pip-audit has no answer here \(ConnectionError: no route\)"),
    ],
)
def test_audit_says_by_its_exit_code_what_it_knows(report, code, line, tmp_path, capfd):
    """pip-audit itself ends with 0 where the service has never heard of a package."""
    program, output = tmp_path / "pip-audit", tmp_path / "report.json"
    output.write_text(json.dumps({"dependencies": report}) if report else "")
    program.write_text(f"#!/bin/sh\necho 'ConnectionError: no route' >&2\nexec cat {output}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    assert load("audit").main(str(program)) == code
    assert re.search(line, "".join(capfd.readouterr()))

"""Write requirements.lock (`make lock`): every version of requirements.txt, what it needs on Linux, and the
hashes of their files, for pip's --require-hashes.

python .ci/lock.py UV    UV: the program uv, which asks the package index
"""

import itertools
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging import tags
from packaging.markers import Marker
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ((3, 11), (3, 12), (3, 13))
MACHINES = ("x86_64", "aarch64")
GLIBC = range(5, 40)  # the newest that a wheel may ask for is 2.39's
HEAD = """\
# Every package of requirements.txt, what it needs on Linux (x86_64, aarch64; Python 3.11 to 3.13), and the
# SHA-256 of their files as the package index had them, torch's in its CUDA build: `make install LOCKED=1`.
# Made by `make lock`.
"""


def supported_tags(python: tuple[int, int], machine: str) -> set[tags.Tag]:
    """Return the tags of the wheels that a Python takes on a machine of Linux."""
    old = ["manylinux1", "manylinux2010", "manylinux2014", "linux"]
    platforms = [f"{name}_{machine}" for name in [*(f"manylinux_2_{minor}" for minor in GLIBC), *old]]
    interpreter = f"cp{python[0]}{python[1]}"
    return {
        *tags.cpython_tags(python, platforms=platforms),
        *tags.compatible_tags(python, interpreter, platforms),
    }


def applies(marker: str | None, python: tuple[int, int], machine: str) -> bool:
    """Return whether a package is for a Python on a machine of Linux."""
    version = f"{python[0]}.{python[1]}"
    environment = {"python_version": version, "python_full_version": f"{version}.0"}
    environment |= {"platform_machine": machine, "platform_system": "Linux"}
    environment |= {"sys_platform": "linux", "os_name": "posix"}
    return marker is None or Marker(marker).evaluate(environment)


def package_hashes(package: dict) -> list[str]:
    """Return the hashes of a package's files that Linux may need: wheels, and the source where x86_64 lacks
    one; none of a package that is for other systems."""
    hashes, lacks_wheel = [], False
    for python, machine in itertools.product(PYTHONS, MACHINES):
        if not applies(package.get("marker"), python, machine):
            continue
        supported = supported_tags(python, machine)
        found = [
            wheel["hashes"]["sha256"]
            for wheel in package.get("wheels", [])
            if parse_wheel_filename(wheel["url"].rpartition("/")[2])[3] & supported
        ]
        hashes += found
        lacks_wheel |= not found and machine == "x86_64"
    if lacks_wheel:
        hashes.append(package["sdist"]["hashes"]["sha256"])
    return sorted(set(hashes))


def lock_lines(packages: list[dict]) -> str:
    """Return requirements.lock of the packages of a pylock.toml."""
    text = HEAD
    for package in packages:
        if hashes := package_hashes(package):
            marker = f" ; {package['marker']}" if "marker" in package else ""
            options = [f"--hash=sha256:{each}" for each in hashes]
            lines = [f"{package['name']}=={package['version']}{marker}", *options]
            text += " \\\n    ".join(lines) + "\n"
    return text


def main(uv: str) -> None:
    """Run the command line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pylock.toml"
        # universal: for every Python and system at once, each package with a marker where it is not for all
        options = ["--universal", "--python-version=3.11", "--no-config", "--quiet", f"--output-file={path}"]
        subprocess.run([uv, "pip", "compile", ROOT / "requirements.txt", *options], check=True)
        packages = tomllib.loads(path.read_text(encoding="utf-8"))["packages"]
    (ROOT / "requirements.lock").write_text(lock_lines(packages), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])

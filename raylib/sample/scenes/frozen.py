"""Hashes of the benchmark's tests by its settings (`data/hashes.json`): its annotations and scenes do not
change any more.

    python -m raylib.sample.scenes.frozen FOLDER            is FOLDER the benchmark that was frozen?
    python -m raylib.sample.scenes.frozen FOLDER --write    freeze FOLDER: only who makes a new benchmark

A hash a task and tree, of the annotations of its tests and of `scenes.jsonl`; not of images, whose bytes
depend on the version of the WebP codec.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raylib.command import command_parser, entry_point, local_path
from raylib.errors import UserError
from raylib.fileio import read_json, write_atomically
from raylib.sample.scenes import DATA
from raylib.sample.scenes.tree import ERRORS, STYLE, TEST_FILES

HASHES = DATA / "hashes.json"


def hash_tests(folder: Path) -> dict[str, str]:
    """{task or tree/task: SHA-256 of the paths and contents of its test files}."""
    names: tuple[str, ...] = (*TEST_FILES, "scenes.jsonl", f"{STYLE}/scenes.jsonl")
    names += tuple(f"{tree}/{name}" for tree in ERRORS for name in TEST_FILES if "machine-translate" in name)
    hashes: dict[str, Any] = {}
    for path in sorted(path for name in names for path in folder.glob(name)):
        name = path.relative_to(folder)
        part = "/".join(name.parts[: 2 if name.parts[0] in (STYLE, *ERRORS) else 1])
        digest = hashes.setdefault(part, hashlib.sha256())
        digest.update(f"{name.as_posix()} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return {part: digest.hexdigest() for part, digest in hashes.items()}


def check_frozen(folder: Path) -> None:
    """Compare the tests in `folder` with those that were frozen at the same settings.

    Raises:
        UserError: no emoji scenes; other settings than those that were frozen; other tests.
    """
    expected = read_json(HASHES).get(_read_settings(folder))
    if expected is None:
        raise UserError(f"{folder}: other settings than the benchmark's; leave them at the default")
    found = hash_tests(folder)
    different = [part for part in expected | found if expected.get(part) != found.get(part)]
    if different:
        raise UserError(
            f"{folder}: not the benchmark's tests ({', '.join(different)}); make the folder anew, "
            "by the version of the code that its results name"
        )


def freeze(folder: Path) -> None:
    """Enter the hashes of the tests in `folder`, in the place of those of the same settings."""
    hashes = read_json(HASHES) | {_read_settings(folder): hash_tests(folder)}
    write_atomically(HASHES, json.dumps(hashes, indent=1) + "\n")


def _read_settings(folder: Path) -> str:
    """The line of settings.json, whatever is in it."""
    try:
        return (folder / "settings.json").read_bytes().decode("utf-8", "replace").strip()
    except FileNotFoundError:
        raise UserError(f"{folder}: no emoji scenes; python -m raylib.sample.scenes makes them") from None


@entry_point()
def main(arguments: Sequence[str]) -> int:
    """Run a command line."""
    parser = command_parser("raylib.sample.scenes.frozen", __doc__)
    parser.add_argument("folder", type=local_path, metavar="FOLDER", help="emoji scenes")
    parser.add_argument("--write", action="store_true", help="freeze them")
    options = parser.parse_args(arguments)
    if options.write:
        freeze(options.folder)
    check_frozen(options.folder)
    print(f"{options.folder}: the tests are those that were frozen")
    return 0


if __name__ == "__main__":
    sys.exit(main())

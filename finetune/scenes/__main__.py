"""Emoji scenes: a miniature IGLUE.

python -m finetune.scenes OUT [train=3000 dev=300 test=1000 size=64 seed=0]
python -m finetune.scenes balance OUT      how well questions alone, and pictures alone, predict the answers
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune.scenes.write import ScenesConfig, write
from raylib.command import command
from raylib.config import override
from raylib.errors import UserError


@command()
def main(arguments: Sequence[str]) -> int:
    """Run a command line."""
    if list(arguments[:1]) == ["balance"]:
        return _balance(arguments[1:])
    return _make(arguments)


def _make(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m finetune.scenes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="a new or empty folder")
    parser.add_argument("settings", nargs="*", metavar="name=value", help="such as train=300 test=100")
    given = parser.parse_args(arguments)
    print(make(given.out, override(ScenesConfig(), given.settings)))
    return 0


def make(out: Path, config: ScenesConfig) -> str:
    """Write the scenes into `out`, whole or not at all; returns a line about what is there.

    Raises:
        UserError: `out` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: not empty; give a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    write(partial, config)
    if out.is_dir():
        out.rmdir()
    partial.rename(out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return f"{out}: 4 tasks of {config.train} + {config.dev} + {config.test} items, {size / 1e6:.1f} MB"


def _balance(arguments: Sequence[str]) -> int:
    from finetune.scenes.balance import measure, table

    parser = argparse.ArgumentParser(prog="python -m finetune.scenes balance")
    parser.add_argument("out", type=Path, help="a folder of scenes")
    print(table(measure(parser.parse_args(arguments).out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

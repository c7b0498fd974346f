"""`python -m raylib.sample`: rebuild the committed sample data from the packages that it came from."""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from raylib.command import command
from raylib.sample import packages
from raylib.sample.concepts import DATA
from raylib.sample.tokenizer import train_tokenizer


def rebuild() -> None:
    """Download, convert, and only then replace what is in `data/`."""
    with tempfile.TemporaryDirectory() as temporary:
        downloads, made = Path(temporary, "downloads"), Path(temporary, "data")
        downloads.mkdir()
        keys = packages.write_pictures(made / "pictures", downloads)
        packages.write_captions(made / "captions", downloads, keys)
        packages.write_declaration(made / "udhr", downloads)
        shutil.copytree(made, DATA, dirs_exist_ok=True)
    train_tokenizer(DATA / "tokenizer.model")


@command()
def main(arguments: Sequence[str]) -> int:
    """Run a command line."""
    argparse.ArgumentParser(prog="python -m raylib.sample", description=__doc__).parse_args(arguments)
    rebuild()
    files = [path for path in DATA.rglob("*") if path.is_file()]
    print(f"{DATA}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

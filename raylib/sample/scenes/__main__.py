"""Write emoji scenes, a miniature IGLUE, into a new folder:

python -m raylib.sample.scenes OUT [train=30000 dev=1000 test=2000 shots=100 size=64 seed=0]
"""

import sys
from collections.abc import Sequence

from raylib.command import command_parser, entry_point, local_path
from raylib.config import override
from raylib.sample.scenes.writer import ScenesConfig, write_scenes


@entry_point()
def main(arguments: Sequence[str]) -> int:
    """Run a command line."""
    parser = command_parser("raylib.sample.scenes", __doc__, settings=ScenesConfig)
    parser.add_argument("out", type=local_path, help="a new or empty folder")
    parser.add_argument("settings", nargs="*", metavar="name=value", help="such as train=300 test=100")
    options = parser.parse_args(arguments)
    print(write_scenes(options.out, override(ScenesConfig(), options.settings)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m polyglance COMMAND ...`; in a checkout that is not installed `python -m raylib.api ...`."""

import sys

from raylib.command import main

if __name__ == "__main__":
    sys.exit(main())

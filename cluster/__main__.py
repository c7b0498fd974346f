"""Command line of the local cluster.

python -m cluster run [--cpus 2] [--gpus 0] [--dashboard-port 8265] -- COMMAND ...
"""

import argparse
import sys

from cluster.local import run
from raylib.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; returns the job's exit code, or 2 with one line on stderr for a `UserError`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    own, command = arguments, []
    if "--" in arguments:
        split = arguments.index("--")
        own, command = arguments[:split], arguments[split + 1 :]
    parser = argparse.ArgumentParser(
        prog="python -m cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    action = actions.add_parser("run", help="start a local Ray cluster, submit COMMAND to it, stop it")
    action.add_argument("--cpus", type=int, default=2, help="CPUs of the cluster (%(default)s)")
    action.add_argument("--gpus", type=int, default=0, help="GPUs of the cluster (%(default)s)")
    action.add_argument("--dashboard-port", type=int, default=8265, help="its address (%(default)s)")
    given = parser.parse_args(own)
    try:
        if not command:
            raise UserError("no command; give one after --, such as: python -m cluster run -- python -m pretrain tiny")
        return run(command, given.cpus, given.gpus, given.dashboard_port)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

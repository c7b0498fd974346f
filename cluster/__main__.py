"""Command line of the local cluster.

python -m cluster run [--cpus 2] [--gpus 0] [--dashboard-port 8265] -- COMMAND ...
"""

import sys
from collections.abc import Sequence

from cluster import run_job
from raylib.command import command_parser, entry_point
from raylib.errors import UserError


@entry_point()
def main(arguments: Sequence[str]) -> int:
    """Run a command line; return the job's exit code."""
    options, job = list(arguments), []
    if "--" in options:
        split = options.index("--")
        options, job = options[:split], options[split + 1 :]
    parser = command_parser("cluster", __doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    action = actions.add_parser("run", help="start a local Ray cluster, submit COMMAND to it, stop it")
    action.add_argument("--cpus", type=int, default=2, help="CPUs of the cluster (%(default)s)")
    action.add_argument("--gpus", type=int, default=0, help="GPUs of the cluster (%(default)s)")
    action.add_argument("--dashboard-port", type=int, default=8265, help="its address (%(default)s)")
    given = parser.parse_args(options)
    if not job:
        raise UserError(
            "no command; give one after --, such as: python -m cluster run -- python -m pretrain tiny"
        )
    return run_job(job, given.cpus, given.gpus, given.dashboard_port)


if __name__ == "__main__":
    sys.exit(main())

"""Submit a job, and print what it prints: `ray job submit` without the twenty lines of its own.

python -m cluster.submit ADDRESS RUNTIME_ENV COMMAND ...
"""

import asyncio
import json
import logging
import os
import shlex
import sys
from typing import Any

# what Ray leaves out by default, and warns of; named here, nothing is to be told
EXCLUDES = [".git", ".venv", "venv", "__pycache__"]
BEGIN = "Running entrypoint for job "  # Ray's last line before the job's first


async def follow(client: Any, job: str) -> None:
    """Print the job's log as it grows, from the job's own first line; of a job that never began, all that Ray
    says."""
    head: str | None = ""
    async for text in client.tail_job_logs(job):
        if head is None:
            print(text, end="", flush=True)
            continue
        head += text
        _, found, rest = head.partition(BEGIN)
        if found and "\n" in rest:
            head = None
            print(rest.partition("\n")[2], end="", flush=True)
    if head is not None:
        print(f"{head}{client.get_job_info(job).message}", file=sys.stderr)


def main() -> None:
    """Run the command line."""
    os.environ["RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES"] = ""
    from ray.job_submission import JobSubmissionClient

    address, runtime_env, *command = sys.argv[1:]
    logging.disable(logging.INFO)  # of loggers that set their own level
    client = JobSubmissionClient(address)
    environment = {"excludes": EXCLUDES, **json.loads(runtime_env)}
    job = client.submit_job(entrypoint=shlex.join(command), runtime_env=environment)
    asyncio.run(follow(client, job))


if __name__ == "__main__":
    main()

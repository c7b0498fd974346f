"""Folder of the records of measurements, a JSON line each; modules run in processes of their own."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def newest(records: list[dict], *keys: str) -> list[dict]:
    """The last record of each that has the same values at `keys`."""
    return list({tuple(record[key] for key in keys): record for record in records}.values())


def run_module(module: str, *arguments: object) -> None:
    """Run a module of ours in its own process.

    Raises:
        SystemExit: it failed; it has said why.
    """
    code = subprocess.run([sys.executable, "-m", module, *map(str, arguments)]).returncode
    if code:
        sys.exit(code)


def commit() -> str:
    """Short hash of the checkout's commit; "" where it has no history."""
    if not (ROOT / ".git").exists():
        return ""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

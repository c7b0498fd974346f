"""Ask for known faults of what requirements.lock names (`make audit`).

python .ci/audit.py PIP_AUDIT    the program pip-audit, which asks a service of the package index

Exit code: 0, all packages were looked up and none has a known fault; 1, some have; 3, the service did not
answer for some: they may have. (make itself ends with 2 wherever this does not with 0.)
"""

import json
import subprocess
import sys
from pathlib import Path

LOCK = Path(__file__).resolve().parent.parent / "requirements.lock"
NONE_KNOWN, FAULTS, NOT_AUDITED = 0, 1, 3


def main(program: str, lock: Path = LOCK) -> int:
    """Run the command line."""
    command = [program, "--requirement", lock, "--require-hashes", "--disable-pip", "--format=json"]
    done = subprocess.run(
        [*command, "--progress-spinner=off"], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except ValueError:  # it ended before it had a report
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        print(f"not audited: pip-audit has no answer here ({reason[:300]})", file=sys.stderr)
        return NOT_AUDITED
    for package in packages:
        for fault in package.get("vulns", []):
            fixed = ", ".join(fault["fix_versions"]) or "no version"
            print(f"{package['name']} {package['version']}: {fault['id']}, mended in {fixed}")
    faulty = sum(bool(package.get("vulns")) for package in packages)
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    if skipped:
        some = ", ".join(skipped[:3]) + (", ..." if len(skipped) > 3 else "")
        print(
            f"not audited: the index's service of vulnerabilities knows nothing of {len(skipped)} of "
            f"{len(packages)} packages ({some}); ask again where it is no mirror",
            file=sys.stderr,
        )
    audited = len(packages) - len(skipped)
    if audited:
        print(f"{audited} packages audited, {faulty} with known faults")
    return FAULTS if faulty else NOT_AUDITED if skipped else NONE_KNOWN


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

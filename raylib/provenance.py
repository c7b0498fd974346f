"""Provenance of a number: code, packages, machine. Every `result.json` holds it."""

import hashlib
import os
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("raylib", "pretrain", "finetune", "tune_spaces", "cluster")  # whose source is the code version
LIBRARIES = (
    "torch",
    "transformers",
    "deepspeed",
    "ray",
    "optuna",
    "webdataset",
    "numpy",
    "opencv-python-headless",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "peft",
)


@cache
def code_version() -> str:
    """Return "COMMIT source HASH": the commit, where there is one, and a hash of the source, which shows a
    changed checkout."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return f"{(commit() or 'no commit')[:12]} source {digest.hexdigest()[:12]}"


@cache
def commit() -> str | None:
    """Return the commit of the code that runs. A submitted job is a copy without history: its sender says."""
    if "POLYGLANCE_COMMIT" in os.environ:
        return os.environ["POLYGLANCE_COMMIT"]
    try:  # in site-packages, the repository around would be somebody else's: this file must be tracked there
        tracked = _git("ls-files", "--error-unmatch", str(Path(__file__).resolve()))
    except OSError:  # no git on this machine
        return None
    return _git("rev-parse", "HEAD") if tracked else None


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() or None


@cache
def library_versions() -> dict[str, str]:
    """Return {library: version} of those that numbers depend on and that are installed."""
    return {name: version for name in LIBRARIES if (version := _version(name))}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """Return "NVIDIA H100 80GB HBM3", or the model of the CPU as Linux calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_info("model name") or "CPU"


def cpu_info(field: str) -> str:
    """Return a field of the first CPU in Linux's /proc/cpuinfo, such as "vendor_id"; "" elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def provenance(device: torch.device) -> dict[str, Any]:
    """Return {"code", "libraries", "device", "time": now, UTC, ISO 8601}."""
    return {
        "code": code_version(),
        "libraries": library_versions(),
        "device": device_name(device),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }

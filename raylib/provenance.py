"""Provenance: the data and code of a run, as they were when it began (RUN/identity.json); the code, packages
and machine behind a number (every `result.json`).

    {"folder": the working directory of the last start, from which relative paths in its settings lead,
     "code": [the version that the run began with, each later one that went on with it],
     "data": {PATH: {"stamp": hash of names, sizes and times of change, "bytes": ..., "sha256": content or
     null}, ...}}

A start compares what is there with what was recorded. Sizes and times come first, for they cost nothing;
where a time differs and the size does not (a copy, a fresh checkout), the content is hashed and decides.
`verify` hashes everything at every start. Data that changed is refused: a run that goes on with other data is
no run of either. So is a file that came or went, where the code that reads them is the same: an optional one
(a WordNet, a list of answers) changes what a run trains. A file that lies elsewhere now (a relative path,
read from another folder) is the same if its name and content are. Code that changed is told.
"""

import hashlib
import json
import os
import subprocess
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel

from raylib.cache import cached, file_fingerprint
from raylib.checkpoint import hint_if_unsaved
from raylib.data.index import JSON_ENDING, hash_index
from raylib.display import progress
from raylib.errors import UserError
from raylib.fileio import MAX_JSON, read_json_object, sha256_file, write_atomically
from raylib.runtime import available_cpus, device_name
from raylib.strict_json import Count

IDENTITY = "identity.json"
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


class DataFile(NamedTuple):
    """A file, or a folder of files, that a run reads.

    sha256: of its content, where something else knows it (a shard's manifest). large: too large to be hashed
    at a first start (shards, image archives, feature stores): its size and time are its identity, unless
    `verify` is asked for. address: of what was fetched, whose path is a place in a cache.
    """

    path: Path
    sha256: str | None = None
    large: bool = False
    address: str | None = None

    @property
    def name(self) -> str:
        """Name by which starts are compared."""
        return self.address or str(self.path.absolute())


def fingerprint_files(
    files: Iterable[DataFile], before: Mapping[str, dict], verify: bool = False
) -> dict[str, dict[str, Any]]:
    """Return {path: {"stamp", "bytes", "sha256"}} of `files` as they are now; `before` is an earlier record,
    whose hashes are taken over where sizes and times are the same.

    Raises:
        UserError: a file is missing; with `verify`, its content is not what its manifest says.
    """
    entries: dict[str, dict[str, Any]] = {}
    hashes: dict[str, Future[str]] = {}
    files = list(files)
    # in threads, for hashing holds no lock of Python's
    with ThreadPoolExecutor(available_cpus()) as threads:
        for file in files:
            path = file.name
            if not file.path.exists():
                raise UserError(f"{path}: this file of the run's data is missing; restore it")
            fingerprint = file_fingerprint(file.path)
            size = sum(bytes_ for _, bytes_, _ in fingerprint[1:])
            stamp = hashlib.sha256(repr(fingerprint[1:]).encode()).hexdigest()[:24]
            entries[path] = {"stamp": stamp, "bytes": size, "sha256": file.sha256}
            old = before.get(path)
            # hashing costs a pass over the data: only where it is asked for, is cheap, or must decide whether
            # a file of another time is the one that was hashed before
            is_new_and_small = old is None and file.sha256 is None and not file.large
            if old and old["stamp"] == stamp and not verify:
                entries[path]["sha256"] = old["sha256"]
            elif verify or is_new_and_small or (old and old["sha256"]):
                # once for all trials of a search
                hash_file = partial(hash_path, file.path)
                hashes[path] = threads.submit(cached, "sha256", fingerprint, hash_file)
        for file in progress(files, "check the data", unit="files"):
            if file.name in hashes:
                entries[file.name]["sha256"] = hashes[file.name].result()
            if verify and file.sha256 and entries[file.name]["sha256"] != file.sha256:
                threads.shutdown(wait=False, cancel_futures=True)
                raise UserError(
                    f"{file.name}: its SHA-256 is not its manifest's; fetch it anew, or index the folder anew"
                )
    return entries


def hash_path(path: Path) -> str:
    """Return the SHA-256 of a file; of a folder, over the names and hashes of its files."""
    if path.is_dir():
        parts = "".join(f"{name} {hash_path(path / name)}\n" for name, _, _ in file_fingerprint(path)[1:])
        return hashlib.sha256(parts.encode()).hexdigest()
    return hash_index(path) if path.name.endswith(JSON_ENDING) else sha256_file(path)


def list_changed_files(before: Mapping[str, dict], now: Mapping[str, dict]) -> list[str]:
    """List, in words, the files of both records that are not the same any more."""
    found = []
    for path in filter(now.__contains__, before):
        old, new = before[path], now[path]
        if old["sha256"] and new["sha256"]:
            if old["sha256"] != new["sha256"]:
                found.append(f"{path} (other content)")
        elif old["bytes"] != new["bytes"]:
            found.append(f"{path} ({new['bytes']:,} bytes, {old['bytes']:,} before)")
        elif old["stamp"] != new["stamp"]:
            found.append(f"{path} (changed since: its time differs)")
    return found


def find_moved_files(before: Mapping[str, dict], now: Mapping[str, dict]) -> dict[str, str]:
    """Return {old path: new path} of files that lie elsewhere now, with the same name and content (of large
    ones, size)."""
    new: dict[str, list[str]] = {}  # by base name: thousands of shards may have moved
    for path in now:
        if path not in before:
            new.setdefault(Path(path).name, []).append(path)
    # each new file answers for one old file at most, or two copies of which one is gone would go unnoticed
    moved = {}
    for path, old in before.items():
        if path in now:
            continue
        others = new.get(Path(path).name, [])
        same = (
            other
            for other in others
            if not list_changed_files({path: old}, {path: now[other] | {"stamp": old["stamp"]}})
        )
        if other := next(same, None):
            moved[path] = other
            others.remove(other)
    return moved


def list_added_or_missing_files(
    before: Mapping[str, dict], now: Mapping[str, dict], same_code: bool
) -> list[str]:
    """List, in words, the files that only one of both records has. Other code may read others, but not miss
    what is gone."""
    moved = find_moved_files(before, now)
    missing = [path for path in before if path not in now and path not in moved]
    found = [f"{path} (missing)" for path in missing if not Path(path).exists()]
    if same_code:
        elsewhere = set(moved.values())
        found += [f"{path} (not read any more)" for path in missing if Path(path).exists()]
        found += [f"{path} (not read before)" for path in now if path not in before and path not in elsewhere]
    return found


def compare_data(
    run: Path, files: Iterable[DataFile], verify: bool = False
) -> tuple[dict[str, dict], list[str]]:
    """Return (`fingerprint_files` of the files as they are now; in words, which of them are not what `run`
    began with).

    Raises:
        UserError: see `fingerprint_files`.
    """
    stored = read_identity(run)
    before, data = stored["data"], fingerprint_files(files, stored["data"], verify)
    different = list_changed_files(before, data)
    if before:  # a run of before there were records has none
        different += list_added_or_missing_files(
            before, data, same_code=stored["code"][-1:] == [code_version()]
        )
    return data, different


def record_identity(run: Path, files: Iterable[DataFile], verify: bool = False) -> list[str]:
    """Record the data and the code that `run` goes on with, after comparing both with what it began with.
    Returns what people should be told.

    Raises:
        UserError: data changed (the first files are named); see `fingerprint_files`.
    """
    stored, code, notes = read_identity(run), code_version(), []
    data, different = compare_data(run, files, verify)
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise UserError(
            f"{run}: the data changed since this run began: {', '.join(different[:3])}{more}; restore it, or "
            f"give another name= to begin a run with what is there now{hint_if_unsaved(run)}"
        )
    if stored["code"] and code not in stored["code"]:
        notes.append(f"note: this run began with code {stored['code'][0]} and goes on with {code}")
    if unknown := [
        path for path, old in stored["data"].items() if verify and path in data and not old["sha256"]
    ]:
        notes.append(
            f"note: the content of {len(unknown)} files, such as {unknown[0]}, was not hashed when this run "
            "began, and is from now on"
        )
    # files of a start that no other start read stay recorded: the run was trained on them
    codes = stored["code"] if code in stored["code"] else [*stored["code"], code]
    moved = find_moved_files(stored["data"], data)
    remaining = {path: entry for path, entry in stored["data"].items() if path not in moved}
    identity = {"folder": str(Path.cwd()), "code": codes, "data": {**remaining, **data}}
    write_atomically(run / IDENTITY, json.dumps(identity, indent=1) + "\n")
    return notes


class StoredEntry(BaseModel):
    """A file of the data, as `fingerprint_files` has it."""

    stamp: str
    bytes: Count
    sha256: str | None


class StoredIdentity(BaseModel):
    """`identity.json`."""

    folder: str = ""
    code: list[str]
    data: dict[str, StoredEntry]


def started_in(run: Path) -> Path:
    """Return the folder from which relative paths in the settings of `run` lead; this one, of a run of before
    it was recorded, and where there is none any more."""
    folder = read_identity(run)["folder"]
    return Path(folder) if folder and Path(folder).is_dir() else Path()


def read_identity(run: Path) -> dict[str, Any]:
    """Read {"folder", "code": [...], "data": {...}} of a run; empty of one that has no record yet."""
    if not os.path.lexists(run / IDENTITY):
        return {"folder": "", "code": [], "data": {}}
    advice = "delete it to record the data anew"
    what = "the record of a run's data"
    stored = read_json_object(run / IDENTITY, (), what, advice, shape=StoredIdentity, most=MAX_JSON)
    return {"folder": "", **stored}


def data_hash(run: Path) -> str | None:
    """Return one hash over the data of a run, see `combined_hash`. None: nothing was recorded."""
    return combined_hash(read_identity(run)["data"])


def combined_hash(data: Mapping[str, dict]) -> str | None:
    """Return one hash over a record: the same on another machine, for it holds base names and contents (of
    large files, sizes). None: of an empty one."""
    parts = sorted(f"{Path(path).name} {entry['sha256'] or entry['bytes']}" for path, entry in data.items())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest() if parts else None


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


@cache
def has_local_changes() -> bool | None:
    """Return whether files differ from those of `commit`; None: there is no commit. A submitted job is a copy
    without history: its sender says."""
    if "POLYGLANCE_COMMIT" in os.environ:
        return bool(os.environ.get("POLYGLANCE_LOCAL_CHANGES"))
    return bool(_git("status", "--porcelain", "--untracked-files=no")) if commit() else None


def _git(*arguments: str) -> str | None:
    result = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
    return result.stdout.strip() or None


@cache
def library_versions() -> dict[str, str]:
    """Return {library: version} of those that numbers depend on and that are installed."""
    versions = {}
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def provenance(device: torch.device) -> dict[str, Any]:
    """Return {"code", "libraries", "device", "time": now, UTC, ISO 8601}."""
    return {
        "code": code_version(),
        "libraries": library_versions(),
        "device": device_name(device),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }

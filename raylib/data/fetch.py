"""Bring files of a source to this machine; read its manifest.

A source's base is a local folder, a URL that `fsspec` knows (`s3://`, `gs://`, `https://`, ...), or
`pipe:COMMAND`, where `{name}` in the command stands for the file and its standard output is the file's
content. A manifest never says where to fetch from, so a command runs only if the user wrote it as the base,
or allowed that of a config file (`raylib.config.require_permission`).
"""

import hashlib
import os
import shlex
import subprocess
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, Field

from raylib.config import PIPE
from raylib.data.shards import KINDS, MANIFEST, ShardName, index_command
from raylib.errors import MachineError, UserError, name_errors, reading
from raylib.fileio import MAX_JSON, atomic_file, file_lock, read_json_object, sha256_file
from raylib.strict_json import Count

CHUNK = 1 << 20
MANIFEST_BYTES = 1 << 28  # the most that a remote manifest may take
LOCAL_URL = "file://"


class StoredShard(BaseModel):
    """A shard in `manifest.json`. A manifest comes from elsewhere: names in it could lead anywhere on this
    machine, and so could a hash, which a name in the cache begins with."""

    name: ShardName
    language: str
    samples: Count
    bytes: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class StoredManifest(BaseModel):
    """`manifest.json` (`raylib.data.shards`)."""

    format: Literal[1]
    kind: str
    tokenizer: str | None = None
    shards: list[StoredShard]
    images: list[str] | None = None


class ShardEntry(NamedTuple):
    """A shard as the manifest lists it."""

    name: str
    language: str
    samples: int
    bytes: int
    sha256: str


class Manifest(NamedTuple):
    """tokenizer: SHA-256 of the one that made the ids, of packed text. images: extensions that are images;
    None: written before manifests listed them."""

    kind: str
    tokenizer: str | None
    shards: list[ShardEntry]
    images: tuple[str, ...] | None


def is_remote(base: str | Path) -> bool:
    """Return whether files of a base are brought here; a `Path` is always a folder of this machine."""
    return isinstance(base, str) and ("://" in base or base.startswith(PIPE))


def cache_folder(base: str | Path, cache: str | Path | None) -> Path:
    """Folder of a remote base's files: one of its own under `cache` (default: POLYGLANCE_CACHE, or
    ~/.cache/polyglance)."""
    root = Path(cache or os.environ.get("POLYGLANCE_CACHE") or Path.home() / ".cache" / "polyglance")
    return root / hashlib.sha256(str(base).encode()).hexdigest()[:16]


def fetch(
    base: str | Path, name: str, cache=None, size: int | None = None, sha256: str | None = None
) -> Path:
    """Local path of file `name` of `base`.

    A local file is given as it stands. A remote one is downloaded under a temporary name, checked and
    renamed; several processes may ask for it at once, one downloads. Without `sha256` it is fetched anew at
    every call.

    Raises:
        UserError: missing file, missing package for the URL's scheme, failed command, or other size or hash.
    """
    if not is_remote(base):
        path = Path(base) / name
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        return path
    folder = cache_folder(base, cache)
    # a shard written anew often has its old size (tars are padded): only the hash tells which one is in the
    # cache
    path = folder / (f"{sha256[:16]}-{name}" if sha256 else name)
    # loader processes of all workers on a machine ask for the same shard: one of them downloads it
    with file_lock(folder / f".{name}.lock"):
        if sha256 and path.is_file() and path.stat().st_size == size:
            return path  # it was checked before it got this name
        with atomic_file(path) as temporary:
            _download(str(base), name, temporary, MANIFEST_BYTES if size is None else size)
            num_bytes, what = temporary.stat().st_size, f"{base} {name}"
            if size is not None and num_bytes != size:
                came = f"{num_bytes}" if num_bytes < size else f"more than {size}"
                raise UserError(
                    f"{what}: {came} bytes came, the manifest says {size}; upload the source anew"
                )
            if num_bytes > MANIFEST_BYTES and size is None:
                raise UserError(f"{what}: more than {MANIFEST_BYTES:,} bytes came; is it the right file?")
            if sha256 and sha256_file(temporary) != sha256:
                raise UserError(f"{what}: its SHA-256 is not the manifest's; upload the source anew")
    return path


def fetch_manifest(base: str | Path, cache, kind: str | None) -> Manifest:
    """Read the manifest of a source. `kind`: that the user wants, for the advice where there is none.

    Raises:
        UserError: as of `fetch`; not of the format of `raylib.data.shards`.
    """
    try:
        path = fetch(base, MANIFEST, cache)
    except UserError as error:
        if is_remote(base):
            raise
        raise UserError(
            f"{error}; for a folder of tars, `{index_command(base, kind or 'KIND')}` makes one"
        ) from None
    what, advice = "a manifest of shards", f"make it anew: {index_command(base, kind or 'KIND')}"
    stored = read_json_object(path, (), what, advice, shape=StoredManifest, most=MAX_JSON)
    with reading(path, what, advice):
        return _parse_manifest(stored)


def _parse_manifest(stored: dict[str, Any]) -> Manifest:
    """Raises ValueError: of an unknown kind, or with no shards, or with one twice."""
    kind, images = stored["kind"], stored.get("images")
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}; there are: {', '.join(KINDS)}")
    shards = [ShardEntry(*(shard[name] for name in ShardEntry._fields)) for shard in stored["shards"]]
    if not shards:
        raise ValueError("no shards")
    if len({shard.name for shard in shards}) < len(shards):
        raise ValueError("a shard occurs twice")
    return Manifest(kind, stored.get("tokenizer"), shards, None if images is None else tuple(images))


def _download(base: str, name: str, target: Path, limit: int) -> None:
    """Write file `name` of a base into `target`; of more than `limit` bytes no more than a part, by which its
    size tells."""
    if base.startswith(PIPE):
        _run_command(base, name, target, limit)
        return
    # opening a pipe of this machine would wait for whoever writes to it
    if base.startswith(LOCAL_URL) and not Path(base.removeprefix(LOCAL_URL), name).is_file():
        raise UserError(f"{base}: could not fetch {name}: no such file")
    import fsspec

    try:
        with fsspec.open(f"{base.rstrip('/')}/{name}", "rb") as remote, open(target, "wb") as file:
            while file.tell() <= limit and (chunk := remote.read(CHUNK)):
                with name_errors(target):
                    file.write(chunk)
    except MachineError:  # of the disk here
        raise
    except ImportError as error:
        raise UserError(f"{base}: a package is missing: {error}") from error
    except Exception as error:  # each kind of address has a library, with exceptions of its own
        message = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{base}: could not fetch {name}: {message}") from error


def _run_command(base: str, name: str, target: Path, limit: int) -> None:
    command = base.removeprefix(PIPE)
    if "{name}" not in command:
        raise UserError(f"{base}: the command must hold {{name}}, which becomes the file's name")
    command = command.replace("{name}", shlex.quote(name))
    with open(target, "wb") as file, subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        # what never ends, or is another file, must not fill the disk
        while chunk := process.stdout.read(CHUNK):
            file.write(chunk)
            if file.tell() > limit:
                process.kill()
                return
    if process.returncode:
        raise UserError(f"{base}: exit status {process.returncode} for {name}")

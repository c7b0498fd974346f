"""Bring files of a source to this machine; read its manifest.

A source's base is a local folder, a URL that `fsspec` knows (`s3://`, `gs://`, `https://`, ...), or
`pipe:COMMAND`, where `{name}` in the command stands for the file and its standard output is the file's
content. A manifest never says where to fetch from, so a command runs only if the user wrote it as the base.
"""

import hashlib
import os
import shlex
import subprocess
from pathlib import Path

from raylib.data.shards import KINDS, MANIFEST, index_command
from raylib.errors import MachineError, UserError, name_errors
from raylib.fileio import atomic_file, file_lock, read_json, sha256_file

CHUNK = 1 << 20


def is_remote(base: str) -> bool:
    return "://" in base or base.startswith("pipe:")


def cache_folder(base: str, cache: str | Path | None) -> Path:
    """Folder of a remote base's files: one of its own under `cache` (default: POLYGLANCE_CACHE, or
    ~/.cache/polyglance)."""
    root = Path(cache or os.environ.get("POLYGLANCE_CACHE") or Path.home() / ".cache" / "polyglance")
    return root / hashlib.sha256(base.encode()).hexdigest()[:16]


def fetch(base: str, name: str, cache=None, size: int | None = None, sha256: str | None = None) -> Path:
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
            _download(base, name, temporary)
            num_bytes, what = temporary.stat().st_size, f"{base} {name}"
            if size is not None and num_bytes != size:
                raise UserError(
                    f"{what}: {num_bytes} bytes came, the manifest says {size}; upload the source anew"
                )
            if sha256 and sha256_file(temporary) != sha256:
                raise UserError(f"{what}: its SHA-256 is not the manifest's; upload the source anew")
    return path


def fetch_manifest(base: str, cache, kind: str | None) -> dict:
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
    try:
        manifest = read_json(path)
        if manifest["format"] != 1 or manifest["kind"] not in KINDS or not manifest["shards"]:
            raise ValueError(
                f"format {manifest['format']}, kind {manifest['kind']!r}, {len(manifest['shards'])} shards"
            )
        if not isinstance(manifest.get("images", []), list):
            raise ValueError(f"images {manifest['images']!r}, wanted a list")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no manifest of this format ({error}); make it anew") from error
    return manifest


def _download(base: str, name: str, target: Path) -> None:
    if base.startswith("pipe:"):
        command = base.removeprefix("pipe:")
        if "{name}" not in command:
            raise UserError(f"{base}: the command must hold {{name}}, which becomes the file's name")
        with open(target, "wb") as file:
            command = command.replace("{name}", shlex.quote(name))
            status = subprocess.run(command, shell=True, stdout=file, check=False).returncode
        if status:
            raise UserError(f"{base}: exit status {status} for {name}")
        return
    import fsspec

    try:
        with fsspec.open(f"{base.rstrip('/')}/{name}", "rb") as remote, open(target, "wb") as file:
            while chunk := remote.read(CHUNK):
                with name_errors(target):
                    file.write(chunk)
    except MachineError:  # of the disk here
        raise
    except ImportError as error:
        raise UserError(f"{base}: a package is missing: {error}") from error
    except Exception as error:  # each kind of address has a library, with exceptions of its own
        message = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{base}: could not fetch {name}: {message}") from error

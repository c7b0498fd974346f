"""The one exception that means: the user can fix this."""

import errno
import importlib
import re
from pathlib import Path
from typing import Any

HUB_NAME = re.compile(
    r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?"
)  # xlm-roberta-base, openai/clip-vit-base-patch32
FILE_NAME = re.compile(r"\.(py|json|jsonl|txt|model|safetensors|bin|pt|pth|th|tar)$")


class UserError(Exception):
    """A mistake in the input, in one line: what, where, what to do. Entry points print it and exit with 2."""


class NotFinite(UserError):
    """A loss that is no number any more: the same again, if the run is started again."""


def require(module: str, extra: str) -> Any:
    """Import a module of a package that only some things need.

    Raises:
        UserError: it is not installed; says how it is.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{module.split('.')[0]} is not installed: pip install -e .[{extra}]") from None


def hub_hint(path: Path | str) -> str:
    """Return how to download a model of the Hugging Face Hub, if `path`, where nothing lies, may be its name;
    else ""."""
    name, parent = str(path), Path(path).parent
    may_be = HUB_NAME.fullmatch(name) and not FILE_NAME.search(name) and not Path(path).exists()
    # beside other files it is a mistyped path
    if not may_be or name.startswith("runs/") or ("/" in name and parent.exists()):
        return ""
    return f"; if it is a model of the Hugging Face Hub, download it: hf download {name} --local-dir {name}"


def disk_full_error(error: OSError) -> UserError:
    """Return the line for a run that fills the disk. Any other `error` is raised again."""
    if error.errno != errno.ENOSPC:
        raise error
    where = f" for {error.filename}" if error.filename else ""
    return UserError(
        f"no space left on the disk{where}; free some and start again: a run goes on from its newest "
        "checkpoint"
    )

"""The one exception that means: the user can fix this."""

import errno
import importlib
from typing import Any


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


def disk_full_error(error: OSError) -> UserError:
    """Return the line for a run that fills the disk. Any other `error` is raised again."""
    if error.errno != errno.ENOSPC:
        raise error
    where = f" for {error.filename}" if error.filename else ""
    return UserError(
        f"no space left on the disk{where}; free some and start again: a run goes on from its newest "
        "checkpoint"
    )

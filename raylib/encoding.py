"""Two spellings of one thing: base64 in its variants, names in Unicode's normal forms.

macOS writes "é" in a file's name as "e" and an accent (NFD), most other systems as one character (NFC); both
look alike.
"""

import base64
import os
import unicodedata
from pathlib import Path, PurePath

URL_SAFE = bytes.maketrans(b"-_", b"+/")


def decode_base64(data: str | bytes) -> bytes:
    """Bytes of base64, which may be wrapped into lines, URL-safe, or without its padding.

    Raises:
        ValueError: a character that is none of base64's, or a length that none has. `base64.b64decode` alone
            leaves such characters out, and with them the "-" and "_" of the URL-safe alphabet.
    """
    data = data.encode() if isinstance(data, str) else bytes(data)
    data = b"".join(data.split()).translate(URL_SAFE).rstrip(b"=")
    return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)


def nfc(name: str) -> str:
    """A name in the normal form by which names are compared."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def spellings(name: str) -> tuple[str, ...]:
    """A name as it is, and in the other normal forms that it may be stored in."""
    if name.isascii():
        return (name,)
    return tuple(dict.fromkeys((name, nfc(name), unicodedata.normalize("NFD", name))))


def find_file(folder: Path, name: str) -> Path | None:
    """The file `name` (perhaps with folders) below `folder`, in whichever normal form the disk has it."""
    if os.path.isfile(folder / name):
        return folder / name
    if name.isascii():
        return None
    path = folder
    for part in PurePath(name).parts:
        path = next(
            (path / spelling for spelling in spellings(part) if os.path.exists(path / spelling)), None
        )
        if path is None:
            return None
    return path if path.is_file() else None

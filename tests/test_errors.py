"""Files that are damaged, or another than expected: one line says why, by the library's words or by the
file's first bytes (`raylib.errors.reading`, `raylib.file_kinds`)."""

import gzip
import io
import os
import pickle
import tarfile
import zipfile
from itertools import count

import numpy as np
import pytest
from PIL import Image

from raylib.errors import MachineError, UserError, reading
from raylib.file_kinds import KINDS, recognize

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
LINE = "take an undamaged copy"


def _read(path, what="weights (safetensors)", error=None):
    with reading(path, what):
        raise error or ValueError("header too large")


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", "b")
    return buffer.getvalue()


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    return buffer.getvalue()


def _npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(2))
    return buffer.getvalue()


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "png")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason", "advice"),
    [
        (b"", "empty", "restore it, or download it again"),
        (POINTER, "a git-lfs pointer, not the file itself", "`git lfs pull` in "),
        (b"<!DOCTYPE html>\n<html>", "a web page, such as a server sends", "download it again"),
        (b"\xef\xbb\xbf\n <HTML lang=en>", "a web page, such as a server sends", "download it again"),
        (b'<?xml version="1.0"?>\n<Error><Code>AccessDenied', "a web page", "download it again"),
        (b"Entry not found", "a server's answer in place of the file: Entry not found", "download it again"),
        (bytes(10), "zeros: an unfinished download, or copy", "download it again"),
        (bytes(1 << 14), "zeros: an unfinished download, or copy", "download it again"),
        (gzip.compress(b"a"), "a gzip file", "give the file that is meant"),
        (_zip(), "a zip archive", "give the file that is meant"),
        (_tar(), "a tar archive", "give the file that is meant"),
        (_npy(), "a numpy array (.npy)", "give the file that is meant"),
        (_png(), "a PNG image", "give the file that is meant"),
        (pickle.dumps([1], 4), "a pickle", "give the file that is meant"),
        (b"\1" * 100, "header too large", LINE),
        (b'\x40\0\0\0\0\0\0\0{"a"', "header too large", LINE),  # what was expected, damaged
    ],
    ids=count(),  # gzip and zip hold the time: names made of them differ between two processes of pytest
)
def test_reading_says_what_a_file_is_by_its_first_bytes(content, reason, advice, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError) as found:
        _read(path)
    line = str(found.value)
    assert (
        line.startswith(f"{path}: not to be read as weights (safetensors) ({reason}")
        and f"; {advice}" in line
    )
    assert "\n" not in line


def test_reading_knows_the_formats_that_were_expected(tmp_path):
    """A damaged file of the right format is not told to be of another: by its description, or its name."""
    (tmp_path / "a").write_bytes(_zip())
    assert recognize(tmp_path / "a", "features (npz)") == ("", "")
    (tmp_path / "pytorch_model.bin").write_bytes(_zip())
    assert recognize(tmp_path / "pytorch_model.bin", "weights") == ("", "")
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b"a"))
    assert recognize(tmp_path / "a.tsv.gz", "features: lines of columns") == ("", "")
    for kind in KINDS:
        (tmp_path / "b").write_bytes(bytes(kind.start).replace(b"\0", b"\1") + kind.magic + b"rest")
        assert recognize(tmp_path / "b", "a lexicon")[0] == kind.name


def test_reading_git_lfs_pointer_of_the_hub_says_what_to_download(tmp_path):
    folder = tmp_path / "clone" / "onnx"
    folder.mkdir(parents=True)
    (folder / "a.bin").write_bytes(POINTER)
    with pytest.raises(
        UserError, match=rf"of the Hugging Face Hub: hf download NAME --local-dir {folder}\)$"
    ):
        _read(folder / "a.bin")
    (tmp_path / "clone" / ".git").mkdir()
    (tmp_path / "clone" / ".git" / "config").write_text(
        '[core]\n\tbare = false\n[remote "origin"]\n\turl = https://huggingface.co/org/some-model\n'
    )
    with pytest.raises(UserError) as found:
        _read(folder / "a.bin")
    clone = tmp_path / "clone"
    assert str(found.value).endswith(
        f"`git lfs pull` in {clone}, or download it again: hf download org/some-model --local-dir {clone}"
    )


class PanicException(BaseException):
    """As a library in Rust raises it."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyError("width"), "no 'width' in it"),
        (ValueError(), "ValueError"),
        (ValueError("first\nsecond"), "first"),
        (ValueError("a\x1b[31m\u202ered"), r"a\x1b[31m\u202ered"),
        (ValueError("x" * 1000), "x" * 197 + "..."),
        (MemoryError(), "it asks for more memory than there is"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: x"),
            "it asks",
        ),
        (RecursionError("maximum"), "nested too deeply"),
        (OSError("Unable to synchronously open file (bad object header)"), "Unable to synchronously open"),
        (PanicException("index out of bounds"), "index out of bounds"),
    ],
)
def test_reading_says_what_a_library_says_in_one_short_line(error, reason, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"content")
    with pytest.raises(UserError) as found:
        _read(path, error=error)
    line = str(found.value)
    assert line.startswith(f"{path}: not to be read as weights (safetensors) ({reason}") and line.endswith(
        LINE
    )
    assert line.isprintable()


def test_reading_leaves_what_is_no_fault_of_the_file(tmp_path):
    path = tmp_path / "a"
    for error in (UserError("a line"), MachineError("a line"), KeyboardInterrupt(), SystemExit(1)):
        with pytest.raises(type(error)) as found:
            _read(path, error=error)
        assert found.value is error
    with pytest.raises(UserError, match=f"{path}: no such file or folder"), reading(path, "JSON"):
        path.read_bytes()
    with pytest.raises(MachineError, match=f"{path}: input/output error"):
        _read(path, error=OSError(5, "Input/output error"))


def test_reading_waits_for_no_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"\(header too large\)"):
        _read(tmp_path / "pipe")

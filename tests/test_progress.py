"""Progress: a bar on a terminal, a line now and then in a log, nothing of other workers."""

import contextlib
import fcntl
import os
import pty
import struct
import sys
import termios
import time

import pytest

from raylib import display as module
from raylib.display import progress


def wait(iterable, *arguments):
    for item in progress(iterable, *arguments):
        time.sleep(0.02)
        yield item


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(module, "DELAY", 0.1)
    monkeypatch.setattr(module, "LOG_SECONDS", 0.1)


def test_progress_writes_lines_with_rate_and_time_into_a_log(hurried, capsys):
    assert list(wait(range(20), "index", None, "shards")) == list(range(20))
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 5
    assert all(" of 20 shards, " in line and " shards/s, " in line and " to go" in line for line in lines)
    assert [int(line.split()[1]) for line in lines] == sorted({int(line.split()[1]) for line in lines})


def test_progress_counts_what_is_in_batches(hurried, capsys):
    assert len(list(wait([[1, 2]] * 15, "encode", 30, "images", len))) == 15
    done = [int(line.split()[1]) for line in capsys.readouterr().err.splitlines()]
    assert done and done[-1] > 15


def test_progress_of_unknown_length_tells_no_end(hurried, capsys):
    list(wait(iter(range(10)), "read", None, "lines"))
    text = capsys.readouterr().err
    assert " lines/s, " in text and "to go" not in text


def test_progress_is_silent_where_nobody_waits(capsys, monkeypatch):
    assert list(progress(range(3), "fast")) == [0, 1, 2]
    monkeypatch.setattr(module, "LOG_SECONDS", 0.0)
    monkeypatch.setattr("raylib.distributed.rank", lambda: 1)
    assert list(wait(range(3), "on another worker")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_progress_rewrites_one_line_of_a_terminal(hurried, monkeypatch):
    inside, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(terminal, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        list(wait(range(60), "translate", None, "lines"))
    written = b""
    with contextlib.suppress(OSError):  # at its end
        while part := os.read(inside, 1 << 12):
            written += part
    os.close(inside)
    written = written.decode()
    assert written.count("\n") == 0 and written.count("\rtranslate: ") >= 2
    assert max(map(len, written.split("\r"))) <= 80 and not written.rsplit("\r", 2)[1].strip()

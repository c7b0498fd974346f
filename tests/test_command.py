"""Ends of command lines: well, by a mistake of the user, by a full disk, by Ctrl-C."""

import errno
import signal
import subprocess
import sys

import pytest

from raylib.command import RESUME_HINT, entry_point
from raylib.errors import UserError


@pytest.mark.parametrize(
    ("trouble", "code", "said"),
    [
        (UserError("a.json: no such file"), 2, "error: a.json: no such file\n"),
        (
            OSError(errno.ENOSPC, "full", "a.bin"),
            2,
            "error: no space left on the disk for a.bin; free some and start again: "
            "a run goes on from its newest checkpoint\n",
        ),
        (KeyboardInterrupt(), 130, f"interrupted; {RESUME_HINT}\n"),
    ],
)
def test_command_user_error_full_disk_and_interrupt_are_one_line(trouble, code, said, capsys):
    @entry_point(RESUME_HINT)
    def main(arguments):
        raise trouble

    assert main([]) == code and capsys.readouterr().err == said


def test_command_takes_sigterm_for_ctrl_c_and_leaves_the_signal_as_it_was(capsys):
    @entry_point(RESUME_HINT)
    def main(arguments):
        signal.raise_signal(signal.SIGTERM)
        return 0

    before = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main([]) == 130 and capsys.readouterr().err == f"interrupted; {RESUME_HINT}\n"
        assert signal.getsignal(signal.SIGTERM) == before[0]
    finally:
        signal.signal(signal.SIGINT, before[1])


def test_command_takes_arguments_of_its_process(monkeypatch):
    monkeypatch.setattr("sys.argv", ["program", "7"])
    assert (
        entry_point()(lambda arguments: int(arguments[0]))() == 7
        and entry_point()(lambda arguments: int(arguments[0]))(["3"]) == 3
    )


def test_command_other_exceptions_are_not_swallowed():
    @entry_point()
    def main(arguments):
        raise PermissionError("not yours")

    with pytest.raises(PermissionError):
        main([])


def test_command_whose_output_nobody_reads_ends_quietly(tmp_path):
    script = tmp_path / "endless.py"
    script.write_text(
        "from raylib.command import entry_point\n"
        "@entry_point()\n"
        "def main(arguments):\n"
        "    while True:\n"
        "        print('line')\n"
        "raise SystemExit(main())\n"
    )
    command = f"{sys.executable} {script} | head -1; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (141, "line\n", "")


def test_command_another_broken_pipe_keeps_its_traceback(monkeypatch):
    @entry_point()
    def main(arguments):
        raise BrokenPipeError

    with open("/dev/null", "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(BrokenPipeError):
            main([])

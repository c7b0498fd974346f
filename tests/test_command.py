"""Ends of command lines: well, by a mistake of the user, by a failure of the machine, by Ctrl-C."""

import errno
import importlib
import os
import shutil
import signal
import subprocess
import sys

import pytest

from raylib.command import RESUME_HINT, entry_point
from raylib.errors import FREE_SPACE, INPUT_ERRORS, MACHINE_ERRORS, MachineError, UserError
from tests.drills.commands import obey_permissions
from tests.drills.runs import Group


@pytest.mark.parametrize(
    ("trouble", "code", "said"),
    [
        (UserError("a.json: no such file"), 2, "error: a.json: no such file\n"),
        (MachineError("no disk"), 1, "error: no disk\n"),
        (UserError("a\x1b]0;b\x07\u2028\nc: no file"), 2, "error: a\\x1b]0;b\\x07\\u2028\\nc: no file\n"),
        (OSError(errno.ENOSPC, "full"), 1, f"error: no space left on the disk; {FREE_SPACE}\n"),
        (ConnectionRefusedError("a:1"), 1, "error: no connection (a:1); is the network up, and the address "),
        (KeyboardInterrupt(), 130, f"interrupted; {RESUME_HINT}\n"),
    ],
)
def test_command_user_error_machine_error_and_interrupt_are_one_line(trouble, code, said, capsys):
    @entry_point(RESUME_HINT)
    def main(arguments):
        raise trouble

    assert main([]) == code
    err = capsys.readouterr().err
    assert err.startswith(said) and err.count("\n") == 1


@pytest.mark.parametrize("number", [*MACHINE_ERRORS, *INPUT_ERRORS])
def test_command_error_of_the_system_is_one_line_with_its_path(number, tmp_path, capsys):
    path = tmp_path / "file"

    @entry_point()
    def main(arguments):
        raise OSError(number, os.strerror(number), str(path))

    assert main([]) == (1 if number in MACHINE_ERRORS else 2)
    err = capsys.readouterr().err
    assert err.startswith(f"error: {path}: ") and err.count("\n") == 1 and "{" not in err


@pytest.mark.parametrize(
    ("trouble", "code"),
    [
        (PermissionError(errno.EACCES, "denied"), 1),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), 1),
        (RuntimeError("cannot read (os error 5)"), 1),
        (FileNotFoundError(errno.ENOENT, "no such file"), 2),
        (ValueError("no JSON"), 2),
    ],
)
def test_command_line_about_an_error_of_the_machine_ends_with_its_exit_code(trouble, code, capsys):
    @entry_point()
    def main(arguments):
        try:
            raise trouble
        except Exception:
            raise UserError("a.json: not to be read") from None

    assert main([]) == code and capsys.readouterr().err == "error: a.json: not to be read\n"


def _save_pytorch(path):
    import torch

    torch.save(torch.zeros(1 << 16), path)


def _save_safetensors(path):
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1 << 16)}, path)


def _save_arrow(path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"a": list(range(1 << 16))}), path)


def _save_tokenizer(path):
    import tokenizers

    vocabulary = {str(i): i for i in range(1 << 14)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "0")).save(str(path))


def _save_atomically(path):
    from raylib.fileio import write_atomically

    write_atomically(path, "x" * (1 << 18))


@pytest.mark.parametrize(
    "save", [_save_pytorch, _save_safetensors, _save_arrow, _save_tokenizer, _save_atomically]
)
def test_command_full_disk_is_one_line_in_whichever_library_it_is_felt(save, tmp_path):
    """The limit of a file's size is a full disk that needs no mount: EFBIG in place of ENOSPC."""
    script = (
        "import resource, signal, sys\n"
        "from raylib.command import entry_point\n"
        "from raylib.errors import name_errors\n"
        f"from tests.test_command import {save.__name__}\n"
        "from pathlib import Path\n"
        "@entry_point()\n"
        "def main(arguments):\n"
        f"    path = Path('{tmp_path}/file')\n"
        "    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "    with name_errors(path):\n"
        f"        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        f"        {save.__name__}(path)\n"
        "raise SystemExit(main())\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 1, ended.stderr
    line = ended.stderr.splitlines()[-1]
    assert line.startswith(f"error: {tmp_path}/file: ") and "Traceback" not in ended.stderr


def test_command_whose_output_is_on_a_full_disk_is_one_line():
    script = (
        "from raylib.command import entry_point\n"
        "@entry_point()\n"
        "def main(arguments):\n"
        "    print('x' * 100_000)\n"
        "raise SystemExit(main())\n"
    )
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1 and ended.stderr == f"error: no space left on the disk; {FREE_SPACE}\n"


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "stopped by SIGTERM"),
        (signal.SIGUSR1, 138, "stopped by SIGUSR1"),
        (signal.SIGUSR2, 140, "stopped by SIGUSR2"),
    ],
)
def test_command_ends_at_once_by_a_signal_and_leaves_it_as_it_was(number, code, line, capsys):
    @entry_point(RESUME_HINT)
    def main(arguments):
        signal.raise_signal(number)
        return 0

    sigint = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(number)
    try:
        assert main([]) == code and capsys.readouterr().err == f"{line}; {RESUME_HINT}\n"
        assert signal.getsignal(number) == before
    finally:
        signal.signal(signal.SIGINT, sigint)


def test_command_of_a_library_that_takes_ctrl_c_itself_gets_sigterm_as_ctrl_c(capsys):
    """As Tune does, to end its trials in order."""

    @entry_point(RESUME_HINT)
    def main(arguments):
        ended = []
        signal.signal(signal.SIGINT, lambda *_: ended.append(True))
        signal.raise_signal(signal.SIGTERM)
        assert ended
        raise KeyboardInterrupt

    sigint = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main([]) == 143 and capsys.readouterr().err == f"stopped by SIGTERM; {RESUME_HINT}\n"
    finally:
        signal.signal(signal.SIGINT, sigint)


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


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("pretrain.__main__", "evaluate RUNS/pretrained RETRIEVAL --json OUT/file"),
        ("pretrain.__main__", "export RUNS/pretrained OUT/export"),
        ("finetune.__main__", "compare RUNS/classified --csv OUT/file"),
        ("finetune.__main__", "evaluate OUT/classified"),
        ("pretrain.__main__", "tiny runtime=local corpus=CORPUS runs=OUT"),
        ("tune_spaces.__main__", "layer_decay recipe=scenes_xvnli runs=OUT"),
        ("raylib.data.shards", "OUT text"),
    ],
)
def test_command_that_may_not_write_is_one_line_and_writes_nothing(
    module, words, stored, corpus, retrieval_set, tmp_path
):
    """As anybody's process, or a root's without its rights over files."""
    out, log = tmp_path / "out", tmp_path / "log.txt"
    shutil.copytree(stored / "runs" / "classified", out / "classified")
    shutil.copy2(next((corpus / "text").glob("*.tar")), out)
    places = {"RUNS": stored / "runs", "RETRIEVAL": retrieval_set, "CORPUS": corpus, "OUT": out}
    for name, path in places.items():
        words = words.replace(name, str(path))
    before = sorted(out.rglob("*"))
    for path in (*before, out):
        path.chmod(0o555 if path.is_dir() else 0o444)

    def work() -> int:
        obey_permissions()
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # no longer pytest's
        return importlib.import_module(module).main(words.split())

    with Group([work], log) as group:
        assert group.wait(60) == [1], log.read_text()
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert f"{out}/" in line and ": permission denied for " in line and "Traceback" not in log.read_text()
    assert sorted(out.rglob("*")) == before
    for path in (out, *before):
        path.chmod(0o755)

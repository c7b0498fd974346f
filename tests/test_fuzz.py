"""`make fuzz`: its means see what they must; every reader is registered; a short run of it over every reader.
The long one is `make fuzz`."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from raylib.data.images import BadImage
from raylib.errors import MachineError, UserError
from tests.fuzz import contract, mutate, pool
from tests.fuzz.__main__ import list_jobs
from tests.fuzz.reader import Reader, same
from tests.fuzz.readers import READERS

FILES_A_READER = 4


def example(folder):
    (folder / "a.txt").write_text("one\ntwo\n")
    return folder / "a.txt"


def run_once(tmp_path, read, oracle=lambda path: None, **options):
    """What comes of the undamaged example of a reader."""
    reader = Reader("r", example, read, oracle, (), **{"seconds": 1.0, **options})
    examples = pool.Examples({"r": reader}, tmp_path / "examples")
    folder = tmp_path / "examples" / "r"
    folder.mkdir(parents=True)
    examples.inside["r"], examples.bytes = example(folder).relative_to(folder), [b"x"]
    until = time.monotonic() + 100
    (result,) = pool.run(examples, [pool.Job("r", 0)], 1, tmp_path / "work", until)
    return result.outcome


def fail(error):
    def read(path):
        raise error if not isinstance(error, type) else error(f"{path}: no")

    return read


def write_beside(path):
    (path.parent.parent / "found.txt").write_text("x")


def write_by_c(path):
    """As a library in C does it, which no audit hook hears."""
    import ctypes

    libc = ctypes.CDLL(None)
    libc.close(libc.creat(str(path.parent.parent.parent / "beside" / "x").encode(), 0o644))


def make_noise(path):
    os.write(2, b"warning\n" * 2000)
    return None


def start_process(path):
    subprocess.run(["true"])


def take_memory(path):
    return len(bytearray(b"x") * (1 << 29)) and None


def ask_for_memory(path):
    try:
        bytearray(1 << 40)
    except MemoryError as e:
        raise UserError(f"{path}: asks for too much") from e


class PanicException(BaseException):
    """As pyo3's."""


READINGS = {
    "accepted and right": (lambda path: None, {}),
    "one line": (fail(UserError), {}),
    "one line, of an image": (fail(BadImage), {}),
    "one line, of the system": (lambda path: (path / "x").read_text(), {}),
    "machine line": (fail(MachineError), {}),
    "bad line, of two": (fail(UserError("a.txt: no\nyes")), {}),
    "bad line, without a name": (fail(UserError("no")), {}),
    "bad line, long": (fail(UserError("a.txt: " + "no " * 200)), {}),
    "bad line, that colours the terminal": (fail(UserError("a.txt: \x1b[31m")), {}),
    "traceback": (fail(ValueError), {}),
    "traceback, of Rust": (fail(PanicException), {}),
    "traceback, an exit": (fail(SystemExit), {}),
    "accepted and wrong": (lambda path: 1, {}),
    "accepted and wrong, which no other reads": (lambda path: None, {"oracle": fail(ValueError)}),
    "signal": (lambda path: os.abort(), {}),
    "hang, on the CPU": (lambda path: [None for _ in iter(int, 1)], {}),
    "hang, asleep": (lambda path: time.sleep(100), {}),
    "memory, used": (take_memory, {}),
    "memory, asked for": (ask_for_memory, {}),
    "noise": (make_noise, {}),
    "wrote outside": (write_beside, {}),
    "wrote outside, in C": (write_by_c, {}),
    "wrote outside, by removing": (lambda path: os.rmdir(path.parent.parent / "tmp/.."), {}),
    "wrote outside, what may only be read": (lambda path: path.write_text("x"), {"writes": False}),
    "process": (start_process, {}),
    "process, of the shell": (lambda path: os.system("true"), {}),
    "process, a fork": (lambda path: os.fork(), {}),
}


@pytest.mark.parametrize("name", READINGS)
def test_fuzz_outcomes_are_told_apart(tmp_path, name):
    read, options = READINGS[name]
    outcome = run_once(tmp_path, read, **options)
    assert outcome.kind == name.partition(",")[0], outcome


def test_fuzz_readings_are_compared_to_the_bit():
    values = {"a": [1, (2.5, None)], "b": np.arange(3), "c": torch.ones(2), "d": float("nan")}
    assert same(values, {**values, "a": [1, [2.5, None]], "c": np.ones(2, np.float32)})
    for key, other in (
        ("a", [True, (2.5, None)]),
        ("a", [1, (2.5,)]),
        ("b", np.arange(3, dtype=np.int32)),
        ("b", [0, 1, 2]),
        ("c", np.ones(2)),
        ("d", 0.0),
        ("d", None),
    ):
        assert not same(values, {**values, key: other}), (key, other)
    assert not same(values, {"a": 1})


def test_fuzz_damage_follows_from_the_seed(tmp_path):
    folder = tmp_path / "example"
    folder.mkdir()
    path = example(folder)

    def damage(seed, number, to):
        reader = Reader("r", example, len, len, ())
        case = mutate.make_case(reader, folder, path.relative_to(folder), seed, number, [b"other"], to)
        is_file = case.target.is_file() and not case.target.is_symlink()
        return case.mutation, case.target.read_bytes() if is_file else None

    cases = [damage(0, number, tmp_path / f"a{number}") for number in range(120)]
    assert cases == [damage(0, number, tmp_path / f"b{number}") for number in range(120)]
    assert cases[0] == ("none", b"one\ntwo\n") and not any(data == b"one\ntwo\n" for _, data in cases[1:])
    assert cases[1:] != [damage(1, number, tmp_path / f"c{number}") for number in range(1, 120)]
    assert {*mutate.BYTES, *mutate.PLACES, "text_words", "text_lines"} <= {name for name, _ in cases}


def test_fuzz_every_function_that_opens_a_file_is_covered():
    covers = {function for reader in READERS.values() for function in reader.covers}
    missing = contract.uncovered(covers)
    assert not missing, "\n".join(f"{name}: {calls[0]}" for name, calls in missing.items())
    stale = contract.REASONS.keys() - contract.opening_functions().keys()
    assert not stale, f"reasons for what opens no file: {', '.join(sorted(stale))}"
    both = contract.REASONS.keys() & covers
    assert not both, f"covered, and excused: {', '.join(sorted(both))}"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def f(p):\n return open(p)", ["m:f"]),
        ("def f(p):\n return open(p, 'w'), p.open('wb'), open(p, mode='a')", []),
        ("class A:\n def f(self, p):\n  def g(): return p.read_bytes()\n  return g", ["m:A.f"]),
        ("def f(p):\n return torch.load(p), json.loads(p), safe_open(p, 'pt')", ["m:f"]),
        ("x = np.load('a')", ["m:<module>"]),
    ],
)
def test_fuzz_functions_that_open_files_are_found(text, found):
    assert list(contract.find_in(text, "m")) == found


def test_fuzz_a_short_run_over_every_reader(tmp_path):
    files = FILES_A_READER * len(READERS)
    command = [sys.executable, "-m", "tests.fuzz", "--files", files, "--keep", tmp_path / "faults", "--trace"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=pool.ROOT)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert f"{files:,} files, {len(READERS)} readers" in done.stdout


def test_fuzz_make_fuzz_reads_ten_thousand_files():
    from tests.fuzz.__main__ import FILES

    jobs = list_jobs(list(READERS), FILES)
    assert len(jobs) >= 10_000 and {job.reader for job in jobs} == set(READERS)

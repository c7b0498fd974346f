"""Files that are cut off, overwritten or do not answer while a training reads them, and loader processes that
die: one line with the name, never a bus error."""

import mmap
import multiprocessing
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.formats import Example
from finetune.strategies.distillation.teacher import store_states
from raylib.cache import write_encoder_states
from raylib.data.index import FileBytes, index_path
from raylib.data.loading import BatchStream, StepDataset
from raylib.data.sources import Source
from raylib.errors import MachineError, UserError
from raylib.monitoring import find_waits
from raylib.packed import Ragged


class Reads(StepDataset):
    """A step reads whatever `read(step)` reads."""

    def __init__(self, read, files=()):
        self.read, self.sizes = read, {path: path.stat().st_size for path in files}

    def find_changed_file(self):
        return next((f"{p}: cut off" for p, size in self.sizes.items() if p.stat().st_size < size), None)

    def __getitem__(self, step):
        self.read(step)
        return {"step": step, "samples": 1, "x": torch.zeros(1)}


@pytest.fixture
def shards(tmp_path, corpus):
    """Sources of ours, which a test may damage."""
    for name in ("text", "image_text"):
        shutil.copytree(corpus / name, tmp_path / name)
    return tmp_path


def read_on(source, language, packed):
    """Read sample after sample of a source, backwards: the end of a shard comes first."""
    size = source.size(language)

    def read(step):
        number = size - 1 - step % size
        if packed:
            return source.row(language, number)
        sample = source.sample(language, number)
        return sample.read(sample.images[0])

    return read


def test_file_bytes_that_become_fewer_name_the_file(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(bytes(range(100)))
    content = FileBytes(path)
    assert (
        content[10:13] == bytes([10, 11, 12]) and len(content) == 100 and content[98:200] == bytes([98, 99])
    )
    os.truncate(path, 50)
    assert content.read(10, 40) == bytes(range(40, 50))
    found = f"{path}: cut off: it has 50 bytes, and had 100 at least; restore it"
    for read in (lambda: content.read(10, 45), lambda: content[90:], lambda: content.read(1, 99)):
        with pytest.raises(UserError, match=found):
            read()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("kind", "what"), [("text", "shard"), ("image_text", "shard"), ("image_text", "index")]
)
def test_shard_that_is_cut_off_in_mid_run_is_named(shards, kind, what, workers):
    source = Source(shards / kind)
    language = next(iter(source.groups))
    entry = source.groups[language][-1]
    path = shards / kind / entry.name
    stream = BatchStream(Reads(read_on(source, language, kind == "text")), 0, 2000, workers)
    for _ in range(3):
        next(stream)
    path = path if what == "shard" else index_path(path)
    os.truncate(path, 600)
    found = f"{path}: cut off: it has 600 bytes, and had [0-9,]+ at least"
    with pytest.raises(UserError, match=found) as error:
        list(stream)
    assert "\n" not in str(error.value)


def test_shard_that_is_cut_off_before_it_is_opened_is_named(shards):
    """Of many shards a loader opens each when its first sample is read."""
    source = Source(shards / "text")
    path = shards / "text" / source.shards[-1].name
    os.truncate(path, 600)
    with pytest.raises(UserError, match=f"{path}: 600 bytes now, the manifest says [0-9,]+; restore it"):
        source.row(source.shards[-1].language, source.size(source.shards[-1].language) - 1)


@pytest.mark.parametrize("kind", ["text", "image_text"])
def test_shard_that_is_overwritten_in_mid_run_is_named(shards, kind):
    """In place, with as many bytes: what lies there is another content; the same content written again is
    none."""
    source = Source(shards / kind)
    language = next(iter(source.groups))
    path = shards / kind / source.groups[language][-1].name
    read, content = read_on(source, language, kind == "text"), path.read_bytes()
    first = [np.array(read(0))]
    with open(path, "r+b") as file:
        file.write(content)
    os.utime(path, ns=(1, 1))
    assert (np.array(read(0)) == first[0]).all()
    with open(path, "r+b") as file:
        file.write(bytes(reversed(content)))
    with pytest.raises(UserError, match=f"{path}: written to since it was opened.*; restore it"):
        read(0)


def test_shard_that_is_removed_in_mid_run_is_read_on_or_named(shards):
    source = Source(shards / "text")
    language, (*_, last) = next(iter(source.groups)), list(source.groups)
    read, row = (
        read_on(source, language, True),
        Source(shards / "text").row(language, source.size(language) - 1),
    )
    read(0)
    for shard in source.shards:
        (shards / "text" / shard.name).unlink()
    assert (read(0)[0] == row[0]).all()  # open files stay
    with pytest.raises(UserError, match=f"{source.groups[last][0].name}: no such file"):
        source.row(last, 0)


@pytest.mark.parametrize("states", ["encoder", "teacher"])
def test_states_that_are_cut_off_in_mid_run_are_named(tmp_path, states):
    names = [f"item {i}" for i in range(300)]
    folder = tmp_path / "states"
    if states == "encoder":
        lengths = torch.full((len(names),), 3)
        stored = write_encoder_states(
            folder, names, lambda chunk: len(chunk), lambda n: Ragged(torch.rand(3 * n, 64), lengths[:n]), 64
        )
    else:
        examples = [Example(name, ("",), (), {}) for name in names]
        stored = store_states(
            folder, examples, lambda chunk: (torch.rand(2, 3 * len(chunk), 64), [3] * len(chunk)), 64
        )
    (path,) = folder.glob("states-*")
    stream = BatchStream(Reads(lambda step: stored.read(names[-1 - step : -step or None])), 0, 300, 1)
    next(stream)
    os.truncate(path, 5000)
    with pytest.raises(UserError, match=f"{path}: cut off: it has 5,000 bytes, and had "):
        list(stream)


def map_file(path):
    """Read a mapped file, as LMDB does."""
    with open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return lambda step: content[-1 - 4096 * step]


@pytest.mark.parametrize("is_known", [True, False])
def test_loader_ended_by_a_bus_error_names_the_file(tmp_path, is_known):
    path = tmp_path / "data.mdb"
    path.write_bytes(bytes(4096 * 100))
    stream = BatchStream(Reads(map_file(path), [path] if is_known else ()), 0, 100, 1)
    found = (
        f"{path}: cut off; restore it" if is_known else "SIGBUS: /dev/shm is full .*, or a file that it had"
    )
    with pytest.raises(UserError if is_known else MachineError, match=found):
        next(stream)
        os.truncate(path, 4096)
        list(stream)


@pytest.mark.parametrize(
    ("workers", "ended_by", "words"),
    [
        (2, signal.SIGKILL, "SIGKILL, as the kernel does where the memory is full"),
        (1, signal.SIGSEGV, "ended with signal SIGSEGV; fit.loader_workers=0"),
    ],
)
def test_loader_that_is_killed_blames_no_shared_memory(workers, ended_by, words):
    stream = BatchStream(Reads(lambda step: time.sleep(0.01)), 0, 2000, workers)
    with pytest.raises(MachineError, match=words) as error:
        next(stream)
        os.kill(stream.loaders[-1].pid, ended_by)
        list(stream)
    assert "shm" not in str(error.value) and "\n" not in str(error.value)


def test_loader_that_is_killed_during_a_step_lets_the_step_end():
    stream, ended = BatchStream(Reads(lambda step: None), 0, 2000, 1), 0
    with pytest.raises(MachineError, match="SIGKILL"):
        for _ in stream:
            with suppress(ProcessLookupError):  # dead since the step before, and not yet noticed
                os.kill(stream.loaders[0].pid, signal.SIGKILL)
            time.sleep(0.5)
            ended += 1
    assert ended


def test_waits_of_a_loader_name_the_file_that_does_not_answer(tmp_path):
    """As of a network file system that stalls: here a pipe that nobody writes to."""
    named, opened = tmp_path / "named.jpg", tmp_path / "opened.jpg"
    os.mkfifo(named)
    os.mkfifo(opened)
    writer = os.open(opened, os.O_RDWR)
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=Path(path).read_bytes, daemon=True) for path in (named, opened)]
    for child in children:
        child.start()
    expected = {(children[0].pid, str(named)), (children[1].pid, str(opened))}
    for _ in range(100):
        if expected <= set(find_waits()):
            break
        time.sleep(0.05)
    assert expected <= set(find_waits())
    os.close(writer)
    for child in children:
        child.kill()

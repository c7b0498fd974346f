import functools
import json
import os
import re

import pytest

from raylib import fileio
from raylib.errors import MachineError, UserError, error_line
from raylib.fileio import (
    MAX_JSON,
    MAX_SMALL,
    append_jsonl,
    atomic_file,
    atomic_folder,
    copy_atomically,
    file_lock,
    open_plain,
    read_json,
    read_json_object,
    read_jsonl,
    repair_jsonl,
    sha256_file,
    write_json,
)
from raylib.models.hf_folders import read_folder
from raylib.weights import read_tensors


def test_atomic_file_keeps_the_old_one_when_the_block_fails(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": "ä"})
    with pytest.raises(OSError, match="full"), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise OSError("full")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ä"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_atomic_folder_begins_empty_and_takes_the_place_of_an_empty_one(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="full"), atomic_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("half")
        raise OSError("full")
    with atomic_folder(tmp_path / "out") as partial:
        assert list(partial.iterdir()) == []
        (partial / "b").write_text("whole")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "b"]


def test_atomic_folder_is_written_by_one_process_at_a_time(tmp_path):
    with atomic_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("first")
        with (
            pytest.raises(UserError, match="/out: another process is writing it"),
            atomic_folder(tmp_path / "out"),
        ):
            pass
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "a"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"{", "Expecting property name"),
        (b"\xff", "not UTF-8 text: byte 0xff at 0"),
        (b"[1]", "list in place of an object"),
        (b'{"a": 1}', "no b in it"),
        (b'{"a": 1, "b": 2', "Expecting ',' delimiter"),
        (b"\0" * 5000, "zeros: an unfinished download, or copy"),
        (b'{"a": "\0"}', "Invalid control character"),
        (b"[" * 100_000, "nested deeper than 100"),
        (b"[" * 101 + b"]" * 101, "nested deeper than 100"),
        (b'{"a": NaN, "b": 1}', "NaN is no JSON"),
        (b'{"a": -Infinity, "b": 1}', "-Infinity is no JSON"),
        (b'{"a": 1e999, "b": 1}', "1e999 is too large a number"),
        (b'{"b": 1, "a": ' + b"9" * 5000 + b"}", "an integer of 5,000 digits"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a' twice in one object, with different values"),
        (b'{"a": {"c": [1]}, "b": 2, "a": {"c": [true]}}', "'a' twice in one object"),
        (b'{"a": "\\ud800", "b": 2}', "half of a surrogate pair, '\\ud800'"),
        (b'{"a": "\xed\xa0\x80", "b": 2}', "not UTF-8 text: byte 0xed at 7"),
        ('{"a": "\ud800", "b": 2}'.encode("utf-16-le", "surrogatepass"), "not UTF-16-LE text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "a git-lfs pointer"),
    ],
)
def test_json_that_is_none_is_a_line_with_its_path(tmp_path, content, reason):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError) as found:
        read_json_object(tmp_path / "a.json", ("a", "b"))
    line = error_line(found.value)
    assert line is found.value and str(line).startswith(
        f"{tmp_path}/a.json: not to be read as JSON ({reason}"
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32-le"])
def test_json_is_read_in_every_encoding_of_unicode(tmp_path, encoding):
    values = {"a": ["ä", "\U0001f600", None, 1.5, -(2**63)], "b": {"": True}}
    for text in (json.dumps(values), json.dumps(values, ensure_ascii=False, indent=1)):
        (tmp_path / "a.json").write_bytes(text.encode(encoding))
        assert read_json(tmp_path / "a.json") == values


def test_json_of_earlier_versions_may_have_numbers_that_are_not_finite(tmp_path):
    (tmp_path / "a.json").write_text("[NaN, 1e999, 2]")
    assert str(read_json(tmp_path / "a.json", finite=False)) == "[nan, inf, 2]"
    (tmp_path / "a.json").write_text("[" * 100 + "1" + "]" * 100)
    assert str(read_json(tmp_path / "a.json")) == "[" * 100 + "1" + "]" * 100
    (tmp_path / "a.json").write_text('{"a": 1, "a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}, "it may be read in one way alone"


def test_json_in_place_of_which_a_folder_lies_is_a_line(tmp_path):
    for read in (read_json, read_jsonl, lambda path: repair_jsonl(path, "n")):
        with pytest.raises((UserError, OSError)) as found:
            read(tmp_path)
        assert str(error_line(found.value)) == f"{tmp_path}: a folder, where a file is needed; give a file"


def test_jsonl_without_the_line_that_a_crash_cut_off(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_jsonl(path) == []
    append_jsonl(path, {"n": 1})
    with open(path, "a") as file:
        file.write('{"n": 2, "text": "cut')
    assert read_jsonl(path) == [{"n": 1}]
    append_jsonl(path, {"n": 3, "text": "ä"})
    assert read_jsonl(path) == [{"n": 1}, {"n": 3, "text": "ä"}], "the next record keeps its own line"
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_jsonl(path, {"n": float("inf")})
    assert len(read_jsonl(path)) == 2


def test_jsonl_keeps_a_last_line_that_lacks_its_newline_alone(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"n": 1}\n{"n": 2, "text": "\u2028 \x85"}', encoding="utf-8")
    append_jsonl(path, {"n": 3}, durable=True)
    assert [record["n"] for record in read_jsonl(path)] == [1, 2, 3]


def test_jsonl_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"n": 1}\n{"n": 2, "te\n{"n": 3}\n')
    with pytest.raises(UserError, match=r"log.jsonl:2: no JSON object .*take that line out"):
        read_jsonl(path)


LINES = [b'{"n": 1, "in": {"n": 5}}', '{"n": 2, "text": "\u2028\xe4"}'.encode()]


@pytest.mark.parametrize("cut", range(len(LINES[1])))
@pytest.mark.parametrize("behind", [b"", b'{"n": 3}\n', b'\n{"n": 3}\n', b"\0\0\0", b'\0\0\n{"n": 3}\n'])
def test_jsonl_repair_drops_what_a_crash_left_and_says_so(tmp_path, cut, behind):
    """A line cut off after each of its bytes, at the end, before another line, on the same line, or with the
    zero bytes of a power failure."""
    path = tmp_path / "log.jsonl"
    path.write_bytes(LINES[0] + b"\n" + LINES[1][:cut] + behind)
    notes = repair_jsonl(path, "n")
    assert [record["n"] for record in read_jsonl(path)] == ([1, 3] if b"3" in behind else [1])
    assert path.read_bytes().endswith(b"\n") and b"\0" not in path.read_bytes()
    assert all("cut off by a crash and is dropped" in note for note in notes)
    assert len(notes) == bool(cut or b"\0" in behind)
    if cut and not behind:
        assert notes == [f"{path}: its last line was cut off by a crash and is dropped"]
    assert repair_jsonl(path, "n") == []


@pytest.mark.parametrize(
    "line", ["n = 2", '{"n": 2} {"m": 3}', "[1, 2]", '{"m": 2}', '{"n": 2,, "m": 3456789012}']
)
def test_jsonl_repair_names_a_line_that_no_crash_leaves(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"n": 1}}\n{line}\n')
    with pytest.raises(UserError, match="log.jsonl:2: no JSON object with 'n'"):
        repair_jsonl(path, "n")
    assert path.read_text() == f'{{"n": 1}}\n{line}\n'


def test_jsonl_repair_splits_whole_records_on_one_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"n": 1, "in": {"n": 5}}{"n": 2}{"n": 3}\n')
    assert repair_jsonl(path, "n") == [] and [record["n"] for record in read_jsonl(path)] == [1, 2, 3]


def test_jsonl_line_that_a_full_disk_cuts_off_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    append_jsonl(path, {"n": 1})
    monkeypatch.setattr(fileio.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(MachineError, match="log.jsonl: no space left on the disk"):
        append_jsonl(path, {"n": 2}, durable=True)
    assert path.read_text() == '{"n": 1}\n'


def test_file_lock_says_whether_it_could_be_had(tmp_path):
    with file_lock(tmp_path / "x" / "lock") as held:
        assert held
        with file_lock(tmp_path / "x" / "lock", wait=False) as second:
            assert not second
    with file_lock(tmp_path / "x" / "lock", wait=False) as again:
        assert again


def test_sha256_file_is_that_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_copy_onto_itself_is_whole_after_a_kill(tmp_path):
    """As a run's own copy of a user's code is, at each start."""
    from tests.drills.tracer import torn_writes, trace

    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "code.py").write_text("x = 1\n" * 100)
    work = functools.partial(copy_atomically, folder / "code.py", folder / "code.py")
    whole = trace([lambda: work() or 0], folder, tmp_path / "log")
    points = [point for point in whole.operations[0] if point.call != "openat"]
    assert whole.codes == [0] and {point.call for point in points} >= {"rename", "fsync"}
    for point in (*points, *torn_writes(points)):
        done = trace([lambda: work() or 0], folder, tmp_path / "log", (0, point), power_fails=True)
        assert done.reached and (folder / "code.py").read_text() == "x = 1\n" * 100, point


def test_read_json_of_settings_is_bounded(tmp_path):
    """A few bytes of JSON are thirty times as many in memory; what holds a value an image may be larger."""
    path = tmp_path / "config.json"
    path.write_bytes(b"[]" + b" " * MAX_SMALL)
    with pytest.raises(UserError, match=rf"{path}: not to be read as JSON \(16,777,218 bytes, of which"):
        read_json(path)
    assert read_json(path, most=MAX_JSON) == []


def test_open_plain_waits_for_nothing(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ValueError, match="a pipe or a device"):
            open_plain(path)
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        open_plain(tmp_path)
    (tmp_path / "file").write_bytes(b"content")
    with open_plain(tmp_path / "file") as file:
        assert file.read() == b"content" and file.name == str(tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "partial"),
    [
        ("model.safetensors", "model.safetensors.part"),
        ("model.safetensors", "model.safetensors.crdownload"),
        ("model.safetensors", ".cache/huggingface/download/uR1o.0a1b.incomplete"),
        ("pytorch_model.bin", "pytorch_model.bin.incomplete"),
    ],
)
def test_unfinished_downloads_are_told(name, partial, tmp_path):
    """Beside weights that are not whole, in their place, and where a folder has none."""
    data, folder = b"\1" * 60, tmp_path / "model"
    (folder / partial).parent.mkdir(parents=True)
    (folder / partial).write_bytes(data)
    said = f"{folder / partial} is an unfinished download: let it end, or download it again"
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=re.escape(said)):
        read_folder(folder)
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=re.escape(f"beside it is {folder / partial}")):
        read_tensors(folder / name)
    with pytest.raises(UserError, match="an unfinished download, by its name"):
        read_tensors(folder / partial)

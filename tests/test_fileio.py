import io
import json

import pytest

from raylib import fileio
from raylib.errors import UserError
from raylib.fileio import (
    append_jsonl,
    atomic_file,
    atomic_folder,
    file_lock,
    read_jsonl,
    sha256_file,
    stream_json,
    write_json,
)


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


@pytest.mark.parametrize("chunk", [1, 3, 1 << 16])
def test_stream_json_yields_what_json_loads(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(fileio, "CHUNK", chunk)
    values = {"ä": [1, 2.5, None, {"b": "€"}], "n": -1e-3, "list": [{"x": i} for i in range(5)], "none": []}
    text = " " + json.dumps(values, ensure_ascii=False)
    assert dict(stream_json(tmp_path, io.StringIO(text))) == values
    assert [value for _, value in stream_json(tmp_path, io.StringIO(text), "list")] == values["list"]
    assert list(stream_json(tmp_path, io.StringIO(text), "none")) == []
    assert list(stream_json(tmp_path, io.StringIO("[3, 4]"))) == [("0", 3), ("1", 4)]
    for broken, words in (
        ("", "after the beginning: wanted a JSON object or array"),
        ('{"a": 1, "b": tru}', "after key 'a': lexical error"),
        ("[7, 8", "after item 1: parse error: premature EOF"),
    ):
        with pytest.raises(UserError, match=words):
            list(stream_json(tmp_path, io.StringIO(broken)))
    with pytest.raises(UserError, match="no list 'n'"):
        list(stream_json(tmp_path, io.StringIO(text), "n"))

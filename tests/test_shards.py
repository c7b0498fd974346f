import errno
import http.server
import io
import json
import pickle
import subprocess
import sys
import tarfile
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import webdataset

from raylib.data import fetch as fetching
from raylib.data import index as indexing
from raylib.data.index import (
    FORMAT,
    IndexedSample,
    index_path,
    json_path,
    list_samples,
    open_index,
    write_index,
)
from raylib.data.shards import BLOCK_ROWS, ShardWriter, index_folder
from raylib.data.sources import Source
from raylib.data.tars import FolderSummary, TarScan
from raylib.errors import UserError
from raylib.provenance import DataFile, fingerprint_files


class IdsBelow:
    """Stands for a tokenizer where shards are written."""

    def __init__(self, vocabulary):
        self.vocabulary, self.sha256 = vocabulary, f"hash-{vocabulary}"


def members_of(number):
    return {
        "json": json.dumps({"captions": {"en": [f"thing {number}"]}}).encode(),
        "a.png": bytes([number]) * number,
    }


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "pictures"
    with ShardWriter(folder, "image_text", max_samples=4) as writer:
        for number in range(10):
            writer.write(f"sub/k{number}", members_of(number), "en" if number < 9 else "de")
    return folder


def make_rows(count, sides, seed=0, high=60):
    rng = np.random.default_rng(seed)
    rows = [[rng.integers(5, high, rng.integers(1, 9)) for _ in range(sides)] for _ in range(count)]
    return rows if sides == 2 else [row[0] for row in rows]


def test_shards_written_samples_are_read_back(images):
    source = Source(images, "image_text")
    assert (len(source), source.sizes()) == (10, {"de": [1], "en": [4, 4, 1]})
    for number in (8, 0, 5, 3, 4):
        sample = source.sample("en", number)
        assert sample.key == f"sub/k{number}"
        assert {name: sample.read(name) for name in sample.members} == members_of(number)
    assert source.sample("de", 0).key == "sub/k9"
    assert pickle.loads(pickle.dumps(source)).sample("en", 2).read("a.png") == b"\2\2"


def test_shards_are_readable_by_webdataset(images):
    url = str(images / "en-{000000..000002}.tar")
    read = list(webdataset.WebDataset(url, shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [f"sub/k{number}" for number in range(9)]
    for number, sample in enumerate(read):
        assert {name: data for name, data in sample.items() if name[0] != "_"} == members_of(number)


def test_shards_written_by_webdataset_are_readable(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "en-7.tar"), encoder=False) as writer:
        for number in range(6):
            writer.write(
                {"__key__": f"long/{'x' * 90}/v1-{number}", "PNG": b"p" * 600, "txt": b"t", "cls.v2": b"2"}
            )
    manifest = index_folder(tmp_path, "image_text")
    assert manifest["shards"][0]["samples"] == 6 and manifest["shards"][0]["language"] == "en"
    sample = Source(tmp_path).sample("en", 5)
    peer = list(webdataset.WebDataset(str(tmp_path / "en-7.tar"), shardshuffle=False))[5]
    assert sample.key == peer["__key__"]
    assert {name: sample.read(name) for name in sample.members} == {
        k: v for k, v in peer.items() if k[0] != "_"
    }


def test_shards_index_groups_members_as_webdataset_does(tmp_path):
    """Dots, folders, meta members, members without an extension. One key in two places is one sample here
    alone."""
    path = tmp_path / "en.tar"
    names = [
        "a/b.c/x.png",
        "__meta__/y.txt",
        "a/b.c/x.v1.txt",
        "README",
        "k.txt",
        "z.txt",
        "k.png",
        "ü.txt",
        "__m__",
    ]
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("a.folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()[: len(name)]))
    peer = [
        (s["__key__"], {k for k in s if k[0] != "_"})
        for s in webdataset.WebDataset(str(path), shardshuffle=False)
    ]
    assert [peer.pop(i) for i in (3, 1)] == [("k", {"png"}), ("k", {"txt"})]
    found = {key: set(members) for key, members, _ in list_samples(TarScan(path, hashes=False))}
    assert list(found.items()) == [peer[0], ("k", {"txt", "png"}), *peer[1:]]


@pytest.mark.parametrize(("kind", "sides"), [("text", 1), ("parallel", 2)])
@pytest.mark.parametrize("vocabulary", [60, 70_000])
def test_shards_packed_rows_are_read_back(tmp_path, kind, sides, vocabulary):
    rows = {"de": make_rows(BLOCK_ROWS + 50, sides, 1, vocabulary), "ru": make_rows(7, sides, 2, vocabulary)}
    with ShardWriter(tmp_path, kind, IdsBelow(vocabulary), max_samples=BLOCK_ROWS + 20) as writer:
        for language in rows:
            writer.write_rows(language, rows[language][:5])
            writer.write_rows(language, rows[language][5:])
    source = Source(tmp_path, kind, tokenizer=f"hash-{vocabulary}")
    assert {language: source.size(language) for language in rows} == {"de": BLOCK_ROWS + 50, "ru": 7}
    for language, number in [
        ("de", 0),
        ("de", BLOCK_ROWS - 1),
        ("de", BLOCK_ROWS),
        ("de", BLOCK_ROWS + 49),
        ("ru", 6),
    ]:
        got = source.row(language, number)
        expected = rows[language][number] if sides == 2 else [rows[language][number]]
        assert [ids.tolist() for ids in got] == [ids.tolist() for ids in expected]
        assert got[0].dtype == (np.uint16 if vocabulary < 65536 else np.uint32)


def test_shard_writer_failure_keeps_old_source(images):
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    with (
        pytest.raises(RuntimeError, match="stop"),
        ShardWriter(images, "image_text", max_samples=2) as writer,
    ):
        for number in range(5):
            writer.write(f"new{number}", members_of(number))
        raise RuntimeError("stop")
    assert {path.name: path.read_bytes() for path in images.iterdir()} == before
    with ShardWriter(images, "image_text") as writer:
        writer.write("new", members_of(3))
    assert {path.name for path in images.iterdir()} == {
        "manifest.json",
        "en-000000.tar",
        "en-000000.index.bin",
        "en-000000.index.json",
    }


def test_shard_writer_is_deterministic(tmp_path):
    for name in "ab":
        with ShardWriter(tmp_path / name, "text", IdsBelow(60)) as writer:
            writer.write_rows("de", make_rows(20, 1))
    assert (tmp_path / "a/manifest.json").read_bytes() == (tmp_path / "b/manifest.json").read_bytes()


def test_shard_writer_rejects_bad_samples(tmp_path):
    with ShardWriter(tmp_path, "image_text") as writer:
        for key in ("", "v1.2", "__x__", "a/"):
            with pytest.raises(ValueError, match="key"):
                writer.write(key, {"txt": b"x"})
        with pytest.raises(ValueError, match="no members"):
            writer.write("a", {})
        writer.write("a", {"txt": b"x"})
        with pytest.raises(ValueError, match="twice"):
            writer.write("a", {"png": b"x"})
    with pytest.raises(ValueError, match="tokenizer"):
        ShardWriter(tmp_path, "text")
    with pytest.raises(UserError, match="unknown"):
        ShardWriter(tmp_path, "video")
    with ShardWriter(tmp_path / "t", "parallel", IdsBelow(60)) as writer:
        for row in [([5], []), ([5],), ([5], [6], [7])]:
            with pytest.raises(ValueError, match="non-empty"):
                writer.write_rows("de", [row])
        writer.write_rows("de", [([5], [6])])
    with (
        pytest.raises(ValueError, match="outside"),
        ShardWriter(tmp_path / "u", "text", IdsBelow(60)) as writer,
    ):
        writer.write_rows("de", [[5, 60]])
    assert not (tmp_path / "u/manifest.json").exists()


def edit_manifest(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_shards_bad_source_is_one_line_error(images, tmp_path):
    def fails(words, base=images, **options):
        with pytest.raises(UserError, match=words) as error:
            source = Source(base, **options)
            for number in range(9):
                source.sample("en", number)
        assert "\n" not in str(error.value) and str(base) in str(error.value)

    fails("no such file.*makes one", tmp_path)
    fails("'image_text' where 'text' is needed", kind="text")
    shard = images / "en-000001.tar"
    whole = shard.read_bytes()

    shard.write_bytes(whole[:-600])
    fails("bytes, the manifest says")
    shard.unlink()
    fails("in the manifest but not here")
    shard.write_bytes(whole)

    stored = TarScan(shard)
    samples = list_samples(stored)
    write_index(shard, stored.bytes, samples[:-1])
    fails("3 samples, the manifest says 4")
    json_path(shard).write_text("{}")
    fails("not to be read as the index of a shard .no bytes, samples in it.; delete it, and index the folder")
    json_path(shard).unlink()
    assert Source(images).sample("en", 7).key == "sub/k7"  # without an index, it is read from the tar

    edit_manifest(images, lambda manifest: manifest["shards"][1].update(name="../x.tar"))
    fails("no plain file name")
    edit_manifest(images, lambda manifest: manifest["shards"].clear())
    fails("not to be read as a manifest of shards .no shards.; make it anew: ")


def read_all(shard, cache):
    index = open_index(shard, cache)
    return list(map(index.read, range(len(index))))


@pytest.mark.parametrize("has_json", [True, False])
def test_index_that_is_damaged_is_made_anew(images, tmp_path, has_json):
    shard = images / "en-000001.tar"
    if not has_json:
        json_path(shard).unlink()
    before, path = read_all(shard, tmp_path), index_path(shard)
    content = path.read_bytes()
    damaged = {
        "cut in the header": content[:40],
        "cut in the middle": content[: len(content) // 2],
        "cut at the end": content[:-1],
        "longer": content + b"?",
        "other format": content[:8] + (FORMAT + 1).to_bytes(4, "little") + content[12:],
        "damaged header": content[:30] + b"?" + content[31:],
        "damaged table": content[:-80] + bytes(80),
    }
    for name, other in damaged.items():
        path.write_bytes(other)
        assert read_all(shard, tmp_path) == before and path.read_bytes() == content, name
    for foreign in (b"", b"{}", b"\x89HDF" + content):  # which has the name, and may be all that there is
        path.write_bytes(foreign)
        with pytest.raises(UserError, match=f"^{path}: no index of a shard.*; move it, or delete it"):
            Source(images).sample("en", 4)
        assert path.read_bytes() == foreign


def test_index_follows_what_it_was_made_of(images, tmp_path):
    shard = images / "en-000001.tar"
    before, path = read_all(shard, tmp_path), index_path(shard)
    assert before[1].members["a.png"][2] > 0 > before[1].members["json"][2]
    path.unlink()
    assert read_all(shard, tmp_path) == before
    made = path.stat()
    assert read_all(shard, tmp_path) == before and path.stat() == made  # taken as it is
    assert not list(images.glob(".*"))  # no lock stays
    stored = json.loads(json_path(shard).read_text())
    stored["samples"][1][1]["a.png"][2] = 12345  # indexed anew by an earlier version, which had no checksum
    json_path(shard).write_text(json.dumps(stored | {"format": 2, "crc32": None}))
    assert read_all(shard, tmp_path)[1].members["a.png"][2] == 12345
    json_path(shard).unlink()
    assert read_all(shard, tmp_path)[1].key == "sub/k5"
    with tarfile.open(shard, "w") as tar:
        member = tarfile.TarInfo("new.png")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    assert [key for key, _, _ in read_all(shard, tmp_path)] == ["new"]


def test_index_of_a_folder_that_cannot_be_written(images, tmp_path, monkeypatch):
    """It lies in the cache; where that cannot be written either, each process has its own."""
    shard, cache, closed = images / "en-000001.tar", tmp_path / "cache", [images]
    before = read_all(shard, cache)
    index_path(shard).unlink()

    def lock(path, lock=indexing.file_lock):
        if path.parent in closed:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return lock(path)

    monkeypatch.setattr(indexing, "file_lock", lock)
    for _ in range(2):
        assert read_all(shard, cache) == before
        (copy,) = cache.iterdir()
        assert copy.name == "en-000001.index.bin" and not index_path(shard).exists()
        copy.write_bytes(copy.read_bytes()[:-1])
    closed.append(cache)
    copy.unlink()
    assert read_all(shard, cache) == before and not list(cache.iterdir())


def test_index_is_no_part_of_a_run_s_identity(images):
    def identity():
        return fingerprint_files([DataFile(images)], {})

    for path in images.glob("*.index.bin"):
        path.unlink()
    before = identity()
    assert Source(images).sample("en", 5).key == "sub/k5" and len(list(images.glob("*.index.bin"))) == 1
    assert identity() == before


def test_index_of_ten_thousand_samples_makes_those_asked_for(tmp_path):
    shard = tmp_path / "en-0.tar"
    places = ({"jpg": [512 * i, i, 7 * i], "txt": [512 * i + 256, 9]} for i in range(10_000))
    samples = [IndexedSample(f"{i:09d}", members, 1) for i, members in enumerate(places)]
    write_index(shard, 1 << 30, samples)
    tracemalloc.start()
    index = open_index(shard, tmp_path)
    assert index.read(9_999).key == "000009999" and index.read(0).members["jpg"] == (0, 0, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * index_path(shard).stat().st_size  # six times as much where all samples are made
    assert index.rows == len(index) == 10_000 and index.shard_bytes == 1 << 30


def test_index_is_made_once_by_several_processes(images, tmp_path):
    shard = images / "en-000001.tar"
    index_path(shard).unlink()
    code = f"""
from pathlib import Path
from raylib.data import index
convert = index._convert
def converted(shard):
    with open({str(tmp_path / "log")!r}, "a") as log:
        log.write("x")
    return convert(shard)
index._convert = converted
print(len(index.open_index(Path({str(shard)!r}), Path({str(tmp_path)!r}))))
"""
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(3)]
    assert [process.communicate(timeout=120)[0] for process in running] == [b"4\n"] * 3
    assert (tmp_path / "log").read_text() == "x"


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_index_folder_is_the_same_for_any_number_of_workers(images, workers, monkeypatch):
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    for path in (*images.glob("*.index.*"), images / "manifest.json"):
        path.unlink()
    monkeypatch.setattr("raylib.data.shards.SERIAL_BYTES", 0)
    summary = FolderSummary()
    manifest = index_folder(images, "image_text", "mul", summary, workers)
    assert [shard["name"] for shard in manifest["shards"]] == sorted(n for n in before if n[-4:] == ".tar")
    assert {p.name: p.read_bytes() for p in images.glob("*.json")}.items() <= {
        **before,
        "manifest.json": (images / "manifest.json").read_bytes(),
    }.items()
    assert {p.name for p in images.iterdir()} == before.keys()
    assert summary.extension_sets == {frozenset(members_of(0)): 10}
    for name in ("en-000001.tar", "en-000002.tar"):  # of several that are damaged, the first is named
        (images / name).write_bytes(before[name][:700])
    with pytest.raises(UserError, match="en-000001.tar: .*(truncated|damaged)"):
        index_folder(images, "image_text", "mul", workers=workers)


def test_shards_language_without_samples_or_other_tokenizer_is_refused(tmp_path):
    with ShardWriter(tmp_path, "text", IdsBelow(60)) as writer:
        writer.write_rows("de", make_rows(3, 1))
    with pytest.raises(UserError, match="another tokenizer"):
        Source(tmp_path, "text", tokenizer="other")
    edit_manifest(tmp_path, lambda manifest: manifest["shards"][0].update(samples=0))
    with pytest.raises(UserError, match="'de' has no samples"):
        Source(tmp_path)


def test_shards_damaged_tar_is_refused(images, tmp_path):
    whole = (images / "en-000000.tar").read_bytes()
    second = open_index(images / "en-000000.tar", tmp_path).read(1).members["json"][0]
    (tmp_path / "bad").mkdir()
    path = tmp_path / "bad/en-0.tar"
    cases = {
        "no uncompressed tar": [b"", b"x" * 2000, b"\x1f\x8b" + bytes(1000)],
        "truncated|damaged": [whole[: second + 100], whole[: second + 3], whole[: second - 500]],
        # a damaged header in the middle: webdataset ends there and says nothing
        "damaged": [whole[: second - 500] + b"?" * 40 + whole[second - 460 :]],
    }
    for words, contents in cases.items():
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(UserError, match=words) as error:
                index_folder(tmp_path / "bad", "image_text")
            assert "\n" not in str(error.value) and "en-0.tar" in str(error.value)
    assert len(list(webdataset.WebDataset(str(path), shardshuffle=False))) == 1
    assert not (tmp_path / "bad/manifest.json").exists()


def test_shards_damaged_block_of_text_is_named(tmp_path):
    with ShardWriter(tmp_path, "text", IdsBelow(60)) as writer:
        writer.write_rows("de", [[5, 6], [7]])
    shard = tmp_path / "de-000000.tar"
    data = shard.read_bytes()
    ends = np.array([2, 3], np.uint32).tobytes()
    shard.write_bytes(data.replace(ends, np.array([2, 9], np.uint32).tobytes()))
    with pytest.raises(UserError, match="block 0 is damaged"):
        Source(tmp_path).row("de", 0)


def test_shards_command_writes_manifest(images):
    (images / "manifest.json").unlink()
    command = [sys.executable, "-m", "raylib.data.shards"]
    completed = subprocess.run([*command, images, "image_text"], capture_output=True, text=True, check=True)
    assert "4 shards, 10 samples" in completed.stdout and not completed.stderr
    assert len(Source(images)) == 10
    failed = subprocess.run(
        [*command, images / "none", "image_text"], capture_output=True, text=True, check=False
    )
    assert failed.returncode == 2 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1


@pytest.mark.parametrize("scheme", ["file://{folder}", "pipe:cat '{folder}'/{{name}}"])
def test_shards_remote_source_is_cached(images, tmp_path, scheme):
    base = scheme.format(folder=images)
    source = Source(base, cache=tmp_path / "cache")
    assert source.sample("en", 5).read("a.png") == b"\5" * 5
    folder = fetching.cache_folder(base, tmp_path / "cache")
    cached = sorted(path.name for path in folder.iterdir() if path.name[0] != ".")
    assert [name.partition("-")[2] for name in cached] == ["en-000001.index.bin", "en-000001.tar", ""]
    (images / "en-000001.tar").unlink()  # from here on it comes from the cache
    assert Source(base, cache=tmp_path / "cache").sample("en", 6).key == "sub/k6"

    shard = images / "en-000000.tar"
    whole = shard.read_bytes()
    for content, words in [(whole[:-1], "manifest says"), (whole.replace(b"thing 1", b"thing 2"), "SHA-256")]:
        shard.write_bytes(content)
        with pytest.raises(UserError, match=words):
            source.sample("en", 0)
    shard.unlink()
    with pytest.raises(UserError, match="could not fetch|exit status"):
        source.sample("en", 0)
    assert not [
        path for path in folder.iterdir() if "en-000000" in path.name and not path.name.endswith(".lock")
    ]


def test_shards_bad_remote_base_is_named(tmp_path, monkeypatch):
    import fsspec

    def missing(*_, **__):
        raise ImportError("Install s3fs to access S3")

    for base, words in [("nope://x", "could not fetch"), ("pipe:cat", "must hold {name}")]:
        with pytest.raises(UserError, match=words):
            Source(base, cache=tmp_path)
    monkeypatch.setattr(fsspec, "open", missing)
    with pytest.raises(UserError, match="Install s3fs"):
        Source("s3://bucket/folder", cache=tmp_path)


def test_shards_transfer_that_breaks_off_is_one_line_error(tmp_path):
    """The library of HTTP raises an exception of its own."""

    class HalfAFile(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"1" * 500)

        do_HEAD = do_GET

        def log_message(self, *_): ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), HalfAFile) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(UserError, match=f"^{base}: could not fetch x.tar: "):
            fetching.fetch(base, "x.tar", tmp_path)
        server.shutdown()
    assert not list(tmp_path.rglob("*.tar"))


def test_shards_concurrent_fetches_download_once(images, tmp_path):
    base, log = f"pipe:echo x >> {tmp_path}/log; sleep 0.1; cat {images}/{{name}}", tmp_path / "log"
    entry = next(
        s for s in json.loads((images / "manifest.json").read_text())["shards"] if s["language"] == "de"
    )
    arguments = [base, entry["name"], str(tmp_path), entry["bytes"], entry["sha256"]]
    code = f"from raylib.data.fetch import fetch; fetch(*{arguments!r})"
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    assert log.read_text() == "x\n"
    (cached,) = Path(fetching.cache_folder(base, tmp_path)).glob("*.tar")
    assert cached.stat().st_size == entry["bytes"]


def test_shards_rewritten_source_is_fetched_again(tmp_path):
    """Tars are padded: the old shard in the cache has the size of the new one."""
    for word in (b"old", b"new"):
        with ShardWriter(tmp_path / "source", "image_text") as writer:
            writer.write("k", {"txt": word})
        assert (
            Source(f"file://{tmp_path}/source", cache=tmp_path / "cache").sample("en", 0).read("txt") == word
        )

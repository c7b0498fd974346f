"""Tars, manifests, indexes, packed rows and cached states that are damaged, foreign or hostile: one line,
little memory, nothing outside the folder."""

import io
import json
import random
import struct
import tarfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.batches import StepBatches
from pretrain.config import DataConfig, StreamConfig
from raylib.cache import EncoderStates, write_encoder_states
from raylib.data.fetch import cache_folder, fetch
from raylib.data.index import (
    HEADER,
    MAGIC,
    ShardIndex,
    _checksum,
    _samples_checksum,
    encode_index,
    index_path,
    json_path,
    list_samples,
    read_npy_header,
    write_index,
)
from raylib.data.shards import ShardWriter, index_folder, to_npy
from raylib.data.sources import Source
from raylib.data.tars import TarScan
from raylib.errors import UserError
from raylib.packed import Ragged
from raylib.text import BadCaption

MB = 1 << 20


class IdsBelow100:
    vocabulary, sha256 = 100, "0" * 64


def fails(read, *words):
    """Check that `read()` is one line with `words`, in little time and memory."""
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(UserError) as error:
            read()
        assert tracemalloc.get_traced_memory()[1] < 64 * MB and time.process_time() - began < 5
    finally:
        tracemalloc.stop()
    line = str(error.value)
    assert len(line.splitlines()) == 1 and all(word in line for word in words), line
    return line


def header(name, size=b"", kind=tarfile.REGTYPE):
    """A tar's header whose field of the size is `size`, as it stands."""
    member = tarfile.TarInfo(name)
    member.type = kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT)[:512])
    block[124:136] = (size if isinstance(size, bytes) else b"%011o" % size).ljust(12, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def extended(kind, data, size=None):
    """A header of a long name or of PAX records, with its data."""
    return header("x", len(data) if size is None else size, kind) + data + bytes(-len(data) % 512)


def pax(**records):
    """A PAX header, whose records begin with their length, in decimal."""
    data = b""
    for name, value in records.items():
        body, length = f" {name}={value}\n".encode(), 0
        while length != len(str(length)) + len(body):
            length = len(str(length)) + len(body)
        data += str(length).encode() + body
    return extended(tarfile.XHDTYPE, data)


FILE = header("a.jpg", 3) + b"abc" + bytes(509)
BASE_256 = {
    n: (b"\x80" if n >= 0 else b"\xff") + n.to_bytes(11, "big", signed=True) for n in (1 << 63, -512, -1)
}
TARS = {
    "long names in one another": extended(tarfile.GNUTYPE_LONGNAME, b"b.jpg\0") * 2000 + FILE,
    "PAX headers in one another": pax(comment="x") * 2000 + FILE,
    "a name of gigabytes": FILE + extended(tarfile.GNUTYPE_LONGNAME, b"", 8 << 30),
    "PAX records of gigabytes": FILE + extended(tarfile.XHDTYPE, b"", 8 << 30),
    "a name of less than nothing": FILE + extended(tarfile.GNUTYPE_LONGNAME, b"", BASE_256[-512]),
    "a file of 8 EiB": FILE + header("b.jpg", BASE_256[1 << 63]),
    "a file of less than nothing": FILE + header("b", BASE_256[-512]) + FILE,
    "a PAX size of less than nothing": pax(size="-1024") + FILE,
    "a PAX size of 5,000 digits": pax(size="9" * 5000) + FILE,
    "a PAX size of 8 EiB": FILE + pax(size=str(1 << 63)) + FILE,
    "many global records": extended(tarfile.XGLTYPE, b"9 a=bcde\n" * 14_000) * 10 + FILE,
    "a sparse map that never ends": FILE + pax(**{"GNU.sparse.major": 1, "GNU.sparse.minor": 0}) + FILE,
    "an old sparse map": FILE + header("b.jpg", 3, tarfile.GNUTYPE_SPARSE) + bytes(1024),
}


@pytest.mark.parametrize("what", TARS)
def test_scan_tar_of_hostile_headers_is_one_line(tmp_path, what):
    path = tmp_path / "0.tar"
    path.write_bytes(TARS[what])
    if "gigabytes" in what:  # that are there
        with open(path, "ab") as file:
            file.truncate(9 << 30)
    fails(lambda: TarScan(path), str(path))
    fails(lambda: index_folder(tmp_path, "image_text"), str(path))


def test_scan_tar_keeps_what_is_no_damage(tmp_path):
    """A long name, records of PAX and a global header, as `git archive` and bsdtar write them."""
    name = "folder/" + "n" * 200
    chain = extended(tarfile.XGLTYPE, b"13 comment=x\n") + pax(mtime="1.5")
    data = chain + extended(tarfile.GNUTYPE_LONGNAME, f"{name}.jpg\0".encode()) + FILE
    (tmp_path / "0.tar").write_bytes(data + bytes(1024))
    assert list(TarScan(tmp_path / "0.tar").samples) == [name]


def test_compressed_tars_say_so(tmp_path):
    import gzip
    import lzma

    whole = FILE + bytes(1024)
    for name, data in {"gzip": gzip.compress(whole), "xz": lzma.compress(whole), "": b""}.items():
        (tmp_path / "0.tar").write_bytes(data)
        fails(lambda: index_folder(tmp_path, "image_text"), "0.tar: no uncompressed tar", name)


@pytest.fixture
def images(tmp_path):
    with ShardWriter(tmp_path / "images", "image_text", max_samples=3) as writer:
        writer.images = {"png"}
        for number in range(6):
            captions = json.dumps({"captions": {"en": [f"thing {number}"]}}).encode()
            writer.write(f"k{number}", {"json": captions, "png": bytes([number]) * 700})
    return tmp_path / "images"


@pytest.fixture
def packed(tmp_path):
    with ShardWriter(tmp_path / "packed", "parallel", IdsBelow100()) as writer:
        writer.write_rows("de", [([i + 1], [i + 1, i + 2]) for i in range(8)])
    return tmp_path / "packed"


def read_all(folder, kind=None):
    source = Source(folder, kind)
    for language in source.groups:
        for number in range(source.size(language)):
            if source.kind != "image_text":
                source.row(language, number)
                continue
            sample = source.sample(language, number)
            for extension in sample.members:
                sample.read(extension)


MANIFESTS = {
    "no object": [],
    "no shards": {"shards": []},
    "shards of another type": {"shards": {"a": 1}},
    "a shard of another type": {"shards": [3]},
    "a kind of another type": {"kind": ["image_text"]},
    "another format": {"format": 2},
    "images of another type": {"images": [{"png": 1}]},
    "a tokenizer of another type": {"tokenizer": 3},
}
SHARDS = {
    "name": ["../x.tar", "/etc/x.tar", "..", "a/b.tar", ".tar", "-o.tar", "x", "a\n.tar", "a\0.tar", 3, None],
    "sha256": ["../../../../../../tmp/evil", "", None, "G" * 64, 3],
    "samples": [-1, 1.0, True, "3", None, 1 << 70],
    "bytes": [-1, 1.0, True, "3", None, 1 << 70, 0],
    "language": [3, None, "../de", ["en"]],
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_manifest_of_another_shape_is_one_line(images, what):
    path = images / "manifest.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | MANIFESTS[what] if isinstance(MANIFESTS[what], dict) else []))
    fails(lambda: read_all(images), str(path), "make it anew: python -m raylib.data.shards")


@pytest.mark.parametrize("field", SHARDS)
def test_manifest_with_a_foreign_shard_is_one_line(images, field):
    path = images / "manifest.json"
    whole = path.read_text()
    for value in SHARDS[field]:
        values = json.loads(whole)
        values["shards"][0][field] = value
        path.write_text(json.dumps(values))
        fails(lambda: read_all(images), str(images))
    values["shards"][0] = values["shards"][1]
    path.write_text(json.dumps(values))
    fails(lambda: read_all(images), "a shard occurs twice")


def test_manifest_that_is_no_json_is_one_line(images):
    path = images / "manifest.json"
    for data, words in (
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git-lfs"),
        (b"<!DOCTYPE html><html>", "web page"),
        (bytes(3000), "zero"),
        (path.read_bytes()[:100], "Unterminated"),
        (b"[" * 100_000, ""),
    ):
        path.write_bytes(data)
        fails(lambda: read_all(images), str(path), words)


def test_old_manifest_deletes_nothing_elsewhere(images, tmp_path):
    """What a source is written over is deleted by its manifest's names."""
    other = tmp_path / "other.tar"
    other.write_bytes(b"x")
    path = images / "manifest.json"
    values = json.loads(path.read_text())
    values["shards"][0]["name"] = "../other.tar"
    path.write_text(json.dumps(values))

    def write():
        with ShardWriter(images, "image_text") as writer:
            writer.write("k", {"json": b"{}"})

    fails(write, str(path), "no plain file name")
    for damaged in ("{", '{"shards": [3]}', '{"shards": 3}', '{"shards": [{"name": 3}]}'):
        path.write_text(damaged)
        fails(write, str(path), "delete it, or write into another folder")
    assert other.read_bytes() == b"x" and len(list(images.glob("*.tar"))) == 2


def test_remote_manifest_writes_nothing_outside_the_cache(images, tmp_path):
    path, cache = images / "manifest.json", tmp_path / "cache/deep/er"
    values = json.loads(path.read_text())
    values["shards"][0]["sha256"] = "../../x"
    path.write_text(json.dumps(values))
    before = sorted(p for p in tmp_path.rglob("*") if cache not in p.parents)
    fails(
        lambda: Source(f"file://{images}", cache=cache).sample("en", 0), "shards.0.sha256: ", "not '../../x'"
    )
    after = sorted(p for p in tmp_path.rglob("*") if cache not in p.parents and p not in cache.parents)
    assert [p for p in after if p not in before and p != cache] == []


def test_remote_file_that_never_ends_is_cut_off(tmp_path):
    (tmp_path / "x.tar").write_bytes(bytes(3 * MB))
    for base in ("pipe:yes {name}", f"file://{tmp_path}"):
        fails(lambda base=base: fetch(base, "x.tar", tmp_path, 5000, "0" * 64), "more than 5000 bytes came")
        assert not [p for p in cache_folder(base, tmp_path).iterdir() if p.suffix != ".lock"]


def change_index(folder, change, checksum=True):
    """Write the JSON of a folder's first index anew, with a right checksum or without."""
    path = json_path(min(folder.glob("*.tar")))
    values = json.loads(path.read_text())
    change(values)
    if checksum:
        values["crc32"] = _samples_checksum(values["samples"])
    path.write_text(json.dumps(values))
    return path


INDEXES = {
    "an offset of less than nothing": lambda v: v["samples"][0][1]["json"].__setitem__(0, -512),
    "an offset outside": lambda v: v["samples"][0][1]["json"].__setitem__(0, 1 << 40),
    "a size outside": lambda v: v["samples"][0][1]["json"].__setitem__(1, 1 << 62),
    "an offset that is no number": lambda v: v["samples"][0][1]["json"].__setitem__(0, "512"),
    "an offset that is a float": lambda v: v["samples"][0][1]["json"].__setitem__(0, 512.0),
    "an offset of another member": lambda v: v["samples"][0][1]["json"].__setitem__(0, 513),
    "members that overlap": lambda v: v["samples"][0][1]["json"].__setitem__(1, 1200),
    "a place too long": lambda v: v["samples"][0][1]["json"].extend([1, 2]),
    "a sample too short": lambda v: v["samples"][0].pop(),
    "a key that is no text": lambda v: v["samples"][0].__setitem__(0, 3),
    "rows of less than nothing": lambda v: v["samples"][0].__setitem__(2, -1),
    "rows past all counts": lambda v: v["samples"][0].__setitem__(2, 1 << 60),
    "one sample fewer": lambda v: v["samples"].pop(),
    "bytes of another shard": lambda v: v.__setitem__("bytes", v["bytes"] + 512),
    "bytes that are no number": lambda v: v.__setitem__("bytes", "3"),
    "samples that are no list": lambda v: v.__setitem__("samples", {}),
    "another format": lambda v: v.__setitem__("format", 9),
}


@pytest.mark.parametrize("what", INDEXES)
def test_index_of_hostile_numbers_is_one_line(images, what):
    """Its checksum right: of what no chance makes."""
    path = change_index(images, INDEXES[what])
    line = fails(lambda: read_all(images), "index the folder anew")
    assert str(path) in line or str(path).replace(".index.json", ".tar") in line


def test_index_with_a_wrong_digit_is_one_line(images):
    """Of a hash or a key too, which nothing but the checksum tells."""
    for change in (
        lambda v: v["samples"][0][1]["png"].__setitem__(2, 5),
        lambda v: v["samples"][0].__setitem__(0, "k8"),
    ):
        whole = json_path(min(images.glob("*.tar"))).read_bytes()
        path = change_index(images, change, checksum=False)
        fails(lambda: read_all(images), str(path), "its checksum is another")
        path.write_bytes(whole)


def test_index_without_a_checksum_is_compared_with_its_tar(images):
    """Of an earlier version."""

    def old(values):
        values["format"] = 2
        del values["crc32"]

    change_index(images, old, checksum=False)
    read_all(images)
    path = change_index(images, lambda v: v["samples"][1].__setitem__(0, "k8"), checksum=False)
    fails(lambda: read_all(images), str(path), "its places are not those of the tar beside it")


def test_index_of_another_tar_is_named(images):
    """Of as many bytes and samples: the two shards' indexes change places."""
    first, second = sorted(images.glob("*.tar"))
    scan = TarScan(second)
    samples = [
        (key, {k: [p[0] + 512, *p[1:]] for k, p in m.items()}, rows) for key, m, rows in list_samples(scan)
    ]
    write_index(first, scan.bytes, samples)
    fails(lambda: read_all(images), str(first), "does not lie where its index says", "index the folder anew")


def test_mapped_index_of_hostile_numbers_is_one_line(images):
    """Any number in place of any other, and the checksum right: a line, or a sample of bytes of the shard."""
    shard = min(images.glob("*.tar"))
    whole = index_path(shard).read_bytes()
    draw, refused = random.Random(0), 0
    for _ in range(400):
        content = bytearray(whole)
        size, form = draw.choice([(4, "<I"), (8, "<Q")])
        at = draw.randrange(16, len(content) - size)
        content[at : at + size] = struct.pack(
            form, draw.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]) % 2 ** (8 * size)
        )
        content[12:16] = _checksum(bytes(content)).to_bytes(4, "little")
        try:
            index = ShardIndex(bytes(content), shard)
            for number in range(len(index)):
                for offset, length, _ in index.read(number).members.values():
                    assert 0 <= offset and 0 <= length and offset + length <= index.shard_bytes
            index.first_rows()
        except (ValueError, UserError):
            refused += 1
    assert refused > 200
    header_of = HEADER.pack(MAGIC, 2, 0, 0, 1, 2**64 - 1, 2**63, 0, 1, 1)
    with pytest.raises(ValueError, match="bytes"):
        ShardIndex(header_of, shard)
    assert encode_index(5, [("k", {"a": [0, 5]}, 1)], 0)


NPY = {
    "another type": to_npy(np.ones(24, np.float32)),
    "objects": b"\x93NUMPY\x01\x00v\x00"
    + b"{'descr': '|O', 'fortran_order': False, 'shape': (24,), }".ljust(117)
    + b"\n",
    "a shape of terabytes": to_npy(np.ones(24, np.uint16)).replace(b"(24,)", b"(99999999999,)"),
    "a shape of less than nothing": to_npy(np.ones(24, np.uint16)).replace(b"(24,), } ", b"(-24,), }"),
    "a header of brackets": b"\x93NUMPY\x01\x00\xe8\x03" + b"(" * 1000,
    "no array": b"x" * 200,
    "nothing": b"",
}


@pytest.mark.parametrize("what", NPY)
def test_packed_array_of_another_kind_is_refused(what):
    data = NPY[what]
    with pytest.raises(ValueError, match="."):
        read_npy_header(data[:4096], len(data))
    assert read_npy_header(to_npy(np.ones((3, 2), np.uint32)), len(to_npy(np.ones((3, 2), np.uint32))))[
        1
    ] == (3, 2)


def rewrite_packed(folder, ids, ends):
    """A shard of these members, with a manifest of its own."""
    (shard,) = folder.glob("*.tar")
    with tarfile.open(shard, "w") as tar:
        for name, data in (("0.ids.npy", ids), ("0.ends.npy", ends)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    index_folder(folder, "parallel")


@pytest.mark.parametrize(
    ("ids", "ends"),
    [
        (np.arange(4, dtype=np.uint16), np.array([[1, 2]], np.uint32)),  # fewer ends than ids
        (np.arange(2, dtype=np.uint16), np.array([[2, 1]], np.uint32)),
        (np.arange(2, dtype=np.uint16), np.array([[-1, 2]], np.int64)),
        (np.arange(2, dtype=np.uint16), np.array([1, 2], np.uint32)),
        (np.arange(2, dtype=np.uint16), np.array([[1, 2**63]], np.uint64)),
        (np.ones(2, np.float16), np.array([[1, 2]], np.uint32)),
    ],
)
def test_packed_block_whose_ends_do_not_fit_is_named(packed, ids, ends):
    rewrite_packed(packed, to_npy(ids), to_npy(ends))
    fails(lambda: read_all(packed), str(packed), "block 0 is damaged", "pack it anew")


def test_packed_ends_that_are_no_array_are_named(packed):
    for ends in (b"x" * 99, b"", to_npy(np.array(3, np.uint32))):
        fails(
            lambda ends=ends: rewrite_packed(packed, to_npy(np.arange(2, dtype=np.uint16)), ends),
            "de-000000.tar: sample 0: not to be read as ends.npy",
        )


def test_id_outside_of_the_vocabulary_is_named(tmp_path, corpus):
    """A bit that is another on the disk: the model would be asked for a row that it has not."""

    class Large:
        vocabulary = 60_000
        sha256 = json.loads((corpus / "text/manifest.json").read_text())["tokenizer"]

    with ShardWriter(tmp_path / "text", "text", Large()) as writer:
        writer.write_rows("en", [[5, 59_000 if i == 3 else 6] for i in range(8)])
    stream = StreamConfig(folder=str(tmp_path / "text"), batch=8, lanes=1)
    batches = StepBatches(DataConfig(tokenizer=str(corpus / "tokenizer.model"), text=stream), 32, 0)
    fails(lambda: batches[0], str(tmp_path / "text"), "id 59000", "data.verify=true")


def large_member(folder, name, size):
    """A sample whose member `name` has so many bytes, which take no room."""
    folder.mkdir()
    with open(folder / "en-0.tar", "wb") as file:
        file.write(header(name, size))
        file.truncate(512 + size)
    index_folder(folder, "image_text")
    return Source(folder).sample("en", 0)


def test_text_of_a_gigabyte_is_not_read(tmp_path):
    for name in ("k.json", "k.txt"):
        sample = large_member(tmp_path / name, name, 1 << 30)
        tracemalloc.start()
        with pytest.raises(BadCaption, match=r"a \.(json|txt) of 1,073,741,824 bytes, of which"):
            sample.captions()
        assert tracemalloc.get_traced_memory()[1] < MB
        tracemalloc.stop()


def test_image_of_a_gigabyte_is_not_read(tmp_path):
    tracemalloc.start()
    sample = large_member(tmp_path / "x", "k.png", 1 << 30)
    assert tracemalloc.get_traced_memory()[1] < 16 * MB
    tracemalloc.stop()
    fails(lambda: sample.read("png"), "its png has 1,073,741,824 bytes")


def test_captions_of_hostile_json_are_counted_in_one_line(tmp_path):
    with ShardWriter(tmp_path / "x", "image_text") as writer:
        writer.images = {"png"}
        for number, data in enumerate(
            (
                b"[" * 100_000,
                b'{"captions": ' + b"9" * 5000 + b"}",
                b'{"captions": {"\\n\\u001b[2J": "x"}}',
                b"\xff",
            )
        ):
            writer.write(f"k{number}\x1b[31m", {"json": data, "png": b"x"})
    source = Source(tmp_path / "x")
    for number in range(source.size("en")):
        sample = source.sample("en", number)
        with pytest.raises(BadCaption) as error:
            sample.captions_in("en")
        line = sample.describe(error.value)
        assert line.isprintable() and "\x1b" not in line and len(line) < 600


@pytest.fixture
def states(tmp_path):
    lengths = torch.tensor([1, 2, 3])
    write_encoder_states(
        tmp_path / "states",
        ["a", "b", "c"],
        lambda names: names,
        lambda _: Ragged(torch.rand(6, 4), lengths),
        3,
    )
    return tmp_path / "states"


STATES = {
    "no object": [],
    "no rows": {"rows": None},
    "rows that are a list": {"rows": []},
    "a row that is no list": {"rows": {"a": 3}},
    "a row of texts": {"rows": {"a": ["0", "1"]}},
    "a row outside": {"rows": {"a": [3, 4]}},
    "a row before": {"rows": {"a": [-1, 2]}},
    "a row of nothing": {"rows": {"a": [0, 0]}},
    "a dtype of another kind": {"dtype": "object"},
    "a dtype of another type": {"dtype": ["float32"]},
    "a width of gigabytes": {"width": 1 << 40},
    "tokens of less than nothing": {"tokens": -6},
    "faults of another type": {"faults": {"a": 3}},
}


@pytest.mark.parametrize("what", STATES)
def test_cached_states_of_another_shape_are_one_line(states, what):
    path = states / "index-0.json"
    change = STATES[what]
    path.write_text(json.dumps(json.loads(path.read_text()) | change if isinstance(change, dict) else change))
    fails(lambda: EncoderStates(states), str(path), f"delete {states}, they are made again")


def test_cached_states_that_are_not_whole_are_one_line(states):
    file = states / "states-0.bin"
    whole = file.read_bytes()
    for data in (whole[:-4], b"", whole + bytes(16), b"version https://git-lfs"):
        file.write_bytes(data)
        fails(lambda: EncoderStates(states), "states-0.bin has", f"delete {states}")
    file.write_bytes(whole)
    fails(lambda: EncoderStates(states).read(["z"]), "no states of z", f"delete {states}")
    (states / "index-0.json").rename(states / "index-1.json")
    fails(lambda: EncoderStates(states), "index-0.json")
    assert Path(states).is_dir()

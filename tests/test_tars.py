"""Indexing tars of every writer. Every member and byte is accounted for, or refused."""

import hashlib
import io
import os
import subprocess
import tarfile

import pytest

from raylib.data.index import list_samples, open_index
from raylib.data.shards import index_folder
from raylib.data.sources import Source
from raylib.data.tars import TarScan
from raylib.errors import UserError
from raylib.randomness import string_key

SAMPLES = 60


@pytest.fixture
def folder(tmp_path):
    """KEY.jpg and KEY.txt of sixty samples."""
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(SAMPLES):
        (folder / f"{number:06d}.jpg").write_bytes(b"\xff\xd8" + bytes([number]) * (number + 1))
        (folder / f"{number:06d}.txt").write_text(f"thing {number}")
    return folder


def gnu_tar(folder, path, *arguments):
    """Run `tar cf path -C folder arguments`."""
    subprocess.run(["tar", "-c", "-f", path, "-C", folder, *map(str, arguments)], check=True)
    return path


def pack(path, members, **options):
    """A tar of (name, bytes) by Python's tarfile; a TarInfo stands for itself."""
    with tarfile.open(path, "w", **options) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def link(name, target, kind=tarfile.LNKTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def contents(path):
    """{key: {extension: bytes}} as training reads it: by offset."""
    data = path.read_bytes()
    return {
        key: {extension: data[place[0] : place[0] + place[1]] for extension, place in members.items()}
        for key, members in TarScan(path).samples.items()
    }


def files_of(folder):
    return {
        f"{number:06d}": {
            ending: (folder / f"{number:06d}.{ending}").read_bytes() for ending in ("jpg", "txt")
        }
        for number in range(SAMPLES)
    }


def test_scan_tar_joins_members_that_lie_apart(folder, tmp_path):
    names = sorted(os.listdir(folder), key=lambda name: name[::-1])  # all .jpg, then all .txt
    path = gnu_tar(folder, tmp_path / "0.tar", *names)
    assert contents(path) == files_of(folder)
    assert TarScan(path).notes == {"samples whose members lie apart, joined by their key": SAMPLES}
    assert index_folder(tmp_path, "image_text")["shards"][0]["samples"] == SAMPLES
    assert Source(tmp_path).sample("en", 7).key in files_of(folder)


@pytest.mark.parametrize(
    "arguments",
    [
        (".",),
        ("-b", "1", "."),
        ("-b", "127", "."),
        ("--format=pax", "."),
        ("--format=v7", "."),
        ("--format=oldgnu", "."),
    ],
)
def test_scan_tar_reads_gnu_tars_of_a_folder(folder, tmp_path, arguments):
    path = gnu_tar(folder, tmp_path / "0.tar", *arguments)
    assert contents(path) == files_of(folder)
    assert TarScan(path).skipped == {"directories": 1}


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_scan_tar_reads_long_and_foreign_names(tmp_path, form):
    nfd, nfc = (f"{'f' * 120}/{'g' * 120}/{letter}" for letter in ("e\u0301", "\u00e9"))
    path = pack(tmp_path / "0.tar", [(f"{nfd}.JPG", b"jpeg"), (f"{nfc}.txt", b"text")], format=form)
    ((key, members),) = contents(path).items()  # one sample, although one name is NFC and one NFD
    assert key == nfc and members == {"jpg": b"jpeg", "txt": b"text"}


def test_scan_tar_escapes_names_that_are_not_utf8(tmp_path):
    pack(
        tmp_path / "0.tar",
        [("caf\udce9.jpg", b"jpeg"), ("caf\udce9.txt", b"text")],
        format=tarfile.GNU_FORMAT,
    )
    index_folder(tmp_path, "image_text")
    assert Source(tmp_path).sample("en", 0).key == r"caf\xe9"


def test_scan_tar_reports_what_it_skips(tmp_path):
    special, directory = tarfile.TarInfo("pipe.jpg"), tarfile.TarInfo("d.jpg")
    special.type, directory.type = tarfile.FIFOTYPE, tarfile.DIRTYPE
    members = [
        directory,
        special,
        ("d/1.jpg", b"jpeg"),
        ("d/._1.jpg", b"Mac OS X"),
        ("d/1.txt", b"a dog"),
        (".DS_Store", b"x"),
        ("README", b"x"),
        ("ends.", b"x"),
        ("__meta__/info.json", b"{}"),
        ("d/2.jpg", b""),
        ("d/2.txt", b"a cat"),
    ]
    scan = TarScan(pack(tmp_path / "0.tar", members))
    assert list(scan.samples) == ["d/1", "d/2"] and set(scan.samples["d/1"]) == {"jpg", "txt"}
    assert scan.skipped == {
        "directories": 1,
        "special files": 1,
        "hidden files": 2,
        "files without an extension": 2,
        "__meta__ members": 1,
    }
    assert scan.notes == {"members of zero bytes": 1}
    assert scan.skipped.total() + sum(map(len, scan.samples.values())) == len(members)


def test_scan_tar_resolves_links(folder, tmp_path):
    os.link(folder / "000003.jpg", folder / "100000.jpg")
    (folder / "100000.txt").symlink_to("000004.txt")
    (folder / "100001.txt").symlink_to("100000.txt")
    os.link(folder / "000003.jpg", folder / "100001.jpg")
    path = gnu_tar(folder, tmp_path / "0.tar", "--sort=name", ".")
    with tarfile.open(path) as tar:
        assert sum(member.islnk() for member in tar) == 2  # or it is no test
    found, expected = contents(path), files_of(folder)
    linked = {"jpg": expected["000003"]["jpg"], "txt": expected["000004"]["txt"]}
    assert found == expected | {"100000": linked, "100001": linked}
    assert set(TarScan(path).notes.values()) == {2}
    index_folder(tmp_path, "image_text")
    source = Source(tmp_path)
    samples = {sample.key: sample for sample in (source.sample("en", n) for n in range(SAMPLES + 2))}
    assert samples["100000"].identity == samples["000003"].identity != samples["000004"].identity


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (
            [("1.txt", b"x"), link("1.jpg", "elsewhere.jpg")],
            "'1.jpg' is a link to 'elsewhere.jpg'.*--hard-dereference",
        ),
        (
            [("1.txt", b"x"), link("1.jpg", "../1.jpg", tarfile.SYMTYPE)],
            "symbolic link to '../1.jpg'.*--dereference",
        ),
        ([link("1.jpg", "2.jpg", tarfile.SYMTYPE), link("2.jpg", "1.jpg", tarfile.SYMTYPE)], "symbolic link"),
        ([("1.jpg", b"x"), ("1.txt", b"x"), ("1.jpg", b"y")], "'1.jpg' occurs twice, at bytes 512 and 2560"),
        ([("1.jpg", b"x"), ("1.JPG", b"y")], "'1.JPG' occurs twice"),
    ],
)
def test_scan_tar_refuses_members_it_cannot_index(tmp_path, members, words):
    pack(tmp_path / "0.tar", members)
    with pytest.raises(UserError, match=f"0.tar: .*{words}") as error:
        index_folder(tmp_path, "image_text")
    assert "\n" not in str(error.value) and not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_scan_tar_refuses_sparse_files(tmp_path, form):
    (tmp_path / "files").mkdir()
    with open(tmp_path / "files" / "1.jpg", "wb") as file:
        file.write(b"x")
        file.seek(1 << 20)
        file.write(b"y")
    path = gnu_tar(tmp_path / "files", tmp_path / "0.tar", f"--format={form}", "--sparse", "1.jpg")
    with tarfile.open(path) as tar:
        assert tar.next().issparse()
    with pytest.raises(UserError, match="'1.jpg' is a sparse file"):
        TarScan(path)


def test_scan_tar_without_end_blocks_is_complete(folder, tmp_path):
    whole = gnu_tar(folder, tmp_path / "0.tar", *sorted(os.listdir(folder))).read_bytes()
    with tarfile.open(tmp_path / "0.tar") as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + 512
    assert not whole[end:].strip(b"\0")
    for size in (end, end + 512, end + 1024, end + 1024 + 7):
        (tmp_path / "0.tar").write_bytes(whole[:size])
        assert contents(tmp_path / "0.tar") == files_of(folder)
        assert TarScan(tmp_path / "0.tar").notes == ({"tars without end blocks": 1} if size == end else {})
    for size in (end - 1, end - 512, end - 600, end - 1024 + 1):
        (tmp_path / "0.tar").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"0.tar: (truncated|damaged or truncated)"):
            TarScan(tmp_path / "0.tar")


def test_scan_tar_reads_concatenated_tars(tmp_path):
    first = pack(tmp_path / "a.tar", [("1.jpg", b"one"), ("1.txt", b"1")]).read_bytes()
    second = pack(tmp_path / "b.tar", [("2.jpg", b"two"), ("2.txt", b"2")]).read_bytes()
    both = tmp_path / "both.tar"
    both.write_bytes(first + second)
    assert contents(both) == {"1": {"jpg": b"one", "txt": b"1"}, "2": {"jpg": b"two", "txt": b"2"}}
    assert TarScan(both).notes == {"tars in one file, end to end": 2}
    for rest in (b"x" * 512, b"x" * 10240, b"x", second[512:]):
        both.write_bytes(first + rest)
        with pytest.raises(UserError, match=r"both.tar: (damaged|truncated)"):
            TarScan(both)
    both.write_bytes(first + first)  # the same keys again: which is which?
    with pytest.raises(UserError, match="'1.jpg' occurs twice"):
        TarScan(both)


def test_scan_tar_header_of_zeros_is_damage(tmp_path):
    path = pack(tmp_path / "0.tar", [("1.jpg", b"one"), ("2.jpg", b"two"), ("3.jpg", b"three")])
    data = bytearray(path.read_bytes())
    data[1024:1536] = bytes(512)
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged, byte 1536"):
        TarScan(path)


def test_scan_tar_refuses_what_is_no_regular_file(tmp_path):
    path = tmp_path / "0.tar"
    path.symlink_to("nowhere")
    with pytest.raises(UserError, match="0.tar: no file, but a folder, or a link to nothing"):
        index_folder(tmp_path, "image_text")
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="0.tar: no file"):
        index_folder(tmp_path, "image_text")


def test_scan_tar_hashes_file_and_images_in_one_pass(folder, tmp_path):
    path = gnu_tar(folder, tmp_path / "0.tar", "--sort=name", ".")
    entry = index_folder(tmp_path, "image_text")["shards"][0]
    data = path.read_bytes()
    assert (entry["sha256"], entry["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
    index = open_index(path, tmp_path)
    assert index.shard_bytes == len(data) and len(index) == index.rows == SAMPLES
    samples = list(map(index.read, range(SAMPLES)))
    for key, members, _ in samples:
        assert members["jpg"][2] == string_key((folder / f"{key}.jpg").read_bytes())
        assert members["txt"][2] == -1
    headers = list_samples(TarScan(path, hashes=False))
    assert headers == [(k, {e: list(p[:2]) for e, p in m.items()}, r) for k, m, r in samples]

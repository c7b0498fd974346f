"""Readers of tars, their indexes, manifests and shards, and of caches."""

import hashlib
import io
import itertools
import json
import re
import tarfile
from pathlib import Path
from typing import Any

from tests.fuzz.oracles import load_json
from tests.fuzz.reader import Reader

# PNGs of one pixel, of two kinds
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63{}0000"
    "{}0000000049454e44ae426082".format("f8cfc0", "0301010018dd8db0")
)
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class Vocabulary:
    """Stands for a tokenizer where shards are written: their ids are below 100."""

    vocabulary, sha256 = 100, "0" * 64


def example_tar(folder: Path) -> Path:
    path = folder / "images.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(3):
            for extension, data in (("json", b'{"captions": {"en": ["one"]}}'), ("png", b"x" * (number + 1))):
                member = tarfile.TarInfo(f"sub/k{number}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def read_tar(path: Path) -> Any:
    from raylib.data.tars import TarScan

    scan, data = TarScan(path), path.read_bytes()
    return {name: data[place[0] : place[0] + place[1]] for name, place in scan.files.items()}


def plain_name(name: str) -> str:
    """A member's name as the product writes it: without "./" before it, control characters escaped."""
    text = name.removeprefix("./").encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def load_tar(path: Path) -> Any:
    files = {}
    with tarfile.open(path, "r:", ignore_zeros=True) as tar:
        for member in tar:
            if member.isreg() or member.islnk() or (member.issym() and member.name.count(".")):
                files[plain_name(member.name)] = tar.extractfile(member).read()
    return files


def example_images(folder: Path) -> Path:
    """A source of two shards, as `ShardWriter` writes them, with a copy of the indexes."""
    from raylib.data.shards import ShardWriter

    with ShardWriter(folder / "data", "image_text", max_samples=3) as writer:
        writer.images = {"png"}
        for number in range(5):
            captions = json.dumps({"captions": {"en": [f"thing {number}"], "de": f"Ding {number}"}})
            writer.write(f"sub/k{number}", {"json": captions.encode(), "png": PNG + bytes([number])})
    return folder / "data"


def require_hashes(source: Any) -> None:
    """Compare the shards with their manifest, as `data.verify=true` does."""
    from raylib.provenance import fingerprint_files

    fingerprint_files(source.files(), {}, verify=True)


def read_images(path: Path) -> Any:
    from raylib.data.sources import Source

    source = Source(path, "image_text")
    require_hashes(source)
    return list_images(source)


def list_images(source: Any) -> Any:
    from raylib.errors import UserError
    from raylib.text import BadCaption

    samples = []
    for language in source.groups:
        for number in range(source.size(language)):
            sample = source.sample(language, number)
            members = {name: sample.read(name) for name in sample.members}
            try:
                captions = sample.captions()
            except BadCaption as error:  # which training counts
                raise UserError(sample.describe(error)) from error
            samples.append([language, sample.key, members, captions, list(sample.images)])
    return samples


def load_manifest(path: Path) -> Any:
    manifest = load_json(path / "manifest.json")
    for shard in manifest["shards"]:
        data = (path / shard["name"]).read_bytes()
        assert len(data) == shard["bytes"] and hashlib.sha256(data).hexdigest() == shard["sha256"]
    return manifest


def load_images(path: Path) -> Any:
    manifest = load_manifest(path)
    assert manifest["kind"] == "image_text"
    return list_members(path, manifest)


def list_members(path: Path, manifest: Any) -> Any:
    groups: dict[str, list] = {}
    for shard in manifest["shards"]:
        samples: dict[str, dict[str, bytes]] = {}
        for name, data in load_tar(path / shard["name"]).items():
            key, extension = re.fullmatch(r"((?:.*/)?[^./]+)\.(.+)", name).groups()
            samples.setdefault(key, {})[extension.lower()] = data
        assert len(samples) == shard["samples"]
        for key, members in samples.items():
            images = sorted(set(manifest.get("images", ["png"])) & members.keys())
            captions = json.loads(members["json"])["captions"]
            groups.setdefault(shard["language"], []).append(
                [shard["language"], key, members, captions, images]
            )
    return [sample for group in groups.values() for sample in group]


def read_remote_images(path: Path) -> Any:
    from raylib.data.sources import Source

    source = Source(f"file://{path}", "image_text", cache=path.parent / "cache")
    return list_images(source)


def write_over(path: Path) -> Any:
    """Write a source where one lies: what its manifest names is deleted in the end."""
    from raylib.data.shards import ShardWriter

    with ShardWriter(path, "image_text") as writer:
        writer.write("k", {"json": b"{}"}, "sw")
    return sorted(file.name for file in path.glob("*.tar"))


def list_written(path: Path) -> Any:
    assert [shard["name"] for shard in load_json(path / "manifest.json")["shards"]] == ["sw-000000.tar"]
    return sorted(file.name for file in path.glob("*.tar"))


def read_images_as_indexed(path: Path) -> Any:
    from raylib.data.sources import Source

    return list_images(Source(path))


def load_images_as_indexed(path: Path) -> Any:
    """The bytes that lie where the indexes say, of a tar that may be damaged."""
    samples = []
    for shard in load_json(path / "manifest.json")["shards"]:
        data = (path / shard["name"]).read_bytes()
        for key, places, _ in load_json(path / f"{shard['name'][:-4]}.index.json")["samples"]:
            members = {name: data[place[0] : place[0] + place[1]] for name, place in places.items()}
            captions = json.loads(members["json"].removeprefix(b"\xef\xbb\xbf"))
            captions = next(captions[name] for name in ("captions", "caption", "text") if name in captions)
            if not isinstance(captions, dict):
                captions = {"en": captions}
            samples.append(["en", key, members, captions, ["png"]])
    return samples


def example_packed(folder: Path) -> Path:
    """A source of pairs in two languages."""
    from raylib.data.shards import ShardWriter

    with ShardWriter(folder / "data", "parallel", Vocabulary(), max_samples=4) as writer:
        for language, first in (("de", 10), ("sw", 30)):
            writer.write_rows(language, [([first + i], [first + i + 1] * (i + 1)) for i in range(6)])
    return folder / "data"


def read_packed(path: Path) -> Any:
    from raylib.data.sources import Source

    source = Source(path, "parallel", Vocabulary.sha256)
    require_hashes(source)
    return list_rows(source)


def read_packed_as_stored(path: Path) -> Any:
    from raylib.data.sources import Source

    return list_rows(Source(path))


def list_rows(source: Any) -> Any:
    return {
        language: [
            [side.tolist() for side in row]
            for row in source.rows((language, n) for n in range(source.size(language)))
        ]
        for language in source.groups
    }


def load_packed(path: Path) -> Any:
    manifest = load_manifest(path)
    assert manifest["kind"] == "parallel" and manifest["tokenizer"] == Vocabulary.sha256
    rows: dict[str, list] = {}
    for shard in manifest["shards"]:
        members = load_tar(path / shard["name"])
        rows.setdefault(shard["language"], []).extend(
            row for key in sorted(members) if key.endswith(".ids.npy") for row in unpack(members, key[:-8])
        )
    return rows


def unpack(members: dict[str, bytes], key: str) -> list:
    import numpy as np

    ids = np.load(io.BytesIO(members[f"{key}.ids.npy"]), allow_pickle=False)
    ends = np.load(io.BytesIO(members[f"{key}.ends.npy"]), allow_pickle=False)
    assert ids.ndim == 1 and ends.ndim == 2 and ends.shape[1] == 2 and ids.dtype.kind in "ui"
    cuts = [0, *ends.ravel().tolist()]
    assert cuts[-1] == len(ids) and all(low < high for low, high in itertools.pairwise(cuts))
    sides = [ids[low:high].tolist() for low, high in itertools.pairwise(cuts)]
    return [sides[i : i + 2] for i in range(0, len(sides), 2)]


def load_packed_as_stored(path: Path) -> Any:
    """The arrays that lie where the indexes say."""
    rows: dict[str, list] = {}
    for shard in load_json(path / "manifest.json")["shards"]:
        data = (path / shard["name"]).read_bytes()
        for key, places, _ in load_json(path / f"{shard['name'][:-4]}.index.json")["samples"]:
            members = {f"{key}.{name}": data[at : at + size] for name, (at, size) in places.items()}
            rows.setdefault(shard["language"], []).extend(unpack(members, key))
    return rows


def example_foreign(folder: Path) -> Path:
    """A folder with a tar of another's, not indexed."""
    (folder / "data").mkdir()
    example_tar(folder).rename(folder / "data" / "0.tar")
    return folder / "data"


def read_foreign(path: Path) -> Any:
    from raylib.data.shards import index_folder
    from raylib.data.sources import Source

    index_folder(path, "image_text", workers=1)
    source = Source(path)
    samples = [source.sample("en", number) for number in range(source.size("en"))]
    return [[sample.key, {name: sample.read(name) for name in sample.members}] for sample in samples]


def load_foreign(path: Path) -> Any:
    samples: dict[str, dict[str, bytes]] = {}
    for name, data in load_tar(path / "0.tar").items():
        found = re.fullmatch(r"((?:.*/)?[^./][^./]*)\.(.+)", name)
        if found and not re.match(r"__[^/]*__($|/)", name):
            assert found[2].lower() not in samples.setdefault(found[1], {})
            samples[found[1]][found[2].lower()] = data
    return [[key, members] for key, members in samples.items()]


def example_states(folder: Path) -> Path:
    import torch

    from raylib.cache import write_encoder_states
    from raylib.packed import Ragged

    def encode(names: Any) -> Ragged:
        lengths = torch.tensor([len(name) for name in names])
        return Ragged(torch.arange(int(lengths.sum()) * 4.0).view(-1, 4) / 8, lengths)

    names = ["a", "bcd", "ef", "g"]
    write_encoder_states(folder / "data", names, lambda chunk: chunk, encode, 3)
    return folder / "data"


def read_states(path: Path) -> Any:
    from raylib.cache import EncoderStates

    states = EncoderStates(path)
    return {name: states.read([name]).values for name in states.rows} | {"faults": states.faults}


def load_states(path: Path) -> Any:
    import numpy as np

    index = load_json(path / "index-0.json")
    values = np.frombuffer((path / "states-0.bin").read_bytes(), index["dtype"])
    values = values.reshape(index["tokens"], index["width"])
    found = {name: values[first : first + count] for name, (first, count) in index["rows"].items()}
    assert all(
        len(found[name]) == row[1] and np.isfinite(found[name]).all() for name, row in index["rows"].items()
    )
    return found | {"faults": index.get("faults", {})}


def import_torch() -> None:
    import raylib.cache
    import raylib.data.sources
    import raylib.provenance  # noqa: F401


SOURCE = ("raylib.data.fetch:fetch_manifest", "raylib.data.index:FileBytes.__init__")
READERS = [
    Reader(
        name="tar_scan",
        example=example_tar,
        read=read_tar,
        oracle=load_tar,
        covers=("raylib.data.tars:TarScan.__init__", "raylib.data.tars:TarScan._read_tar"),
        compares="the bytes of the files in the tar",
    ),
    Reader(
        name="shards_images",
        example=example_images,
        read=read_images,
        oracle=load_images,
        setup=import_torch,
        covers=(*SOURCE, "raylib.data.sources:Sample.record", "raylib.data.index:_convert"),
    ),
    Reader(
        name="shards_remote",
        example=example_images,
        read=read_remote_images,
        oracle=load_images,
        setup=import_torch,
        covers=("raylib.data.fetch:fetch_manifest", "raylib.data.fetch:_download"),
    ),
    Reader(
        name="shards_written_over",
        example=example_images,
        read=write_over,
        oracle=list_written,
        setup=import_torch,
        targets=("manifest.json",),
        covers=("raylib.data.shards:_list_stale",),
        compares="the manifest in the end, and which tars lie beside it",
    ),
    Reader(
        name="shards_images_damaged",
        example=example_images,
        read=read_images_as_indexed,
        oracle=load_images_as_indexed,
        setup=import_torch,
        targets=("*.tar",),
        covers=(*SOURCE, "raylib.data.sources:Sample.record"),
        compares="the bytes where the indexes say that members lie",
    ),
    Reader(
        name="shards_packed",
        example=example_packed,
        read=read_packed,
        oracle=load_packed,
        setup=import_torch,
        covers=SOURCE,
    ),
    Reader(
        name="shards_packed_damaged",
        example=example_packed,
        read=read_packed_as_stored,
        oracle=load_packed_as_stored,
        setup=import_torch,
        targets=("*.tar",),
        covers=SOURCE,
        compares="the arrays where the indexes say that they lie",
    ),
    Reader(
        name="shards_index_folder",
        example=example_foreign,
        read=read_foreign,
        oracle=load_foreign,
        setup=import_torch,
        covers=(
            "raylib.data.index:list_samples",
            "raylib.data.shards:_index_shard",
            "raylib.data.tars:TarScan.__init__",
        ),
        compares="keys, extensions and bytes of the samples",
    ),
    Reader(
        name="encoder_states",
        example=example_states,
        read=read_states,
        oracle=load_states,
        setup=import_torch,
        covers=("raylib.cache:EncoderStates.__init__",),
    ),
]

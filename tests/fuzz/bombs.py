"""Small files that ask for much: decompressed, decoded, followed or counted."""

import base64
import functools
import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib

GIB = 1 << 30
BLOCK = bytes(1 << 24)
CANARY = "beside/canary.txt"  # lies beside the folder of each damaged file
OUTSIDE = ("../../" + CANARY, "../" * 40 + "etc/passwd", "/etc/passwd", "/dev/zero", "..", "/")


@functools.cache
def deflated(size: int = GIB, letter: bytes = b"\0") -> tuple[bytes, int]:
    """So many bytes of one letter as a raw deflate stream, made of one block over and over, and their
    CRC-32."""
    block = BLOCK.replace(b"\0", letter) if letter != b"\0" else BLOCK
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    once = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    crc = 0
    for _ in range(size // len(block)):
        crc = zlib.crc32(block, crc)
    return once * (size // len(block)) + b"\x03\x00", crc


@functools.cache
def gzip_bomb(letter: bytes = b"\0") -> bytes:
    stream, crc = deflated(letter=letter)
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + stream + struct.pack("<II", crc, GIB & 0xFFFFFFFF)


def zip_bomb(name: str, letter: bytes = b" ", claimed: int = GIB) -> bytes:
    """A zip with one member, which says that it has `claimed` bytes."""
    stream, crc = deflated(letter=letter)
    sizes = struct.pack("<III", crc, len(stream), claimed)
    raw = name.encode()
    common = b"\0\0\x08\0\0\0\x21\0" + sizes + struct.pack("<H", len(raw))
    local = b"PK\x03\x04\x14\0" + common + b"\0\0" + raw + stream
    central = b"PK\x01\x02\x14\0\x14\0" + common + bytes(16) + raw
    end = b"PK\x05\x06\0\0\0\0" + struct.pack("<HHIIH", 1, 1, len(central), len(local), 0)
    return local + central + end


@functools.cache
def xz_bomb() -> bytes:
    import lzma

    return lzma.compress(bytes(1 << 28), preset=0)


def png(width: int, height: int, extra: bytes = b"", data: bytes = bytes(64)) -> bytes:
    """A PNG whose header says so many pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + body + chunk(b"IEND", b"")


def png_bombs() -> list[bytes]:
    """Pixels that are not there, pixels that are (all zeros), and a text of 1 GB."""
    stream, _ = deflated()
    text = b"zTXtComment\0\0\x78\x9c" + stream[: 1 << 20]
    return [
        png(60000, 60000),
        png(30000, 30000, data=bytes(1 << 20)),
        png(2**31 - 1, 2**31 - 1),
        png(0, 0),
        png(2, 2, struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))),
    ]


def bmp_bomb() -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 40000, 40000, 1, 24, 0, 0, 0, 0, 0, 0)


def gif_bomb() -> bytes:
    frame = b"\x2c\0\0\0\0\xff\xff\xff\xff\0\x02\x02\x4c\x01\0"
    return b"GIF89a\xff\xff\xff\xff\0\0\0" + frame + b"\x3b"


class Payload:
    """Unpickled, it calls a function."""

    def __init__(self, module: str, name: str, *arguments: object):
        self.call = module, name, arguments

    def to_bytes(self, protocol: int) -> bytes:
        module, name, arguments = self.call
        body = pickle.dumps(arguments, protocol)[2:-1] if protocol else b"(V" + b"touch x\ntR"[:-1]
        if protocol:
            # a frame in the middle would be an error of its own
            body = pickle.dumps(arguments, 2)[2:-1]
        head = b"\x80" + bytes([protocol]) if protocol else b""
        return head + b"c" + f"{module}\n{name}\n".encode() + body + b"R."


@functools.cache
def pickles() -> tuple[bytes, ...]:
    """Pickles that run something, take memory, or do not end."""
    array = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    dtype = b"cnumpy\ndtype\nX\x02\x00\x00\x00%sK\x00K\x01\x87R"
    huge = b"(K\x01\x8a\x08" + struct.pack("<q", 2**40) + b"\x85" + dtype % b"f4" + b"\x89C\x04\0\0\0\0tb."
    objects = b"(K\x01K\x04\x85" + dtype % b"O8" + b"\x89C\x20" + b"A" * 32 + b"tb."
    doubled = b"\x80\x02]q\x00" + b"]q\x01(h\x00h\x00e" * 1
    for level in range(1, 40):
        doubled += b"]" + b"q" + bytes([level + 1]) + b"(" + 2 * (b"h" + bytes([level])) + b"e"
    laughs = [b"lol"]
    for _ in range(30):
        laughs = [laughs, laughs]
    return (
        b"\x80\x02Nr\xff\xff\xff\x3f.",  # the memo's place 2^30
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".",
        b"\x80\x05\x96" + struct.pack("<Q", 2**33) + b".",
        b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
        b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".",
        b"\x80\x02" + b"(" * 200_000 + b".",
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        b"\x80\x02" + b"N\x85" * 1 + b"\x85" * 100_000 + b".",
        b"I" + b"9" * 100_000 + b"\n.",
        b"\x80\x02c__builtin__\neval\nX\x04\x00\x00\x001+1.\x85R."[:-3] + b"\x85R.",
        doubled + b".",
        pickle.dumps(laughs, 2),
        array + huge,
        array + objects,
        b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\0\0\0\0\x01\x85R.",
        b"cos\nsystem\n(S'touch ran'\ntR.",
        Payload("os", "system", "touch ran").to_bytes(2),
        Payload("posix", "system", "touch ran").to_bytes(4),
        Payload("subprocess", "check_output", ["touch", "ran"]).to_bytes(3),
        Payload("builtins", "exec", "open('ran', 'w')").to_bytes(2),
        Payload("builtins", "eval", "__import__('os').fork()").to_bytes(2),
        Payload("numpy", "load", "/etc/passwd").to_bytes(2),
        Payload("torch", "load", "/etc/passwd").to_bytes(2),
        Payload("numpy.testing._private.utils", "runstring", "open('ran', 'w')", {}).to_bytes(2),
        b"\x80\x02cnumpy\nndarray\n(\x8a\x05\0\0\0\0\x10\x85X\x02\x00\x00\x00f4\x86R.",
        b"\x80\x02cnumpy\nndarray\n.",
        b"\x80\x02P1\n.",
    )


@functools.cache
def tars() -> tuple[bytes, ...]:
    """Tars of headers that lead to further headers, or claim much."""

    def header(name: str, kind: bytes, size: int = 0, link: str = "") -> bytes:
        member = tarfile.TarInfo(name)
        member.type, member.size, member.linkname = kind, size, link
        return member.tobuf(tarfile.GNU_FORMAT)

    def pax(**records: str) -> bytes:
        body = b""
        for key, value in records.items():
            text = f" {key.replace('_', '.')}={value}\n".encode()
            size = len(text) + len(str(len(text) + 3))
            body += f"{size}".encode() + text
        return header("x", tarfile.XHDTYPE, len(body)) + body + bytes(-len(body) % 512)

    end, file = bytes(1024), header("a.json", tarfile.REGTYPE, 2) + b"{}" + bytes(510)
    longname = header("././@LongLink", tarfile.GNUTYPE_LONGNAME, 512) + b"n" * 512
    sparse = {"GNU_sparse_major": "1", "GNU_sparse_minor": "0", "GNU_sparse_name": "b.json"}
    return (
        longname * 5000 + file + end,
        pax(path="b.json") * 5000 + file + end,
        header("g", tarfile.XGLTYPE, 0) * 5000 + file + end,
        header("././@LongLink", tarfile.GNUTYPE_LONGNAME, 2**33 - 1) + file + end,
        header("x", tarfile.XHDTYPE, 2**33 - 1) + file + end,
        pax(size=str(2**60)) + file + end,
        pax(size="-512") + file + end,
        pax(size="x") + file + end,
        pax(mtime="nan") + file + end,
        pax(path="") + file + end,
        pax(**sparse, GNU_sparse_realsize=str(2**60)) + file + end,
        header("a", tarfile.GNUTYPE_SPARSE, 2**33 - 1) + file + end,
        header("a.json", tarfile.REGTYPE, 2**62) + end,
        file * 2 + end,
        header("a.json", tarfile.SYMTYPE, 0, "a.json") + end,
        header("a.json", tarfile.SYMTYPE, 0, "b.json") + header("b.json", tarfile.SYMTYPE, 0, "a.json") + end,
        header("a.json", tarfile.SYMTYPE, 0, "/etc/passwd") + end,
        header("a.json", tarfile.LNKTYPE, 0, "../../etc/passwd") + end,
        header("a.json", tarfile.FIFOTYPE) + header("b.json", tarfile.CHRTYPE) + end,
        header("d", tarfile.DIRTYPE) * 2000 + file + end,
        end,
        file,
        file + b"\0" * 100,
        file + end + b"rubbish",
    )


def yaml_texts() -> list[bytes]:
    """YAML of aliases of aliases, and of tags that build objects."""
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    for level in range(1, 12):
        laughs += f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n"
    merge = "b0: &b0 {x: 1}\n" + "".join(
        f"b{level}: &b{level} {{<<: [{', '.join([f'*b{level - 1}'] * 9)}]}}\n" for level in range(1, 10)
    )
    return [
        laughs.encode(),
        merge.encode(),
        b"a: &a [*a]\n",
        b"a: &a {b: *a}\n",
        b"!!python/object/apply:os.system ['touch ran']\n",
        b"a: !!python/object/new:os.system ['touch ran']\n",
        b"a: !!python/name:os.system\n",
        b"a: 2026-99-99\nb: 1:99:99\n",
        b"? [a, b]\n: c\n",
        b"? {a: b}\n: c\n",
        b"a: 1\n---\nb: 2\n",
        b"a: !!binary '****'\n",
        b"a: !!int x\n",
        b"[" * 3000,
        b"- " * 3000,
        b"a: 1\na: 2\n",
        b"\t- a\n",
        b"%YAML 9.9\n---\na: 1\n",
        b"a: .nan\nb: .inf\nc: 1e999\n",
    ]


def json_texts() -> list[bytes]:
    """JSON that is deep, long, or means other things to different readers."""
    return [
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b"[" * 900 + b"]" * 900,
        b"1" * 100_000,
        b"-" + b"9" * 5000,
        b"[1e999, -1e999]",
        b"[NaN, Infinity, -Infinity]",
        b'{"a": 1, "a": 2}',
        b'"\\ud800"',
        b'["\\ud800\\u0000"]',
        b'{"\\ud800": 1}',
        b"'a'",
        b"[1,]",
        b"{} {}",
        b"null",
        b"true",
        b"[]",
        b"{}",
        b'""',
        b"0",
        b"[null]",
        b"[[]]",
        b"[{}]",
        b'{"a": null}',
        b" " * 100_000,
        b"\n" * 100_000,
        b"[" + b"0," * 200_000 + b"0]",
        b'"' + b"x" * 1_000_000 + b'"',
        b'["a\\\nb"]',
        b'{"a": "\x00"}',
    ]


def strings() -> list[str]:
    """Texts in the place of a text: names that lead elsewhere, what ends a line, images of many pixels."""
    bomb = base64.b64encode(png(60000, 60000)).decode()
    return [
        *OUTSIDE,
        "",
        " ",
        "\0",
        "a\0b",
        "a\nb",
        "a\rb\u2028c\u0085d",
        "\x1b[31mred",
        "\ud800",
        "\ufeff",
        "x" * 300,
        "x" * 5000,
        "x" * 200_000,
        "a/" * 3000,
        "%s%n{0}{}",
        "nan",
        "-1",
        "1e999",
        "9" * 5000,
        "é",
        "e\u0301",
        "\u202etxt",
        bomb,
        "=" * 8,
        "AAAA",
        "[" * 2000,
        "__class__",
        "pipe:touch ran",
        "file:///etc/passwd",
        "http://127.0.0.1:9/x",
        "$(touch ran)",
    ]


def json_values() -> list[object]:
    """Other types and extremes in the place of a value."""
    deep: object = 0
    for _ in range(200):
        deep = [deep]
    return [
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        3.5,
        -0.0,
        2**31,
        2**53 + 1,
        2**63,
        -(2**63),
        2**64,
        10**30,
        1e308,
        1e-320,
        float("nan"),
        float("inf"),
        [],
        {},
        [[]],
        [None],
        {"": None},
        {"a": 1},
        ["a", "b"],
        [0] * 1000,
        deep,
        *strings(),
    ]


def npy_of_objects(pickled: bytes) -> bytes:
    """A .npy whose one value is a pickle."""
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + pickled


@functools.cache
def foreign_files() -> dict[str, tuple[bytes, ...]]:
    """Whole files that are another than expected, by kind."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("../../ran.json", "[]")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 32 * "4d" + "\nsize 438007537\n"
    page = "<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body>Not found</body></html>\n"
    values = json.dumps(list(range(20))).encode()
    return {
        "empty": (b"",),
        "git_lfs_pointer": (pointer.encode(), pointer.replace("\n", "\r\n").encode()),
        "web_page": (page.encode(), b"\n<html>", page.encode("utf-16"), b'{"error": "Entry not found"}'),
        "zeros": (bytes(1), bytes(8), bytes(512), bytes(4096), bytes(100_000)),
        "other_letters": (
            b"\xff\xfe",
            b"\xef\xbb\xbf",
            b"\xff" * 64,
            b"\n",
            b"\r\n\r\n",
            b"\x1a",
            b"\0\n" * 50,
        ),
        "gzip_bomb": (gzip_bomb(), gzip_bomb(b" "), gzip_bomb(b"["), gzip_bomb(b"a"), gzip_bomb(b"\n")),
        "zip_bomb": (
            zip_bomb("a.json"),
            zip_bomb("a.json", b"["),
            zip_bomb("a.json", claimed=10),
            zip_bomb("features.npy"),
            zip_bomb("archive/data.pkl"),
            archive.getvalue(),
        ),
        "xz_bomb": (xz_bomb(),),
        "image_bomb": (*png_bombs(), bmp_bomb(), gif_bomb()),
        "tar_bomb": tars(),
        "pickle_bomb": (*pickles(), *map(npy_of_objects, pickles())),
        "yaml_bomb": tuple(yaml_texts()),
        "json_bomb": tuple(json_texts()),
        "gzip_of_other": (
            gzip.compress(values, mtime=0),
            gzip.compress(b"", mtime=0),
            gzip.compress(b"\0" * 9),
        ),
    }

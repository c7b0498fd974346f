import hashlib
import io
import itertools
import os
import re
import resource
import zlib
from collections import Counter
from struct import calcsize, pack

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_image

from finetune.stores.images import open_images
from raylib.config import validate
from raylib.data.augmentation import (
    FIXED_UNIFORMS,
    FLIP,
    TONES,
    WARPS,
    apply_operation,
    augment_image,
    count_uniforms,
    crop_box,
    forbid_flips,
)
from raylib.data.images import BadImage, decode_image, load_image, resize_image
from raylib.errors import UserError
from raylib.settings import OPERATIONS, AugmentConfig

RGB = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
ALPHA = np.random.default_rng(1).integers(0, 256, (20, 24), dtype=np.uint8)
MIDDLE = np.full(FIXED_UNIFORMS, 0.5)


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def smooth_image(height, width):
    """An image of low frequencies, on which resamplers agree."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = np.stack([np.sin(5 * x + y), np.cos(4 * y), np.sin(3 * (x - y))], -1)
    return (waves * 110 + 128).astype(np.uint8)


def over_white(image):
    rgba = np.asarray(image.convert("RGBA")).astype(float)
    return rgba[..., :3] * rgba[..., 3:] / 255 + 255 - rgba[..., 3:]


IMAGE, RGBA = Image.fromarray(RGB), Image.fromarray(np.dstack([RGB, ALPHA]))
ENCODED = {
    "rgb": encode(IMAGE),
    "rgba": encode(RGBA),
    "gray": encode(Image.fromarray(ALPHA)),
    "gray alpha": encode(Image.merge("LA", [Image.fromarray(ALPHA), Image.fromarray(ALPHA)])),
    "palette": encode(IMAGE.quantize(16)),
    "palette with a transparent colour": encode(IMAGE.quantize(16), transparency=3),
    "palette with alpha": encode(RGBA.quantize(256)),
    "bits": encode(Image.fromarray(ALPHA > 128)),
    "webp": encode(IMAGE, "WEBP", lossless=True),
    "webp alpha": encode(RGBA, "WEBP", lossless=True, exact=True),
}


@pytest.mark.parametrize("name", ENCODED)
def test_decode_equals_pil_over_white(name):
    got = decode_image(ENCODED[name])
    assert got.dtype == np.uint8 and got.shape == (20, 24, 3)
    assert np.abs(got - over_white(Image.open(io.BytesIO(ENCODED[name])))).max() <= 0.5


def test_decode_reads_jpegs_and_16_bit_images():
    exif = Image.Exif()
    exif[0x112] = 6
    photo = smooth_image(40, 30)
    for kind in ("RGB", "L", "CMYK"):
        image = Image.fromarray(photo).convert(kind)
        data = encode(image, "JPEG", quality=95, exif=exif)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")).astype(
            int
        )
        got = decode_image(data)
        assert got.shape == (30, 40, 3) and np.abs(got - expected).max() <= 6
    deep = encode(Image.fromarray(ALPHA.astype(np.uint16) * 257))
    assert (decode_image(deep) == ALPHA[..., None]).all()


def test_decode_damaged_images_are_named():
    for data in (b"", b"abc", ENCODED["rgb"][:400], encode(IMAGE, "JPEG")[:300], b"\xff\xd8" + bytes(50)):
        with pytest.raises(BadImage, match="en-7.tar cat: does not decode") as error:
            decode_image(data, "en-7.tar cat")
        assert "\n" not in str(error.value)


def test_resize_is_close_to_pil():
    for shape, size in [((50, 70), 32), ((20, 24), 48)]:
        image = smooth_image(*shape)
        expected = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)).astype(
            int
        )
        assert np.abs(resize_image(image, size) - expected).max() <= 4
    assert (
        resize_image(RGB[:20, :20], 20) is not RGB
        and (resize_image(RGB[:20, :20], 20) == RGB[:20, :20]).all()
    )


def plain(**changes):
    return AugmentConfig(**{"scale": (1, 1), "ratio": (1, 1), "operations": 0, **changes})


def test_augment_without_operations_changes_nothing():
    square = RGB[:20, :20]
    assert (augment_image(square, 20, plain(), MIDDLE) == square).all()
    assert (augment_image(square, 20, plain(flip=1), MIDDLE) == square[:, ::-1]).all()
    gray = augment_image(square, 20, plain(grayscale=1), MIDDLE)
    assert (gray == cv2.cvtColor(square, cv2.COLOR_RGB2GRAY)[..., None]).all()
    cut = augment_image(square, 20, plain(cutout=1), MIDDLE)
    assert (cut == 127).all(-1).sum() == 25 and ((cut == square) | (cut == 127)).all()


@pytest.mark.parametrize(
    ("shape", "size"), [((60, 60), 40), ((64, 90), 48), ((300, 280), 64), ((20, 30), 50)]
)
def test_random_crop_is_close_to_pil(shape, size):
    """Random draws: the same box cut and resized by PIL."""
    image = smooth_image(*shape)
    config = plain(scale=(0.3, 1), ratio=(0.75, 4 / 3))
    for draws in np.random.default_rng(2).random((5, FIXED_UNIFORMS)):
        area = (0.3 + 0.7 * draws[0]) * shape[0] * shape[1]
        aspect = np.exp(np.log(0.75) + (np.log(4 / 3) - np.log(0.75)) * draws[1])
        width, height = min(shape[1], (area * aspect) ** 0.5), min(shape[0], (area / aspect) ** 0.5)
        left, top = (shape[1] - width) * draws[2], (shape[0] - height) * draws[3]
        box = (left, top, left + width, top + height)
        expected = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box=box)
        got = augment_image(image, size, config, draws)[2:-2, 2:-2]  # at the border PIL sees no white
        assert np.abs(got - np.asarray(expected).astype(int)[2:-2, 2:-2]).max() <= 6


def test_crop_above_the_image_shrinks_it_onto_white_at_a_random_place():
    """Four times the area: half the side, anywhere, nothing lost."""
    black, config = np.zeros((40, 40, 3), np.uint8), plain(scale=(4, 4))
    corners = set()
    for draws in np.random.default_rng(1).random((20, FIXED_UNIFORMS)):
        got = augment_image(black, 40, config, draws)
        assert 20**2 - 60 <= (255 - got[..., 0].astype(int)).sum() / 255 <= 20**2 + 60  # borders are blurred
        rows, columns = (got[..., 0] < 128).any(1).nonzero()[0], (got[..., 0] < 128).any(0).nonzero()[0]
        assert 19 <= len(rows) <= 21 and 19 <= len(columns) <= 21
        corners.add((int(rows[0]), int(columns[0])))
    assert len(corners) > 15 and max(max(c) for c in corners) > 12 and min(min(c) for c in corners) < 4


def only(name, strength, image, size):
    config = plain(operations=1, magnitude=10, choices=(name,))
    return augment_image(image, size, config, np.append(MIDDLE, [0.5, (strength + 1) / 2]))


@pytest.mark.parametrize("strength", [-0.8, 0.6])
def test_warps_are_close_to_pil(strength):
    image, size = smooth_image(41, 41), 41
    angle, c = 30 * strength, 20.5
    shift, shear = 0.3 * strength, 0.3 * strength
    affine = {
        "shear_x": (1, shear, -shear * c, 0, 1, 0),
        "shear_y": (1, 0, 0, shear, 1, -shear * c),
        "translate_x": (1, 0, shift * size, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, shift * size),
    }
    bilinear = Image.Resampling.BILINEAR
    for name in WARPS:
        pil_image = Image.fromarray(image)
        if name == "rotate":
            expected = pil_image.rotate(angle, bilinear, fillcolor=(255,) * 3)
            inside = Image.new("L", (size, size), 255).rotate(angle, bilinear)
        else:
            expected = pil_image.transform(
                (size, size), Image.Transform.AFFINE, affine[name], bilinear, fillcolor=(255,) * 3
            )
            inside = Image.new("L", (size, size), 255).transform(
                (size, size), Image.Transform.AFFINE, affine[name]
            )
        core = cv2.erode(np.asarray(inside), np.ones((5, 5))) == 255
        got = only(name, strength, image, size)
        assert core.sum() > 500 and np.abs(got - np.asarray(expected).astype(int))[core].max() <= 4
        outside = cv2.dilate(np.asarray(inside), np.ones((5, 5))) == 0
        assert (got[outside] == 255).all() and outside.any()


@pytest.mark.parametrize("strength", [-0.7, 0.5])
def test_color_operations_are_close_to_pil(strength):
    image = smooth_image(32, 32) // 2 + 40
    pil_image, factor = Image.fromarray(image), 1 + 0.9 * strength
    expected = {
        "brightness": ImageEnhance.Brightness(pil_image).enhance(factor),
        "contrast": ImageEnhance.Contrast(pil_image).enhance(factor),
        "saturation": ImageEnhance.Color(pil_image).enhance(factor),
        "posterize": ImageOps.posterize(pil_image, 8 - round(4 * abs(strength))),
        "solarize": ImageOps.solarize(pil_image, 256 * (1 - abs(strength))),
        "autocontrast": ImageOps.autocontrast(pil_image),
        "sharpness": ImageEnhance.Sharpness(pil_image).enhance(factor),
    }
    for name, peer in expected.items():
        got = only(name, strength, image, 32)[1:-1, 1:-1].astype(int)
        difference = np.abs(got - np.asarray(peer)[1:-1, 1:-1])
        assert difference.max() <= 3, name
    turned = only("hue", strength, image, 32)
    assert (turned.max(-1) == image.max(-1)).all() and (turned != image).any()
    noise = np.random.default_rng(4).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert only("blur", strength, noise, 64).std() < noise.std() / 2
    assert set(expected) | {"hue", "blur", "equalize"} == set(TONES)


def test_equalize_flattens_the_histogram():
    image = smooth_image(32, 32) // 2 + 40
    got = only("equalize", 0.5, image, 32)
    for channel in range(3):
        _, place, counts = np.unique(image[..., channel], return_inverse=True, return_counts=True)
        share = (np.cumsum(counts) - counts[0]) / (image[..., 0].size - counts[0])
        assert np.abs(got[..., channel] - 255 * share[place].reshape(32, 32)).max() <= 1


def test_color_operations_accept_a_flat_image():
    for name in TONES:
        assert only(name, 1.0, np.full((8, 8, 3), 90, np.uint8), 8).shape == (8, 8, 3)


def test_augment_operations_are_those_that_settings_name():
    assert {"identity", *WARPS, *TONES} == OPERATIONS


def test_augment_restyles_drawings():
    """A red square with a blue one in it, on white: contours, a silhouette, other hues."""
    page = np.full((64, 64, 3), 255, np.uint8)
    page[16:48, 16:48] = (200, 0, 0)
    page[28:36, 28:36] = (0, 0, 200)

    def draw(**changes):
        config = plain(**changes)
        return augment_image(page, 64, config, np.full(count_uniforms(config), 0.25))

    outline, silhouette, jitter = draw(outline=1), draw(silhouette=1), draw(color_jitter=1)
    for image in (outline, silhouette):
        assert set(np.unique(image)) == {25, 255} and (image == image[..., :1]).all()
        assert (image[:14] == 255).all()
    dark = outline[..., 0] == 25
    assert dark[16, 20] and dark[28, 30] and not dark[22, 22] and not dark[32, 32]
    dark = silhouette[..., 0] == 25
    assert dark[16, 20] and not dark[28, 30] and dark[22, 22] and dark[32, 32]
    assert (jitter[22, 22] != page[22, 22]).any() and (jitter[2, 2] == 255).all()
    page = page[::4, ::4]  # lines of small drawings are not thinner than a pixel
    outline, silhouette = draw(outline=1), draw(silhouette=1)
    assert outline[16, 20, 0] < 128 < outline[22, 22, 0] and silhouette[22, 22, 0] < 128
    page = np.repeat(np.repeat(page, 4, 0), 4, 1)
    # a share of the images; the other draws stay those of a config without
    config = plain(outline=0.2, grayscale=0.5)
    draws = np.random.default_rng(0).random((200, count_uniforms(config)))
    before = [augment_image(page, 64, plain(grayscale=0.5), row[: count_uniforms(plain())]) for row in draws]
    images = [augment_image(page, 64, config, row) for row in draws]
    changed = [(one != other).any() for one, other in zip(before, images, strict=True)]
    assert 20 < sum(changed) < 60


def test_augment_elastic_moves_pixels_a_little():
    image = smooth_image(64, 64)
    still, config = plain(), plain(elastic=0.1)
    moved = [
        augment_image(image, 64, config, draws)
        for draws in np.random.default_rng(0).random((5, count_uniforms(config)))
    ]
    assert all((a != b).any() for a, b in itertools.combinations(moved, 2))
    middle = augment_image(image, 64, config, np.full(count_uniforms(config), 0.5))
    same = augment_image(image, 64, still, MIDDLE)
    assert np.abs(middle.astype(int) - same).max() <= 1
    right = np.full(count_uniforms(config), 0.5)
    right[count_uniforms(still) :: 2] = 1  # every point reads a tenth further to the right
    shifted = augment_image(image, 64, config, right)
    assert np.abs(shifted[:, :50].astype(int) - image[:, 6:56]).max() <= 12


def test_augment_is_deterministic_in_its_draws():
    more = {"outline": 0.2, "silhouette": 0.2, "color_jitter": 0.3, "elastic": 0.1}
    config = AugmentConfig(
        operations=3, choices=(*WARPS, *TONES), flip=0.5, grayscale=0.2, cutout=0.3, **more
    )
    image = smooth_image(70, 50)
    for draws in np.random.default_rng(3).random((50, count_uniforms(config))):
        first = augment_image(image, 32, config, draws)
        assert first.shape == (32, 32, 3) and first.dtype == np.uint8 and first.flags["C_CONTIGUOUS"]
        assert (first == augment_image(image, 32, config, draws)).all()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"choices": ["spin"]}, "spin"),
        ({"scale": [1, 0.5]}, "smaller one first"),
        ({"randaugment": "albef", "scale": [1, 2]}, "a scale above 1 is of randaugment=fused"),
        ({"randaugment": "pil", "elastic": 0.1}, "elastic is of randaugment=fused"),
        ({"outline": 0.6, "silhouette": 0.5}, "outline and silhouette exclude each other"),
        ({"magnitude": 11}, "magnitude"),
    ],
)
def test_augment_config_mistakes_are_named(values, words):
    with pytest.raises(UserError, match=words):
        validate(AugmentConfig, values, "test")


def bomb(kind):
    """A small file that announces 20,000 x 20,000 pixels."""
    if kind == "PNG":
        data = bytearray(ENCODED["rgb"])
        data[16:24] = pack(">II", 20_000, 20_000)
        data[29:33] = pack(">I", zlib.crc32(data[12:29]))
        return bytes(data)
    if kind in ("GIF", "BMP"):
        data, (place, layout) = bytearray(encode(IMAGE, kind)), {"GIF": (6, "<HH"), "BMP": (18, "<ii")}[kind]
        data[place : place + calcsize(layout)] = pack(layout, 20_000, 20_000)
        return bytes(data)
    if kind == "JPEG":
        data = encode(IMAGE, kind)
        place = data.index(b"\xff\xc0") + 5
        return data[:place] + pack(">HH", 20_000, 20_000) + data[place + 4 :]
    data = bytearray(encode(RGBA, "WEBP"))
    assert data[12:16] == b"VP8X"
    data[24:30] = (19_999).to_bytes(3, "little") * 2
    return bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "JPEG", "WEBP"])
def test_bombs_by_pixels_are_refused_before_they_are_decoded(kind):
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        BadImage, match=r"^x: does not decode \(20000 x 20000 pixels, of which 89,478,485 may be"
    ):
        decode_image(bomb(kind), "x")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - usage < 100_000  # KB


def test_what_is_no_image_is_told_by_its_first_bytes():
    for data, words in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer.* git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "41 bytes that are no JPEG, PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no JPEG, PNG"),
        (b"8BPS\0\1" + bytes(60), "no JPEG, PNG"),
        (b"P6 2 2 255\n" + bytes(12), "no JPEG, PNG"),
        (b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 1 +X 1\n" + bytes(4), "no JPEG, PNG"),
        (encode(IMAGE, "TIFF"), "a TIFF, .*: make it a PNG"),
        (bytes(1000), "1000 bytes that are no"),
        (ENCODED["webp"][:-9], "a WebP of .* it is cut off"),
        (ENCODED["rgb"][:20], "cut off"),
    ):
        with pytest.raises(BadImage, match=rf"^x: does not decode \(.*{words}"):
            decode_image(data, "x")


def test_what_is_appended_to_a_webp_is_not_looked_at():
    for more in (b"\0", b"\r\n", b"more"):
        assert np.array_equal(decode_image(ENCODED["webp"] + more), decode_image(ENCODED["webp"]))


def test_jpegs_whose_structure_is_broken_are_refused():
    """OpenCV makes gray, or other, pixels of these without a word."""
    photo = Image.fromarray(smooth_image(40, 30))
    whole, progressive = encode(photo, "JPEG", quality=95), encode(photo, "JPEG", progressive=True)
    restarts = encode(photo, "JPEG", restart_marker_blocks=1)
    start = whole.index(b"\xff\xda")
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    for data in (
        whole,
        progressive,
        restarts,
        whole + b"\0\xff\xd8 a thumbnail",
        whole[:-2] + b"\xff\xff\xd9",
    ):
        assert decode_image(data).shape == (40, 30, 3)
    for data, words in (
        (whole[: start + 60] + b"\xff\xb7\xff\0" + whole[start + 64 :], "a marker 0xb7 in its pixels"),
        (whole[:-2] + whole[start:], "of more scans than it may have"),
        (progressive[:-2] + scan * 200 + b"\xff\xd9", "of more scans than it may have"),
        (whole[:-40], "without its end"),
        (whole[:start] + b"\xff\xd9", "without pixels"),
        (whole[:20] + b"?" + whole[21:], "without a marker at byte 20"),
    ):
        with pytest.raises(BadImage, match=rf"^x: does not decode \(.*{words}"):
            decode_image(data, "x")


def test_first_image_of_several_is_read():
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (decode_image(data) == (255, 0, 0)).all()


def test_pil_images_that_cannot_be_read_are_named():
    data = encode(Image.fromarray(smooth_image(40, 30)), "JPEG")
    big = Image.new("1", (20_000, 5_000))
    for image, words in (
        (Image.open(io.BytesIO(data[:-80])), "does not decode"),
        (Image.fromarray(np.ones((4, 4), np.float32)), "does not decode .*mode F"),
        (big, "20000 x 5000 pixels"),
    ):
        with pytest.raises(BadImage, match=f"^x: {words}"):
            load_image(image, "x")
    # the orientation, which is a number, as text
    exif = b"Exif\0\0II*\0" + pack("<IHHHI4sI", 8, 1, 0x112, 2, 4, b"six\0", 0)
    odd = Image.open(io.BytesIO(encode(IMAGE, "PNG", exif=exif)))
    assert (load_image(odd) == RGB).all()
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16", "CMYK"):
        assert load_image(Image.new(mode, (5, 4))).shape == (4, 5, 3)


def test_images_are_read_from_files_alone(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero", tmp_path):
        with pytest.raises(BadImage, match=f"^{path}: "):
            load_image(path)
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate((1 << 28) + 1)
    with pytest.raises(BadImage, match="large.png: 268,435,457 bytes, of which an image may have"):
        load_image(tmp_path / "large.png")
    store = open_images(tmp_path)
    for name in ("pipe", "large"):
        with pytest.raises(BadImage, match=f"{name}.png: "):
            store.read(name)
    (tmp_path / "large.png").unlink()
    with pytest.raises(BadImage, match=r"large.png: gone since the run began"):
        store.read("large")


# ---- which way is up

ORIENTATIONS = range(1, 9)
PHOTO = Image.fromarray(smooth_image(32, 48))


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif


def upright_by_pillow(data):
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def png_with(chunks, after=False, image=PHOTO):
    """A PNG with more chunks [(kind, content)] before its pixels, or after."""
    data = encode(image)
    place = data.index(b"IEND") - 4 if after else data.index(b"IDAT") - 4
    more = b"".join(
        pack(">I", len(content)) + kind + content + pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    return data[:place] + more + data[place:]


def raw_profile(exif):
    return b"\nexif\n%8d\n" % len(exif) + "\n".join(re.findall(".{1,72}", exif.hex())).encode() + b"\n"


def xmp_of(orientation, quote=b'"'):
    return b'<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>' % orientation


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {"quality": 90}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "L", {"progressive": True}),
        ("PNG", "RGB", {}),
        ("PNG", "P", {}),
        ("PNG", "L", {}),
        ("PNG", "LA", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("WEBP", "RGB", {"quality": 80}),
        ("AVIF", "RGB", {"quality": 90}),
        ("AVIF", "RGBA", {"quality": 90}),
    ],
)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_images_of_all_kinds_are_upright_as_pillow_has_them(kind, mode, options, orientation):
    data = encode(PHOTO.convert(mode), kind, exif=exif_of(orientation), **options)
    expected, got = upright_by_pillow(data), decode_image(data)
    assert got.shape == expected.shape == ((48, 32, 3) if orientation > 4 else (32, 48, 3))
    tolerance = {"CMYK": 1, "RGBA": 1}.get(mode, 0) if kind != "WEBP" or mode == "RGBA" else 2
    assert np.abs(got - expected.astype(int)).max() <= tolerance and got.flags["C_CONTIGUOUS"]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_orientation_is_found_wherever_a_png_has_it(orientation):
    exif = exif_of(orientation).tobytes()[6:]
    profile = raw_profile(exif)
    for data in (
        png_with([(b"eXIf", exif)]),
        png_with([(b"eXIf", exif)], after=True),
        png_with([(b"tEXt", b"Raw profile type exif\0" + profile)]),
        png_with([(b"tEXt", b"Raw profile type exif\0" + raw_profile(b"Exif\0\0" + exif))]),
        png_with([(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile))]),
        png_with([(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp_of(orientation))]),
        png_with([(b"iTXt", b"XML:com.adobe.xmp\0\1\0en\0x\0" + zlib.compress(xmp_of(orientation)))]),
    ):
        assert np.array_equal(decode_image(data), upright_by_pillow(data))
    # of two, the chunk counts, and EXIF before XMP
    both = png_with(
        [(b"eXIf", exif), (b"tEXt", b"Raw profile type exif\0" + raw_profile(exif_of(3).tobytes()))]
    )
    assert np.array_equal(decode_image(both), upright_by_pillow(both))
    other = png_with([(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp_of(6)), (b"eXIf", exif)])
    assert np.array_equal(decode_image(other), upright_by_pillow(other))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_orientation_is_found_in_xmp_and_in_either_byte_order(orientation):
    for kind in ("JPEG", "WEBP"):
        data = encode(PHOTO, kind, xmp=xmp_of(orientation), quality=100)
        assert np.abs(decode_image(data) - upright_by_pillow(data).astype(int)).max() <= 2
    for order, magic in ((">", b"MM\0*"), ("<", b"II*\0")):
        # the types of whole numbers; a byte without a sign is text to Pillow, which turns nothing then
        for kind, code in ((1, "B3x"), (3, "H2x"), (4, "I"), (6, "b3x"), (8, "h2x"), (9, "i")):
            value = pack(order + code, orientation)
            entries = (
                pack(order + "HHI4s", 0x10F, 2, 4, b"ab\0\0") + pack(order + "HHI", 0x112, kind, 1) + value
            )
            exif = magic + pack(order + "IH", 8, 2) + entries + bytes(4)
            data = png_with([(b"eXIf", exif)])
            assert np.array_equal(decode_image(data), upright_by_pillow(data))


def test_damaged_exif_leaves_an_image_as_it_is():
    good = exif_of(6).tobytes()[6:]
    for exif in (b"", b"II", good[:9], good[:14], b"XX*\0" + good[4:], good[:4] + b"\xff" * 4, b"Exif\0\0"):
        assert np.array_equal(decode_image(png_with([(b"eXIf", exif)])), np.asarray(PHOTO))
    for value in (0, 9, 65535):  # no orientation that there is
        data = encode(PHOTO, exif=exif_of(value))
        assert np.array_equal(decode_image(data), np.asarray(PHOTO))
    text = (b"tEXt", b"Raw profile type exif\0\nexif\n  9\nno hex\n")
    assert np.array_equal(decode_image(png_with([text])), np.asarray(PHOTO))
    bomb = (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(1 << 26)))
    assert np.array_equal(decode_image(png_with([bomb])), np.asarray(PHOTO))


@pytest.mark.parametrize("bits", [10, 12])
def test_deep_avifs_keep_their_brightness(bits):
    deep = (np.asarray(PHOTO).astype(np.uint16) << (bits - 8)) + (1 << (bits - 9))
    options = [cv2.IMWRITE_AVIF_DEPTH, bits, cv2.IMWRITE_AVIF_QUALITY, 100]
    data = cv2.imencode(".avif", deep[..., ::-1], options)[1].tobytes()
    assert np.abs(decode_image(data) - np.asarray(PHOTO).astype(int)).max() <= 2


def test_pil_images_are_upright_and_of_the_limit():
    for orientation in ORIENTATIONS:
        data = encode(PHOTO, exif=exif_of(orientation))
        assert np.array_equal(load_image(Image.open(io.BytesIO(data))), decode_image(data))
    with pytest.raises(BadImage, match="x: 48 x 32 pixels, of which 1,535 may be .max_pixels."):
        load_image(PHOTO, "x", max_pixels=1535)
    with pytest.raises(BadImage, match="48 x 32 pixels, of which 1,535 may be .max_pixels."):
        load_image(encode(PHOTO, "JPEG"), "x", max_pixels=1535)
    assert load_image(encode(PHOTO, "JPEG"), max_pixels=1536).shape == (32, 48, 3)


# ---- ALBEF's augmentation

# of what ALBEF's public randaugment.py makes of `photo()` at magnitude 7; recorded by running it
ALBEF_DIGESTS = {
    ("identity", 1): "7ebb4beb22117947",
    ("identity", -1): "7ebb4beb22117947",
    ("autocontrast", 1): "a1c8dd6dcc198c08",
    ("autocontrast", -1): "a1c8dd6dcc198c08",
    ("equalize", 1): "9f2c4424816c5912",
    ("equalize", -1): "9f2c4424816c5912",
    ("brightness", 1): "7c30f6b68cf46859",
    ("brightness", -1): "7c30f6b68cf46859",
    ("sharpness", 1): "2837e2a1d383e479",
    ("sharpness", -1): "2837e2a1d383e479",
    ("shear_x", 1): "5cead2643666c1d0",
    ("shear_x", -1): "0bd1daa4237438f4",
    ("shear_y", 1): "b1b5203ef8dc2956",
    ("shear_y", -1): "088f71ce904021f2",
    ("translate_x", 1): "59ef4e2ad60084a5",
    ("translate_x", -1): "d5ec3eee66fb576f",
    ("translate_y", 1): "cc6f4d7000a4ee90",
    ("translate_y", -1): "2b15c23403566ee0",
    ("rotate", 1): "bee8b7ce8a36c34d",
    ("rotate", -1): "21968677239bd6bc",
}


def photo():
    """A real one, without black."""
    return np.maximum(load_sample_image("flower.jpg")[100:400, 200:520], 12)


@pytest.mark.parametrize(("name", "sign"), ALBEF_DIGESTS)
def test_operations_equal_those_of_albef_to_the_byte(name, sign):
    changed = apply_operation(photo(), name, AugmentConfig.albef(0.5), sign)
    assert hashlib.sha256(changed.tobytes()).hexdigest()[:16] == ALBEF_DIGESTS[name, sign]


@pytest.mark.parametrize("magnitude", [0, 7, 10])
def test_operations_without_overflow_equal_those_of_pillow(magnitude):
    config, image = AugmentConfig(randaugment="pil", magnitude=magnitude), Image.fromarray(photo())
    factor = magnitude / 10 * 1.8 + 0.1
    expected = {
        "autocontrast": ImageOps.autocontrast(image),
        "equalize": ImageOps.equalize(image),
        "brightness": ImageEnhance.Brightness(image).enhance(factor),
    }
    for name, other in expected.items():
        assert np.array_equal(apply_operation(photo(), name, config, 1), np.asarray(other))
    sharp = np.asarray(ImageEnhance.Sharpness(image).enhance(factor))
    got = apply_operation(photo(), "sharpness", config, 1)
    assert np.array_equal(got[1:-1, 1:-1], sharp[1:-1, 1:-1])  # ALBEF's leaves the border as it is


def test_crop_of_albef_is_a_bicubic_one_of_torchvisions_boxes():
    config = AugmentConfig.albef(0.5, operations=0, flip=0)
    draws = np.random.default_rng(3).random((300, count_uniforms(config)))
    shares = []
    for row in draws:
        box = crop_box(300, 320, config, [*row[:2], *row[9:27]], *row[2:4])
        left, top, width, height = box
        assert 0 <= left <= 320 - width and 0 <= top <= 300 - height
        shares.append(width * height / (300 * 320))
        assert 0.74 < width / height < 1.35
    assert 0.49 < min(shares) < 0.52 and 0.95 < max(shares) <= 1
    part = Image.fromarray(photo()).crop((left, top, left + width, top + height))
    expected = np.asarray(part.resize((64, 64), Image.Resampling.BICUBIC))
    assert np.array_equal(augment_image(photo(), 64, config, row), expected)
    # no box of such an aspect fits: its centre, as wide as allowed
    assert crop_box(30, 300, config, [0.99, 0.5] * 10, 0, 0) == (130, 0, 40, 30)
    assert crop_box(300, 30, config, [0.99, 0.5] * 10, 0, 0) == (0, 130, 30, 40)


def test_operations_of_albef_are_applied_to_half_of_the_images_in_both_directions():
    config = AugmentConfig.albef(1.0, operations=1, choices=("rotate",), flip=0.5, ratio=(1, 1))
    image, kinds = photo()[:300, :300], Counter()
    ways = {}
    for sign in (1, -1):
        for flipped in (False, True):
            start = np.ascontiguousarray(image[:, ::-1]) if flipped else image
            ways[apply_operation(start, "rotate", config, sign).tobytes()] = (flipped, sign)
            ways[start.tobytes()] = (flipped, 0)
    for row in np.random.default_rng(0).random((400, count_uniforms(config))):
        kinds[ways[augment_image(image, 300, config, row).tobytes()]] += 1
    for flipped in (False, True):
        assert 75 < kinds[flipped, 0] < 125 and all(30 < kinds[flipped, sign] < 70 for sign in (1, -1))


def test_images_whose_texts_tell_left_from_right_are_not_flipped():
    config = AugmentConfig.albef(0.5, flip=1.0, flip_unless=("left", "right"))
    draws = np.zeros((4, count_uniforms(config)))
    forbid_flips(config, draws, [["what is this", "cat"], ["the left one?"], ["why", "right"], ["leftovers"]])
    assert draws[:, FLIP].tolist() == [0, 1, 1, 1]


def test_operations_that_albef_lacks_are_refused():
    with pytest.raises(UserError, match="randaugment=albef has no hue; it has: autocontrast, brightness"):
        validate(AugmentConfig, {"randaugment": "albef", "choices": ["rotate", "hue"]}, "test")

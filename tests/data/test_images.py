"""Pictures of every odd kind come out as the upright RGB that they show."""

from __future__ import annotations

import io
import math
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from finetune.data.shards import Bucket, images
from finetune.data.shards.images import PictureError, cut_out, decode_rgb, picture_format
from tests.conftest import ROOT
from tests.data_tools.conftest import encoded, smooth_picture

PICTURE = smooth_picture(0, 24, 40)
# EXIF orientation -> what undoes the turn: the stored picture is the upright one under its inverse.
STORED = {
    1: lambda image: image,
    2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
    4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
    7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
}


def pixels(data: bytes, **options: tuple[int, int, int]) -> np.ndarray:
    image = decode_rgb(data, **options)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("orientation", sorted(STORED))
def test_exif_rotation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(STORED[orientation](PICTURE), exif=exif)
    np.testing.assert_array_equal(pixels(data), np.asarray(PICTURE))
    assert picture_format(data) == ("png", (24, 40))


def test_alpha_is_flattened_on_the_background() -> None:
    rgba = PICTURE.convert("RGBA")
    alpha = np.zeros((24, 40), np.uint8)
    alpha[:, :10], alpha[:, 10:20] = 255, 128
    rgba.putalpha(Image.fromarray(alpha))
    want = np.asarray(PICTURE).astype(float)
    for background in ((255, 255, 255), (10, 200, 30)):
        got = pixels(encoded(rgba), background=background)
        np.testing.assert_array_equal(got[:, :10], want[:, :10])
        mixed = (want[:, 10:20] * 128 + np.asarray(background) * 127) / 255
        np.testing.assert_allclose(got[:, 10:20], mixed, atol=1)
        assert (got[:, 20:] == background).all()


def test_palette_and_grey_transparency() -> None:
    palette = Image.new("P", (4, 2), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.paste(1, (2, 0, 4, 2))
    got = pixels(encoded(palette, transparency=1), background=(0, 255, 0))
    assert (got[:, :2] == (255, 0, 0)).all()
    assert (got[:, 2:] == (0, 255, 0)).all()
    grey = Image.merge("LA", (Image.new("L", (2, 2), 100), Image.new("L", (2, 2), 0)))
    assert (pixels(encoded(grey)) == 255).all()


def test_cmyk() -> None:
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # magenta and yellow make red
    got = pixels(encoded(cmyk, "JPEG", quality=100))
    np.testing.assert_allclose(got, np.broadcast_to((255, 0, 0), got.shape), atol=6)
    assert pixels(encoded(cmyk, "TIFF"))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind: str) -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    got = pixels(encoded(Image.fromarray(values), kind))
    np.testing.assert_allclose(got[..., 0], values / 257, atol=0.5)
    assert (got[..., 0] == got[..., 2]).all()


def test_float_pictures() -> None:
    values = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    np.testing.assert_allclose(pixels(encoded(Image.fromarray(values), "TIFF"))[..., 1], values * 255, atol=0.5)
    with pytest.raises(PictureError, match=r"outside \[0, 1\]"):
        decode_rgb(encoded(Image.fromarray(values * 300), "TIFF"))


def test_colour_profiles_are_converted() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(pixels(encoded(PICTURE, icc_profile=srgb)), np.asarray(PICTURE))
    # A profile of another colour space, or a broken one, is ignored.
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for profile in (lab, b"broken"):
        np.testing.assert_array_equal(pixels(encoded(PICTURE, icc_profile=profile)), np.asarray(PICTURE))


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert pixels(data)[0, 0].tolist() == [255, 0, 0], kind
        assert picture_format(data)[0] is None, kind


def _bomb() -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no picture",
        encoded(PICTURE)[:200],
        encoded(PICTURE, "JPEG")[:400],
        encoded(PICTURE, "WEBP")[:60],
        _bomb(),
    ],
    ids=["empty", "text", "png", "jpg", "webp", "bomb"],
)
def test_damage_is_a_picture_error_with_a_reason(data: bytes) -> None:
    with pytest.raises(PictureError, match=r"\w"):
        decode_rgb(data)


@given(st.data())
def test_flipped_bytes_never_raise_anything_else(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]))
    raw = bytearray(encoded(PICTURE, kind))
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert decode_rgb(bytes(raw)).mode == "RGB"
    except PictureError:
        pass


@given(*[st.integers(1, 300)] * 2, *[st.integers(1, 64)] * 2)
def test_a_cut_covers_and_crops_the_centre(height: int, width: int, target_h: int, target_w: int) -> None:
    image, (resized_h, resized_w), (top, left, crop_h, crop_w) = cut_out(
        Image.new("L", (width, height)), (height, width), (target_h, target_w)
    )
    assert image.size == (target_w, target_h) == (crop_w, crop_h)
    assert top == (resized_h - target_h) // 2
    assert left == (resized_w - target_w) // 2
    assert resized_h == target_h or resized_w == target_w  # one side fits, the other is cropped
    scale = max(target_h / height, target_w / width)
    assert abs(resized_h - height * scale) <= 1
    assert abs(resized_w - width * scale) <= 1


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("place", [(0.5, 0.5), (0.3, 0.8), (0.0, 0.999)])
@pytest.mark.parametrize("resampling", [Image.Resampling.LANCZOS, Image.Resampling.NEAREST])
def test_a_strip_is_cut_as_any_picture_without_making_all_of_it_large(
    monkeypatch: pytest.MonkeyPatch, flipped: bool, place: tuple[float, float], resampling: Image.Resampling
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3000,), np.uint8)
    resize = Image.Image.resize
    for shape, bucket in (((1, 3000), (64, 48)), ((2, 900), (96, 64)), ((3000, 1), (48, 64)), ((40, 50), (20, 10))):
        image = Image.fromarray(np.resize(noise, shape))
        want, *places = cut_out(image, shape, bucket, place, flipped, resampling)

        def bounded(self: Image.Image, size: tuple[int, int], *rest: Any, bucket: Bucket = bucket) -> Image.Image:
            assert size[0] * size[1] <= bucket[0] * bucket[1]
            return resize(self, size, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(images, "MAX_PIXELS", bucket[0] * bucket[1])
            patch.setattr(Image.Image, "resize", bounded)
            got, *got_places = cut_out(image, shape, bucket, place, flipped, resampling)
        assert got_places == places
        np.testing.assert_allclose(np.asarray(got).astype(int), np.asarray(want), atol=2)


def test_a_cut_keeps_the_pixels_of_a_picture_that_only_needs_a_crop() -> None:
    image, resized, crop = cut_out(PICTURE, (24, 40), (24, 20))
    assert (resized, crop) == ((24, 40), [0, 10, 24, 20])
    np.testing.assert_array_equal(np.asarray(image), np.asarray(PICTURE)[:, 10:30])


def test_truncated_files_are_not_half_decoded() -> None:
    whole = encoded(smooth_picture(1, 64, 64), "JPEG")
    for cut in range(30, len(whole) - 2, 97):
        with pytest.raises(PictureError):
            decode_rgb(whole[:cut])
    assert Image.open(io.BytesIO(whole)).size == (64, 64)


# Real encoders' odd files


def big_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(values_HWC: np.ndarray, *, extra: bytes = b"", end: bytes = b"") -> bytes:
    """A PNG of uint8 or uint16 values with 1 to 4 channels: Pillow writes no 16-bit colours."""
    height, width, channels = values_HWC.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, values_HWC.dtype.itemsize * 8, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(values_HWC.dtype.newbyteorder(">")).tobytes() for row in values_HWC)
    parts = big_chunk(b"IHDR", header) + extra + big_chunk(b"IDAT", zlib.compress(rows)) + end
    return b"\x89PNG\r\n\x1a\n" + parts + big_chunk(b"IEND", b"")


def tiff(values_HWC: np.ndarray, sample_format: int = 1) -> bytes:
    """An uncompressed TIFF of one strip: Pillow writes neither 16-bit nor float colours."""
    height, width, channels = values_HWC.shape
    bits = values_HWC.dtype.itemsize * 8
    raw = values_HWC.astype(values_HWC.dtype.newbyteorder("<")).tobytes()
    rows = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, channels, bits), (259, 3, 1, 1)]
    rows += [(262, 3, 1, 2 if channels >= 3 else 1), (273, 4, 1, 8), (277, 3, 1, channels), (278, 4, 1, height)]
    rows += [(279, 4, 1, len(raw)), (339, 3, channels, sample_format)]
    extra = b""
    after = 8 + len(raw) + 2 + 12 * len(rows) + 4
    ifd = struct.pack("<H", len(rows))
    for tag, kind, count, value in rows:
        if count > 2:  # an array of equal numbers, after the directory
            ifd += struct.pack("<HHII", tag, kind, count, after + len(extra))
            extra += struct.pack(f"<{count}H", *[value] * count)
        elif kind == 3:
            ifd += struct.pack("<HHI", tag, kind, count) + struct.pack("<2H", value, value if count > 1 else 0)
        else:
            ifd += struct.pack("<HHII", tag, kind, count, value)
    return b"II*\0" + struct.pack("<I", 8 + len(raw)) + raw + ifd + bytes(4) + extra


def icc(space: bytes, tags: dict[bytes, bytes], pcs: bytes = b"XYZ ", kind: bytes = b"mntr") -> bytes:
    """An ICC version 2 profile (ICC.1:2001-04) with these tags."""
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = start + len(body)
    head = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x02400000, kind, space, pcs)
    head += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + xyz(*D50)[8:]
    return head.ljust(128, b"\0") + table + body


D50 = (0.9642, 1.0, 0.8249)


def xyz(x: float, y: float, z: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in (x, y, z)))


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


# Columns are the primaries' XYZ under D50.
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])


def rgb_profile(primaries: np.ndarray, exponent: float) -> bytes:
    tags = {b"wtpt": xyz(*D50)}
    for column, name in enumerate((b"r", b"g", b"b")):
        tags[name + b"XYZ"] = xyz(*primaries[:, column])
        tags[name + b"TRC"] = gamma(exponent)
    return icc(b"RGB ", tags)


def srgb_curve(linear: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1: linear [0, 1] to 8-bit sRGB."""
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("name", ["adobe", "p3"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_rgb_profiles_against_the_formula(name: str, kind: str) -> None:
    primaries, exponent = {"adobe": (ADOBE, 563 / 256), "p3": (P3, 2.2)}[name]
    colours = np.array([(200, 60, 60), (60, 160, 60), (90, 90, 200), (128, 128, 128), (250, 240, 10)], np.uint8)
    profile = rgb_profile(primaries, exponent)
    for colour in colours:
        image = Image.fromarray(np.broadcast_to(colour, (16, 16, 3)).copy())
        options = {"quality": 100} if kind in ("JPEG", "AVIF") else {"lossless": True} if kind == "WEBP" else {}
        data = encoded(image, kind, icc_profile=profile, **options)
        exact = round(exponent * 256) / 256
        want = srgb_curve(np.linalg.inv(SRGB) @ primaries @ (colour / 255.0) ** exact)
        np.testing.assert_allclose(pixels(data)[8, 8], want, atol=4 if kind in ("JPEG", "AVIF") else 2)


def test_grey_pictures_with_profiles() -> None:
    values = np.tile(np.arange(0, 256, 5, np.uint8), (4, 1))
    grey = Image.fromarray(values)
    old_mac = icc(b"GRAY", {b"wtpt": xyz(*D50), b"kTRC": gamma(1.8)})
    want = np.repeat(srgb_curve((values / 255.0) ** (461 / 256))[..., None], 3, axis=2)
    np.testing.assert_allclose(pixels(encoded(grey, icc_profile=old_mac)), want, atol=2)
    opaque = Image.merge("LA", (grey, Image.new("L", grey.size, 255)))
    np.testing.assert_allclose(pixels(encoded(opaque, icc_profile=old_mac)), want, atol=2)
    sixteen = Image.fromarray(values.astype(np.uint16) * 257)
    np.testing.assert_allclose(pixels(encoded(sixteen, icc_profile=old_mac)), want, atol=2)
    # An RGB profile on a grey picture: grey in that space.
    adobe = rgb_profile(ADOBE, 2.2)
    want = np.repeat(srgb_curve((values / 255.0) ** (563 / 256))[..., None], 3, axis=2)
    np.testing.assert_allclose(pixels(encoded(grey, icc_profile=adobe)), want, atol=2)
    # A grey profile on a picture in colour says nothing.
    np.testing.assert_array_equal(pixels(encoded(PICTURE, icc_profile=old_mac)), np.asarray(PICTURE))


def test_cmyk_profiles_are_used() -> None:
    """A press whose cyan ink is green: only its profile knows."""
    corners = bytearray()
    for c, m, y, k in np.ndindex(2, 2, 2, 2):
        light = 0 if k else 255
        lab = (0, 128, 128) if k else (224, 128 - 79, 128 + 81) if (c, m, y) == (1, 0, 0) else (light, 128, 128)
        corners += bytes(lab)
    ramp = bytes(range(256))
    identity = struct.pack(">9i", *(65536 * (i in (0, 4, 8)) for i in range(9)))
    table = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + identity + ramp * 4 + bytes(corners) + ramp * 3
    profile = icc(b"CMYK", {b"A2B0": table, b"wtpt": xyz(*D50)}, pcs=b"Lab ", kind=b"prtr")
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    for kind in ("TIFF", "JPEG"):
        plain = pixels(encoded(cyan, kind))[8, 8]
        got = pixels(encoded(cyan, kind, icc_profile=profile))[8, 8]
        np.testing.assert_allclose(plain, (0, 255, 255), atol=4)
        assert got[1] > 200 and got[0] < 90 and got[2] < 90, got
    black = Image.new("CMYK", (16, 16), (0, 0, 0, 255))
    np.testing.assert_allclose(pixels(encoded(black, "TIFF", icc_profile=profile))[8, 8], 0, atol=3)


def test_ycck_jpeg() -> None:
    """Adobe's YCCK: inverted inks, negated, as YCbCr. Made of a CMYK file by its marker's transform flag."""
    picture = PICTURE.resize((64, 64))
    ycc = ImageOps.invert(picture).convert("YCbCr")
    black = Image.new("L", (64, 64), 255)
    # Pillow inverts what it writes as CMYK; the file then holds the values as they are here.
    planes = [plane.point(lambda v: 255 - v) for plane in (*ycc.split(), black)]
    data = bytearray(encoded(Image.merge("CMYK", planes), "JPEG", quality=100))
    flag = data.index(b"Adobe") + 11
    assert data[flag] == 0
    data[flag] = 2
    with Image.open(io.BytesIO(bytes(data))) as image:
        assert image.mode == "CMYK"
    assert np.abs(pixels(bytes(data)) - np.asarray(picture).astype(int)).mean() < 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", sorted(STORED))
def test_exif_rotation_of_every_format(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = smooth_picture(3, 48, 80)
    options = {"lossless": True} if kind == "WEBP" else {} if kind in ("PNG", "TIFF") else {"quality": 95}
    data = encoded(STORED[orientation](picture), kind, exif=exif, **options)
    assert np.abs(pixels(data) - np.asarray(picture).astype(int)).mean() < 3
    assert picture_format(data)[1] == (48, 80)
    assert decode_rgb(data).info == {"original_size": (48, 80)}


def test_exif_behind_the_pixels_of_a_png_is_found_without_decoding() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    late = big_chunk(b"eXIf", exif.tobytes()[6:])
    stored = STORED[6](PICTURE)
    data = png(np.asarray(stored), end=late)
    np.testing.assert_array_equal(pixels(data), np.asarray(PICTURE))
    assert picture_format(data) == ("png", (24, 40))
    broken = bytearray(data)
    start = data.index(b"IDAT") + 4
    broken[start : start + 10] = b"\xff" * 10
    assert picture_format(bytes(broken)) == ("png", (24, 40))


def test_damaged_exif_costs_no_picture() -> None:
    for garbage in (
        b"",
        b"Exif\0\0",
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 40,
    ):
        for kind in ("JPEG", "PNG", "WEBP"):
            data = encoded(PICTURE, kind, exif=garbage)
            assert decode_rgb(data).size == (40, 24)
            assert picture_format(data)[1] == (24, 40)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("form", [png, tiff])
def test_sixteen_bit_colours(channels: int, form: Callable[[np.ndarray], bytes]) -> None:
    if form is tiff and channels in (2, 4):
        pytest.skip("these need the tag of extra samples")
    values = np.random.default_rng(channels).integers(0, 65536, (6, 7, channels)).astype(np.uint16)
    want = np.repeat(values[..., :1], 3, axis=2) / 257 if channels < 3 else values[..., :3] / 257
    if channels in (2, 4):
        alpha = values[..., -1:] / 65535
        want = want * alpha + 255 * (1 - alpha)
    np.testing.assert_allclose(pixels(form(values)), want, atol=2)


def test_sixteen_bit_transparent_colours() -> None:
    for values, chunk in (
        (np.full((4, 5, 1), 1000, np.uint16), struct.pack(">H", 5000)),
        (np.full((4, 5, 3), 1000, np.uint16), struct.pack(">3H", 5000, 5000, 5000)),
    ):
        values[0, 0] = 5000
        got = pixels(png(values, extra=big_chunk(b"tRNS", chunk)), background=(1, 2, 3))
        assert got[0, 0].tolist() == [1, 2, 3]
        np.testing.assert_allclose(got[1:], 1000 / 257, atol=1)


def test_float_colours_are_refused_with_a_reason() -> None:
    data = tiff(np.ones((4, 4, 3), np.float32), sample_format=3)
    with pytest.raises(PictureError, match=r"\w"):
        decode_rgb(data)


def test_small_modes() -> None:
    bits = Image.fromarray(np.eye(8, dtype=bool))
    for data in (encoded(bits), encoded(bits, "TIFF", compression="group4"), encoded(bits, "GIF")):
        np.testing.assert_array_equal(pixels(data)[..., 1], np.eye(8) * 255)
    lab = ImageCms.profileToProfile(
        PICTURE, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert np.abs(pixels(encoded(lab, "TIFF")) - np.asarray(PICTURE)).mean() < 12  # Pillow's own conversion


def test_strips_pages_and_trailing_bytes() -> None:
    assert decode_rgb(encoded(Image.new("RGB", (1, 5000)))).size == (1, 5000)
    assert decode_rgb(encoded(Image.new("RGB", (65500, 1)), "JPEG")).size == (65500, 1)
    blue = Image.new("RGB", (8, 8), "blue")
    for kind in ("TIFF", "MPO"):
        data = encoded(PICTURE, kind, save_all=True, append_images=[blue])
        assert picture_format(data) == (None, (24, 40))
        np.testing.assert_allclose(pixels(data), np.asarray(PICTURE), atol=40)
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encoded(PICTURE, kind)
        np.testing.assert_array_equal(pixels(data + b"\0garbage\xff\xd9" * 999), pixels(data))
    for options in ({"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 1}):
        assert np.abs(pixels(encoded(PICTURE, "JPEG", quality=95, **options)) - np.asarray(PICTURE)).mean() < 4


def test_what_is_no_picture_is_named() -> None:
    for data, reason in (
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"\n<!DOCTYPE html><title>404</title>", "web page"),
        (encoded(PICTURE, "JPEG2000"), "JPEG 2000"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "known format"),
        (png(np.zeros((4, 0, 3), np.uint8)), r"\w"),
        (png(np.zeros((0, 4, 3), np.uint8)), r"\w"),
    ):
        for read in (decode_rgb, picture_format):
            with pytest.raises(PictureError, match=reason):
                read(data)


# Bounded memory


def jpeg_of(height: int, width: int, **options: object) -> bytes:
    return encoded(smooth_picture(5, 64, 64).resize((width, height)), "JPEG", **options)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_above_the_limit_is_reduced(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg_of(600, 1000, exif=exif)
    sides = (600, 1000) if orientation == 1 else (1000, 600)
    full = decode_rgb(data)
    assert full.size == sides[::-1]
    for limit, scale in ((600_000, 1), (599_999, 2), (150_000, 2), (149_999, 4), (37_500, 4), (10_000, 8)):
        small = decode_rgb(data, max_pixels=limit)
        assert small.size == (math.ceil(sides[1] / scale), math.ceil(sides[0] / scale))
        assert small.info["original_size"] == sides == picture_format(data)[1]
        # What the resize to that size would give, but for the filter's edges.
        want = np.asarray(full.resize(small.size, Image.Resampling.BOX)).astype(int)
        assert np.abs(np.asarray(small) - want).mean() < 4
    with pytest.raises(PictureError, match=r"x\d+ is 1 megapixels, the limit is 0"):
        decode_rgb(data, max_pixels=9_000)


@given(*[st.integers(1, 700)] * 2, *[st.integers(1, 300)] * 2)
@settings(max_examples=60)
def test_a_reduced_jpeg_has_twice_the_target(height: int, width: int, target_h: int, target_w: int) -> None:
    data = encoded(Image.new("RGB", (width, height)), "JPEG")
    small = decode_rgb(data, at_least=(target_h, target_w))
    if small.size != (width, height):
        assert small.height >= 2 * target_h
        assert small.width >= 2 * target_w
    else:  # a half would have been too small
        assert height < 4 * target_h or width < 4 * target_w


def test_reduced_decoding_gives_nearly_the_same_crop() -> None:
    detail = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    data = encoded(Image.fromarray(detail).resize((960, 640), Image.Resampling.BICUBIC), "JPEG", quality=95)
    small = decode_rgb(data, at_least=(64, 64))
    assert small.size == (240, 160)
    a, b = (
        np.asarray(cut_out(image, (640, 960), (64, 64))[0]).astype(float) for image in (decode_rgb(data), small)
    )
    assert 10 * np.log10(255**2 / ((a - b) ** 2).mean()) > 35  # decibels


def test_only_jpegs_are_reduced() -> None:
    for kind in ("PNG", "WEBP", "GIF", "TIFF", "BMP"):
        data = encoded(PICTURE, kind)
        assert decode_rgb(data, at_least=(2, 2)).size == (40, 24)
        with pytest.raises(PictureError, match="40x24 is 0 megapixels, the limit is 0"):
            decode_rgb(data, max_pixels=40 * 24 - 1)


def test_progressive_jpegs_hold_their_coefficients() -> None:
    """They can be reduced, but libjpeg keeps the whole picture's coefficients: twice the limit is the most."""
    for options, many in (({}, False), ({"progressive": True}, True)):
        data = jpeg_of(400, 400, **options)
        assert decode_rgb(data, max_pixels=80_000).size == (200, 200)
        if many:
            with pytest.raises(PictureError, match="progressive"):
                decode_rgb(data, max_pixels=79_999)
        else:
            assert decode_rgb(data, max_pixels=79_999).size == (200, 200)


_CHILD = """
import resource, sys
from finetune.data.shards.images import BYTES_PER_PIXEL, PictureError, decode_rgb, picture_format
path, limit = sys.argv[1], int(sys.argv[2])
data = open(path, "rb").read()
small = open(sys.argv[3], "rb").read()
decode_rgb(small)  # plugins and codecs are loaded
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
room = int(status["VmSize"].split()[0]) * 1024 + BYTES_PER_PIXEL * limit
resource.setrlimit(resource.RLIMIT_AS, (room, room))
try:
    size = picture_format(data)[1]
    print(size, decode_rgb(data, max_pixels=limit).size)
except PictureError as error:
    print("refused:", error)
"""


def in_bounded_memory(folder: Path, data: bytes, small: bytes, limit: int) -> str:
    (folder / "big").write_bytes(data)
    (folder / "small").write_bytes(small)
    command = [sys.executable, "-c", _CHILD, str(folder / "big"), str(limit), str(folder / "small")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "AVIF", "TIFF", "GIF", "JPEG", "PNG16"])
def test_memory_is_bounded(tmp_path: Path, kind: str) -> None:
    """RLIMIT_AS: what the process has after a small picture, and the bound for the limit's pixels."""
    sides = (2000, 2000)
    picture = Image.linear_gradient("L").resize(sides)
    exif = Image.Exif()
    exif[0x0112] = 6
    options: dict[str, object] = {"exif": exif} if kind in ("PNG", "WEBP", "AVIF", "TIFF", "JPEG") else {}
    if kind == "AVIF":
        options |= {"speed": 10, "max_threads": 1}
    elif kind == "JPEG":
        options |= {"progressive": True, "subsampling": 0}
    if kind == "PNG16":
        values = np.asarray(picture).astype(np.uint16)[..., None] * 257
        data, small = png(values), png(values[:9, :9])
    else:
        rgba = Image.merge("RGBA", (picture,) * 4)
        image = rgba.convert("RGB") if kind in ("GIF", "JPEG") else rgba
        data = encoded(image, kind, **options)
        small = encoded(image.crop((0, 0, 32, 32)), kind)
    limit = sides[0] * sides[1]
    assert in_bounded_memory(tmp_path, data, small, limit) == "(2000, 2000) (2000, 2000)"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_bombs_stay_in_bounds(tmp_path: Path) -> None:
    """Gigapixels in a few kilobytes, text and profiles that unpack to much more than they are."""
    rows = zlib.compress(bytes(30_001 * 1000))
    one_bit = struct.pack(">IIBBBBB", 240_000, 30_000, 1, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + big_chunk(b"IHDR", one_bit) + big_chunk(b"IDAT", rows) + big_chunk(b"IEND", b"")
    small = encoded(PICTURE)
    answer = in_bounded_memory(tmp_path, bomb, small, 1_000_000)
    assert answer == "refused: 240000x30000 is 7,200 megapixels, the limit is 1"
    zeros = zlib.compress(bytes(64 << 20))
    for chunk in (b"zTXt", b"iCCP"):
        data = png(np.asarray(PICTURE), extra=big_chunk(chunk, b"k\0\0" + zeros))
        assert in_bounded_memory(tmp_path, data, small, 1_000_000).startswith(
            "refused: Decompressed data too large"
        )
    wide = bytearray(jpeg_of(16, 16))
    frame = wide.index(b"\xff\xc0")
    wide[frame + 5 : frame + 9] = struct.pack(">HH", 65_000, 65_000)
    assert in_bounded_memory(tmp_path, bytes(wide), jpeg_of(16, 16), 1_000_000).startswith(
        "refused: 65000x65000 is 4,225 megapixels"
    )

"""Pictures of every odd kind come out as the upright RGB that they show."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from data_tools.images import (
    PictureError,
    aspect_table,
    decode_rgb,
    encode_image,
    fit,
    nearest_bucket,
    parse_colour,
    picture_format,
)
from finetune import UserError
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
    np.testing.assert_allclose(pixels(encoded(PICTURE, icc_profile=srgb)), np.asarray(PICTURE), atol=1)
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
def test_fit_covers_and_crops_the_centre(height: int, width: int, target_h: int, target_w: int) -> None:
    image, (resized_h, resized_w), (top, left, crop_h, crop_w) = fit(
        Image.new("L", (width, height)), target_h, target_w
    )
    assert image.size == (target_w, target_h) == (crop_w, crop_h)
    assert top == (resized_h - target_h) // 2
    assert left == (resized_w - target_w) // 2
    assert resized_h == target_h or resized_w == target_w  # one side fits, the other is cropped
    scale = max(target_h / height, target_w / width)
    assert abs(resized_h - height * scale) <= 1
    assert abs(resized_w - width * scale) <= 1


def test_fit_keeps_the_pixels_of_a_picture_that_only_needs_a_crop() -> None:
    image, resized, crop = fit(PICTURE, 24, 20)
    assert (resized, crop) == ((24, 40), [0, 10, 24, 20])
    np.testing.assert_array_equal(np.asarray(image), np.asarray(PICTURE)[:, 10:30])


def test_png_is_lossless_and_unknown_colours_are_refused() -> None:
    np.testing.assert_array_equal(pixels(encode_image(PICTURE, "png")), np.asarray(PICTURE))
    for member in ("webp", "jpg"):
        data = encode_image(PICTURE, member)
        assert picture_format(data) == (member, (24, 40))
        assert np.abs(pixels(data) - np.asarray(PICTURE)).mean() < 3
    assert parse_colour("#ff8000") == (255, 128, 0)
    with pytest.raises(UserError, match="no colour 'whitish'"):
        parse_colour("whitish")


def test_aspect_table_is_sdxls() -> None:
    table = aspect_table(1024, 64)
    # From the table of Podell et al. 2023, appendix I.
    for bucket in [(1024, 1024), (896, 1152), (832, 1216), (768, 1344), (1344, 768), (1216, 832), (1152, 896)]:
        assert bucket in table
    for height, width in table:
        assert height % 64 == width % 64 == 0
        assert height * width <= 1024 * 1024
        assert (height + 64) * width > 1024 * 1024  # no side can grow
        assert height * (width + 64) > 1024 * 1024
        assert (width, height) in table


def test_nearest_bucket_is_the_one_of_nearest_log_aspect() -> None:
    table = aspect_table(512, 64)
    for height, width in table:
        assert nearest_bucket(height * 3, width * 3, table) == (height, width)
    assert nearest_bucket(10, 1000, table) == (384, 640)
    assert nearest_bucket(1000, 10, table) == (640, 384)
    assert nearest_bucket(100, 110, table) == (512, 512)
    assert nearest_bucket(100, 116, table) == (448, 576)  # sqrt(576 / 448) is 1.134
    assert nearest_bucket(1, 1, [(256, 256), (512, 512)]) == (512, 512)


def test_truncated_files_are_not_half_decoded() -> None:
    whole = encoded(smooth_picture(1, 64, 64), "JPEG")
    for cut in range(30, len(whole) - 2, 97):
        with pytest.raises(PictureError):
            decode_rgb(whole[:cut])
    assert Image.open(io.BytesIO(whole)).size == (64, 64)

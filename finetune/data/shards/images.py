"""Decode pictures of any kind to upright 8-bit RGB, and crop them to a bucket.

Rotation by EXIF is applied, colour profiles are converted to sRGB (a profile that is damaged, or for another
kind of picture, is left out), alpha is flattened on a colour; CMYK, palettes, greyscale and pictures of 16
bits or floats are converted; of an animation or of several pages the first is taken. What a PNG or AVIF
says of its colours without a profile (gamma, HDR transfer functions) is not looked at.

Memory is bounded by the header, before anything is decoded: a picture takes at most `BYTES_PER_PIXEL` bytes
for each pixel of the limit, beside its file. A JPEG above the limit is decoded at a half, a quarter or an
eighth of its size; any other picture above it is refused.
"""

from __future__ import annotations

import functools
import io
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageCms

from finetune import first_line
from finetune.data.shards.labels import png_header

FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""Pillow's names of the formats that shards may hold as they are, and the names of their members."""
MAX_PIXELS = 89_478_485
"""Default limit of a decoded picture: 256 MiB at three bytes a pixel."""
BYTES_PER_PIXEL = 24
"""Peak of decoding, for each pixel of the limit: the codec's own buffers (those of WebP and AVIF are largest), the
decoded picture (4 bytes, also for RGB), and a converted or rotated copy. See the test that holds it to this."""

# Only these: Pillow also knows formats that run other programs, need memory without bounds, or no data set has.
_READ = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "PPM")
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_STRIP_ROWS = 256
_PNG_KINDS = {0: "grey", 2: "RGB", 3: "a palette", 4: "grey with alpha", 6: "RGB with alpha"}

# Of Pillow, about odd files. Threads decode, where `warnings.catch_warnings` would lose filters of others.
warnings.filterwarnings("ignore", module=r"PIL\.")


class PictureError(ValueError):
    """A picture that can't be decoded; the text is the reason."""


def decode_rgb(
    data: bytes,
    background: tuple[int, int, int] = (255, 255, 255),
    *,
    max_pixels: int = MAX_PIXELS,
    at_least: tuple[int, int] | None = None,
) -> Image.Image:
    """Decode a picture's bytes to an upright RGB image without metadata.

    A JPEG may come at 1/2, 1/4 or 1/8 of its size, scaled by its own DCT, which is much faster than decoding
    all of it: when it is above `max_pixels`, and when `at_least` allows it. The size of the picture as the
    file has it is then in `picture_format`, and in the image's `info["original_size"]`: upright (height,
    width), always there.

    Args:
        background: what shows through where the picture is transparent.
        max_pixels: the limit of height * width. Memory stays below `BYTES_PER_PIXEL * max_pixels`, beside
            the file.
        at_least: upright (height, width) that the picture will be resized to cover. A reduced JPEG still
            has twice that on both sides, so the resize that follows has the detail to work on.

    Raises:
        PictureError: not a picture, damaged, cut short, or above the limit.
    """
    with _reasons(data):
        image = _open(data)
        orientation = _orientation(image, data)
        width, height = image.size
        original = (width, height) if orientation >= 5 else (height, width)
        _limit(image, data, max_pixels, at_least[::-1] if at_least and orientation >= 5 else at_least)
        # The first tile names the layout of the file: Pillow keeps the high bytes of 16-bit colours only.
        layout = image.tile[0][3] if image.tile else None
        if str(layout[0] if isinstance(layout, tuple) else layout).endswith("16B"):
            key = image.info.get("transparency")
            if isinstance(key, tuple):
                image.info["transparency"] = tuple(value >> 8 for value in key)
        image.load()
        rgb = _flatten(image, background)
        del image
        if orientation in _UPRIGHT:
            rgb = rgb.transpose(_UPRIGHT[orientation])
        rgb.info = {"original_size": original}
        return rgb


def decode_indices(data: bytes, name: str, *, segments: bool = False) -> np.ndarray:
    """The values of an 8-bit grey PNG, or a palette's indices: uint8 [H, W]; no colours, no rotation.

    Args:
        name: what to call it in errors.
        segments: of an RGB PNG, R + 256 G + 65536 B instead, int32 [H, W], as COCO's panoptic format has them.

    Raises:
        PictureError: it is no PNG, of another kind, or damaged. How large it is, the caller has looked at.
    """
    bits, kind = _png_kind(data, name)
    wanted = kind == 2 and bits == 8 if segments else kind == 3 or (kind == 0 and bits == 8)
    if not wanted:
        needed = (
            "RGB, as COCO's panoptic maps are" if segments else "grey, or a palette, with a label for each pixel"
        )
        raise PictureError(f"{name} is {_PNG_KINDS.get(kind, 'a PNG')} of {bits} bits; it must be 8-bit {needed}")
    with _reasons(data):
        values = np.asarray(_open(data))
    if segments:
        wide_HW3 = values.astype(np.int32)
        return np.asarray(wide_HW3[..., 0] + 256 * wide_HW3[..., 1] + 65536 * wide_HW3[..., 2])
    return values


def decode_grey(data: bytes, name: str) -> Image.Image:
    """A grey PNG of any bits as 8-bit grey, without rotation; errors call it `name`.

    Raises:
        PictureError: it is no PNG, has colours or alpha, or is damaged. How large it is, the caller has looked at.
    """
    bits, kind = _png_kind(data, name)
    if kind != 0:
        raise PictureError(f"{name} is {_PNG_KINDS.get(kind, 'a PNG')}; it must be grey, 255 where the loss counts")
    with _reasons(data):
        image = _open(data)
        return _eight_bits(image, None)[0] if bits == 16 else image.convert("L")


def _png_kind(data: bytes, name: str) -> tuple[int, int]:
    header = png_header(data)
    if header is None:
        raise PictureError(f"{name} is no PNG")
    return header[2:]


def picture_format(data: bytes) -> tuple[str | None, tuple[int, int]]:
    """(member name such as `jpg`, or None for a format that shards don't hold; upright (height, width)).

    Reads headers alone.

    Raises:
        PictureError: not a picture.
    """
    with _reasons(data), _open(data) as image:
        width, height = image.size
        if _orientation(image, data) >= 5:  # the EXIF orientations that swap the sides
            width, height = height, width
        animated = getattr(image, "is_animated", False)
        return (None if animated else FORMATS.get(image.format or "")), (height, width)


class _reasons:  # noqa: N801 (used as a context manager only)
    """Decoders meet damaged bytes with errors of every type: each becomes a PictureError."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, PictureError) or not isinstance(error, Exception):
            return
        what = first_line(error)
        if isinstance(error, Image.UnidentifiedImageError):
            what = _what_else(self.data)
        elif isinstance(error, MemoryError):
            what = "it needs more memory than there is"
        raise PictureError(what) from None


def _what_else(data: bytes) -> str:
    """Why no decoder takes these bytes."""
    if not data:
        return "empty file"
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"):
        return "HEIC is not supported; convert it to JPEG or PNG"
    if data[4:12] == b"jP  \r\n\x87\n" or data.startswith(b"\xff\x4f\xff\x51"):
        return "JPEG 2000 is not supported; convert it to JPEG or PNG"
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"<svg") or (head.startswith(b"<?xml") and b"<svg" in head):
        return "SVG is not supported; draw it to PNG"
    if head.startswith((b"<!doctype html", b"<html")):
        return "a web page, not a picture"
    return "not a picture in a known format"


def _open(data: bytes) -> Any:
    """What Pillow's `open` does, for the formats we read, and without its own limit on pixels.

    That limit is a global variable and knows no reduced scale; ours is `_limit`.
    """
    Image.init()
    for name in _READ:
        if name not in Image.OPEN:  # this Pillow was built without it
            continue
        factory, accept = Image.OPEN[name]
        if accept is not None and accept(data[:16]) is not True:
            continue
        try:
            image = factory(io.BytesIO(data), "")
        except (SyntaxError, IndexError, TypeError, KeyError):  # what plugins raise on a bad header
            continue
        if min(image.size) < 1:
            raise PictureError(f"{image.width} pixels wide and {image.height} high")
        return image
    raise Image.UnidentifiedImageError


def _limit(image: Any, data: bytes, max_pixels: int, at_least: tuple[int, int] | None) -> None:
    """Choose the scale of a JPEG, and refuse what would be too large; `at_least` is as the file has its sides."""
    width, height = image.size
    pixels = width * height
    jpeg = image.format in ("JPEG", "MPO")
    if jpeg:
        scale = 1
        while scale < 8 and math.ceil(width / scale) * math.ceil(height / scale) > max_pixels:
            scale *= 2
        if at_least is not None:
            while scale < 8 and height >= 4 * scale * at_least[0] and width >= 4 * scale * at_least[1]:
                scale *= 2
        if scale > 1:
            image.draft(image.mode, (max(width // scale, 1), max(height // scale, 1)))
    decoded = image.width * image.height
    what = f"{width}x{height} is {pixels / 1e6:,.0f} megapixels, the limit is {max_pixels / 1e6:,.0f}"
    if decoded > max_pixels:
        raise PictureError(what)
    # All coefficients (two bytes each, up to four channels) of such a file are held, at any scale.
    if jpeg and pixels > 2 * max_pixels and _many_scans(data):
        raise PictureError(f"{what} (twice that for a progressive JPEG)")


def _many_scans(data: bytes) -> bool:
    """Whether a JPEG is progressive, or keeps its channels in scans of their own.

    ITU-T T.81, annex B: each marker segment but those without parameters starts with its length.
    """
    channels = 0
    place = 2
    while place + 10 <= len(data):
        if data[place] != 0xFF:
            return True  # lost between segments: take it for the worse kind
        marker = data[place + 1]
        if marker == 0xFF or 0xD0 <= marker <= 0xD8 or marker == 0x01:  # fill bytes and bare markers
            place += 1 if marker == 0xFF else 2
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header
            if marker not in (0xC0, 0xC1):
                return True
            channels = data[place + 9]
        if marker == 0xDA:  # the first scan: the number of its channels follows its length
            return data[place + 4] < channels
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return True


def _orientation(image: Any, data: bytes) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none, or none that can be read."""
    if image.format == "TIFF":
        return 1  # Pillow applies it while it loads, and its size is the upright one
    try:
        if image.format == "PNG" and "exif" not in image.info:
            exif = Image.Exif()  # its own `getexif` decodes the whole picture to look for a chunk at the end
            for name, content in _png_chunks(data):
                if name == b"eXIf":
                    exif.load(b"Exif\0\0" + content)
            value = exif.get(_ORIENTATION, 1)
        else:
            value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF, on which the parser raises errors of every type; the pixels may be sound
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Names and contents of a PNG's chunks, without their checksums."""
    place = 8
    while place + 8 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        name = data[place + 4 : place + 8]
        yield name, data[place + 8 : place + 8 + size] if name == b"eXIf" else b""
        place += 12 + size


def _flatten(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """To RGB by the picture's colour profile, over the background where it is transparent.

    `image` is used up: of a large picture there is one copy at a time, not one for each step.
    """
    profile = image.info.get("icc_profile")
    transparent = image.info.get("transparency")
    alpha: Image.Image | None = None
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image, alpha = _eight_bits(image, transparent if isinstance(transparent, int) else None)
    elif image.has_transparency_data:
        grey = image.mode in ("1", "L", "LA", "La")
        if image.mode not in ("LA", "RGBA"):
            image = image.convert("LA" if grey else "RGBA")
        alpha = image.getchannel("A")
        image = image.convert("L" if grey else "RGB")
    elif image.mode not in ("RGB", "L", "CMYK"):
        if image.mode not in ("1", "P", "PA", "RGBX"):
            profile = None  # a profile of Lab or YCbCr values, which the conversion below knows without it
        image = image.convert("L" if image.mode == "1" else "RGB")
    rgb = _to_srgb(image, profile) if isinstance(profile, bytes) and profile else image.convert("RGB")
    if alpha is not None and alpha.getextrema()[0] != 255:
        rgb.paste(background, mask=ImageChops.invert(alpha))
    return rgb


def _eight_bits(image: Image.Image, transparent: int | None) -> tuple[Image.Image, Image.Image | None]:
    """16-bit and float greyscale to (8 bits, alpha); Pillow's own conversion clips at 255 instead of scaling."""
    values_HW = np.asarray(image)
    grey_HW = np.empty(values_HW.shape, np.uint8)
    for top in range(0, len(values_HW), _STRIP_ROWS):  # in strips, to bound the memory of what is in between
        strip = values_HW[top : top + _STRIP_ROWS]
        if image.mode == "F":
            if not (np.isfinite(strip).all() and strip.min() >= 0 and strip.max() <= 1):
                raise PictureError("a float picture with values outside [0, 1]")
            grey_HW[top : top + _STRIP_ROWS] = strip * 255 + 0.5
        else:
            whole = strip.astype(np.int64)
            if whole.min() < 0 or whole.max() > 65535:
                raise PictureError("an integer picture with values outside 16 bits")
            grey_HW[top : top + _STRIP_ROWS] = (whole * 255 + 32767) // 65535
    alpha = None
    if transparent is not None:
        alpha = Image.fromarray(np.where(values_HW == transparent, np.uint8(0), np.uint8(255)))
    return Image.fromarray(grey_HW), alpha


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """An RGB, L or CMYK image to sRGB by its profile; without it, if that is damaged or for other colours."""
    space = _colour_space(profile)
    if space == "RGB" and image.mode == "L":
        image = image.convert("RGB")
    if {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space) == image.mode:
        transform = _transform(profile, image.mode)
        if transform is not None:
            try:
                converted = ImageCms.applyTransform(image, transform)
                assert converted is not None, "not in place"
                return converted
            except (ImageCms.PyCMSError, OSError, ValueError):
                pass
    return image.convert("RGB")


@functools.lru_cache(maxsize=16)  # a data set has few profiles, and to build a transform takes milliseconds
def _colour_space(profile: bytes) -> str:
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip()
    except (ImageCms.PyCMSError, OSError, ValueError):
        return "damaged"


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What takes the profile's colours to sRGB; None when it is damaged, or is sRGB itself."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode != "RGB":
            return transform
        # Most pictures with a profile have sRGB's, and to convert takes longer than to decode. So: a profile
        # that moves no colour of a lattice by more than one level has nothing to convert.
        steps = np.linspace(0, 255, 18).round().astype(np.uint8)
        lattice_1N3 = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
        moved = ImageCms.applyTransform(Image.fromarray(lattice_1N3), transform)
        assert moved is not None, "not in place"
        same = np.abs(np.asarray(moved).astype(int) - lattice_1N3).max() <= 1
        return None if same else transform
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None


def cut_out(
    image: Image.Image,
    size: tuple[int, int],
    bucket: tuple[int, int],
    place: tuple[float, float] = (0.5, 0.5),
    flipped: bool = False,
    resampling: Image.Resampling = Image.Resampling.LANCZOS,
) -> tuple[Image.Image, tuple[int, int], list[int]]:
    """Resize so that the picture covers the bucket, keeping its aspect, mirror it, and crop.

    Of a strip a few pixels wide, which would become longer than memory holds, only the crop is resized: the same
    pixels, but for rounding.

    Args:
        image: the picture, maybe decoded at a reduced scale.
        size: the picture's own (height, width).
        place: of the crop along height and width: 0 is the top (left), 0.5 the centre, just below 1 the bottom.
        resampling: all of Pillow's have their pixels' centres in the same places, so that maps stay on the picture.

    Returns:
        the pixels; the resized picture's (height, width); the crop [top, left, height, width] in it.
    """
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    # At least the target: rounding may leave a side one pixel short.
    height, width = (max(target, round(side * scale)) for target, side in zip(bucket, size, strict=True))
    if place == (0.5, 0.5):
        top, left = (height - bucket[0]) // 2, (width - bucket[1]) // 2
    else:
        top, left = int(place[0] * (height - bucket[0] + 1)), int(place[1] * (width - bucket[1] + 1))
    strip = height * width > MAX_PIXELS
    if strip:
        begin = width - bucket[1] - left if flipped else left  # the crop's left side before it is mirrored
        x0, x1 = (side * image.width / width for side in (begin, begin + bucket[1]))
        y0, y1 = (side * image.height / height for side in (top, top + bucket[0]))
        image = image.resize((bucket[1], bucket[0]), resampling, (x0, y0, x1, y1))
    elif (width, height) != image.size:
        image = image.resize((width, height), resampling)
    if flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if not strip and (height, width) != bucket:
        image = image.crop((left, top, left + bucket[1], top + bucket[0]))
    return image, (height, width), [top, left, *bucket]

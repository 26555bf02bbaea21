"""Decode pictures of any kind to upright 8-bit RGB, crop them to a bucket, and encode them again.

Rotation by EXIF is applied, colour profiles are converted to sRGB, alpha is flattened on a colour; CMYK,
palettes, greyscale and 16-bit pictures are converted; of an animation the first frame is taken.
"""

from __future__ import annotations

import io
import math
import warnings

import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageOps

from finetune import UserError

SUFFIXES = frozenset(
    "." + s for s in ("jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm", "pgm")
)
FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""Pillow's names of the formats that shards may hold as they are, and the names of their members."""


class PictureError(ValueError):
    """A picture that can't be decoded; the text is the reason."""


def parse_colour(name: str) -> tuple[int, int, int]:
    """A CSS colour (`white`, `#ff8800`, `rgb(0, 0, 0)`) as 8-bit RGB.

    Raises:
        UserError: no such colour.
    """
    try:
        return ImageColor.getcolor(name, "RGB")  # type: ignore[return-value]
    except ValueError:
        raise UserError(f"no colour {name!r}; write it like white or #ff8800") from None


def decode_rgb(data: bytes, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Decode a picture's bytes to an upright RGB image.

    Args:
        background: what shows through where the picture is transparent.

    Raises:
        PictureError: not a picture, damaged, cut short, or above Pillow's limit of 89 megapixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                return _flatten(_eight_bits(ImageOps.exif_transpose(image)), background)
    except Exception as error:  # decoders meet damaged bytes with errors of every type
        what = str(error).replace("<_io.BytesIO object at 0x", "<").partition("\n")[0] or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            what = "not a picture in a known format" if data else "empty file"
        raise PictureError(what) from None


def picture_format(data: bytes) -> tuple[str | None, tuple[int, int]]:
    """(member name such as `jpg`, or None for a format that shards don't hold; upright (height, width)).

    Reads headers alone.

    Raises:
        PictureError: not a picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                if image.getexif().get(0x0112, 1) >= 5:  # the EXIF orientations that swap the sides
                    width, height = height, width
                animated = getattr(image, "is_animated", False)
                return (None if animated else FORMATS.get(image.format or "")), (height, width)
    except Exception as error:
        raise PictureError(str(error) or type(error).__name__) from None


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit and float greyscale to 8 bits; Pillow's own conversion clips them at 255 instead of scaling."""
    if image.mode == "F":
        values = np.asarray(image)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise PictureError("a float picture with values outside [0, 1]")
        return Image.fromarray((values * 255 + 0.5).astype(np.uint8))
    if image.mode == "I" or image.mode.startswith("I;"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise PictureError("an integer picture with values outside 16 bits")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    return image


def _flatten(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """To RGB by the picture's colour profile, over the background where it is transparent."""
    profile = image.info.get("icc_profile")
    alpha = None
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        image = rgba.convert("RGB")
    elif image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    rgb = _to_srgb(image, profile) if profile else image.convert("RGB")
    if alpha is not None:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, background), alpha)
    return rgb


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        return converted if converted is not None else image.convert("RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):  # a damaged profile, or one for another colour space
        return image.convert("RGB")


def fit(image: Image.Image, height: int, width: int) -> tuple[Image.Image, tuple[int, int], list[int]]:
    """Resize so that the picture covers [height, width], keeping its aspect, then crop the centre.

    Returns:
        the picture; the resized picture's (height, width) before the crop; and the crop [top, left, height,
        width] in pixels of the resized picture.
    """
    scale = max(height / image.height, width / image.width)
    # At least the target: rounding may leave a side one pixel short.
    resized_h, resized_w = (max(t, round(s * scale)) for t, s in ((height, image.height), (width, image.width)))
    if (resized_w, resized_h) != image.size:
        image = image.resize((resized_w, resized_h), Image.Resampling.LANCZOS)
    top, left = (resized_h - height) // 2, (resized_w - width) // 2
    if (resized_h, resized_w) != (height, width):
        image = image.crop((left, top, left + width, top + height))
    return image, (resized_h, resized_w), [top, left, height, width]


def encode_image(image: Image.Image, member: str, quality: int = 95) -> bytes:
    """An RGB image as the bytes of a `png` (lossless), `webp` or `jpg` member, without metadata."""
    buffer = io.BytesIO()
    match member:
        case "png":
            image.save(buffer, "PNG")
        case "webp":
            image.save(buffer, "WEBP", quality=quality, method=6)
        case "jpg":
            image.save(buffer, "JPEG", quality=quality, subsampling=0, optimize=True)
        case _:
            raise ValueError(f"no format {member!r}")
    return buffer.getvalue()


def aspect_table(size: int, step: int, max_aspect: float = 2.0) -> list[tuple[int, int]]:
    """Aspect buckets (height, width) for a budget of size^2 pixels, as SDXL's table has them (step 64).

    Sides are multiples of `step`, areas at most size^2 and as near to it as the step allows, and the
    longer side is at most `max_aspect` times the shorter. Podell et al. 2023 (arXiv 2307.01952), section
    2.3.
    """
    found = set()
    for short in range(step, size + 1, step):
        long = size * size // short // step * step
        both_full = size * size // long // step * step == short  # neither side can grow by a step
        if both_full and 1 / max_aspect <= long / short <= max_aspect:
            found |= {(short, long), (long, short)}
    return sorted(found)


def nearest_bucket(height: int, width: int, table: list[tuple[int, int]]) -> tuple[int, int]:
    """The bucket whose aspect is nearest in log scale; of equals, the largest."""
    aspect = math.log(width / height)
    return min(table, key=lambda hw: (round(abs(math.log(hw[1] / hw[0]) - aspect), 9), -hw[0] * hw[1], hw))

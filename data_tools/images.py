"""Files of pictures: which of them are taken, the colour behind them, and how they are written.

What decodes and crops them is `finetune.data.shards.images`.
"""

from __future__ import annotations

import io

from PIL import Image, ImageColor

from finetune import UserError

SUFFIXES = frozenset(
    "." + s
    for s in (
        *("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "gif", "bmp", "tif", "tiff", "avif"),
        *("ppm", "pgm", "pbm", "pnm"),
    )
)
UNREAD_SUFFIXES = frozenset(
    "." + s
    for s in (
        *(
            "heic",
            "heif",
            "jxl",
            "jp2",
            "j2k",
            "jpf",
            "jpx",
            "svg",
            "svgz",
            "eps",
            "psd",
            "xcf",
            "tga",
            "ico",
            "exr",
        ),
        *("hdr", "dds", "dng", "cr2", "cr3", "nef", "arw", "orf", "raf", "rw2", "pef", "srw"),
    )
)
"""Pictures that we can't read, or of which only a preview could be read, as of a camera's raw files."""


def parse_colour(name: str) -> tuple[int, int, int]:
    """A CSS colour (`white`, `#ff8800`, `rgb(0, 0, 0)`) as 8-bit RGB.

    Raises:
        UserError: no such colour.
    """
    try:
        return ImageColor.getcolor(name, "RGB")  # type: ignore[return-value]
    except ValueError:
        raise UserError(f"no colour {name!r}; write it like white or #ff8800") from None


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

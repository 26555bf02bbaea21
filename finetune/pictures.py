"""Pictures side by side, and in files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from finetune import UserError


def grid(images: Sequence[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Pictures row by row on white, `gap` pixels apart; cells have the size of the largest.

    Raises:
        UserError: no pictures, or no columns.
    """
    if not images or columns < 1:
        raise UserError(f"a grid needs pictures and columns; got {len(images)} and {columns}")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    width, height = max(image.width for image in images), max(image.height for image in images)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (column * (width + gap), row * (height + gap)))
    return sheet


def save_png(image: Image.Image, path: Path, texts: Mapping[str, str] | None = None) -> None:
    """Save a picture, whole or not at all, with `texts` in its text chunks.

    Raises:
        UserError: its folder is not there any more.
        OSError: naming `path`, not the temporary file.
    """
    info = PngInfo()
    for key, value in (texts or {}).items():
        info.add_text(key, value)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        image.save(temporary, format="PNG", pnginfo=info)
        os.replace(temporary, path)
    except FileNotFoundError:
        raise UserError(f"{path} cannot be written: its folder is not there; give another place") from None
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        temporary.unlink(missing_ok=True)

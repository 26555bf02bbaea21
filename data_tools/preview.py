"""Draw a contact sheet of a set of shards: latents are decoded, pictures are shown as they are.

The samples are evenly spaced over the set. The VAE is the one that the manifest names; another one with the
same encoder may be given (a decoder trained further, say). Boxes are drawn, label maps tint their picture, what a
loss mask leaves out is dimmed; --plain leaves all that out. A small picture and the picture with its first hole
stand to the right of theirs. Pictures of more than a megapixel, or longer than 2,048 pixels, are shown smaller.

examples:
  data-tools preview latents/photos --out sheet.png
  data-tools preview latents/photos --vae models/vae --count 16 --columns 4 --out sheet.png
"""

from __future__ import annotations

import argparse
import colorsys
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from data_tools.devices import add_device_argument, choose_device
from data_tools.inspect import record_of
from data_tools.labels import read_map, read_mask
from data_tools.output import whole_file
from data_tools.texts import printable
from finetune import UserError
from finetune.data.shards import (
    IMAGE_MEMBERS,
    LOWRES,
    MAP,
    MASK,
    MASKED,
    UNLABELLED,
    ShardError,
    ShardSet,
    parse_boxes,
    parse_npy,
    set_folder,
)
from finetune.data.shards.images import PictureError, decode_rgb
from finetune.terminal import positive

_GAP = 2  # pixels between tiles
_TINT = 0.45  # of a label's colour
_DIM = 0.3  # what is left of a pixel whose loss doesn't count
_TEXT = 16  # pixels that a name needs
_BATCH = 8
_MOST_PIXELS, _MOST_SIDE = 1 << 20, 2048  # of a picture on the sheet: photographs may be of 100 megapixels
_SHEETS = {".jpg": 65_500, ".jpeg": 65_500, ".webp": 16_383}  # the most pixels that a side may have


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data-tools preview`."""
    parser.add_argument("shards", type=set_folder, metavar="SHARDS", help="folder with manifest.json")
    parser.add_argument("--vae", metavar="MODEL", help="autoencoder for latents (default: the manifest's)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the sheet: .png, .jpg or .webp")
    parser.add_argument("--count", type=positive, default=64, metavar="N", help="samples to show (default: 64)")
    parser.add_argument("--columns", type=positive, default=8, metavar="N", help="tiles in a row (default: 8)")
    parser.add_argument("--plain", action="store_true", help="pictures alone, without boxes, maps and masks")
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Run `data-tools preview`."""
    suffix = args.out.suffix.lower()
    if suffix not in (".png", *_SHEETS):
        raise UserError(f"--out {args.out} should end in .png, .jpg or .webp")
    shards = ShardSet.open(args.shards)
    count = min(args.count, len(shards))
    ids = np.linspace(0, len(shards) - 1, count).round().astype(int).tolist()
    draw = _decoded(shards, ids, args) if shards.manifest.kind == "latents" else _pictures(shards, ids)
    names = shards.classes()
    tiles = []
    for sample_id, pictures in zip(ids, tqdm(draw, total=count, unit="picture", disable=None), strict=True):
        if args.plain:
            tiles.append(_shown(pictures[0]))
        else:
            first = _shown(annotate(shards, sample_id, pictures[0], names))
            tiles.append(_row([first, *_small(shards, sample_id, first.size), *map(_shown, pictures[1:])]))
    sheet = contact_sheet(tiles, args.columns)
    if max(sheet.size) > (most := _SHEETS.get(suffix, max(sheet.size))):
        shape = f"{sheet.width}x{sheet.height} pixels, and {suffix} holds sides of {most}"
        raise UserError(f"the sheet would have {shape}; take fewer --columns, a smaller --count, or a .png")
    with whole_file(args.out) as temporary:
        sheet.save(temporary)
    print(f"{count} of {len(shards)} samples in {args.out}")
    return 0


def annotate(shards: ShardSet, sample_id: int, tile: Image.Image, names: list[str]) -> Image.Image:
    """A sample's picture with its boxes, label map and loss mask.

    Raises:
        ShardError: one of them can't be read.
    """
    width, height = tile.size
    size = (height, width)
    pixels_HW3 = np.asarray(tile, np.float64)
    try:
        if shards.has_member(sample_id, MAP):
            labels_HW = np.asarray(read_map(shards.read_member(sample_id, MAP), size))
            known = (labels_HW != UNLABELLED)[..., None]
            tint = np.array([colour(label) for label in range(256)], np.float64)[labels_HW]
            pixels_HW3 = np.where(known, _TINT * tint + (1 - _TINT) * pixels_HW3, pixels_HW3)
        if shards.has_member(sample_id, MASK):
            share = np.asarray(read_mask(shards.read_member(sample_id, MASK), size), np.float64)[..., None] / 255
            pixels_HW3 = pixels_HW3 * (_DIM + (1 - _DIM) * share)
    except PictureError as error:
        raise ShardError(f"{shards.root}: sample {sample_id}: {error}; run `data-tools verify`") from None
    drawn = Image.fromarray(np.round(pixels_HW3).astype(np.uint8))
    pen = ImageDraw.Draw(drawn)
    for label, *fractions in parse_boxes(record_of(shards, sample_id).get("boxes")) or ():
        x0, y0, x1, y1 = (f * side for f, side in zip(fractions, (width, height) * 2, strict=True))
        # The last pixel inside: a box of the whole picture has its lines in the picture.
        corner = (max(round(x1) - 1, round(x0)), max(round(y1) - 1, round(y0)))
        pen.rectangle((round(x0), round(y0), *corner), outline=colour(label))
        name = printable(names[label]) if label < len(names) else str(label)
        if pen.textlength(name) < x1 - x0 - 6 and y1 - y0 > _TEXT:
            # Dark edges: the picture below may have the same colour.
            pen.text((round(x0) + 3, round(y0) + 2), name, fill=colour(label), stroke_width=1, stroke_fill="black")
    return drawn


def _shown(picture: Image.Image) -> Image.Image:
    """As it is, or smaller where it is too large for a sheet."""
    area, side = picture.width * picture.height, max(picture.size)
    scale = min(1.0, math.sqrt(_MOST_PIXELS / area), _MOST_SIDE / side)
    if scale == 1:
        return picture
    width, height = (max(int(scale * length), 1) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def colour(label: int) -> tuple[int, int, int]:
    """A colour for a class; neighbouring numbers get hues far from each other."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1.0, 1.0 - 0.35 * (label // 7 % 2), 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _small(shards: ShardSet, sample_id: int, size: tuple[int, int]) -> Iterator[Image.Image]:
    """A sample's low-resolution picture, if it has one, at (width, height)."""
    if shards.has_member(sample_id, LOWRES):
        yield _decode(shards, sample_id, LOWRES).resize(size, Image.Resampling.NEAREST)


def _row(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size, side by side."""
    width, height = pictures[0].size
    row = Image.new("RGB", (width * len(pictures), height))
    for place, picture in enumerate(pictures):
        row.paste(picture, (place * width, 0))
    return row


def contact_sheet(tiles: list[Image.Image], columns: int) -> Image.Image:
    """Tiles in rows, left to right, each in the middle of a cell as large as the largest; white between."""
    columns = min(columns, len(tiles))
    width, height = (max(tile.size[axis] for tile in tiles) + _GAP for axis in (0, 1))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    for place, tile in enumerate(tiles):
        row, column = divmod(place, columns)
        left = _GAP + column * width + (width - _GAP - tile.width) // 2
        top = _GAP + row * height + (height - _GAP - tile.height) // 2
        sheet.paste(tile, (left, top))
    return sheet


def _pictures(shards: ShardSet, ids: list[int]) -> Iterator[list[Image.Image]]:
    for sample_id in ids:
        member = next((name for name in IMAGE_MEMBERS if shards.has_member(sample_id, name)), None)
        if member is None:
            raise ShardError(f"{shards.root}: sample {sample_id} has no picture; run `data-tools verify`")
        yield [_decode(shards, sample_id, member)]


def _decode(shards: ShardSet, sample_id: int, member: str) -> Image.Image:
    try:
        return decode_rgb(shards.read_member(sample_id, member))
    except PictureError as error:
        raise ShardError(f"{shards.root}: sample {sample_id} can't be decoded: {error}") from None


def _decoded(shards: ShardSet, ids: list[int], args: argparse.Namespace) -> Iterator[list[Image.Image]]:
    """Each sample's latent decoded, then the latent of the picture with its first hole, if it has one."""
    import torch

    from finetune.models.autoencoder import decode, encoder_sha256, load_autoencoder

    encoder = shards.manifest.encoder
    assert encoder is not None, "a latent manifest has an encoder"
    source = args.vae or encoder.locate(shards.root)
    vae = load_autoencoder(source, device=choose_device(args.device))
    shards.manifest.require_encoder(encoder_sha256(vae), source)
    place = 0
    while place < len(ids):
        bucket = shards.bucket_of(shards.locate(ids[place])[0])
        assert bucket is not None, "a latent shard has a bucket"
        batch = [ids[place]]
        for sample_id in ids[place + 1 : place + _BATCH]:
            if shards.bucket_of(shards.locate(sample_id)[0]) != bucket:
                break
            batch.append(sample_id)
        place += len(batch)
        h, w = (side // encoder.downsample for side in bucket)
        moments_B2CHW = np.empty((len(batch), 2 * encoder.channels, h, w), np.float16)
        shards.read_latents(batch, moments_B2CHW)
        both = [moments_B2CHW]
        if not args.plain and all(shards.has_member(sample_id, MASKED) for sample_id in batch):
            both.append(np.stack([_first_hole(shards, sample_id, moments_B2CHW.shape[1:]) for sample_id in batch]))
        pixels = []
        for each_B2CHW in both:
            mean_BCHW = torch.from_numpy(each_B2CHW[:, : encoder.channels].astype(np.float32))
            images_B3HW = decode(vae, mean_BCHW)
            pixels.append(((images_B3HW + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
        for sample in zip(*pixels, strict=True):
            yield [Image.fromarray(pixels_HW3) for pixels_HW3 in sample]


def _first_hole(shards: ShardSet, sample_id: int, shape: tuple[int, ...]) -> np.ndarray:
    array = parse_npy(shards.read_member(sample_id, MASKED))
    if array is None or array.shape[1:] != shape or not len(array):
        raise ShardError(f"{shards.root}: sample {sample_id}: {MASKED} is damaged; run `data-tools verify`")
    return np.asarray(array[0])

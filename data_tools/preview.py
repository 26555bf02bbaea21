"""Draw a contact sheet of a set of shards: latents are decoded, pictures are shown as they are.

The samples are evenly spaced over the set. The VAE is the one that the manifest names; another one with the
same encoder may be given (a decoder trained further, say).

examples:
  data-tools preview latents/photos --out sheet.png
  data-tools preview latents/photos --vae models/vae --count 16 --columns 4 --out sheet.png
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_tools.arguments import add_device_argument, positive
from data_tools.encode import choose_device
from data_tools.images import PictureError, decode_rgb
from data_tools.output import whole_file
from finetune import UserError
from finetune.data.shards import IMAGE_MEMBERS, ShardError, ShardSet

_GAP = 2  # pixels between tiles
_BATCH = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data-tools preview`."""
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="folder with manifest.json")
    parser.add_argument("--vae", metavar="MODEL", help="autoencoder for latents (default: the manifest's)")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="the sheet")
    parser.add_argument("--count", type=positive, default=64, metavar="N", help="samples to show (default: 64)")
    parser.add_argument("--columns", type=positive, default=8, metavar="N", help="tiles in a row (default: 8)")
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Run `data-tools preview`."""
    if args.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out {args.out} should end in .png, .jpg or .webp")
    shards = ShardSet.open(args.shards)
    count = min(args.count, len(shards))
    ids = np.linspace(0, len(shards) - 1, count).round().astype(int).tolist()
    draw = _decoded(shards, ids, args) if shards.manifest.kind == "latents" else _pictures(shards, ids)
    tiles = list(tqdm(draw, total=count, unit="picture", disable=None))
    sheet = contact_sheet(tiles, args.columns)
    with whole_file(args.out) as temporary:
        sheet.save(temporary)
    print(f"{count} of {len(shards)} samples in {args.out}")
    return 0


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


def _pictures(shards: ShardSet, ids: list[int]) -> Iterator[Image.Image]:
    for sample_id in ids:
        member = next((name for name in IMAGE_MEMBERS if shards.has_member(sample_id, name)), None)
        if member is None:
            raise ShardError(f"{shards.root}: sample {sample_id} has no picture; run `data-tools verify`")
        try:
            yield decode_rgb(shards.read_member(sample_id, member))
        except PictureError as error:
            raise ShardError(f"{shards.root}: sample {sample_id} can't be decoded: {error}") from None


def _decoded(shards: ShardSet, ids: list[int], args: argparse.Namespace) -> Iterator[Image.Image]:
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
        mean_BCHW = torch.from_numpy(moments_B2CHW[:, : encoder.channels].astype(np.float32))
        images_B3HW = decode(vae, mean_BCHW)
        pixels_BHW3 = ((images_B3HW + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for pixels_HW3 in pixels_BHW3:
            yield Image.fromarray(pixels_HW3)

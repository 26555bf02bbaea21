"""Encode image shards to latent shards: what the VAE says of each picture, once and for all.

SHARDS is a folder that `data-tools ingest` made, or any folder of WebDataset tars (pictures with .txt or
.json). Each picture is resized to cover its bucket and cropped in the centre. The bucket is the square of
--size, by default the pictures' own size if they share one, or with --aspect-buckets the one of nearest
aspect from a table of shapes with about size x size pixels. A latent shard keeps the mean and standard
deviation of the posterior, float16, unscaled, and a record {"captions", "original_size": [h, w], "crop":
[top, left, h, w]} for each sample, where the crop is in pixels of the resized picture. Pictures that
can't be decoded are listed in LATENTS/rejects.jsonl and the rest goes on.

The same pictures, VAE, batch size and machine give the same bytes.

examples:
  data-tools encode shards/photos --vae models/vae --out latents/photos
  data-tools encode shards/photos --vae stabilityai/sdxl-vae --size 1024 --aspect-buckets --dtype bfloat16 \\
      --out latents/photos
"""

from __future__ import annotations

import argparse
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from data_tools.images import PictureError, aspect_table, decode_rgb, fit, nearest_bucket, parse_colour
from data_tools.ingest.common import add_shard_arguments, positive
from data_tools.output import SOURCE, Rejects, claimed_folder
from data_tools.pictures import Picture, PictureSource, Unreadable
from finetune import UserError
from finetune.data.shards import (
    LATENT,
    Bucket,
    LatentStats,
    ShardError,
    ShardWriter,
    json_bytes,
    latent_bytes,
    write_atomic,
)

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL

DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data-tools encode`."""
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="folder of image shards or WebDataset tars")
    parser.add_argument("--vae", required=True, metavar="MODEL", help="folder or hub id of a VAE or pipeline")
    parser.add_argument("--out", type=Path, required=True, metavar="LATENTS", help="folder for the latent shards")
    parser.add_argument(
        "--size",
        type=positive,
        metavar="N",
        help="side of the square in pixels (default: the pictures' own size)",
    )
    parser.add_argument(
        "--aspect-buckets",
        action="store_true",
        help="keep aspects: buckets of about N x N pixels, sides up to 2:1",
    )
    parser.add_argument(
        "--bucket-step",
        type=positive,
        default=64,
        metavar="N",
        help="sides are multiples of it (default: 64)",
    )
    parser.add_argument("--batch", type=positive, default=8, metavar="N", help="pictures at a time (default: 8)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the VAE (default: float32)")
    add_device_argument(parser)
    parser.add_argument(
        "--workers", type=positive, default=min(8, os.cpu_count() or 1), metavar="N", help="decoding threads"
    )
    add_shard_arguments(parser, "LATENTS")


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """--device."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: a GPU if any)")


def choose_device(name: str) -> torch.device:
    """The torch device of --device.

    Raises:
        UserError: no such device here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        what = str(error).partition("\n")[0]
        raise UserError(f"--device {name} can't be used here ({what}); try --device auto") from None
    return device


def run(args: argparse.Namespace) -> int:
    """Run `data-tools encode`."""
    background = parse_colour(args.background)
    source = PictureSource.open(args.shards)
    with claimed_folder(args.out, args.overwrite) as out:
        import torch

        from finetune.latents import LatentSpace, RunningMoments
        from finetune.models.autoencoder import encoder_info, load_autoencoder

        device = choose_device(args.device)
        torch.backends.cudnn.benchmark = (
            False  # it picks kernels by their speed, so bits may differ from run to run
        )
        torch.backends.cudnn.deterministic = True
        vae = load_autoencoder(args.vae, dtype=getattr(torch, args.dtype), device=device)
        info = encoder_info(vae, args.vae, out)
        table = bucket_table(source, args.size, args.aspect_buckets, args.bucket_step, info.downsample)
        rejects = Rejects()
        encoder = _Encoder(vae, args.vae)
        moments = RunningMoments()
        samples = enlarged = 0
        with ShardWriter(out, "latents", members=(LATENT, "json"), max_samples=args.shard_samples) as writer:
            with tqdm(total=source.samples, unit="picture", disable=None) as bar:
                for bucket, batch in batches(source, table, background, args.batch, args.workers, rejects, bar):
                    for sample, array_2Chw in zip(batch, encoder(batch), strict=True):
                        if array_2Chw is None:
                            rejects.add(sample.key, "latents are not finite, even in float32")
                            continue
                        members = {LATENT: latent_bytes(array_2Chw), "json": json_bytes(sample.record)}
                        try:
                            writer.write(sample.key, members, bucket)
                        except ShardError as error:
                            rejects.add(sample.key, str(error))
                            continue
                        moments.add(array_2Chw[None])
                        samples += 1
                        enlarged += sample.enlarged
            rejects.require_some_left(samples, str(args.shards))
            rejects.save(out)
            if (args.shards / SOURCE).is_file():  # whose pictures they are, and under which licence
                write_atomic(out / SOURCE, (args.shards / SOURCE).read_bytes())
            stats = LatentStats(*moments.summary(LatentSpace(info.scale, info.shift)))
            manifest = writer.finish(info, stats)
    if encoder.redone:
        print(f"{encoder.redone} pictures overflowed in {args.dtype} and were redone in float32")
    if enlarged:
        print(f"{enlarged} pictures are smaller than their bucket and were enlarged")
    buckets = len({shard.bucket for shard in manifest.shards})
    what = f"{samples} latents, mean {stats.mean:+.3f}, std {stats.std:.3f}, in {buckets} buckets"
    print(f"{what}, in {args.out}{rejects.summary(args.out)}")
    return 0


def bucket_table(
    source: PictureSource, size: int | None, aspect_buckets: bool, step: int, downsample: int
) -> list[Bucket]:
    """The (height, width) that pictures may get.

    Raises:
        UserError: the size is missing, or doesn't suit the VAE.
    """
    if size is None and source.bucket is None:
        raise UserError(f"pictures in {source.root} are of several sizes; give --size")
    if size is None:
        assert source.bucket is not None
        if any(side % downsample for side in source.bucket):
            height, width = source.bucket
            raise UserError(
                f"pictures of {height}x{width} don't divide by {downsample}, the VAE's step; give --size"
            )
        if aspect_buckets:
            raise UserError("--aspect-buckets needs --size, whose square is the number of pixels")
        return [source.bucket]
    if size % downsample:
        near = max(round(size / downsample), 1) * downsample
        raise UserError(f"--size {size} does not divide by {downsample}, the VAE's step; take {near}")
    if not aspect_buckets:
        return [(size, size)]
    if step % downsample:
        raise UserError(f"--bucket-step {step} does not divide by {downsample}, the VAE's step")
    if not (table := aspect_table(size, step)):
        raise UserError(f"--size {size} is too small for --bucket-step {step}; take a smaller step")
    return table


@dataclass(frozen=True)
class Prepared:
    """A picture cut to its bucket."""

    key: str
    pixels: np.ndarray  # uint8 [H, W, 3]
    bucket: Bucket
    record: dict[str, Any]
    enlarged: bool


def prepare(picture: Picture, table: list[Bucket], background: tuple[int, int, int]) -> Prepared:
    """Decode a picture and cut it to the bucket of nearest aspect.

    Sizes and crops that `ingest` noted when it resized the picture are carried over to the new scale.

    Raises:
        PictureError: it can't be decoded.
    """
    image = decode_rgb(picture.data, background)
    bucket = nearest_bucket(image.height, image.width, table)
    enlarged = max(bucket[0] / image.height, bucket[1] / image.width) > 1
    cut, resized, crop = fit(image, *bucket)
    record = dict(picture.record)
    before = record.get("crop")
    if isinstance(before, list) and len(before) == 4 and "original_size" in record:
        crop[0] += round(before[0] * resized[0] / image.height)
        crop[1] += round(before[1] * resized[1] / image.width)
    original = record.get("original_size")
    if not (isinstance(original, list) and len(original) == 2 and all(isinstance(n, int) for n in original)):
        original = [image.height, image.width]
    record.update(original_size=original, crop=crop)
    return Prepared(picture.key, np.asarray(cut), bucket, record, enlarged)


def batches(
    source: PictureSource,
    table: list[Bucket],
    background: tuple[int, int, int],
    size: int,
    workers: int,
    rejects: Rejects,
    bar: tqdm[Any],
) -> Iterator[tuple[Bucket, list[Prepared]]]:
    """Batches of one bucket each. Threads decode ahead; the order depends on the source alone."""
    waiting: dict[Bucket, list[Prepared]] = {}
    with ThreadPoolExecutor(workers) as pool:
        for key, result in _in_order(source, table, background, pool, ahead=workers + size):
            bar.update()
            try:
                sample = result.result() if isinstance(result, Future) else result
            except PictureError as error:
                sample = str(error)
            if isinstance(sample, str):
                rejects.add(key, sample)
                continue
            batch = waiting.setdefault(sample.bucket, [])
            batch.append(sample)
            if len(batch) == size:
                yield sample.bucket, waiting.pop(sample.bucket)
    for bucket in sorted(waiting):
        yield bucket, waiting[bucket]


def _in_order(
    source: PictureSource,
    table: list[Bucket],
    background: tuple[int, int, int],
    pool: ThreadPoolExecutor,
    ahead: int,
) -> Iterator[tuple[str, Future[Prepared] | str]]:
    """(key, picture being prepared, or the reason why it can't be) with at most `ahead` in the works."""
    queue: deque[tuple[str, Future[Prepared] | str]] = deque()
    for item in source:
        if isinstance(item, Unreadable):
            queue.append((item.where, item.reason))
        else:
            queue.append((item.key, pool.submit(prepare, item, table, background)))
        while len(queue) > ahead:
            yield queue.popleft()
    yield from queue


class _Encoder:
    """Batches to float16 moments; what overflows (SDXL's VAE in float16, say) is redone alone in float32."""

    def __init__(self, vae: AutoencoderKL, source: str) -> None:
        self.vae, self.source = vae, source
        self.exact: AutoencoderKL | None = None
        self.redone = 0

    def __call__(self, batch: list[Prepared]) -> list[np.ndarray | None]:
        """One [2C, h, w] float16 array a picture, or None where there is no finite one."""
        import torch

        from finetune.models.autoencoder import load_autoencoder

        arrays: list[np.ndarray | None] = []
        for row, array_2Chw in enumerate(self._moments(self.vae, batch)):
            finite: np.ndarray | None = array_2Chw if np.isfinite(array_2Chw).all() else None
            if finite is None and self.vae.dtype != torch.float32:
                if self.exact is None:
                    self.exact = load_autoencoder(self.source, device=self.vae.device)
                again_2Chw = self._moments(self.exact, batch[row : row + 1])[0]
                if np.isfinite(again_2Chw).all():
                    finite = again_2Chw
                    self.redone += 1
            arrays.append(finite)
        return arrays

    @staticmethod
    def _moments(vae: AutoencoderKL, batch: list[Prepared]) -> np.ndarray:
        import torch

        from finetune.models.autoencoder import encode_moments

        pixels_BHW3 = torch.from_numpy(np.stack([sample.pixels for sample in batch])).to(vae.device)
        images_B3HW = pixels_BHW3.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1.0
        try:
            moments_B2CHW = encode_moments(vae, images_B3HW).cpu().numpy()
        except torch.OutOfMemoryError:
            raise UserError(
                f"out of memory on {vae.device} with --batch {len(batch)}; take a smaller one"
            ) from None
        with np.errstate(over="ignore"):  # an overflow becomes inf, which the caller looks for
            return moments_B2CHW.astype(np.float16)

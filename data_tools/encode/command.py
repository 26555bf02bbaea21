"""The course of `encode`: from its arguments to the set."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from data_tools.arguments import default_workers
from data_tools.devices import Place, choose_device
from data_tools.encode.buckets import candidates
from data_tools.encode.course import Course
from data_tools.encode.encoder import Encoder, TextCache, make_fast
from data_tools.encode.excluded import Excluded
from data_tools.encode.options import refuse_idle
from data_tools.encode.prepare import Recipe
from data_tools.encode.work import join
from data_tools.filters import Filters
from data_tools.images import parse_colour
from data_tools.labels import LEAST_OF_A_BOX
from data_tools.output import refuse_sources
from data_tools.pictures import PictureSource
from data_tools.workers import Workers
from finetune import UserError
from finetune.data.shards import Bucket, EncoderInfo, TextInfo


def run(args: argparse.Namespace) -> int:
    """Run `data-tools encode`."""
    place = Place.find()
    if args.overwrite and place.world > 1:
        raise UserError(f"--overwrite is for one process, not {place.world}; delete {args.out} and start again")
    refuse_idle(args)
    refuse_sources(args.out, [args.shards])
    recipe = _recipe(args)
    source = PictureSource.open(args.shards)
    excluded = Excluded.load(source, args.exclude, args.keep_duplicates)
    classes = source.shards.classes() if source.shards is not None else []

    import torch

    from finetune.models.autoencoder import encoder_info, load_autoencoder
    from finetune.models.single_file import open_file
    from finetune.models.sources import fetch_file

    device = choose_device(args.device)
    torch.backends.cudnn.benchmark = False  # it picks kernels by their speed, so bits may differ from run to run
    torch.backends.cudnn.deterministic = True
    vae = load_autoencoder(args.vae, dtype=getattr(torch, args.dtype), device=device)
    info = encoder_info(vae, args.vae, args.out)
    if place.rank == 0 and (file := fetch_file(args.vae)) is not None and not open_file(file).says_scale:
        print(
            f"{args.vae} does not say its latents' scale: {info.scale:g} is taken, as Stable Diffusion 1.x and 2.x "
            "have it; for another model give that model as --vae",
            file=sys.stderr,
        )
    if args.fast and (missing := make_fast(vae)) and place.rank == 0:
        print(f"--fast needs {missing}, which is not here: the VAE runs as diffusers wrote it", file=sys.stderr)
    fixed = bucket_table(source, args.size, args.aspect_buckets, args.bucket_step, info.downsample)
    if args.lowres and (wrong := [bucket for bucket in fixed if any(side % args.lowres for side in bucket)]):
        shape = f"{wrong[0][0]}x{wrong[0][1]}"
        raise UserError(f"--lowres {args.lowres} does not divide pictures of {shape}; take a factor that does")
    text = TextCache(args.text_encoder, device, args.out) if args.text_encoder else None
    recipe = dataclasses.replace(recipe, step=info.downsample)
    job = _job(args, source, excluded, recipe, info, text.info if text else None)
    workers = default_workers(place.local_world) if args.workers is None else args.workers
    with join(args.out, job, args.overwrite) as work:
        if work is None:
            if place.rank == 0:
                print(f"{args.out} is complete: it was made with these very settings")
            return 0
        encoder = Encoder(vae, args.vae, text)
        with Workers(workers) as pool:
            course = Course(
                work, source, excluded, recipe, args, pool, encoder, info, classes, quiet=place.rank != 0
            )
            try:
                course.run(fixed)
            except FileNotFoundError:
                # Another process has finished the set, and has tidied up what we were about to read.
                if not work.is_finished():
                    raise
    return 0


def _job(
    args: argparse.Namespace,
    source: PictureSource,
    excluded: Excluded,
    recipe: Recipe,
    info: EncoderInfo,
    text: TextInfo | None,
) -> dict[str, Any]:
    """All that the bytes of the set depend on."""
    job: dict[str, Any] = {
        "pictures": source.identity(),
        "vae": dataclasses.asdict(info),
        "dtype": args.dtype,
        "size": args.size,
        "aspect-buckets": args.aspect_buckets,
        "bucket-step": args.bucket_step,
        "max-buckets": args.max_buckets if args.aspect_buckets == "data" else None,
        "min-bucket": args.min_bucket,
        "crop": args.crop,
        "flip": args.flip,
        "seed": args.seed,
        "batch": args.batch,
        "background": list(recipe.background),
        "shard-samples": args.shard_samples,
        "filters": recipe.filters.describe(),
        "excluded": excluded.sha256,
        "text-encoder": dataclasses.asdict(text) if text else None,
    }
    # Only where they are given: sets that were made before these settings came are still the same sets.
    if args.min_box != LEAST_OF_A_BOX:
        job["min-box"] = args.min_box
    if args.holes:
        job |= {"holes": args.holes, "full-holes": args.full_holes}
    if args.lowres:
        job |= {"lowres": args.lowres, "degradation": args.degradation}
    if args.caption != "{}":
        job["caption"] = args.caption
    return job


def _recipe(args: argparse.Namespace) -> Recipe:
    """How pictures are cut; its table and step are yet to come."""
    return Recipe(
        (),
        parse_colour(args.background),
        Filters.from_args(args),
        args.crop,
        args.flip,
        args.seed,
        min_box=args.min_box,
        holes=args.holes,
        full_holes=args.full_holes,
        lowres=args.lowres or 0,
        degradation=args.degradation,
        caption=args.caption,
    )


def bucket_table(
    source: PictureSource, size: int | None, rule: str | None, step: int, downsample: int
) -> list[Bucket]:
    """The (height, width) that pictures may get; of rule `data`, those to choose from.

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
        if rule is not None:
            raise UserError("--aspect-buckets needs --size, whose square is the number of pixels")
        return [source.bucket]
    if size % downsample:
        near = max(round(size / downsample), 1) * downsample
        raise UserError(f"--size {size} does not divide by {downsample}, the VAE's step; take {near}")
    if rule is None:
        return [(size, size)]
    if step % downsample:
        raise UserError(f"--bucket-step {step} does not divide by {downsample}, the VAE's step")
    if not (table := candidates(rule, size, step)):
        raise UserError(f"--size {size} is too small for --bucket-step {step}; take a smaller step")
    return table

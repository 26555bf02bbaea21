"""The arguments of `encode`."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_tools.arguments import add_shard_arguments, add_workers_argument, natural, probability, side
from data_tools.devices import add_device_argument
from data_tools.encode.degrade import DEGRADATIONS
from data_tools.filters import add_filter_arguments
from data_tools.labels import LEAST_OF_A_BOX
from data_tools.texts import sound_text
from finetune import UserError
from finetune.data.shards import set_folder
from finetune.terminal import nonempty, positive

DTYPES = ("float32", "bfloat16", "float16")
RULES = ("sd", "sdxl", "data")
_BUCKETS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data-tools encode`."""
    parser.add_argument("shards", type=set_folder, metavar="SHARDS", help="image shards, or WebDataset tars")
    parser.add_argument(
        "--vae",
        type=nonempty,
        required=True,
        metavar="MODEL",
        help="folder or hub id of a VAE or pipeline; none: latents are the pixels themselves, for models of pixels",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="LATENTS", help="folder for the latent shards")
    parser.add_argument(
        "--text-encoder",
        type=nonempty,
        metavar="MODEL",
        help="keep the captions' states by this text encoder too (folder or hub id of a Stable Diffusion pipeline)",
    )
    parser.add_argument(
        "--caption",
        metavar="TEXT",
        type=_caption,
        default="{}",
        help='rewrite captions, {} is what each was: "{}, fluent emoji style" (a trigger word, a style)',
    )
    sizes = parser.add_argument_group("sizes and crops")
    sizes.add_argument(
        "--size", type=side, metavar="N", help="side of the square in pixels (default: the pictures' own size)"
    )
    sizes.add_argument(
        "--aspect-buckets",
        nargs="?",
        choices=RULES,
        const="sd",
        metavar="RULE",
        help="keep aspects, in buckets of about N x N pixels: sd (sides up to 2:1, the default), sdxl (SDXL's "
        "table, up to 4:1), or data (those that crop the pictures least; reads all sizes first)",
    )
    sizes.add_argument(
        "--bucket-step", type=positive, default=64, metavar="N", help="sides are multiples of it (default: 64)"
    )
    sizes.add_argument(
        "--max-buckets",
        type=positive,
        default=_BUCKETS,
        metavar="N",
        help=f"of --aspect-buckets data (default: {_BUCKETS})",
    )
    sizes.add_argument(
        "--min-bucket",
        type=natural,
        default=0,
        metavar="N",
        help="pictures of buckets with fewer than N go to the nearest other bucket (reads all sizes first)",
    )
    sizes.add_argument(
        "--crop", choices=("center", "random"), default="center", help="where to crop (default: center)"
    )
    sizes.add_argument(
        "--flip",
        type=probability,
        default=0.0,
        metavar="P",
        help="mirror a picture with probability P (default: 0)",
    )
    sizes.add_argument("--seed", type=int, default=0, metavar="N", help="of random crops and flips (default: 0)")
    more = parser.add_argument_group("for more than text", "What is made of each picture for other tasks.")
    more.add_argument(
        "--min-box",
        type=probability,
        default=LEAST_OF_A_BOX,
        metavar="SHARE",
        help=f"leave out boxes of which less is inside the crop (default: {LEAST_OF_A_BOX})",
    )
    more.add_argument(
        "--holes",
        type=natural,
        default=0,
        metavar="K",
        help="for inpainting: draw K holes for each picture, and encode it with each of them too (default: 0)",
    )
    more.add_argument(
        "--full-holes",
        type=probability,
        default=0.0,
        metavar="P",
        help="let a hole be the whole picture with probability P (default: 0; Stable Diffusion: 0.25)",
    )
    more.add_argument(
        "--lowres",
        type=positive,
        metavar="F",
        help="for super-resolution: keep each crop at 1/F of its size too",
    )
    more.add_argument(
        "--degradation",
        choices=DEGRADATIONS,
        default="bicubic",
        help="how it is made small: bicubic, or blind: random blurs, resizing, noise and JPEG, as BSRGAN's "
        "(default: bicubic)",
    )
    parser.add_argument("--exclude", type=Path, metavar="FILE", help="keys to leave out: one a line, or JSON lines")
    parser.add_argument(
        "--keep-duplicates", action="store_true", help="don't leave out what SHARDS/duplicates.jsonl lists"
    )
    parser.add_argument("--batch", type=positive, default=8, metavar="N", help="pictures at a time (default: 8)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the VAE (default: float32)")
    parser.add_argument(
        "--fast",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on GPUs from Ampere on: kernels of our own for the VAE (default: yes)",
    )
    add_device_argument(parser)
    add_workers_argument(parser)
    add_shard_arguments(parser, "LATENTS")
    add_filter_arguments(parser)


def refuse_idle(args: argparse.Namespace) -> None:
    """Refuse options that have no effect without another one.

    Raises:
        UserError: there is such a one; says which other it needs.
    """
    for name, idle, needs, there in (
        ("full_holes", 0, "--holes", args.holes),
        ("degradation", "bicubic", "--lowres", args.lowres),
        ("min_bucket", 0, "--aspect-buckets", args.aspect_buckets),
        ("max_buckets", _BUCKETS, "--aspect-buckets data", args.aspect_buckets == "data"),
    ):
        if (value := getattr(args, name)) != idle and not there:
            raise UserError(
                f"--{name.replace('_', '-')} {value} has no effect without {needs}; give both, or neither"
            )


def _caption(text: str) -> str:
    if "{}" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} has no place for the caption; put {{}} where it goes")
    if sound_text(text) != text:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8")
    return text

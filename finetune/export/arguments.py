"""What the commands that take a model have in common on the command line."""

from __future__ import annotations

import argparse
import re
from typing import Any

from finetune import UserError
from finetune.ema import LARGEST_SIGMA_REL

DTYPES = ("float32", "float16", "bfloat16")


def add_source_arguments(parser: argparse.ArgumentParser, metavar: str, text: str) -> None:
    """The model that a command works on."""
    parser.add_argument("source", metavar=metavar, help=text)
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="with vocab.json and merges.txt, for a single file (default: CLIP's)"
    )


def add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    """Which of a run's weights, and in which precision."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--weights",
        type=weights,
        default="ema",
        metavar="ema|ema:NAME|raw",
        help="a run's first average of the weights, another of its averages, or the last step's (default: ema)",
    )
    which.add_argument(
        "--ema",
        dest="weights",
        type=length,
        metavar="SIGMA_REL",
        help="an average of this length as a share of the run (0.13), made of its snapshots (ema.snapshot_every)",
    )
    parser.add_argument("--checkpoint", type=step, metavar="STEP", help="a run's checkpoint (default: the latest)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")


def require_path(option: str, text: str) -> None:
    """Refuse an address where something is written, which would make a folder of the name `s3:` here.

    Raises:
        UserError: it is one.
    """
    if "://" in text:
        raise UserError(f"{option} {text} is an address: give a folder or file of this machine, and copy it there")


def weights(text: str) -> str:
    """`ema`, `ema:NAME` or `raw`."""
    if text not in ("ema", "raw") and not re.fullmatch(r"ema:[\w.-]+", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text} is not known: choose ema, ema:NAME or raw")
    return text


def length(text: str) -> str:
    """The weights that `--ema` asks for: its standard deviation as a share of the run, as `Weights` says it."""
    value = float(text)
    if not 0.001 <= value <= LARGEST_SIGMA_REL:
        raise argparse.ArgumentTypeError(f"{text} is a share of the run: 0.001 to {LARGEST_SIGMA_REL:.4f}")
    return f"sigma_rel={value:g}"


def step(text: str) -> int:
    """A checkpoint's step: `1000`, or its folder's name, `step-00001000`."""
    return int(text.strip("/").removeprefix("step-"))


def torch_dtype(name: str) -> Any:
    """One of `DTYPES` as torch's."""
    import torch

    return getattr(torch, name)

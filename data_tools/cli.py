"""Prepare data sets: pictures to image shards, image shards to latent shards, and a look at either.

The `data-tools` command, also `python -m data_tools`.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from typing import NoReturn

from finetune import __version__, run_cli
from finetune.terminal import Parser

_EXAMPLES = """\
examples:
  data-tools ingest folder photos --out shards/photos
  data-tools dedupe shards/photos
  data-tools encode shards/photos --vae models/vae --size 512 --out latents/photos
  data-tools verify latents/photos
  data-tools preview latents/photos --out sheet.png
"""
_INGEST_EXAMPLES = """\
examples:
  data-tools ingest folder photos --out shards/photos
  data-tools ingest coco instances_val2017.json --images val2017 --out shards/coco
  data-tools ingest iconify iconify-json-noto-1.2.9.tgz --out shards/noto --size 64
  data-tools ingest hf lambdalabs/naruto-blip-captions --out shards/naruto
  data-tools ingest tars laion-art --out shards/laion-art --min-size 512
  data-tools ingest table pictures.csv --url-column link --caption-column title --out shards/pictures
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    # Only now, within `run_cli`: Ctrl-C while these are loaded is no traceback.
    from data_tools import dedupe, encode, inspect, preview, verify
    from data_tools.ingest import coco, folder, hf, iconify, table, tars

    parser = Parser(prog="data-tools", description=__doc__.partition("\n")[0], epilog=_EXAMPLES)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    summary = "Make image shards from pictures and captions"
    ingest = commands.add_parser("ingest", help=summary, description=summary + ".", epilog=_INGEST_EXAMPLES)
    sources = ingest.add_subparsers(required=True, metavar="SOURCE")
    for group, name, module in (
        (sources, "folder", folder),
        (sources, "coco", coco),
        (sources, "iconify", iconify),
        (sources, "hf", hf),
        (sources, "tars", tars),
        (sources, "table", table),
        (commands, "dedupe", dedupe),
        (commands, "encode", encode),
        (commands, "verify", verify),
        (commands, "inspect", inspect),
        (commands, "preview", preview),
    ):
        text = module.__doc__ or ""
        summary, _, epilog = text.partition("\n")
        command = group.add_parser(
            name,
            help=summary.rstrip("."),
            description=summary,
            epilog=epilog.strip("\n"),
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0, or 1 when `verify` found problems.

    Raises:
        UserError: a mistake in the arguments or the data; one line.
        SystemExit: argparse's, for `--help` (0).
    """
    args = build_parser().parse_args(argv)
    code: int = args.run(args)
    return code


def entry() -> NoReturn:
    """The console script: `main` with its mistakes as one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # none where it was closed
            stream.reconfigure(errors="backslashreplace")  # names that no locale can spell
    run_cli(main)

"""The arguments of `dedupe`, and its course."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
from pathlib import Path

from data_tools.arguments import add_workers_argument, default_workers
from data_tools.dedupe.fingerprints import look
from data_tools.dedupe.results import draw, tell, write
from data_tools.dedupe.table import Table, find_duplicates
from data_tools.output import FINGERPRINTS, lock_folder
from data_tools.pictures import PictureSource
from finetune import UserError
from finetune.data.shards import set_folder

_SORT = "sort-"  # what the folder that a run sorts in begins with


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data-tools dedupe`."""
    parser.add_argument("shards", type=set_folder, nargs="+", metavar="SHARDS", help="folders of image shards")
    parser.add_argument(
        "--distance", type=int, default=10, metavar="BITS", help="of near duplicates, 0 to 32 of 256 (default: 10)"
    )
    parser.add_argument(
        "--colour", type=int, default=8, metavar="LEVELS", help="difference of colours, of 255 (default: 8)"
    )
    parser.add_argument("--exact", action="store_true", help="only pictures whose pixels are the same")
    parser.add_argument("--dry-run", action="store_true", help="count, but leave the lists as they are")
    parser.add_argument("--report", type=Path, metavar="PNG", help="draw some near duplicates, the doubtful first")
    add_workers_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Run `data-tools dedupe`."""
    _check(args)
    with contextlib.ExitStack() as locks:
        sources = [PictureSource.open(root) for root in args.shards]
        for source in sources:
            try:
                (source.root / FINGERPRINTS).mkdir(exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot write to {source.root} ({error.strerror}); copy the set") from None
            locks.enter_context(lock_folder(source.root / FINGERPRINTS, shared=False))
            for left in (source.root / FINGERPRINTS).glob(f"{_SORT}*"):  # by a run that was killed
                shutil.rmtree(left, ignore_errors=True)
        return _dedupe(sources, args)


def _dedupe(sources: list[PictureSource], args: argparse.Namespace) -> int:
    # Before the pictures are read: they may be replaced meanwhile.
    identities = {source.root: source.identity() for source in sources}
    known = look(sources, default_workers() if args.workers is None else args.workers)
    for source in sources:
        if not any(part.count for part in known if part.source is source):
            raise UserError(f"{source.root} has no picture that can be read; run `data-tools verify` on it")
    with tempfile.TemporaryDirectory(prefix=_SORT, dir=sources[0].root / FINGERPRINTS) as work:
        table = Table.gather(known, Path(work))
        found = find_duplicates(table, None if args.exact else args.distance, args.colour)
        if not args.dry_run:
            write(identities, known, table, found)
        if args.report is not None:
            draw(args.report, known, table, found)
        tell(sources, known, table, found, args)
    return 0


def _check(args: argparse.Namespace) -> None:
    if not 0 <= args.distance <= 32:
        raise UserError(f"--distance {args.distance} is outside 0 to 32; with more, different pictures are alike")
    if not 0 <= args.colour <= 255:
        raise UserError(f"--colour {args.colour} is outside 0 to 255")
    if args.report is not None and args.report.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--report {args.report} should end in .png, .jpg or .webp")
    folders = [root.resolve() for root in args.shards]
    for place, folder in enumerate(folders):
        if folder in folders[:place]:
            raise UserError(f"{args.shards[place]} is given twice; give each set once")
    try:
        import imagehash  # noqa: F401 (the workers need it: say so before they do)
    except ImportError:
        raise UserError("dedupe needs ImageHash; run `pip install ImageHash`") from None

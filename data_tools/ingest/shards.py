"""The way from a source's items into the shards.

Worker processes read, filter and check pictures a bounded number ahead, and one process writes them in the source's
order. So memory doesn't grow with the source, and the same source gives the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.arguments import default_workers
from data_tools.filters import Filtered
from data_tools.ingest.items import Found, SetAside
from data_tools.ingest.options import Options
from data_tools.ingest.prepare import Prepared, prepare
from data_tools.output import SOURCE, claimed_folder, refuse_sources
from data_tools.rejects import Rejects
from data_tools.texts import printable, sound_text
from data_tools.workers import CrashError, Workers
from finetune import UserError
from finetune.data.shards import (
    MAP,
    MASK,
    Bucket,
    Manifest,
    ShardError,
    ShardWriter,
    json_bytes,
    write_atomic,
    write_classes,
)
from finetune.data.shards.images import PictureError

_FEW, _FEW_BYTES = 64, 64 << 20  # a source of no more than this isn't worth the start of workers
_REASONS_SHOWN = 10
_MAX_OTHERS = 64  # kinds of optional members: an index has a column for each


@dataclass
class _Tally:
    """What came of a source's pictures, but for those that are set aside."""

    samples: int = 0
    without_caption: int = 0
    carried: int = 0
    boxes_lost: int = 0
    odd: int = 0
    first_without: str = ""
    first_odd: str = ""
    filtered: Counter[str] = field(default_factory=Counter)
    sizes: set[Bucket] = field(default_factory=set)  # two at most: all that matters is whether there is one

    def add(self, item: Found, result: Prepared, carried: bool) -> None:
        """Count a picture that is in the shards."""
        self.samples += 1
        self.carried += carried
        self.boxes_lost += result.boxes_lost
        if result.odd is not None:
            self.first_odd = self.first_odd or f"{printable(item.file)}: {result.odd}"
            self.odd += 1
        if len(self.sizes) < 2:
            self.sizes.add(result.bucket)
        if not result.record.get("captions"):
            self.first_without = self.first_without or printable(item.file)
            self.without_caption += 1

    def lines(self, options: Options) -> Iterator[str]:
        """What is to be said of them."""
        if self.odd:
            what = f"a {MAP} or {MASK} of another kind, kept with `other.` before its name"
            yield f"{self.odd} pictures have {what}; the first, {self.first_odd}"
        if self.boxes_lost:
            yield f"{self.boxes_lost} boxes left out: --size leaves less than {options.min_box:.0%} of each"
        if self.carried and options.size:
            others = "other members, carried over as they are: --size is for the picture alone"
            yield f"{self.carried} pictures have {others}"
        if self.without_caption:
            yield f"{self.without_caption} pictures have no caption, the first is {self.first_without}"
        if self.filtered:
            yield f"{self.filtered.total()} pictures left out by filters: {_counts(self.filtered)}"


def ingest(
    args: argparse.Namespace,
    options: Options,
    items: Iterable[Found | SetAside],
    *,
    source: str,
    paths: Iterable[Path],
    total: int | None = None,
    origin: bytes | None = None,
    classes: Sequence[str] = (),
) -> int:
    """Write a source's pictures into shards in `args.out`, and say what came of them.

    Args:
        source: what to call the source in messages.
        paths: its files and folders on this machine, which `args.out` must not be.
        total: pictures in the source, where it is known, for the progress bar.
        origin: content for SOURCE.json.
        classes: the names of classes, for classes.json; none where nothing is known of them.

    Raises:
        UserError: nothing is left, or a mistake found on the way.
    """
    refuse_sources(args.out, paths)
    classes = [sound_text(name) for name in classes]
    if classes:
        options = replace(options, classes=len(classes))
    workers = default_workers() if args.workers is None else args.workers
    with claimed_folder(args.out, args.overwrite) as out:
        if origin is not None:
            write_atomic(out / SOURCE, origin)
        with (
            Rejects(out) as rejects,
            ShardWriter(out, "images", max_samples=args.shard_samples) as writer,
            tqdm(total=total, unit="picture", disable=None) as bar,
            contextlib.closing(_in_workers(workers, options, items)) as results,
        ):
            tally = _write(results, writer, rejects, bar)
            if tally.filtered and not tally.samples:
                what = f"; {len(rejects)} more can't be used" if rejects else ""
                raise UserError(
                    f"the filters leave none of the pictures in {source} ({_counts(tally.filtered)}){what}"
                )
            rejects.require_some_left(tally.samples, source)
            rejects.save()
            # Only now is it known whether all pictures share one size, which `encode` then takes as its own.
            uniform = tally.sizes.pop() if len(tally.sizes) == 1 else None
            shards = [replace(shard, bucket=uniform) for shard in writer.close()]
            names = write_classes(out, classes) if classes else None
            Manifest("images", writer.members, shards, classes=names).save(out)
    for line in tally.lines(options):
        print(line)
    print(f"{tally.samples} pictures in {args.out}{rejects.summary()}")
    return 0


def _write(
    results: Iterable[tuple[Found | SetAside, Any]], writer: ShardWriter, rejects: Rejects, bar: tqdm[Any]
) -> _Tally:
    tally = _Tally()
    others: set[str] = set()
    for item, result in results:
        bar.update()
        match result:
            case SetAside(file, reason):
                rejects.add(file, reason)
            case PictureError() | CrashError():
                rejects.add(item.file, str(result))
            case Filtered(reason):
                tally.filtered[reason] += 1
            case Prepared():
                assert isinstance(item, Found)
                members = _members(item, result)
                more = members.keys() - {result.member, "json"}
                if len(others | more) > _MAX_OTHERS:
                    what = f"more than {_MAX_OTHERS} kinds of members in the set; has its name dots in it?"
                    rejects.add(item.file, f"{what} ({printable(', '.join(sorted(more)))})")
                    continue
                others |= more
                try:
                    writer.write(item.key, members)
                except ShardError as error:
                    rejects.add(item.file, str(error))
                else:
                    tally.add(item, result, carried=bool(more - {MAP, MASK}))
            case _:
                raise AssertionError(f"an unforeseen result {result!r}")
    return tally


def _in_workers(
    workers: int, options: Options, items: Iterable[Found | SetAside]
) -> Generator[tuple[Found | SetAside, Any], None, None]:
    """(item, what `prepare` made of it, or its PictureError), in order; files that were ours are deleted."""
    source = iter(items)
    first: list[Found | SetAside] = []
    size = 0
    while len(first) < _FEW and size < _FEW_BYTES and (item := next(source, None)) is not None:
        first.append(item)
        size += len(item.data) if isinstance(item, Found) and isinstance(item.data, bytes) else 0
    few = len(first) < _FEW and size < _FEW_BYTES
    with Workers(0 if few else workers) as pool:
        function = partial(prepare, options=options)
        for item, result in pool.map(
            function, itertools.chain(first, source), catch=(PictureError, CrashError), name=lambda item: item.file
        ):
            if isinstance(item, Found) and item.temporary and isinstance(item.data, Path):
                item.data.unlink(missing_ok=True)
            yield item, result


def _members(item: Found, result: Prepared) -> dict[str, bytes]:
    data = result.data
    if data is None:
        assert isinstance(item.data, bytes)
        data = item.data
    others = {name: content for name, content in item.extra.items() if name not in (MAP, MASK)}
    return {result.member: data, "json": json_bytes(result.record), **others, **result.extra}


def _counts(reasons: Counter[str]) -> str:
    """ "7 smaller than 512 px, 5 no caption", the most frequent first."""
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count} {reason}" for reason, count in ordered[:_REASONS_SHOWN]]
    if rest := sum(count for _, count in ordered[_REASONS_SHOWN:]):
        shown.append(f"{rest} for other reasons")
    return ", ".join(shown)

"""What is said of a set of latents when it is made."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from data_tools.encode import assemble
from data_tools.output import REJECTS
from finetune.data.shards import Bucket, LatentStats


def report(plan: assemble.Plan, table: list[Bucket], stats: LatentStats, args: argparse.Namespace) -> Iterator[str]:
    """The lines, the last of them the sum."""
    if len(plan.buckets) > 1:
        yield "height x width    samples   cropped away"
        for number, samples in sorted(plan.buckets.items(), key=lambda item: int(item[0])):
            height, width = table[int(number)]
            yield f"{height:>6} x {width:<6} {samples:>9,}   {plan.crop_loss.get(number, 0.0):>11.1%}"
    if plan.redone:
        yield f"{plan.redone} pictures overflowed in {args.dtype} and were redone in float32"
    if plan.enlarged:
        yield f"{plan.enlarged} pictures are smaller than their bucket and were enlarged"
    if plan.boxes_lost:
        less = f"less than {args.min_box:.0%} of each is in the crop"
        yield f"{plan.boxes_lost} of {plan.boxes + plan.boxes_lost} boxes were left out: {less}"
    for reason, count in plan.filtered.items():
        yield f"{count} pictures were left out by a filter: {reason}"
    if plan.excluded:
        yield f"{plan.excluded} pictures were left out as duplicates or by --exclude"
    aside = plan.rejects + len(plan.repeats)
    end = f"; {aside} set aside, listed in {args.out / REJECTS}" if aside else ""
    what = f"{plan.samples} latents, mean {stats.mean:+.3f}, std {stats.std:.3f}, in {len(plan.buckets)} buckets"
    yield f"{what}, in {args.out}{end}"

"""The phases of an encoding: sizes and the table, the units' parts, the plan, its shards, the set."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from data_tools.encode import assemble
from data_tools.encode.buckets import aspect_step, choose_buckets, merge_small
from data_tools.encode.encoder import Encoder
from data_tools.encode.excluded import Excluded
from data_tools.encode.prepare import Recipe, measure
from data_tools.encode.report import report
from data_tools.encode.stream import Stream, name_of
from data_tools.encode.work import Work
from data_tools.output import JOB, SOURCE
from data_tools.pictures import Picture, PictureSource, Unreadable
from data_tools.workers import CrashError, Workers
from finetune.data.shards import (
    EMPTY_TEXT,
    HOLE,
    LATENT,
    LOWRES,
    MAP,
    MASK,
    MASKED,
    TEXT,
    Bucket,
    EncoderInfo,
    LatentStats,
    Manifest,
    write_atomic,
    write_classes,
)

_SIZES, _TABLE, _PARTS, _PLAN, _SHARDS, _FINISH = range(6)  # phases


class Course:
    """The phases of an encoding, each shared with all other processes that work in the folder."""

    def __init__(
        self,
        work: Work,
        source: PictureSource,
        excluded: Excluded,
        recipe: Recipe,
        args: argparse.Namespace,
        pool: Workers,
        encoder: Encoder,
        info: EncoderInfo,
        classes: list[str],
        quiet: bool,
    ) -> None:
        self.work, self.source, self.excluded, self.recipe, self.args = work, source, excluded, recipe, args
        self.pool, self.encoder, self.info, self.quiet = pool, encoder, info, quiet
        self.classes = classes
        self.units = source.units()
        self.members = [LATENT, "json", *([TEXT] if encoder.text else [])]
        if source.shards is not None:
            self.members += [name for name in (MAP, MASK) if name in source.shards.manifest.members]
        self.members += [LOWRES] * bool(args.lowres) + [HOLE, MASKED] * bool(args.holes)
        self.table: list[Bucket] = []

    def run(self, fixed: list[Bucket]) -> None:
        """All phases, from wherever earlier processes have left them."""
        work, units = self.work, len(self.units)
        counted = self.args.aspect_buckets is not None and (
            self.args.aspect_buckets == "data" or self.args.min_bucket > 0
        )
        if counted:
            with self._bar("sizes") as (update, seen):
                work.share(_SIZES, units, work.marks("sizes"), lambda n: self._measure(n, update), seen)
        self._once(_TABLE, "table.json", lambda: work.publish("table.json", self._table(fixed, counted)))
        if work.is_finished():
            return
        self.table = [(height, width) for height, width in work.read("table.json")]
        recipe = dataclasses.replace(self.recipe, table=tuple(self.table))
        stream = Stream(work, self._read, recipe, self.members, self.pool, self.encoder, self.args.batch)
        with self._bar("pictures") as (update, seen):
            stream.run(work.claimed(_PARTS, units, work.marks("done"), seen), update)
        names = [unit.name for unit in self.units]
        self._once(
            _PLAN,
            "plan.json",
            lambda: assemble.make_plan(work, names, self.args.shard_samples, self._summarise),
        )
        if work.is_finished():
            return
        plan = assemble.load_plan(work)
        assemble.require_samples(work, plan, units, self.args.shards)
        with tqdm(total=len(plan.shards), desc="shards", unit="shard", disable=self.quiet or None) as bar:
            work.share(
                _SHARDS,
                len(plan.shards),
                work.marks("shards"),
                lambda n: assemble.write_one(work, plan, self.table, n),
                lambda done: _show(bar, len(done)),
            )
        work.share(_FINISH, 1, work.manifest, lambda _: self._finish(plan))

    def _once(self, phase: int, name: str, do: Callable[[], None]) -> None:
        self.work.share(phase, 1, self.work.mark(name), lambda _: do())

    @contextlib.contextmanager
    def _bar(self, what: str) -> Iterator[tuple[Callable[[int], None], Callable[[set[int]], None]]]:
        """A bar over all units: what this process does at once, what others do when a unit of theirs is done."""
        ours: set[int] = set()
        sizes = [unit.samples for unit in self.units]
        known = [size for size in sizes if size is not None]
        # Of foreign tars nobody knows how many pictures they hold before they are read: bytes stand for them.
        total = sum(known) if len(known) == len(sizes) else None
        here = 0
        with tqdm(total=total, desc=what, unit="picture", disable=self.quiet or None) as bar:

            def update(unit: int) -> None:
                nonlocal here
                ours.add(unit)
                here += 1
                bar.update()

            def seen(done: set[int]) -> None:
                others = sum(sizes[unit] or 0 for unit in done - ours)
                _show(bar, here + others)

            yield update, seen

    # phase 1: which aspects there are, and the table

    def _read(self, unit: int, excluded: Callable[[], None] = lambda: None) -> Iterator[Picture | Unreadable]:
        for item in self.source.read(unit):
            if isinstance(item, Picture) and item.key in self.excluded:
                excluded()
            else:
                yield item

    def _measure(self, unit: int, update: Callable[[int], None]) -> None:
        histogram: dict[int, int] = {}
        about = self.units[unit]
        if about.bucket and about.samples and not self.recipe.filters and not self.excluded:
            self.work.publish(f"sizes/{unit:05d}.json", [[aspect_step(*about.bucket), about.samples]])
            return
        steps = self.pool.map(
            functools.partial(measure, recipe=self.recipe), self._read(unit), catch=(CrashError,), name=name_of
        )
        for _, step in steps:
            if isinstance(step, int):
                histogram[step] = histogram.get(step, 0) + 1
            update(unit)
        rows = [[step, histogram[step]] for step in sorted(histogram)]
        self.work.publish(f"sizes/{unit:05d}.json", rows)

    def _table(self, table: list[Bucket], counted: bool) -> list[Bucket]:
        if not counted:
            return sorted(table)
        histogram: dict[int, int] = {}
        for unit in range(len(self.units)):
            for step, count in self.work.read(f"sizes/{unit:05d}.json"):
                histogram[step] = histogram.get(step, 0) + count
        if self.args.aspect_buckets == "data":
            table = choose_buckets(table, histogram, self.args.max_buckets)
        return sorted(merge_small(table, histogram, self.args.min_bucket))

    # phases 3 to 5: the set

    def _summarise(self, states: list[dict[str, Any]]) -> list[Any]:
        from finetune.latents import LatentSpace, RunningMoments

        moments = RunningMoments()
        for state in states:
            moments.merge(state)
        if moments.count == 0:
            return []
        return list(moments.summary(LatentSpace(self.info.scale, self.info.shift)))

    def _finish(self, plan: assemble.Plan) -> None:
        work, out = self.work, self.work.out
        assemble.write_rejects(work, plan, len(self.units))
        if (self.args.shards / SOURCE).is_file():  # whose pictures they are, and under which licence
            write_atomic(out / SOURCE, (self.args.shards / SOURCE).read_bytes())
        if self.encoder.text is not None:
            write_atomic(out / EMPTY_TEXT, self.encoder.text.empty())
        write_atomic(out / JOB, (work.root / "job.json").read_bytes())
        shards = assemble.load_shards(work, plan)
        stats = LatentStats(*plan.latents)
        text = self.encoder.text.info if self.encoder.text is not None else None
        classes = write_classes(out, self.classes) if self.classes else None
        manifest = Manifest("latents", self.members, shards, self.info, stats, text, classes=classes)
        lines = list(report(plan, self.table, stats, self.args))
        manifest.save(out)
        work.remove()
        print("\n".join(lines), flush=True)


def _show(bar: Any, value: int) -> None:
    if value > bar.n:
        bar.update(value - bar.n)

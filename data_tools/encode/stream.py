"""Units' pictures to their parts: decoded in worker processes, encoded, and written, all at the same time.

One thread reads and feeds the workers, another the accelerator, a third writes. They run from one unit into the
next, but batches are formed within a unit, in its order: what is computed together never depends on who does it.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from data_tools.encode.encoder import Batch, Encoded, Encoder, Running, stack
from data_tools.encode.parts import PartWriter, Tally
from data_tools.encode.prepare import Prepared, Recipe, prepare
from data_tools.encode.work import Claimed, Work
from data_tools.filters import Filtered
from data_tools.pictures import Picture, Unreadable
from data_tools.workers import CrashError, Workers
from finetune.data.shards import LATENT, MASKED, TEXT, Bucket, ShardError, json_bytes, latent_bytes
from finetune.data.shards.files import npy_bytes
from finetune.data.shards.images import PictureError

_BATCHES_AHEAD = 3  # of the encoder, and of the writer


class _Unit:
    """A claimed unit on its way to its part."""

    def __init__(self, claimed: Claimed, part: PartWriter) -> None:
        from finetune.latents import RunningMoments

        self.claimed, self.part = claimed, part
        self.tally, self.moments = Tally(), RunningMoments()
        # Rejects of the writer: in a list of their own, so that their order is fixed.
        self.late: list[list[str]] = []

    def finish(self) -> None:
        """Leave it done, and let go of it."""
        with self.claimed:
            self.tally.rejects += self.late
            self.tally.moments = self.moments.state()
            self.part.finish(self.tally)

    def close(self) -> None:
        """Let go of it as it is; without `finish`, what it holds is nobody's."""
        self.part.close()
        self.claimed.scope.close()


def _close(units: set[_Unit]) -> None:
    for unit in units:
        unit.close()


_END: Any = object()  # what comes after the last batch


class Stream:
    """What makes parts of claimed units.

    Args:
        read: the items of a unit, given its number, and what to call for each picture that is excluded.
        recipe: with its table, whose numbers the parts' files have.
        members: of the samples, as the index will have them.
    """

    def __init__(
        self,
        work: Work,
        read: Callable[[int, Callable[[], None]], Iterator[Picture | Unreadable]],
        recipe: Recipe,
        members: Sequence[str],
        pool: Workers,
        encoder: Encoder,
        batch: int,
    ) -> None:
        self.work, self.read, self.recipe, self.members = work, read, recipe, members
        self.pool, self.encoder, self.batch = pool, encoder, batch

    def run(self, units: Iterator[Claimed | None], update: Callable[[int], None]) -> None:
        """Make the parts of all units that come; `update` is told a unit's number for each of its pictures."""
        under_way: set[_Unit] = set()
        ended: list[_Unit] = []  # whose last batch may still be running
        with contextlib.ExitStack() as scope:
            scope.callback(_close, under_way)
            writer = scope.enter_context(ThreadPoolExecutor(1))
            reader = scope.enter_context(ThreadPoolExecutor(1))
            batches = self._batches(units, under_way, update)
            coming = deque(reader.submit(next, batches, _END) for _ in range(_BATCHES_AHEAD))
            scope.callback(lambda: [future.cancel() for future in coming])
            written: deque[Future[None]] = deque()
            running: tuple[_Unit, Running] | None = None

            def finish(unit: _Unit) -> None:
                unit.finish()
                under_way.discard(unit)

            while (came := coming.popleft().result()) != _END:
                coming.append(reader.submit(next, batches, _END))
                unit, batch = came
                following = None
                if batch is not None:
                    assert unit is not None
                    following = unit, self.encoder.start(batch)
                elif unit is not None:
                    ended.append(unit)
                    if running is not None:  # the GPU goes on with the next unit's first batch
                        continue
                if running is not None:  # one batch late, so that the GPU has the next one already
                    written.append(writer.submit(self._write, running[0], self.encoder.finish(running[1])))
                written += [writer.submit(finish, unit) for unit in ended]
                ended.clear()
                running = following
                while len(written) > (_BATCHES_AHEAD if running is not None else 0):
                    written.popleft().result()
            assert running is None and not ended

    def _batches(
        self, units: Iterator[Claimed | None], under_way: set[_Unit], update: Callable[[int], None]
    ) -> Iterator[tuple[_Unit | None, Batch | None]]:
        """Batches with their units; (unit, None) after its last one, (None, None) where there is none to be had.

        The last of all is (None, None): units are only done when what they left is written.
        """
        for claimed in units:
            if claimed is None:
                yield None, None
                continue
            unit = _Unit(claimed, PartWriter(self.work, claimed.number, self.recipe.table, self.members))
            under_way.add(unit)
            for batch in self._batches_of(unit, update):
                yield unit, batch
            yield unit, None

    def _batches_of(self, unit: _Unit, update: Callable[[int], None]) -> Iterator[Batch]:
        number, tally = unit.claimed.number, unit.tally
        pin = self.encoder.on_gpu
        waiting: dict[Bucket, list[Prepared]] = {}

        def left_out() -> None:
            tally.excluded += 1
            tally.seen += 1
            update(number)

        work = self.pool.map(
            functools.partial(prepare, recipe=self.recipe),
            self.read(number, left_out),
            ahead=4 * self.pool.count + self.batch,
            catch=(PictureError, CrashError),
            name=name_of,
        )
        for item, result in work:
            update(number)
            tally.seen += 1
            match result:
                case Prepared():
                    batch = waiting.setdefault(result.bucket, [])
                    batch.append(result)
                    if len(batch) == self.batch:
                        yield stack(result.bucket, waiting.pop(result.bucket), pin)
                case Filtered(reason):
                    tally.filtered[reason] = tally.filtered.get(reason, 0) + 1
                case Unreadable(where, reason):
                    tally.rejects.append([where, reason])
                case PictureError() | CrashError():
                    tally.rejects.append([name_of(item), str(result)])
        for bucket in sorted(waiting):
            yield stack(bucket, waiting[bucket], pin)

    def _write(self, unit: _Unit, results: list[Encoded]) -> None:
        tally, kept = unit.tally, []
        for result in results:
            sample = result.sample
            tally.redone += result.redone
            if result.moments is None:
                unit.late.append([sample.key, "latents are not finite, even in float32"])
                continue
            members = {LATENT: latent_bytes(result.moments), "json": json_bytes(sample.record)}
            if result.states is not None:
                members[TEXT] = result.states
            members |= sample.extra
            if result.masked is not None:
                members[MASKED] = npy_bytes(result.masked)
            try:
                number = str(unit.part.write(sample.key, members, sample.bucket))
            except ShardError as error:
                unit.late.append([sample.key, str(error)])
                continue
            kept.append(result.moments)
            tally.enlarged += sample.enlarged
            tally.boxes += sample.boxes[0]
            tally.boxes_lost += sample.boxes[1]
            tally.crop_loss[number] = tally.crop_loss.get(number, 0.0) + sample.crop_loss
        if kept:
            unit.moments.add(np.stack(kept))


def name_of(item: Picture | Unreadable) -> str:
    """What to call an item in messages."""
    return item.key if isinstance(item, Picture) else item.where

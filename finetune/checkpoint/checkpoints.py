"""Saves and restores a run: what happens when."""

from __future__ import annotations

import math
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from finetune import AwayError, UserError, by_all, memory
from finetune.checkpoint.contents import members, metadata_of, tensors_of
from finetune.checkpoint.host import HostMemory
from finetune.checkpoint.layout import Layout
from finetune.checkpoint.plan import Entry, Plan, make_plan
from finetune.checkpoint.progress import Progress, read_progress
from finetune.checkpoint.record import (
    TEMPORARY,
    FileSum,
    followed,
    newest_whole,
    prune,
    publish,
    sum_files,
    write_record,
)
from finetune.checkpoint.restore import restore
from finetune.checkpoint.snapshots import keep_snapshot, prune_snapshots
from finetune.checkpoint.writing import Piece, Report, Task, Trouble, Writing, describe
from finetune.distributed import Strategy, Wanted
from finetune.ema import Average
from finetune.posthoc import SNAPSHOTS

_PATIENCE_SECONDS = 10.0  # a save that is due so soon after the one before waits for it
_MEETING_SECONDS = 1.0  # while ranks wait together for a disk
_STALLED_SECONDS = 300.0  # a disk that has taken nothing for so long is given up

_FINISHED, _FINISHING, _WRITTEN, _WRITING = range(4)  # what a rank tells the others: `Checkpoints.state`


@dataclass
class _Save:
    """A save under way. `task`: what this rank's thread does, None for nothing.

    `publishing`: held by rank 0's thread from when it begins to publish, unless the save `is_given_up`, to its end.
    """

    progress: Progress
    averages: dict[str, dict[str, Any]]  # what each is, by name
    snapshot: bool
    temporary: Path
    final: Path
    writing: Writing
    began_at: float
    task: Task[None] | Task[_Outcome] | None = None
    is_finishing: bool = False
    publishing: threading.Lock = field(default_factory=threading.Lock)
    is_given_up: bool = False


@dataclass(frozen=True)
class _Round:
    """`starts`: where in host memory this rank's tensors lie, by their place among `entries`; `pieces` of these."""

    entries: list[Entry]
    starts: dict[int, int]
    pieces: list[Piece]


@dataclass(frozen=True)
class _Outcome:
    """How a save ended: why it failed, or None; and what else there is to say."""

    trouble: Trouble | None = None
    note: str | None = None


class Checkpoints:
    """Saves and restores a run under `RUN/checkpoints`, keeping the last `keep` checkpoints.

    `begin` takes a snapshot and leaves its writing to threads. Once a step every rank tells the others its `state`
    and calls `advance` with the largest of all, so that all ranks take the same turn in the same step.

    Attributes:
        say: prints a line for the user; called on rank 0 alone.
    """

    def __init__(
        self,
        run: str | Path,
        layout: Layout,
        keep: int,
        memory_bytes: int | None = None,
        keep_snapshots: int | None = None,
    ) -> None:
        """`memory_bytes`: of host memory for a rank's copy; None: half of what is free on the machine.

        What doesn't fit is written in rounds, and training waits for all but the last. `keep_snapshots`: of
        averages, in `RUN/snapshots`; None for all.
        """
        self.run, self.layout, self.keep, self.memory_bytes = Path(run), layout, keep, memory_bytes
        self.keep_snapshots = keep_snapshots
        self.folder = self.run / "checkpoints"
        self.say: Callable[[str], None] = partial(print, file=sys.stderr)
        self._save: _Save | None = None
        self._plan: Plan | None = None
        self._last_saved: int | None = None
        self._began_at = 0  # the step of the checkpoint that the run went on from
        self._passed_over: set[Path] = set()  # broken checkpoints
        self._snapshots: set[int] = set()  # steps of those that this process made
        self._failures = 0  # in a row
        self._is_patient = True

    # --- saving -----------------------------------------------------------------------------------

    def prepare(self, strategy: Strategy, averages: Sequence[Average]) -> None:
        """Plan the files and take the memory for snapshots, so that the first save stalls no longer than others.

        Collective. Removes what a killed process left half written.
        """
        self._world = world = strategy.world
        self._averages = [average.name for average in averages]
        tensors, holders = members(strategy, averages, self.layout)
        metadata = metadata_of(tensors, self.layout)
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if world.size > 1 else 1
        limit = min(world.gather(self.memory_bytes or memory.free_bytes() // 2 // local_ranks))
        metadata = world.broadcast(metadata)  # one text of each header
        self._plan = make_plan(tensors, metadata, holders, world.size, limit)
        self._memory = HostMemory(self._plan.bytes_of(world.rank), pinned=world.device.type == "cuda")
        self._rounds = [self._round(self._plan, number) for number in range(self._plan.rounds)]
        strategy.prepare_collect()
        self._token, self._attempts = world.broadcast(secrets.token_hex(3)), 0
        world.on_main(self._remove_stale)
        if self._plan.rounds > 1:
            self._say(
                f"note: a snapshot does not fit into {limit / 2**30:.1f} GiB of host memory a process, so training "
                "waits while checkpoints are written; checkpoint.memory_gib sets how much may be taken"
            )

    def _round(self, plan: Plan, number: int) -> _Round:
        entries = [entry for entry in plan.entries if entry.round == number]
        starts: dict[int, int] = {}
        pieces: list[Piece] = []
        at = 0
        for place, entry in enumerate(entries):
            if entry.owner == self._world.rank:
                starts[place] = at
                views = partial(self._memory.views, at, entry.tensor.bytes)
                pieces.append(Piece(entry.tensor.file, entry.offset, views))
                at += entry.tensor.bytes
        return _Round(entries, starts, pieces)

    def _remove_stale(self) -> None:
        for stale in (*self.folder.glob(f"{TEMPORARY}*"), *(self.run / SNAPSHOTS).glob(f"{TEMPORARY}*")):
            shutil.rmtree(stale, ignore_errors=True)

    @property
    def state(self) -> int:
        """What this rank tells the others: 0 with nothing under way, else the save's number and where it stands.

        The further a rank has come, the smaller; what is told of an earlier save, or late, is no state waited for.
        """
        save = self._save
        if save is None:
            return 0
        running = save.task is not None and save.task.running
        if save.is_finishing:
            return 4 * self._attempts + (_FINISHING if running else _FINISHED)
        return 4 * self._attempts + (_WRITING if running else _WRITTEN)

    def advance(self, agreed: int) -> None:
        """Take the next turn when all ranks are ready for it; collective, each step.

        Args:
            agreed: the largest `state` of all ranks, of this step or one before.
        """
        if self._save is not None:
            waited_for = _FINISHED if self._save.is_finishing else _WRITTEN
            if agreed == 4 * self._attempts + waited_for:
                self._turn()

    def begin(
        self, progress: Progress, strategy: Strategy, averages: Sequence[Average], *, snapshot: bool = False
    ) -> None:
        """Begin to save; collective. Training may go on, and calls `advance`.

        A save that is due while the one before is still being written is skipped, and the user is told; one that
        fails is said to have failed and leaves the checkpoints before it as they are.

        Args:
            snapshot: keep a snapshot of the averages by power functions as well. None is skipped: training waits.
        """
        if self._save is not None and not self._wait_a_little():
            if not snapshot:
                self._skip(progress)
                return
            self.finish()
        self._begin(progress, strategy, averages, snapshot)

    def save(
        self, progress: Progress, strategy: Strategy, averages: Sequence[Average], *, snapshot: bool = False
    ) -> None:
        """Save, and wait until the checkpoint is whole; collective. A failure is tried again once.

        Raises:
            UserError, on every rank: the disk is full or refuses; what was half written is removed.
            AwayError, on every rank: it does not answer.
        """
        self.finish()
        for more in (1, 0):
            self._begin(progress, strategy, averages, snapshot)
            final = self._final(progress.step)
            if not self._settle(math.inf):
                raise self._stalled(final)
            if self._failures == 0:
                return
            if more:
                self._say(f"note: trying to save step {progress.step} once more")
        what = f"cannot save {final}: {self._trouble.text}; the checkpoints before it are untouched"
        if self._trouble.is_away:
            raise by_all(AwayError(f"{what}: start the same command again when the disk answers"))
        raise by_all(UserError(f"{what}: make room and start the same command again"))

    def finish(self) -> None:
        """Wait for the save that is under way, if any; collective. Its failure is told, not raised.

        Raises:
            AwayError, on every rank: it is just being published, and the disk no longer answers.
        """
        if self._settle(math.inf):
            return
        save = self._save
        assert save is not None
        if not self._world.broadcast(not self._world.is_main or self._give_up(save)):
            raise self._stalled(save.final)
        self._say(f"warning: {self._lost()}: the disk has taken nothing for {_STALLED_SECONDS:.0f} s")
        self._save = None

    def _give_up(self, save: _Save) -> bool:
        """Let a thread that waits for the disk publish nothing when it goes on: it would remove what is newer.

        False where it is too late for that.
        """
        if not save.publishing.acquire(blocking=False):
            return False
        save.is_given_up = True
        save.publishing.release()
        return True

    # --- turns ------------------------------------------------------------------------------------

    def _begin(self, progress: Progress, strategy: Strategy, averages: Sequence[Average], snapshot: bool) -> None:
        if self._plan is None or self._averages != [average.name for average in averages]:
            self.prepare(strategy, averages)
        plan, world = self._plan, self._world
        assert plan is not None and self._save is None
        self._attempts += 1
        final = self._final(progress.step)
        temporary = self.folder / f"{TEMPORARY}{final.name}-{self._token}-{self._attempts}"
        described = {average.name: average.describe() for average in averages}
        writing = Writing(temporary, plan.sizes)
        save = _Save(progress, described, snapshot, temporary, final, writing, time.monotonic())
        kinds = tensors_of(strategy, averages)
        for number in range(plan.rounds):
            if number > 0:  # the memory is used again
                self._wait_for_round(save)
            copied, pieces = self._snapshot(number, kinds, strategy)
            if number == 0 and world.is_main:
                pieces += [Piece(file, 0, partial(_once, text)) for file, text in plan.headers.items()]
            before = save.task
            save.task = Task(
                partial(self._write, save, before, copied, pieces, number == 0 and world.is_main), "checkpoint"
            )
        self._save = save

    def _wait_for_round(self, save: _Save) -> None:
        assert save.task is not None
        if not self._all_done(save.task, math.inf):
            raise self._stalled(save.final)

    def _snapshot(
        self, number: int, kinds: Sequence[Sequence[torch.Tensor | None]], strategy: Strategy
    ) -> tuple[Callable[[], None], list[Piece]]:
        """Copy one round of what this rank owns to host memory: how to wait for the copies, and what to write."""
        here = self._rounds[number]
        wanted = []
        for entry in here.entries:
            tensor = kinds[entry.tensor.kind][entry.tensor.index]
            assert tensor is not None
            wanted.append(Wanted(entry.tensor.index, tensor, entry.owner))
        copied = strategy.collect(wanted, lambda place, whole: self._memory.put(here.starts[place], whole))
        return copied, [*here.pieces]

    def _write(
        self,
        save: _Save,
        before: Task[Any] | None,
        copied: Callable[[], None],
        pieces: list[Piece],
        with_configs: bool,
        moved: Callable[[], None],
    ) -> None:
        if before is not None:
            before.result()  # an earlier round's failure is this one's
        copied()
        if with_configs:
            for kind in ("weights/", *(f"{name}/" for name in save.averages)):
                files = [file.removeprefix(kind) for file in save.writing.sizes if file.startswith(kind)]
                self.layout.write_configs(save.temporary / kind, files)
            moved()
        save.writing.write(pieces, moved)

    def _turn(self) -> None:
        """All ranks have written, or rank 0 has finished: what comes next; collective."""
        save, world = self._save, self._world
        assert save is not None
        if not save.is_finishing:
            report, defect = self._report(save)
            reports = world.gather(report)
            if defect is not None:
                raise defect
            save.is_finishing, save.task = True, None
            if world.is_main:
                save.task = Task(partial(self._complete, save, reports), "checkpoint")
            return
        outcome: _Outcome | None = None
        defect = None
        if save.task is not None:
            try:
                outcome = save.task.result()
            except Exception as error:
                defect = error
        outcome = world.broadcast(outcome)
        if defect is not None:
            raise defect
        self._save = None
        assert outcome is not None, "rank 0 could not finish a checkpoint"
        seconds = world.broadcast(time.monotonic() - save.began_at)
        self._is_patient = seconds < _PATIENCE_SECONDS
        if outcome.note is not None:
            self._say(f"warning: {outcome.note}")
        if outcome.trouble is None:
            self._last_saved, self._failures = save.progress.step, 0
        else:
            self._failures += 1
            self._trouble = outcome.trouble
            self._say(f"warning: {self._lost(save)}: {outcome.trouble.text}")

    def _report(self, save: _Save) -> tuple[Report, BaseException | None]:
        """This rank's report, and an error of its thread that is no disk's."""
        assert save.task is not None
        try:
            save.task.result()
        except Exception as error:
            trouble = describe(error, self._world.rank, self._world.size)
            return Report({}, trouble), None if isinstance(error, OSError) else error
        return Report(save.writing.sums), None

    def _complete(self, save: _Save, reports: list[Report], moved: Callable[[], None]) -> _Outcome:
        """On rank 0, in its thread: check what was written, record and publish it; else remove it."""
        troubles = [report.trouble for report in reports if report.trouble is not None]
        note = None
        try:
            if not troubles:
                sums = sum_files(save.temporary, moved)
                troubles += self._differences(save, reports, {name: of.words for name, of in sums.items()})
            if not troubles:
                record = asdict(save.progress) | {"averages": save.averages}
                write_record(save.temporary, record, sums)
                with save.publishing:
                    if save.is_given_up:
                        troubles.append(Trouble("it was given up"))
                    else:
                        note = self._publish(save, record, sums, moved)
        except OSError as error:
            troubles.append(describe(error, 0, self._world.size))
        if troubles:
            shutil.rmtree(save.temporary, ignore_errors=True)
        return _Outcome(troubles[0] if troubles else None, note)

    def _publish(
        self, save: _Save, record: dict[str, Any], sums: dict[str, FileSum], moved: Callable[[], None]
    ) -> str | None:
        """Give a whole checkpoint its name and remove old ones, or say why these stay."""
        if save.snapshot:
            keep_snapshot(save.temporary, self.run, save.final.name, record, sums)
            self._snapshots.add(save.progress.step)
        publish(save.temporary, save.final)
        moved()
        try:
            prune(self.run, self.keep, save.progress.step, self._passed_over)
            prune_snapshots(self.run, self.keep_snapshots, self._began_at, self._snapshots)
        except OSError as error:
            return f"old checkpoints in {self.folder} cannot be removed: {error.strerror or error}"
        return None

    def _differences(self, save: _Save, reports: list[Report], found: dict[str, int]) -> list[Trouble]:
        for file, size in save.writing.sizes.items():
            meant = sum(report.sums.get(file, 0) for report in reports) % (1 << 64)
            path = save.temporary / file
            if path.stat().st_size != size or found.get(file) != meant:
                return [
                    Trouble(
                        f"{file} does not hold what was written to it: is {self.folder} the same folder on all "
                        "machines, and its disk sound?"
                    )
                ]
        return []

    # --- waiting ----------------------------------------------------------------------------------

    def _settle(self, seconds: float) -> bool:
        """Wait, so long at most, until nothing is under way; whether it is so. Collective."""
        ends = time.monotonic() + seconds
        while self._save is not None:
            if not self._all_done(self._save.task, ends - time.monotonic()):
                return False
            self._turn()
        return True

    def _all_done(self, task: Task[Any] | None, seconds: float) -> bool:
        """Wait, so long at most, until all ranks' tasks are done, or one has stalled; whether they are. Collective.

        Ranks meet in between, since neither a collective nor the watch waits for as long as a slow disk may take.
        """
        ends = time.monotonic() + seconds
        while True:
            wait_s = min(ends - time.monotonic(), _MEETING_SECONDS)
            done = task is None or task.wait(wait_s, stalled_after=_STALLED_SECONDS)
            now = time.monotonic()
            goes_on = task is None or now < min(ends, task.moved_at + _STALLED_SECONDS)
            states = self._world.gather((done, done or goes_on))
            if all(done for done, _ in states):
                return True
            if not all(may_be for _, may_be in states):
                return False
            self._world.watch.going_on()

    def _wait_a_little(self) -> bool:
        """Wait for the save under way, where it is young and the disk was fast so far; whether it is done.

        Collective. Tiny models save so often. On a slow disk training would wait each time.
        """
        assert self._save is not None
        left = self._world.broadcast(self._save.began_at + _PATIENCE_SECONDS - time.monotonic())
        if not self._is_patient or left <= 0:
            return False
        self._is_patient = self._settle(left)
        return self._is_patient

    def _skip(self, progress: Progress) -> None:
        save, plan = self._save, self._plan
        assert save is not None and plan is not None
        seconds = time.monotonic() - save.began_at
        written, total = sum(self._world.gather(save.writing.written_bytes)), sum(plan.sizes.values())
        self._say(
            f"warning: step {progress.step} is not saved: step {save.progress.step} is still being written, "
            f"{written / 2**20:.0f} of {total / 2**20:.0f} MiB in {seconds:.0f} s ({written / 2**20 / seconds:.1f} "
            "MiB/s); raise checkpoint.every or put run.dir on a faster disk"
        )

    def _lost(self, save: _Save | None = None) -> str:
        save = save or self._save
        assert save is not None
        many = f" ({self._failures} in a row)" if self._failures > 1 else ""
        last = "there is none yet" if self._last_saved is None else f"the last good one is step {self._last_saved}"
        return f"the checkpoint of step {save.progress.step} cannot be saved{many}, {last}"

    def _say(self, line: str) -> None:
        if self._world.is_main:
            self.say(line)

    def _stalled(self, final: Path) -> AwayError:
        return by_all(
            AwayError(
                f"cannot save {final}: the disk has taken nothing for {_STALLED_SECONDS:.0f} s; the checkpoints "
                "before it are untouched: start the same command again when the disk answers"
            )
        )

    def _final(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    # --- reading ----------------------------------------------------------------------------------

    def latest(self) -> Path | None:
        """The run's newest whole checkpoint, see `newest_whole`."""
        return newest_whole(self.run, passed_over=self._passed_over)

    def followed(self, named: str) -> tuple[Path, str]:
        """Where `checkpoint.resume=named` goes on, and `Progress.begun_from` of what follows, see `followed`."""
        return followed(self.run, named, self._passed_over)

    def read(self, path: Path) -> Progress:
        """What a checkpoint says of its run, see `read_progress`."""
        return read_progress(path)

    def restore(self, path: Path, strategy: Strategy, averages: Sequence[Average]) -> None:
        """Put everything back, see `restore`; collective."""
        progress = self.read(path)
        self._last_saved = self._began_at = progress.step
        restore(path, progress, self.layout, strategy, averages)


def _once(data: bytes) -> list[memoryview]:
    return [memoryview(data)]

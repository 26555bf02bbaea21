"""The run's folder as all ranks see it: a place that all can write, read, lock and rename in."""

from __future__ import annotations

import fcntl
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from finetune import UserError
from finetune.checkpoint import RunFolder
from finetune.checkpoint.folder import LOCKS_REMEDY
from finetune.checkpoint.record import sync
from finetune.doctor.context import Context, skipped
from finetune.doctor.table import FAIL, OK, WARN, Row
from finetune.memory import size_text

SCRATCH = ".doctor"
_SEEN_WITHIN_S = 10.0  # NFS clients keep a folder's list for seconds
_WRITE_BYTES = 128 << 20
_WRITE_SECONDS = 4.0
_SLOW_MB_S = 80.0


class Scratch:
    """RUN/.doctor, and the folders above it that were not there, on the rank that makes them.

    Raises:
        UserError: the run's folder is in use by a run or another doctor, or can't be written.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / SCRATCH
        _require_unused(run)
        missing = [folder for folder in (run, *run.parents) if not folder.exists()]
        self._made = missing  # the deepest first
        self._lock = RunFolder(self.path)
        for left in self.path.iterdir():  # of a doctor that was killed
            if left.name != ".lock":
                shutil.rmtree(left) if left.is_dir() else left.unlink()

    def remove(self) -> None:
        """Leave everything as it was."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()
        # NFS keeps a file that is deleted while it is open, as the lock is, and its folder with it.
        for folder in (self.path, *self._made):
            with suppress(OSError):
                folder.rmdir()


def _require_unused(run: Path) -> None:
    """Look at the run's lock without holding it."""
    try:
        with (run / ".lock").open("r") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = file.read().strip() or "another process"
                raise UserError(
                    f"run.dir={run} is in use by {holder}, which the doctor must not disturb: wait for it, or give "
                    "another run.dir on the same file system"
                ) from None
    except OSError:
        return  # no run has been here, or it can't be looked at: what follows says so


def folder_rows(context: Context, scratch: Path) -> list[Row]:
    """Every rank writes a token that all others must read; then locks, renames and speed.

    `context.scratch` is set where all ranks share the folder.
    """
    path, rank = scratch, context.rank
    token = secrets.token_hex(8)

    def write() -> str:
        if not path.is_dir():
            raise UserError(f"{path} is not there")
        _write_synced(path / f"token-{rank}", token.encode())
        return token

    remedy = (
        "run.dir must be on a file system that all machines share, with the same absolute path on each: not "
        "/tmp, not a machine's own disk"
    )
    written = context.exchange("folder", "writing in run.dir", write)
    errors = [rank for rank, outcome in enumerate(written) if outcome.error is not None]
    expected = {rank: outcome.value for rank, outcome in enumerate(written) if outcome.error is None}
    # Rank 0 reads all, others those of one rank a machine: a thousand ranks don't open a million files.
    firsts = {context.board.hosts.index(host) for host in context.board.hosts} | {0, context.size - 1}
    mine = {r: text for r, text in expected.items() if rank == 0 or context.size <= 16 or r in firsts}
    seen = context.exchange("folder", "reading in run.dir", lambda: _unseen(path, mine))
    if rows := context.failures("folder", seen, remedy):
        return rows + skipped(["locks", "disk"], "the folder is not shared")
    wrong = [
        f"{context.named([reader])} cannot see what {context.named(blind)} wrote"
        for reader, outcome in enumerate(seen)
        if (blind := outcome.value)
    ]
    if wrong or errors:
        said = [f"{context.named([r])}: {written[r].error}" for r in errors]
        row = Row("folder", FAIL, f"{context.run}: {'; '.join((said + wrong)[:4])}", remedy)
        return [row, *skipped(["locks", "disk"], "the ranks do not share the folder")]
    context.scratch = path
    hosts = len(set(context.board.hosts))
    row = Row("folder", OK, f"{context.run} is shared by all {context.size} ranks on {hosts} machine(s)")
    return [row, _lock_row(context, path), _disk_row(context, path)]


def _unseen(path: Path, expected: dict[int, str]) -> list[int]:
    """Ranks whose token is not there, after the time that a file system may take."""
    ends = time.monotonic() + _SEEN_WITHIN_S
    left = dict(expected)
    while True:
        with suppress(OSError):
            os.listdir(path)  # makes NFS look again
        for rank, text in list(left.items()):
            with suppress(OSError):
                if (path / f"token-{rank}").read_text() == text:
                    del left[rank]
        # Without the folder itself there is nothing to wait for.
        if not left or time.monotonic() > ends or not path.is_dir():
            return sorted(left)
        time.sleep(0.2)


def _lock_row(context: Context, path: Path) -> Row:
    """Rank 0 holds a lock and renames a file: no other rank may get the lock, all must see the new file."""
    held = path / "lock"
    main = context.rank == 0
    # One rank a machine asks, and always another than rank 0 where there is one.
    asks = main or context.rank == 1 or context.board.hosts.index(context.board.hosts[context.rank]) == context.rank
    holder = None

    def hold() -> None:
        nonlocal holder
        if main:
            holder = held.open("w")
            fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _write_synced(path / "renamed", b"old")
            _write_synced(path / "renamed.new", b"new")
            os.replace(path / "renamed.new", path / "renamed")
            sync(path)

    def ask() -> bool | None:
        return _refused(held) if asks else None

    def see() -> bool:
        ends = time.monotonic() + _SEEN_WITHIN_S
        while True:
            with suppress(OSError):
                if (path / "renamed").read_bytes() == b"new" and not (path / "renamed.new").exists():
                    return True
            if time.monotonic() > ends:
                return False
            time.sleep(0.2)

    try:
        if rows := context.failures("locks", context.exchange("folder", "locking in run.dir", hold), LOCKS_REMEDY):
            return rows[0]
        outcomes = context.exchange("folder", "asking for the lock", ask)
        if rows := context.failures("locks", outcomes, LOCKS_REMEDY):
            return rows[0]
        not_refused = [rank for rank, outcome in enumerate(outcomes) if outcome.value is False]
        seen = context.exchange("folder", "seeing a renamed file", see)
        blind = [rank for rank, outcome in enumerate(seen) if not outcome.value]
    finally:
        if holder is not None:
            holder.close()
    if not_refused:
        said = f"rank 0 held a lock and {context.named(not_refused)} got it as well"
        return Row("locks", FAIL, said, LOCKS_REMEDY)
    if blind:
        said = f"{context.named(blind)} did not see a renamed file within {_SEEN_WITHIN_S:.0f} s"
        return Row("locks", FAIL, said, "the file system's caches are too slow for checkpoints: use another")
    return Row("locks", OK, "flock excludes other ranks; fsync and rename work")


def _refused(path: Path) -> bool:
    """Whether the lock, which someone holds, is refused.

    Raises:
        OSError: locks don't work there at all.
    """
    with path.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _disk_row(context: Context, path: Path) -> Row:
    """How fast rank 0, which writes checkpoints, writes there."""
    outcomes = context.exchange("folder", "writing 128 MiB", lambda: _speed(path) if context.rank == 0 else 0.0)
    if rows := context.failures("disk", outcomes, "make room, or choose a run.dir that can be written"):
        return rows[0]
    speed = outcomes[0].value / 1e6
    free = size_text(shutil.disk_usage(path).free)
    if speed < _SLOW_MB_S:
        return Row(
            "disk",
            WARN,
            f"{speed:.0f} MB/s written and synced (usual: 200 to 2,000), {free} free",
            "a checkpoint takes long there: raise checkpoint.every, or choose a faster file system for run.dir",
        )
    return Row("disk", OK, f"{speed:.0f} MB/s written and synced, {free} free")


def _speed(path: Path) -> float:
    """Bytes a second, with fsync."""
    piece = os.urandom(4 << 20)  # some file systems make zeros to nothing
    file = path / "speed"
    started = time.perf_counter()
    written = 0
    with file.open("wb", buffering=0) as out:
        while written < _WRITE_BYTES and time.perf_counter() - started < _WRITE_SECONDS:
            written += out.write(piece)
            if written % (16 << 20) == 0:
                os.fsync(out)
        os.fsync(out)
    seconds = time.perf_counter() - started
    file.unlink()
    return written / seconds


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file)


def space_row(context: Context, existing: Callable[[], int]) -> Row:
    """Free space against `checkpoint.keep` checkpoints, the one being written, and the snapshots of averages.

    Snapshots count in full: on file systems that can link files they share some with the checkpoints that are kept.

    Args:
        existing: bytes that the run's checkpoints and snapshots take already.
    """
    config = context.config
    assert context.scratch is not None
    keep, kept, each = config.checkpoint.keep, config.ema.snapshot_keep, context.snapshot_bytes
    snapshots = 0 if not config.ema.snapshot_every else math.ceil(config.train.steps / config.ema.snapshot_every)
    if kept is not None:
        snapshots = min(snapshots, kept)
    needed = max(0, (keep + 1) * context.checkpoint_bytes + snapshots * each - existing())
    free = shutil.disk_usage(context.scratch).free + context.checkpoint_bytes  # the doctor's own is there still
    text, remedy = (
        f"{keep} + 1 checkpoints of {size_text(context.checkpoint_bytes)}",
        "make room, or lower checkpoint.keep",
    )
    if snapshots:
        text, remedy = f"{text} and {snapshots} snapshots of {size_text(each)}", f"{remedy} or ema.snapshot_keep"
    text = f"{text} need {size_text(needed)} more"
    if free < needed:
        return Row("space", FAIL, f"{text}, {size_text(free)} are free", remedy)
    if free < 1.2 * needed:
        return Row("space", WARN, f"{text}, {size_text(free)} are free", remedy)
    return Row("space", OK, f"{text}, {size_text(free)} are free")

"""Work that any number of processes share through a folder, and that outlives any of them.

    LATENTS/.lock               byte ranges of it are claims; the kernel lets go of a claim when its holder dies
    LATENTS/.work/job.json      all that the bytes of the result depend on; who joins must have the same
    LATENTS/.work/sizes/        phase 1, if buckets depend on the pictures: their aspects, a file for each unit
    LATENTS/.work/table.json    the buckets
    LATENTS/.work/parts/        phase 2: a folder for each unit (see `parts`)
    LATENTS/.work/done/         a file for each unit that is finished
    LATENTS/.work/plan.json     which samples of which parts make up which shard
    LATENTS/.work/shards/       phase 3: a file for each shard that is finished
    LATENTS/encode.json         job.json of the finished set

A unit is one shard of the source. What marks a thing as done is written under a temporary name and renamed, after
all else that belongs to it; a thing that is claimed but not done was left by a process that died, and is made anew.
So a process may be killed at any moment, and any process started with the same command, on any machine that sees
the folder, goes on. The shared file system must have POSIX locks (`fcntl`) that work across machines: local ones,
NFS 4, Lustre with -o flock, GPFS and CephFS do.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.output import JOB, clear_folder, is_alone, lock_folder
from finetune import UserError
from finetune.data.shards import MANIFEST, write_atomic
from finetune.data.shards.files import WORK

# Bytes of the lock file. `lock_folder` holds number 0: shared by all who encode, or alone by another command.
_SETUP = 1
_FIRST_CLAIM = 1 << 20
_PHASE = 1 << 40

_POLL_SECONDS = 0.05, 1.0  # between looks at what the other processes have done: first, at most


@dataclass(frozen=True)
class Claimed:
    """A thing that this process is to do; leaving the context lets go of it."""

    number: int
    scope: contextlib.ExitStack

    def __enter__(self) -> int:
        return self.number

    def __exit__(self, *_: object) -> None:
        self.scope.close()


class Work:
    """A claimed folder of latents in progress."""

    def __init__(self, out: Path, lock: int) -> None:
        self.out = out
        self.root = out / WORK
        self.manifest = Mark(out / MANIFEST)
        self._lock = lock

    @contextlib.contextmanager
    def claim(self, phase: int, number: int = 0) -> Iterator[bool]:
        """Try to claim one thing of a phase; True if nobody else holds it."""
        start = phase * _PHASE + _FIRST_CLAIM + number
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, start)
        except (BlockingIOError, PermissionError):  # what POSIX allows for a lock that another one holds
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, start)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder for a moment, against others who start or finish."""
        fcntl.lockf(self._lock, fcntl.LOCK_EX, 1, _SETUP)
        try:
            yield
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, _SETUP)

    def is_finished(self) -> bool:
        """Whether somebody has written the manifest."""
        return self.manifest.path.exists()

    def share(
        self,
        phase: int,
        count: int,
        done: Marks | Mark,
        do: Callable[[int], None],
        seen: Callable[[set[int]], None] = lambda _: None,
    ) -> None:
        """Do what is to be done of 0..count-1 together with all other processes; return when all is done.

        Args:
            done: what is done by now, by anyone.
            do: does one thing, and leaves it done.
            seen: told what is done, now and then.
        """
        for claimed in self.claimed(phase, count, done, seen):
            if claimed is not None:
                with claimed:
                    do(claimed.number)

    def claimed(
        self,
        phase: int,
        count: int,
        done: Marks | Mark,
        seen: Callable[[set[int]], None] = lambda _: None,
    ) -> Iterator[Claimed | None]:
        """Things of a phase that this process is to do, each claimed until it is closed; ends when all is done.

        None says that there is nothing to do now but what this process holds, or others do: what is held must be
        done before this ends.

        Args:
            done: what is done by now, by anyone.
            seen: told what is done, now and then.
        """
        left = list(range(count))
        held: set[int] = set()  # a process may claim again what it holds, so this must be known apart
        wait = _POLL_SECONDS[0]
        while left:
            # All is listed once a second at most: there may be 100,000 things, and as many processes as GPUs.
            finished, looked = done.listed(), time.monotonic()
            seen(finished)
            left = [number for number in left if number not in finished]
            idle = True
            for number in left:
                if number in finished or number in held:
                    continue
                with contextlib.ExitStack() as scope:
                    # It may have been done since we looked: who does it lets go of the claim afterwards. And when
                    # the set is finished, what was done is no longer to be seen.
                    if (
                        scope.enter_context(self.claim(phase, number))
                        and number not in done
                        and not self.is_finished()
                    ):
                        held.add(number)
                        scope.callback(held.discard, number)
                        yield Claimed(number, scope.pop_all())
                        idle = False
                if time.monotonic() - looked > _POLL_SECONDS[1]:
                    finished, looked = done.listed(), time.monotonic()
                    seen(finished)
            if idle and left:
                if self.is_finished():
                    return
                yield None
                time.sleep(wait)
                wait = min(2 * wait, _POLL_SECONDS[1])
            else:
                wait = _POLL_SECONDS[0]

    def publish(self, name: str, content: Any) -> None:
        """Write one of the files that mark a thing as done."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(content, separators=(",", ":")).encode())

    def read(self, name: str) -> Any:
        """Read what `publish` wrote.

        Raises:
            UserError: it isn't JSON: the file system has lost what was written.
        """
        try:
            return json.loads((self.root / name).read_bytes())
        except ValueError:
            path = self.root / name
            raise UserError(f"{path} is damaged; delete {self.out} and encode again") from None

    def remove(self) -> None:
        """Delete what only the work needed."""
        shutil.rmtree(self.root, ignore_errors=True)

    def marks(self, folder: str) -> Marks:
        """The files NNNNN.json in a folder of the work."""
        return Marks(self.root / folder)

    def mark(self, name: str) -> Mark:
        """A file of the work."""
        return Mark(self.root / name)


@dataclass(frozen=True)
class Marks:
    """Numbered things that are done: NNNNN.json in a folder. Both questions open the folder: that makes a network
    file system look again."""

    folder: Path

    def listed(self) -> set[int]:
        """All that are done."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return set()
        return {int(name.partition(".")[0]) for name in names if name.endswith(".json") and name[0] != "."}

    def __contains__(self, number: int) -> bool:
        try:
            folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return False
        try:
            os.stat(f"{number:05d}.json", dir_fd=folder)
        except FileNotFoundError:
            return False
        finally:
            os.close(folder)
        return True


@dataclass(frozen=True)
class Mark:
    """One thing, number 0, that is done when a file is there."""

    path: Path

    def listed(self) -> set[int]:
        """{0} or nothing."""
        return {0} if self.path.exists() else set()

    def __contains__(self, number: int) -> bool:
        return self.path.exists()


@contextlib.contextmanager
def join(out: Path, job: Mapping[str, Any], overwrite: bool) -> Iterator[Work | None]:
    """Start the work in a folder, or join it, or go on with what dead processes left.

    Gives None if the folder holds the finished set of this very job. `overwrite` makes way for the job, once: what
    is begun of it is gone on with, so that a command that is killed and started again comes to an end.

    Raises:
        UserError: the folder holds something else, or is in use by another command.
    """
    with lock_folder(out, shared=True) as lock:
        work = Work(out, lock)
        with work.alone():
            state = _state(work)
            if overwrite and state != "empty" and not (state == "unfinished" and _is_of(work, job)):
                if not is_alone(lock):
                    raise UserError(f"{out} is in use by another process; --overwrite needs it for itself")
                # First, or a job that is killed while this is cleared would later go on with what is left of it.
                (work.root / "job.json").unlink(missing_ok=True)
                clear_folder(out, overwrite=True)
                state = "empty"
            if state == "finished":
                then = json.loads((out / JOB).read_bytes())
                if (what := difference(then, job)) is not None:
                    raise UserError(f"{out} is a finished set made with {what}; give --overwrite or another folder")
                work.remove()  # its last process was killed while tidying up
            elif state == "unfinished":
                if (what := difference(work.read("job.json"), job)) is not None:
                    remedy = "go on with the same settings, or give --overwrite to begin anew"
                    raise UserError(f"{out} was begun with {what}; {remedy}")
            else:
                work.remove()
                clear_folder(out, overwrite)
                work.publish("job.json", job)
        yield None if state == "finished" else work


def _state(work: Work) -> str:
    if work.is_finished() and (work.out / JOB).is_file():
        return "finished"
    if not work.is_finished() and (work.root / "job.json").is_file():
        return "unfinished"
    # Another command's set is dealt with by `clear_folder`.
    return "empty"


def _is_of(work: Work, job: Mapping[str, Any]) -> bool:
    """Whether unfinished work is of this very job, as far as can be read."""
    with contextlib.suppress(UserError):
        return difference(work.read("job.json"), job) is None
    return False


def difference(then: Any, now: Mapping[str, Any]) -> str | None:
    """The first setting in which two jobs differ, in words; None if they are the same.

    `then` is what a file said, so it may be anything.
    """
    if not isinstance(then, dict):
        return f"unknown settings ({JOB} is damaged)"
    now = json.loads(json.dumps(now))
    for name in (*now, *(name for name in then if name not in now)):
        before, after = then.get(name), now.get(name)
        if before != after:
            if isinstance(before, dict) and isinstance(after, dict):
                inner = next(key for key in (*after, *before) if before.get(key) != after.get(key))
                name, before, after = f"{name} {inner}", before.get(inner), after.get(inner)
            return f"{name} {_short(before)} (now: {_short(after)})"
    return None


def _short(value: Any) -> str:
    if value in (None, "", {}):
        return "not given"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."

"""One rank's part of a checkpoint, written by a thread of its own."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from finetune import AWAY, first_line

T = TypeVar("T")

_PIECE_BYTES = 1 << 23
_SYNC_BYTES = 1 << 28  # at most so much waits in the page cache for the disk: more would hold up other readers
_WORDS = (1 << 64) - 1


class Task(Generic[T]):
    """A function in a daemon thread: it never keeps a process from ending.

    Attributes:
        moved_at: when the function last said that it comes forward (`time.monotonic`).
    """

    def __init__(self, function: Callable[[Callable[[], None]], T], name: str) -> None:
        self.moved_at = time.monotonic()
        self._function = function
        self._result: T | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._function(self._move)
        except BaseException as error:  # given on by `result`
            self._error = error

    def _move(self) -> None:
        self.moved_at = time.monotonic()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def wait(self, seconds: float, *, stalled_after: float) -> bool:
        """Wait until it is done, or time is over, or it has not come forward for too long; whether it is done."""
        ends = time.monotonic() + seconds
        while self.running:
            now = time.monotonic()
            left = min(ends, self.moved_at + stalled_after) - now
            if left <= 0:
                return False
            self._thread.join(min(left, 1.0))
        return True

    def result(self) -> T:
        """What the function returned, or raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]


@dataclass(frozen=True)
class Trouble:
    """Why something is not written, in a few words. `is_away`: the disk does not answer, and may do so later."""

    text: str
    is_away: bool = False


@dataclass(frozen=True)
class Report:
    """What a rank says of its part: `sums` of the words it wrote, by file; `trouble`: why it could not, or None."""

    sums: dict[str, int]
    trouble: Trouble | None = None


@dataclass(frozen=True)
class Piece:
    """Bytes for `offset` of `file`."""

    file: str
    offset: int
    views: Callable[[], Iterable[memoryview]]


class Writing:
    """Writes pieces of a checkpoint's files under `folder`, which ranks fill together.

    There is no agreement before: each rank makes the folders and files that it needs.
    """

    def __init__(self, folder: Path, sizes: dict[str, int]) -> None:
        self.folder, self.sizes = folder, sizes
        self.written_bytes = 0
        self.sums: dict[str, int] = {}

    def write(self, pieces: Iterable[Piece], moved: Callable[[], None]) -> None:
        """Write pieces and wait until they are on the disk.

        Raises:
            OSError: the disk is full or refuses; names the file.
        """
        by_file: dict[str, list[Piece]] = {}
        for piece in pieces:
            by_file.setdefault(piece.file, []).append(piece)
        for file, of_file in by_file.items():
            path = self.folder / file
            try:
                self._write_file(path, of_file, self.sizes[file], moved)
            except OSError as error:
                error.filename = error.filename or str(path)
                raise

    def _write_file(self, path: Path, pieces: list[Piece], size: int, moved: Callable[[], None]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            # At its whole length from the start: an NFS client that takes its own write for the file's end fills
            # the page up with zeros, over what another rank writes there.
            os.ftruncate(descriptor, size)
            moved()
            unsynced = 0
            for piece in pieces:
                at = piece.offset
                for view in piece.views():
                    for start in range(0, len(view), _PIECE_BYTES):
                        part = view[start : start + _PIECE_BYTES]
                        _write_all(descriptor, part, at)
                        at += len(part)
                        self.sums[piece.file] = (self.sums.get(piece.file, 0) + sum_of_words(part)) & _WORDS
                        self.written_bytes += len(part)
                        unsynced += len(part)
                        if unsynced >= _SYNC_BYTES:
                            os.fdatasync(descriptor)
                            unsynced = 0
                        moved()
            os.fsync(descriptor)
            moved()
        finally:
            os.close(descriptor)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while len(data):
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def sum_of_words(data: memoryview) -> int:
    """The sum of the 4-byte words of `data`, modulo 2^64: ranks' sums add up to the file's, in whatever order."""
    return int(np.frombuffer(data, dtype="<u4").sum(dtype=np.uint64))


def describe(error: BaseException, rank: int, world_size: int) -> Trouble:
    """An error of writing, with the rank and host where there are several."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    where = f" (rank {rank} on {socket.gethostname()})" if world_size > 1 else ""
    return Trouble(f"{text}{where}", isinstance(error, OSError) and error.errno in AWAY)

"""Copies of remote shards on this machine: bounded, checked, fetched once for all processes, and ahead of need.

    FOLDER/.lock                            held while room is made
    FOLDER/<host-tail>-<hash of URL>/       one folder a store
        00000-<hash>/00000.tar              a shard as the manifest says it is, and
        00000-<hash>/00000.index.npy        its index: published together by one rename
        00000-<hash>.lock                   held by whoever fetches the shard
        .00000-<hash>.tmp/                  being fetched; of its full size from the start, so that room is kept

The hash is of name and checksum, so that a data set made anew is kept apart from its older copies. Folders of other
names are not ours, and are neither counted nor removed. All locks are `flock`s: a killed
process lets go of them by itself, and what it left half done the next one removes.

Readers hold a shared lock on a tar while it is open. Room is made by removing what was opened longest ago, of what
nobody has open; when all is open, open files too, for a file unlinked stays readable to those who have it (they let
go of it soon, see `ShardSet`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune import DISK_FULL, npy
from finetune.data.shards.files import BLOCK, NPY_ERRORS, ShardError, index_name, parse_npy
from finetune.data.shards.forks import reset_after_fork
from finetune.data.shards.store import StoppedError, Store, StoreAwayError, WriteError

if TYPE_CHECKING:
    from finetune.data.shards.manifest import ShardInfo

DEFAULT_BYTES = 100 << 30
FREE_SHARE = 0.8  # of what is free: other programs write to the disk too
GRACE_S = 600.0  # what was fetched ahead and not yet opened is spared so long, where anything else can go
HEADER_BYTES = 4096  # more than any .npy header of an index
ROOM_POLL_S = 0.05  # other processes give no sign when they let go of a file
PREFETCH_THREADS = 4  # one stream of an object store gives 50 to 100 MB/s; four fill a 10 Gb/s share
SOURCE = re.compile(r"[A-Za-z0-9_-]*-[0-9a-f]{16}")
ENTRY = re.compile(r"[A-Za-z0-9_-]*-[0-9a-f]{16}|\.[A-Za-z0-9_-]*-[0-9a-f]{16}\.(tmp|gone)")


@dataclass
class Stats:
    """What a cache did in this process. `wait_s`: seconds that readers waited for shards that were not here."""

    downloads: int = 0
    bytes: int = 0
    retries: int = 0
    evictions: int = 0
    wait_s: float = 0.0


@dataclass(frozen=True)
class _Entry:
    path: Path
    tar: Path
    bytes: int
    used_s: float  # when it was last opened, or published
    unread: bool


def default_folder() -> Path:
    """$LDM_FINETUNE_CACHE, else $XDG_CACHE_HOME/ldm-finetune/shards, else ~/.cache/ldm-finetune/shards."""
    if named := os.environ.get("LDM_FINETUNE_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldm-finetune" / "shards"


class Cache:
    """A bounded folder of shards from elsewhere, shared by the processes of a machine. Picklable.

    Args:
        folder: on a local disk; null: `default_folder()`.
        max_bytes: never more than that lies in the folder, half-fetched shards included (the locks' empty files
            are not counted). Null: 100 GiB, but at most 80% of what is free on that disk and what the folder
            holds already.
        sharers: processes of this machine that use it; null: $LOCAL_WORLD_SIZE, which torchrun, accelerate and
            DeepSpeed set, or 1.
        sets: remote sets that each of them reads at once. Of each set a process keeps open, and fetches ahead, its
            share of half of `max_bytes`.

    Raises:
        ShardError: the folder can't be made or written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        max_bytes: int | None = None,
        *,
        sharers: int | None = None,
        sets: int = 1,
    ) -> None:
        self.folder = (Path(folder) if folder is not None else default_folder()).absolute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if max_bytes is None:
                room = shutil.disk_usage(self.folder).free + self.held_bytes
                max_bytes = min(DEFAULT_BYTES, int(FREE_SHARE * room))
        except OSError as error:
            raise self._unusable(error) from None
        if max_bytes < 1:
            raise ShardError(f"a cache of {max_bytes} bytes holds nothing; give data.cache_gib a positive number")
        self.max_bytes = max_bytes
        self.sharers = max(1, sharers or int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
        self.sets = max(1, sets)
        self._reset()

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in ("folder", "max_bytes", "sharers", "sets")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def _reset(self) -> None:
        self.stats = Stats()
        self._lock = threading.Lock()
        reset_after_fork(self)

    @property
    def share_bytes(self) -> int:
        """How much one process may keep open of one set, and how much it may fetch ahead."""
        return self.max_bytes // (2 * self.sharers * self.sets)

    @property
    def held_bytes(self) -> int:
        """Bytes that lie in the folder now, room kept for what is being fetched included."""
        entries, unfinished = self._scan()
        return sum(entry.bytes for entry in entries) + sum(size for _, size in unfinished)

    @staticmethod
    def need_bytes(shard: ShardInfo, members: int) -> int:
        """Room that a shard and its index take, at most."""
        return shard.bytes + _index_bytes(shard, members)

    # shards

    def open(self, store: Store, shard: ShardInfo, members: int) -> tuple[int, np.ndarray]:
        """A file descriptor of the tar, which the caller closes, and the index; fetched if they are not here.

        What another thread or process is fetching is waited for.

        Raises:
            ShardError: the shard can't be had, is not what the manifest says, or there is no room for it.
            StoreAwayError: the store does not answer.
        """
        opened = self._opened(self._entry(store, shard), shard, members)
        if opened is not None:
            return opened
        begin = time.perf_counter()
        try:
            return self._fetched(store, shard, members, None)
        finally:
            self._count(wait_s=time.perf_counter() - begin)

    def open_rows(
        self, store: Store, shard: ShardInfo, members: int, rows: Sequence[int]
    ) -> tuple[int, np.ndarray] | None:
        """As `open`, but of a shard that is not here only the bytes of some rows are fetched: the rest is holes.

        These have no checksum, and are not kept. None where the store gives whole files only.

        Raises:
            ShardError, StoreAwayError: as `open` does.
        """
        if (opened := self._opened(self._entry(store, shard), shard, members)) is not None:
            return opened
        limit = _index_bytes(shard, members)
        index = parse_npy(
            store.read_checked(index_name(shard.name), limit, lambda data: _wrong_index(data, shard, members))
        )
        assert index is not None
        with self._naming(), tempfile.TemporaryFile(dir=self.folder) as file:
            file.truncate(shard.bytes)
            for spans in index[list(rows)]:
                offsets, sizes = spans[spans[:, 0] >= 0].T
                if not len(offsets):
                    continue
                begin = max(0, int(offsets.min()) - BLOCK)  # with its tar header
                data = store.read_range(shard.name, begin, int((offsets + sizes).max()))
                if data is None:
                    return None
                self._received(len(data))
                file.seek(begin)
                file.write(data)
            file.flush()
            return os.dup(file.fileno()), index

    def fetch(self, store: Store, shard: ShardInfo, members: int, stop: threading.Event | None = None) -> None:
        """Have the shard here; see `open`.

        Raises:
            ShardError, StoreAwayError: as `open` does.
            StoppedError: `stop` was set.
        """
        opened = self._opened(self._entry(store, shard), shard, members, ahead=True)
        if opened is None:
            opened = self._fetched(store, shard, members, stop or threading.Event())
        os.close(opened[0])

    def _fetched(
        self, store: Store, shard: ShardInfo, members: int, stop: threading.Event | None
    ) -> tuple[int, np.ndarray]:
        """Fetch it, unless it came while waiting for the right to; `stop` is None for a reader."""
        entry, ahead = self._entry(store, shard), stop is not None
        need = self.need_bytes(shard, members)
        if need > self.max_bytes:
            raise ShardError(
                f"{store.url(shard.name)} with its index is {need:,} bytes, the cache in {self.folder} may hold "
                f"{self.max_bytes:,}; raise data.cache_gib"
            )
        with self._naming():
            while True:
                try:
                    with self._locked(entry.with_name(entry.name + ".lock")):
                        opened = self._opened(entry, shard, members, ahead=ahead)
                        return opened or self._download(store, shard, members, entry, stop)
                except (OSError, WriteError) as error:  # even a lock, or an empty file, takes room in its folder
                    if not _is_of_full_disk(error) or not self._give_way(need):
                        raise

    def _download(
        self, store: Store, shard: ShardInfo, members: int, entry: Path, stop: threading.Event | None
    ) -> tuple[int, np.ndarray]:
        temporary = entry.with_name(f".{entry.name}.tmp")
        try:
            self._keep_room(temporary, shard, members, stop)
            tar, index_path = temporary / shard.name, temporary / index_name(shard.name)
            with tar.open("r+b", buffering=0) as file:
                store.copy(shard.name, file, shard.bytes, shard.sha256, stop, self._retried, self._received)
                _durable(file.fileno())
            limit = _index_bytes(shard, members)
            index_bytes = store.read_checked(
                index_name(shard.name), limit, lambda data: _wrong_index(data, shard, members), stop, self._retried
            )
            try:
                index_path.write_bytes(index_bytes)
                if stop is not None:
                    (temporary / "unread").touch()
            except OSError as error:
                raise WriteError(str(error)) from error
            fd = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
            try:
                # Open and locked before others can see it: nobody can take it away from whom it was fetched for.
                fcntl.flock(fd, fcntl.LOCK_SH)
                index = npy.load(index_path, mmap_mode="r")
                with self._locked(self.folder / ".lock"):
                    self._remove(entry)  # a copy that was there and could not be used
                    temporary.rename(entry)
            except BaseException:
                os.close(fd)
                raise
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._count(downloads=1)
        return fd, index

    def _opened(
        self, entry: Path, shard: ShardInfo, members: int, *, ahead: bool = False
    ) -> tuple[int, np.ndarray] | None:
        """The open shard, or None if it is not here or not whole."""
        fd = -1
        try:
            fd = os.open(entry / shard.name, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_SH)
            index = npy.load(entry / index_name(shard.name), mmap_mode="r")
            whole = os.fstat(fd).st_size == shard.bytes and index.dtype == np.int64
            if whole and index.shape == (shard.samples, members, 2):
                if not ahead:
                    (entry / "unread").unlink(missing_ok=True)
                os.utime(entry)
                return fd, index
        except FileNotFoundError:
            pass
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise self._unusable(error) from None
        except NPY_ERRORS:
            pass
        if fd >= 0:
            os.close(fd)
        return None

    def _entry(self, store: Store, shard: ShardInfo) -> Path:
        # The manifest comes from elsewhere: of its texts only harmless characters become names here.
        source = f"{_harmless(store.name.partition(':')[2])}-{_hash(store.name)}"
        name = f"{_harmless(shard.name.removesuffix('.tar'))}-{_hash(f'{shard.name} {shard.sha256}')}"
        return self.folder / source / name

    # room

    def _keep_room(self, temporary: Path, shard: ShardInfo, members: int, stop: threading.Event | None) -> None:
        """Make room for a shard and take it, with files that have their full size and no blocks yet."""
        need = self.need_bytes(shard, members)
        while True:
            with self._locked(self.folder / ".lock"):
                shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
                if self._make_room(need):
                    temporary.mkdir()
                    sizes = {shard.name: shard.bytes, index_name(shard.name): need - shard.bytes}
                    for name, size in sizes.items():
                        with (temporary / name).open("wb") as file:
                            file.truncate(size)
                    return
            # All is taken by shards that others are fetching: they end, sooner or later.
            if stop is None:
                time.sleep(ROOM_POLL_S)
            elif stop.wait(ROOM_POLL_S):
                raise StoppedError

    def _make_room(self, need: int) -> bool:
        """Remove what must go so that `need` more bytes fit; whether that was enough. Under the folder's lock."""
        entries, unfinished = self._scan()
        held = sum(entry.bytes for entry in entries) + sum(size for _, size in unfinished)
        if held + need <= self.max_bytes:
            return True
        for path, size in unfinished:  # by those who hold no lock any more
            lock = path.with_name(path.name.removeprefix(".").partition(".tmp")[0].partition(".gone")[0] + ".lock")
            with contextlib.suppress(BlockingIOError), self._locked(lock, wait=False):
                shutil.rmtree(path, ignore_errors=True)
                held -= size
        now = time.time()
        entries.sort(key=lambda entry: (entry.unread and now - entry.used_s < GRACE_S, entry.used_s))
        for forced in (False, True):
            for entry in list(entries):
                if held + need <= self.max_bytes:
                    return True
                if forced or not _is_open(entry.tar):
                    self._remove(entry.path)
                    self._count(evictions=1)
                    entries.remove(entry)
                    held -= entry.bytes
        return held + need <= self.max_bytes

    def _give_way(self, need: int) -> bool:
        """The disk is full though the cache is not: remove as much as a shard needs; whether there was anything."""
        with self._locked(self.folder / ".lock"):
            entries, _ = self._scan()
            freed = 0
            for entry in sorted((e for e in entries if not _is_open(e.tar)), key=lambda entry: entry.used_s):
                if freed < need:
                    self._remove(entry.path)
                    self._count(evictions=1)
                    freed += entry.bytes
        return freed > 0

    def _remove(self, path: Path) -> None:
        """Take an entry away at once and as a whole. Under the folder's lock."""
        gone = path.with_name(f".{path.name}.gone")
        shutil.rmtree(gone, ignore_errors=True)  # left by a process that was killed
        with contextlib.suppress(FileNotFoundError):
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    def _scan(self) -> tuple[list[_Entry], list[tuple[Path, int]]]:
        """What is here, and what is unfinished (with its bytes); others may come and go meanwhile."""
        entries, unfinished = [], []
        for source in _folders(self.folder, SOURCE):
            for path in _folders(Path(source), ENTRY):
                size, tar, unread = 0, "", False
                try:
                    used_s = os.stat(path).st_mtime
                    with os.scandir(path) as files:
                        for file in files:
                            size += file.stat().st_size
                            unread |= file.name == "unread"
                            if file.name.endswith(".tar"):
                                tar = file.path
                except FileNotFoundError:
                    continue
                name = os.path.basename(path)
                if not name.startswith(".") and tar:
                    entries.append(_Entry(Path(path), Path(tar), size, used_s, unread))
                else:
                    unfinished.append((Path(path), size))
        return entries, unfinished

    @contextlib.contextmanager
    def _locked(self, path: Path, *, wait: bool = True) -> Iterator[None]:
        """Hold a lock that no other thread or process has; without `wait` raises `BlockingIOError`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            try:
                yield
            finally:
                # Not only by closing: a child forked meanwhile has the descriptor too, and would keep the lock.
                fcntl.flock(fd, fcntl.LOCK_UN)
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """Errors of the cache's own files in one line that says what to set."""
        try:
            yield
        except StoreAwayError:
            raise
        except (OSError, WriteError) as error:
            if _is_of_full_disk(error):
                what = f"no space left for the cache in {self.folder}; free some space, lower data.cache_gib"
                raise ShardError(
                    f"{what} or set data.cache_dir or LDM_FINETUNE_CACHE to a folder on a larger disk"
                ) from error
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> ShardError:
        return ShardError(
            f"cannot use {self.folder} as cache ({error}); give another data.cache_dir or LDM_FINETUNE_CACHE"
        )

    # counts

    def _retried(self) -> None:
        self._count(retries=1)

    def _received(self, size: int) -> None:
        self._count(bytes=size)

    def _count(self, **changes: float) -> None:
        with self._lock:
            for field, change in changes.items():
                setattr(self.stats, field, getattr(self.stats, field) + change)


def _is_of_full_disk(error: Exception) -> bool:
    cause = error.__cause__ if isinstance(error, WriteError) else error
    return isinstance(cause, OSError) and cause.errno in DISK_FULL


def _harmless(text: str) -> str:
    return "-".join(re.findall(r"[A-Za-z0-9_]+", text))[-40:].strip("-")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _folders(path: Path, names: re.Pattern[str]) -> list[str]:
    try:
        with os.scandir(path) as found:
            ours = [entry for entry in found if names.fullmatch(entry.name)]
            return sorted(entry.path for entry in ours if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return []


def _is_open(tar: Path) -> bool:
    """Whether a reader has the tar open."""
    try:
        fd = os.open(tar, os.O_RDWR | os.O_CLOEXEC)  # NFS gives exclusive locks to writers only
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(fd, fcntl.LOCK_UN)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _durable(fd: int) -> None:
    """After a power cut a published tar must not be a hole of the right size."""
    try:
        os.fsync(fd)
    except OSError as error:
        raise WriteError(str(error)) from error


def _index_bytes(shard: ShardInfo, members: int) -> int:
    return HEADER_BYTES + shard.samples * members * 16


def _wrong_index(data: bytes, shard: ShardInfo, members: int) -> str | None:
    """What is wrong with an index that has no checksum of its own, as far as the manifest can tell."""
    index = parse_npy(data)
    if index is None:
        return f"{len(data)} bytes that are no numpy array"
    if index.dtype != np.int64 or index.shape != (shard.samples, members, 2):
        return f"is {index.dtype} {list(index.shape)}, the manifest needs int64 {[shard.samples, members, 2]}"
    offset, size = index[..., 0], index[..., 1]
    inside = (offset >= 0) & (size >= 0) & (size <= shard.bytes) & (offset <= shard.bytes - size)
    absent = (offset == -1) & (size == -1)
    if not (inside | absent).all():
        return f"has members outside the {shard.bytes} bytes of {shard.name}"
    return None


class Prefetcher:
    """Fetches the shards needed next into the cache, by threads of its own.

    At most the process's share of half the cache is fetched ahead of the readers, and they keep open no more than
    as much: together they fit. Where a share is less than a shard, one is fetched ahead all the same. Errors are
    left to the reader who needs the shard and tries it again.
    """

    def __init__(self, cache: Cache, store: Store, shards: Sequence[ShardInfo], members: int) -> None:
        self._cache, self._store, self._shards, self._members = cache, store, shards, members
        self._changed = threading.Condition()
        self._queue: deque[int] = deque()
        self._ahead: dict[int, int] = {}  # bytes of what is being fetched, or is here and was not yet opened
        self._running: set[int] = set()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._pid = os.getpid()
        self.errors: dict[int, ShardError | StoreAwayError] = {}

    def want(self, shards: Sequence[int]) -> None:
        """Fetch these, in this order, instead of what was wanted before; what is being fetched goes on."""
        with self._changed:
            wanted = dict.fromkeys(int(shard) for shard in shards)
            self._ahead = {s: n for s, n in self._ahead.items() if s in wanted or s in self._running}
            self._queue = deque(shard for shard in wanted if shard not in self._ahead)
            if not self._threads and self._queue:
                for number in range(PREFETCH_THREADS):
                    thread = threading.Thread(target=self._work, name=f"prefetch-{number}", daemon=True)
                    self._threads.append(thread)
                    thread.start()
            self._changed.notify_all()

    def taken(self, shard: int) -> None:
        """A reader has opened it: it is no longer ahead."""
        with self._changed:
            self.errors.pop(shard, None)
            if self._ahead.pop(shard, None) is not None:
                self._changed.notify_all()
            elif shard in self._queue:
                self._queue.remove(shard)

    def stop(self) -> None:
        """End the threads, soon: a chunk that is being read is waited for by nobody."""
        if os.getpid() != self._pid:  # in a forked child: no threads, and locks that may be held for ever
            return
        self._stop.set()
        with self._changed:
            self._queue.clear()
            self._changed.notify_all()

    def join(self, timeout_s: float) -> None:
        """Wait for the threads to end."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _next(self) -> int | None:
        """The next shard to fetch, when there is room for it; None: no more."""
        with self._changed:
            while not self._stop.is_set():
                if self._queue:
                    size = self._cache.need_bytes(self._shards[self._queue[0]], self._members)
                    if not self._ahead or sum(self._ahead.values()) + size <= self._cache.share_bytes:
                        shard = self._queue.popleft()
                        self._ahead[shard] = size
                        self._running.add(shard)
                        return shard
                self._changed.wait()
        return None

    def _work(self) -> None:
        while (shard := self._next()) is not None:
            error: ShardError | StoreAwayError | None = None
            try:
                self._cache.fetch(self._store, self._shards[shard], self._members, self._stop)
            except (ShardError, StoreAwayError) as problem:
                error = problem
            except StoppedError:
                return
            with self._changed:
                self._running.discard(shard)
                if error is not None:
                    self.errors[shard] = error
                    self._ahead.pop(shard, None)
                self._changed.notify_all()

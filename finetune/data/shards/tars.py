"""The open tars of a set, and how many there may be."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune import first_line, is_of_machine, npy
from finetune.data.shards.cache import Cache, Prefetcher
from finetune.data.shards.files import MANIFEST, NPY_ERRORS, ShardError, index_name, naming
from finetune.data.shards.forks import reset_after_fork
from finetune.data.shards.manifest import Manifest
from finetune.data.shards.store import Store


def most_open(sets: int = 1) -> int:
    """How many shards each of so many sets may keep open in this process.

    A batch draws from hundreds of shards, and opening one costs as much as reading a dozen samples. So the usual
    limit of 1,024 files is raised to what the system lets any process have (as Go's runtime does), 16,384 at most;
    a shard takes two of them. What is open already is left to others, a few hundred more, and four for each rank of
    the run: gloo has a connection to each in each of its groups.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1 << 14 if hard == resource.RLIM_INFINITY else min(hard, 1 << 14)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    files = wanted if soft == resource.RLIM_INFINITY else max(soft, wanted)
    others = 256 + _open_now() + 4 * int(os.environ.get("WORLD_SIZE", 1))
    return max(1, min(4096, (files - others) // 2) // sets)


def _open_now() -> int:
    with contextlib.suppress(OSError):
        return len(os.listdir("/proc/self/fd"))
    return 0


def _lacks_descriptors(error: BaseException | None) -> bool:
    """Whether an error came of a process, or a machine, that has no more files to open."""
    seen: set[int] = set()  # an error that is raised again while its consequence is handled closes a circle
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


class Tar:
    """An open tar and its index. Closed when its last reader lets go, so eviction can't pull it away."""

    def __init__(self, name: str, fd: int, index: np.ndarray) -> None:
        self.name, self.fd, self.index = name, fd, index

    @classmethod
    def open(cls, path: Path, samples: int, members: int) -> Tar:
        """Of a local set.

        Raises:
            ShardError: tar or index is missing, or the index is another set's.
            OSError: the disk does not answer, or refuses.
        """
        index_path = path.with_name(index_name(path.name))
        try:
            tar = cls(path.name, os.open(path, os.O_RDONLY | os.O_CLOEXEC), np.zeros(0))
            # A plain view of the map: np.memmap's own indexing is several times slower.
            with naming(index_path):
                tar.index = npy.load(index_path, mmap_mode="r")
        except FileNotFoundError as error:
            raise ShardError(f"{error.filename} is missing; restore it or make the shards again") from None
        except NPY_ERRORS as error:
            crowded = _lacks_descriptors(error)
            if is_of_machine(error) and not crowded:
                raise
            remedy = "raise the limit with `ulimit -n`" if crowded else "run `data-tools verify`"
            what = f"{index_path} is no index" if isinstance(error, ValueError) else first_line(error)
            raise ShardError(f"cannot open {path} and its index: {what}; {remedy}") from None
        if tar.index.dtype != np.int64 or tar.index.shape != (samples, members, 2):
            raise ShardError(
                f"{index_path} is {tar.index.dtype} {list(tar.index.shape)}, the manifest needs int64 "
                f"{[samples, members, 2]}; run `data-tools verify`"
            )
        return tar

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` may be gone at the end
        close(self.fd)


class OpenTars:
    """The tars of a set that are open: those that were used last. Safe in threads and over `fork`.

    Args:
        home: the set's folder, or the store that it is fetched from.
        max_open: how many are kept open; of a remote set no more than the process's share of the cache, either.
        cache: of a remote set.

    Attributes:
        open: by shard, the one that was used last at the end.
        seen: which file a local set's manifest was read from (see `identity`).
    """

    def __init__(self, home: Path | Store, manifest: Manifest, max_open: int, cache: Cache | None) -> None:
        self.home, self.manifest, self.max_open, self.cache = home, manifest, max_open, cache
        self.seen: tuple[int, int, int] | None = None
        self._reset()

    def _reset(self) -> None:
        self.lock = threading.Lock()
        self.open: OrderedDict[int, Tar] = OrderedDict()
        self.prefetcher: Prefetcher | None = None
        reset_after_fork(self)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("lock", "open", "prefetcher")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def close(self) -> None:
        """Let go of all files and end fetching ahead."""
        with self.lock:
            self.open.clear()
            prefetcher, self.prefetcher = self.prefetcher, None
        if prefetcher is not None:
            prefetcher.stop()
            prefetcher.join(timeout_s=1.0)

    def prefetch(self, shards: Sequence[int]) -> None:
        """See `ShardSet.prefetch`."""
        if self.cache is None:
            return
        assert isinstance(self.home, Store)
        with self.lock:
            if self.prefetcher is None:
                members = len(self.manifest.members)
                self.prefetcher = Prefetcher(self.cache, self.home, self.manifest.shards, members)
                weakref.finalize(self, self.prefetcher.stop)
            self.prefetcher.want([shard for shard in shards if int(shard) not in self.open])

    def get(self, shard: int) -> Tar:
        """The tar of a shard, opened if need be.

        Raises:
            ShardError, OSError: see `ShardSet.open_shard`.
        """
        with self.lock:
            tar = self.open.get(shard)
            if tar is not None:
                self.open.move_to_end(shard)
                return tar
            if self.cache is not None:
                self._let_go(shard, self.cache)
        while True:
            try:
                tar = self._opened(shard)  # may take long: other threads go on with other shards
                break
            except (ShardError, OSError) as error:
                if not _lacks_descriptors(error) or not self._make_way():
                    raise
        with self.lock:
            tar = self.open.setdefault(shard, tar)
            self.open.move_to_end(shard)
            while len(self.open) > self.max_open:
                self.open.popitem(last=False)
        return tar

    def _opened(self, shard: int) -> Tar:
        info, members = self.manifest.shards[shard], len(self.manifest.members)
        if not isinstance(self.home, Store):
            try:
                return Tar.open(self.home / info.name, info.samples, members)
            finally:  # once it is open: who makes a set anew removes the manifest before the shards
                self._require_unchanged(self.home)
        assert self.cache is not None
        tar = Tar(info.name, *self.cache.open(self.home, info, members))
        if (prefetcher := self.prefetcher) is not None:
            prefetcher.taken(shard)
        return tar

    def _require_unchanged(self, root: Path) -> None:
        """Refuse shards of a set that took the place of ours: they open and read as well as ours did."""
        path = root / MANIFEST
        if self.seen is None or (seen := identity(path)) == self.seen:
            return
        if seen is not None:  # touched or restored, or a drive that was mounted again: what it says is what counts
            found = Manifest.load(root)
            if (found.members, found.shards) == (self.manifest.members, self.manifest.shards):
                self.seen = seen
                return
        what = "is gone" if seen is None else "is not the one that was there when the set was opened"
        raise ShardError(f"{path} {what}: restore the set as it was, or start anew with the new one")

    def _make_way(self) -> bool:
        """Close half of what is open, from here on: others have taken more descriptors than were left to them."""
        with self.lock:
            self.max_open = max(1, len(self.open) // 2)
            had = len(self.open)
            while len(self.open) > had // 2:
                self.open.popitem(last=False)
            return had > 0

    def _let_go(self, coming: int, cache: Cache) -> None:
        """Close what would keep the disk full: more than our share, and files that the cache has removed."""
        infos, members = self.manifest.shards, len(self.manifest.members)
        size = cache.need_bytes(infos[coming], members)
        for shard in reversed(list(self.open)):
            size += cache.need_bytes(infos[shard], members)
            if size > cache.share_bytes or os.fstat(self.open[shard].fd).st_nlink == 0:
                del self.open[shard]


def identity(path: Path) -> tuple[int, int, int] | None:
    """What tells a file from the one that replaces it; None where there is none."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns, status.st_size
    return None

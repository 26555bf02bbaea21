"""Sample ids to samples, at random, from open tars and their indexes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np

from finetune import first_line, is_of_machine, npy
from finetune.data.shards.cache import Cache, Prefetcher
from finetune.data.shards.files import (
    BLOCK,
    LATENT,
    MANIFEST,
    NAME_BYTES,
    NPY_ERRORS,
    ShardError,
    index_name,
    naming,
    npy_header,
    parse_npy,
)
from finetune.data.shards.forks import reset_after_fork
from finetune.data.shards.labels import CLASSES, parse_classes
from finetune.data.shards.manifest import Bucket, Kind, Manifest
from finetune.data.shards.store import Root, Store, StoreAwayError, resolve

_DECODER = json.JSONDecoder()
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)  # Linux: fail rather than wait for the disk
_ADVISE = getattr(os, "posix_fadvise", None)
_RANGES_AT_ONCE = 16  # requests are small: their latency counts
_NEAR = 1 << 14  # a record this near to its latent comes with it in one read


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


class _Tar:
    """An open tar and its index. Closed when its last reader lets go, so eviction can't pull it away."""

    def __init__(self, name: str, fd: int, index: np.ndarray) -> None:
        self.name, self.fd, self.index = name, fd, index

    @classmethod
    def open(cls, path: Path, samples: int, members: int) -> _Tar:
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


class ShardSet:
    """Random access to the samples of a folder of shards, on this machine or elsewhere.

    Safe in threads and over `fork`; a pickled copy opens its own files. Of a remote set at most the process's share
    of the cache's bytes is open at a time, and one shard always.

    Args:
        root: a local folder, or what `store.resolve` takes: a URL, `pipe:COMMAND {}`, a `Store`.
        max_open: shards that are kept open; null: `most_open()`.
        cache: where remote shards are kept; null: `Cache()`. A local set is read where it lies.
    """

    def __init__(
        self, root: Root, manifest: Manifest, *, max_open: int | None = None, cache: Cache | None = None
    ) -> None:
        home = resolve(root)
        self.store = home if isinstance(home, Store) else None
        self.root: Path | str = home.name if isinstance(home, Store) else home
        self.cache = (cache or Cache()) if self.store is not None else None
        self.manifest = manifest
        self._seen: tuple[int, int, int] | None = None  # which file a local set's manifest was read from
        self.max_open = max_open or most_open()
        self._starts = np.cumsum([0, *(shard.samples for shard in manifest.shards)], dtype=np.int64)
        self._columns = {member: column for column, member in enumerate(manifest.members)}
        self._reset()

    @classmethod
    def open(
        cls, root: Root, kind: Kind | None = None, *, max_open: int | None = None, cache: Cache | None = None
    ) -> ShardSet:
        """Open the set in `root`; `kind` is what the caller needs. The manifest is read anew, never from a cache.

        Raises:
            ShardError: no finished set there, or one of the other kind.
            StoreAwayError: the store does not answer.
        """
        home = resolve(root)
        seen = None if isinstance(home, Store) else _identity(home / MANIFEST)
        manifest = Manifest.load(home)
        if kind is not None and manifest.kind != kind:
            remedy = "run `data-tools encode` on it" if kind == "latents" else "give the set it was made from"
            name = home.name if isinstance(home, Store) else home
            raise ShardError(f"{name} holds {manifest.kind}, {kind} are needed; {remedy}")
        shards = cls(home, manifest, max_open=max_open, cache=cache)
        shards._seen = seen
        return shards

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._tars: OrderedDict[int, _Tar] = OrderedDict()
        self._prefetcher: Prefetcher | None = None
        reset_after_fork(self)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_tars", "_prefetcher")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def close(self) -> None:
        """Let go of all open files and end fetching ahead; reading opens them again."""
        with self._lock:
            self._tars.clear()
            prefetcher, self._prefetcher = self._prefetcher, None
        if prefetcher is not None:
            prefetcher.stop()
            prefetcher.join(timeout_s=1.0)

    def read_file(self, name: str) -> bytes:
        """A small file that lies beside the shards.

        Raises:
            ShardError: it is missing or can't be read.
            StoreAwayError: the store does not answer.
        """
        where: Any = Path(self.root) / name if self.store is None else self.store.url(name)
        try:
            return where.read_bytes() if self.store is None else self.store.read(name)
        except FileNotFoundError:
            raise ShardError(f"{where} is missing; restore it or make the shards again") from None
        except StoreAwayError:
            raise
        except OSError as error:
            raise ShardError(f"cannot read {where}: {error}") from None

    def classes(self) -> list[str]:
        """The names of the classes, by number; none where the set has no classes.json.

        Raises:
            ShardError: the file is missing, damaged, or not the one that the manifest means.
        """
        if self.manifest.classes is None:
            return []
        data = self.read_file(CLASSES)
        where = Path(self.root) / CLASSES if self.store is None else self.store.url(CLASSES)
        if hashlib.sha256(data).hexdigest() != self.manifest.classes:
            raise ShardError(
                f"{where} is not the one that these shards were made with; restore it, or make them again"
            )
        return parse_classes(data, where)

    # which sample is where

    def bucket_of(self, shard: int) -> Bucket | None:
        """(height, width) in pixels of the samples in a shard."""
        return self.manifest.shards[shard].bucket

    def locate(self, sample_id: int) -> tuple[int, int]:
        """(shard, row in it) of a sample id.

        Raises:
            IndexError: there is no such sample.
        """
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)}")
        shard = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        return shard, int(sample_id - self._starts[shard])

    @property
    def bucket_sizes(self) -> dict[Bucket, int]:
        """Samples in each bucket, in the order of (height, width)."""
        samples = np.diff(self._starts)
        return {bucket: int(samples[shards].sum()) for bucket, shards in self._bucket_shards.items()}

    def bucket_shards(self, bucket: Bucket) -> np.ndarray:
        """Numbers (int64) of the shards that hold a bucket."""
        return self._bucket_shards.get(bucket, np.empty(0, np.int64))

    @cached_property
    def _bucket_shards(self) -> dict[Bucket, np.ndarray]:
        """By bucket, in the order of (height, width): a walk over 100,000 shards for each of 40 takes seconds."""
        found: dict[Bucket, list[int]] = {}
        for number, shard in enumerate(self.manifest.shards):
            if shard.bucket is not None:
                found.setdefault(shard.bucket, []).append(number)
        return {bucket: np.array(numbers, np.int64) for bucket, numbers in sorted(found.items())}

    @property
    def buckets(self) -> dict[Bucket, np.ndarray]:
        """All sample ids (int64) of each bucket, in the order of `bucket_sizes`; 8 bytes a sample.

        Shards of mixed sizes have no bucket and are left out.
        """
        first, last = self._starts[:-1], self._starts[1:]
        return {
            bucket: np.concatenate([np.arange(first[shard], last[shard]) for shard in shards.tolist()])
            for bucket, shards in self._bucket_shards.items()
        }

    @property
    def remote(self) -> bool:
        """Whether the shards have to be fetched."""
        return self.store is not None

    def prefetch(self, shards: Sequence[int]) -> None:
        """Fetch the shards (their numbers) needed next into the cache, in the order of first use, by threads.

        A later call replaces what is still to be fetched. At most the process's share of half the cache is fetched
        ahead of reading, but one shard always is; one that can't be fetched is an error for its reader alone, who
        tries again. Does nothing where the shards are local.
        """
        if self.store is None or self.cache is None:
            return
        with self._lock:
            if self._prefetcher is None:
                members = len(self.manifest.members)
                self._prefetcher = Prefetcher(self.cache, self.store, self.manifest.shards, members)
                weakref.finalize(self, self._prefetcher.stop)
            wanted = [shard for shard in shards if int(shard) not in self._tars]
            self._prefetcher.want(wanted)

    def excerpt(self, sample_ids: np.ndarray) -> ShardSet:
        """The same set for reading a few samples, in this order: of remote shards that are not here only they come.

        Others may not be read from it. Where the store gives whole files only, the shards are fetched ahead.

        Raises:
            ShardError: a shard can't be had, or is not what the manifest says.
            OSError: the store does not answer.
        """
        if self.store is None or self.cache is None:
            return self
        store, cache, members = self.store, self.cache, len(self.manifest.members)
        rows: dict[int, list[int]] = {}
        for sample_id in sample_ids.tolist():
            shard, row = self.locate(sample_id)
            rows.setdefault(shard, []).append(row)

        def opened(shard: int) -> tuple[int, np.ndarray] | None:
            return cache.open_rows(store, self.manifest.shards[shard], members, rows[shard])

        part = ShardSet(store, self.manifest, max_open=self.max_open, cache=cache)
        few = list(rows)[: self.max_open]
        with ThreadPoolExecutor(_RANGES_AT_ONCE) as pool:
            for shard, found in zip(few, pool.map(opened, few), strict=True):
                if found is not None:
                    part._tars[shard] = _Tar(self.manifest.shards[shard].name, *found)
        part.prefetch(list(rows))  # what is open is not fetched
        return part

    @property
    def starts(self) -> np.ndarray:
        """The first sample id of each shard, and the number of all samples: int64 [shards + 1]."""
        return self._starts

    # the samples

    def open_shard(self, shard: int) -> None:
        """Open a shard ahead of reading from it.

        Raises:
            ShardError: it is missing, is not what the manifest says, or the set was made anew meanwhile.
            OSError: the disk or the store does not answer, or refuses.
        """
        self._tar(shard)

    def read(self, sample_id: int) -> dict[str, Any]:
        """All members of a sample as bytes, and its key (str) as `__key__`.

        Checks each member's name and size in the tar against the index, which the faster ways to read don't.

        Raises:
            ShardError: the sample is damaged, or as `open_shard`.
            OSError: as `open_shard`.
        """
        tar, row = self._tar_of(sample_id)
        key = self._key(tar, row, sample_id)
        sample: dict[str, Any] = {"__key__": key}
        for column, member in enumerate(self.manifest.members):
            if tar.index[row, column, 0] >= 0:
                self._require_header(tar, row, column, sample_id, f"{key}.{member}")
                sample[member] = self._pread(tar, row, column, sample_id)
        return sample

    def key(self, sample_id: int) -> str:
        """The sample's key, from the tar header before its first member."""
        tar, row = self._tar_of(sample_id)
        return self._key(tar, row, sample_id)

    def has_member(self, sample_id: int, member: str) -> bool:
        """Whether a sample has an optional member."""
        tar, row = self._tar_of(sample_id)
        column = self._columns.get(member)
        return column is not None and int(tar.index[row, column, 0]) >= 0

    def read_member(self, sample_id: int, member: str) -> bytes:
        """One member's bytes.

        Raises:
            ShardError: the sample has no such member, or its bytes can't be read.
        """
        tar, row = self._tar_of(sample_id)
        column = self._columns.get(member)
        if column is None or tar.index[row, column, 0] < 0:
            present = [m for m, c in self._columns.items() if tar.index[row, c, 0] >= 0]
            self._fail(tar, sample_id, f"has no member {member!r}, only {', '.join(present)}")
        return self._pread(tar, row, column, sample_id)

    def read_json(self, sample_id: int) -> dict[str, Any]:
        """The sample's record.

        Raises:
            ShardError: it has none, or it is not a JSON object.
        """
        text = self.read_member(sample_id, "json")
        return self._parse_record(self._tar_of(sample_id)[0], sample_id, text)

    def read_latents(self, sample_ids: Sequence[int] | np.ndarray, out: np.ndarray) -> None:
        """Read moments straight into `out` [B, 2C, h, w] float16, one `preadv` a sample.

        Raises:
            ShardError: a sample's array is not float16 of [2C, h, w], or its bytes can't be read.
        """
        self._read_rows(sample_ids, out, records=False)

    def read_samples(
        self, sample_ids: Sequence[int] | np.ndarray, out: np.ndarray, places: np.ndarray | None = None
    ) -> list[dict[str, Any]]:
        """As `read_latents`, but into rows `places` of `out`; returns the samples' records.

        One `preadv` brings both where they are neighbours in the tar, as our writer leaves them.
        """
        return self._read_rows(sample_ids, out, places, records=True)

    def _read_rows(
        self,
        sample_ids: Sequence[int] | np.ndarray,
        out: np.ndarray,
        places: np.ndarray | None = None,
        *,
        records: bool,
    ) -> list[dict[str, Any]]:
        ids = np.asarray(sample_ids, np.int64)
        targets = np.arange(len(out)) if places is None else places
        if out.dtype != np.float16 or not out.flags.c_contiguous or len(targets) != len(ids):
            want = f"contiguous float16 of {len(ids)} rows"
            raise ValueError(f"out must be {want}, not {out.dtype} {out.shape}")
        column = self._columns.get(LATENT)
        if column is None:
            raise ShardError(f"{self.root} has no {LATENT}; run `data-tools encode` on it first")
        found: list[dict[str, Any]] = [{}] * len(ids) if records else []
        # In the order of shards and rows: each shard is looked up once, and its bytes are read in their order.
        order = np.argsort(ids, kind="stable")
        shards = np.searchsorted(self._starts, ids[order], side="right") - 1
        # All shards at once, but remote ones one by one: what is held open can't make room in the cache.
        cuts = (np.flatnonzero(np.diff(shards)) + 1).tolist() if self.remote else []
        for piece in np.split(order, cuts) if len(ids) else []:
            read = self._read_piece(ids[piece], out, targets[piece], column, records)
            for place, record in zip(piece.tolist(), read, strict=records):
                found[place] = record
        return found

    def _read_piece(
        self, ids: np.ndarray, out: np.ndarray, targets: np.ndarray, column: int, records: bool
    ) -> list[dict[str, Any]]:
        """Latents of ascending `ids` into rows `targets` of `out`, and their records."""
        want_header = npy_header(out.shape[1:], "<f2")
        tars, rows, spans = self._spans(ids)
        offsets, sizes = spans[:, column, 0], spans[:, column, 1]
        # A record that follows its latent closely comes with it: bytes from the end of one to the end of the other.
        gaps, tails = np.zeros_like(offsets), np.zeros_like(offsets)
        if records and (json_column := self._columns.get("json")) is not None:
            gaps = spans[:, json_column, 0] - offsets - sizes
            tails = gaps + spans[:, json_column, 1]
            tails[(gaps < 0) | (spans[:, json_column, 1] < 0) | (tails > _NEAR)] = 0
        tail_ends = np.cumsum(tails)
        tail_bytes = memoryview(bytearray(int(tail_ends[-1])))
        out_bytes = out.data.cast("B")
        row_bytes = out.nbytes // len(out)
        total = len(want_header) + row_bytes
        header = bytearray(len(want_header))
        plan = [
            (tar, (header, out_bytes[start : start + row_bytes], tail_bytes[tail:tail_end]), offset, wanted)
            for tar, offset, wanted, start, tail, tail_end in zip(
                tars,
                offsets.tolist(),
                np.where(sizes == total, total + tails, -1).tolist(),
                (targets * row_bytes).tolist(),
                (tail_ends - tails).tolist(),
                tail_ends.tolist(),
                strict=True,
            )
        ]

        def read(item: int, flags: int) -> bool:
            tar, buffers, offset, wanted = plan[item]
            try:
                return os.preadv(tar.fd, buffers, offset, flags) == wanted and header == want_header
            except OSError:
                return False

        # First what is in memory; then the disk is asked for all that isn't at once, and only then waited for.
        cold = [item for item in range(len(plan)) if not read(item, _NOWAIT)]
        if _ADVISE is not None and len(cold) > 1:
            for item in cold:
                tar, _, offset, _ = plan[item]
                with contextlib.suppress(OSError, OverflowError):
                    _ADVISE(tar.fd, offset, total, os.POSIX_FADV_WILLNEED)
        # An interrupted read, a header written by another program, or a wrong array: find out slowly.
        slow = [item for item in cold if not read(item, 0)]
        for item in slow:
            array = self._parse_latent(tars[item], int(rows[item]), column, int(ids[item]), out.shape[1:])
            out[targets[item]] = array
        if not records:
            return []
        texts: list[memoryview | bytes] = [
            tail_bytes[start:end]
            for start, end in zip((tail_ends - tails + gaps).tolist(), tail_ends.tolist(), strict=True)
        ]
        for item in {*slow, *np.flatnonzero(tails == 0).tolist()}:
            texts[item] = self.read_member(int(ids[item]), "json")
        return self._parse_records(texts, tars, ids)

    def _spans(self, ids: np.ndarray) -> tuple[list[_Tar], np.ndarray, np.ndarray]:
        """The tar of each of ascending sample ids, its row there [n], and places of members [n, members, 2]."""
        for sample_id in (ids[0], ids[-1]):
            self.locate(int(sample_id))  # raises if there is no such sample
        shards = np.searchsorted(self._starts, ids, side="right") - 1
        rows = ids - self._starts[shards]
        spans = np.empty((len(ids), len(self.manifest.members), 2), np.int64)
        tars: list[_Tar] = []
        for begin, end in pairwise([0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(ids)]):
            tar = self._tar(int(shards[begin]))
            spans[begin:end] = tar.index[rows[begin:end]]
            tars += [tar] * (end - begin)
        return tars, rows, spans

    def _parse_records(
        self, texts: Sequence[memoryview | bytes], tars: Sequence[_Tar], ids: np.ndarray
    ) -> list[dict[str, Any]]:
        """Records of several samples: in one go, which takes half the time, unless one of them is wrong."""
        try:
            records = _DECODER.decode(str(b"[%b]" % b",".join(texts), "utf-8"))
            if len(records) == len(texts) and {*map(type, records)} == {dict}:
                return cast(list[dict[str, Any]], records)
        except (ValueError, RecursionError):
            pass
        return [
            self._parse_record(tar, sample_id, bytes(text))
            for tar, sample_id, text in zip(tars, ids.tolist(), texts, strict=True)
        ]

    def read_row(self, sample_id: int, member: str, row: int, count: int, out: np.ndarray) -> None:
        """Row `row` of a sample's float16 array of `count` rows, into `out`.

        Raises:
            ShardError: the member is missing, or is no float16 array [count, *out.shape].
        """
        column = self._columns.get(member)
        tar, shard_row = self._tar_of(sample_id)
        offset, size = (-1, 0) if column is None else tar.index[shard_row, column].tolist()
        if offset < 0:
            self._fail(tar, sample_id, f"has no {member}")
        want_header = npy_header((count, *out.shape), "<f2")
        begin = offset + len(want_header) + row * out.nbytes
        whole = size == len(want_header) + count * out.nbytes
        try:
            if not whole or _pread_all(tar.fd, len(want_header), offset) != want_header:
                self._fail(tar, sample_id, f"has a {member} that is no float16 {[count, *out.shape]}")
            if _pread_into(tar.fd, out.data.cast("B"), begin) != out.nbytes:
                self._fail(tar, sample_id, f"ends early in {member}")
        except (OSError, OverflowError) as error:
            self._unread(tar, sample_id, offset, error)

    def _parse_record(self, tar: _Tar, sample_id: int, text: bytes) -> dict[str, Any]:
        try:
            decoded = str(text, "utf-8")
            record, end = _DECODER.raw_decode(decoded)  # half the time of json.loads, which looks for encodings
            whole = end == len(decoded) or not decoded[end:].strip()
        except (ValueError, RecursionError) as error:
            self._fail(tar, sample_id, f"has a json member that is not JSON ({error})")
        if not whole or not isinstance(record, dict):
            self._fail(tar, sample_id, "has a json member that is no object")
        return record

    def _parse_latent(self, tar: _Tar, row: int, column: int, sample_id: int, shape: tuple[int, ...]) -> np.ndarray:
        if tar.index[row, column, 0] < 0:
            self._fail(tar, sample_id, f"has no {LATENT}")
        array = parse_npy(self._pread(tar, row, column, sample_id))
        if array is None:
            self._fail(tar, sample_id, f"has a {LATENT} that is not a numpy array")
        if array.dtype != np.float16 or array.shape != shape:
            self._fail(tar, sample_id, f"is {array.dtype} {list(array.shape)}, not float16 {list(shape)}")
        return array

    def _tar_of(self, sample_id: int) -> tuple[_Tar, int]:
        shard, row = self.locate(sample_id)
        return self._tar(shard), row

    def _tar(self, shard: int) -> _Tar:
        with self._lock:
            tar = self._tars.get(shard)
            if tar is not None:
                self._tars.move_to_end(shard)
                return tar
            if self.cache is not None:
                self._let_go(shard, self.cache)
        while True:
            try:
                tar = self._open_tar(shard)  # may take long: other threads go on with other shards
                break
            except (ShardError, OSError) as error:
                if not _lacks_descriptors(error) or not self._make_way():
                    raise
        with self._lock:
            tar = self._tars.setdefault(shard, tar)
            self._tars.move_to_end(shard)
            while len(self._tars) > self.max_open:
                self._tars.popitem(last=False)
        return tar

    def _open_tar(self, shard: int) -> _Tar:
        info, members = self.manifest.shards[shard], len(self.manifest.members)
        if self.store is None or self.cache is None:
            try:
                return _Tar.open(Path(self.root) / info.name, info.samples, members)
            finally:  # once it is open: who makes a set anew removes the manifest before the shards
                self._require_unchanged()
        tar = _Tar(info.name, *self.cache.open(self.store, info, members))
        if (prefetcher := self._prefetcher) is not None:
            prefetcher.taken(shard)
        return tar

    def _require_unchanged(self) -> None:
        """Refuse shards of a set that took the place of ours: they open and read as well as ours did."""
        path = Path(self.root) / MANIFEST
        if self._seen is None or (seen := _identity(path)) == self._seen:
            return
        if seen is not None:  # touched or restored, or a drive that was mounted again: what it says is what counts
            found = Manifest.load(Path(self.root))
            if (found.members, found.shards) == (self.manifest.members, self.manifest.shards):
                self._seen = seen
                return
        what = "is gone" if seen is None else "is not the one that was there when the set was opened"
        raise ShardError(f"{path} {what}: restore the set as it was, or start anew with the new one")

    def _make_way(self) -> bool:
        """Close half of what is open, from here on: others have taken more descriptors than were left to them."""
        with self._lock:
            self.max_open = max(1, len(self._tars) // 2)
            had = len(self._tars)
            while len(self._tars) > had // 2:
                self._tars.popitem(last=False)
            return had > 0

    def _let_go(self, coming: int, cache: Cache) -> None:
        """Close what would keep the disk full: more than our share, and files that the cache has removed."""
        infos, members = self.manifest.shards, len(self.manifest.members)
        size = cache.need_bytes(infos[coming], members)
        for shard in reversed(list(self._tars)):
            size += cache.need_bytes(infos[shard], members)
            if size > cache.share_bytes or os.fstat(self._tars[shard].fd).st_nlink == 0:
                del self._tars[shard]

    def _pread(self, tar: _Tar, row: int, column: int, sample_id: int) -> bytes:
        offset, size = tar.index[row, column].tolist()
        try:
            data = _pread_all(tar.fd, size, offset)
        except (OSError, ValueError, OverflowError, MemoryError) as error:
            self._unread(tar, sample_id, offset, error)
        if len(data) != size:
            self._fail(tar, sample_id, f"ends early: {len(data)} of {size} bytes at byte {offset}")
        return data

    def _key(self, tar: _Tar, row: int, sample_id: int) -> str:
        column = next((c for c in range(len(self.manifest.members)) if tar.index[row, c, 0] >= BLOCK), None)
        if column is None:
            self._fail(tar, sample_id, "has no members")
        name = self._header(tar, row, column, sample_id)[0]
        suffix = "." + self.manifest.members[column]
        if not name.endswith(suffix):
            self._fail(tar, sample_id, f"is {name!r} where the index has {suffix}: it is another tar's index")
        return name.removesuffix(suffix)

    def _header(self, tar: _Tar, row: int, column: int, sample_id: int) -> tuple[str, bytes]:
        """(a member's name, the digits of its size) as the tar has them."""
        offset = int(tar.index[row, column, 0])
        try:
            header = _pread_all(tar.fd, BLOCK, offset - BLOCK)
        except (OSError, ValueError, OverflowError) as error:
            self._unread(tar, sample_id, offset, error)
        return header[:NAME_BYTES].rstrip(b"\0").decode("ascii", "backslashreplace"), header[124:136].strip(b" \0")

    def _require_header(self, tar: _Tar, row: int, column: int, sample_id: int, name: str) -> None:
        found, digits = self._header(tar, row, column, sample_id)
        size = int(tar.index[row, column, 1])
        if found != name or not digits.isdigit() or digits != b"%011o" % size:
            self._fail(tar, sample_id, f"is {found!r} where the index has {name} of {size} bytes")

    def _unread(self, tar: _Tar, sample_id: int, offset: int, error: Exception) -> NoReturn:
        """A disk that does not answer is no damage: its error goes on as it is, with the tar's name."""
        if is_of_machine(error):
            with naming(Path(self.root) / tar.name):
                raise error
        self._fail(tar, sample_id, f"can't be read at byte {offset} ({error})")

    def _fail(self, tar: _Tar, sample_id: int, what: str) -> NoReturn:
        if self.store is None:
            where, remedy = str(Path(self.root) / tar.name), f"run `data-tools verify {self.root}`"
        else:  # its bytes were those of the manifest when they were fetched
            where, remedy = self.store.url(tar.name), "run `data-tools verify` where the shards were made"
        raise ShardError(f"{where}: sample {sample_id} {what}; {remedy}")


def _identity(path: Path) -> tuple[int, int, int] | None:
    """What tells a file from the one that replaces it; None where there is none."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns, status.st_size
    return None


def _pread_all(fd: int, size: int, offset: int) -> bytes:
    """Up to `size` bytes; fewer only at the end of the file (network file systems may give parts)."""
    data = os.pread(fd, size, offset)
    while len(data) < size:
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def _pread_into(fd: int, out: memoryview, offset: int) -> int:
    """Fill `out` as `_pread_all` reads; returns how many bytes there were."""
    done = 0
    while done < len(out) and (more := os.preadv(fd, (out[done:],), offset + done)):
        done += more
    return done

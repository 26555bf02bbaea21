"""Sample ids to samples, at random, from open tars and their indexes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np

from finetune import is_of_machine
from finetune.data.shards.cache import Cache
from finetune.data.shards.files import (
    BLOCK,
    LATENT,
    MANIFEST,
    NAME_BYTES,
    ShardError,
    naming,
    npy_header,
    parse_npy,
)
from finetune.data.shards.labels import CLASSES, parse_classes
from finetune.data.shards.manifest import Bucket, Kind, Manifest
from finetune.data.shards.store import Root, Store, StoreAwayError, resolve
from finetune.data.shards.tars import OpenTars, Tar, identity, most_open

_DECODER = json.JSONDecoder()
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)  # Linux: fail rather than wait for the disk
_ADVISE = getattr(os, "posix_fadvise", None)
_RANGES_AT_ONCE = 16  # requests are small: their latency counts
_NEAR = 1 << 14  # a record this near to its latent comes with it in one read


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
        self.tars = OpenTars(home, manifest, max_open or most_open(), self.cache)
        self._starts = np.cumsum([0, *(shard.samples for shard in manifest.shards)], dtype=np.int64)
        self._columns = {member: column for column, member in enumerate(manifest.members)}

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
        seen = None if isinstance(home, Store) else identity(home / MANIFEST)
        manifest = Manifest.load(home)
        if kind is not None and manifest.kind != kind:
            remedy = "run `data-tools encode` on it" if kind == "latents" else "give the set it was made from"
            name = home.name if isinstance(home, Store) else home
            raise ShardError(f"{name} holds {manifest.kind}, {kind} are needed; {remedy}")
        shards = cls(home, manifest, max_open=max_open, cache=cache)
        shards.tars.seen = seen
        return shards

    def __len__(self) -> int:
        return int(self._starts[-1])

    def close(self) -> None:
        """Let go of all open files and end fetching ahead; reading opens them again."""
        self.tars.close()

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
        self.tars.prefetch(shards)

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

        part = ShardSet(store, self.manifest, max_open=self.tars.max_open, cache=cache)
        few = list(rows)[: self.tars.max_open]
        with ThreadPoolExecutor(_RANGES_AT_ONCE) as pool:
            for shard, found in zip(few, pool.map(opened, few), strict=True):
                if found is not None:
                    part.tars.open[shard] = Tar(self.manifest.shards[shard].name, *found)
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
        self.tars.get(shard)

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

    def _spans(self, ids: np.ndarray) -> tuple[list[Tar], np.ndarray, np.ndarray]:
        """The tar of each of ascending sample ids, its row there [n], and places of members [n, members, 2]."""
        for sample_id in (ids[0], ids[-1]):
            self.locate(int(sample_id))  # raises if there is no such sample
        shards = np.searchsorted(self._starts, ids, side="right") - 1
        rows = ids - self._starts[shards]
        spans = np.empty((len(ids), len(self.manifest.members), 2), np.int64)
        tars: list[Tar] = []
        for begin, end in pairwise([0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(ids)]):
            tar = self.tars.get(int(shards[begin]))
            spans[begin:end] = tar.index[rows[begin:end]]
            tars += [tar] * (end - begin)
        return tars, rows, spans

    def _parse_records(
        self, texts: Sequence[memoryview | bytes], tars: Sequence[Tar], ids: np.ndarray
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

    def _parse_record(self, tar: Tar, sample_id: int, text: bytes) -> dict[str, Any]:
        try:
            decoded = str(text, "utf-8")
            record, end = _DECODER.raw_decode(decoded)  # half the time of json.loads, which looks for encodings
            whole = end == len(decoded) or not decoded[end:].strip()
        except (ValueError, RecursionError) as error:
            self._fail(tar, sample_id, f"has a json member that is not JSON ({error})")
        if not whole or not isinstance(record, dict):
            self._fail(tar, sample_id, "has a json member that is no object")
        return record

    def _parse_latent(self, tar: Tar, row: int, column: int, sample_id: int, shape: tuple[int, ...]) -> np.ndarray:
        if tar.index[row, column, 0] < 0:
            self._fail(tar, sample_id, f"has no {LATENT}")
        array = parse_npy(self._pread(tar, row, column, sample_id))
        if array is None:
            self._fail(tar, sample_id, f"has a {LATENT} that is not a numpy array")
        if array.dtype != np.float16 or array.shape != shape:
            self._fail(tar, sample_id, f"is {array.dtype} {list(array.shape)}, not float16 {list(shape)}")
        return array

    def _tar_of(self, sample_id: int) -> tuple[Tar, int]:
        shard, row = self.locate(sample_id)
        return self.tars.get(shard), row

    def _pread(self, tar: Tar, row: int, column: int, sample_id: int) -> bytes:
        offset, size = tar.index[row, column].tolist()
        try:
            data = _pread_all(tar.fd, size, offset)
        except (OSError, ValueError, OverflowError, MemoryError) as error:
            self._unread(tar, sample_id, offset, error)
        if len(data) != size:
            self._fail(tar, sample_id, f"ends early: {len(data)} of {size} bytes at byte {offset}")
        return data

    def _key(self, tar: Tar, row: int, sample_id: int) -> str:
        column = next((c for c in range(len(self.manifest.members)) if tar.index[row, c, 0] >= BLOCK), None)
        if column is None:
            self._fail(tar, sample_id, "has no members")
        name = self._header(tar, row, column, sample_id)[0]
        suffix = "." + self.manifest.members[column]
        if not name.endswith(suffix):
            self._fail(tar, sample_id, f"is {name!r} where the index has {suffix}: it is another tar's index")
        return name.removesuffix(suffix)

    def _header(self, tar: Tar, row: int, column: int, sample_id: int) -> tuple[str, bytes]:
        """(a member's name, the digits of its size) as the tar has them."""
        offset = int(tar.index[row, column, 0])
        try:
            header = _pread_all(tar.fd, BLOCK, offset - BLOCK)
        except (OSError, ValueError, OverflowError) as error:
            self._unread(tar, sample_id, offset, error)
        return header[:NAME_BYTES].rstrip(b"\0").decode("ascii", "backslashreplace"), header[124:136].strip(b" \0")

    def _require_header(self, tar: Tar, row: int, column: int, sample_id: int, name: str) -> None:
        found, digits = self._header(tar, row, column, sample_id)
        size = int(tar.index[row, column, 1])
        if found != name or not digits.isdigit() or digits != b"%011o" % size:
            self._fail(tar, sample_id, f"is {found!r} where the index has {name} of {size} bytes")

    def _unread(self, tar: Tar, sample_id: int, offset: int, error: Exception) -> NoReturn:
        """A disk that does not answer is no damage: its error goes on as it is, with the tar's name."""
        if is_of_machine(error):
            with naming(Path(self.root) / tar.name):
                raise error
        self._fail(tar, sample_id, f"can't be read at byte {offset} ({error})")

    def _fail(self, tar: Tar, sample_id: int, what: str) -> NoReturn:
        if self.store is None:
            where, remedy = str(Path(self.root) / tar.name), f"run `data-tools verify {self.root}`"
        else:  # its bytes were those of the manifest when they were fetched
            where, remedy = self.store.url(tar.name), "run `data-tools verify` where the shards were made"
        raise ShardError(f"{where}: sample {sample_id} {what}; {remedy}")


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

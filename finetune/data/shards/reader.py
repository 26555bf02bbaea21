"""Sample ids to samples, at random, from open tars and their indexes."""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from finetune.data.shards.files import BLOCK, LATENT, NAME_BYTES, ShardError, index_name, npy_header, parse_npy
from finetune.data.shards.manifest import Bucket, Kind, Manifest


class _Tar:
    """An open tar and its index. Closed when its last reader lets go, so eviction can't pull it away."""

    def __init__(self, path: Path, samples: int, members: int) -> None:
        self.fd = -1
        self.name = path.name
        index_path = path.with_name(index_name(path.name))
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            # A plain view of the map: np.memmap's own indexing is several times slower.
            index = np.asarray(np.load(index_path, mmap_mode="r", allow_pickle=False))
        except FileNotFoundError as error:
            raise ShardError(f"{error.filename} is missing; restore it or make the shards again") from None
        except (OSError, ValueError) as error:
            raise ShardError(f"cannot open {path} and its index: {error}; run `data-tools verify`") from None
        if index.dtype != np.int64 or index.shape != (samples, members, 2):
            raise ShardError(
                f"{index_path} is {index.dtype} {list(index.shape)}, the manifest needs int64 "
                f"{[samples, members, 2]}; run `data-tools verify`"
            )
        self.index = index

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class ShardSet:
    """Random access to the samples of a folder of shards.

    Safe in threads and over `fork`; a pickled copy opens its own files. At most `max_open` shards are
    open at a time.
    """

    def __init__(self, root: str | os.PathLike[str], manifest: Manifest, *, max_open: int = 256) -> None:
        self.root = Path(root)
        self.manifest = manifest
        self.max_open = max_open
        self._starts = np.cumsum([0, *(shard.samples for shard in manifest.shards)], dtype=np.int64)
        self._columns = {member: column for column, member in enumerate(manifest.members)}
        self._reset()

    @classmethod
    def open(cls, root: str | os.PathLike[str], kind: Kind | None = None, *, max_open: int = 256) -> ShardSet:
        """Open the set in `root`; `kind` is what the caller needs.

        Raises:
            ShardError: no finished set there, or one of the other kind.
        """
        manifest = Manifest.load(root)
        if kind is not None and manifest.kind != kind:
            remedy = "run `data-tools encode` on it" if kind == "latents" else "give the set it was made from"
            raise ShardError(f"{root} holds {manifest.kind}, {kind} are needed; {remedy}")
        return cls(root, manifest, max_open=max_open)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._tars: OrderedDict[int, _Tar] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_tars")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def close(self) -> None:
        """Let go of all open files; reading opens them again."""
        with self._lock:
            self._tars.clear()

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
        sizes: dict[Bucket, int] = {}
        for shard in self.manifest.shards:
            if shard.bucket is not None:
                sizes[shard.bucket] = sizes.get(shard.bucket, 0) + shard.samples
        return dict(sorted(sizes.items()))

    def bucket_ids(self, bucket: Bucket, positions: np.ndarray) -> np.ndarray:
        """Sample ids (int64) of positions 0..size-1 within a bucket; never lists the whole bucket."""
        shards = [i for i, shard in enumerate(self.manifest.shards) if shard.bucket == bucket]
        ends = np.cumsum([self.manifest.shards[i].samples for i in shards], dtype=np.int64)
        place = np.searchsorted(ends, positions, side="right")
        begins = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
        return self._starts[np.asarray(shards, np.int64)][place] + (positions - begins[place])

    @property
    def buckets(self) -> dict[Bucket, np.ndarray]:
        """All sample ids (int64) of each bucket, in the order of `bucket_sizes`; 8 bytes a sample.

        Shards of mixed sizes have no bucket and are left out.
        """
        return {bucket: self.bucket_ids(bucket, np.arange(n)) for bucket, n in self.bucket_sizes.items()}

    # the samples

    def read(self, sample_id: int) -> dict[str, Any]:
        """All members of a sample as bytes, and its key (str) as `__key__`."""
        tar, row = self._tar_of(sample_id)
        sample: dict[str, Any] = {"__key__": self._key(tar, row, sample_id)}
        for column, member in enumerate(self.manifest.members):
            if tar.index[row, column, 0] >= 0:
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
        try:
            record = json.loads(self.read_member(sample_id, "json"))
        except ValueError as error:
            self._fail(self._tar_of(sample_id)[0], sample_id, f"has a json member that is not JSON ({error})")
        if not isinstance(record, dict):
            self._fail(self._tar_of(sample_id)[0], sample_id, "has a json member that is no object")
        return record

    def read_latents(self, sample_ids: Sequence[int] | np.ndarray, out: np.ndarray) -> None:
        """Read moments straight into `out` [B, 2C, h, w] float16, one `preadv` a sample.

        Raises:
            ShardError: a sample's array is not float16 of [2C, h, w], or its bytes can't be read.
        """
        if out.dtype != np.float16 or not out.flags.c_contiguous or len(out) != len(sample_ids):
            want = f"contiguous float16 of {len(sample_ids)} rows"
            raise ValueError(f"out must be {want}, not {out.dtype} {out.shape}")
        column = self._columns.get(LATENT)
        if column is None:
            raise ShardError(f"{self.root} has no {LATENT}; run `data-tools encode` on it first")
        if len(out) == 0:
            return
        want_header = npy_header(out.shape[1:], "<f2")
        header = bytearray(len(want_header))
        row_bytes = out.nbytes // len(out)
        total = len(want_header) + row_bytes
        out_bytes = out.data.cast("B")
        # Shard by shard and row by row: each shard is looked up once, and its bytes are read in their order.
        ids = np.asarray(sample_ids, np.int64)
        order = np.argsort(ids, kind="stable")
        for end in (order[0], order[-1]):
            self.locate(int(ids[end]))  # raises if there is no such sample
        shards = np.searchsorted(self._starts, ids[order], side="right") - 1
        for places in np.split(order, np.flatnonzero(np.diff(shards)) + 1):
            tar, first_row = self._tar_of(int(ids[places[0]]))
            rows = ids[places] - ids[places[0]] + first_row
            spans = tar.index[rows, column].tolist()
            for place, row, (offset, size) in zip(places.tolist(), rows.tolist(), spans, strict=True):
                target = out_bytes[place * row_bytes : (place + 1) * row_bytes]
                try:
                    whole = size == total and os.preadv(tar.fd, (header, target), offset) == total
                except OSError:
                    whole = False
                if whole and header == want_header:
                    continue
                # An interrupted read, a header written by another program, or a wrong array: find out slowly.
                out[place] = self._parse_latent(tar, row, column, int(ids[place]), out.shape[1:])

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
        with self._lock:
            tar = self._tars.get(shard)
            if tar is None:
                info = self.manifest.shards[shard]
                tar = _Tar(self.root / info.name, info.samples, len(self.manifest.members))
                self._tars[shard] = tar
                while len(self._tars) > self.max_open:
                    self._tars.popitem(last=False)
            else:
                self._tars.move_to_end(shard)
        return tar, row

    def _pread(self, tar: _Tar, row: int, column: int, sample_id: int) -> bytes:
        offset, size = tar.index[row, column].tolist()
        try:
            data = _pread_all(tar.fd, size, offset)
        except (OSError, ValueError, OverflowError, MemoryError) as error:
            self._fail(tar, sample_id, f"can't be read at byte {offset} ({error})")
        if len(data) != size:
            self._fail(tar, sample_id, f"ends early: {len(data)} of {size} bytes at byte {offset}")
        return data

    def _key(self, tar: _Tar, row: int, sample_id: int) -> str:
        column = next((c for c in range(len(self.manifest.members)) if tar.index[row, c, 0] >= BLOCK), None)
        if column is None:
            self._fail(tar, sample_id, "has no members")
        header = _pread_all(tar.fd, BLOCK, int(tar.index[row, column, 0]) - BLOCK)
        name = header[:NAME_BYTES].rstrip(b"\0").decode("ascii", "replace")
        suffix = "." + self.manifest.members[column]
        if not name.endswith(suffix):
            self._fail(tar, sample_id, f"is {name!r} where the index has {suffix}: it is another tar's index")
        return name.removesuffix(suffix)

    def _fail(self, tar: _Tar, sample_id: int, what: str) -> NoReturn:
        remedy = f"run `data-tools verify {self.root}`"
        raise ShardError(f"{self.root / tar.name}: sample {sample_id} {what}; {remedy}")


def _pread_all(fd: int, size: int, offset: int) -> bytes:
    """Up to `size` bytes; fewer only at the end of the file (network file systems may give parts)."""
    data = os.pread(fd, size, offset)
    while len(data) < size:
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data

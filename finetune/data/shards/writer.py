"""Samples to shards: tars, their indexes, the manifest."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from finetune import npy
from finetune.data.shards.files import (
    BLOCK,
    KEY,
    MANIFEST,
    MEMBER,
    NAME_BYTES,
    ShardError,
    index_name,
    naming,
    npy_bytes,
    write_atomic,
)
from finetune.data.shards.manifest import Bucket, EncoderInfo, Kind, LatentStats, Manifest, ShardInfo


def check_names(key: str, members: Iterable[str]) -> None:
    """Refuse names that another reader of tars would take apart in another way.

    Raises:
        ShardError: no members, or a key or a member's name that is not of plain words, or too long.
    """
    if not KEY.fullmatch(key):
        raise ShardError(f"sample key {key!r} must be of letters, digits, _, - and /; rename it")
    if not members:
        raise ShardError(f"sample {key!r} has no members")
    for member in members:
        if not MEMBER.fullmatch(member):
            raise ShardError(f"member {member!r} of {key!r} must be lower-case words joined by dots")
        if len(key) + 1 + len(member) > NAME_BYTES:
            raise ShardError(f"{key}.{member} is longer than {NAME_BYTES} bytes; use a shorter key")


def tar_blocks(key: str, members: Mapping[str, bytes]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """A sample as it stands in a tar, whole blocks, and (offset in them, size) of each member."""
    parts: list[bytes] = []
    places = {}
    at = 0
    for member, data in members.items():
        info = tarfile.TarInfo(f"{key}.{member}")  # mtime, uid, gid 0 and mode 0644: same bytes anywhere
        info.size = len(data)
        places[member] = (at + BLOCK, len(data))
        parts += [info.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % BLOCK)]
        at += BLOCK + len(data) + len(parts[-1])
    return b"".join(parts), places


class _OpenShard:
    """A tar under a temporary name, its checksum, and the offsets of what was written so far."""

    def __init__(self, root: Path, name: str, bucket: Bucket | None) -> None:
        self.path = root / name
        self.temporary = root / f".{name}.tmp"
        self.bucket = bucket
        self.keys: set[str] = set()
        self.rows: list[dict[str, tuple[int, int]]] = []
        self.bytes = 0
        self.sha256 = hashlib.sha256()
        self.file: IO[bytes] = self.temporary.open("wb", buffering=1 << 20)

    def put(self, data: bytes) -> None:
        with naming(self.path):
            self.file.write(data)
        self.sha256.update(data)
        self.bytes += len(data)

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        blocks, places = tar_blocks(key, members)
        self.rows.append({member: (self.bytes + offset, size) for member, (offset, size) in places.items()})
        self.put(blocks)
        self.keys.add(key)

    def finish(self, samples: int) -> ShardInfo:
        self.put(bytes(2 * BLOCK))
        self.put(bytes(-self.bytes % tarfile.RECORDSIZE))
        with naming(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
        os.replace(self.temporary, self.path)
        return ShardInfo(self.path.name, self.bucket, samples, self.bytes, self.sha256.hexdigest())

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # closing flushes, which a full disk refuses again
            self.file.close()
        self.temporary.unlink(missing_ok=True)


class ShardWriter:
    """Writes samples into shards, one open shard a bucket. The same calls give the same bytes.

        with ShardWriter(root, "images") as writer:
            writer.write("cat", {"png": png, "json": json_bytes}, bucket=(64, 64))
            writer.finish()

    Nothing but `finish` (or `close` and `Manifest.save`) makes the set loadable; after an exception, or a
    kill, there is no manifest. Keys are ASCII words without dots, at most 100 bytes with the member's name:
    so each header is one block that stands right before its data.

    Raises:
        ShardError: `root` already holds shards; a key or member name is bad, or repeats within a shard.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        kind: Kind,
        *,
        members: Sequence[str] = (),
        max_samples: int = 10_000,
        max_bytes: int = 1 << 30,
    ) -> None:
        self.root = Path(root)
        self.kind: Kind = kind
        self.members = list(members)
        self.max_samples, self.max_bytes = max_samples, max_bytes
        self.root.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in self.root.iterdir())
        if old := [name for name in names if name == MANIFEST or name.endswith(".tar")]:
            raise ShardError(f"{self.root} already holds shards ({old[0]}); choose another folder")
        self._open: dict[Bucket | None, _OpenShard] = {}
        self._done: list[tuple[ShardInfo, int]] = []  # with the number of columns of the index as written
        self._names = 0
        self._closed = False

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def write(self, key: str, members: Mapping[str, bytes], bucket: Bucket | None = None) -> None:
        """Add one sample. `bucket` is its (height, width) in pixels."""
        assert not self._closed, "write after close"
        check_names(key, members)
        self.members += [member for member in members if member not in self.members]
        shard = self._open.get(bucket)
        if shard is None:
            shard = self._open[bucket] = _OpenShard(self.root, f"{self._names:05d}.tar", bucket)
            self._names += 1
        if key in shard.keys:
            raise ShardError(f"sample key {key!r} occurs twice; keys must differ")
        shard.add(key, members)
        if len(shard.rows) >= self.max_samples or shard.bytes >= self.max_bytes:
            self._finish_shard(bucket)

    def close(self) -> list[ShardInfo]:
        """Finish the open shards; the shards in the order of their names. Writes no manifest."""
        if not self._closed:
            for bucket in list(self._open):
                self._finish_shard(bucket)
            self._closed = True
            for info, columns in self._done:
                if columns < len(self.members):  # an optional member first came up in a later shard
                    path = self.root / index_name(info.name)
                    pad = np.full((info.samples, len(self.members) - columns, 2), -1, np.int64)
                    write_atomic(path, npy_bytes(np.concatenate([npy.load(path), pad], axis=1)))
        return sorted((info for info, _ in self._done), key=lambda info: (len(info.name), info.name))

    def finish(self, encoder: EncoderInfo | None = None, latents: LatentStats | None = None) -> Manifest:
        """Close, write the manifest, and return it."""
        manifest = Manifest(self.kind, self.members, self.close(), encoder, latents)
        manifest.save(self.root)
        return manifest

    def abort(self) -> None:
        """Drop the open shards. Those already finished stay, without a manifest."""
        self._closed = True
        for shard in self._open.values():
            shard.discard()
        self._open.clear()

    def _finish_shard(self, bucket: Bucket | None) -> None:
        shard = self._open[bucket]
        index = np.full((len(shard.rows), len(self.members), 2), -1, np.int64)
        for row, places in enumerate(shard.rows):
            for member, place in places.items():
                index[row, self.members.index(member)] = place
        info = shard.finish(len(shard.rows))
        del self._open[bucket]
        write_atomic(self.root / index_name(info.name), npy_bytes(index))
        self._done.append((info, len(self.members)))


def write_shard(
    root: str | os.PathLike[str],
    name: str,
    bucket: Bucket | None,
    runs: Iterable[tuple[bytes, np.ndarray]],
) -> ShardInfo:
    """Write one shard and its index from samples that stand ready as `tar_blocks`.

    Args:
        runs: samples one after another, as (their blocks, int64 [samples, members, 2] offsets in these and
            sizes, for the members that the manifest will list; -1 for a member that a sample lacks).
    """
    shard = _OpenShard(Path(root), name, bucket)
    index: list[np.ndarray] = []
    try:
        for blocks, places in runs:
            base = np.where(places[..., :1] >= 0, [shard.bytes, 0], 0)
            index.append(places + base)
            shard.put(blocks)
        rows = np.concatenate(index)
        info = shard.finish(len(rows))
    except BaseException:
        shard.discard()
        raise
    write_atomic(Path(root) / index_name(name), npy_bytes(rows))
    return info
